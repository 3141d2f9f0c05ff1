// Planes of a row tile expanded to a byte per weight, for prefill. Include after a simd/ header with products of bytes.
#pragma once

#include "generic/element_types.h"
#include "generic/prefill_levels.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

// All levels from 0 to here fit a byte: eight planes that halve add up to 255.
constexpr int32_t kLargestTotal = 255;

// Planes that one expansion covers.
struct LevelGroup {
  int64_t first_plane;
  int64_t planes;
  PrefillLevels levels;
};

inline void load_scales(const PackedWeightView& weight, int64_t tile, float (*scales)[kRowsPerTile]) {
  for (int64_t plane = 0; plane < weight.planes; ++plane) {
    for (int64_t row = 0; row < kRowsPerTile; row += kLanes) {
      store(scales[plane] + row, load_float16(weight.scales + (tile * weight.planes + plane) * kRowsPerTile + row));
    }
  }
}

// bytes [2 halves of the tile, words, 8, 16 rows, 4]: the levels of columns b, 8 + b, 16 + b, 24 + b of a word, each
// the sum of its planes' levels where the sign is +; minus 128 where left bytes are signed.
template <int kPlanes>
inline void expand_planes(const PackedWeightView& weight, int64_t tile, const LevelGroup& group, int8_t* bytes) {
  const int64_t plane_words = weight.words * kRowsPerTile;
  const int32_t* first = weight.signs + (tile * weight.planes + group.first_plane) * plane_words;
  const Bytes64 lowest = splat_byte(kLeftBytesAreSigned ? -128 : 0);
  for (int64_t row = 0; row < kRowsPerTile; row += kLanes) {
    Bytes64 levels[kPlanes];
    for (int p = 0; p < kPlanes; ++p) {
      uint32_t four_times[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        four_times[i] = static_cast<uint32_t>(group.levels.level[p][row + i]) * 0x01010101u;
      }
      levels[p] = load_bytes(four_times);
    }
    for (int64_t word = 0; word < weight.words; ++word) {
      Bytes64 signs[kPlanes];
      for (int p = 0; p < kPlanes; ++p) signs[p] = load_bytes(first + p * plane_words + word * kRowsPerTile + row);
      for (int b = 0; b < 8; ++b, bytes += 64) {
        const Bytes64 bit = splat_byte(1 << b);
        Bytes64 sum = lowest;
        for (int p = 0; p < kPlanes; ++p) sum = bytes_add(sum, keep_where_bit(signs[p], bit, levels[p]));
        store_bytes(bytes, sum);
      }
    }
  }
}

inline void expand_planes(const PackedWeightView& weight, int64_t tile, const LevelGroup& group, int8_t* bytes) {
  constexpr void (*kExpand[kMaxPlanes])(const PackedWeightView&, int64_t, const LevelGroup&, int8_t*) = {
      expand_planes<1>, expand_planes<2>, expand_planes<3>, expand_planes<4>,
      expand_planes<5>, expand_planes<6>, expand_planes<7>, expand_planes<8>,
  };
  kExpand[group.planes - 1](weight, tile, group, bytes);
}

// With counts = sum of byte * code: sum of signed level * code = 2 * counts - factor * code_sum.
inline int32_t code_sum_factor(const PrefillLevels& levels) {
  int32_t total = 0;  // the same for all rows that are not 0
  for (int32_t of_row : levels.total) total = of_row > total ? of_row : total;
  return kLeftBytesAreSigned ? total - 256 : total;
}

// 2 * counts and this product may wrap around; their difference is at most 65536 x 255 x 128 < 2^31.
inline int32_t wrapping_product(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
