// Products with weights of which two of four neighbouring inputs are left; the layout is that of
// drivetrain_kernels/ops/pair_linear.py.
#include <cstdlib>

#include "bytes.h"
#include "panels.h"

namespace drivetrain {
namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 4;  // rows that share what is read of a weight
#else
constexpr int kTogether = 1;
#endif
constexpr int64_t kGroup = 8;  // inputs whose places are in one byte
constexpr int64_t kChunk = 96;  // rows that stay in the second-level cache while panels pass

// The input at each lane's place, out of four.
inline Floats chosen(const float* four, const Ints& places) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_broadcast_f32x4(_mm_loadu_ps(four));
  return (Floats)_mm512_permutexvar_ps((__m512i)places, table);  // the low bits of a lane decide
#else
  const Floats low = (places & 1) != 0 ? Floats{} + four[1] : Floats{} + four[0];
  const Floats high = (places & 1) != 0 ? Floats{} + four[3] : Floats{} + four[2];
  return (places & 2) != 0 ? high : low;
#endif
}

template <int R, typename T, typename Take>
inline void rows_of_pairs(const float* x, int64_t width, const T* values, const uint8_t* places,
                          const Take& take) {
  Floats sums[R][kLanes] = {};
  for (int64_t k = 0; k < width; k += kGroup) {
    const T* group = values + k / kGroup * 4 * kPanel;
    const uint8_t* bytes = places + k / kGroup * kPanel;
    for (int v = 0; v < kLanes; ++v) {
      const Ints at = bytes_at(bytes + v * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Floats weights = widened(group + i * kPanel + v * kWidth);
        const Ints place = at >> (2 * i) & 3;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const float* four = x + r * width + k + i / 2 * 4;
          sums[r][v] = fused(chosen(four, place), weights, sums[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) take(r, sums[r]);
}

template <typename T>
void multiply(const float* x, int64_t width, const T* values, const uint8_t* places, T* y,
              int64_t rows, int64_t outputs, int threads) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  const int64_t items = panels * ((rows + kChunk - 1) / kChunk);
  const int share = static_cast<int>(std::max<int64_t>(1, items / (threads * 8)));
#pragma omp parallel for schedule(dynamic, share) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t panel = item % panels, column = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, outputs - column);
    const int64_t groups = panel * (width / kGroup);
    const T* from = values + groups * 4 * kPanel;
    const uint8_t* at = places + groups * kPanel;
    int64_t row = item / panels * kChunk;
    const int64_t end = std::min(rows, row + kChunk);
    const auto take = [&](int r, const Floats* sums) {
      float plain[kPanel];
      for (int v = 0; v < kLanes; ++v) store(plain + v * kWidth, sums[v]);
      T* to = y + (row + r) * outputs + column;
      for (int64_t i = 0; i < columns; ++i) assign(to + i, plain[i]);
    };
    for (; row + kTogether <= end; row += kTogether) {
      rows_of_pairs<kTogether>(x + row * width, width, from, at, take);
    }
    for (; row < end; ++row) rows_of_pairs<1>(x + row * width, width, from, at, take);
  }
}

}  // namespace

// y [rows, outputs] = x [rows, inputs] * weight; 0, or 1 without memory.
DRIVETRAIN_API int dt_pair_linear(const void* x, int dtype, const void* values,
                                  const uint8_t* places, void* y, int64_t rows, int64_t inputs,
                                  int64_t outputs, int threads) {
  const int64_t width = (inputs + kGroup - 1) / kGroup * kGroup;
  float* wide = static_cast<float*>(std::malloc(std::max<int64_t>(1, rows * width * 4)));
  if (wide == nullptr) return 1;
  for (int64_t row = 0; row < rows; ++row) {
    widen(x, dtype, row * inputs, inputs, wide + row * width);
    std::fill(wide + row * width + inputs, wide + (row + 1) * width, 0.0f);
  }
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    multiply(wide, width, static_cast<const T*>(values), places, static_cast<T*>(y), rows, outputs,
             threads);
  });
  std::free(wide);
  return 0;
}

}  // namespace drivetrain
