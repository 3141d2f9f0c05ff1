// Dense rows -> packed weight. Include after a simd/ header.
//
// Works on weight / column_scales, sixteen rows at a time: fit the planes (PlaneFit, UniformFit), take out as outliers
// what they leave behind, fit them again to the rest, round everything to the format, choose the signs nearest under
// the rounded scales, and store what is missing at the outliers as int8 multiples of a row's outlier scale.
#pragma once

#include "generic/outlier_selection.h"
#include "generic/plane_fit.h"
#include "generic/uniform_fit.h"
#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

constexpr float kLargestDelta = 127.0f;

template <typename Fit>
void score_columns(const Fit& fit, const WeightTile& tile, const float* weights, float* scores) {
  for (int64_t k = 0; k < tile.padded_columns; ++k) {
    F32x16 value = load(tile.values + k * kLanes);
    if (Fit::kHasMean) value = sub(value, fit.mean());
    const F32x16 distance = fit.distance(magnitude(value));
    store(scores + k * kLanes, mul(splat(weights[k]), mul(distance, distance)));
  }
}

// Fits the planes to everything but the outliers, which are left out of the tile.
template <typename Fit>
void fit_with_outliers(const QuantizeTask& task, const WeightTile& tile, const OutlierList& outliers, float* scores,
                       Fit* fit) {
  if (outliers.count > 0) {
    // One weight of a hundred standard deviations would lead the fit astray: the largest go out before it.
    fit->clear(tile, task.fit_weights);
    score_columns(*fit, tile, task.selection_weights, scores);
    take_outliers(scores, tile, outliers);
  }
  fit->fit(tile, task.fit_weights, task.fit_rounds);
  if (outliers.count == 0) return;
  // Now by what the planes leave behind. Doing this once more changes nothing worth its time.
  put_outliers_back(tile, outliers);
  score_columns(*fit, tile, task.selection_weights, scores);
  take_outliers(scores, tile, outliers);
  fit->refine(tile, task.fit_weights, (task.fit_rounds + 1) / 2);
}

// Writes the signs of sixteen rows: `signs` points at lane 0 of plane 0, word 0. Rows outside `valid` get 0 bits.
template <typename Fit>
void write_signs(const Fit& fit, const WeightTile& tile, int64_t words, Mask16 valid, int32_t* signs) {
  const F32x16 zero = splat(0.0f);
  const F32x16 all_planes = splat_bits((1u << Fit::kCount) - 1);
  for (int64_t word = 0; word < words; ++word) {
    const int64_t begin = word * kColumnsPerWord;
    const int64_t count = tile.columns - begin < kColumnsPerWord ? tile.columns - begin : kColumnsPerWord;
    F32x16 bits[Fit::kCount];
    for (int p = 0; p < Fit::kCount; ++p) bits[p] = zero;
    for (int64_t i = 0; i < count; ++i) {
      F32x16 value = load(tile.values + (begin + i) * kLanes);
      if (Fit::kHasMean) value = sub(value, fit.mean());
      F32x16 code = fit.code(magnitude(value));
      code = bits_xor(code, keep(greater(zero, value), all_planes));
      const F32x16 bit = splat_bits(1u << i);
      for (int p = 0; p < Fit::kCount; ++p) {
        bits[p] = bits_or_where(has_bits(code, splat_bits(1u << (Fit::kCount - 1 - p))), bits[p], bit);
      }
    }
    for (int p = 0; p < Fit::kCount; ++p) {
      float lanes[kLanes];
      store(lanes, keep(valid, bits[p]));
      __builtin_memcpy(signs + (p * words + word) * kRowsPerTile, lanes, sizeof(lanes));
    }
  }
}

// Scales of the int8 deltas: float16 whose 127-fold reaches `largest`, or falls short of it by less than half a step
// (which only the coarse subnormals could do).
inline F32x16 outlier_scale(F32x16 largest) {
  uint16_t halves[kLanes];
  store_float16(halves, mul(largest, splat(1.0f / kLargestDelta)));
  const uint32_t too_small = mask_bits(greater(largest, mul(load_float16(halves), splat(kLargestDelta + 0.5f))));
  for (int lane = 0; lane < kLanes; ++lane)
    halves[lane] = static_cast<uint16_t>(halves[lane] + (too_small >> lane & 1));
  return load_float16(halves);
}

// Nearest integer, halves to even; |a| < 2^22. Adding 1.5 * 2^23 leaves no bits for a fraction.
inline F32x16 round_to_whole(F32x16 a) {
  const F32x16 shift = splat(12582912.0f);
  return sub(add(a, shift), shift);
}

