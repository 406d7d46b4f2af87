// Values in storage dtypes, seen a tile at a time as float32.
//
// A kernel walks its buffers in tiles that fit the first-level cache: low-precision tensors are
// widened into a scratch tile, float32 ones are used where they lie, the arithmetic runs on float32
// tiles, and results are rounded on the way back. Memory is passed over once, and dtypes add up
// instead of multiplying.
//
// The library is compiled once per instruction set with -ffp-contract=off, so every path rounds
// alike and returns the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define DRIVETRAIN_API extern "C" __attribute__((visibility("default")))

namespace drivetrain {

// Order shared with kernels.py.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Elements per tile; a multiple of the 64 elements that share Philox counters, so none is made twice.
constexpr int64_t kTile = 512;

// A line longer than 4 KiB: tiles that follow each other at that distance would collide, since
// processors compare the low 12 bits of addresses to order loads after stores.
struct alignas(64) Tile {
  float data[kTile + 16];
};

inline int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// -- bfloat16 --------------------------------------------------------------------------------

inline float widen_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t round_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

// Adds 16 random bits below the kept ones and truncates; see drivetrain_kernels/rounding.py.
inline uint16_t round_bfloat16_randomly(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7fffffff) < 0x7f800000;
  const uint32_t rounded = (bits + random) >> 16;
  return static_cast<uint16_t>(finite ? rounded : round_bfloat16(value));
}

// -- float16 ---------------------------------------------------------------------------------

inline float widen_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  // 2^112 moves the exponent; subnormal halves become normal floats on the way, exactly.
  const float finite = float_of(magnitude << 13) * float_of(0x77800000);
  const uint32_t special = 0x7f800000 | (magnitude << 13);
  return float_of(sign | (magnitude >= 0x7c00 ? special : bits_of(finite)));
}

inline uint16_t round_float16(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000;
  const uint32_t bits = bits_of(value) & 0x7fffffff;
  // Below 2^-14 the last place is 2^-24 everywhere: adding 0.5 puts it into the last bit.
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112u << 10);
  uint32_t half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x477ff000 ? 0x7c00 : half;
  half = bits > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(sign | half);
}

inline void widen_float16(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(halves));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
#elif defined(__ARM_NEON)
  for (; i + 4 <= count; i += 4) {
    vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  }
#endif
  for (; i < count; ++i) to[i] = widen_float16(from[i]);
}

inline void round_float16(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
#elif defined(__ARM_NEON)
  for (; i + 4 <= count; i += 4) {
    vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  }
#endif
  for (; i < count; ++i) to[i] = round_float16(from[i]);
}

// -- Philox4x32-7 ----------------------------------------------------------------------------

// Whether and how to round stochastically; streams keep the tensors of one update independent.
struct Rounding {
  bool stochastic = false;
  uint64_t seed = 0;
};

// Random words of the 64 elements of `group` in element order: word w of lane j is words[16 w + j].
inline void philox(uint64_t group, uint32_t stream, uint64_t seed, uint32_t* words) {
#pragma omp simd
  for (uint32_t lane = 0; lane < 16; ++lane) {
    const uint64_t counter = 16 * group + lane;
    uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32);
    uint32_t c = stream, d = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
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
    words[lane] = a;
    words[16 + lane] = b;
    words[32 + lane] = c;
    words[48 + lane] = d;
  }
}

// Rounds the elements [start, start + count) of a tensor.
inline void round_bfloat16_randomly(const float* from, uint16_t* to, int64_t count, int64_t start,
                                    uint64_t seed, uint32_t stream) {
  alignas(64) uint32_t words[64];
  const uint32_t shift = stream % 2 ? 16 : 0;
  for (int64_t at = 0; at < count;) {
    const int64_t skip = (start + at) % 64;
    const int64_t here = std::min(64 - skip, count - at);
    philox(static_cast<uint64_t>(start + at) / 64, stream / 2, seed, words);
    for (int64_t i = 0; i < here; ++i) {
      const uint32_t random = (words[skip + i] >> shift) & 0xffff;
      to[at + i] = round_bfloat16_randomly(from[at + i], random);
    }
    at += here;
  }
}

// -- tiles -----------------------------------------------------------------------------------

inline void widen(const void* from, int dtype, int64_t start, int64_t count, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + start, count * sizeof(float));
  } else if (dtype == kBFloat16) {
    const uint16_t* values = static_cast<const uint16_t*>(from) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = widen_bfloat16(values[i]);
  } else {
    widen_float16(static_cast<const uint16_t*>(from) + start, to, count);
  }
}

inline void narrow(const float* from, void* to, int dtype, int64_t start, int64_t count) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(to) + start, from, count * sizeof(float));
  } else if (dtype == kBFloat16) {
    uint16_t* values = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) values[i] = round_bfloat16(from[i]);
  } else {
    round_float16(from, static_cast<uint16_t*>(to) + start, count);
  }
}

inline void narrow(const float* from, void* to, int dtype, int64_t start, int64_t count,
                   const Rounding& rounding, uint32_t stream) {
  if (rounding.stochastic && dtype == kBFloat16) {
    uint16_t* values = static_cast<uint16_t*>(to) + start;
    round_bfloat16_randomly(from, values, count, start, rounding.seed, stream);
  } else {
    narrow(from, to, dtype, start, count);
  }
}

// The tile as float32: where it lies, or widened into `scratch`.
inline const float* view(const void* from, int dtype, int64_t start, int64_t count, Tile& scratch) {
  if (dtype == kFloat32) return static_cast<const float*>(from) + start;
  widen(from, dtype, start, count, scratch.data);
  return scratch.data;
}

// A tile to change in place: float32 where it lies, anything else in scratch until `put_back`.
class Mutable {
 public:
  Mutable(void* memory, int dtype, int64_t start, int64_t count, Tile& scratch)
      : memory_(memory), dtype_(dtype), start_(start), count_(count) {
    data_ = const_cast<float*>(view(memory, dtype, start, count, scratch));
  }
  float* data() const { return data_; }
  void put_back(const Rounding& rounding, uint32_t stream) const {
    if (dtype_ != kFloat32) narrow(data_, memory_, dtype_, start_, count_, rounding, stream);
  }

 private:
  void* memory_;
  int dtype_;
  int64_t start_, count_;
  float* data_;
};

// Calls body(start, count) for every tile of [0, total), spread over `threads` threads.
template <typename Body>
void for_each_tile(int64_t total, int threads, const Body& body) {
  const int64_t tiles = (total + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t start = tile * kTile;
    body(start, std::min(kTile, total - start));
  }
}

}  // namespace drivetrain
