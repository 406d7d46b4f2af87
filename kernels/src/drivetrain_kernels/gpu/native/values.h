// Values in storage dtypes, seen as float32 in registers.
//
// A dtype is a run-time number: kernels of this library wait for memory, so a branch that all
// threads take alike costs nothing, and dtypes add up instead of multiplying. Loads are issued
// first and converted later, so that several are under way at once. Conversions are made of
// integer operations: all devices round alike.
#pragma once

#include "portability.h"

namespace drivetrain {

// Order shared with call.py.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

__device__ inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__host__ __device__ inline int size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// -- bfloat16 --------------------------------------------------------------------------------

__device__ inline float widen_bfloat16(uint32_t half) { return float_of(half << 16); }

__device__ inline uint32_t round_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// Adds 16 random bits below the kept ones and truncates; see drivetrain_kernels/rounding.py.
__device__ inline uint32_t round_bfloat16_randomly(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  return (bits & 0x7fffffff) < 0x7f800000 ? (bits + random) >> 16 : round_bfloat16(value);
}

// -- float16 ---------------------------------------------------------------------------------

__device__ inline float widen_float16(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  // 2^112 moves the exponent; subnormal halves become normal floats on the way, exactly.
  const float finite = float_of(magnitude << 13) * float_of(0x77800000);
  const uint32_t special = 0x7f800000 | (magnitude << 13);
  return float_of(sign | (magnitude >= 0x7c00 ? special : bits_of(finite)));
}

__device__ inline uint32_t round_float16(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000, bits = bits_of(value) & 0x7fffffff;
  // Below 2^-14 the last place is 2^-24 everywhere: adding 0.5 puts it into the last bit.
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112u << 10);
  uint32_t half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x477ff000 ? 0x7c00 : half;
  half = bits > 0x7f800000 ? 0x7e00 : half;
  return sign | half;
}

__device__ inline float widen_half(uint32_t half, int dtype) {
  return dtype == kBFloat16 ? widen_bfloat16(half) : widen_float16(half);
}

// What is stored for `value`, and what stored bits stand for.
__device__ inline uint32_t code_of(float value, int dtype) {
  if (dtype == kFloat32) return bits_of(value);
  return dtype == kBFloat16 ? round_bfloat16(value) : round_float16(value);
}

__device__ inline uint32_t code_of_randomly(float value, int dtype, uint32_t random) {
  return dtype == kBFloat16 ? round_bfloat16_randomly(value, random & 0xffff)
                            : code_of(value, dtype);
}

__device__ inline float value_of(uint32_t code, int dtype) {
  return dtype == kFloat32 ? float_of(code) : widen_half(code, dtype);
}

// -- memory ----------------------------------------------------------------------------------

// kBytes of memory that one thread reads or writes with the widest instructions there are.
template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Piece {
  uint32_t words[kBytes / 4];
};
template <>
struct Piece<2> {
  uint16_t words[1];
};

// kWidth elements as they lie in memory: a word each, or two 16-bit ones in a word.
template <int kWidth>
struct Raw {
  uint32_t words[kWidth];
};

template <int kBytes, int kWidth>
__device__ inline void read(const void* memory, Raw<kWidth>& raw) {
  const Piece<kBytes> piece = *static_cast<const Piece<kBytes>*>(memory);
#pragma unroll
  for (int i = 0; i < (kBytes + 3) / 4; ++i) raw.words[i] = piece.words[i];
}

// Loads elements [at, at + kWidth), which must be aligned to their own size (16 bytes at most).
template <int kWidth>
__device__ inline Raw<kWidth> fetch(const void* memory, int dtype, int64_t at) {
  Raw<kWidth> raw;
  if (dtype == kFloat32) {
    read<4 * kWidth>(static_cast<const float*>(memory) + at, raw);
  } else {
    read<2 * kWidth>(static_cast<const uint16_t*>(memory) + at, raw);
  }
  return raw;
}

template <int kWidth>
__device__ inline void widen(const Raw<kWidth>& raw, int dtype, float* values) {
  if (dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = float_of(raw.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = widen_half((raw.words[i / 2] >> (16 * (i % 2))) & 0xffff, dtype);
    }
  }
}

