// Block quantisation; the arithmetic is that of drivetrain_kernels/ops/block_format.py.
//
// kLanes neighbouring threads share a block of values: they find its range together and read the
// values again, now from the cache, to encode them. Blocks of a few thousand values suit that best.
#include "values.h"

namespace drivetrain {
namespace {

// Order shared with quantization.py.
enum Format : int { kInt8 = 0, kUint8 = 1, kInt4 = 2, kUint4 = 3, kE4M3 = 4, kE5M2 = 5 };

struct Layout {
  int32_t format, parameters;
  int64_t count, block, blocks;

  __host__ __device__ bool symmetric() const { return format != kUint8 && format != kUint4; }
  __host__ __device__ bool packed() const { return format == kInt4 || format == kUint4; }
  __host__ __device__ int64_t codes() const { return packed() ? (count + 1) / 2 : count; }
  __device__ int64_t size_of_block(int64_t index) const {
    const int64_t rest = count - index * block;
    return rest < block ? rest : block;
  }
  __device__ float largest() const {
    return format == kInt8    ? 127.0f
           : format == kUint8 ? 255.0f
           : format == kInt4  ? 7.0f
           : format == kUint4 ? 15.0f
           : format == kE4M3  ? 448.0f
                              : 57344.0f;
  }
};

Layout layout_of(int format, int64_t count, int64_t block) {
  Layout layout{format, 0, count, block, (count + block - 1) / block};
  layout.parameters = layout.symmetric() ? 1 : 2;
  return layout;
}

// -- codes -----------------------------------------------------------------------------------

// kMantissa bits of mantissa, exponent bias kBias; values up to the largest finite code.
template <int kMantissa, int kBias>
__device__ inline uint32_t round_fp8(float value) {
  constexpr int kDrop = 23 - kMantissa;
  constexpr uint32_t kNormal = static_cast<uint32_t>(128 - kBias) << 23;
  // Adding this puts the last place of subnormal codes into the last bit of the sum.
  constexpr uint32_t kAligned = static_cast<uint32_t>(127 + 1 - kBias + kDrop) << 23;
  const uint32_t sign = (bits_of(value) >> 24) & 0x80, bits = bits_of(value) & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_of(bits) + float_of(kAligned)) - kAligned;
  const uint32_t half = (1u << (kDrop - 1)) - 1;
  const uint32_t normal = ((bits + half + ((bits >> kDrop) & 1)) >> kDrop) -
                          (static_cast<uint32_t>(127 - kBias) << kMantissa);
  return sign | (bits < kNormal ? subnormal : normal);
}

// The exponent moves by a product, which makes subnormal codes normal floats, exactly.
template <int kMantissa, int kBias>
__device__ inline float widen_fp8(uint32_t code) {
  const uint32_t sign = (code & 0x80) << 24, magnitude = code & 0x7f;
  constexpr uint32_t kScale = static_cast<uint32_t>(127 + 127 - kBias) << 23;
  const uint32_t finite = bits_of(float_of(magnitude << (23 - kMantissa)) * float_of(kScale));
  // e4m3 has one NaN and no infinities; e5m2 has both, as IEEE formats do.
  const bool special = kMantissa == 3 ? magnitude == 0x7f : magnitude >= 0x7c;
  const uint32_t infinite = kMantissa == 2 && magnitude == 0x7c ? 0x7f800000u : 0x7fc00000u;
  return float_of(sign | (special ? infinite : finite));
}

// To the nearest integer, ties to even, for |value| < 2^22.
__device__ inline float round_to_integer(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the last place is 1
  return (value + kShift) - kShift;
}

__device__ inline uint32_t encode(float step, const Layout& layout) {
  if (layout.format == kE4M3) return round_fp8<3, 7>(step);
  if (layout.format == kE5M2) return round_fp8<2, 15>(step);
  // The clamp matters for steps a rounding error above the largest.
  const float largest = layout.largest(), least = layout.symmetric() ? -largest : 0.0f;
  const float whole = round_to_integer(step);
  const float inside = whole < least ? least : whole > largest ? largest : whole;
  return static_cast<uint32_t>(static_cast<int32_t>(inside));
}

__device__ inline float decode(uint32_t code, const Layout& layout, float scale, float offset) {
  switch (layout.format) {
    case kInt8:
      return static_cast<float>(static_cast<int32_t>(code ^ 0x80) - 128) * scale;
    case kInt4:
      return static_cast<float>(static_cast<int32_t>(code ^ 8) - 8) * scale;
    case kE4M3:
      return widen_fp8<3, 7>(code) * scale;
    case kE5M2:
      return widen_fp8<2, 15>(code) * scale;
    default:
      return static_cast<float>(code) * scale + offset;
  }
}

// -- one block -------------------------------------------------------------------------------

// Scale and offset of a block, and how to map its values to steps.
struct Grid {
  float low, inverse;
  bool zero;  // all codes are 0: nothing to tell apart, or not finite
};

// Agrees among the lanes of a block on its range; `low` and `high` are each lane's own.
__device__ inline Grid agree(const Layout& layout, int64_t block, int lane, uint32_t magnitude,
                             float low, float high, float* parameters) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const uint32_t other = exchange(magnitude, mask);
    magnitude = other > magnitude ? other : magnitude;
    if (layout.symmetric()) continue;
    const float other_low = exchange(low, mask), other_high = exchange(high, mask);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (layout.symmetric()) low = 0;
  const float extent = layout.symmetric() ? float_of(magnitude) : high - low;
  const bool broken = magnitude >= 0x7f800000 || !(bits_of(extent) < 0x7f800000);
  const bool flat = extent < 7.888609052210118e-31f;  // 2^-100
  const float scale = flat ? 1.0f : extent / layout.largest();
  if (lane == 0) {
    const float nan = float_of(0x7fc00000);
    float* own = parameters + block * layout.parameters;
    own[0] = broken ? nan : scale;
    if (!layout.symmetric()) own[1] = broken ? nan : low;
  }
  return {low, 1.0f / scale, flat || broken};
}

