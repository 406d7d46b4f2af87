// Copies between storage dtypes.
#include "tiles.h"

namespace drivetrain {
namespace {

// Tensors of fewer elements are not worth waking threads for.
constexpr int64_t kWorthThreads = 32 * kTile;

void copy(const void* source, int source_dtype, int64_t source_start, void* target, int target_dtype,
          int64_t target_start, int64_t count, int threads) {
  for_each_tile(count, count < kWorthThreads ? 1 : threads, [&](int64_t start, int64_t here) {
    if (source_dtype == target_dtype) {
      const int64_t size = size_of(source_dtype);
      std::memcpy(static_cast<char*>(target) + (target_start + start) * size,
                  static_cast<const char*>(source) + (source_start + start) * size, here * size);
      return;
    }
    Tile scratch;
    const float* values = view(source, source_dtype, source_start + start, here, scratch);
    narrow(values, target, target_dtype, target_start + start, here);
  });
}

}  // namespace

// target = round(source * scale); `scaled` says whether to multiply at all.
DRIVETRAIN_API void dt_cast_copy(void* target, int target_dtype, const void* source,
                                 int source_dtype, int64_t count, int scaled, float scale,
                                 int stochastic, uint64_t seed, int threads) {
  if (!scaled && !stochastic) {
    copy(source, source_dtype, 0, target, target_dtype, 0, count, threads);
    return;
  }
  for_each_tile(count, threads, [&](int64_t start, int64_t here) {
    Tile scratch, product;
    const float* values = view(source, source_dtype, start, here, scratch);
    if (scaled) {
#pragma omp simd
      for (int64_t i = 0; i < here; ++i) product.data[i] = values[i] * scale;
      values = product.data;
    }
    Rounder rounder(stochastic != 0, seed);
    rounder.narrow(values, target, target_dtype, start, here, 0);
  });
}

// Copies `number` tensors one after the other into `flat`.
DRIVETRAIN_API void dt_flatten(void* flat, int flat_dtype, const void* const* tensors,
                               const int32_t* dtypes, const int64_t* counts, int64_t number,
                               int threads) {
  int64_t offset = 0;
  for (int64_t t = 0; t < number; offset += counts[t++]) {
    copy(tensors[t], dtypes[t], 0, flat, flat_dtype, offset, counts[t], threads);
  }
}

// Fills `number` tensors from `flat`.
DRIVETRAIN_API void dt_unflatten(const void* flat, int flat_dtype, void* const* tensors,
                                 const int32_t* dtypes, const int64_t* counts, int64_t number,
                                 int threads) {
  int64_t offset = 0;
  for (int64_t t = 0; t < number; offset += counts[t++]) {
    copy(flat, flat_dtype, offset, tensors[t], dtypes[t], 0, counts[t], threads);
  }
}

}  // namespace drivetrain