template <int kWidth>
__device__ inline void load(const void* memory, int dtype, int64_t at, float* values) {
  widen(fetch<kWidth>(memory, dtype, at), dtype, values);
}

// Stores the kWidth words or halves in `codes`.
template <int kWidth>
__device__ inline void store_codes(void* memory, int dtype, int64_t at, const uint32_t* codes) {
  if (dtype == kFloat32) {
    Piece<4 * kWidth> piece;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) piece.words[i] = codes[i];
    *reinterpret_cast<Piece<4 * kWidth>*>(static_cast<float*>(memory) + at) = piece;
  } else {
    Piece<2 * kWidth> piece;
    if constexpr (kWidth == 1) {
      piece.words[0] = static_cast<uint16_t>(codes[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) piece.words[i] = codes[2 * i] | (codes[2 * i + 1] << 16);
    }
    *reinterpret_cast<Piece<2 * kWidth>*>(static_cast<uint16_t*>(memory) + at) = piece;
  }
}

// Rounds to nearest and stores elements [at, at + kWidth).
template <int kWidth>
__device__ inline void store(void* memory, int dtype, int64_t at, const float* values) {
  uint32_t codes[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) codes[i] = code_of(values[i], dtype);
  store_codes<kWidth>(memory, dtype, at, codes);
}

// Stores one element, stochastically if it is a bfloat16; the low 16 bits of `random` count.
__device__ inline void store_randomly(void* memory, int dtype, int64_t at, float value,
                                      uint32_t random) {
  const uint32_t code = code_of_randomly(value, dtype, random);
  store_codes<1>(memory, dtype, at, &code);
}

// -- Philox4x32-7 ----------------------------------------------------------------------------

// Word w belongs to element 64 * (lane / 16) + 16 * w + lane % 16; see rounding.py.
__device__ inline void philox(uint64_t lane, uint32_t stream, uint64_t seed, uint32_t words[4]) {
  uint32_t a = static_cast<uint32_t>(lane), b = static_cast<uint32_t>(lane >> 32);
  uint32_t c = stream, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(p);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = a;
  words[1] = b;
  words[2] = c;
  words[3] = d;
}

// The random half-word of one element of a stream, in the low 16 bits.
__device__ inline uint32_t random_of(int64_t element, uint32_t stream, uint64_t seed) {
  uint32_t words[4];
  philox(16 * static_cast<uint64_t>(element / 64) + element % 16, stream / 2, seed, words);
  const int w = element % 64 / 16;
  const uint32_t word = w < 2 ? (w == 0 ? words[0] : words[1]) : (w == 2 ? words[2] : words[3]);
  return stream % 2 ? word >> 16 : word & 0xffff;
}

// -- aligned middles -------------------------------------------------------------------------

// A flat range cut into single elements and vectors that are aligned in every tensor of a kernel.
struct Cut {
  int64_t count, head, vectors;
  int width;

  __host__ __device__ int64_t singles() const { return count - vectors * width; }
  __host__ __device__ int64_t vector(int64_t index) const { return head + index * width; }
  // Where the index-th single element lies: before the vectors, or after them.
  __host__ __device__ int64_t single(int64_t index) const {
    return index < head ? index : index + vectors * width;
  }
};

// Finds the vectors of `width` elements that the tensors have in common.
class Cutter {
 public:
  __host__ __device__ explicit Cutter(int width) : width_(width) {}

  __host__ __device__ void add(const void* memory, int dtype, int64_t offset = 0) {
    if (memory == nullptr) return;
    const int64_t element = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)) /
                            size_of(dtype) + offset;
    const int64_t head = (width_ - element % width_) % width_;
    agree_ = agree_ && (head_ < 0 || head == head_);
    head_ = head;
  }

  __host__ __device__ Cut cut(int64_t count) const {
    if (!agree_ || head_ < 0 || count < head_ + width_) return {count, 0, 0, width_};
    return {count, head_, (count - head_) / width_, width_};
  }

 private:
  int width_;
  int64_t head_ = -1;
  bool agree_ = true;
};

}  // namespace drivetrain
