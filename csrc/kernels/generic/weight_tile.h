// Sixteen weight rows, transposed so that a lane is a row: every reduction over columns then runs in order within a
// lane and gives the same bits on every instruction set. Include after a simd/ header.
#pragma once

#include "codec_kernels.h"

namespace loop_singular_bit {
namespace {

constexpr uint32_t kNanBits = 0x7fc00000;
constexpr uint32_t kMagnitudeBits = 0x7fffffff;
constexpr float kLargestFloat16 = 65504.0f;

inline F32x16 magnitude(F32x16 a) { return bits_and(a, splat_bits(kMagnitudeBits)); }

// Sums over so many columns are taken by themselves first: a running sum of 65,536 terms would lose digits.
constexpr int64_t kSummationBlock = 64;

template <ElementType type>
F32x16 load_elements(const void* data, int64_t index) {
  if constexpr (type == ElementType::kFloat32) {
    return load(static_cast<const float*>(data) + index);
  } else if constexpr (type == ElementType::kBFloat16) {
    return load_bfloat16(static_cast<const uint16_t*>(data) + index);
  } else {
    return load_float16(static_cast<const uint16_t*>(data) + index);
  }
}

// Elements [index, index + count) of `data`, zeros behind them; count <= 16.
template <ElementType type>
F32x16 load_elements_partly(const void* data, int64_t index, int64_t count) {
  constexpr int64_t kElementBytes = type == ElementType::kFloat32 ? 4 : 2;
  alignas(64) unsigned char elements[kLanes * kElementBytes] = {};
  __builtin_memcpy(elements, static_cast<const unsigned char*>(data) + index * kElementBytes, count * kElementBytes);
  return load_elements<type>(elements, 0);
}

// values[k * 16 + lane] = weight[first_row + lane, k] / column_scales[k]. Padding columns hold NaN, which every
// comparison of the fits passes over; outliers are taken out of a fit in the same way. Padding rows hold 0.
struct WeightTile {
  float* values;
  int64_t columns;         // of the weight
  int64_t padded_columns;  // multiple of kColumnPadding
};

inline int64_t block_end(const WeightTile& tile, int64_t begin) {
  return begin + kSummationBlock < tile.padded_columns ? begin + kSummationBlock : tile.padded_columns;
}

// Weighted mean of each lane; 0 where nothing has weight.
inline F32x16 weighted_mean(const WeightTile& tile, const float* weights) {
  F32x16 total = splat(0.0f);
  F32x16 total_weight = splat(0.0f);
  for (int64_t begin = 0; begin < tile.padded_columns; begin += kSummationBlock) {
    const int64_t end = block_end(tile, begin);
    F32x16 sum = splat(0.0f);
    F32x16 weight_sum = splat(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      const F32x16 value = load(tile.values + k * kLanes);
      const F32x16 weight = splat(weights[k]);
      const Mask16 counts = greater_equal(magnitude(value), splat(0.0f));
      sum = add_where(counts, sum, mul(weight, value));
      weight_sum = add_where(counts, weight_sum, weight);
    }
    total = add(total, sum);
    total_weight = add(total_weight, weight_sum);
  }
  return select(greater(total_weight, splat(0.0f)), div(total, total_weight), splat(0.0f));
}

// What the nearest levels of a fit cost each lane.
template <typename Fit>
F32x16 weighted_cost(const Fit& fit, const WeightTile& tile, const float* weights) {
  F32x16 total = splat(0.0f);
  for (int64_t begin = 0; begin < tile.padded_columns; begin += kSummationBlock) {
    const int64_t end = block_end(tile, begin);
    F32x16 sum = splat(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      const F32x16 left = fit.distance(magnitude(sub(load(tile.values + k * kLanes), fit.mean())));
      sum = add_where(greater_equal(left, splat(0.0f)), sum, mul(splat(weights[k]), mul(left, left)));
    }
    total = add(total, sum);
  }
  return total;
}

// Returns the lanes without a NaN or an infinity.
template <ElementType type>
Mask16 load_tile(const QuantizeTask& task, int64_t first_row, const WeightTile& tile) {
  const int64_t rows = task.out_features - first_row;
  F32x16 probe = splat(0.0f);  // NaN as soon as an element was not finite
  for (int64_t begin = 0; begin < tile.padded_columns; begin += kLanes) {
    const int64_t count = tile.columns - begin < kLanes ? tile.columns - begin : kLanes;
    F32x16 block[kLanes];
    for (int64_t row = 0; row < kLanes; ++row) {
      const int64_t index = (first_row + row) * task.weight.row_stride + begin;
      if (row >= rows) {
        block[row] = splat(0.0f);
      } else if (count == kLanes) {
        block[row] = load_elements<type>(task.weight.data, index);
      } else {
        block[row] = load_elements_partly<type>(task.weight.data, index, count);
      }
    }
    transpose(block);
    for (int64_t i = 0; i < kLanes; ++i) {
      F32x16 value = splat_bits(kNanBits);
      if (i < count) {
        value = mul(block[i], splat(task.inverse_column_scales[begin + i]));
        probe = add(probe, mul(value, splat(0.0f)));
      }
      store(tile.values + (begin + i) * kLanes, value);
    }
  }
  return greater_equal(probe, splat(0.0f));
}

inline Mask16 load_tile(const QuantizeTask& task, int64_t first_row, const WeightTile& tile) {
  switch (task.weight.type) {
    case ElementType::kFloat32:
      return load_tile<ElementType::kFloat32>(task, first_row, tile);
    case ElementType::kBFloat16:
      return load_tile<ElementType::kBFloat16>(task, first_row, tile);
    default:
      return load_tile<ElementType::kFloat16>(task, first_row, tile);
  }
}

// Rounds toward zero; lanes must be in the range of int32.
inline F32x16 whole_part(F32x16 a) { return float_from_int(truncate_to_int(a)); }

inline F32x16 round_to_float16(F32x16 a) {
  uint16_t halves[kLanes];
  store_float16(halves, a);
  return load_float16(halves);
}

}  // namespace
}  // namespace loop_singular_bit
