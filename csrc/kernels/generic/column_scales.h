// Row passes over a dense weight for the rank-1 fit of its magnitudes. Include after a simd/ header.
#pragma once

#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

// Calls visit(k, elements k..k+15) over a row, zeros behind its end.
template <ElementType type, typename Visit>
void visit_row(const DenseRows& weight, int64_t row, int64_t columns, Visit visit) {
  const int64_t index = row * weight.row_stride;
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) visit(k, load_elements<type>(weight.data, index + k));
  if (k < columns) visit(k, load_elements_partly<type>(weight.data, index + k, columns - k));
}

// In a fixed order: halves are added to halves.
inline float sum_of_lanes(F32x16 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <ElementType type>
float largest_magnitude_of(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end) {
  F32x16 largest = splat(0.0f);
  F32x16 probe = splat(0.0f);  // NaN as soon as an element was not finite
  for (int64_t row = row_begin; row < row_end; ++row) {
    visit_row<type>(weight, row, columns, [&](int64_t, F32x16 value) {
      largest = max(magnitude(value), largest);
      probe = add(probe, mul(value, splat(0.0f)));
    });
  }
  if (mask_bits(greater_equal(probe, splat(0.0f))) != 0xffff) return -1.0f;
  float lanes[kLanes];
  store(lanes, largest);
  float result = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  return result;
}

inline float largest_magnitude(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end) {
  switch (weight.type) {
    case ElementType::kFloat32:
      return largest_magnitude_of<ElementType::kFloat32>(weight, columns, row_begin, row_end);
    case ElementType::kBFloat16:
      return largest_magnitude_of<ElementType::kBFloat16>(weight, columns, row_begin, row_end);
    default:
      return largest_magnitude_of<ElementType::kFloat16>(weight, columns, row_begin, row_end);
  }
}

template <ElementType type>
float accumulate_column_scales_of(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end,
                                  float factor, const float* projection, float* column_sums) {
  for (int64_t k = 0; k < columns; k += kLanes) store(column_sums + k, splat(0.0f));
  float square_sum = 0.0f;
  for (int64_t row = row_begin; row < row_end; ++row) {
    F32x16 product[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    visit_row<type>(weight, row, columns, [&](int64_t k, F32x16 value) {
      F32x16& sum = product[k / kLanes % 4];
      sum = add(sum, mul(mul(magnitude(value), splat(factor)), load(projection + k)));
    });
    const float row_scale = sum_of_lanes(add(add(product[0], product[1]), add(product[2], product[3])));
    square_sum += row_scale * row_scale;
    const F32x16 scaled = splat(row_scale * factor);
    visit_row<type>(weight, row, columns, [&](int64_t k, F32x16 value) {
      store(column_sums + k, add(load(column_sums + k), mul(magnitude(value), scaled)));
    });
  }
  return square_sum;
}

inline float accumulate_column_scales(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end,
                                      float factor, const float* projection, float* column_sums) {
  switch (weight.type) {
    case ElementType::kFloat32:
      return accumulate_column_scales_of<ElementType::kFloat32>(weight, columns, row_begin, row_end, factor, projection,
                                                                column_sums);
    case ElementType::kBFloat16:
      return accumulate_column_scales_of<ElementType::kBFloat16>(weight, columns, row_begin, row_end, factor,
                                                                 projection, column_sums);
    default:
      return accumulate_column_scales_of<ElementType::kFloat16>(weight, columns, row_begin, row_end, factor, projection,
                                                                column_sums);
  }
}

}  // namespace
}  // namespace loop_singular_bit
