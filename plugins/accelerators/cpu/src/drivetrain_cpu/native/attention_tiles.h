// Paged attention in bfloat16 by the matrix unit (amx.h): scores of many queries with 128 keys, their
// softmax, whose weights are rounded to bfloat16, and the sums of values.
//
// Steps begin at multiples of 128 positions, and a sum takes its keys in their order, so a query's
// result has the same bits in every batch.
#pragma once

#include <cmath>

#include "amx.h"
#include "attention.h"

#if defined(DRIVETRAIN_TILES)

namespace drivetrain {

constexpr int64_t kTiledRows = 96;  // queries times heads
constexpr int64_t kTiledKeys = 128;

struct alignas(64) TiledScratch {
  float sums[kTiledRows * kMostDim], scores[kTiledRows * kTiledKeys];
  float keys[kTiledKeys / 2 * kMostDim], values[kTiledKeys / 2 * kMostDim];  // of pairs
  uint16_t query[kTiledRows * kMostDim], weights[kTiledRows * kTiledKeys];
  uint16_t nothing[kMostDim];
  float highest[kTiledRows], weight[kTiledRows];
  const uint16_t *key_rows[kTiledKeys], *value_rows[kTiledKeys];
};

// 2 to the power of each number; relative error below 3e-6, which bfloat16 does not see.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);
  for (const float term : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, whole);
}

class TiledQueries {
 public:
  static bool serve(const Attention& a) {
    const bool plain = a.dtype == kBFloat16 && a.cache == 0 && a.softcap == 0;
    return plain && a.dim % kPanel == 0 && a.value_dim % kPanel == 0 && tiles_allowed();
  }

  TiledQueries(const Attention& a, const Queries& queries, TiledScratch& s)
      : a_(a), q_(queries), s_(s), group_(a.heads / a.kv_heads), rows_(queries.tokens * group_) {
    const int64_t new_tokens = a.starts[q_.sequence + 1] - a.starts[q_.sequence];
    position_ = a.lengths[q_.sequence] - new_tokens + q_.first;
  }

  void run() {
    begin();
    const bool both = rows_ > kTileSide;
    shape_tiles(both ? kTileSide : static_cast<int>(rows_), both ? kTileSide : 0);
    const int64_t end = position_ + q_.tokens;
    int64_t from = a_.window > 0 ? std::max<int64_t>(0, position_ - a_.window + 1) : 0;
    for (from = from / kTiledKeys * kTiledKeys; from < end; from += kTiledKeys) {
      const int64_t count = std::min(kTiledKeys, end - from);
      if (both) visit<true>(from, count);
      else visit<false>(from, count);
    }
    free_tiles();
    finish();
  }

 private:
  static constexpr float kToBase2 = 1.44269504f;

  int64_t token_of(int64_t row) const { return a_.starts[q_.sequence] + q_.first + row / group_; }
  int64_t head_of(int64_t row) const { return q_.kv_head * group_ + row % group_; }

  void begin() {
    const int64_t padded = (rows_ + kBlock - 1) / kBlock * kBlock;
    for (int64_t row = 0; row < padded; ++row) {
      uint16_t* to = s_.query + row * a_.dim;
      if (row < rows_) {
        const uint16_t* query = static_cast<const uint16_t*>(a_.query);
        std::copy_n(query + token_of(row) * a_.query_stride + head_of(row) * a_.dim, a_.dim, to);
        const bool sinks = a_.sinks != nullptr;
        s_.highest[row] = sinks ? a_.sinks[head_of(row)] * kToBase2 : kHidden;
        s_.weight[row] = sinks ? 1.0f : 0.0f;
      } else {
        std::fill_n(to, a_.dim, uint16_t{0});
        std::fill_n(s_.weights + row * kTiledKeys, kTiledKeys, uint16_t{0});
      }
    }
    std::fill_n(s_.sums, padded * a_.value_dim, 0.0f);
    std::fill_n(s_.nothing, kMostDim, uint16_t{0});
  }

