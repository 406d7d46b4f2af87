// Attention over a paged cache (arXiv 2309.06180), with the softmax of arXiv 2205.14135: a block of
// keys at a time, in the order of positions, so a query's result has the same bits in every batch.
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "attention_tiles.h"
#include "bytes.h"
#include "team.h"

namespace drivetrain {
namespace {

constexpr int64_t kMostRows = 48;  // queries times heads of a tile
constexpr int64_t kWorthAThread = 1 << 18;  // products for which waking one more thread pays

struct alignas(64) Scratch {
  float query[kMostRows * kMostDim], sums[kMostRows * kMostDim], scores[kMostRows * kPanel];
  float keys[kMostDim * kPanel], values[kMostDim * kPanel];
  float highest[kMostRows], weight[kMostRows], key_scales[kPanel], value_scales[kPanel];
};

// `count` keys [count, dim] as a panel [dim, 32]; columns past `count` are 0.
template <typename T>
void keys_as_panel(const T* keys, int64_t count, int64_t dim, float* panel) {
  int64_t done = 0;
#if defined(__AVX512F__)
  for (int64_t j = 0; j < kPanel; j += 16) {
    for (int64_t k = 0; k + 16 <= dim; k += 16) {
      Floats rows[16] = {};
      for (int64_t i = 0; i < 16 && j + i < count; ++i) rows[i] = widened(keys + (j + i) * dim + k);
      transpose16(rows, panel + k * kPanel + j);
    }
  }
  done = dim / 16 * 16;
#endif
  for (int64_t k = done; k < dim; ++k) {
    for (int64_t j = 0; j < kPanel; ++j) {
      panel[k * kPanel + j] = j < count ? number(keys[j * dim + k]) : 0.0f;
    }
  }
}

// `count` values [count, dim] as panels [dim / 32, count, 32].
template <typename T>
void values_as_panels(const T* values, int64_t count, int64_t dim, float* panels) {
  for (int64_t column = 0; column < dim; column += kPanel) {
    for (int64_t j = 0; j < count; ++j) {
      float* to = panels + (column / kPanel * count + j) * kPanel;
      const T* from = values + j * dim + column;
      if (column + kPanel <= dim) {
        for (int v = 0; v < kLanes; ++v) store(to + v * kWidth, widened(from + v * kWidth));
      } else {
        for (int64_t i = 0; i < kPanel; ++i) to[i] = column + i < dim ? number(from[i]) : 0.0f;
      }
    }
  }
}

// Scores of one row become weights; returns the factor of what was summed before.
float soften(float* scores, int64_t count, float softcap, float* highest, float* weight) {
  if (softcap > 0) {
    for (int64_t j = 0; j < count; ++j) {
      if (scores[j] != kHidden) scores[j] = softcap * std::tanh(scores[j] / softcap);
    }
  }
  for (int64_t j = count; j < kPanel; ++j) scores[j] = kHidden;
  Floats most = load(scores);
  for (int v = 1; v < kLanes; ++v) {
    const Floats other = load(scores + v * kWidth);
    most = other > most ? other : most;
  }
  float top = *highest;
  for (int i = 0; i < kWidth; ++i) top = std::max(top, most[i]);
  Floats total = {};
  for (int v = 0; v < kLanes; ++v) {
    const Floats score = load(scores + v * kWidth);
    const Floats power = top == kHidden ? Floats{} : exponential(score - top);
    store(scores + v * kWidth, power);
    total = total + power;
  }
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += total[i];
  const float factor = top == *highest ? 1.0f : (*highest == kHidden ? 0.0f : std::exp(*highest - top));
  *highest = top;
  *weight = *weight * factor + sum;
  return factor;
}

// T is the type of queries and results, C that of the cache.
template <typename T, typename C>
class TileOfQueries {
 public:
  TileOfQueries(const Attention& a, const Queries& tile, Scratch& s)
      : a_(a), tile_(tile), s_(s), group_(a.heads / a.kv_heads), rows_(tile.tokens * group_) {
    const int64_t new_tokens = a.starts[tile.sequence + 1] - a.starts[tile.sequence];
    position_ = a.lengths[tile.sequence] - new_tokens + tile.first;
    wide_ = (a.value_dim + kPanel - 1) / kPanel * kPanel;
  }

