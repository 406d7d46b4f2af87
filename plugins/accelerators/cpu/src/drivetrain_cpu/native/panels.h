// Products with panels: 32 columns side by side, so that a vector holds one row's sums of as many
// columns as it has lanes, and nothing is reduced across it.
//
// A sum is made in the order of its inputs, in one accumulator, whatever the number of rows: a
// row's result has the same bits in every batch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "dtypes.h"

namespace drivetrain {

constexpr int kPanel = 32;
constexpr int kLanes = kPanel / kWidth;  // vectors that hold a row of a panel
// Rows whose sums fit the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = kLanes > 4 ? 1 : 2;
#endif

// Elements as they lie in memory; float16 has a type of its own to tell it from bfloat16.
struct Half {
  uint16_t bits;
};

template <typename T>
constexpr int kWord = 4 / sizeof(T);  // inputs of a word

inline Floats fused(const Floats& a, const Floats& b, const Floats& sum) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  return a * b + sum;
#endif
}

inline Floats widened(const Half* from) {
  Floats values;
  float plain[kWidth];
  widen_float16(&from->bits, plain, kWidth);
  std::memcpy(&values, plain, sizeof values);
  return values;
}
inline Floats widened(const uint16_t* from) { return load(from); }
inline Floats widened(const float* from) { return load(from); }

inline void narrowed(float* to, const Floats& values) { store(to, values); }
inline void narrowed(uint16_t* to, const Floats& values) { store(to, values); }
inline void narrowed(Half* to, const Floats& values) {
  float plain[kWidth];
  std::memcpy(plain, &values, sizeof values);
  round_float16(plain, &to->bits, kWidth);
}

inline float number(float value) { return value; }
inline float number(uint16_t value) { return widen_bfloat16(value); }
inline float number(Half value) { return widen_float16(value.bits); }
inline void assign(float* to, float value) { *to = value; }
inline void assign(uint16_t* to, float value) { *to = round_bfloat16(value); }
inline void assign(Half* to, float value) { to->bits = round_float16(value); }

// One word of 32 columns, in vectors.
template <typename T>
struct Word;

template <>
struct Word<float> {
  Floats values[kLanes];
  explicit Word(const float* panel) {
    for (int v = 0; v < kLanes; ++v) values[v] = load(panel + v * kWidth);
  }
  void add(const float* x, Floats* sums) const {
    const Floats value = Floats{} + *x;
    for (int v = 0; v < kLanes; ++v) sums[v] = fused(value, values[v], sums[v]);
  }
};

template <>
struct Word<uint16_t> {
#if defined(__AVX512BF16__)
  __m512i pairs[kLanes];
  explicit Word(const uint16_t* panel) {
    for (int v = 0; v < kLanes; ++v) pairs[v] = _mm512_loadu_si512(panel + 2 * v * kWidth);
  }
  void add(const uint16_t* x, Floats* sums) const {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    const __m512i value = _mm512_set1_epi32(pair);
    for (int v = 0; v < kLanes; ++v) {
      sums[v] = (Floats)_mm512_dpbf16_ps((__m512)sums[v], (__m512bh)value, (__m512bh)pairs[v]);
    }
  }
#else
  Floats first[kLanes], second[kLanes];
  explicit Word(const uint16_t* panel) {
    for (int v = 0; v < kLanes; ++v) {
      Bits pairs;
      std::memcpy(&pairs, panel + 2 * v * kWidth, sizeof pairs);
      first[v] = (Floats)(pairs << 16);
      second[v] = (Floats)(pairs & 0xffff0000u);
    }
  }
  void add(const uint16_t* x, Floats* sums) const {
    const Floats one = Floats{} + widen_bfloat16(x[0]), two = Floats{} + widen_bfloat16(x[1]);
    for (int v = 0; v < kLanes; ++v) {
      sums[v] = fused(two, second[v], fused(one, first[v], sums[v]));
    }
  }
#endif
};

template <>
struct Word<Half> {
  Floats first[kLanes], second[kLanes];
  explicit Word(const Half* panel) {
    Half parts[2][kPanel];
    for (int i = 0; i < kPanel; ++i) {
      parts[0][i] = panel[2 * i];
      parts[1][i] = panel[2 * i + 1];
    }
    for (int v = 0; v < kLanes; ++v) {
      first[v] = widened(parts[0] + v * kWidth);
      second[v] = widened(parts[1] + v * kWidth);
    }
  }
  void add(const Half* x, Floats* sums) const {
    const Floats one = Floats{} + number(x[0]), two = Floats{} + number(x[1]);
    for (int v = 0; v < kLanes; ++v) {
      sums[v] = fused(two, second[v], fused(one, first[v], sums[v]));
    }
  }
};

// Sums of R rows of x, `stride` elements apart, over `words` words of one panel.
template <int R, typename T, typename Take>
inline void rows_of_panel(const T* x, int64_t stride, int64_t words, const T* panel,
                          const Take& take) {
  Floats sums[R][kLanes] = {};
  for (int64_t k = 0; k < words; ++k) {
    const Word<T> word(panel + k * kPanel * kWord<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) word.add(x + r * stride + k * kWord<T>, sums[r]);
  }
  for (int r = 0; r < R; ++r) take(r, sums[r]);
}

// Calls take(row, sums of its 32 columns) for all rows.
template <typename T, typename Take>
inline void times_panel(const T* x, int64_t stride, int64_t rows, int64_t words, const T* panel,
                        const Take& take) {
#if defined(DRIVETRAIN_TILES)
  if constexpr (std::is_same_v<T, uint16_t>) {
    if (tiles_allowed()) {
      const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
      tiles_times_panel(x, bytes, rows, words, panel, take);
      return;
    }
  }
#endif
  int64_t row = 0;
  const auto shifted = [&](int r, const Floats* sums) { take(row + r, sums); };
  for (; row + kRows <= rows; row += kRows) {
    rows_of_panel<kRows>(x + row * stride, stride, words, panel, shifted);
  }
  if (kRows > 4) {
    for (; row + 4 <= rows; row += 4) {
      rows_of_panel<4>(x + row * stride, stride, words, panel, shifted);
    }
  }
  for (; row < rows; ++row) rows_of_panel<1>(x + row * stride, stride, words, panel, shifted);
}

// e to the power of each element; relative error below 3e-7, 0 below -87.
inline Floats exponential(const Floats& values) {
  const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
  const Floats x = values < low ? low : (values > high ? high : values);
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const Floats magic = Floats{} + 12582912.0f;
  const Floats shifted = fused(x, Floats{} + 1.44269504f, magic), whole = shifted - magic;
  Floats rest = fused(whole, Floats{} - 0.693359375f, x);
  rest = fused(whole, Floats{} + 2.12194440e-4f, rest);
  Floats sum = Floats{} + 1.9875691500e-4f;
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f, 1.0f, 1.0f}) {
    sum = fused(sum, rest, Floats{} + term);
  }
  const Floats scaled = (Floats)((Bits)sum + ((Bits)shifted << 23));
  return values < low ? Floats{} : scaled;
}

// Runs body with a value of the element type that `dtype` names.
template <typename Body>
inline void with_type(int dtype, const Body& body) {
  if (dtype == kFloat32) body(float());
  else if (dtype == kBFloat16) body(uint16_t());
  else body(Half());
}

}  // namespace drivetrain
