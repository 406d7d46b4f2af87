// Products with packed and with quantised weights.
#include <cstdlib>

#include "panels.h"
#include "team.h"

namespace drivetrain {
namespace {

constexpr int64_t kChunk = 96;

// Rows that pass a panel together: they stay in the second-level cache while panels pass. Where the
// matrix unit multiplies, that is the larger part of it, as panels have to come from farther away;
// but each thread has several items, as long as there are rows for that.
template <typename T>
int64_t rows_together(int64_t rows, [[maybe_unused]] int64_t inputs, [[maybe_unused]] int64_t panels,
                      [[maybe_unused]] int threads) {
  int64_t most = kChunk;
#if defined(DRIVETRAIN_TILES)
  if (std::is_same_v<T, uint16_t> && tiles_allowed()) {
    const int64_t bytes = std::max<int64_t>(1, inputs * static_cast<int64_t>(sizeof(T)));
    most = std::max(kChunk, (1 << 20) / bytes);
    while (most > kChunk && panels * ((rows + most - 1) / most) < 4 * threads) {
      most = std::max(kChunk, most / 2);
    }
  }
#endif
  const int64_t parts = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, ((rows + parts - 1) / parts + 31) / 32 * 32);
}

template <typename T>
void store_panel(const Floats* sums, const T* bias, T* to, int64_t columns) {
  float plain[kPanel];
  for (int v = 0; v < kLanes; ++v) {
    Floats total = sums[v];
    if (columns == kPanel) {
      if (bias != nullptr) total = total + widened(bias + v * kWidth);
      narrowed(to + v * kWidth, total);
    } else {
      store(plain + v * kWidth, total);
    }
  }
  if (columns == kPanel) return;
  for (int64_t i = 0; i < columns; ++i) {
    assign(to + i, plain[i] + (bias != nullptr ? number(bias[i]) : 0.0f));
  }
}

template <typename T>
void packed(const T* x, const T* panels, const T* bias, T* y, int64_t rows, int64_t inputs,
            int64_t outputs, int threads) {
  const int64_t words = inputs / kWord<T>, number_of_panels = (outputs + kPanel - 1) / kPanel;
  const int64_t together = rows_together<T>(rows, inputs, number_of_panels, threads);
  const int64_t items = number_of_panels * ((rows + together - 1) / together);
  for_each_item(threads, items, run_of(items, threads), [&](int64_t item) {
    const int64_t first = item / number_of_panels * together, p = item % number_of_panels;
    const int64_t here = std::min(together, rows - first), column = p * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, outputs - column);
    const T* begin = bias == nullptr ? nullptr : bias + column;
    const T* panel = panels + p * words * kPanel * kWord<T>;
    const auto take = [&](int64_t row, const Floats* sums) {
      store_panel(sums, begin, y + (first + row) * outputs + column, columns);
    };
    times_panel(x + first * inputs, inputs, here, words, panel, take);
  });
}

// -- quantised weights --------------------------------------------------------------------------

constexpr int kTogether = 4;  // rows of x that share the decoding of a weight
constexpr int64_t kOutputs = 64;  // that a thread takes at once, so that no two write one line

typedef int8_t Signed __attribute__((vector_size(kWidth)));
typedef uint8_t Unsigned __attribute__((vector_size(kWidth)));

enum Codes : int { kInt8 = 0, kUint8 = 1, kInt4 = 2, kUint4 = 3 };

inline float sign_extended(uint8_t nibble) {
  return static_cast<float>(nibble >= 8 ? nibble - 16 : nibble);
}

// Adds the products of `count` codes with R rows; x lies as even and odd elements for 4-bit codes.
template <int R, int kCodes>
void add_codes(const uint8_t* codes, const float* x, int64_t stride, int64_t half, int64_t count,
               Floats* sums, float* rest) {
  constexpr bool kNibbles = kCodes >= kInt4;
  const int64_t bytes = kNibbles ? count / 2 : count;
  int64_t i = 0;
  for (; i + kWidth <= bytes; i += kWidth) {
    Unsigned raw;
    std::memcpy(&raw, codes + i, sizeof raw);
    if constexpr (kNibbles) {
      const Ints wide = __builtin_convertvector(raw, Ints);
      Ints low = wide & 15, high = wide >> 4;
      if constexpr (kCodes == kInt4) {
        low = (low ^ 8) - 8;
        high = (high ^ 8) - 8;
      }
      const Floats even = __builtin_convertvector(low, Floats);
      const Floats odd = __builtin_convertvector(high, Floats);
      for (int r = 0; r < R; ++r) {
        sums[r] = fused(load(x + r * stride + i), even, sums[r]);
        sums[r] = fused(load(x + r * stride + half + i), odd, sums[r]);
      }
    } else {
      const Ints wide = kCodes == kInt8 ? __builtin_convertvector((Signed)raw, Ints)
                                        : __builtin_convertvector(raw, Ints);
      const Floats values = __builtin_convertvector(wide, Floats);
      for (int r = 0; r < R; ++r) sums[r] = fused(load(x + r * stride + i), values, sums[r]);
    }
  }
  for (; i < bytes; ++i) {
    for (int r = 0; r < R; ++r) {
      const float* row = x + r * stride + i;
      if constexpr (kCodes == kInt8) rest[r] += row[0] * static_cast<int8_t>(codes[i]);
      if constexpr (kCodes == kUint8) rest[r] += row[0] * codes[i];
      if constexpr (kCodes == kInt4) {
        rest[r] += row[0] * sign_extended(codes[i] & 15) + row[half] * sign_extended(codes[i] >> 4);
      }
      if constexpr (kCodes == kUint4) rest[r] += row[0] * (codes[i] & 15) + row[half] * (codes[i] >> 4);
    }
  }
}

