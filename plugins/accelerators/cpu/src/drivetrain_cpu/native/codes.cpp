// Codes of 2 to 8 bits in words of 32; the layout is that of drivetrain_kernels/ops/codes.py.
#include <type_traits>

#include "tiles.h"

namespace drivetrain {
namespace {

// A row at a time: rows begin in words of their own.
template <int kBits>
void pack_row(const uint8_t* codes, int64_t count, uint32_t* words) {
  constexpr uint64_t kMask = (1u << kBits) - 1;
  uint64_t waiting = 0;
  int held = 0;
  for (int64_t i = 0; i < count; ++i) {
    waiting |= (codes[i] & kMask) << held;
    held += kBits;
    if (held >= 32) {
      *words++ = static_cast<uint32_t>(waiting);
      waiting >>= 32;
      held -= 32;
    }
  }
  if (held > 0) *words = static_cast<uint32_t>(waiting);
}

template <int kBits>
void unpack_row(const uint32_t* words, int64_t count, uint8_t* codes) {
  constexpr uint64_t kMask = (1u << kBits) - 1;
  uint64_t waiting = 0;
  int held = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (held < kBits) {
      waiting |= static_cast<uint64_t>(*words++) << held;
      held += 32;
    }
    codes[i] = static_cast<uint8_t>(waiting & kMask);
    waiting >>= kBits;
    held -= kBits;
  }
}

template <typename Row>
void for_each_row(int64_t rows, int threads, const Row& row) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t at = 0; at < rows; ++at) row(at);
}

// Calls body with the number of bits as a type.
template <typename Body>
void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    case 6: return body(std::integral_constant<int, 6>());
    case 7: return body(std::integral_constant<int, 7>());
    default: return body(std::integral_constant<int, 8>());
  }
}

}  // namespace

DRIVETRAIN_API void dt_pack_codes(const uint8_t* codes, int64_t rows, int64_t count, int bits,
                                  int32_t* words, int threads) {
  const int64_t width = (count * bits + 31) / 32;
  with_bits(bits, [&](auto kind) {
    for_each_row(rows, threads, [&](int64_t at) {
      pack_row<decltype(kind)::value>(codes + at * count, count,
                                      reinterpret_cast<uint32_t*>(words + at * width));
    });
  });
}

DRIVETRAIN_API void dt_unpack_codes(const int32_t* words, int64_t rows, int64_t count, int bits,
                                    uint8_t* codes, int threads) {
  const int64_t width = (count * bits + 31) / 32;
  with_bits(bits, [&](auto kind) {
    for_each_row(rows, threads, [&](int64_t at) {
      unpack_row<decltype(kind)::value>(reinterpret_cast<const uint32_t*>(words + at * width),
                                        count, codes + at * count);
    });
  });
}

}  // namespace drivetrain
