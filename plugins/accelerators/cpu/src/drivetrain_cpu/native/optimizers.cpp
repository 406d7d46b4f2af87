// Elementwise optimizer updates; the formulas are those of the references in drivetrain_kernels.
#include <cmath>

#include "tiles.h"

namespace drivetrain {
namespace {

// What every update gets; layout shared with kernels.py.
struct Update {
  void* weights;
  const void* gradient;
  void* states[2];
  void* out;
  int64_t count;
  uint64_t seed;
  int32_t weights_dtype, gradient_dtype, states_dtype[2], out_dtype;
  int32_t stochastic, threads;
  float scale;
};

struct Scratch {
  Tile weights, gradient, states[2];
};

// Runs math(weights, gradient, state0, state1, count) on every tile and rounds what it changed.
template <int kStates, typename Math>
void update(const Update& u, const Math& math) {
  const Rounding rounding{u.stochastic != 0, u.seed};
  for_each_tile(u.count, u.threads, [&](int64_t start, int64_t count) {
    Scratch scratch;
    const Mutable weights(u.weights, u.weights_dtype, start, count, scratch.weights);
    const float* gradient = view(u.gradient, u.gradient_dtype, start, count, scratch.gradient);
    float* states[2] = {nullptr, nullptr};
    for (int k = 0; k < kStates; ++k) {
      states[k] = Mutable(u.states[k], u.states_dtype[k], start, count, scratch.states[k]).data();
    }
    math(weights.data(), gradient, states[0], states[1], count);
    for (int k = 0; k < kStates; ++k) {
      if (u.states_dtype[k] != kFloat32) {
        narrow(states[k], u.states[k], u.states_dtype[k], start, count, rounding, 1 + k);
      }
    }
    weights.put_back(rounding, 0);
    if (u.out != nullptr) narrow(weights.data(), u.out, u.out_dtype, start, count, rounding, 0);
  });
}

// Without decay an infinite weight must not turn the gradient into NaN.
inline float decayed(float gradient, float weight, float decay) {
  return decay != 0 ? gradient + weight * decay : gradient;
}

struct Adam {
  float scale, beta1, rest1, beta2, rest2, eps, coupled_decay, keep, inverse_second, step_size;
};

template <bool kCoupled>
void adam_tile(const Adam& a, float* __restrict w, const float* __restrict g, float* __restrict m,
               float* __restrict v, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float gradient = g[i] * a.scale;
    if (kCoupled) gradient = gradient + w[i] * a.coupled_decay;
    const float first = m[i] * a.beta1 + gradient * a.rest1;
    const float second = v[i] * a.beta2 + (gradient * gradient) * a.rest2;
    m[i] = first;
    v[i] = second;
    const float denominator = std::sqrt(second) * a.inverse_second + a.eps;
    w[i] = w[i] * a.keep - (first / denominator) * a.step_size;
  }
}

struct Sgd {
  float scale, lr, momentum, rest, decay;
};

template <bool kNesterov>
void sgd_tile(const Sgd& s, float* __restrict w, const float* __restrict g, float* __restrict b,
              int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = decayed(g[i] * s.scale, w[i], s.decay);
    const float buffer = b[i] * s.momentum + gradient * s.rest;
    b[i] = buffer;
    w[i] = w[i] - (kNesterov ? gradient + buffer * s.momentum : buffer) * s.lr;
  }
}

}  // namespace

DRIVETRAIN_API void dt_adam(const Update* u, double lr, double beta1, double beta2, double eps,
                            double weight_decay, int decoupled, double first, double second) {
  const bool coupled = weight_decay != 0 && !decoupled;
  const Adam a{u->scale,
               static_cast<float>(beta1),
               static_cast<float>(1 - beta1),
               static_cast<float>(beta2),
               static_cast<float>(1 - beta2),
               static_cast<float>(eps),
               static_cast<float>(weight_decay),
               static_cast<float>(decoupled ? 1 - lr * weight_decay : 1.0),
               static_cast<float>(1 / second),
               static_cast<float>(lr / first)};
  const auto tile = coupled ? adam_tile<true> : adam_tile<false>;
  update<2>(*u, [&](float* w, const float* g, float* m, float* v, int64_t count) {
    tile(a, w, g, m, v, count);
  });
}

DRIVETRAIN_API void dt_adagrad(const Update* u, double lr, double eps, double weight_decay) {
  const float scale = u->scale, rate = static_cast<float>(lr), epsilon = static_cast<float>(eps);
  const float decay = static_cast<float>(weight_decay);
  update<1>(*u, [=](float* __restrict w, const float* __restrict g, float* __restrict sum, float*,
                    int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float gradient = decayed(g[i] * scale, w[i], decay);
      const float total = sum[i] + gradient * gradient;
      sum[i] = total;
      w[i] = w[i] - (gradient / (std::sqrt(total) + epsilon)) * rate;
    }
  });
}

DRIVETRAIN_API void dt_lion(const Update* u, double lr, double beta1, double beta2,
                            double weight_decay) {
  const float scale = u->scale, rate = static_cast<float>(lr);
  const float b1 = static_cast<float>(beta1), c1 = static_cast<float>(1 - beta1);
  const float b2 = static_cast<float>(beta2), c2 = static_cast<float>(1 - beta2);
  const float keep = static_cast<float>(1 - lr * weight_decay);
  update<1>(*u, [=](float* __restrict w, const float* __restrict g, float* __restrict m, float*,
                    int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float gradient = g[i] * scale;
      const float direction = m[i] * b1 + gradient * c1;
      m[i] = m[i] * b2 + gradient * c2;
      // Not a number compares false twice: its sign is 0, as torch.sign's is.
      const float sign = (direction > 0 ? 1.0f : 0.0f) - (direction < 0 ? 1.0f : 0.0f);
      w[i] = w[i] * keep - sign * rate;
    }
  });
}

// `first`: the buffer starts as the gradient.
DRIVETRAIN_API void dt_sgd(const Update* u, double lr, double momentum, double dampening,
                           double weight_decay, int nesterov, int first) {
  const Sgd s{u->scale, static_cast<float>(lr), static_cast<float>(momentum),
              static_cast<float>(1 - dampening), static_cast<float>(weight_decay)};
  if (u->states[0] == nullptr) {
    update<0>(*u, [=](float* __restrict w, const float* __restrict g, float*, float*, int64_t count) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        w[i] = w[i] - decayed(g[i] * s.scale, w[i], s.decay) * s.lr;
      }
    });
    return;
  }
  const auto tile = nesterov ? sgd_tile<true> : sgd_tile<false>;
  const Sgd start{s.scale, s.lr, s.momentum, 1.0f, s.decay};
  update<1>(*u, [&](float* w, const float* g, float* b, float*, int64_t count) {
    if (first) std::fill(b, b + count, 0.0f);
    tile(first ? start : s, w, g, b, count);
  });
}

}  // namespace drivetrain
