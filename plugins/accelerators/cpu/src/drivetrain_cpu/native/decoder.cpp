// What lies between the matrices of a decoder: RMS norm, rotation into the cache, gated activation.
//
// Every row is computed by itself, in float32 and in one order.
#include <cmath>

#include "bytes.h"
#include "team.h"

namespace drivetrain {
namespace {

template <typename T>
void norm_row(T* residual, const T* delta, const T* weight, T* out, int64_t dim, float eps) {
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) {
    Floats values = widened(residual + i);
    if (delta != nullptr) {
      narrowed(residual + i, values + widened(delta + i));
      values = widened(residual + i);  // the sum as it is stored
    }
    squares = fused(values, values, squares);
  }
  for (; i < dim; ++i) {
    if (delta != nullptr) assign(residual + i, number(residual[i]) + number(delta[i]));
    rest += number(residual[i]) * number(residual[i]);
  }
  for (int lane = 0; lane < kWidth; ++lane) rest += squares[lane];
  const float scale = 1.0f / std::sqrt(rest / static_cast<float>(dim) + eps);
  for (i = 0; i + kWidth <= dim; i += kWidth) {
    narrowed(out + i, widened(residual + i) * scale * widened(weight + i));
  }
  for (; i < dim; ++i) assign(out + i, number(residual[i]) * scale * number(weight[i]));
}

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

inline Floats logistic(const Floats& x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats activated(const Floats& x, int kind) {
  if (kind == kSilu) return x * logistic(x);
  if (kind == kRelu) return x > 0 ? x : Floats{} + (x != x ? x : Floats{});
  if (kind == kGeluTanh) {
    // tanh(y) = 2 / (1 + e^(-2y)) - 1
    const Floats inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x * logistic(2.0f * inner);
  }
  Floats result;
  for (int i = 0; i < kWidth; ++i) {
    result[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  }
  return result;
}

template <typename T>
void gated_row(const T* gate, const T* up, T* out, int64_t width, int kind) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    narrowed(out + i, activated(widened(gate + i), kind) * widened(up + i));
  }
  float plain[kWidth] = {};
  for (int64_t at = i; at < width; ++at) plain[at - i] = number(gate[at]);
  const Floats last = activated(load(plain), kind);
  for (int64_t at = i; at < width; ++at) assign(out + at, last[at - i] * number(up[at]));
}

template <typename T>
void turn_head(T* head, const float* cosine, const float* sine, int64_t half) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Floats first = widened(head + i), second = widened(head + half + i);
    const Floats cos = load(cosine + i), sin = load(sine + i);
    narrowed(head + i, first * cos - second * sin);
    narrowed(head + half + i, second * cos + first * sin);
  }
  for (; i < half; ++i) {
    const float first = number(head[i]), second = number(head[half + i]);
    assign(head + i, first * cosine[i] - second * sine[i]);
    assign(head + half + i, second * cosine[i] + first * sine[i]);
  }
}

// Layouts shared with serving.py.
struct Norm {
  void* residual;
  const void *delta, *weight;
  void* out;
  int64_t rows, dim;
  float eps;
  int32_t dtype, threads;
};

struct Rotary {
  void* joined;
  const float *cosine, *sine;
  void *keys, *values;
  float *key_scales, *value_scales;
  const int32_t* slots;
  int64_t tokens, heads, kv_heads, dim, half, size;
  int32_t dtype, cache, threads;
};

struct Gated {
  const void* joined;
  void* out;
  int64_t rows, width;
  int32_t kind, dtype, threads;
};

// Puts one head into place `at` of a cache.
template <typename T>
void keep(const T* from, int64_t dim, int64_t at, int cache, void* heads, float* scales) {
  if (cache == kCacheInt8) {
    encode_head(from, dim, static_cast<Int8*>(heads) + at * dim, scales + at);
  } else if (cache == kCacheFloat8) {
    encode_head(from, dim, static_cast<Float8*>(heads) + at * dim, scales + at);
  } else {
    std::memcpy(static_cast<T*>(heads) + at * dim, from, dim * sizeof(T));
  }
}

}  // namespace

// residual += delta (where there is one); out = RMS norm of it.
DRIVETRAIN_API int dt_add_rms_norm(const void* call) {
  const Norm& c = *static_cast<const Norm*>(call);
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_item(c.threads, c.rows, run_of(c.rows, c.threads), [&](int64_t row) {
      const int64_t at = row * c.dim;
      norm_row(static_cast<T*>(c.residual) + at,
               c.delta == nullptr ? nullptr : static_cast<const T*>(c.delta) + at,
               static_cast<const T*>(c.weight), static_cast<T*>(c.out) + at, c.dim, c.eps);
    });
  });
  return 0;
}

// Rotates queries and keys of `joined` and puts keys and values into their slots.
DRIVETRAIN_API int dt_rotary_to_cache(const void* call) {
  const Rotary& c = *static_cast<const Rotary*>(call);
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_item(c.threads, c.tokens, run_of(c.tokens, c.threads), [&](int64_t token) {
      T* row = static_cast<T*>(c.joined) + token * (c.heads + 2 * c.kv_heads) * c.dim;
      for (int64_t head = 0; head < c.heads + c.kv_heads; ++head) {
        turn_head(row + head * c.dim, c.cosine + token * c.half, c.sine + token * c.half, c.half);
      }
      const int64_t block = c.slots[token] / c.size, place = c.slots[token] % c.size;
      for (int64_t head = 0; head < c.kv_heads; ++head) {
        const int64_t at = (block * c.kv_heads + head) * c.size + place;
        const T* from = row + (c.heads + head) * c.dim;
        keep(from, c.dim, at, c.cache, c.keys, c.key_scales);
        keep(from + c.kv_heads * c.dim, c.dim, at, c.cache, c.values, c.value_scales);
      }
    });
  });
  return 0;
}

// out [rows, width] = act(first half of joined [rows, 2 * width]) * second half.
DRIVETRAIN_API int dt_gated_activation(const void* call) {
  const Gated& c = *static_cast<const Gated*>(call);
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_item(c.threads, c.rows, run_of(c.rows, c.threads), [&](int64_t row) {
      const T* from = static_cast<const T*>(c.joined) + 2 * row * c.width;
      gated_row(from, from + c.width, static_cast<T*>(c.out) + row * c.width, c.width, c.kind);
    });
  });
  return 0;
}

}  // namespace drivetrain