// What the lanes of one block go through twice: values, kWidth at a time.
template <int kWidth, typename Source>
__device__ inline void encode_block(const Layout& layout, int64_t block, int lane,
                                    const Source& source, uint8_t* codes, float* parameters) {
  const int64_t count = layout.size_of_block(block), first = block * layout.block;
  uint32_t magnitude = 0;
  float low = float_of(0x7f800000), high = -low;
  for (int64_t at = lane * kWidth; at < count; at += kLanes * kWidth) {
    float values[kWidth];
    const int here = source.template load<kWidth>(first + at, count - at, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i >= here) break;
      // Ordered as integers, NaN lies above infinity, so nothing is lost in the maximum.
      const uint32_t bits = bits_of(values[i]) & 0x7fffffff;
      magnitude = bits > magnitude ? bits : magnitude;
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
    }
  }
  const Grid grid = agree(layout, block, lane, magnitude, low, high, parameters);
  for (int64_t at = lane * kWidth; at < count; at += kLanes * kWidth) {
    float values[kWidth];
    const int here = source.template load<kWidth>(first + at, count - at, values);
    uint32_t words[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool inside = i < here && !grid.zero;
      words[i] = inside ? encode((values[i] - grid.low) * grid.inverse, layout) & 0xff : 0;
    }
    const int64_t to = first + at;  // even: blocks and widths are
    if (layout.packed()) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        if (i < here) codes[(to + i) / 2] = (words[i] & 0xf) | ((words[i + 1] & 0xf) << 4);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < here) codes[to + i] = words[i];
      }
    }
  }
}

// -- where values come from ------------------------------------------------------------------

struct Memory {
  const void* memory;
  int32_t dtype, aligned;

  // Loads up to kWidth elements; answers how many there are.
  template <int kWidth>
  __device__ int load(int64_t at, int64_t rest, float* values) const {
    if (aligned && rest >= kWidth) {
      drivetrain::load<kWidth>(memory, dtype, at, values);
      return kWidth;
    }
    const int here = rest < kWidth ? static_cast<int>(rest) : kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < here) drivetrain::load<1>(memory, dtype, at + i, values + i);
    }
    return here;
  }
};

struct Coded {
  Layout layout;
  const uint8_t* codes;
  const float* parameters;

