// Attention to listed blocks of keys (arXiv 1904.10509), with the online softmax and the gradients
// of arXiv 2205.14135.
//
// Scores are made as [keys, queries] of a block, so that a vector holds one key's scores of many
// queries: sums and maxima over keys need no reduction inside of vectors. Every sum is made in an
// order that does not depend on the number of threads.
#include <cmath>
#include <cstdlib>
#include <limits>

#include "products.h"

namespace drivetrain {
namespace {

constexpr int64_t kMostBlock = 128, kMostWidth = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Place {
  int64_t sample, head, token;  // distances in elements
};

// Layout shared with block_sparse.py.
struct BlockSparse {
  const void *query, *key, *value, *gradient;
  Place query_at, key_at, value_at, gradient_at;
  const int32_t *starts, *columns, *back_starts, *back_rows, *back_entries;
  int64_t list_sample, list_head, back_sample, back_head;
  const int32_t *query_segments, *key_segments;
  const uint8_t* mask;
  const float* bias;
  int64_t mask_sample, bias_sample, bias_entries;
  void* out;
  Place out_at;
  float *lse, *for_bias;
  const float* delta;
  float *for_query, *for_key, *for_value;  // [b, tokens, heads, width]
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim, block;
  float scale;
  int32_t causal, dtype, threads;
};

struct alignas(64) Scratch {
  float query_t[kMostWidth * kMostBlock], gradient_t[kMostWidth * kMostBlock];
  float query[kMostBlock * kMostWidth], gradient[kMostBlock * kMostWidth];
  float key[kMostBlock * kMostWidth], value[kMostBlock * kMostWidth];
  float scores[kMostBlock * kMostBlock], slopes[kMostBlock * kMostBlock];
  float sums[kMostBlock * kMostWidth];
  float highest[kMostBlock], total[kMostBlock], factor[kMostBlock], delta[kMostBlock];
  int32_t segments[kMostBlock];
};

int64_t rounded_up(int64_t value) { return (value + kWidth - 1) / kWidth * kWidth; }

// Rows as float32: where they lie if vectors of them can be read there, else in `scratch`.
template <typename T>
Right rows_of(const T* from, int64_t stride, int64_t rows, int64_t width, float* scratch) {
  rows_as_floats(from, stride, rows, width, scratch, rounded_up(width));
  return {scratch, rounded_up(width)};
}
template <>
Right rows_of(const float* from, int64_t stride, int64_t rows, int64_t width, float* scratch) {
  if (width % kWidth == 0) return {from, stride};
  rows_as_floats(from, stride, rows, width, scratch, rounded_up(width));
  return {scratch, rounded_up(width)};
}

template <typename T>
const T* rows_at(const void* data, const Place& at, int64_t sample, int64_t head, int64_t token) {
  return static_cast<const T*>(data) + sample * at.sample + head * at.head + token * at.token;
}

// One block of queries of a head, against blocks of keys one after the other.
template <typename T>
class Rows {
 public:
  Rows(const BlockSparse& a, Scratch& s, int64_t sample, int64_t head)
      : a_(a), s_(s), sample_(sample), head_(head), kv_head_(head / (a.heads / a.kv_heads)) {}

  void begin(int64_t row) {
    row_ = row;
    first_ = row * a_.block;
    count_ = std::min(a_.block, a_.queries - first_);
    wide_ = rounded_up(count_);
    query_ = rows_of(rows_at<T>(a_.query, a_.query_at, sample_, head_, first_), a_.query_at.token,
                     count_, a_.dim, s_.query);
    transposed(query_.data, query_.k, count_, a_.dim, a_.scale, s_.query_t, wide_);
    if (a_.query_segments != nullptr) {
      const int32_t* from = a_.query_segments + sample_ * a_.queries + first_;
      for (int64_t q = 0; q < wide_; ++q) s_.segments[q] = q < count_ ? from[q] : 0;
    }
  }

  // -- forward ------------------------------------------------------------------------------

