// One bit per element; the arithmetic is that of drivetrain_kernels/ops/signs.py.
#include "tiles.h"

namespace drivetrain {

static_assert(kTile % 8 == 0, "a byte of signs belongs to one tile");

// Packs eight signs a byte, least bit first, and keeps what scale * sign leaves out.
DRIVETRAIN_API void dt_pack_signs(const float* values, float scale, float* error, uint8_t* packed,
                                  int64_t count, int threads) {
  for_each_tile(count, threads, [&](int64_t start, int64_t here) {
    const float* from = values + start;
    float* rest = error + start;
    uint8_t* bytes = packed + start / 8;
    for (int64_t i = 0; i < here; ++i) rest[i] = from[i] - (from[i] >= 0 ? scale : -scale);
    for (int64_t at = 0; at < here; at += 8) {
      const int64_t signs = std::min<int64_t>(8, here - at);
      uint32_t byte = 0;
      for (int64_t i = 0; i < signs; ++i) byte |= static_cast<uint32_t>(from[at + i] >= 0) << i;
      bytes[at / 8] = static_cast<uint8_t>(byte);
    }
  });
}

// The mean of `sources` rows of signs, each times its scale, added in order.
DRIVETRAIN_API void dt_mean_signs(const uint8_t* packed, const float* scales, int64_t sources,
                                  int64_t count, float* mean, int threads) {
  const int64_t width = (count + 7) / 8;
  for_each_tile(count, threads, [&](int64_t start, int64_t here) {
    float* to = mean + start;
    for (int64_t i = 0; i < here; ++i) to[i] = 0.0f;
    for (int64_t s = 0; s < sources; ++s) {
      const uint8_t* bytes = packed + s * width + start / 8;
      const float scale = scales[s];
      for (int64_t i = 0; i < here; ++i) {
        to[i] += (bytes[i / 8] >> (i % 8)) & 1 ? scale : -scale;
      }
    }
    const float divisor = static_cast<float>(sources);
    for (int64_t i = 0; i < here; ++i) to[i] /= divisor;
  });
}

}  // namespace drivetrain
