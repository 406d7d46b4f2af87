// The squared norm of many tensors, summed in float64 and always in the same order.
#include "tensors.h"

namespace drivetrain {
namespace {

// Sums of one launch: enough blocks to keep a device busy.
constexpr int64_t kSums = 1024;

struct NormTask {
  Tensors tensors;
  double* sums;
};

template <int kWidth>
__device__ inline double vector_norm(const void* memory, int dtype, int64_t at) {
  float values[kWidth];
  load<kWidth>(memory, dtype, at, values);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const double value = values[i];
    sum += value * value;
  }
  return sum;
}

template <int kWidth>
__device__ inline double chunk_norm(const void* memory, int dtype, int64_t start, int64_t count) {
  Cutter cutter(kWidth);
  cutter.add(memory, dtype, start);
  const Cut cut = cutter.cut(count);
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < cut.vectors; i += kThreads) {
    sum += vector_norm<kWidth>(memory, dtype, start + cut.vector(i));
  }
  for (int64_t i = threadIdx.x; i < cut.singles(); i += kThreads) {
    sum += vector_norm<1>(memory, dtype, start + cut.single(i));
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(NormTask task) {
  double sum = 0;
  for (int index = blockIdx.x; index < task.tensors.chunks; index += gridDim.x) {
    const Chunk chunk = chunk_at(task.tensors, index);
    const void* memory = task.tensors.memory[chunk.tensor];
    const int dtype = task.tensors.dtypes[chunk.tensor];
    sum += dtype == kFloat32 ? chunk_norm<4>(memory, dtype, chunk.start, chunk.count)
                             : chunk_norm<8>(memory, dtype, chunk.start, chunk.count);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) task.sums[blockIdx.x] = total;
}

struct TotalTask {
  const double* sums;
  int64_t count;
  double* total;
  uint8_t* overflow;
};

__global__ void __launch_bounds__(kThreads) total_kernel(TotalTask task) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < task.count; i += kThreads) sum += task.sums[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) {
    *task.total = total;
    *task.overflow = !(total - total == 0);  // infinite or not a number
  }
}

}  // namespace

// Number of float64 sums that dt_norm_squared needs for `number` tensors.
DRIVETRAIN_API int64_t dt_norm_sums(int64_t number) {
  return kSums * ((number + kTensors - 1) / kTensors);
}

DRIVETRAIN_API int dt_norm_squared(void* const* memory, const int32_t* dtypes,
                                   const int64_t* counts, int64_t number, double* sums,
                                   double* total, uint8_t* overflow, void* stream) {
  int64_t used = 0;
  const int status = for_each_list(memory, dtypes, counts, number, [&](const Tensors& tensors) {
    const int64_t blocks = tensors.chunks < kSums ? tensors.chunks : kSums;
    const NormTask task{tensors, sums + used};
    used += blocks;
    return launch_blocks(norm_kernel, task, blocks, stream);
  });
  if (status != 0) return status;
  return launch_blocks(total_kernel, TotalTask{sums, used, total, overflow}, 1, stream);
}

}  // namespace drivetrain
