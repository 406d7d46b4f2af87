// Products of rounded rows with integer weights: both sides are small integers, summed exactly.
//
// A weight lies in panels of 32 outputs (panels.h). Codes are unsigned, so that a 4-bit code is a
// byte after one mask, and activations are signed: that is the order of the processors' products of
// bytes. Sums of integers are exact, and blocks are added in their order, so a row's result has the
// same bits in every batch.
#include <cmath>
#include <cstdlib>

#include "panels.h"
#include "team.h"

namespace drivetrain {
namespace {

constexpr int64_t kChunk = 96;  // rows that stay in the second-level cache while panels pass
#if defined(__AVX512F__)
constexpr int kTogether = 6;  // rows whose sums fit the registers
#else
constexpr int kTogether = kLanes > 4 ? 1 : 2;
#endif

// Layout shared with serving.py.
struct BlockWeight {
  const uint8_t* codes;         // [panels, blocks, block * bits / 32, 32, 4]
  const uint16_t* parameters;   // [panels, blocks, 1 or 2, 32], float16
  int64_t inputs, outputs, block, blocks;
  int32_t bits, offsets;        // `offsets`: whether a block has offsets beside its scales
};

// Rows of x as codes, a scale and the sum of codes a block.
struct Rounded {
  int8_t* codes;   // [rows, blocks * block]
  float* scales;   // [rows, blocks]
  int32_t* sums;   // [rows, blocks]
};

// sums += products of 4 unsigned bytes a lane with the 4 signed bytes of `word`.
inline Ints dot(const Ints& sums, const Bits& codes, int32_t word) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(word));
#else
  // Even and odd bytes as pairs of 16-bit numbers; their products fit 32 bits.
  const int32_t c0 = static_cast<int8_t>(word), c1 = static_cast<int8_t>(word >> 8);
  const int32_t c2 = static_cast<int8_t>(word >> 16), c3 = word >> 24;
#if defined(__SSE2__)
  const int32_t evens = (c0 & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(c2) << 16);
  const int32_t odds = (c1 & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(c3) << 16);
  const Bits first = codes & 0x00ff00ff, second = (codes >> 8) & 0x00ff00ff;
#if defined(__AVX512BW__)
  const Ints one = (Ints)_mm512_madd_epi16((__m512i)first, _mm512_set1_epi32(evens));
  const Ints two = (Ints)_mm512_madd_epi16((__m512i)second, _mm512_set1_epi32(odds));
#elif defined(__AVX2__)
  const Ints one = (Ints)_mm256_madd_epi16((__m256i)first, _mm256_set1_epi32(evens));
  const Ints two = (Ints)_mm256_madd_epi16((__m256i)second, _mm256_set1_epi32(odds));
#else
  const Ints one = (Ints)_mm_madd_epi16((__m128i)first, _mm_set1_epi32(evens));
  const Ints two = (Ints)_mm_madd_epi16((__m128i)second, _mm_set1_epi32(odds));
#endif
  return sums + one + two;
#else
  return sums + (Ints)(codes & 255) * c0 + (Ints)(codes >> 8 & 255) * c1 +
         (Ints)(codes >> 16 & 255) * c2 + (Ints)(codes >> 24) * c3;
#endif
#endif
}

