// Decode activations: the choice of the exact columns and of the code scale. Included by instruction-set sources only.
#pragma once

#include <cmath>

#include "element_types.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {

constexpr float kInt8CodeMax = 127.0f;
// The high half of a 16-bit code, (code + 128) >> 8, must not exceed 127.
constexpr float kInt16CodeMax = 127.0f * 256.0f;
// Below this largest magnitude, codes are 0: code_max / magnitude must not overflow. What is lost is far below float16.
constexpr float kSmallestCodedMagnitude = 1e-30f;

inline float magnitude_of(float value) { return __builtin_fabsf(value); }

// ---- the exact columns: the kExactColumns largest magnitudes of a token, the lower column among equals ----
//
// 64 interleaved groups of columns have 64 maxima. At least 16 magnitudes reach the 16th largest of these, and few
// exceed it, so that one scan for magnitudes at or above that threshold leaves about two dozen candidates.

constexpr int64_t kExactGroups = 64;

// The 16th largest of the maxima, or 0.
inline float exact_threshold(const float* group_max) {
  float threshold = 0.0f;
  for (int64_t group = 0; group < kExactGroups; ++group) {
    int32_t at_least = 0;
    for (int64_t other = 0; other < kExactGroups; ++other) at_least += group_max[other] >= group_max[group];
    if (at_least >= kExactColumns && group_max[group] > threshold) threshold = group_max[group];
  }
  return threshold;
}

struct ExactSelection {
  int32_t smallest_slot;  // once all slots are taken: the smallest value's, the last column's among equals
  float rest_max;         // the largest magnitude that was offered and not kept
};

inline int32_t smallest_exact_slot(const DecodeActivations* activations) {
  int32_t smallest = 0;
  for (int32_t slot = 1; slot < kExactColumns; ++slot) {
    const float value = magnitude_of(activations->exact_values[slot]);
    const float least = magnitude_of(activations->exact_values[smallest]);
    const bool is_later = activations->exact_columns[slot] > activations->exact_columns[smallest];
    if (value < least || (value == least && is_later)) smallest = slot;
  }
  return smallest;
}

// Columns must be offered in ascending order.
inline void offer_exact_column(int64_t column, float value, ExactSelection* selection, DecodeActivations* activations) {
  const float magnitude = magnitude_of(value);
  if (magnitude == 0.0f) return;
  int32_t slot = activations->exact_count;
  if (slot < kExactColumns) {
    ++activations->exact_count;
  } else {
    slot = selection->smallest_slot;
    const float least = magnitude_of(activations->exact_values[slot]);
    const bool is_kept = magnitude > least;
    const float dropped = is_kept ? least : magnitude;
    selection->rest_max = dropped > selection->rest_max ? dropped : selection->rest_max;
    if (!is_kept) return;
  }
  activations->exact_columns[slot] = static_cast<int32_t>(column);
  activations->exact_values[slot] = value;
  if (activations->exact_count == kExactColumns) selection->smallest_slot = smallest_exact_slot(activations);
}

// Fills exact_count, exact_columns and exact_values and returns the largest magnitude among all other columns.
inline float select_exact_columns(int64_t in_features, DecodeActivations* activations) {
  const float* columns = activations->columns;  // zero from in_features to the next multiple of 64
  float group_max[kExactGroups] = {};
  for (int64_t block = 0; block < in_features; block += kExactGroups) {
    for (int64_t group = 0; group < kExactGroups; ++group) {
      const float magnitude = magnitude_of(columns[block + group]);
      group_max[group] = magnitude > group_max[group] ? magnitude : group_max[group];
    }
  }
  const float threshold = exact_threshold(group_max);
  ExactSelection selection = {0, 0.0f};
  activations->exact_count = 0;
  for (int64_t block = 0; block < in_features; block += kExactGroups) {
    int32_t candidates = 0;
    float below = 0.0f;
    for (int64_t k = block; k < block + kExactGroups; ++k) {
      const float magnitude = magnitude_of(columns[k]);
      const bool is_candidate = magnitude >= threshold;
      candidates += is_candidate;
      const float rest = is_candidate ? 0.0f : magnitude;
      below = rest > below ? rest : below;
    }
    selection.rest_max = below > selection.rest_max ? below : selection.rest_max;
    if (candidates == 0) continue;
    for (int64_t k = block; k < block + kExactGroups; ++k) {
      if (magnitude_of(columns[k]) >= threshold) offer_exact_column(k, columns[k], &selection, activations);
    }
  }
  return selection.rest_max;
}

inline float largest_magnitude(const float* columns, int64_t in_features) {
  float largest = 0.0f;
  for (int64_t k = 0; k < in_features; ++k) {
    const float magnitude = magnitude_of(columns[k]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

struct CodeScale {
  float scale;    // activation ~ scale * code
  float inverse;  // code ~ inverse * activation
};

inline CodeScale code_scale(float largest, float sum, ActivationPrecision precision) {
  const float code_max = precision == ActivationPrecision::kInt16 ? kInt16CodeMax : kInt8CodeMax;
  CodeScale result = {0.0f, 0.0f};
  if (largest > kSmallestCodedMagnitude) result = {largest / code_max, code_max / largest};
  // NaN or infinity among the activations: not a number comes out wherever the scale is multiplied in.
  if (!(sum - sum == 0.0f)) result.scale = sum - sum;
  return result;
}

// Restores the zeros behind the columns of this token, where an earlier, wider token has left values.
inline void clear_beyond(int64_t in_features, DecodeActivations* activations) {
  for (int64_t k = in_features; k < activations->dirty_columns; ++k) activations->columns[k] = 0.0f;
  activations->dirty_columns = in_features;
}

}  // namespace
}  // namespace loop_singular_bit