  void attend() {
    const int64_t padded = rounded_up(a_.value_dim);
    std::fill_n(s_.sums, count_ * padded, 0.0f);
    std::fill_n(s_.highest, wide_, -kInfinity);
    std::fill_n(s_.total, wide_, 0.0f);
    const int32_t* list = a_.starts + sample_ * a_.list_sample + head_ * a_.list_head + row_;
    for (int32_t entry = list[0]; entry < list[1]; ++entry) {
      see(a_.columns[entry], entry);
      soften();
      for (int64_t q = 0; q < count_; ++q) {
        if (s_.factor[q] == 1.0f) continue;
        for (int64_t i = 0; i < padded; i += kWidth) {
          store(s_.sums + q * padded + i, load(s_.sums + q * padded + i) * s_.factor[q]);
        }
      }
      add_product({s_.scores, 1, wide_}, count_, value(), padded, keys_, s_.sums, padded);
    }
    finish(padded);
  }

  // -- backward -----------------------------------------------------------------------------

  void begin_backward(int64_t row) {
    begin(row);
    gradient_ = rows_of(rows_at<T>(a_.gradient, a_.gradient_at, sample_, head_, first_),
                        a_.gradient_at.token, count_, a_.value_dim, s_.gradient);
    transposed(gradient_.data, gradient_.k, count_, a_.value_dim, 1.0f, s_.gradient_t, wide_);
    const int64_t at = (sample_ * a_.heads + head_) * a_.queries + first_;
    for (int64_t q = 0; q < wide_; ++q) {
      const float lse = q < count_ ? a_.lse[at + q] : kInfinity;
      // Queries that see nothing have weights of 0.
      s_.highest[q] = lse == -kInfinity ? kInfinity : lse;
      s_.delta[q] = q < count_ ? a_.delta[at + q] : 0.0f;
    }
  }

  // Adds what one block of scores gives to the gradients asked for.
  void add_gradients(int64_t column, int32_t entry, bool of_query, bool of_keys) {
    see(column, entry);
    const Right v = value();
    product({v.data, v.k, 1}, keys_, {s_.gradient_t, wide_}, wide_, a_.value_dim,
            [&](int64_t k, int64_t q, const Floats& sum) { slope(k, q, sum); });
    if (of_query && a_.for_bias != nullptr) keep_slopes(entry);
    for (int64_t i = 0; i < keys_ * wide_; i += kWidth) {
      store(s_.slopes + i, load(s_.slopes + i) * a_.scale);
    }
    const int64_t at = column * a_.block;
    if (of_keys) {
      add_to(a_.for_value, a_.kv_heads, a_.value_dim, a_.keys, kv_head_, at,
             {s_.scores, wide_, 1}, keys_, gradient_, count_);
      add_to(a_.for_key, a_.kv_heads, a_.dim, a_.keys, kv_head_, at, {s_.slopes, wide_, 1}, keys_,
             query_, count_);
    }
    if (of_query) {
      add_to(a_.for_query, a_.heads, a_.dim, a_.queries, head_, first_, {s_.slopes, 1, wide_},
             count_, key_, keys_);
    }
  }

  void all_gradients_of_row(int64_t row, bool of_keys) {
    const int32_t* list = a_.starts + sample_ * a_.list_sample + head_ * a_.list_head + row;
    if (list[0] == list[1]) return;
    begin_backward(row);
    for (int32_t entry = list[0]; entry < list[1]; ++entry) {
      add_gradients(a_.columns[entry], entry, true, of_keys);
    }
  }

  void gradients_of_column(int64_t column) {
    const int32_t* list =
        a_.back_starts + sample_ * a_.back_sample + head_ * a_.back_head + column;
    for (int32_t place = list[0]; place < list[1]; ++place) {
      begin_backward(a_.back_rows[place]);
      add_gradients(column, a_.back_entries[place], false, true);
    }
  }

 private:
  Right value() {
    return rows_of(rows_at<T>(a_.value, a_.value_at, sample_, kv_head_, key_first_),
                   a_.value_at.token, keys_, a_.value_dim, s_.value);
  }

