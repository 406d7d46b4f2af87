// What lies between the matrices of a decoder: RMS norm, rotation into the cache, gated activation.
//
// Every row is computed by itself, in float32 and in one order.
#include <cmath>

#include "panels.h"

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

}  // namespace

// residual += delta (where there is one); out = RMS norm of it.
DRIVETRAIN_API void dt_add_rms_norm(void* residual, const void* delta, const void* weight,
                                    void* out, int dtype, int64_t rows, int64_t dim, float eps,
                                    int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * dim;
      norm_row(static_cast<T*>(residual) + at,
               delta == nullptr ? nullptr : static_cast<const T*>(delta) + at,
               static_cast<const T*>(weight), static_cast<T*>(out) + at, dim, eps);
    }
  });
}

// Rotates queries and keys of `joined` and puts keys and values into their slots.
DRIVETRAIN_API void dt_rotary_to_cache(void* joined, const float* cosine, const float* sine,
                                       void* keys, void* values, const int32_t* slots, int dtype,
                                       int64_t tokens, int64_t heads, int64_t kv_heads,
                                       int64_t dim, int64_t half, int64_t size, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; ++token) {
      T* row = static_cast<T*>(joined) + token * (heads + 2 * kv_heads) * dim;
      for (int64_t head = 0; head < heads + kv_heads; ++head) {
        turn_head(row + head * dim, cosine + token * half, sine + token * half, half);
      }
      const int64_t block = slots[token] / size, place = slots[token] % size;
      for (int64_t head = 0; head < kv_heads; ++head) {
        const int64_t to = ((block * kv_heads + head) * size + place) * dim;
        const T* from = row + (heads + head) * dim;
        std::memcpy(static_cast<T*>(keys) + to, from, dim * sizeof(T));
        std::memcpy(static_cast<T*>(values) + to, from + kv_heads * dim, dim * sizeof(T));
      }
    }
  });
}

// out [rows, width] = act(first half of joined [rows, 2 * width]) * second half.
DRIVETRAIN_API void dt_gated_activation(const void* joined, void* out, int dtype, int64_t rows,
                                        int64_t width, int kind, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = static_cast<const T*>(joined) + 2 * row * width;
      gated_row(from, from + width, static_cast<T*>(out) + row * width, width, kind);
    }
  });
}

}  // namespace drivetrain
