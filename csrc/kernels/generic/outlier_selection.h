// The O largest scores of each lane, taken out of a weight tile. Include after a simd/ header.
#pragma once

#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

// Slot i of lane l is element i * 16 + l; columns ascend within a lane.
struct OutlierList {
  int32_t* columns;
  float* values;  // weight / column_scales
  int64_t count;  // of slots per lane
};

// scores[k * 16 + lane]: not negative, NaN in padding columns; at least list.count others. Replaces the chosen weights
// in the tile by NaN. Of equal scores the lower columns are taken.
inline void take_outliers(const float* scores, const WeightTile& tile, const OutlierList& list) {
  // Scores are not negative, hence ordered like their bits. Invariant: at least `count` scores of a lane reach floor,
  // fewer reach ceiling.
  uint32_t floor[kLanes];
  uint32_t ceiling[kLanes];
  F32x16 largest = splat(0.0f);
  for (int64_t k = 0; k < tile.padded_columns; ++k) largest = max(load(scores + k * kLanes), largest);
  float bounds[kLanes];
  store(bounds, largest);
  for (int lane = 0; lane < kLanes; ++lane) {
    floor[lane] = 0;
    __builtin_memcpy(&ceiling[lane], &bounds[lane], sizeof(uint32_t));
    ceiling[lane] += 1;
  }
  const float wanted = static_cast<float>(list.count);
  for (bool searching = true; searching;) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t middle = floor[lane] + (ceiling[lane] - floor[lane]) / 2;
      __builtin_memcpy(&bounds[lane], &middle, sizeof(float));
    }
    const F32x16 bound = load(bounds);
    const F32x16 one = splat(1.0f);
    F32x16 even = splat(0.0f);
    F32x16 odd = splat(0.0f);
    for (int64_t k = 0; k < tile.padded_columns; k += 2) {
      even = add_where(greater_equal(load(scores + k * kLanes), bound), even, one);
      odd = add_where(greater_equal(load(scores + (k + 1) * kLanes), bound), odd, one);
    }
    float reached[kLanes];
    store(reached, add(even, odd));
    searching = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t middle;
      __builtin_memcpy(&middle, &bounds[lane], sizeof(uint32_t));
      if (reached[lane] >= wanted) {
        floor[lane] = middle;
        if (reached[lane] == wanted) ceiling[lane] = middle + 1;
      } else {
        ceiling[lane] = middle;
      }
      searching = searching || ceiling[lane] - floor[lane] > 1;
    }
  }

  // Scores above floor are taken; of those equal to it as many as are still wanted.
  for (int lane = 0; lane < kLanes; ++lane) __builtin_memcpy(&bounds[lane], &floor[lane], sizeof(float));
  const F32x16 bound = load(bounds);
  F32x16 above = splat(0.0f);
  for (int64_t k = 0; k < tile.padded_columns; ++k) {
    above = add_where(greater(load(scores + k * kLanes), bound), above, splat(1.0f));
  }
  float above_count[kLanes];
  store(above_count, above);
  int64_t equal_wanted[kLanes];
  int64_t taken[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    equal_wanted[lane] = list.count - static_cast<int64_t>(above_count[lane]);
    taken[lane] = 0;
  }
  for (int64_t k = 0; k < tile.columns; ++k) {
    const F32x16 score = load(scores + k * kLanes);
    uint32_t candidates = mask_bits(greater_equal(score, bound));
    if (candidates == 0) continue;
    const uint32_t above_bits = mask_bits(greater(score, bound));
    for (; candidates != 0; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      if ((above_bits >> lane & 1) == 0 && equal_wanted[lane]-- <= 0) continue;
      float* value = tile.values + k * kLanes + lane;
      const int64_t slot = taken[lane]++ * kLanes + lane;
      list.columns[slot] = static_cast<int32_t>(k);
      list.values[slot] = *value;
      const uint32_t nan = kNanBits;
      __builtin_memcpy(value, &nan, sizeof(nan));
    }
  }
}

inline void put_outliers_back(const WeightTile& tile, const OutlierList& list) {
  for (int64_t slot = 0; slot < list.count * kLanes; ++slot) {
    tile.values[list.columns[slot] * kLanes + slot % kLanes] = list.values[slot];
  }
}

}  // namespace
}  // namespace loop_singular_bit