  // Scores of a block of keys; minus infinity where a key is hidden.
  void see(int64_t column, int32_t entry) {
    key_first_ = column * a_.block;
    keys_ = std::min(a_.block, a_.keys - key_first_);
    key_ = rows_of(rows_at<T>(a_.key, a_.key_at, sample_, kv_head_, key_first_), a_.key_at.token,
                   keys_, a_.dim, s_.key);
    product({key_.data, key_.k, 1}, keys_, {s_.query_t, wide_}, wide_, a_.dim,
            [&](int64_t k, int64_t q, const Floats& sum) { store(s_.scores + k * wide_ + q, sum); });
    const int64_t square = a_.block * a_.block;
    if (a_.bias != nullptr) {
      const float* bias = a_.bias + sample_ * a_.bias_sample + entry * square;
      for (int64_t k = 0; k < keys_; ++k) {
        for (int64_t q = 0; q < count_; ++q) s_.scores[k * wide_ + q] += bias[q * a_.block + k];
      }
    }
    if (a_.mask != nullptr) {
      const uint8_t* mask = a_.mask + sample_ * a_.mask_sample + entry * square;
      for (int64_t k = 0; k < keys_; ++k) {
        for (int64_t q = 0; q < count_; ++q) {
          if (!mask[q * a_.block + k]) s_.scores[k * wide_ + q] = -kInfinity;
        }
      }
    }
    if (a_.query_segments != nullptr) hide_other_segments();
    if (a_.causal && key_first_ + keys_ > first_ + 1) {
      for (int64_t k = 0; k < keys_; ++k) {
        const int64_t hidden = std::min(wide_, key_first_ + k - first_);
        for (int64_t q = 0; q < hidden; ++q) s_.scores[k * wide_ + q] = -kInfinity;
      }
    }
  }

  void hide_other_segments() {
    const int32_t* segments = a_.key_segments + sample_ * a_.keys + key_first_;
    for (int64_t k = 0; k < keys_; ++k) {
      const Ints own = Ints{} + segments[k];
      for (int64_t q = 0; q < wide_; q += kWidth) {
        Ints of_query;
        std::memcpy(&of_query, s_.segments + q, sizeof of_query);
        float* at = s_.scores + k * wide_ + q;
        store(at, of_query == own ? load(at) : Floats{} - kInfinity);
      }
    }
  }

  // Scores become weights relative to the highest so far; `factor` is what earlier sums lose.
  void soften() {
    for (int64_t q = 0; q < wide_; q += kWidth) {
      const Floats before = load(s_.highest + q);
      Floats most = before;
      for (int64_t k = 0; k < keys_; ++k) {
        const Floats score = load(s_.scores + k * wide_ + q);
        most = score > most ? score : most;
      }
      const Floats base = most == Floats{} - kInfinity ? Floats{} : most;
      Floats sum = {};
      for (int64_t k = 0; k < keys_; ++k) {
        float* at = s_.scores + k * wide_ + q;
        const Floats weight = exponential(load(at) - base);
        store(at, weight);
        sum = sum + weight;
      }
      const Floats factor = before == most ? Floats{} + 1.0f : exponential(before - base);
      store(s_.factor + q, factor);
      store(s_.highest + q, most);
      store(s_.total + q, load(s_.total + q) * factor + sum);
    }
  }

  void finish(int64_t padded) {
    const int64_t at = (sample_ * a_.heads + head_) * a_.queries + first_;
    T* to = static_cast<T*>(a_.out) + sample_ * a_.out_at.sample + head_ * a_.out_at.head +
            first_ * a_.out_at.token;
    for (int64_t q = 0; q < count_; ++q) {
      const float total = s_.total[q], inverse = total > 0 ? 1.0f / total : total;
      a_.lse[at + q] = total > 0 ? s_.highest[q] + std::log(total) : total == 0 ? -kInfinity : total;
      const float* from = s_.sums + q * padded;
      T* row = to + q * a_.out_at.token;
      int64_t i = 0;
      for (; i + kWidth <= a_.value_dim; i += kWidth) narrowed(row + i, load(from + i) * inverse);
      for (; i < a_.value_dim; ++i) assign(row + i, from[i] * inverse);
    }
  }

  // Scores become weights, and slopes what the loss changes with unscaled scores.
  void slope(int64_t k, int64_t q, const Floats& sum) {
    float* at = s_.scores + k * wide_ + q;
    const Floats weight = exponential(load(at) - load(s_.highest + q));
    store(at, weight);
    store(s_.slopes + k * wide_ + q, weight * (sum - load(s_.delta + q)));
  }

  void keep_slopes(int32_t entry) {
    const int64_t square = a_.block * a_.block;
    float* to = a_.for_bias + (sample_ * a_.bias_entries + entry % a_.bias_entries) * square;
    for (int64_t q = 0; q < count_; ++q) {
      for (int64_t k = 0; k < keys_; ++k) to[q * a_.block + k] = s_.slopes[k * wide_ + q];
    }
  }

