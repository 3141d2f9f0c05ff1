// Prefill multiplies integer levels, not planes: where the plane scales of a row are integer multiples of one unit,
//   sum_p scale[p] * sign[p] = unit * sum_p level[p] * sign[p],
// a row tile is expanded once to bytes and costs one integer product per weight, whatever the number of planes is. The
// quantizer provides for it: scales that sum to 126 units, or scales that halve from plane to plane.
// Included by instruction-set sources only.
#pragma once

#include <cmath>

#include "packed_weight_view.h"

namespace loop_singular_bit {
namespace {

// The grid of the format. Two codes times 126 fit the int16 sums of instruction sets without a four-way dot product.
constexpr int32_t kGridUnits = 126;

// Some planes of one row tile: scale[p][row] = level[p][row] * unit[row], up to float16 rounding.
struct PrefillLevels {
  float unit[kRowsPerTile];
  int32_t level[kMaxPlanes][kRowsPerTile];
  int32_t total[kRowsPerTile];  // of the levels; a byte of the expanded tile holds at most this
};

inline void single_plane_levels(const float* scales, PrefillLevels* levels) {
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    levels->unit[row] = scales[row];
    levels->level[0][row] = 1;
    levels->total[row] = 1;
  }
}

inline bool find_halving_levels(const float (*scales)[kRowsPerTile], int64_t planes, int32_t largest_total,
                                PrefillLevels* levels) {
  const int32_t total = (1 << planes) - 1;
  if (total > largest_total) return false;
  int32_t off_grid = 0;
  for (int64_t plane = 0; plane + 1 < planes; ++plane) {
    for (int64_t row = 0; row < kRowsPerTile; ++row) off_grid += !(scales[plane][row] == 2.0f * scales[plane + 1][row]);
  }
  if (off_grid != 0) return false;
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    levels->unit[row] = scales[planes - 1][row];
    levels->total[row] = total;
    for (int64_t plane = 0; plane < planes; ++plane) levels->level[plane][row] = 1 << (planes - 1 - plane);
  }
  return true;
}

inline bool find_grid_levels(const float (*scales)[kRowsPerTile], int64_t planes, PrefillLevels* levels) {
  // A scale and the sum are each off by up to 2^-11 of themselves, after rounding to float16.
  constexpr float kRounding = 0x1.1p-10f;
  float sum[kRowsPerTile] = {}, product[kRowsPerTile] = {}, square[kRowsPerTile] = {};
  for (int64_t row = 0; row < kRowsPerTile; ++row) levels->total[row] = 0;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t row = 0; row < kRowsPerTile; ++row) sum[row] += scales[plane][row];
  }
  int32_t off_grid = 0;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t row = 0; row < kRowsPerTile; ++row) {
      const float scale = scales[plane][row];
      const float multiple = sum[row] > 0.0f ? kGridUnits * scale / sum[row] : scale;
      const float nearest = __builtin_rintf(multiple);
      const bool is_level = nearest >= 0.0f && nearest <= static_cast<float>(kGridUnits) &&
                            __builtin_fabsf(multiple - nearest) <= nearest * kRounding;
      off_grid += !is_level;
      levels->level[plane][row] = is_level ? static_cast<int32_t>(nearest) : 0;
      levels->total[row] += levels->level[plane][row];
      product[row] += scale * nearest;
      square[row] += nearest * nearest;
    }
  }
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    levels->unit[row] = square[row] > 0.0f ? product[row] / square[row] : 0.0f;
    off_grid += levels->total[row] > kGridUnits;
  }
  return off_grid == 0;
}

// Levels of all planes of a tile at once. False when some row's scales are on no grid: planes then go one by one.
inline bool find_prefill_levels(const float (*scales)[kRowsPerTile], int64_t planes, int32_t largest_total,
                                PrefillLevels* levels) {
  if (planes == 1) {
    single_plane_levels(scales[0], levels);
    return true;
  }
  return find_halving_levels(scales, planes, largest_total, levels) || find_grid_levels(scales, planes, levels);
}

}  // namespace
}  // namespace loop_singular_bit
