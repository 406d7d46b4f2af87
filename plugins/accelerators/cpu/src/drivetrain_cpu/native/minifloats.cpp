// Products with weights of 8 or 6 bits that are floating-point numbers themselves.
//
// A panel of the weight is decoded once, into the dtype of x, where its numbers are exact; then all
// rows pass it as they pass a packed weight (panels.h), so a row has the same bits in every batch.
#include <cstdlib>

#include "bytes.h"
#include "team.h"

namespace drivetrain {
namespace {

constexpr int64_t kChunk = 96;  // rows that stay in the second-level cache beside a panel

// Four inputs of 32 outputs as they lie: 128 bytes, or 64 of low nibbles and 32 of high pairs.
struct Fp8 {
  static constexpr int64_t kBytes = 4 * kPanel;
  static Floats at(const uint8_t* group, int input, int v) {
    return decoded<4, 3>(bytes_at(group + input * kPanel + v * kWidth));
  }
};

struct Fp6 {
  static constexpr int64_t kBytes = 3 * kPanel;
  static Floats at(const uint8_t* group, int input, int v) {
    const Ints nibbles = bytes_at(group + input / 2 * kPanel + v * kWidth);
    const Ints pairs = bytes_at(group + 2 * kPanel + v * kWidth);
    const Ints low = nibbles >> (input % 2 * 4) & 15, high = pairs >> (2 * input) & 3;
    return decoded<3, 2>(low | high << 4);
  }
};

// One vector of outputs of a word: one input, or two side by side.
inline void put_word(float* to, const Floats& first) { store(to, first); }
inline void put_word(uint16_t* to, const Floats& first, const Floats& second) {
  // Few bits of mantissa: what bfloat16 cuts off is 0.
  const Bits pairs = ((Bits)second & 0xffff0000u) | ((Bits)first >> 16);
  std::memcpy(to, &pairs, sizeof pairs);
}
inline void put_word(Half* to, const Floats& first, const Floats& second) {
  Half parts[2][kWidth];
  narrowed(parts[0], first);
  narrowed(parts[1], second);
  for (int i = 0; i < 2 * kWidth; ++i) to[i] = parts[i % 2][i / 2];
}

// Codes of `width` inputs as a panel of words.
template <typename Format, typename T>
void decode_panel(const uint8_t* codes, int64_t width, T* panel) {
  for (int64_t k = 0; k < width; k += 4) {
    const uint8_t* group = codes + k / 4 * Format::kBytes;
    for (int input = 0; input < 4; input += kWord<T>) {
      for (int v = 0; v < kLanes; ++v) {
        T* to = panel + (k + input) * kPanel + v * kWidth * kWord<T>;
        if constexpr (kWord<T> == 1) {
          put_word(to, Format::at(group, input, v));
        } else {
          put_word(to, Format::at(group, input, v), Format::at(group, input + 1, v));
        }
      }
    }
  }
}

struct Product {
  const uint8_t* codes;
  const float* scales;
  int64_t rows, width, outputs;
  int threads;
};

template <typename Format, typename T>
bool multiply(const Product& p, const T* x, T* y) {
  const int64_t panels = (p.outputs + kPanel - 1) / kPanel;
  std::atomic<bool> failed{false};
  share_out(p.threads, panels, run_of(panels, p.threads), [&](Items& items) {
    T* decoded = static_cast<T*>(std::aligned_alloc(64, p.width * kPanel * sizeof(T) + 64));
    if (decoded == nullptr) {
      failed = true;
      return;
    }
    items.each([&](int64_t panel) {
      decode_panel<Format>(p.codes + panel * (p.width / 4) * Format::kBytes, p.width, decoded);
      const int64_t column = panel * kPanel;
      const int64_t columns = std::min<int64_t>(kPanel, p.outputs - column);
      float scales[kPanel] = {}, plain[kPanel];
      std::copy_n(p.scales + column, columns, scales);
      for (int64_t first = 0; first < p.rows; first += kChunk) {
        const auto take = [&](int64_t row, const Floats* sums) {
          T* to = y + (first + row) * p.outputs + column;
          for (int v = 0; v < kLanes; ++v) {
            const Floats scaled = sums[v] * load(scales + v * kWidth);
            if (columns == kPanel) narrowed(to + v * kWidth, scaled);
            else store(plain + v * kWidth, scaled);
          }
          for (int64_t i = 0; columns < kPanel && i < columns; ++i) assign(to + i, plain[i]);
        };
        times_panel(x + first * p.width, p.width, std::min(kChunk, p.rows - first),
                    p.width / kWord<T>, decoded, take);
      }
    });
    std::free(decoded);
  });
  return !failed;
}

// Layout shared with serving.py.
struct MinifloatProduct {
  const void* x;
  const uint8_t* codes;
  const float* scales;
  void* y;
  int64_t rows, inputs, outputs;
  int32_t six_bits, dtype, threads;
};

template <typename T>
bool multiply_rows(const MinifloatProduct& c) {
  const int64_t width = (c.inputs + 3) / 4 * 4;
  const T* x = static_cast<const T*>(c.x);
  T* filled = nullptr;
  if (width != c.inputs) {
    filled = static_cast<T*>(std::calloc(std::max<int64_t>(1, c.rows * width), sizeof(T)));
    if (filled == nullptr) return false;
    for (int64_t row = 0; row < c.rows; ++row) {
      std::memcpy(filled + row * width, x + row * c.inputs, c.inputs * sizeof(T));
    }
    x = filled;
  }
  const Product p{c.codes, c.scales, c.rows, width, c.outputs, c.threads};
  T* y = static_cast<T*>(c.y);
  const bool done = c.six_bits ? multiply<Fp6>(p, x, y) : multiply<Fp8>(p, x, y);
  std::free(filled);
  return done;
}

}  // namespace

// y [rows, outputs] = x [rows, inputs] * weight; 0, or 1 without memory.
DRIVETRAIN_API int dt_minifloat_linear(const void* call) {
  const MinifloatProduct& c = *static_cast<const MinifloatProduct*>(call);
  bool done = true;
  with_type(c.dtype, [&](auto element) { done = multiply_rows<decltype(element)>(c); });
  return done ? 0 : 1;
}

}  // namespace drivetrain
