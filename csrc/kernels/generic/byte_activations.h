// Activations for the byte products: loading, scaling, quantization, and the byte order that the sign words ask for.
// Include after a simd/ header with products of bytes.
#pragma once

#include "generic/activations.h"
#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

inline float total_of_lanes(F32x16 v) {
  float lanes[kLanes], sum = 0.0f;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

inline float largest_of_lanes(F32x16 v) {
  float lanes[kLanes], largest = 0.0f;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

template <ElementType kType>
inline F32x16 load_up_to_sixteen(const void* data, int64_t index, int64_t count) {
  if (count >= kLanes) return load_elements<kType>(data, index);
  return count > 0 ? load_elements_partly<kType>(data, index, count) : splat(0.0f);
}

// Columns [k, k + 16) of a token times their scales; 0 from in_features on.
template <ElementType kType>
inline F32x16 load_scaled(const PackedWeightView& weight, const LinearInput& input, int64_t token, int64_t k) {
  const int64_t count = weight.in_features - k;
  const F32x16 value = load_up_to_sixteen<kType>(input.data, token * input.row_stride + k, count);
  if (weight.column_scales == nullptr) return value;
  return mul(value, load_up_to_sixteen<ElementType::kFloat16>(weight.column_scales, k, count));
}

constexpr int64_t kGroupVectors = kExactGroups / kLanes;

struct ColumnStatistics {
  float sum, square_sum;
  F32x16 group_max[kGroupVectors];  // of the magnitudes; column k belongs to group k % 64
};

// Writes columns[0 .. in_features) and zeros up to the next multiple of 64.
template <ElementType kType>
inline ColumnStatistics scale_columns(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                                      float* columns) {
  ColumnStatistics statistics;
  F32x16 sum[kGroupVectors], square_sum = splat(0.0f);
  for (int64_t i = 0; i < kGroupVectors; ++i) statistics.group_max[i] = sum[i] = splat(0.0f);
  for (int64_t k = 0; k < weight.in_features; k += kExactGroups) {
    for (int64_t i = 0; i < kGroupVectors; ++i) {
      const F32x16 value = load_scaled<kType>(weight, input, token, k + i * kLanes);
      store(columns + k + i * kLanes, value);
      sum[i] = add(sum[i], value);
      square_sum = fused_multiply_add(value, value, square_sum);
      statistics.group_max[i] = max(magnitude(value), statistics.group_max[i]);
    }
  }
  statistics.sum = total_of_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  statistics.square_sum = total_of_lanes(square_sum);
  return statistics;
}

struct TokenRange {
  float sum, square_sum, largest;
};

template <ElementType kType>
inline TokenRange range_of(const PackedWeightView& weight, const LinearInput& input, int64_t token) {
  F32x16 sum[2], square_sum[2], largest[2];
  for (int i = 0; i < 2; ++i) sum[i] = square_sum[i] = largest[i] = splat(0.0f);
  for (int64_t k = 0; k < weight.in_features; k += 2 * kLanes) {
    for (int i = 0; i < 2; ++i) {
      const F32x16 value = load_scaled<kType>(weight, input, token, k + i * kLanes);
      sum[i] = add(sum[i], value);
      square_sum[i] = fused_multiply_add(value, value, square_sum[i]);
      largest[i] = max(magnitude(value), largest[i]);
    }
  }
  return {total_of_lanes(add(sum[0], sum[1])), total_of_lanes(add(square_sum[0], square_sum[1])),
          largest_of_lanes(max(largest[0], largest[1]))};
}

inline float largest_of(const F32x16 magnitudes[kGroupVectors]) {
  return largest_of_lanes(max(max(magnitudes[0], magnitudes[1]), max(magnitudes[2], magnitudes[3])));
}

inline ColumnStatistics scale_columns(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                                      float* columns) {
  switch (input.type) {
    case ElementType::kFloat32:
      return scale_columns<ElementType::kFloat32>(weight, input, token, columns);
    case ElementType::kBFloat16:
      return scale_columns<ElementType::kBFloat16>(weight, input, token, columns);
    default:
      return scale_columns<ElementType::kFloat16>(weight, input, token, columns);
  }
}

// Bit i of the result: lane i % 16 of vector i / 16 is at least the threshold.
inline uint64_t at_least(const F32x16 vectors[kGroupVectors], F32x16 threshold) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < kGroupVectors; ++i) {
    bits |= static_cast<uint64_t>(mask_bits(greater_equal(vectors[i], threshold))) << (i * kLanes);
  }
  return bits;
}

// As select_exact_columns() of generic/activations.h, 64 columns at a time.
inline float select_exact_columns(const ColumnStatistics& statistics, int64_t in_features,
                                  DecodeActivations* activations) {
  float group_max[kExactGroups];
  for (int64_t i = 0; i < kGroupVectors; ++i) store(group_max + i * kLanes, statistics.group_max[i]);
  float threshold = 0.0f;
  for (float candidate : group_max) {
    if (candidate <= threshold) continue;
    const uint64_t reached = at_least(statistics.group_max, splat(candidate));
    if (__builtin_popcountll(reached) >= kExactColumns) threshold = candidate;
  }
  const F32x16 thresholds = splat(threshold);
  ExactSelection selection = {0, 0.0f};
  F32x16 below[kGroupVectors];
  for (F32x16& v : below) v = splat(0.0f);
  activations->exact_count = 0;
  const float* columns = activations->columns;
  for (int64_t block = 0; block < in_features; block += kExactGroups) {
    F32x16 magnitudes[kGroupVectors];
    for (int64_t i = 0; i < kGroupVectors; ++i) {
      magnitudes[i] = magnitude(load(columns + block + i * kLanes));
      below[i] = max(keep(greater(thresholds, magnitudes[i]), magnitudes[i]), below[i]);
    }
    for (uint64_t bits = at_least(magnitudes, thresholds); bits != 0; bits &= bits - 1) {
      const int64_t k = block + __builtin_ctzll(bits);
      offer_exact_column(k, columns[k], &selection, activations);
    }
  }
  const float below_max = largest_of(below);
  return below_max > selection.rest_max ? below_max : selection.rest_max;
}

// A sign word masked with 1 << b, b = 0..7, leaves one bit in each of its four bytes: the columns b, 8 + b, 16 + b and
// 24 + b. So the codes of a word are kept as eight groups of four.
//
// Quantizes one word of columns, in order: codes[0], or the high halves of 16-bit codes and codes[1] the low ones.
struct WordCodes {
  Int8x16 first[2], second[2];  // columns 0..15 and 16..31
};

template <int kHalves>
inline WordCodes encode(F32x16 first, F32x16 second, F32x16 inverse_scale) {
  WordCodes codes;
  first = mul(first, inverse_scale);
  second = mul(second, inverse_scale);
  if constexpr (kHalves == 2) {
    round_to_halves(first, &codes.first[0], &codes.first[1]);
    round_to_halves(second, &codes.second[0], &codes.second[1]);
  } else {
    codes.first[0] = round_to_int8(first);
    codes.second[0] = round_to_int8(second);
  }
  return codes;
}

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