  static void add_product(Left a, int64_t rows, Right b, int64_t columns, int64_t depth, float* to,
                          int64_t stride) {
    product(a, rows, b, columns, depth, [&](int64_t row, int64_t column, const Floats& sum) {
      float* at = to + row * stride + column;
      store(at, load(at) + sum);
    });
  }

  // Adds a product to rows of a gradient [b, tokens, heads, width].
  void add_to(float* gradient, int64_t heads, int64_t width, int64_t tokens, int64_t head,
              int64_t token, Left a, int64_t rows, Right b, int64_t depth) {
    float* to = gradient + ((sample_ * tokens + token) * heads + head) * width;
    if (width % kWidth == 0) {
      add_product(a, rows, b, width, depth, to, heads * width);
      return;
    }
    product(a, rows, b, rounded_up(width), depth,
            [&](int64_t row, int64_t column, const Floats& sum) {
              float* at = to + row * heads * width + column;
              for (int64_t i = 0; i < std::min<int64_t>(kWidth, width - column); ++i) at[i] += sum[i];
            });
  }

  const BlockSparse& a_;
  Scratch& s_;
  const int64_t sample_, head_, kv_head_;
  int64_t row_ = 0, first_ = 0, count_ = 0, wide_ = 0, key_first_ = 0, keys_ = 0;
  Right query_{}, gradient_{}, key_{};
};

// Calls body(task, scratch) for all tasks; 1 if there is no memory for it.
template <typename Body>
int for_each_task(int64_t tasks, int threads, const Body& body) {
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch* scratch = static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      if (scratch == nullptr) {
#pragma omp atomic write
        failed = true;
        continue;
      }
      body(task, *scratch);
    }
    std::free(scratch);
  }
  return failed ? 1 : 0;
}

}  // namespace

// Results and the logarithms of the sums; 0, or 1 without memory.
DRIVETRAIN_API int dt_block_sparse_attention(const BlockSparse* a) {
  const int64_t rows = (a->queries + a->block - 1) / a->block;
  return for_each_task(a->batch * a->heads * rows, a->threads, [&](int64_t task, Scratch& scratch) {
    with_type(a->dtype, [&](auto element) {
      const int64_t line = task / rows;
      Rows<decltype(element)> own(*a, scratch, line / a->heads, line % a->heads);
      own.begin(task % rows);
      own.attend();
    });
  });
}

// Adds to gradients, which are zeros before; 0, or 1 without memory.
DRIVETRAIN_API int dt_block_sparse_attention_backward(const BlockSparse* a) {
  const int64_t rows = (a->queries + a->block - 1) / a->block;
  const int64_t columns = (a->keys + a->block - 1) / a->block;
  const int64_t group = a->heads / a->kv_heads, lines = a->batch * a->kv_heads;
  const int64_t rounds = (lines + a->threads - 1) / a->threads;
  // One pass makes 5 products a block, but a head of keys is one thread's; two make 7 in any shares.
  if (5 * rounds * a->threads <= 7 * lines) {
    return for_each_task(lines, a->threads, [&](int64_t task, Scratch& scratch) {
      with_type(a->dtype, [&](auto element) {
        for (int64_t h = 0; h < group; ++h) {
          Rows<decltype(element)> own(*a, scratch, task / a->kv_heads,
                                      task % a->kv_heads * group + h);
          for (int64_t row = 0; row < rows; ++row) own.all_gradients_of_row(row, true);
        }
      });
    });
  }
  const int64_t first = a->batch * a->heads * rows;
  return for_each_task(first + lines * columns, a->threads, [&](int64_t task, Scratch& scratch) {
    with_type(a->dtype, [&](auto element) {
      if (task < first) {
        const int64_t line = task / rows;
        Rows<decltype(element)> own(*a, scratch, line / a->heads, line % a->heads);
        own.all_gradients_of_row(task % rows, false);
        return;
      }
      const int64_t line = (task - first) / columns;
      for (int64_t h = 0; h < group; ++h) {
        Rows<decltype(element)> own(*a, scratch, line / a->kv_heads,
                                    line % a->kv_heads * group + h);
        own.gradients_of_column((task - first) % columns);
      }
    });
  });
}

}  // namespace drivetrain
