// Weights rounded to integers and back, and codes of 2 to 8 bits in words; the arithmetic is that of
// drivetrain_kernels/ops/fake_quantize.py and codes.py.
//
// A group may be one row or the whole tensor, so it is cut into tiles of which kLanes neighbouring
// threads take one each: they find its range, those of a group are joined, and the values are read
// again to round them.
#include "values.h"

namespace drivetrain {
namespace {

// -- fake quantisation -----------------------------------------------------------------------

constexpr int64_t kTile = 4096;

// Range of some values. Ordered as integers, the magnitude of NaN lies above that of infinity.
struct Extent {
  float low, high;
  uint32_t magnitude;
};

__device__ inline Extent nothing() { return {float_of(0x7f800000), float_of(0xff800000), 0}; }

__device__ inline void add(Extent& extent, const Extent& other) {
  extent.low = other.low < extent.low ? other.low : extent.low;
  extent.high = other.high > extent.high ? other.high : extent.high;
  extent.magnitude = other.magnitude > extent.magnitude ? other.magnitude : extent.magnitude;
}

// The range of what all lanes have; the same on each of them.
__device__ inline Extent agree(Extent extent) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const Extent other{exchange(extent.low, mask), exchange(extent.high, mask),
                       exchange(extent.magnitude, mask)};
    add(extent, other);
  }
  return extent;
}

struct Grid {
  float scale, zero;
};

struct RoundTask {
  const void* values;
  void* rounded;
  Extent* extents;  // [groups, tiles]
  Grid* grids;      // [groups]
  int64_t groups, size, tiles;
  int32_t dtype, bits, symmetric;

  __device__ int64_t first(int64_t tile) const {
    return tile / tiles * size + tile % tiles * kTile;
  }
  __device__ int64_t count(int64_t tile) const {
    const int64_t rest = size - tile % tiles * kTile;
    return rest < kTile ? rest : kTile;
  }
};

__global__ void __launch_bounds__(kThreads) extents_kernel(RoundTask task) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = thread_stride() / kLanes;
  for (int64_t tile = thread_index() / kLanes; tile < task.groups * task.tiles; tile += stride) {
    const int64_t first = task.first(tile), count = task.count(tile);
    Extent extent = nothing();
    for (int64_t at = lane; at < count; at += kLanes) {
      float value;
      load<1>(task.values, task.dtype, first + at, &value);
      add(extent, {value, value, bits_of(value) & 0x7fffffff});
    }
    extent = agree(extent);
    if (lane == 0) task.extents[tile] = extent;
  }
}

__device__ inline Grid grid_of(const Extent& extent, int bits, bool symmetric) {
  const float steps = static_cast<float>(1 << bits);
  Grid grid{0, 0};
  if (symmetric) {
    grid.scale = 2.0f * (-extent.low > extent.high ? -extent.low : extent.high) / steps;
  } else {
    grid.scale = (extent.high - extent.low) / steps;
    grid.zero =
        grid.scale == 0.0f ? extent.low : rintf(extent.low / grid.scale) * grid.scale;
  }
  if (extent.magnitude >= 0x7f800000) grid.scale = float_of(0x7fc00000);
  return grid;
}

__global__ void __launch_bounds__(kThreads) grids_kernel(RoundTask task) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = thread_stride() / kLanes;
  for (int64_t group = thread_index() / kLanes; group < task.groups; group += stride) {
    Extent extent = nothing();
    for (int64_t at = lane; at < task.tiles; at += kLanes) {
      add(extent, task.extents[group * task.tiles + at]);
    }
    extent = agree(extent);
    if (lane == 0) task.grids[group] = grid_of(extent, task.bits, task.symmetric);
  }
}

