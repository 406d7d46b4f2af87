// Elementwise optimizer updates; the formulas are those of the references in drivetrain_kernels.
#include "update.h"

namespace drivetrain {
namespace {

// Without decay an infinite weight must not turn the gradient into NaN.
__device__ inline float decayed(float gradient, float weight, float decay) {
  return decay != 0 ? gradient + weight * decay : gradient;
}

struct Adam {
  static constexpr int kStates = 2;
  float beta1, rest1, beta2, rest2, eps, coupled_decay, keep, inverse_second, step_size;

  __device__ void operator()(float& w, float g, float* s) const {
    g = decayed(g, w, coupled_decay);
    s[0] = s[0] * beta1 + g * rest1;
    s[1] = s[1] * beta2 + (g * g) * rest2;
    const float denominator = sqrtf(s[1]) * inverse_second + eps;
    w = w * keep - (s[0] / denominator) * step_size;
  }
};

struct Adagrad {
  static constexpr int kStates = 1;
  float lr, eps, decay;

  __device__ void operator()(float& w, float g, float* s) const {
    g = decayed(g, w, decay);
    s[0] = s[0] + g * g;
    w = w - (g / (sqrtf(s[0]) + eps)) * lr;
  }
};

struct Lion {
  static constexpr int kStates = 1;
  float lr, beta1, rest1, beta2, rest2, keep;

  __device__ void operator()(float& w, float g, float* s) const {
    const float direction = s[0] * beta1 + g * rest1;
    s[0] = s[0] * beta2 + g * rest2;
    // Not a number compares false twice: its sign is 0, as torch.sign's is.
    const float sign = (direction > 0 ? 1.0f : 0.0f) - (direction < 0 ? 1.0f : 0.0f);
    w = w * keep - sign * lr;
  }
};

struct PlainSgd {
  static constexpr int kStates = 0;
  float lr, decay;

  __device__ void operator()(float& w, float g, float*) const {
    w = w - decayed(g, w, decay) * lr;
  }
};

struct Sgd {
  static constexpr int kStates = 1;
  float lr, momentum, rest, decay;
  int nesterov, first;

  __device__ void operator()(float& w, float g, float* s) const {
    g = decayed(g, w, decay);
    s[0] = first ? g : s[0] * momentum + g * rest;
    w = w - (nesterov ? g + s[0] * momentum : s[0]) * lr;
  }
};

}  // namespace

DRIVETRAIN_API int dt_adam(const Update* u, double lr, double beta1, double beta2, double eps,
                           double weight_decay, int decoupled, double first, double second,
                           void* stream) {
  const Adam adam{static_cast<float>(beta1),
                  static_cast<float>(1 - beta1),
                  static_cast<float>(beta2),
                  static_cast<float>(1 - beta2),
                  static_cast<float>(eps),
                  static_cast<float>(decoupled ? 0.0 : weight_decay),
                  static_cast<float>(decoupled ? 1 - lr * weight_decay : 1.0),
                  static_cast<float>(1 / second),
                  static_cast<float>(lr / first)};
  return update(*u, adam, stream);
}

DRIVETRAIN_API int dt_adagrad(const Update* u, double lr, double eps, double weight_decay,
                              void* stream) {
  const Adagrad adagrad{static_cast<float>(lr), static_cast<float>(eps),
                        static_cast<float>(weight_decay)};
  return update(*u, adagrad, stream);
}

DRIVETRAIN_API int dt_lion(const Update* u, double lr, double beta1, double beta2,
                           double weight_decay, void* stream) {
  const Lion lion{static_cast<float>(lr),        static_cast<float>(beta1),
                  static_cast<float>(1 - beta1), static_cast<float>(beta2),
                  static_cast<float>(1 - beta2), static_cast<float>(1 - lr * weight_decay)};
  return update(*u, lion, stream);
}

// `first`: the buffer starts as the gradient.
DRIVETRAIN_API int dt_sgd(const Update* u, double lr, double momentum, double dampening,
                          double weight_decay, int nesterov, int first, void* stream) {
  const float rate = static_cast<float>(lr), decay = static_cast<float>(weight_decay);
  if (u->states[0] == nullptr) return update(*u, PlainSgd{rate, decay}, stream);
  const Sgd sgd{rate,  static_cast<float>(momentum), static_cast<float>(1 - dampening),
                decay, nesterov,                     first};
  return update(*u, sgd, stream);
}

// The runtime's words for a status.
DRIVETRAIN_API const char* dt_status(int status) {
  return DRIVETRAIN_GPU(GetErrorString)(static_cast<DRIVETRAIN_GPU(Error_t)>(status));
}

}  // namespace drivetrain