inline Bits bits_at(const uint8_t* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

inline int32_t word_at(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Integer sums of R rows with one block of a panel.
template <int R, int kBits>
inline void times_block(const uint8_t* codes, const int8_t* x, int64_t stride, int64_t block,
                        Ints (*sums)[kLanes]) {
  const int64_t words = block * kBits / 32;  // of 32 outputs, as they lie
  for (int64_t k = 0; k < words; ++k) {
    Bits raw[kLanes];
    for (int v = 0; v < kLanes; ++v) raw[v] = bits_at(codes + k * 4 * kPanel + v * kVectorBytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int8_t* row = x + r * stride + 4 * k;
      if constexpr (kBits == 8) {
        const int32_t word = word_at(row);
        for (int v = 0; v < kLanes; ++v) sums[r][v] = dot(sums[r][v], raw[v], word);
      } else {
        const int32_t low = word_at(row), high = word_at(row + 4 * words);
        for (int v = 0; v < kLanes; ++v) {
          sums[r][v] = dot(sums[r][v], raw[v] & 0x0f0f0f0f, low);
          sums[r][v] = dot(sums[r][v], raw[v] >> 4 & 0x0f0f0f0f, high);
        }
      }
    }
  }
}

// Results of R rows, `row` the first of them, for one panel.
template <int R, int kBits, bool kOffsets, typename Take>
inline void rows_of_blocks(const BlockWeight& w, int64_t panel, const Rounded& x, int64_t row,
                           const Take& take) {
  constexpr int kParameters = kOffsets ? 2 : 1;
  constexpr int32_t kZero = kBits == 8 ? 128 : 8;  // the code of 0 where there are no offsets
  const int64_t width = w.blocks * w.block, bytes = w.block * kBits * kPanel / 8;
  Floats totals[R][kLanes] = {};
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t at = panel * w.blocks + b;
    Ints sums[R][kLanes] = {};
    times_block<R, kBits>(w.codes + at * bytes, x.codes + row * width + b * w.block, width, w.block,
                          sums);
    const Half* parameters =
        reinterpret_cast<const Half*>(w.parameters) + at * kParameters * kPanel;
    for (int v = 0; v < kLanes; ++v) {
      const Floats scale = widened(parameters + v * kWidth);
      for (int r = 0; r < R; ++r) {
        const int64_t place = (row + r) * w.blocks + b;
        const float factor = x.scales[place];
        const int32_t sum = x.sums[place];
        const Ints whole = kOffsets ? sums[r][v] : sums[r][v] - kZero * sum;
        const Floats value = __builtin_convertvector(whole, Floats);
        totals[r][v] = fused(value, scale * factor, totals[r][v]);
        if (kOffsets) {
          const Floats offset = widened(parameters + kPanel + v * kWidth);
          totals[r][v] = fused(offset, Floats{} + factor * static_cast<float>(sum), totals[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) take(row + r, totals[r]);
}

// Rounds a block to signed bytes: the largest becomes 127. What is not finite makes the scale NaN.
template <typename T>
void round_block(const T* x, int64_t count, int64_t block, int8_t* codes, float* scale,
                 int32_t* sum) {
  Bits largest = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Bits bits = (Bits)widened(x + i) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  uint32_t top = 0;
  for (int lane = 0; lane < kWidth; ++lane) top = std::max<uint32_t>(top, largest[lane]);
  for (int64_t j = i; j < count; ++j) top = std::max(top, bits_of(number(x[j])) & 0x7fffffff);
  const bool finite = top < 0x7f800000;
  const float most = float_of(top);
  // Below that the inverse would not be finite.
  const float inverse = finite && most > 1e-35f ? 127.0f / most : 0.0f;
  *scale = finite ? (inverse > 0 ? most / 127.0f : 0.0f) : float_of(0x7fc00000);
  int32_t total = 0;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const Floats magic = Floats{} + 12582912.0f;
  for (i = 0; i + kWidth <= count; i += kWidth) {
    const Floats scaled = finite ? widened(x + i) * inverse : Floats{};
    const Ints whole = (Ints)(scaled + magic) - 0x4b400000;
    for (int lane = 0; lane < kWidth; ++lane) {
      codes[i + lane] = static_cast<int8_t>(whole[lane]);
      total += whole[lane];
    }
  }
  for (; i < count; ++i) {
    const float scaled = finite ? number(x[i]) * inverse : 0.0f;
    const int32_t whole = static_cast<int32_t>(bits_of(scaled + 12582912.0f)) - 0x4b400000;
    codes[i] = static_cast<int8_t>(whole);
    total += whole;
  }
  std::fill(codes + count, codes + block, static_cast<int8_t>(0));
  *sum = total;
}

template <typename T>
void round_row(const T* x, const BlockWeight& w, const Rounded& to, int64_t row) {
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t count = std::min(w.block, w.inputs - b * w.block), at = row * w.blocks + b;
    round_block(x + row * w.inputs + b * w.block, count, w.block, to.codes + at * w.block,
                to.scales + at, to.sums + at);
  }
}

template <typename T>
void store_outputs(const Floats* totals, T* to, int64_t columns) {
  float plain[kPanel];
  for (int v = 0; v < kLanes; ++v) {
    if (columns == kPanel) narrowed(to + v * kWidth, totals[v]);
    else store(plain + v * kWidth, totals[v]);
  }
  for (int64_t i = 0; columns < kPanel && i < columns; ++i) assign(to + i, plain[i]);
}

template <int kBits, bool kOffsets, typename T>
void multiply(const T* x, const BlockWeight& w, const Rounded& rounded, T* y, int64_t rows,
              int threads) {
  const int64_t panels = (w.outputs + kPanel - 1) / kPanel;
  const int64_t items = panels * ((rows + kChunk - 1) / kChunk);
  for_each_item(rows > 3 ? threads : 1, rows, run_of(rows, threads),
                [&](int64_t row) { round_row(x, w, rounded, row); });
  for_each_item(threads, items, run_of(items, threads), [&](int64_t item) {
    const int64_t panel = item % panels, column = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, w.outputs - column);
    int64_t row = item / panels * kChunk;
    const int64_t end = std::min(rows, row + kChunk);
    const auto take = [&](int64_t at, const Floats* totals) {
      store_outputs(totals, y + at * w.outputs + column, columns);
    };
    for (; row + kTogether <= end; row += kTogether) {
      rows_of_blocks<kTogether, kBits, kOffsets>(w, panel, rounded, row, take);
    }
    for (; row < end; ++row) rows_of_blocks<1, kBits, kOffsets>(w, panel, rounded, row, take);
  });
}

// Layout shared with serving.py.
struct BlockProduct {
  const void* x;
  void* y;
  BlockWeight weight;
  int64_t rows;
  int32_t dtype, threads;
};

}  // namespace

// y [rows, outputs] = x [rows, inputs] * weight, x rounded in blocks; 0, or 1 without memory.
DRIVETRAIN_API int dt_block_linear(const void* call) {
  const BlockProduct& c = *static_cast<const BlockProduct*>(call);
  const BlockWeight& w = c.weight;
  const int64_t blocks = c.rows * w.blocks, size = blocks * (w.block + 8);
  char* memory = static_cast<char*>(std::malloc(std::max<int64_t>(1, size)));
  if (memory == nullptr) return 1;
  const Rounded rounded{reinterpret_cast<int8_t*>(memory + blocks * 8),
                        reinterpret_cast<float*>(memory),
                        reinterpret_cast<int32_t*>(memory + blocks * 4)};
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(c.x);
    T* to = static_cast<T*>(c.y);
    if (w.bits == 8 && w.offsets) multiply<8, true>(from, w, rounded, to, c.rows, c.threads);
    if (w.bits == 8 && !w.offsets) multiply<8, false>(from, w, rounded, to, c.rows, c.threads);
    if (w.bits == 4 && w.offsets) multiply<4, true>(from, w, rounded, to, c.rows, c.threads);
    if (w.bits == 4 && !w.offsets) multiply<4, false>(from, w, rounded, to, c.rows, c.threads);
  });
  std::free(memory);
  return 0;
}

}  // namespace drivetrain
