// The choice of the exact columns and of the code scale. Included by instruction-set sources only.
#pragma once

#include <cmath>

#include "element_types.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {

// Decode. The signs of activations cost no bits of the codes: they go into the sign words, which are changed where an
// activation is negative.
constexpr float kMagnitudeCodeMax = 255.0f;
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

inline int32_t smallest_exact_slot(const ExactColumns* exact) {
  int32_t smallest = 0;
  for (int32_t slot = 1; slot < kExactColumns; ++slot) {
    const float value = magnitude_of(exact->exact_values[slot]);
    const float least = magnitude_of(exact->exact_values[smallest]);
    const bool is_later = exact->exact_columns[slot] > exact->exact_columns[smallest];
    if (value < least || (value == least && is_later)) smallest = slot;
  }
  return smallest;
}

// Columns must be offered in ascending order.
inline void offer_exact_column(int64_t column, float value, ExactSelection* selection, ExactColumns* exact) {
  const float magnitude = magnitude_of(value);
  if (magnitude == 0.0f) return;
  int32_t slot = exact->exact_count;
  if (slot < kExactColumns) {
    ++exact->exact_count;
  } else {
    slot = selection->smallest_slot;
    const float least = magnitude_of(exact->exact_values[slot]);
    const bool is_kept = magnitude > least;
    const float dropped = is_kept ? least : magnitude;
    selection->rest_max = dropped > selection->rest_max ? dropped : selection->rest_max;
    if (!is_kept) return;
  }
  exact->exact_columns[slot] = static_cast<int32_t>(column);
  exact->exact_values[slot] = value;
  if (exact->exact_count == kExactColumns) selection->smallest_slot = smallest_exact_slot(exact);
}

// Fills `exact` and returns the largest magnitude among all other columns. block_at(k) points to the columns
// [k, k + 64), zeros beyond the last; what it points to must hold until the next call.
template <typename BlockAt>
inline float select_exact_columns(int64_t in_features, const BlockAt& block_at, ExactColumns* exact) {
  float group_max[kExactGroups] = {};
  for (int64_t block = 0; block < in_features; block += kExactGroups) {
    const float* columns = block_at(block);
    for (int64_t group = 0; group < kExactGroups; ++group) {
      const float magnitude = magnitude_of(columns[group]);
      group_max[group] = magnitude > group_max[group] ? magnitude : group_max[group];
    }
  }
  const float threshold = exact_threshold(group_max);
  ExactSelection selection = {0, 0.0f};
  float below[kExactGroups] = {};
  exact->exact_count = 0;
  for (int64_t block = 0; block < in_features; block += kExactGroups) {
    const float* columns = block_at(block);
    int32_t candidates = 0;
    for (int64_t k = 0; k < kExactGroups; ++k) {
      const float magnitude = magnitude_of(columns[k]);
      const bool is_candidate = magnitude >= threshold;
      candidates += is_candidate;
      const float rest = is_candidate ? 0.0f : magnitude;
      below[k] = rest > below[k] ? rest : below[k];
    }
    if (candidates == 0) continue;
    for (int64_t k = 0; k < kExactGroups; ++k) {
      if (magnitude_of(columns[k]) >= threshold) offer_exact_column(block + k, columns[k], &selection, exact);
    }
  }
  for (float largest : below) selection.rest_max = largest > selection.rest_max ? largest : selection.rest_max;
  return selection.rest_max;
}

// ---- tokens whose largest activations stand out ----
//
// With steps of largest / code_max, codes are off by largest / (sqrt(12) x code_max x the root mean square) of the norm
// of a token: by 0.4 % in decode and 0.8 % in prefill where 4096 activations are Gaussian, and by ten times that where
// a few are massive. Only tokens of the latter kind have exact columns, and pay for them.

struct OutstandingRule {
  float times_root_mean_square;  // the largest magnitude must exceed
  float gain;                    // exact columns must make the step smaller by this factor: many may be as large
};

// Above 4.4 codes would be off by more than 0.5 %; one Gaussian token of 4096 in 20.
constexpr OutstandingRule kDecodeOutstanding = {4.4f, 1.25f};
// Exact columns cost more here. One Gaussian token in 400.
constexpr OutstandingRule kPrefillOutstanding = {5.0f, 1.5f};

// Returns the largest magnitude to be coded. That is what select() returns after filling `exact`, for tokens that stand
// out; else `exact` is empty.
template <typename Select>
inline float select_if_outstanding(const OutstandingRule& rule, float largest, float square_sum, int64_t in_features,
                                   const Select& select, ExactColumns* exact) {
  exact->exact_count = 0;
  const float limit = rule.times_root_mean_square * rule.times_root_mean_square * square_sum;
  if (!(largest * largest * static_cast<float>(in_features) > limit)) return largest;
  const float rest = select();
  if (largest >= rule.gain * rest) return rest;
  exact->exact_count = 0;
  return largest;
}

// Decode: `columns` are zero from in_features to the next multiple of 64.
inline float select_outstanding_columns(float largest, float square_sum, int64_t in_features,
                                        DecodeActivations* activations) {
  const auto select = [&] {
    return select_exact_columns(in_features, [&](int64_t k) { return activations->columns + k; }, activations);
  };
  return select_if_outstanding(kDecodeOutstanding, largest, square_sum, in_features, select, activations);
}

// Prefill: `block_at` as for select_exact_columns().
template <typename BlockAt>
inline float select_outstanding_columns(float largest, float square_sum, int64_t in_features, const BlockAt& block_at,
                                        ExactColumns* exact) {
  const auto select = [&] { return select_exact_columns(in_features, block_at, exact); };
  return select_if_outstanding(kPrefillOutstanding, largest, square_sum, in_features, select, exact);
}

struct CodeScale {
  float scale;    // activation ~ scale * code
  float inverse;  // code ~ inverse * activation
};

inline float decode_code_max(ActivationPrecision precision) {
  return precision == ActivationPrecision::kInt16 ? kInt16CodeMax : kMagnitudeCodeMax;
}

inline float prefill_code_max(ActivationPrecision precision) {
  return precision == ActivationPrecision::kInt16 ? kInt16CodeMax : kInt8CodeMax;
}

inline CodeScale code_scale(float largest, float sum, float code_max) {
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
