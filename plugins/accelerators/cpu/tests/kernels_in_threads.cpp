// Every parallel loop of the kernels, for the thread sanitizer; results must be those of one thread.
//
// Argument: optionally "race", to let two threads write one tensor.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../src/drivetrain_cpu/native/copies.cpp"
#include "../src/drivetrain_cpu/native/optimizers.cpp"
#include "../src/drivetrain_cpu/native/quantization.cpp"
#include "../src/drivetrain_cpu/native/reductions.cpp"

using namespace drivetrain;

namespace {

// Several of the pieces that threads share out (32768 elements in sums), and no multiple of any.
constexpr int64_t kCount = 100'003;
using Bytes = std::vector<uint8_t>;

Bytes filled(int dtype) {
  Bytes bytes(kCount * size_of(dtype));
  std::vector<float> values(kCount);
  for (int64_t i = 0; i < kCount; ++i) values[i] = 0.25f + static_cast<float>(i * 7919 % 1000) / 1e3f;
  narrow(values.data(), bytes.data(), dtype, 0, kCount);
  return bytes;
}

// Runs `kernel(tensors, threads)` with one thread and with four, and compares what it wrote.
template <typename Kernel>
void check(const char* what, std::vector<Bytes> tensors, const Kernel& kernel) {
  std::vector<Bytes> alone = tensors;
  kernel(alone, 1);
  kernel(tensors, 4);
  if (tensors == alone) return;
  std::fprintf(stderr, "%s depends on the number of threads\n", what);
  std::_Exit(3);
}

void updates() {
  const int dtypes[][3] = {{0, 0, 0}, {0, 1, 1}, {1, 1, 1}, {0, 2, 2}};
  for (const auto& [weights, gradient, state] : dtypes) {
    for (int stochastic : {0, 1}) {
      const std::vector<Bytes> tensors = {filled(weights), filled(gradient), filled(state),
                                          filled(state), filled(kBFloat16)};
      const auto prepared = [=](auto u, std::vector<Bytes>& t, int threads) {
        u.weights = t[0].data();
        u.gradient = t[1].data();
        u.states[0] = t[2].data();
        u.states[1] = t[3].data();
        u.out = t[4].data();
        u.seed = 5;
        u.weights_dtype = weights;
        u.gradient_dtype = gradient;
        u.states_dtype[0] = u.states_dtype[1] = state;
        u.out_dtype = kBFloat16;
        u.stochastic = stochastic;
        u.threads = threads;
        u.scale = 0.5f;
        return u;
      };
      check("adam", tensors, [&](std::vector<Bytes>& t, int threads) {
        Update u = prepared(Update{}, t, threads);
        u.count = kCount;
        dt_adam(&u, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 0.5, 0.1);
      });
      check("lamb", tensors, [&](std::vector<Bytes>& t, int threads) {
        const Lamb a = prepared(Lamb{}, t, threads);
        const int64_t bounds[] = {0, 70'001, kCount};
        float ratios[2];
        dt_lamb(&a, bounds, 2, 1e-3, 0.0, 10.0, ratios);
      });
    }
  }
}

void copies() {
  check("cast_copy", {filled(kFloat32), filled(kBFloat16)}, [](std::vector<Bytes>& t, int threads) {
    dt_cast_copy(t[1].data(), kBFloat16, t[0].data(), kFloat32, kCount, 1, 0.5f, 1, 3, threads);
  });
  const std::vector<Bytes> two = {filled(kFloat32), filled(kBFloat16), Bytes(4 * kCount)};
  const int32_t dtypes[] = {kFloat32, kBFloat16};
  const int64_t counts[] = {kCount - 3, kCount - 5};
  check("flatten", two, [&](std::vector<Bytes>& t, int threads) {
    void* tensors[] = {t[0].data(), t[1].data()};
    t[2].resize(4 * kCount);
    dt_flatten(t[2].data(), kFloat16, tensors, dtypes, counts, 2, threads);
    dt_unflatten(t[2].data(), kFloat16, tensors, dtypes, counts, 2, threads);
  });
  check("norm_squared", {filled(kFloat32), Bytes(8)}, [](std::vector<Bytes>& t, int threads) {
    const void* tensors[] = {t[0].data()};
    const int32_t dtype = kFloat32;
    double total;
    dt_norm_squared(tensors, &dtype, &kCount, 1, threads, &total);
    std::memcpy(t[1].data(), &total, sizeof total);
  });
}

void quantisation() {
  for (int format : {kUint4, drivetrain::kInt8, kE4M3}) {
    const int64_t block = 100, parameters = 2 * 4 * (kCount / block + 1);
    check("quantize", {filled(kBFloat16), Bytes(2 * kCount), Bytes(2 * parameters), Bytes(parameters),
                       Bytes(kCount), Bytes(4 * kCount)},
          [=](std::vector<Bytes>& t, int threads) {
            auto* scales = reinterpret_cast<float*>(t[2].data());
            dt_quantize(t[0].data(), kBFloat16, format, kCount, block, t[1].data(), scales, threads);
            dt_dequantize(t[1].data(), scales, format, kCount, block, t[5].data(), kFloat32, threads);
            dt_dequantize_reduce_quantize(t[1].data(), scales, 1, format, kCount, block, 0.5f,
                                          t[4].data(), reinterpret_cast<float*>(t[3].data()),
                                          threads);
          });
  }
}

void race() {
  const Bytes source = filled(kFloat32);
  Bytes target = filled(kFloat32);
  const auto copy = [&] {
    dt_cast_copy(target.data(), kFloat32, source.data(), kFloat32, kCount, 1, 2.0f, 0, 0, 1);
  };
  std::thread other(copy);
  copy();
  other.join();
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) race();
  updates();
  copies();
  quantisation();
  std::puts("fine");
}
