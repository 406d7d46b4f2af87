// Block quantisation; the arithmetic is that of drivetrain_kernels/ops/block_format.py.
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "tiles.h"

namespace drivetrain {
namespace {

// Order shared with kernels.py.
enum Format : int { kInt8 = 0, kUint8 = 1, kInt4 = 2, kUint4 = 3, kE4M3 = 4, kE5M2 = 5 };

struct Layout {
  int format;
  int64_t count, block;

  bool symmetric() const { return format != kUint8 && format != kUint4; }
  bool packed() const { return format == kInt4 || format == kUint4; }
  int parameters() const { return symmetric() ? 1 : 2; }
  int64_t blocks() const { return (count + block - 1) / block; }
  int64_t codes() const { return packed() ? (count + 1) / 2 : count; }
  int64_t size_of_block(int64_t index) const { return std::min(block, count - index * block); }
  float largest() const {
    constexpr float kLargest[] = {127, 255, 7, 15, 448, 57344};
    return kLargest[format];
  }
};

// To the nearest integer, ties to even, for |value| < 2^22.
inline float round_to_integer(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the last place is 1
  return (value + kShift) - kShift;
}

// -- fp8 -------------------------------------------------------------------------------------

// kMantissa bits of mantissa, exponent bias kBias; values up to the largest finite code.
template <int kMantissa, int kBias>
inline uint8_t round_fp8(float value) {
  constexpr int kDrop = 23 - kMantissa;
  constexpr uint32_t kNormal = static_cast<uint32_t>(128 - kBias) << 23;
  // Adding this puts the last place of subnormal codes into the last bit of the sum.
  constexpr uint32_t kAligned = static_cast<uint32_t>(127 + 1 - kBias + kDrop) << 23;
  const uint32_t sign = (bits_of(value) >> 24) & 0x80;
  const uint32_t bits = bits_of(value) & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_of(bits) + float_of(kAligned)) - kAligned;
  const uint32_t half = (1u << (kDrop - 1)) - 1;
  const uint32_t normal = ((bits + half + ((bits >> kDrop) & 1)) >> kDrop) -
                          (static_cast<uint32_t>(127 - kBias) << kMantissa);
  return static_cast<uint8_t>(sign | (bits < kNormal ? subnormal : normal));
}

struct Fp8Values {
  float values[256];

  Fp8Values(int mantissa, int bias, bool infinities) {
    for (int code = 0; code < 256; ++code) {
      const int exponent = (code & 0x7f) >> mantissa, fraction = code & ((1 << mantissa) - 1);
      const int last = (0x7f >> mantissa);
      float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), 1 - bias - mantissa)
                                  : std::ldexp(static_cast<float>((1 << mantissa) + fraction),
                                               exponent - bias - mantissa);
      if (infinities && exponent == last) value = fraction ? NAN : INFINITY;
      if (!infinities && (code & 0x7f) == 0x7f) value = NAN;
      values[code] = code & 0x80 ? -value : value;
    }
  }
};

const float* fp8_values(int format) {
  static const Fp8Values e4m3(3, 7, false), e5m2(2, 15, true);
  return format == kE4M3 ? e4m3.values : e5m2.values;
}

// -- one block ---------------------------------------------------------------------------------

struct Range {
  float low, extent;
  bool broken;  // an infinity, a NaN, or a range beyond float32
};

Range range_of(const float* values, int64_t count, bool symmetric) {
  uint32_t magnitude = 0;
#pragma omp simd reduction(max : magnitude)
  for (int64_t i = 0; i < count; ++i) {
    // Ordered as integers, NaN lies above infinity, so nothing is lost in the maximum.
    magnitude = std::max(magnitude, bits_of(values[i]) & 0x7fffffff);
  }
  const bool finite = magnitude < 0x7f800000;
  if (symmetric) return {0.0f, float_of(magnitude), !finite};
  float low = std::numeric_limits<float>::infinity(), high = -low;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  const float extent = high - low;
  return {low, extent, !finite || !(extent <= FLT_MAX)};
}

template <typename Store>
void quantize_steps(const float* values, int64_t count, float low, float inverse, const Store& store) {
  for (int64_t i = 0; i < count; ++i) store(i, (values[i] - low) * inverse);
}

// Clamps to [least, largest] after rounding; the clamp matters for steps a rounding error above.
inline int32_t integer_code(float step, float least, float largest) {
  return static_cast<int32_t>(std::min(std::max(round_to_integer(step), least), largest));
}