// Writes slots of sixteen rows: pointers are at lane 0, slot 0. Overwrites outliers.values. Rows outside `valid` get
// zeros. Returns the outlier scales.
template <typename Fit>
F32x16 write_outliers(const Fit& fit, const OutlierList& outliers, Mask16 valid, uint16_t* columns, int8_t* deltas) {
  const F32x16 zero = splat(0.0f);
  F32x16 largest = zero;
  for (int64_t i = 0; i < outliers.count; ++i) {
    const F32x16 value = load(outliers.values + i * kLanes);
    const F32x16 centered = Fit::kHasMean ? sub(value, fit.mean()) : value;
    const F32x16 code = fit.code(magnitude(centered));
    F32x16 planes = zero;
    for (int p = 0; p < Fit::kCount; ++p) {
      const F32x16 scale = fit.scale(p);
      const Mask16 plus = has_bits(code, splat_bits(1u << (Fit::kCount - 1 - p)));
      planes = add(planes, select(plus, scale, sub(zero, scale)));
    }
    const F32x16 delta = sub(centered, select(greater(zero, centered), sub(zero, planes), planes));
    store(outliers.values + i * kLanes, delta);
    largest = max(magnitude(delta), largest);
  }
  const F32x16 scale = outlier_scale(largest);
  const F32x16 per_scale = select(greater(scale, zero), div(splat(1.0f), scale), zero);
  const uint32_t valid_bits = mask_bits(valid);
  for (int64_t i = 0; i < outliers.count; ++i) {
    const F32x16 multiple = mul(load(outliers.values + i * kLanes), per_scale);
    const F32x16 clamped = max(min(multiple, splat(kLargestDelta)), splat(-kLargestDelta));
    float delta[kLanes];
    store(delta, round_to_whole(clamped));
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool used = (valid_bits >> lane & 1) != 0;
      columns[i * kRowsPerTile + lane] = used ? static_cast<uint16_t>(outliers.columns[i * kLanes + lane]) : 0;
      deltas[i * kRowsPerTile + lane] = used ? static_cast<int8_t>(delta[lane]) : 0;
    }
  }
  return scale;
}

// Quantizes rows [first_row, first_row + 16), some of which may be padding. Returns the lanes that failed.
template <typename Fit>
uint32_t quantize_lanes(const QuantizeTask& task, int64_t first_row, float* scratch) {
  const int64_t words = (task.in_features + kColumnsPerWord - 1) / kColumnsPerWord;
  const int64_t padded_columns = (task.in_features + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
  const WeightTile tile = {scratch, task.in_features, padded_columns};
  float* scores = tile.values + padded_columns * kLanes;
  float* outlier_values = scores + padded_columns * kLanes;
  float* outlier_columns = outlier_values + task.outliers * kLanes;
  const OutlierList outliers = {reinterpret_cast<int32_t*>(outlier_columns), outlier_values, task.outliers};

  const int64_t row_tile = first_row / kRowsPerTile;
  const int64_t lane = first_row % kRowsPerTile;
  const int64_t rows = task.out_features - first_row;
  const uint32_t valid_bits = rows >= kLanes ? 0xffffu : rows <= 0 ? 0u : (1u << rows) - 1;
  const Mask16 valid = mask_from_bits(valid_bits);

  const uint32_t finite = mask_bits(load_tile(task, first_row, tile));
  if ((~finite & valid_bits) != 0) return ~finite & valid_bits;

  Fit fit;
  fit_with_outliers(task, tile, outliers, scores, &fit);
  fit.round_to_format(tile, task.fit_weights);
  put_outliers_back(tile, outliers);

  write_signs(fit, tile, words, valid, task.signs + row_tile * Fit::kCount * words * kRowsPerTile + lane);
  const F32x16 scale =
      write_outliers(fit, outliers, valid, task.outlier_columns + row_tile * task.outliers * kRowsPerTile + lane,
                     task.outlier_deltas + row_tile * task.outliers * kRowsPerTile + lane);
  store_float16(task.outlier_scales + row_tile * kRowsPerTile + lane, keep(valid, scale));
  for (int p = 0; p < Fit::kCount; ++p) {
    store_float16(task.scales + (row_tile * Fit::kCount + p) * kRowsPerTile + lane, keep(valid, fit.scale(p)));
  }
  if (Fit::kHasMean) store_float16(task.row_means + row_tile * kRowsPerTile + lane, keep(valid, fit.mean()));

  const F32x16 limit = splat(kLargestFloat16);
  const uint32_t stored = mask_bits(greater_equal(limit, fit.scale(0))) & mask_bits(greater_equal(limit, scale)) &
                          mask_bits(greater_equal(limit, magnitude(fit.mean())));
  return ~stored & valid_bits;
}

template <typename Fit>
int64_t quantize_tiles(const QuantizeTask& task, int64_t tile_begin, int64_t tile_end, float* scratch) {
  for (int64_t row = tile_begin * kRowsPerTile; row < tile_end * kRowsPerTile; row += kLanes) {
    const uint32_t failed = quantize_lanes<Fit>(task, row, scratch);
    if (failed != 0) return row + __builtin_ctz(failed);
  }
  return -1;
}

template <bool kMeans>
int64_t quantize_planes(const QuantizeTask& task, int64_t tile_begin, int64_t tile_end, float* scratch) {
  switch (task.planes) {
    case 1:
      return quantize_tiles<PlaneFit<1, kMeans>>(task, tile_begin, tile_end, scratch);
    case 2:
      return quantize_tiles<PlaneFit<2, kMeans>>(task, tile_begin, tile_end, scratch);
    case 3:
      return quantize_tiles<PlaneFit<3, kMeans>>(task, tile_begin, tile_end, scratch);
    case 4:
      return quantize_tiles<PlaneFit<4, kMeans>>(task, tile_begin, tile_end, scratch);
    case 5:
      return quantize_tiles<UniformFit<5, kMeans>>(task, tile_begin, tile_end, scratch);
    case 6:
      return quantize_tiles<UniformFit<6, kMeans>>(task, tile_begin, tile_end, scratch);
    case 7:
      return quantize_tiles<UniformFit<7, kMeans>>(task, tile_begin, tile_end, scratch);
    default:
      return quantize_tiles<UniformFit<8, kMeans>>(task, tile_begin, tile_end, scratch);
  }
}

inline int64_t quantize(const QuantizeTask& task, int64_t tile_begin, int64_t tile_end, float* scratch) {
  return task.means ? quantize_planes<true>(task, tile_begin, tile_end, scratch)
                    : quantize_planes<false>(task, tile_begin, tile_end, scratch);
}

}  // namespace
}  // namespace loop_singular_bit