// Codes are cut before they are rounded, as bounds are integers; NaN stays.
__global__ void __launch_bounds__(kThreads) round_kernel(RoundTask task) {
  const int lane = threadIdx.x % kLanes;
  const float half = static_cast<float>(1 << (task.bits - 1));
  const float least = task.symmetric ? -half : 0.0f;
  const float largest = (task.symmetric ? half : 2.0f * half) - 1.0f;
  const int64_t stride = thread_stride() / kLanes;
  for (int64_t tile = thread_index() / kLanes; tile < task.groups * task.tiles; tile += stride) {
    const int64_t first = task.first(tile), count = task.count(tile);
    const Grid grid = task.grids[tile / task.tiles];
    const float safe = grid.scale == 0.0f ? 1.0f : grid.scale;
    for (int64_t at = lane; at < count; at += kLanes) {
      float value;
      load<1>(task.values, task.dtype, first + at, &value);
      const float step = (task.symmetric ? value : value - grid.zero) / safe;
      const float code = rintf(step < least ? least : step > largest ? largest : step);
      value = task.symmetric ? grid.scale * code : grid.scale * code + grid.zero;
      store<1>(task.rounded, task.dtype, first + at, &value);
    }
  }
}

// -- codes in words --------------------------------------------------------------------------

struct CodesTask {
  uint8_t* codes;
  uint32_t* words;
  int64_t rows, count, width;
  int32_t bits;
};

// A thread makes one word, of all codes that reach into it.
__global__ void __launch_bounds__(kThreads) pack_codes_kernel(CodesTask task) {
  const uint32_t mask = (1u << task.bits) - 1;
  for (int64_t at = thread_index(); at < task.rows * task.width; at += thread_stride()) {
    const int64_t row = at / task.width, begin = at % task.width * 32;
    uint32_t word = 0;
    for (int64_t code = begin / task.bits; code < task.count; ++code) {
      const int64_t place = code * task.bits - begin;
      if (place >= 32) break;
      const uint32_t value = task.codes[row * task.count + code] & mask;
      word |= place < 0 ? value >> -place : value << place;
    }
    task.words[at] = word;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_codes_kernel(CodesTask task) {
  const uint32_t mask = (1u << task.bits) - 1;
  for (int64_t at = thread_index(); at < task.rows * task.count; at += thread_stride()) {
    const int64_t row = at / task.count, begin = at % task.count * task.bits;
    const int64_t word = begin / 32;
    const uint32_t* words = task.words + row * task.width + word;
    const uint64_t next = word + 1 < task.width ? words[1] : 0;
    const uint64_t pair = words[0] | (next << 32);
    task.codes[at] = static_cast<uint8_t>(static_cast<uint32_t>(pair >> (begin % 32)) & mask);
  }
}

}  // namespace

// Bytes of scratch memory that dt_fake_quantize takes.
DRIVETRAIN_API int64_t dt_fake_quantize_scratch(int64_t groups, int64_t size) {
  const int64_t tiles = (size + kTile - 1) / kTile;
  return groups * (tiles * static_cast<int64_t>(sizeof(Extent)) +
                   static_cast<int64_t>(sizeof(Grid)));
}

DRIVETRAIN_API int dt_fake_quantize(const void* values, int dtype, int64_t groups, int64_t size,
                                    int bits, int symmetric, void* rounded, void* scratch,
                                    void* stream) {
  const int64_t tiles = (size + kTile - 1) / kTile;
  Extent* extents = static_cast<Extent*>(scratch);
  Grid* grids = reinterpret_cast<Grid*>(extents + groups * tiles);
  const RoundTask task{values, rounded, extents, grids, groups, size, tiles, dtype, bits, symmetric};
  int status = launch(extents_kernel, task, groups * tiles * kLanes, stream);
  if (status == 0) status = launch(grids_kernel, task, groups * kLanes, stream);
  return status == 0 ? launch(round_kernel, task, groups * tiles * kLanes, stream) : status;
}

DRIVETRAIN_API int dt_pack_codes(uint8_t* codes, int64_t rows, int64_t count, int bits,
                                 uint32_t* words, void* stream) {
  const CodesTask task{codes, words, rows, count, (count * bits + 31) / 32, bits};
  return launch(pack_codes_kernel, task, rows * task.width, stream);
}

DRIVETRAIN_API int dt_unpack_codes(uint32_t* words, int64_t rows, int64_t count, int bits,
                                   uint8_t* codes, void* stream) {
  const CodesTask task{codes, words, rows, count, (count * bits + 31) / 32, bits};
  return launch(unpack_codes_kernel, task, rows * count, stream);
}

}  // namespace drivetrain
