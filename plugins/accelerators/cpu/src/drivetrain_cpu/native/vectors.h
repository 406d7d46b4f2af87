// Vectors as wide as the instruction set that the library is compiled for.
//
// The compiler's vector extension gives them the operators of their elements; only what has no
// operator needs to know the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace drivetrain {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Elements of a vector of float32.
constexpr int kWidth = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
// 64-bit lanes, and their low halves.
typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint32_t LowHalves __attribute__((vector_size(kVectorBytes / 2)));

inline Floats square_root(const Floats& values) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)values);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)values);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)values);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Floats)vsqrtq_f32((float32x4_t)values);
#else
  Floats roots;
  for (int i = 0; i < kWidth; ++i) roots[i] = std::sqrt(values[i]);
  return roots;
#endif
}

// Words whose high halves are `halves`, and whose low ones are 0.
inline Bits as_high_halves(const Halves& halves) {
#if defined(__AVX512F__)
  const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                         6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i wide = _mm512_castsi256_si512((__m256i)halves);
  return (Bits)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, wide);
#elif defined(__AVX2__)
  return (Bits)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
#elif defined(__SSE2__)
  __m128i low = _mm_setzero_si128();
  std::memcpy(&low, &halves, sizeof halves);
  return (Bits)_mm_unpacklo_epi16(_mm_setzero_si128(), low);
#elif defined(__ARM_NEON)
  return (Bits)vshll_n_u16((uint16x4_t)halves, 16);
#else
  return __builtin_convertvector(halves, Bits) << 16;
#endif
}

inline Halves high_halves(const Bits& bits) {
#if defined(__AVX512F__)
  const __m512i place = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27,
                                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (Halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(place, (__m512i)bits));
#elif defined(__AVX2__)
  const __m256i words = _mm256_srai_epi32((__m256i)bits, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(words, words), 0xd8);
  return (Halves)_mm256_castsi256_si128(packed);
#elif defined(__SSE2__)
  const __m128i words = _mm_srai_epi32((__m128i)bits, 16);
  const __m128i packed = _mm_packs_epi32(words, words);
  Halves halves;
  std::memcpy(&halves, &packed, sizeof halves);
  return halves;
#elif defined(__ARM_NEON)
  return (Halves)vshrn_n_u32((uint32x4_t)bits, 16);
#else
  return __builtin_convertvector(bits >> 16, Halves);
#endif
}

// The 64-bit products of the low halves of the lanes.
inline Lanes multiplied(const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (Lanes)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

}  // namespace drivetrain