  template <bool kBoth>
  void visit(int64_t from, int64_t count) {
    const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
    find(from, count, padded);
    // Values are wanted after all products of keys: the memory brings them meanwhile.
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < a_.value_dim; i += 32) {
        __builtin_prefetch(s_.value_rows[j] + i, 0, 2);
      }
    }
    for (int64_t key = 0; key < padded; key += kPanel) keys_as_panel(key);
    for (int64_t row = 0; row < rows_; row += kBlock) {
      const char* query = reinterpret_cast<const char*>(s_.query + row * a_.dim);
      for (int64_t key = 0; key < padded; key += kPanel) {
        block_of_rows<kBoth, false>(
            query, 2 * a_.dim, a_.dim / 2,
            reinterpret_cast<const char*>(s_.keys + key / 2 * a_.dim),
            s_.scores + row * kTiledKeys + key, 4 * kTiledKeys);
      }
    }
    for (int64_t row = 0; row < rows_; ++row) weigh(row, from, count, padded);
    for (int64_t key = 0; key < padded; key += 2) values_as_pairs(key);
    for (int64_t row = 0; row < rows_; row += kBlock) {
      const char* weights = reinterpret_cast<const char*>(s_.weights + row * kTiledKeys);
      for (int64_t column = 0; column < a_.value_dim; column += kPanel) {
        block_of_rows<kBoth, true>(
            weights, 2 * kTiledKeys, padded / 2,
            reinterpret_cast<const char*>(s_.values + column * kTiledKeys / 2),
            s_.sums + row * a_.value_dim + column, 4 * a_.value_dim);
      }
    }
  }

  // Where keys and values lie; those past the last are zeros.
  void find(int64_t from, int64_t count, int64_t padded) {
    int64_t at = a_.row_of(q_.sequence, q_.kv_head, from), left = a_.size - from % a_.size;
    for (int64_t j = 0; j < count; ++j, ++at, --left) {
      if (left == 0) {
        at = a_.row_of(q_.sequence, q_.kv_head, from + j);
        left = a_.size;
      }
      s_.key_rows[j] = static_cast<const uint16_t*>(a_.keys) + at * a_.dim;
      s_.value_rows[j] = static_cast<const uint16_t*>(a_.values) + at * a_.value_dim;
    }
    for (int64_t j = count; j < padded; ++j) s_.key_rows[j] = s_.value_rows[j] = s_.nothing;
  }

  // 32 keys from `key` on as a panel of pairs [dim / 2, 32, 2].
  void keys_as_panel(int64_t key) {
    float* panel = s_.keys + key / 2 * a_.dim;
    for (int64_t j = 0; j < kPanel; j += 16) {
      for (int64_t k = 0; k < a_.dim; k += 32) {
        Floats rows[16];
        for (int64_t i = 0; i < 16; ++i) {
          std::memcpy(rows + i, s_.key_rows[key + j + i] + k, sizeof(Floats));
        }
        transpose16(rows, panel + k / 2 * kPanel + j);
      }
    }
  }

  // Two values from `key` on as a line of panels [value_dim / 32, 64, 32, 2].
  void values_as_pairs(int64_t key) {
    // Words 0 to 15 of the pairs of two rows of 32, and words 16 to 31.
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t column = 0; column < a_.value_dim; column += kPanel) {
      const __m512i first = _mm512_loadu_si512(s_.value_rows[key] + column);
      const __m512i second = _mm512_loadu_si512(s_.value_rows[key + 1] + column);
      float* to = s_.values + column * kTiledKeys / 2 + key / 2 * kPanel;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(first, low, second));
      _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(first, high, second));
    }
  }

  // Scores of one row become weights, and what was summed before is scaled to them.
  void weigh(int64_t row, int64_t from, int64_t count, int64_t padded) {
    uint16_t* to = s_.weights + row * kTiledKeys;
    const int64_t own = position_ + row / group_ - from, last = std::min(count, own + 1);
    const int64_t first = a_.window > 0 ? std::max<int64_t>(0, own - a_.window + 1) : 0;
    if (first >= last) {
      std::fill_n(to, padded, uint16_t{0});
      return;
    }
    // Bit j: whether the query sees key j of a vector.
    const auto seen = [&](int64_t j) {
      const int64_t begin = std::clamp<int64_t>(first - j, 0, 16);
      const int64_t end = std::clamp<int64_t>(last - j, begin, 16);
      return static_cast<__mmask16>((1u << end) - (1u << begin));
    };
    float* scores = s_.scores + row * kTiledKeys;
    const __m512 scale = _mm512_set1_ps(a_.scale * kToBase2);
    __m512 most = _mm512_set1_ps(kHidden);
    for (int64_t j = 0; j < padded; j += 16) {
      const __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + j), scale);
      _mm512_store_ps(scores + j, score);
      most = _mm512_mask_max_ps(most, seen(j), most, score);
    }
    const float before = s_.highest[row], top = std::max(before, _mm512_reduce_max_ps(most));
    const __m512 highest = _mm512_set1_ps(top == kHidden ? 0.0f : top);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 32) {
      __m512 powers[2];
      for (int v = 0; v < 2; ++v) {
        const __m512 score = _mm512_load_ps(scores + j + 16 * v);
        powers[v] = _mm512_maskz_mov_ps(seen(j + 16 * v),
                                        power_of_two(_mm512_sub_ps(score, highest)));
        total = _mm512_add_ps(total, powers[v]);
      }
      _mm512_store_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(powers[1], powers[0]));
    }
    const float factor = before == kHidden ? 0.0f : std::exp2(before - top);
    s_.highest[row] = top;
    s_.weight[row] = s_.weight[row] * factor + _mm512_reduce_add_ps(total);
    if (factor == 1.0f) return;
    float* sums = s_.sums + row * a_.value_dim;
    for (int64_t i = 0; i < a_.value_dim; i += kWidth) store(sums + i, load(sums + i) * factor);
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      uint16_t* to = static_cast<uint16_t*>(a_.out) +
                     (token_of(row) * a_.heads + head_of(row)) * a_.value_dim;
      const float* sums = s_.sums + row * a_.value_dim;
      const float inverse = 1.0f / s_.weight[row];
      for (int64_t i = 0; i < a_.value_dim; i += kWidth) narrowed(to + i, load(sums + i) * inverse);
    }
  }

  const Attention& a_;
  const Queries q_;
  TiledScratch& s_;
  const int64_t group_, rows_;
  int64_t position_;
};

}  // namespace drivetrain
#endif
