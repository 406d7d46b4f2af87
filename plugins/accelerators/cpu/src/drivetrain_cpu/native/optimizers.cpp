// Elementwise optimizer updates; the formulas are those of the references in drivetrain_kernels.
//
// A formula computes one element in float32. Where all tensors are float32 or bfloat16, one loop per
// combination of dtypes converts in registers, as fast as memory allows; float16 and stochastic
// rounding pass through tiles.
#include <type_traits>

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

// Updates `count` elements, whole vectors of them, from `start` on. W, G and S are what weights,
// gradient and states are stored as: float, or uint16_t for bfloat16. `out` holds bfloat16 and may
// be null.
template <int kStates, typename W, typename G, typename S, typename Formula>
void run(const Formula formula, void* weights, const void* gradient, void* const* states, void* out,
         int64_t start, int64_t count) {
  W* const w = static_cast<W*>(weights) + start;
  const G* const g = static_cast<const G*>(gradient) + start;
  S* const first = kStates > 0 ? static_cast<S*>(states[0]) + start : nullptr;
  S* const second = kStates > 1 ? static_cast<S*>(states[1]) + start : nullptr;
  uint16_t* const copy = out != nullptr ? static_cast<uint16_t*>(out) + start : nullptr;
  for (int64_t i = 0; i < count; i += kWidth) {
    Floats weight = load(w + i), one{}, two{};
    if (kStates > 0) one = load(first + i);
    if (kStates > 1) two = load(second + i);
    formula(weight, load(g + i), one, two);
    if (kStates > 0) store(first + i, one);
    if (kStates > 1) store(second + i, two);
    store(w + i, weight);
    if (copy != nullptr) store(copy + i, weight);
  }
}

template <typename Formula>
using Run = void (*)(Formula, void*, const void*, void* const*, void*, int64_t, int64_t);

// The loop for the dtypes of `u`; null if its values have to pass through tiles.
template <int kStates, typename Formula>
Run<Formula> run_for(const Update& u) {
  const int out_dtype = u.out != nullptr ? u.out_dtype : kBFloat16;
  if (u.stochastic || u.weights_dtype == kFloat16 || u.gradient_dtype == kFloat16) return nullptr;
  if (out_dtype != kBFloat16) return nullptr;
  for (int k = 0; k < kStates; ++k) {
    if (u.states_dtype[k] == kFloat16 || u.states_dtype[k] != u.states_dtype[0]) return nullptr;
  }
  using F = float;
  using B = uint16_t;
  // A rule without states needs no loops for bfloat16 ones.
  using S = std::conditional_t<(kStates > 0), B, F>;
  static constexpr Run<Formula> kRuns[2][2][2] = {
      {{run<kStates, F, F, F, Formula>, run<kStates, F, F, S, Formula>},
       {run<kStates, F, B, F, Formula>, run<kStates, F, B, S, Formula>}},
      {{run<kStates, B, F, F, Formula>, run<kStates, B, F, S, Formula>},
       {run<kStates, B, B, F, Formula>, run<kStates, B, B, S, Formula>}}};
  const bool low_states = kStates > 0 && u.states_dtype[0] == kBFloat16;
  return kRuns[u.weights_dtype == kBFloat16][u.gradient_dtype == kBFloat16][low_states];
}

// At most a tile of elements of any dtypes, widened into scratch and rounded on the way back.
template <int kStates, typename Formula>
void update_tile(const Update& u, const Formula& formula, int64_t start, int64_t count) {
  Tile weights, gradient, states[2];
  const int64_t whole = (count + kWidth - 1) / kWidth * kWidth;
  const auto fill = [=](const void* from, int dtype, Tile& tile) {
    widen(from, dtype, start, count, tile.data);
    std::fill(tile.data + count, tile.data + whole, 0.0f);
  };
  fill(u.weights, u.weights_dtype, weights);
  fill(u.gradient, u.gradient_dtype, gradient);
  for (int k = 0; k < kStates; ++k) fill(u.states[k], u.states_dtype[k], states[k]);
  void* const moments[2] = {states[0].data, states[1].data};
  run<kStates, float, float, float>(formula, weights.data, gradient.data, moments, nullptr, 0, whole);
  Rounder rounder(u.stochastic != 0, u.seed);
  rounder.narrow(weights.data, u.weights, u.weights_dtype, start, count, 0);
  if (u.out != nullptr) rounder.narrow(weights.data, u.out, u.out_dtype, start, count, 0);
  for (int k = 0; k < kStates; ++k) {
    rounder.narrow(states[k].data, u.states[k], u.states_dtype[k], start, count, 1 + k);
  }
}

// Runs formula(weight, gradient, state0, state1) on every element.
template <int kStates, typename Formula>
void update(const Update& u, const Formula& formula) {
  const Run<Formula> run = run_for<kStates, Formula>(u);
  for_each_tile(u.count, u.threads, [&](int64_t start, int64_t count) {
    const int64_t whole = run != nullptr ? count / kWidth * kWidth : 0;
    if (whole > 0) run(formula, u.weights, u.gradient, u.states, u.out, start, whole);
    if (whole < count) update_tile<kStates>(u, formula, start + whole, count - whole);
  });
}

