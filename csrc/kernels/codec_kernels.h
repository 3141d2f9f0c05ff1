// Dense rows <-> packed weight: what each instruction set provides for quantizing and dequantizing.
//
// Every function gives the same bytes on every instruction set: all take the same float32 steps in the same order.
#pragma once

#include <cstdint>

#include "linear_kernels.h"
#include "packed_weight_view.h"

namespace loop_singular_bit {

// Dense weight rows: element (n, k) lies at data + (n * row_stride + k) * element size.
struct DenseRows {
  const void* data;
  int64_t row_stride;
  ElementType type;
};

// Vectors over the columns are padded with zeros to a multiple of this.
constexpr int64_t kColumnPadding = 16;

// Scratch of quantize(): floats = kQuantizeScratchPerColumn * padded in_features + kQuantizeScratchPerOutlier *
// outliers.
constexpr int64_t kQuantizeScratchPerColumn = 32;
constexpr int64_t kQuantizeScratchPerOutlier = 32;

// Rounds of alternating least squares that the operator asks for; tests ask for fewer.
constexpr int32_t kFitRounds = 10;

// One weight to quantize and where its packed form goes (layout: packed_weight_view.h).
struct QuantizeTask {
  DenseRows weight;  // [out_features, in_features]
  int64_t out_features;
  int64_t in_features;
  int64_t planes;    // 1..8; above 4 the scales halve from plane to plane
  int64_t outliers;  // 0..in_features
  bool means;
  int32_t fit_rounds;

  // Vectors [in_features], padded.
  const float* inverse_column_scales;
  const float* fit_weights;        // >= 0: what a squared error of weight / column_scales costs in the fit
  const float* selection_weights;  // the same for choosing outliers

  int32_t* signs;
  uint16_t* scales;
  uint16_t* outlier_columns;
  int8_t* outlier_deltas;
  uint16_t* outlier_scales;
  uint16_t* row_means;  // nullptr unless means
};

struct CodecKernels {
  // Writes the row tiles [tile_begin, tile_end) of the packed weight, padded rows included. Returns -1, or the first
  // row that cannot be stored: it holds a NaN or an infinity, or a scale, mean or outlier scale beyond float16. What is
  // written of the row's tile is then meaningless.
  int64_t (*quantize)(const QuantizeTask& task, int64_t tile_begin, int64_t tile_end, float* scratch);

  // Writes row `row` of the weight to output[0 .. in_features). Outlier columns out of range are skipped.
  // scratch: in_features floats, padded to kColumnsPerWord.
  void (*dequantize_row)(const PackedWeightView& weight, int64_t row, float* scratch, void* output, ElementType type);

  // The largest |weight| of rows [row_begin, row_end), or -1 when one of them holds a NaN or an infinity.
  float (*largest_magnitude)(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end);

  // One half step of the rank-1 fit |weight| ~ r g': with r[n] = factor * sum_k |weight[n, k]| * projection[k] for rows
  // [row_begin, row_end) writes column_sums[k] = sum_n r[n] * factor * |weight[n, k]| and returns sum_n r[n]^2.
  // projection and column_sums: [columns], padded.
  float (*accumulate_column_scales)(const DenseRows& weight, int64_t columns, int64_t row_begin, int64_t row_end,
                                    float factor, const float* projection, float* column_sums);
};

}  // namespace loop_singular_bit