void encode_block(const Layout& layout, int64_t index, const float* values, uint8_t* codes,
                  float* parameters) {
  const int64_t count = layout.size_of_block(index), first = index * layout.block;
  const Range range = range_of(values, count, layout.symmetric());
  const bool zero = range.extent < 7.888609052210118e-31f;  // 2^-100
  const float scale = zero ? 1.0f : range.extent / layout.largest();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  float* own = parameters + index * layout.parameters();
  own[0] = range.broken ? nan : scale;
  if (!layout.symmetric()) own[1] = range.broken ? nan : range.low;
  uint8_t* to = codes + (layout.packed() ? first / 2 : first);
  if (zero || range.broken) {
    std::fill(to, to + (layout.packed() ? (count + 1) / 2 : count), uint8_t{0});
    return;
  }
  const float low = layout.symmetric() ? 0.0f : range.low, inverse = 1.0f / scale;
  const float largest = layout.largest(), least = layout.symmetric() ? -largest : 0.0f;
  if (layout.format == kE4M3) {
    quantize_steps(values, count, low, inverse,
                   [=](int64_t i, float step) { to[i] = round_fp8<3, 7>(step); });
  } else if (layout.format == kE5M2) {
    quantize_steps(values, count, low, inverse,
                   [=](int64_t i, float step) { to[i] = round_fp8<2, 15>(step); });
  } else if (!layout.packed()) {
    quantize_steps(values, count, low, inverse, [=](int64_t i, float step) {
      to[i] = static_cast<uint8_t>(integer_code(step, least, largest));
    });
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const float next = i + 1 < count ? (values[i + 1] - low) * inverse : 0.0f;
      const int32_t a = integer_code((values[i] - low) * inverse, least, largest) & 0xf;
      const int32_t b = integer_code(next, least, largest) & 0xf;
      to[i / 2] = static_cast<uint8_t>(a | (b << 4));
    }
  }
}

void decode_block(const Layout& layout, int64_t index, const uint8_t* codes,
                  const float* parameters, float* values) {
  const int64_t count = layout.size_of_block(index), first = index * layout.block;
  const float* own = parameters + index * layout.parameters();
  const float scale = own[0], offset = layout.symmetric() ? 0.0f : own[1];
  const uint8_t* from = codes + (layout.packed() ? first / 2 : first);
  switch (layout.format) {
    case kInt8: {
      const int8_t* signed_codes = reinterpret_cast<const int8_t*>(from);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(signed_codes[i]) * scale;
      break;
    }
    case kUint8:
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]) * scale + offset;
      break;
    case kInt4:
      for (int64_t i = 0; i < count; ++i) {
        const int32_t code = (from[i / 2] >> (4 * (i & 1))) & 0xf;
        values[i] = static_cast<float>((code ^ 8) - 8) * scale;
      }
      break;
    case kUint4:
      for (int64_t i = 0; i < count; ++i) {
        const int32_t code = (from[i / 2] >> (4 * (i & 1))) & 0xf;
        values[i] = static_cast<float>(code) * scale + offset;
      }
      break;
    default: {
      const float* table = fp8_values(layout.format);
      for (int64_t i = 0; i < count; ++i) values[i] = table[from[i]] * scale;
    }
  }
}

// -- all blocks --------------------------------------------------------------------------------

// Calls body(block, scratch) with `arrays` float arrays of a block's length; 1 without memory.
template <typename Body>
int for_each_block(const Layout& layout, int arrays, int threads, const Body& body) {
  const int64_t blocks = layout.blocks();
  const int64_t length = std::min(layout.block, layout.count);
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1) reduction(max : failed)
  {
    float* scratch = static_cast<float*>(std::malloc(arrays * length * sizeof(float) + 64));
    failed = scratch == nullptr;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      if (scratch != nullptr) body(block, scratch);
    }
    std::free(scratch);
  }
  return failed;
}

}  // namespace

DRIVETRAIN_API int dt_quantize(const void* values, int dtype, int format, int64_t count,
                               int64_t block, uint8_t* codes, float* parameters, int threads) {
  const Layout layout{format, count, block};
  return for_each_block(layout, 1, threads, [&](int64_t index, float* scratch) {
    const int64_t start = index * block, here = layout.size_of_block(index);
    const float* own = static_cast<const float*>(values) + (dtype == kFloat32 ? start : 0);
    if (dtype != kFloat32) {
      widen(values, dtype, start, here, scratch);
      own = scratch;
    }
    encode_block(layout, index, own, codes, parameters);
  });
}

DRIVETRAIN_API int dt_dequantize(const uint8_t* codes, const float* parameters, int format,
                                 int64_t count, int64_t block, void* values, int dtype,
                                 int threads) {
  const Layout layout{format, count, block};
  return for_each_block(layout, 1, threads, [&](int64_t index, float* scratch) {
    const int64_t start = index * block, here = layout.size_of_block(index);
    float* to = dtype == kFloat32 ? static_cast<float*>(values) + start : scratch;
    decode_block(layout, index, codes, parameters, to);
    if (dtype != kFloat32) narrow(to, values, dtype, start, here);
  });
}

// Sums `sources` contributions in order, scales, and quantises the sum.
DRIVETRAIN_API int dt_dequantize_reduce_quantize(const uint8_t* codes, const float* parameters,
                                                 int64_t sources, int format, int64_t count,
                                                 int64_t block, float scale, uint8_t* sum_codes,
                                                 float* sum_parameters, int threads) {
  const Layout layout{format, count, block};
  return for_each_block(layout, 2, threads, [&](int64_t index, float* sum) {
    const int64_t here = layout.size_of_block(index);
    float* part = sum + std::min(block, count);
    decode_block(layout, index, codes, parameters, sum);
    for (int64_t s = 1; s < sources; ++s) {
      decode_block(layout, index, codes + s * layout.codes(),
                   parameters + s * layout.blocks() * layout.parameters(), part);
      for (int64_t i = 0; i < here; ++i) sum[i] = sum[i] + part[i];
    }
    for (int64_t i = 0; i < here; ++i) sum[i] = sum[i] * scale;
    encode_block(layout, index, sum, sum_codes, sum_parameters);
  });
}

}  // namespace drivetrain
