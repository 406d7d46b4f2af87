// Products of small float32 matrices that lie in the cache: tiles of rows by vectors of columns.
//
// The left one is read number by number, with any strides, so that it may lie transposed; the right
// one is read by vectors. Each sum is made in the order of k, in one accumulator.
#pragma once

#include <algorithm>

#include "panels.h"

namespace drivetrain {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 4;
#endif

struct Left {
  const float* data;
  int64_t row, k;  // distances of rows, and of numbers of a row
};

struct Right {
  const float* data;
  int64_t k;  // distance of rows
};

// Sums of R rows and L vectors of columns go to take(row, vector, sum).
template <int R, int L, typename Take>
inline void tile_of_product(Left a, Right b, int64_t depth, const Take& take) {
  Floats sums[R][L] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[L];
    for (int v = 0; v < L; ++v) right[v] = load(b.data + k * b.k + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats left = Floats{} + a.data[r * a.row + k * a.k];
      for (int v = 0; v < L; ++v) sums[r][v] = fused(left, right[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < L; ++v) take(r, v, sums[r][v]);
  }
}

template <int L, typename Take>
inline void column_of_product(Left a, int64_t rows, Right b, int64_t depth, const Take& take) {
  int64_t row = 0;
  const auto shifted = [&](int r, int v, const Floats& sum) { take(row + r, v, sum); };
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile_of_product<kTileRows, L>({a.data + row * a.row, a.row, a.k}, b, depth, shifted);
  }
  if (kTileRows > 4) {
    for (; row + 4 <= rows; row += 4) {
      tile_of_product<4, L>({a.data + row * a.row, a.row, a.k}, b, depth, shifted);
    }
  }
  for (; row < rows; ++row) {
    tile_of_product<1, L>({a.data + row * a.row, a.row, a.k}, b, depth, shifted);
  }
}

// a [rows, depth] times b [depth, columns]; take(row, first column of a vector, sum). `columns` is a
// multiple of kWidth.
template <typename Take>
inline void product(Left a, int64_t rows, Right b, int64_t columns, int64_t depth,
                    const Take& take) {
  int64_t at = 0;
  const auto shifted = [&](int64_t row, int v, const Floats& sum) {
    take(row, at + v * kWidth, sum);
  };
  for (; at + 2 * kWidth <= columns; at += 2 * kWidth) {
    column_of_product<2>(a, rows, {b.data + at, b.k}, depth, shifted);
  }
  for (; at < columns; at += kWidth) {
    column_of_product<1>(a, rows, {b.data + at, b.k}, depth, shifted);
  }
}

// Rows [rows, width] in a storage dtype, `stride` elements apart, as float32 rows `to_stride` apart;
// what is past `width` becomes 0.
template <typename T>
inline void rows_as_floats(const T* from, int64_t stride, int64_t rows, int64_t width, float* to,
                           int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from + r * stride;
    float* out = to + r * to_stride;
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) store(out + i, widened(row + i));
    for (; i < width; ++i) out[i] = number(row[i]);
    for (; i < to_stride; ++i) out[i] = 0.0f;
  }
}

// The transposed of rows [rows, width], times `factor`: [width, to_stride], 0 past `rows`.
inline void transposed(const float* from, int64_t stride, int64_t rows, int64_t width, float factor,
                       float* to, int64_t to_stride) {
  for (int64_t k = 0; k < width; ++k) {
    float* out = to + k * to_stride;
    int64_t r = 0;
    for (; r < rows; ++r) out[r] = from[r * stride + k] * factor;
    for (; r < to_stride; ++r) out[r] = 0.0f;
  }
}

}  // namespace drivetrain
