// Stochastic rounding to bfloat16: the random bits of drivetrain_kernels/rounding.py.
//
// Philox4x32-7 runs on vectors of 64-bit lanes whose low halves are its words: one instruction
// multiplies them, and what it leaves in the high halves is ignored by the next.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace drivetrain {

// Elements per tile, see tiles.h; a multiple of the 64 elements that share Philox counters, so none
// is made twice.
constexpr int64_t kTile = 512;

// Random words of the 64 elements of `group` in element order: word w of lane j is words[16 w + j].
inline void philox(uint64_t group, uint32_t stream, uint64_t seed, uint32_t* words) {
  constexpr int kLanes = kVectorBytes / 8;
  const Lanes zero{}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  Lanes lane{};
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  for (int first = 0; first < 16; first += kLanes) {
    Lanes a = lane + (16 * group + first), b = a >> 32, c = zero + stream, d = zero;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const Lanes p = multiplied(a, m0), q = multiplied(c, m1);
      a = (q >> 32) ^ b ^ (zero + key0);
      b = q;
      c = (p >> 32) ^ d ^ (zero + key1);
      d = p;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const Lanes all[4] = {a, b, c, d};
    for (int word = 0; word < 4; ++word) {
      const LowHalves low = __builtin_convertvector(all[word], LowHalves);
      std::memcpy(words + 16 * word + first, &low, sizeof low);
    }
  }
}

// Rounds values on their way to a storage dtype: to nearest, or stochastically. The tensors of one
// update have streams of their own; two streams share their words, so those of the last tile are
// kept.
class Rounder {
 public:
  Rounder(bool stochastic, uint64_t seed) : stochastic_(stochastic), seed_(seed) {}

  // Stores the elements [start, start + count) of a tensor; at most a tile.
  void narrow(const float* from, void* to, int dtype, int64_t start, int64_t count,
              uint32_t stream) {
    if (!stochastic_ || dtype != kBFloat16) {
      drivetrain::narrow(from, to, dtype, start, count);
      return;
    }
    const uint32_t* words = draw(start, count, stream / 2);
    const uint32_t shift = stream % 2 ? 16 : 0;
    uint16_t* values = static_cast<uint16_t*>(to) + start;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      Bits random;
      std::memcpy(&random, words + i, sizeof random);
      const Floats value = load(from + i);
      const Bits bits = (Bits)value, raised = bits + ((random >> shift) & 0xffff);
      // As signed numbers, which more processors can compare.
      const Ints magnitude = (Ints)(bits & 0x7fffffff);
      const Bits rounded = magnitude < 0x7f800000 ? raised : rounded_bfloat16(value);
      const Halves halves = high_halves(rounded);
      std::memcpy(values + i, &halves, sizeof halves);
    }
    for (; i < count; ++i) {
      values[i] = round_bfloat16_randomly(from[i], (words[i] >> shift) & 0xffff);
    }
  }

 private:
  // The words of the elements from `start` on.
  const uint32_t* draw(int64_t start, int64_t count, uint32_t pair) {
    const int64_t first = start / 64, last = (start + count + 63) / 64;
    if (first != first_ || last != last_ || pair != pair_) {
      for (int64_t group = first; group < last; ++group) {
        philox(static_cast<uint64_t>(group), pair, seed_, words_ + 64 * (group - first));
      }
      first_ = first;
      last_ = last;
      pair_ = pair;
    }
    return words_ + start % 64;
  }

  const bool stochastic_;
  const uint64_t seed_;
  int64_t first_ = -1, last_ = -1;
  uint32_t pair_ = 0;
  // A tile that starts anywhere touches one group more than one that starts with a group.
  alignas(64) uint32_t words_[kTile + 64];
};

}  // namespace drivetrain