  void run() {
    begin();
    const int64_t end = position_ + tile_.tokens;
    int64_t from = a_.window > 0 ? std::max<int64_t>(0, position_ - a_.window + 1) : 0;
    // Steps begin at multiples of their length in a block, whatever the window, and stay inside of it.
    const int64_t step = std::min<int64_t>(kPanel, a_.size), place = from % a_.size;
    from += place / step * step - place;
    while (from < end) {
      const int64_t left = std::min(end - from, a_.size - from % a_.size);
      const int64_t count = std::min(step, left);
      visit(from, count);
      from += count;
    }
    finish();
  }

 private:
  static constexpr bool kCodes = sizeof(C) == 1;

  int64_t row_of(int64_t row) const { return a_.starts[tile_.sequence] + tile_.first + row / group_; }
  int64_t head_of(int64_t row) const { return tile_.kv_head * group_ + row % group_; }

  void begin() {
    for (int64_t row = 0; row < rows_; ++row) {
      const T* from = static_cast<const T*>(a_.query) + row_of(row) * a_.query_stride +
                      head_of(row) * a_.dim;
      for (int64_t k = 0; k < a_.dim; ++k) s_.query[row * a_.dim + k] = number(from[k]) * a_.scale;
      std::fill_n(s_.sums + row * wide_, wide_, 0.0f);
      s_.highest[row] = a_.sinks == nullptr ? kHidden : a_.sinks[head_of(row)];
      s_.weight[row] = a_.sinks == nullptr ? 0.0f : 1.0f;
    }
  }

  void visit(int64_t from, int64_t count) {
    const int64_t at = a_.row_of(tile_.sequence, tile_.kv_head, from);
    keys_as_panel(static_cast<const C*>(a_.keys) + at * a_.dim, count, a_.dim, s_.keys);
    values_as_panels(static_cast<const C*>(a_.values) + at * a_.value_dim, count, a_.value_dim,
                     s_.values);
    if constexpr (kCodes) {
      std::fill_n(std::copy_n(a_.key_scales + at, count, s_.key_scales), kPanel - count, 0.0f);
      std::fill_n(std::copy_n(a_.value_scales + at, count, s_.value_scales), kPanel - count, 0.0f);
    }
    times_panel(s_.query, a_.dim, rows_, a_.dim, s_.keys, [&](int64_t row, const Floats* sums) {
      scaled(s_.scores + row * kPanel, sums, s_.key_scales);
    });
    for (int64_t row = 0; row < rows_; ++row) weigh(row, from, count);
    for (int64_t column = 0; column < wide_; column += kPanel) {
      times_panel(s_.scores, kPanel, rows_, count, s_.values + column * count,
                  [&](int64_t row, const Floats* sums) {
                    float* to = s_.sums + row * wide_ + column;
                    for (int v = 0; v < kLanes; ++v) {
                      store(to + v * kWidth, load(to + v * kWidth) + sums[v]);
                    }
                  });
    }
  }

  // Codes stand for multiples of their scales: a column of scores belongs to one key.
  static void scaled(float* to, const Floats* sums, const float* scales) {
    for (int v = 0; v < kLanes; ++v) {
      store(to + v * kWidth, kCodes ? sums[v] * load(scales + v * kWidth) : sums[v]);
    }
  }

