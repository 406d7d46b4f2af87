// Products with weights of 8 or 6 bits that are floating-point numbers themselves.
#include <cstdlib>

#include "panels.h"

namespace drivetrain {
namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 8;  // rows whose sums fit the registers
#else
constexpr int kTogether = kLanes > 4 ? 1 : 2;
#endif
constexpr int64_t kChunk = 96;  // rows that stay in the second-level cache while panels pass

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

inline Ints bytes_at(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Ints);
}

// Numbers of 1 sign, E exponent and M mantissa bits: moved to the places that float32 has for them
// they are off by a power of two, also those below the smallest exponent.
template <int kExponent, int kMantissa>
inline Floats decoded(const Ints& codes) {
  constexpr int kBits = kExponent + kMantissa;
  const Ints magnitude = (codes & ((1 << kBits) - 1)) << (23 - kMantissa);
  const Ints sign = (codes >> kBits) << 31;
  const Floats value = (Floats)(magnitude | sign);
  return value * float_of(static_cast<uint32_t>(254 - ((1 << (kExponent - 1)) - 1)) << 23);
}

// Four inputs of 32 outputs as they lie: 128 bytes, or 64 of low nibbles and 32 of high pairs.
struct Fp8 {
  static constexpr int64_t kBytes = 4 * kPanel;
  static Floats at(const uint8_t* group, int input, int v) {
    return decoded<4, 3>(bytes_at(group + input * kPanel + v * kWidth));
  }
};

struct Fp6 {
  static constexpr int64_t kBytes = 3 * kPanel;
  static Floats at(const uint8_t* group, int input, int v) {
    const Ints nibbles = bytes_at(group + input / 2 * kPanel + v * kWidth);
    const Ints pairs = bytes_at(group + 2 * kPanel + v * kWidth);
    const Ints low = nibbles >> (input % 2 * 4) & 15, high = pairs >> (2 * input) & 3;
    return decoded<3, 2>(low | high << 4);
  }
};

template <int R, typename Format, typename Take>
inline void rows_of_codes(const float* x, int64_t width, const uint8_t* codes, const float* scales,
                          const Take& take) {
  Floats sums[R][kLanes] = {};
  for (int64_t k = 0; k < width; k += 4) {
    const uint8_t* group = codes + k / 4 * Format::kBytes;
#pragma GCC unroll 4
    for (int input = 0; input < 4; ++input) {
      for (int v = 0; v < kLanes; ++v) {
        const Floats weights = Format::at(group, input, v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          sums[r][v] = fused(Floats{} + x[r * width + k + input], weights, sums[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kLanes; ++v) sums[r][v] = sums[r][v] * load(scales + v * kWidth);
    take(r, sums[r]);
  }
}

template <typename Format, typename T>
void multiply(const float* x, int64_t width, const uint8_t* codes, const float* scales, T* y,
              int64_t rows, int64_t outputs, int threads) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  const int64_t items = panels * ((rows + kChunk - 1) / kChunk);
  const int share = static_cast<int>(std::max<int64_t>(1, items / (threads * 8)));
#pragma omp parallel for schedule(dynamic, share) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t panel = item % panels, column = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, outputs - column);
    const uint8_t* from = codes + panel * (width / 4) * Format::kBytes;
    int64_t row = item / panels * kChunk;
    const int64_t end = std::min(rows, row + kChunk);
    float own[kPanel] = {};
    std::copy_n(scales + column, columns, own);
    const auto take = [&](int r, const Floats* sums) {
      float plain[kPanel];
      for (int v = 0; v < kLanes; ++v) store(plain + v * kWidth, sums[v]);
      T* to = y + (row + r) * outputs + column;
      for (int64_t i = 0; i < columns; ++i) assign(to + i, plain[i]);
    };
    for (; row + kTogether <= end; row += kTogether) {
      rows_of_codes<kTogether, Format>(x + row * width, width, from, own, take);
    }
    for (; row < end; ++row) rows_of_codes<1, Format>(x + row * width, width, from, own, take);
  }
}

}  // namespace

// y [rows, outputs] = x [rows, inputs] * weight; 0, or 1 without memory.
DRIVETRAIN_API int dt_minifloat_linear(const void* x, int dtype, const uint8_t* codes,
                                       const float* scales, int six_bits, void* y, int64_t rows,
                                       int64_t inputs, int64_t outputs, int threads) {
  const int64_t width = (inputs + 3) / 4 * 4;
  float* wide = static_cast<float*>(std::malloc(std::max<int64_t>(1, rows * width * 4)));
  if (wide == nullptr) return 1;
  for (int64_t row = 0; row < rows; ++row) {
    widen(x, dtype, row * inputs, inputs, wide + row * width);
    std::fill(wide + row * width + inputs, wide + (row + 1) * width, 0.0f);
  }
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(y);
    if (six_bits) multiply<Fp6>(wide, width, codes, scales, to, rows, outputs, threads);
    else multiply<Fp8>(wide, width, codes, scales, to, rows, outputs, threads);
  });
  std::free(wide);
  return 0;
}

}  // namespace drivetrain