  __device__ float value(int64_t at) const {
    const float* own = parameters + at / layout.block * layout.parameters;
    const uint32_t byte = codes[layout.packed() ? at / 2 : at];
    const uint32_t code = layout.packed() ? (byte >> (4 * (at % 2))) & 0xf : byte;
    return decode(code, layout, own[0], layout.symmetric() ? 0.0f : own[1]);
  }
};

// Sums of contributions, added in order.
struct Sum {
  Coded first;
  int64_t sources;
  float scale;

  template <int kWidth>
  __device__ int load(int64_t at, int64_t rest, float* values) const {
    const int here = rest < kWidth ? static_cast<int>(rest) : kWidth;
    Coded source = first;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = i < here ? source.value(at + i) : 0.0f;
    for (int64_t s = 1; s < sources; ++s) {
      source.codes += source.layout.codes();
      source.parameters += source.layout.blocks * source.layout.parameters;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < here) values[i] = values[i] + source.value(at + i);
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = values[i] * scale;
    return here;
  }
};

// -- kernels ---------------------------------------------------------------------------------

template <typename Source>
struct EncodeTask {
  Layout layout;
  Source source;
  uint8_t* codes;
  float* parameters;
};

template <int kWidth, typename Source>
__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeTask<Source> task) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = thread_stride() / kLanes;
  for (int64_t block = thread_index() / kLanes; block < task.layout.blocks; block += stride) {
    encode_block<kWidth>(task.layout, block, lane, task.source, task.codes, task.parameters);
  }
}

template <typename Source>
int encode_all(const EncodeTask<Source>& task, void* stream) {
  const bool wide = task.layout.block % 4 == 0;
  return launch(wide ? encode_kernel<4, Source> : encode_kernel<2, Source>, task,
                task.layout.blocks * kLanes, stream);
}

struct DecodeTask {
  Coded source;
  void* values;
  int32_t dtype;
  Cut cut;
};

template <int kWidth>
__device__ inline void decode_vector(const DecodeTask& task, int64_t at) {
  float values[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = task.source.value(at + i);
  store<kWidth>(task.values, task.dtype, at, values);
}

__global__ void __launch_bounds__(kThreads) decode_kernel(DecodeTask task) {
  for (int64_t i = thread_index(); i < task.cut.vectors; i += thread_stride()) {
    decode_vector<4>(task, task.cut.vector(i));
  }
  for (int64_t i = thread_index(); i < task.cut.singles(); i += thread_stride()) {
    decode_vector<1>(task, task.cut.single(i));
  }
}

}  // namespace

DRIVETRAIN_API int dt_quantize(const void* values, int dtype, int format, int64_t count,
                               int64_t block, uint8_t* codes, float* parameters, void* stream) {
  const Layout layout = layout_of(format, count, block);
  const int64_t piece = (block % 4 == 0 ? 4 : 2) * size_of(dtype);
  const int32_t aligned = reinterpret_cast<uintptr_t>(values) % piece == 0;
  const Memory memory{values, dtype, aligned};
  return encode_all(EncodeTask<Memory>{layout, memory, codes, parameters}, stream);
}

DRIVETRAIN_API int dt_dequantize(const uint8_t* codes, const float* parameters, int format,
                                 int64_t count, int64_t block, void* values, int dtype,
                                 void* stream) {
  Cutter cutter(4);
  cutter.add(values, dtype);
  const Coded source{layout_of(format, count, block), codes, parameters};
  const DecodeTask task{source, values, dtype, cutter.cut(count)};
  const int64_t singles = task.cut.singles();
  return launch(decode_kernel, task, task.cut.vectors > singles ? task.cut.vectors : singles,
                stream);
}

// Sums `sources` contributions in order, scales, and quantises the sum.
DRIVETRAIN_API int dt_dequantize_reduce_quantize(const uint8_t* codes, const float* parameters,
                                                 int64_t sources, int format, int64_t count,
                                                 int64_t block, float scale, uint8_t* sum_codes,
                                                 float* sum_parameters, void* stream) {
  const Layout layout = layout_of(format, count, block);
  const Sum sum{{layout, codes, parameters}, sources, scale};
  return encode_all(EncodeTask<Sum>{layout, sum, sum_codes, sum_parameters}, stream);
}

}  // namespace drivetrain
