// Intel's matrix unit: 16 rows times 16 columns of a panel in one instruction.
//
// A word of a panel (panels.h) is what the unit calls a row of its second operand, so it reads panels
// as they lie. A sum is made over 16 words at a time, in their order, whatever the number of rows, and
// words that lack in the end are 0: a row's result has the same bits in every batch.
//
// Functions are compiled for the unit one by one, as a system may forbid it to a process whose
// processor has it. Whoever calls `shape_tiles` calls `free_tiles` after it: other libraries use the
// unit, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#if defined(DRIVETRAIN_AMX) && defined(__linux__) && defined(__AVX512BF16__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DRIVETRAIN_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace drivetrain {

#define DRIVETRAIN_FOR_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int kTileSide = 16;   // rows of a tile, and words of a panel that it takes
constexpr int kTileBytes = 64;  // of a row of a tile
constexpr int kBlock = 2 * kTileSide;  // rows whose sums fit the unit, for 32 columns
constexpr int64_t kPanelLine = 2 * kTileBytes;  // bytes of one word of 32 columns

// Whether this process may use the unit; it asks the system once.
inline bool tiles_allowed() {
  constexpr long kAsk = 0x1023, kTileData = 18;  // of asm/prctl.h and of the layout of XSAVE
  static const bool allowed = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return allowed;
}

// Tiles 0 and 1 hold sums of `first` rows, 2 and 3 those of `second` more, 4 and 5 the rows
// themselves, 6 and 7 columns 0 to 15 and 16 to 31 of a panel.
DRIVETRAIN_FOR_TILES inline void shape_tiles(int first, int second) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool of_second = tile == 2 || tile == 3 || tile == 5;
    shapes.bytes[tile] = kTileBytes;
    shapes.rows[tile] = static_cast<uint8_t>(tile > 5 ? kTileSide : of_second ? second : first);
    if (shapes.rows[tile] == 0) shapes.rows[tile] = 1;  // not used
  }
  asm volatile("" ::: "memory");  // compilers take the instruction to read 8 bytes alone
  _tile_loadconfig(&shapes);
}

DRIVETRAIN_FOR_TILES inline void free_tiles() { _tile_release(); }

// Adds the products of 16 words, each a pair of bfloat16; rows of x are `stride` bytes apart.
template <bool kBoth>
DRIVETRAIN_FOR_TILES inline void add_words(const char* x, int64_t stride, const char* panel) {
  _tile_loadd(6, panel, kPanelLine);
  _tile_loadd(4, x, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, panel + kTileBytes, kPanelLine);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kBoth) {
    _tile_loadd(5, x + kTileSide * stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The last words of a panel, with zeros after them, beside those of a block of rows.
struct alignas(64) LastWords {
  char panel[kTileSide * kPanelLine], x[kBlock * kTileBytes];
  int64_t bytes;  // of a row

  void begin(const char* words, int64_t count) {
    bytes = 4 * count;
    std::memset(x, 0, sizeof x);
    std::memset(panel + count * kPanelLine, 0, sizeof panel - count * kPanelLine);
    std::memcpy(panel, words, count * kPanelLine);
  }
  void take(const char* from, int64_t stride, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(x + r * kTileBytes, from + r * stride, bytes);
    asm volatile("" ::: "memory");  // compilers do not know that tiles are read from it
  }
};

// Sums [rows, 32] of up to kBlock rows, as tiles are shaped for them; rows of sums are `line` bytes
// apart. With kAdd they are added to what is there.
template <bool kBoth, bool kAdd>
DRIVETRAIN_FOR_TILES void block_of_rows(const char* x, int64_t stride, int64_t words,
                                        const char* panel, void* sums, int64_t line,
                                        LastWords* last = nullptr, int64_t rows = 0) {
  char* to = static_cast<char*>(sums);
  char* second = to + kTileSide * line;
  asm volatile("" ::: "memory");  // compilers do not know that tiles are read from memory
  if constexpr (kAdd) {
    _tile_loadd(0, to, line);
    _tile_loadd(1, to + kTileBytes, line);
    if constexpr (kBoth) {
      _tile_loadd(2, second, line);
      _tile_loadd(3, second + kTileBytes, line);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  int64_t k = 0;
  for (; k + kTileSide <= words; k += kTileSide) {
    add_words<kBoth>(x + 4 * k, stride, panel + k * kPanelLine);
  }
  if (last != nullptr) {
    last->take(x + 4 * k, stride, rows);
    add_words<kBoth>(last->x, kTileBytes, last->panel);
  }
  _tile_stored(0, to, line);
  _tile_stored(1, to + kTileBytes, line);
  if constexpr (kBoth) {
    _tile_stored(2, second, line);
    _tile_stored(3, second + kTileBytes, line);
  }
}

// Calls take(row, the 32 sums of its columns) for all rows.
template <typename Take>
void tiles_times_panel(const void* x, int64_t stride, int64_t rows, int64_t words, const void* panel,
                       const Take& take) {
  alignas(64) Floats sums[kBlock][kPanelLine / sizeof(Floats)];
  const char* from = static_cast<const char*>(x);
  const char* columns = static_cast<const char*>(panel);
  const int64_t left = words % kTileSide;
  LastWords memory, *last = left > 0 ? &memory : nullptr;
  if (left > 0) memory.begin(columns + (words - left) * kPanelLine, left);
  int64_t shaped = 0;
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t here = std::min<int64_t>(kBlock, rows - row);
    const int first = static_cast<int>(std::min<int64_t>(kTileSide, here));
    const int second = static_cast<int>(here) - first;
    if (here != shaped) shape_tiles(first, second);
    shaped = here;
    const char* at = from + row * stride;
    if (second > 0) {
      block_of_rows<true, false>(at, stride, words, columns, sums, kPanelLine, last, here);
    } else {
      block_of_rows<false, false>(at, stride, words, columns, sums, kPanelLine, last, here);
    }
    for (int64_t r = 0; r < here; ++r) take(row + r, sums[r]);
  }
  if (shaped > 0) free_tiles();
}

}  // namespace drivetrain
#endif
