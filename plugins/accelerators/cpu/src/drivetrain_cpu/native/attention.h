// What a call of paged attention is given, and how its work is cut.
#pragma once

#include <cstdint>
#include <limits>

#include "panels.h"

namespace drivetrain {

constexpr int64_t kMostDim = 256;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Layout shared with serving.py.
struct Attention {
  const void *query, *keys, *values;
  const float *key_scales, *value_scales;  // of codes, one a token and head
  const int32_t *tables, *starts, *lengths;
  const float* sinks;
  void* out;
  int64_t query_stride, sequences, table_stride, heads, kv_heads, size, dim, value_dim, window;
  float scale, softcap;
  int32_t dtype, cache, threads;

  // Where token `position` of a sequence lies: the number of its row in keys and values.
  int64_t row_of(int64_t sequence, int64_t kv_head, int64_t position) const {
    const int64_t block = tables[sequence * table_stride + position / size];
    return (block * kv_heads + kv_head) * size + position % size;
  }
};

// Queries that pass the keys together: some tokens of a sequence, with all heads of one of keys.
struct Queries {
  int64_t sequence, kv_head, first, tokens;
};

#if defined(__AVX512F__)
// 16 rows of 16 words as columns that are kPanel words apart.
inline void transpose16(const Floats* rows, float* to) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  const auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a[i]), pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a[i]), pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a[i + 1]), pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a[i + 1]), pd(a[i + 3])));
  }
  // b[4 * g + c] holds column c of each 128-bit lane, of rows 4 * g to 4 * g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_store_ps(to + c * kPanel, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_store_ps(to + (4 + c) * kPanel, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_store_ps(to + (8 + c) * kPanel, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_store_ps(to + (12 + c) * kPanel, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#endif

}  // namespace drivetrain
