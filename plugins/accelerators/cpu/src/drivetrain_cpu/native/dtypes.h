// Storage dtypes and float32, element by element and by the run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#define DRIVETRAIN_API extern "C" __attribute__((visibility("default")))

namespace drivetrain {

// Order shared with kernels.py.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

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

// As many elements as a vector has.
inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline void store(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }

inline Floats load(const uint16_t* bfloat16) {
  Halves halves;
  std::memcpy(&halves, bfloat16, sizeof halves);
  return (Floats)as_high_halves(halves);
}

// Rounded to the nearest bfloat16, which is in the high halves; the low ones hold anything.
inline Bits rounded_bfloat16(const Floats& values) {
  const Bits bits = (Bits)values, nan = Bits{} + 0x7fc00000;
#if defined(__AVX512F__)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const __m512i up = _mm512_add_epi32((__m512i)bits, _mm512_set1_epi32(0x7fff));
  const Bits rounded = (Bits)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
#else
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
#endif
  return values != values ? nan : rounded;
}

inline void store(uint16_t* bfloat16, const Floats& values) {
  const Halves halves = high_halves(rounded_bfloat16(values));
  std::memcpy(bfloat16, &halves, sizeof halves);
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

// -- runs of elements ---------------------------------------------------------------------------

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

}  // namespace drivetrain
