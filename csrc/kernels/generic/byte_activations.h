// Activations for the byte products: loading, scaling, quantization, and the byte order that the sign words ask for.
// Include after a simd/ header with products of bytes.
#pragma once

#include "generic/activations.h"
#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

// Codes of a token are padded to whole words and as much again, for stores of a whole Bytes64.
inline int64_t code_bytes(int64_t words) { return words * kColumnsPerWord + kColumnsPerWord; }

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

struct ColumnStatistics {
  float sum;
  float largest;  // magnitude
};

// columns[0 .. in_features) and zeros up to the next multiple of 64; nullptr: statistics only.
template <ElementType kType>
inline ColumnStatistics scale_columns(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                                      float* columns) {
  constexpr int64_t kVectors = 4;
  F32x16 sum[kVectors], largest[kVectors];
  for (int64_t i = 0; i < kVectors; ++i) sum[i] = largest[i] = splat(0.0f);
  for (int64_t k = 0; k < weight.in_features; k += kVectors * kLanes) {
    for (int64_t i = 0; i < kVectors; ++i) {
      const F32x16 value = load_scaled<kType>(weight, input, token, k + i * kLanes);
      if (columns != nullptr) store(columns + k + i * kLanes, value);
      sum[i] = add(sum[i], value);
      largest[i] = max(magnitude(value), largest[i]);
    }
  }
  return {total_of_lanes(add(add(sum[0], sum[1]), add(sum[2], sum[3]))),
          largest_of_lanes(max(max(largest[0], largest[1]), max(largest[2], largest[3])))};
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

// One word's codes in natural order. `low` is for the lower halves of 16-bit codes. The last sixteen only exist so that
// whole vectors can be read from any multiple of eight.
struct NaturalCodes {
  alignas(64) int8_t high[48] = {};
  alignas(64) int8_t low[48] = {};
};

// Rounds to nearest even, 0 .. 15 and 16 .. 31 being the two vectors. Returns the sum, or the two sums.
struct CodeSums {
  int32_t high, low;
};

template <bool kIsInt16>
inline CodeSums encode(F32x16 first, F32x16 second, float inverse_scale, NaturalCodes* codes) {
  first = mul(first, splat(inverse_scale));
  second = mul(second, splat(inverse_scale));
  if (kIsInt16) {
    store_rounded_halves(codes->high, codes->low, first);
    store_rounded_halves(codes->high + kLanes, codes->low + kLanes, second);
  } else {
    store_rounded_int8(codes->high, first);
    store_rounded_int8(codes->high + kLanes, second);
  }
  CodeSums sums = {0, 0};
  for (int64_t i = 0; i < kColumnsPerWord; ++i) {
    sums.high += codes->high[i];
    if (kIsInt16) sums.low += codes->low[i];
  }
  return sums;
}

// A sign word masked with 1 << b, b = 0..7, leaves one bit in each of its four bytes: the columns b, 8 + b, 16 + b and
// 24 + b. So the codes of a word are kept as eight groups of four: grouped[4 * b + i] is column 8 * i + b.
// Writes 64 bytes, of which the first 32 count.
inline void store_grouped(int8_t* grouped, const int8_t* natural) {
  store_bytes(grouped, interleave_bytes(natural, natural + 8, natural + 16, natural + 24));
}

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
