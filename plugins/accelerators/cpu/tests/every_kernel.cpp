// Calls every kernel with every combination of dtypes, and prints a hash of what it wrote.
//
// Kernels return the same bits on every processor, so two builds of this program print the same
// text, but for sums, which are printed as numbers. Inputs are made of integers, so that they too
// are the same everywhere.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

namespace {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
const char* const kNames[] = {"f32", "bf16", "f16"};

// Layouts of the kernels' own structures, as in updates.py.
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

extern "C" {
void dt_adam(const Update*, double, double, double, double, double, int, double, double);
void dt_adagrad(const Update*, double, double, double);
void dt_lion(const Update*, double, double, double, double);
void dt_sgd(const Update*, double, double, double, double, int, int);
int dt_lamb(const Lamb*, const int64_t*, int64_t, double, double, double, float*);
int dt_norm_squared(const void* const*, const int32_t*, const int64_t*, int64_t, int, double*);
void dt_cast_copy(void*, int, const void*, int, int64_t, int, float, int, uint64_t, int);
void dt_flatten(void*, int, const void* const*, const int32_t*, const int64_t*, int64_t, int);
void dt_unflatten(const void*, int, void* const*, const int32_t*, const int64_t*, int64_t, int);
int dt_quantize(const void*, int, int, int64_t, int64_t, uint8_t*, float*, int);
int dt_dequantize(const uint8_t*, const float*, int, int64_t, int64_t, void*, int, int);
int dt_dequantize_reduce_quantize(const uint8_t*, const float*, int64_t, int, int64_t, int64_t,
                                  float, uint8_t*, float*, int);
void dt_pack_signs(const float*, float, float*, uint8_t*, int64_t, int);
void dt_mean_signs(const uint8_t*, const float*, int64_t, int64_t, float*, int);
void dt_pack_codes(const uint8_t*, int64_t, int64_t, int, int32_t*, int);
void dt_unpack_codes(const int32_t*, int64_t, int64_t, int, uint8_t*, int);
void dt_fake_quantize(const void*, int, int64_t, int64_t, int, int, void*, int);
}

constexpr int64_t kSizes[] = {1, 65, 555};
constexpr int kThreads = 1;  // an emulator makes waiting for others expensive

// Values of one dtype, one element off the aligned start, with extremes among them.
class Values {
 public:
  Values(int dtype, int64_t count, uint32_t seed, bool positive = false, bool extremes = false)
      : dtype_(dtype), count_(count), bytes_((count + 1) * size() + 64) {
    std::vector<float> plain(count);
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const int32_t integer = static_cast<int32_t>(seed >> 12) - (positive ? 0 : 1 << 19);
      plain[i] = static_cast<float>(integer) / (1 << 17);
    }
    if (extremes) {
      const float inf = std::numeric_limits<float>::infinity();
      const float odd[] = {inf,    -inf,     inf - inf, 0.0f,     -0.0f,
                           1e-40f, 65519.0f, 65520.0f,  3.39e38f, 6e-8f};
      for (int64_t i = 0; i < 10 && 5 * i < count; ++i) plain[5 * i] = odd[i];
    }
    dt_cast_copy(data(), dtype, plain.data(), kFloat32, count, 0, 1.0f, 0, 0, 1);
  }

  void* data() { return bytes_.data() + size(); }
  int dtype() const { return dtype_; }
  int64_t count() const { return count_; }

  // FNV-1a over the elements, with one spelling for every value that is not a number.
  uint64_t hash(uint64_t state) {
    for (int64_t i = 0; i < count_; ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes_.data() + (i + 1) * size(), size());
      const uint32_t infinity[] = {0x7f800000, 0x7f80, 0x7c00};
      const uint32_t magnitude = bits & (dtype_ == kFloat32 ? 0x7fffffff : 0x7fff);
      state = (state ^ (magnitude > infinity[dtype_] ? 0x7fffffff : bits)) * 1099511628211u;
    }
    return state;
  }

 private:
  int size() const { return dtype_ == kFloat32 ? 4 : 2; }
  int dtype_;
  int64_t count_;
  std::vector<unsigned char> bytes_;
};