  void weigh(int64_t row, int64_t from, int64_t count) {
    float* scores = s_.scores + row * kPanel;
    const int64_t own = position_ + row / group_;
    const int64_t last = std::min(count, own + 1 - from);
    for (int64_t j = std::max<int64_t>(0, last); j < count; ++j) scores[j] = kHidden;
    if (a_.window > 0) {
      const int64_t hidden = std::min(count, own - a_.window + 1 - from);
      for (int64_t j = 0; j < hidden; ++j) scores[j] = kHidden;
    }
    const float factor = soften(scores, count, a_.softcap, s_.highest + row, s_.weight + row);
    if (factor != 1.0f) {
      float* sums = s_.sums + row * wide_;
      for (int64_t i = 0; i < wide_; i += kWidth) store(sums + i, load(sums + i) * factor);
    }
    if constexpr (kCodes) {
      Floats weights[kLanes];
      for (int v = 0; v < kLanes; ++v) weights[v] = load(scores + v * kWidth);
      scaled(scores, weights, s_.value_scales);
    }
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      T* to = static_cast<T*>(a_.out) + (row_of(row) * a_.heads + head_of(row)) * a_.value_dim;
      const float inverse = 1.0f / s_.weight[row];
      for (int64_t k = 0; k < a_.value_dim; ++k) assign(to + k, s_.sums[row * wide_ + k] * inverse);
    }
  }

  const Attention& a_;
  const Queries tile_;
  Scratch& s_;
  const int64_t group_, rows_;
  int64_t position_, wide_;
};

// Calls attend(queries, memory) for all of the list; false without memory.
template <typename Memory, typename Attend>
bool each_with(const std::vector<Queries>& list, int threads, const Attend& attend) {
  std::atomic<bool> failed{false};
  share_out(threads, static_cast<int64_t>(list.size()), 1, [&](Items& items) {
    // Kept by the thread: the system would take so much memory back after each call, and clear it.
    static thread_local std::unique_ptr<Memory> memory;
    if (memory == nullptr) memory.reset(new (std::nothrow) Memory);
    if (memory == nullptr) {
      failed = true;
      return;
    }
    items.each([&](int64_t number) { attend(list[number], *memory); });
  });
  return !failed;
}

// All queries of a call, cut so that at most `rows` queries and heads pass together.
std::vector<Queries> cut(const Attention& a, int64_t rows) {
  const int64_t most = std::max<int64_t>(1, rows / (a.heads / a.kv_heads));
  std::vector<Queries> list;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t count = a.starts[s + 1] - a.starts[s];
    // The last ones are the longest, so they come first.
    for (int64_t first = (count - 1) / most * most; count > 0 && first >= 0; first -= most) {
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        list.push_back({s, head, first, std::min(most, count - first)});
      }
    }
  }
  return list;
}

int threads_for(const Attention& a) {
  if (Team::led()) return a.threads;  // a team's threads are awake already
  int64_t work = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t count = a.starts[s + 1] - a.starts[s];
    work += count * a.lengths[s] * a.heads * (a.dim + a.value_dim);
  }
  return static_cast<int>(std::clamp<int64_t>(work / kWorthAThread, 1, a.threads));
}

bool attend(const Attention& a) {
#if defined(DRIVETRAIN_TILES)
  if (TiledQueries::serve(a)) {
    return each_with<TiledScratch>(
        cut(a, kTiledRows), threads_for(a),
        [&](const Queries& queries, TiledScratch& memory) { TiledQueries(a, queries, memory).run(); });
  }
#endif
  return each_with<Scratch>(
      cut(a, kMostRows), threads_for(a), [&](const Queries& queries, Scratch& memory) {
        with_type(a.dtype, [&](auto element) {
          using T = decltype(element);
          if (a.cache == kCacheInt8) TileOfQueries<T, Int8>(a, queries, memory).run();
          else if (a.cache == kCacheFloat8) TileOfQueries<T, Float8>(a, queries, memory).run();
          else TileOfQueries<T, T>(a, queries, memory).run();
        });
      });
}

}  // namespace

// Attention of the newest tokens of all sequences; 0, or 1 without memory.
DRIVETRAIN_API int dt_paged_attention(const void* call) {
  try {
    return attend(*static_cast<const Attention*>(call)) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace drivetrain
