// Numbers of 8 bits: what they stand for, and the nearest of them to a float32.
#pragma once

#include <cmath>

#include "panels.h"

namespace drivetrain {

// How keys and values lie in a cache; order shared with serving.py.
enum CacheFormat : int { kAsQueries = 0, kCacheInt8 = 1, kCacheFloat8 = 2 };

struct Int8 {
  int8_t value;
};

struct Float8 {  // E4M3 (arXiv 2209.05433)
  uint8_t bits;
};

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef int8_t SignedBytes __attribute__((vector_size(kWidth)));

inline Ints bytes_at(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Ints);
}

// Numbers of 1 sign, E exponent and M mantissa bits: moved to the places that float32 has for them
// they are off by a power of two, also those below the smallest exponent.
template <int kExponent, int kMantissa>
inline Floats decoded(const Ints& codes) {
  constexpr int kBits = kExponent + kMantissa;
  const Ints magnitude = (codes & ((1 << kBits) - 1)) << (23 - kMantissa);
  const Ints sign = (codes >> kBits) << 31;
  const Floats value = (Floats)(magnitude | sign);
  return value * float_of(static_cast<uint32_t>(254 - ((1 << (kExponent - 1)) - 1)) << 23);
}

inline Floats widened(const Int8* from) {
  SignedBytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}
inline Floats widened(const Float8* from) {
  return decoded<4, 3>(bytes_at(reinterpret_cast<const uint8_t*>(from)));
}

inline float number(Int8 code) { return static_cast<float>(code.value); }
inline float number(Float8 code) {
  const uint32_t magnitude = static_cast<uint32_t>(code.bits & 0x7f) << 20;
  const uint32_t sign = static_cast<uint32_t>(code.bits & 0x80) << 24;
  return float_of(magnitude | sign) * float_of(247u << 23);
}

constexpr float largest_of(Int8) { return 127.0f; }
constexpr float largest_of(Float8) { return 448.0f; }

// The nearest code, ties to even; `value` is at most a rounding beyond the largest.
inline void encode(float value, Int8* to) {
  to->value = static_cast<int8_t>(static_cast<int32_t>(bits_of(value + 12582912.0f)) - 0x4b400000);
}
inline void encode(float value, Float8* to) {
  const uint32_t sign = bits_of(value) >> 24 & 0x80, bits = bits_of(value) & 0x7fffffff;
  // Below 2^-6 the last place is 2^-9 everywhere, which is that of 2^14 in float32.
  const uint32_t small = bits_of(float_of(bits) + 16384.0f) - bits_of(16384.0f);
  const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
  to->bits = static_cast<uint8_t>(sign | (bits < 0x3c800000 ? small : normal));
}

// One head of one token as codes and a scale: its largest element becomes the largest code. What is
// not finite makes the scale NaN.
template <typename Code, typename T>
inline void encode_head(const T* x, int64_t dim, Code* codes, float* scale) {
  uint32_t top = 0;
  for (int64_t i = 0; i < dim; ++i) top = std::max(top, bits_of(number(x[i])) & 0x7fffffff);
  const bool finite = top < 0x7f800000;
  const float most = float_of(top), largest = largest_of(Code{});
  // Below that the inverse would not be finite.
  const float inverse = finite && most > 1e-35f ? largest / most : 0.0f;
  *scale = finite ? (inverse > 0 ? most / largest : 0.0f) : float_of(0x7fc00000);
  for (int64_t i = 0; i < dim; ++i) encode(finite ? number(x[i]) * inverse : 0.0f, codes + i);
}

}  // namespace drivetrain