// Without decay an infinite weight must not turn the gradient into NaN.
inline Floats decayed(const Floats& gradient, const Floats& weight, float decay) {
  return decay != 0 ? gradient + weight * decay : gradient;
}

template <bool kCoupled>
struct Adam {
  float scale, beta1, rest1, beta2, rest2, eps, coupled_decay, keep, inverse_second, step_size;

  void operator()(Floats& weight, Floats gradient, Floats& m, Floats& v) const {
    gradient = gradient * scale;
    if (kCoupled) gradient = gradient + weight * coupled_decay;
    m = m * beta1 + gradient * rest1;
    v = v * beta2 + (gradient * gradient) * rest2;
    const Floats denominator = square_root(v) * inverse_second + eps;
    weight = weight * keep - (m / denominator) * step_size;
  }
};

struct Adagrad {
  float scale, rate, eps, decay;

  void operator()(Floats& weight, Floats gradient, Floats& sum, Floats&) const {
    gradient = decayed(gradient * scale, weight, decay);
    sum = sum + gradient * gradient;
    weight = weight - (gradient / (square_root(sum) + eps)) * rate;
  }
};

struct Lion {
  float scale, rate, beta1, rest1, beta2, rest2, keep;

  void operator()(Floats& weight, Floats gradient, Floats& m, Floats&) const {
    gradient = gradient * scale;
    const Floats direction = m * beta1 + gradient * rest1;
    m = m * beta2 + gradient * rest2;
    // Not a number compares false twice: its sign is 0, as torch.sign's is.
    const Floats zero{}, one = zero + 1.0f;
    const Floats sign = (direction > 0 ? one : zero) - (direction < 0 ? one : zero);
    weight = weight * keep - sign * rate;
  }
};

struct PlainSgd {
  float scale, lr, decay;

  void operator()(Floats& weight, Floats gradient, Floats&, Floats&) const {
    weight = weight - decayed(gradient * scale, weight, decay) * lr;
  }
};

template <bool kNesterov>
struct Sgd {
  float scale, lr, momentum, rest, decay;
  bool first;  // the buffer starts as the gradient, whatever it holds

  void operator()(Floats& weight, Floats gradient, Floats& buffer, Floats&) const {
    gradient = decayed(gradient * scale, weight, decay);
    if (first) {
      buffer = gradient;
    } else {
      buffer = buffer * momentum + gradient * rest;
    }
    if (kNesterov) {
      weight = weight - (gradient + buffer * momentum) * lr;
    } else {
      weight = weight - buffer * lr;
    }
  }
};

template <bool kCoupled>
void adam(const Update& u, double lr, double beta1, double beta2, double eps, double weight_decay,
          double first, double second) {
  const double keep = kCoupled ? 1.0 : 1 - lr * weight_decay;
  update<2>(u, Adam<kCoupled>{u.scale, static_cast<float>(beta1), static_cast<float>(1 - beta1),
                              static_cast<float>(beta2), static_cast<float>(1 - beta2),
                              static_cast<float>(eps), static_cast<float>(weight_decay),
                              static_cast<float>(keep), static_cast<float>(1 / second),
                              static_cast<float>(lr / first)});
}

template <bool kNesterov>
void sgd(const Update& u, double lr, double momentum, double dampening, double weight_decay,
         bool first) {
  update<1>(u, Sgd<kNesterov>{u.scale, static_cast<float>(lr), static_cast<float>(momentum),
                              static_cast<float>(1 - dampening), static_cast<float>(weight_decay),
                              first});
}

}  // namespace

DRIVETRAIN_API void dt_adam(const Update* u, double lr, double beta1, double beta2, double eps,
                            double weight_decay, int decoupled, double first, double second) {
  const auto step = weight_decay != 0 && !decoupled ? adam<true> : adam<false>;
  step(*u, lr, beta1, beta2, eps, weight_decay, first, second);
}

DRIVETRAIN_API void dt_adagrad(const Update* u, double lr, double eps, double weight_decay) {
  update<1>(*u, Adagrad{u->scale, static_cast<float>(lr), static_cast<float>(eps),
                        static_cast<float>(weight_decay)});
}

DRIVETRAIN_API void dt_lion(const Update* u, double lr, double beta1, double beta2,
                            double weight_decay) {
  update<1>(*u, Lion{u->scale, static_cast<float>(lr), static_cast<float>(beta1),
                     static_cast<float>(1 - beta1), static_cast<float>(beta2),
                     static_cast<float>(1 - beta2), static_cast<float>(1 - lr * weight_decay)});
}

// `first`: the buffer starts as the gradient.
DRIVETRAIN_API void dt_sgd(const Update* u, double lr, double momentum, double dampening,
                           double weight_decay, int nesterov, int first) {
  if (u->states[0] == nullptr) {
    update<0>(*u, PlainSgd{u->scale, static_cast<float>(lr), static_cast<float>(weight_decay)});
    return;
  }
  const auto step = nesterov ? sgd<true> : sgd<false>;
  step(*u, lr, momentum, dampening, weight_decay, first != 0);
}

}  // namespace drivetrain