struct Weight {
  const uint8_t* codes;
  const float* parameters;
  int64_t inputs, outputs, block;
};

// One output of R rows.
template <int R, int kCodes>
void one_output(const Weight& w, int64_t output, const float* x, const float* block_sums,
                float* totals) {
  constexpr bool kOffset = kCodes == kUint8 || kCodes == kUint4;
  const int64_t blocks = w.inputs / w.block, packing = kCodes >= kInt4 ? 2 : 1;
  Floats sums[R] = {};
  float rest[R] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const float* parameters = w.parameters + (output * blocks + b) * (kOffset ? 2 : 1);
    Floats inner[R] = {};
    float left[R] = {};
    add_codes<R, kCodes>(w.codes + (output * w.inputs + b * w.block) / packing,
                         x + b * w.block / packing, w.inputs, w.inputs / 2, w.block, inner, left);
    for (int r = 0; r < R; ++r) {
      sums[r] = fused(inner[r], Floats{} + parameters[0], sums[r]);
      rest[r] += left[r] * parameters[0];
      if (kOffset) rest[r] += block_sums[r * blocks + b] * parameters[1];
    }
  }
  for (int r = 0; r < R; ++r) {
    float total = rest[r];
    for (int i = 0; i < kWidth; ++i) total += sums[r][i];
    totals[r] = total;
  }
}

// Widens rows of x: as they are, or even elements before odd ones; and sums them by blocks.
template <typename T>
void prepare(const T* x, int64_t inputs, int64_t block, bool nibbles, float* row, float* sums) {
  for (int64_t i = 0; i < inputs; ++i) {
    row[nibbles ? i / 2 + (i % 2) * (inputs / 2) : i] = number(x[i]);
  }
  for (int64_t b = 0; b < inputs / block; ++b) {
    float sum = 0;
    for (int64_t i = 0; i < block; ++i) sum += number(x[b * block + i]);
    sums[b] = sum;
  }
}

template <int kCodes, typename T>
int quantized(const T* x, const Weight& w, T* y, int64_t rows, int threads) {
  const int64_t blocks = w.inputs / w.block;
  float* scratch = static_cast<float*>(std::malloc(sizeof(float) * rows * (w.inputs + blocks)));
  if (scratch == nullptr) return 1;
  float* sums = scratch + rows * w.inputs;
  for (int64_t row = 0; row < rows; ++row) {
    prepare(x + row * w.inputs, w.inputs, w.block, kCodes >= kInt4, scratch + row * w.inputs,
            sums + row * blocks);
  }
  for_each_item(threads, w.outputs, kOutputs, [&](int64_t output) {
    int64_t row = 0;
    float totals[kTogether];
    for (; row + kTogether <= rows; row += kTogether) {
      one_output<kTogether, kCodes>(w, output, scratch + row * w.inputs, sums + row * blocks,
                                    totals);
      for (int r = 0; r < kTogether; ++r) assign(y + (row + r) * w.outputs + output, totals[r]);
    }
    for (; row < rows; ++row) {
      one_output<1, kCodes>(w, output, scratch + row * w.inputs, sums + row * blocks, totals);
      assign(y + row * w.outputs + output, totals[0]);
    }
  });
  std::free(scratch);
  return 0;
}

// Layouts shared with serving.py.
struct PackedProduct {
  const void *x, *panels, *bias;
  void* y;
  int64_t rows, inputs, outputs;
  int32_t dtype, threads;
};

struct QuantizedProduct {
  const void* x;
  const uint8_t* codes;
  const float* parameters;
  void* y;
  int64_t block, rows, inputs, outputs;
  int32_t kind, dtype, threads;
};

}  // namespace

// y [rows, outputs] = x [rows, inputs] * panels + bias; inputs are whole words.
DRIVETRAIN_API int dt_packed_linear(const void* call) {
  const PackedProduct& c = *static_cast<const PackedProduct*>(call);
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    packed(static_cast<const T*>(c.x), static_cast<const T*>(c.panels),
           static_cast<const T*>(c.bias), static_cast<T*>(c.y), c.rows, c.inputs, c.outputs,
           c.threads);
  });
  return 0;
}

// y [rows, outputs] = x [rows, inputs] * dequantised weight; 0, or 1 without memory.
DRIVETRAIN_API int dt_quantized_linear(const void* call) {
  const QuantizedProduct& c = *static_cast<const QuantizedProduct*>(call);
  const Weight weight{c.codes, c.parameters, c.inputs, c.outputs, c.block};
  int status = 0;
  with_type(c.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(c.x);
    T* to = static_cast<T*>(c.y);
    if (c.kind == kInt8) status = quantized<kInt8>(from, weight, to, c.rows, c.threads);
    if (c.kind == kUint8) status = quantized<kUint8>(from, weight, to, c.rows, c.threads);
    if (c.kind == kInt4) status = quantized<kInt4>(from, weight, to, c.rows, c.threads);
    if (c.kind == kUint4) status = quantized<kUint4>(from, weight, to, c.rows, c.threads);
  });
  return status;
}

}  // namespace drivetrain
