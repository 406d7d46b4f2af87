// Weights rounded to integers and back; the arithmetic is that of
// drivetrain_kernels/ops/fake_quantize.py, operation by operation, so that bits are the same.
#include <cmath>
#include <limits>

#include "tiles.h"

namespace drivetrain {
namespace {

// Smallest and largest of some values, and whether all are numbers.
struct Extent {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  bool finite = true;

  void add(const Extent& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
    finite = finite && other.finite;
  }
};

Extent extent_of(const float* values, int64_t count) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  uint32_t magnitude = 0;
#pragma omp simd reduction(min : low) reduction(max : high, magnitude)
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
    // Ordered as integers, NaN lies above infinity, so nothing is lost in the maximum.
    magnitude = std::max(magnitude, bits_of(values[i]) & 0x7fffffff);
  }
  Extent found;
  found.low = low;
  found.high = high;
  found.finite = magnitude < 0x7f800000;
  return found;
}

struct Grid {
  float scale, safe, zero, least, largest;
};

Grid grid_of(const Extent& extent, int bits, bool symmetric) {
  const float steps = static_cast<float>(1 << bits);
  Grid grid;
  if (symmetric) {
    grid.scale = 2.0f * std::max(-extent.low, extent.high) / steps;
    grid.least = -static_cast<float>(1 << (bits - 1));
    grid.largest = static_cast<float>((1 << (bits - 1)) - 1);
    grid.zero = 0.0f;
  } else {
    grid.scale = (extent.high - extent.low) / steps;
    grid.least = 0.0f;
    grid.largest = steps - 1.0f;
    grid.zero = grid.scale == 0.0f ? extent.low
                                   : std::nearbyint(extent.low / grid.scale) * grid.scale;
  }
  if (!extent.finite) grid.scale = std::numeric_limits<float>::quiet_NaN();
  grid.safe = grid.scale == 0.0f ? 1.0f : grid.scale;
  return grid;
}

// To the nearest integer, ties to even, for |value| < 2^22; NaN stays.
inline float round_to_integer(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the last place is 1
  return (value + kShift) - kShift;
}

// Codes are cut before they are rounded, as bounds are integers, so none is too large to round.
void round_values(const float* from, int64_t count, const Grid& grid, bool symmetric, float* to) {
  if (symmetric) {
    for (int64_t i = 0; i < count; ++i) {
      const float step = from[i] / grid.safe;
      to[i] = grid.scale * round_to_integer(std::min(std::max(step, grid.least), grid.largest));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float step = (from[i] - grid.zero) / grid.safe;
    const float code = round_to_integer(std::min(std::max(step, grid.least), grid.largest));
    to[i] = grid.scale * code + grid.zero;
  }
}

// Calls body(start, count) for the tiles of a group that lies at `first`.
template <typename Body>
void tiles_of(int64_t first, int64_t size, int threads, const Body& body) {
  for_each_tile(size, threads, [&](int64_t start, int64_t here) { body(first + start, here); });
}

void fake_quantize_group(const void* values, int dtype, int64_t first, int64_t size, int bits,
                         bool symmetric, void* rounded, int threads) {
  Extent extent;
  tiles_of(first, size, threads, [&](int64_t start, int64_t here) {
    Tile scratch;
    const Extent own = extent_of(view(values, dtype, start, here, scratch), here);
#pragma omp critical(drivetrain_extent)
    extent.add(own);
  });
  const Grid grid = grid_of(extent, bits, symmetric);
  tiles_of(first, size, threads, [&](int64_t start, int64_t here) {
    Tile scratch, made;
    const float* from = view(values, dtype, start, here, scratch);
    float* to = dtype == kFloat32 ? static_cast<float*>(rounded) + start : made.data;
    round_values(from, here, grid, symmetric, to);
    if (dtype != kFloat32) narrow(to, rounded, dtype, start, here);
  });
}

}  // namespace

// Threads share out groups, or the tiles of each where there are few groups.
DRIVETRAIN_API void dt_fake_quantize(const void* values, int dtype, int64_t groups, int64_t size,
                                     int bits, int symmetric, void* rounded, int threads) {
  const bool many = groups >= 2 * threads;
  const int inside = many ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && many)
  for (int64_t group = 0; group < groups; ++group) {
    fake_quantize_group(values, dtype, group * size, size, bits, symmetric != 0, rounded, inside);
  }
}

}  // namespace drivetrain
