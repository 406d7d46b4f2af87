// Kernels that need sums over whole tensors: the squared norm, and LAMB's trust ratios.
//
// Sums are made per chunk of fixed size and then added in order, so that the result does not depend
// on the number of threads.
#include <cmath>
#include <cstdlib>
#include <memory>

#include "tiles.h"

namespace drivetrain {
namespace {

constexpr int64_t kChunk = 64 * kTile;

int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A plain array that is null, instead of an exception across the C interface, without memory.
using Doubles = std::unique_ptr<double, Free>;

Doubles doubles(int64_t count) {
  return Doubles(static_cast<double*>(std::calloc(std::max<int64_t>(count, 1), sizeof(double))));
}

double tile_norm(const float* values, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const double value = values[i];
    sum += value * value;
  }
  return sum;
}

double chunk_norm(const void* values, int dtype, int64_t start, int64_t count) {
  Tile scratch;
  double sum = 0;
  for (int64_t at = 0; at < count; at += kTile) {
    const int64_t here = std::min(kTile, count - at);
    sum += tile_norm(view(values, dtype, start + at, here, scratch), here);
  }
  return sum;
}

// Layout shared with kernels.py.
struct Lamb {
  void* weights;
  const void* gradient;
  void* states[2];
  void* out;
  uint64_t seed;
  int32_t weights_dtype, gradient_dtype, states_dtype[2], out_dtype;
  int32_t stochastic, threads;
  float scale, beta1, rest1, beta2, rest2, eps, decay, inverse_first, inverse_second;
};

struct Direction {
  Tile weights, gradient, first, second, update;
};

float direction(const Lamb& a, float m, float v, float w) {
  const float denominator = std::sqrt(v) * a.inverse_second + a.eps;
  return (m * a.inverse_first) / denominator + w * a.decay;
}

// Updates the moments of one tile; answers the squared norms of weights and of the update.
void lamb_moments(const Lamb& a, int64_t start, int64_t count, Direction& s, double* norms) {
  Rounder rounder(a.stochastic != 0, a.seed);
  const float* w = view(a.weights, a.weights_dtype, start, count, s.weights);
  const float* g = view(a.gradient, a.gradient_dtype, start, count, s.gradient);
  float* m = s.first.data;
  float* v = s.second.data;
  widen(a.states[0], a.states_dtype[0], start, count, m);
  widen(a.states[1], a.states_dtype[1], start, count, v);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = g[i] * a.scale;
    m[i] = m[i] * a.beta1 + gradient * a.rest1;
    v[i] = v[i] * a.beta2 + (gradient * gradient) * a.rest2;
  }
  rounder.narrow(m, a.states[0], a.states_dtype[0], start, count, 1);
  rounder.narrow(v, a.states[1], a.states_dtype[1], start, count, 2);
  // The update is defined on the moments as stored.
  widen(a.states[0], a.states_dtype[0], start, count, m);
  widen(a.states[1], a.states_dtype[1], start, count, v);
  float* u = s.update.data;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) u[i] = direction(a, m[i], v[i], w[i]);
  norms[0] += tile_norm(w, count);
  norms[1] += tile_norm(u, count);
}

void lamb_step(const Lamb& a, int64_t start, int64_t count, float step, Direction& s) {
  Rounder rounder(a.stochastic != 0, a.seed);
  const Mutable weights(a.weights, a.weights_dtype, start, count, s.weights);
  float* w = weights.data();
  const float* m = view(a.states[0], a.states_dtype[0], start, count, s.first);
  const float* v = view(a.states[1], a.states_dtype[1], start, count, s.second);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) w[i] = w[i] - direction(a, m[i], v[i], w[i]) * step;
  weights.put_back(rounder, 0);
  if (a.out != nullptr) rounder.narrow(w, a.out, a.out_dtype, start, count, 0);
}

// Calls body(first, count) for pieces of at most a tile.
template <typename Body>
void for_each_piece(int64_t start, int64_t count, const Body& body) {
  for (int64_t at = 0; at < count; at += kTile) body(start + at, std::min(kTile, count - at));
}

}  // namespace

// Adds the squares of all elements of all tensors into *total; 0 on success, 1 without memory.
DRIVETRAIN_API int dt_norm_squared(const void* const* tensors, const int32_t* dtypes,
                                   const int64_t* counts, int64_t number, int threads,
                                   double* total) {
  *total = 0;
  for (int64_t t = 0; t < number; ++t) {
    const int64_t chunks = chunks_of(counts[t]);
    const Doubles sums = doubles(chunks);
    if (!sums) return 1;
    double* sum = sums.get();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t start = c * kChunk;
      sum[c] = chunk_norm(tensors[t], dtypes[t], start, std::min(kChunk, counts[t] - start));
    }
    for (int64_t c = 0; c < chunks; ++c) *total += sum[c];
  }
  return 0;
}

// LAMB on tensors [bounds[k], bounds[k + 1]); writes their trust ratios. 0 on success.
DRIVETRAIN_API int dt_lamb(const Lamb* a, const int64_t* bounds, int64_t number, double lr,
                           double low, double high, float* ratios) {
  for (int64_t t = 0; t < number; ++t) {
    const int64_t begin = bounds[t], size = bounds[t + 1] - begin, chunks = chunks_of(size);
    const Doubles sums = doubles(2 * chunks);
    if (!sums) return 1;
    double* norms = sums.get();
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      Direction scratch;
      for_each_piece(begin + c * kChunk, std::min(kChunk, size - c * kChunk),
                     [&](int64_t start, int64_t count) {
                       lamb_moments(*a, start, count, scratch, norms + 2 * c);
                     });
    }
    double weights = 0, update = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      weights += norms[2 * c];
      update += norms[2 * c + 1];
    }
    double ratio = 1;
    if (weights > 0 && update > 0) {
      ratio = std::min(std::max(std::sqrt(weights) / std::sqrt(update), low), high);
    }
    ratios[t] = static_cast<float>(ratio);
    const float step = ratios[t] * static_cast<float>(lr);
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      Direction scratch;
      for_each_piece(begin + c * kChunk, std::min(kChunk, size - c * kChunk),
                     [&](int64_t start, int64_t count) {
                       lamb_step(*a, start, count, step, scratch);
                     });
    }
  }
  return 0;
}

}  // namespace drivetrain
