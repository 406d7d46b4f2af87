// One elementwise update in one pass over memory.
#pragma once

#include "values.h"

namespace drivetrain {

// What every update gets; layout shared with updates.py.
struct Update {
  void* weights;
  const void* gradient;
  void* states[2];
  void* out;
  const float* scale_tensor;  // null, or one element on the device: the host never waits for it
  int64_t count;
  uint64_t seed;
  int32_t weights_dtype, gradient_dtype, states_dtype[2], out_dtype;
  int32_t stochastic;
  float scale;
};

template <typename Rule>
struct UpdateTask {
  Update u;
  Rule rule;
  Cut cut;
};

__device__ inline float factor_of(float scale, const float* scale_tensor) {
  return scale_tensor == nullptr ? scale : scale * *scale_tensor;
}

// Updates kWidth elements from `at` on; all loads are under way before the first conversion.
template <int kWidth, typename Rule>
__device__ inline void update_vector(const Update& u, const Rule& rule, float factor, int64_t at) {
  constexpr int kStates = Rule::kStates;
  const Raw<kWidth> raw_weights = fetch<kWidth>(u.weights, u.weights_dtype, at);
  const Raw<kWidth> raw_gradient = fetch<kWidth>(u.gradient, u.gradient_dtype, at);
  Raw<kWidth> raw_states[kStates + 1];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    raw_states[k] = fetch<kWidth>(u.states[k], u.states_dtype[k], at);
  }
  float weights[kWidth], gradient[kWidth], states[kStates + 1][kWidth];
  widen(raw_weights, u.weights_dtype, weights);
  widen(raw_gradient, u.gradient_dtype, gradient);
#pragma unroll
  for (int k = 0; k < kStates; ++k) widen(raw_states[k], u.states_dtype[k], states[k]);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float own[kStates + 1];
#pragma unroll
    for (int k = 0; k < kStates; ++k) own[k] = states[k][i];
    rule(weights[i], gradient[i] * factor, own);
#pragma unroll
    for (int k = 0; k < kStates; ++k) states[k][i] = own[k];
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k) store<kWidth>(u.states[k], u.states_dtype[k], at, states[k]);
  store<kWidth>(u.weights, u.weights_dtype, at, weights);
  if (u.out != nullptr) store<kWidth>(u.out, u.out_dtype, at, weights);
}

template <int kWidth, typename Rule>
__global__ void __launch_bounds__(kThreads) update_kernel(UpdateTask<Rule> task) {
  const float factor = factor_of(task.u.scale, task.u.scale_tensor);
  for (int64_t i = thread_index(); i < task.cut.vectors; i += thread_stride()) {
    update_vector<kWidth>(task.u, task.rule, factor, task.cut.vector(i));
  }
  for (int64_t i = thread_index(); i < task.cut.singles(); i += thread_stride()) {
    update_vector<1>(task.u, task.rule, factor, task.cut.single(i));
  }
}

// Sixteen threads share the random words of 64 elements: each takes four, 16 apart, so that no
// word is made twice and neighbours still touch neighbouring memory.
template <typename Rule>
__global__ void __launch_bounds__(kThreads) update_randomly_kernel(UpdateTask<Rule> task) {
  constexpr int kStates = Rule::kStates;
  const Update& u = task.u;
  const float factor = factor_of(u.scale, u.scale_tensor);
  const int64_t lanes = (u.count + 63) / 64 * 16;
  for (int64_t lane = thread_index(); lane < lanes; lane += thread_stride()) {
    uint32_t words[4], more[4] = {0, 0, 0, 0};
    philox(lane, 0, u.seed, words);
    if (kStates > 1) philox(lane, 1, u.seed, more);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t at = lane / 16 * 64 + 16 * w + lane % 16;
      if (at >= u.count) break;
      float weight, gradient, states[kStates + 1];
      load<1>(u.weights, u.weights_dtype, at, &weight);
      load<1>(u.gradient, u.gradient_dtype, at, &gradient);
#pragma unroll
      for (int k = 0; k < kStates; ++k) load<1>(u.states[k], u.states_dtype[k], at, states + k);
      task.rule(weight, gradient * factor, states);
      // Stream 0 is the low half of the words, stream 1 the high half, stream 2 the low half of
      // other words.
      if (kStates > 0) {
        store_randomly(u.states[0], u.states_dtype[0], at, states[0], words[w] >> 16);
      }
      if (kStates > 1) store_randomly(u.states[1], u.states_dtype[1], at, states[1], more[w]);
      store_randomly(u.weights, u.weights_dtype, at, weight, words[w]);
      if (u.out != nullptr) store_randomly(u.out, u.out_dtype, at, weight, words[w]);
    }
  }
}

// Runs `rule` on all elements of `u`; answers the runtime's status.
template <typename Rule>
int update(const Update& u, const Rule& rule, void* stream) {
  const void* tensors[] = {u.weights, u.gradient, u.states[0], u.states[1], u.out};
  const int dtypes[] = {u.weights_dtype, u.gradient_dtype, u.states_dtype[0], u.states_dtype[1],
                        u.out_dtype};
  bool narrow = true;  // eight 16-bit elements fill 16 bytes, four float32 do
  for (int t = 0; t < 5; ++t) narrow = narrow && (!tensors[t] || dtypes[t] != kFloat32);
  Cutter cutter(narrow ? 8 : 4);
  for (int t = 0; t < 5; ++t) cutter.add(tensors[t], dtypes[t]);
  const UpdateTask<Rule> task{u, rule, cutter.cut(u.count)};
  if (u.stochastic) {
    return launch(update_randomly_kernel<Rule>, task, (u.count + 63) / 64 * 16, stream);
  }
  const int64_t singles = task.cut.singles();
  const int64_t items = task.cut.vectors > singles ? task.cut.vectors : singles;
  return launch(narrow ? update_kernel<8, Rule> : update_kernel<4, Rule>, task, items, stream);
}

}  // namespace drivetrain
