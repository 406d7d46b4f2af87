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

#include "dtypes.h"
#include "rounding.h"

namespace drivetrain {

// A line longer than 4 KiB: tiles that follow each other at that distance would collide, since
// processors compare the low 12 bits of addresses to order loads after stores.
struct alignas(64) Tile {
  float data[kTile + 16];
};

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
  void put_back(Rounder& rounder, uint32_t stream) const {
    if (dtype_ != kFloat32) rounder.narrow(data_, memory_, dtype_, start_, count_, stream);
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
