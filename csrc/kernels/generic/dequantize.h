// Packed weight -> dense rows. Include after a simd/ header.
#pragma once

#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

template <ElementType type>
void store_elements(void* data, int64_t index, F32x16 v) {
  if constexpr (type == ElementType::kFloat32) {
    store(static_cast<float*>(data) + index, v);
  } else if constexpr (type == ElementType::kBFloat16) {
    store_bfloat16(static_cast<uint16_t*>(data) + index, v);
  } else {
    store_float16(static_cast<uint16_t*>(data) + index, v);
  }
}

// Lane 0 of what sixteen halves in memory mean; reads exactly one.
inline float float_of_half(uint16_t half) {
  const uint16_t halves[kLanes] = {half};
  float values[kLanes];
  store(values, load_float16(halves));
  return values[0];
}

// output = values * column_scales, converted.
template <ElementType type>
void scale_columns(const uint16_t* column_scales, const float* values, int64_t columns, void* output) {
  const F32x16 one = splat(1.0f);
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const F32x16 scale = column_scales != nullptr ? load_float16(column_scales + k) : one;
    store_elements<type>(output, k, mul(load(values + k), scale));
  }
  const int64_t left = columns - k;
  if (left == 0) return;
  constexpr int64_t kElementBytes = type == ElementType::kFloat32 ? 4 : 2;
  const F32x16 scale =
      column_scales != nullptr ? load_elements_partly<ElementType::kFloat16>(column_scales, k, left) : one;
  alignas(64) unsigned char elements[kLanes * kElementBytes];
  store_elements<type>(elements, 0, mul(load(values + k), scale));
  __builtin_memcpy(static_cast<unsigned char*>(output) + k * kElementBytes, elements, left * kElementBytes);
}

inline void dequantize_row(const PackedWeightView& weight, int64_t row, float* scratch, void* output,
                           ElementType type) {
  const int64_t tile = row / kRowsPerTile;
  const int64_t lane = row % kRowsPerTile;
  const int32_t* signs = weight.signs + tile * weight.planes * weight.words * kRowsPerTile + lane;
  F32x16 plus[kMaxPlanes];
  F32x16 minus[kMaxPlanes];
  for (int64_t p = 0; p < weight.planes; ++p) {
    const float scale = float_of_half(weight.scales[(tile * weight.planes + p) * kRowsPerTile + lane]);
    plus[p] = splat(scale);
    minus[p] = splat(-scale);
  }
  const F32x16 mean = splat(weight.means != nullptr ? float_of_half(weight.means[tile * kRowsPerTile + lane]) : 0.0f);
  for (int64_t word = 0; word < weight.words; ++word) {
    F32x16 low = mean;
    F32x16 high = mean;
    for (int64_t p = 0; p < weight.planes; ++p) {
      const uint32_t bits = static_cast<uint32_t>(signs[(p * weight.words + word) * kRowsPerTile]);
      low = add(low, select(mask_from_bits(bits & 0xffff), plus[p], minus[p]));
      high = add(high, select(mask_from_bits(bits >> 16), plus[p], minus[p]));
    }
    store(scratch + word * kColumnsPerWord, low);
    store(scratch + word * kColumnsPerWord + kLanes, high);
  }
  const float outlier_scale = float_of_half(weight.outlier_scales[tile * kRowsPerTile + lane]);
  for (int64_t i = 0; i < weight.outliers; ++i) {
    const int64_t slot = (tile * weight.outliers + i) * kRowsPerTile + lane;
    const int64_t column = weight.outlier_columns[slot];
    if (column < weight.in_features) scratch[column] += static_cast<float>(weight.outlier_deltas[slot]) * outlier_scale;
  }
  switch (type) {
    case ElementType::kFloat32:
      return scale_columns<ElementType::kFloat32>(weight.column_scales, scratch, weight.in_features, output);
    case ElementType::kBFloat16:
      return scale_columns<ElementType::kBFloat16>(weight.column_scales, scratch, weight.in_features, output);
    default:
      return scale_columns<ElementType::kFloat16>(weight.column_scales, scratch, weight.in_features, output);
  }
}

}  // namespace
}  // namespace loop_singular_bit
