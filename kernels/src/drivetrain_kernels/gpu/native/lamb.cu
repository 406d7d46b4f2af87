// LAMB: moments and norms in one pass, trust ratios, and the step, without waiting for the host.
#include "update.h"

namespace drivetrain {
namespace {

// Layout shared with updates.py. A chunk is (start, count, tensor); those of a tensor are in order.
struct Lamb {
  Update u;
  const int64_t* chunks;
  const int64_t* first_chunks;  // of each tensor, and the number of chunks at the end
  double* norms;                // two for each chunk: squares of the weights, of the update
  float* ratios;
  int64_t chunk_count, tensor_count;
  float beta1, rest1, beta2, rest2, eps, decay, inverse_first, inverse_second;
  float lr;
  double low, high;
};

__device__ inline float direction(const Lamb& a, float m, float v, float w) {
  const float denominator = sqrtf(v) * a.inverse_second + a.eps;
  return (m * a.inverse_first) / denominator + w * a.decay;
}

__device__ inline uint32_t moment_code(const Update& u, float value, int dtype, int64_t at,
                                       uint32_t stream) {
  const bool rounds = u.stochastic && dtype == kBFloat16;
  return rounds ? code_of_randomly(value, dtype, random_of(at, stream, u.seed))
                : code_of(value, dtype);
}

// Updates the moments of kWidth elements; adds the squares of the weights and of the update, which
// is defined on the moments as stored.
template <int kWidth>
__device__ inline void moments_vector(const Lamb& a, float factor, int64_t at, double* norms) {
  const Update& u = a.u;
  const Raw<kWidth> raw_w = fetch<kWidth>(u.weights, u.weights_dtype, at);
  const Raw<kWidth> raw_g = fetch<kWidth>(u.gradient, u.gradient_dtype, at);
  const Raw<kWidth> raw_m = fetch<kWidth>(u.states[0], u.states_dtype[0], at);
  const Raw<kWidth> raw_v = fetch<kWidth>(u.states[1], u.states_dtype[1], at);
  float w[kWidth], g[kWidth], m[kWidth], v[kWidth];
  widen(raw_w, u.weights_dtype, w);
  widen(raw_g, u.gradient_dtype, g);
  widen(raw_m, u.states_dtype[0], m);
  widen(raw_v, u.states_dtype[1], v);
  uint32_t first[kWidth], second[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float gradient = g[i] * factor;
    const float next = m[i] * a.beta1 + gradient * a.rest1;
    const float square = v[i] * a.beta2 + (gradient * gradient) * a.rest2;
    first[i] = moment_code(u, next, u.states_dtype[0], at + i, 1);
    second[i] = moment_code(u, square, u.states_dtype[1], at + i, 2);
    const double weight = w[i];
    const double update = direction(a, value_of(first[i], u.states_dtype[0]),
                                    value_of(second[i], u.states_dtype[1]), w[i]);
    norms[0] += weight * weight;
    norms[1] += update * update;
  }
  store_codes<kWidth>(u.states[0], u.states_dtype[0], at, first);
  store_codes<kWidth>(u.states[1], u.states_dtype[1], at, second);
}

template <int kWidth>
__device__ inline void step_vector(const Lamb& a, float step, int64_t at) {
  const Update& u = a.u;
  const Raw<kWidth> raw_w = fetch<kWidth>(u.weights, u.weights_dtype, at);
  const Raw<kWidth> raw_m = fetch<kWidth>(u.states[0], u.states_dtype[0], at);
  const Raw<kWidth> raw_v = fetch<kWidth>(u.states[1], u.states_dtype[1], at);
  float w[kWidth], m[kWidth], v[kWidth];
  widen(raw_w, u.weights_dtype, w);
  widen(raw_m, u.states_dtype[0], m);
  widen(raw_v, u.states_dtype[1], v);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) w[i] = w[i] - direction(a, m[i], v[i], w[i]) * step;
  if (u.stochastic) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t random = random_of(at + i, 0, u.seed);
      store_randomly(u.weights, u.weights_dtype, at + i, w[i], random);
      if (u.out != nullptr) store_randomly(u.out, u.out_dtype, at + i, w[i], random);
    }
    return;
  }
  store<kWidth>(u.weights, u.weights_dtype, at, w);
  if (u.out != nullptr) store<kWidth>(u.out, u.out_dtype, at, w);
}