constexpr uint64_t kStart = 14695981039346656037u;

uint64_t hash_of(const std::vector<uint8_t>& codes, uint64_t state) {
  for (uint8_t code : codes) state = (state ^ code) * 1099511628211u;
  return state;
}

uint64_t hash_of(const std::vector<float>& values, uint64_t state) {
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    state = (state ^ (value != value ? 0x7fffffff : bits)) * 1099511628211u;
  }
  return state;
}

void print(const std::string& name, uint64_t hash) {
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

template <typename Call>
void every_update(const char* name, int states, const Call& call) {
  for (int w : {0, 1, 2}) {
    for (int g : {0, 1, 2}) {
      for (int s : {0, 1, 2}) {
        for (int out : {-1, 1, 2}) {
          uint64_t hash = kStart;
          for (int64_t size : kSizes) {
            for (int stochastic : {0, 1}) {
              const bool rounds = stochastic && w != kFloat16 && s != kFloat16 && out != kFloat16;
              const int copied = out < 0 ? kFloat32 : out;
              Values weights(w, size, 1), gradient(g, size, 2, false, size > 100);
              Values first(s, size, 4), second(s, size, 5, true), copy(copied, size, 3);
              Update u{weights.data(), gradient.data(), {first.data(), second.data()}, nullptr,
                       size, 77, w, g, {s, s}, copied, rounds, kThreads, 0.5f};
              if (out >= 0) u.out = copy.data();
              for (int k = states; k < 2; ++k) u.states[k] = nullptr;
              call(u);
              for (Values* written : {&weights, &first, &second, &copy}) hash = written->hash(hash);
            }
          }
          print(std::string(name) + " " + kNames[w] + " " + kNames[g] + " " + kNames[s] + " " +
                    (out < 0 ? "none" : kNames[out]), hash);
        }
      }
    }
  }
}

void updates() {
  for (int decoupled : {0, 1}) {
    every_update(decoupled ? "adamw" : "adam", 2, [=](const Update& u) {
      dt_adam(&u, 1e-2, 0.9, 0.95, 1e-6, 0.1, decoupled, 0.27, 0.4);
    });
  }
  every_update("adagrad", 1, [](const Update& u) { dt_adagrad(&u, 1e-2, 1e-8, 0.1); });
  every_update("lion", 1, [](const Update& u) { dt_lion(&u, 1e-2, 0.95, 0.98, 0.1); });
  every_update("sgd", 1, [](const Update& u) { dt_sgd(&u, 1e-2, 0.9, 0.5, 0.1, 0, 0); });
  every_update("nesterov", 1, [](const Update& u) { dt_sgd(&u, 1e-2, 0.9, 0, 0.1, 1, 1); });
  every_update("plain", 0, [](const Update& u) { dt_sgd(&u, 1e-2, 0, 0, 0.1, 0, 0); });
}

void lamb() {
  for (int w : {0, 1, 2}) {
    for (int s : {0, 1, 2}) {
      const int64_t bounds[] = {0, 300, 300, 1027}, size = 1027;
      Values weights(w, size, 1), gradient(w, size, 2), first(s, size, 4), second(s, size, 5, true);
      const Lamb a{weights.data(), gradient.data(), {first.data(), second.data()}, nullptr, 7, w, w,
                   {s, s}, 0, 0, kThreads, 0.5f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-6f, 0.1f, 2.0f, 3.0f};
      float ratios[3];
      dt_lamb(&a, bounds, 3, 1e-2, 0.01, 10.0, ratios);
      print(std::string("lamb ") + kNames[w] + " " + kNames[s], second.hash(first.hash(kStart)));
      std::printf("ratios %.4f %.4f %.4f\n", ratios[0], ratios[1], ratios[2]);
    }
  }
}

void copies() {
  for (int from : {0, 1, 2}) {
    for (int to : {0, 1, 2}) {
      uint64_t hash = kStart;
      for (int64_t size : kSizes) {
        for (int stochastic : {0, 1}) {
          Values source(from, size, 1, false, true), target(to, size, 2);
          dt_cast_copy(target.data(), to, source.data(), from, size, stochastic, 0.3f,
                       stochastic && to == kBFloat16, 9, kThreads);
          hash = target.hash(hash);
        }
      }
      Values one(from, 65, 3, false, true), two(from, 1027, 4), flat(to, 1092, 5);
      void* tensors[] = {one.data(), two.data()};
      const int32_t dtypes[] = {from, from};
      const int64_t counts[] = {65, 1027};
      dt_flatten(flat.data(), to, tensors, dtypes, counts, 2, kThreads);
      hash = flat.hash(hash);
      dt_unflatten(flat.data(), to, tensors, dtypes, counts, 2, kThreads);
      print(std::string("copies ") + kNames[from] + " " + kNames[to], two.hash(one.hash(hash)));
      double total = 0;
      dt_norm_squared(tensors + 1, dtypes + 1, counts + 1, 1, kThreads, &total);
      std::printf("norm %.9g\n", total);
    }
  }
}

void quantization() {
  for (int format = 0; format < 6; ++format) {
    const bool packed = format == 2 || format == 3, asymmetric = format == 1 || format == 3;
    for (int dtype : {0, 1, 2}) {
      uint64_t hash = kStart;
      for (int64_t block : {2, 64, 256}) {
        const int64_t size = 1027, blocks = (size + block - 1) / block;
        Values values(dtype, size, 1, false, block == 64), back(dtype, size, 2);
        std::vector<uint8_t> codes(packed ? (size + 1) / 2 : size), sum(codes.size());
        std::vector<float> parameters(blocks * (asymmetric ? 2 : 1)), own(parameters.size());
        dt_quantize(values.data(), dtype, format, size, block, codes.data(), parameters.data(),
                    kThreads);
        dt_dequantize(codes.data(), parameters.data(), format, size, block, back.data(), dtype,
                      kThreads);
        hash = back.hash(hash_of(parameters, hash_of(codes, hash)));
        std::vector<uint8_t> both(codes);
        both.insert(both.end(), codes.begin(), codes.end());
        std::vector<float> scales(parameters);
        scales.insert(scales.end(), parameters.begin(), parameters.end());
        dt_dequantize_reduce_quantize(both.data(), scales.data(), 2, format, size, block, 0.3f,
                                      sum.data(), own.data(), kThreads);
        hash = hash_of(own, hash_of(sum, hash));
      }
      print("quantization " + std::to_string(format) + " " + kNames[dtype], hash);
    }
  }
}

void signs() {
  for (int64_t size : kSizes) {
    Values values(kFloat32, size, 1), error(kFloat32, size, 2), mean(kFloat32, size, 3);
    std::vector<uint8_t> packed(2 * ((size + 7) / 8));
    const float scales[] = {0.5f, 0.75f};
    for (int64_t row = 0; row < 2; ++row) {
      dt_pack_signs(static_cast<const float*>(values.data()), 0.5f,
                    static_cast<float*>(error.data()), packed.data() + row * ((size + 7) / 8), size,
                    kThreads);
    }
    dt_mean_signs(packed.data(), scales, 2, size, static_cast<float*>(mean.data()), kThreads);
    print("signs", mean.hash(error.hash(hash_of(packed, kStart))));
  }
}

void codes() {
  for (int bits = 2; bits <= 8; ++bits) {
    for (int64_t size : kSizes) {
      std::vector<uint8_t> from(2 * size), to(2 * size);
      for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(37 * i + bits);
      std::vector<int32_t> words(2 * ((size * bits + 31) / 32));
      dt_pack_codes(from.data(), 2, size, bits, words.data(), kThreads);
      dt_unpack_codes(words.data(), 2, size, bits, to.data(), kThreads);
      print("codes", hash_of(to, kStart));
      for (int dtype : {kFloat32, kBFloat16, kFloat16}) {
        Values values(dtype, size, 1), rounded(dtype, size, 2);
        for (int symmetric : {0, 1}) {
          dt_fake_quantize(values.data(), dtype, 1, size, bits, symmetric, rounded.data(), kThreads);
          print("fake_quantize", rounded.hash(kStart));
        }
      }
    }
  }
}

}  // namespace

int main() {
  updates();
  lamb();
  copies();
  quantization();
  signs();
  codes();
}
