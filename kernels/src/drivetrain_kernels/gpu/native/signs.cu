// One bit per element; the arithmetic is that of drivetrain_kernels/ops/signs.py.
#include "tensors.h"

namespace drivetrain {
namespace {

struct PackSignsTask {
  const float* values;
  const float* scale;
  float* error;
  uint8_t* packed;
  int64_t count;
};

// A thread makes one byte.
__global__ void __launch_bounds__(kThreads) pack_signs_kernel(PackSignsTask task) {
  const float scale = *task.scale;
  const int64_t bytes = (task.count + 7) / 8;
  for (int64_t at = thread_index(); at < bytes; at += thread_stride()) {
    uint32_t byte = 0;
    for (int i = 0; i < 8 && at * 8 + i < task.count; ++i) {
      const float value = task.values[at * 8 + i];
      const uint32_t sign = value >= 0;
      byte |= sign << i;
      task.error[at * 8 + i] = value - (sign ? scale : -scale);
    }
    task.packed[at] = static_cast<uint8_t>(byte);
  }
}

struct MeanSignsTask {
  const uint8_t* packed;
  const float* scales;
  float* mean;
  int64_t sources, count;
};

__global__ void __launch_bounds__(kThreads) mean_signs_kernel(MeanSignsTask task) {
  const int64_t width = (task.count + 7) / 8;
  const float divisor = static_cast<float>(task.sources);
  for (int64_t at = thread_index(); at < task.count; at += thread_stride()) {
    float total = 0;
    for (int64_t s = 0; s < task.sources; ++s) {
      const float scale = task.scales[s];
      total += (task.packed[s * width + at / 8] >> (at % 8)) & 1 ? scale : -scale;
    }
    task.mean[at] = total / divisor;
  }
}

}  // namespace

DRIVETRAIN_API int dt_pack_signs(const float* values, const float* scale, float* error,
                                 uint8_t* packed, int64_t count, void* stream) {
  const PackSignsTask task{values, scale, error, packed, count};
  return launch(pack_signs_kernel, task, (count + 7) / 8, stream);
}

DRIVETRAIN_API int dt_mean_signs(const uint8_t* packed, const float* scales, int64_t sources,
                                 int64_t count, float* mean, void* stream) {
  const MeanSignsTask task{packed, scales, mean, sources, count};
  return launch(mean_signs_kernel, task, count, stream);
}

}  // namespace drivetrain