__device__ inline Cut chunk_cut(const Update& u, int64_t start, int64_t count) {
  Cutter cutter(4);
  cutter.add(u.weights, u.weights_dtype, start);
  cutter.add(u.gradient, u.gradient_dtype, start);
  cutter.add(u.states[0], u.states_dtype[0], start);
  cutter.add(u.states[1], u.states_dtype[1], start);
  cutter.add(u.out, u.out_dtype, start);
  return cutter.cut(count);
}

__global__ void __launch_bounds__(kThreads) moments_kernel(Lamb a) {
  const float factor = factor_of(a.u.scale, a.u.scale_tensor);
  for (int64_t index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
    const int64_t start = a.chunks[3 * index], count = a.chunks[3 * index + 1];
    const Cut cut = chunk_cut(a.u, start, count);
    double norms[2] = {0, 0};
    for (int64_t i = threadIdx.x; i < cut.vectors; i += kThreads) {
      moments_vector<4>(a, factor, start + cut.vector(i), norms);
    }
    for (int64_t i = threadIdx.x; i < cut.singles(); i += kThreads) {
      moments_vector<1>(a, factor, start + cut.single(i), norms);
    }
    const double weights = block_sum(norms[0]), update = block_sum(norms[1]);
    if (threadIdx.x == 0) {
      a.norms[2 * index] = weights;
      a.norms[2 * index + 1] = update;
    }
  }
}

__global__ void __launch_bounds__(kThreads) ratios_kernel(Lamb a) {
  for (int64_t tensor = blockIdx.x; tensor < a.tensor_count; tensor += gridDim.x) {
    double weights = 0, update = 0;
    const int64_t end = a.first_chunks[tensor + 1];
    for (int64_t c = a.first_chunks[tensor] + threadIdx.x; c < end; c += kThreads) {
      weights += a.norms[2 * c];
      update += a.norms[2 * c + 1];
    }
    weights = block_sum(weights);
    update = block_sum(update);
    if (threadIdx.x == 0) {
      double ratio = 1;
      if (weights > 0 && update > 0) {
        ratio = sqrt(weights) / sqrt(update);
        ratio = ratio < a.low ? a.low : ratio > a.high ? a.high : ratio;
      }
      a.ratios[tensor] = static_cast<float>(ratio);
    }
  }
}

__global__ void __launch_bounds__(kThreads) step_kernel(Lamb a) {
  for (int64_t index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
    const int64_t start = a.chunks[3 * index], count = a.chunks[3 * index + 1];
    const float step = a.ratios[a.chunks[3 * index + 2]] * a.lr;
    const Cut cut = chunk_cut(a.u, start, count);
    for (int64_t i = threadIdx.x; i < cut.vectors; i += kThreads) {
      step_vector<4>(a, step, start + cut.vector(i));
    }
    for (int64_t i = threadIdx.x; i < cut.singles(); i += kThreads) {
      step_vector<1>(a, step, start + cut.single(i));
    }
  }
}

}  // namespace

// One LAMB step; writes moments, weights, `out` and trust ratios.
DRIVETRAIN_API int dt_lamb(const Lamb* a, void* stream) {
  const int64_t most = most_blocks();
  const int64_t chunks = a->chunk_count < most ? a->chunk_count : most;
  const int64_t tensors = a->tensor_count < most ? a->tensor_count : most;
  int status = launch_blocks(moments_kernel, *a, chunks, stream);
  if (status == 0) status = launch_blocks(ratios_kernel, *a, tensors, stream);
  if (status == 0) status = launch_blocks(step_kernel, *a, chunks, stream);
  return status;
}

}  // namespace drivetrain
