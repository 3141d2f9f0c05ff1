// One packed weight as kernels see it: pointers and extents, data only. Layout: docs/packed_format.md.
#pragma once

#include <cstdint>

namespace loop_singular_bit {

constexpr int64_t kRowsPerTile = 32;
constexpr int64_t kColumnsPerWord = 32;
constexpr int64_t kMaxPlanes = 8;
constexpr int64_t kMaxInFeatures = 65536;  // outlier columns are uint16

// weight[n, k] ~ (means[n] + sum_p scales[n, p] * sign[n, p, k] + outlier_delta[n, k]) * column_scales[k]
//
// float16 values are passed as their bits. No pointer needs more than its element's alignment; kernels load unaligned.
struct PackedWeightView {
  const int32_t* signs;    // [row_tiles, planes, words, 32]; lane = row; bit b of word w = column 32w + b; 1 is +1
  const uint16_t* scales;  // float16 [row_tiles, planes, 32]
  const uint16_t* outlier_columns;  // [row_tiles, outliers, 32], ascending within a row
  const int8_t* outlier_deltas;     // [row_tiles, outliers, 32], times outlier_scales
  const uint16_t* outlier_scales;   // float16 [row_tiles, 32]
  const uint16_t* column_scales;    // float16 [in_features], or nullptr: all 1
  const uint16_t* means;            // float16 [row_tiles, 32], or nullptr: all 0
  int64_t out_features;
  int64_t in_features;
  int64_t row_tiles;  // ceil(out_features / 32)
  int64_t words;      // ceil(in_features / 32)
  int64_t planes;     // 1..8
  int64_t outliers;   // per row; >= 0
};

}  // namespace loop_singular_bit
