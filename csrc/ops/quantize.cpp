// fit_column_scales and quantize: a dense weight [out_features, in_features] -> packed tensors.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "element_type.h"
#include "packed_weight_args.h"

namespace loop_singular_bit {
namespace {

constexpr int kColumnScaleRounds = 10;
constexpr double kColumnScaleTolerance = 1e-4;
constexpr double kSmallestColumnScale = 0.05;
constexpr double kLargestFloat16 = 65504.0;

// Sums over rows are split in the same way for any number of threads.
constexpr int64_t kRowChunks = 64;
constexpr int64_t kRowsPerChunk = 16;

int64_t padded(int64_t columns) { return (columns + kColumnPadding - 1) / kColumnPadding * kColumnPadding; }

// The rows of a matrix as kernels read them; keeps what they point into.
struct WeightRows {
  at::Tensor tensor;
  DenseRows rows;
  int64_t out_features;
  int64_t in_features;
};

WeightRows weight_rows(const at::Tensor& weight) {
  TORCH_CHECK(weight.device().is_cpu(), "weight: expected a CPU tensor, got one on ", weight.device());
  TORCH_CHECK(weight.dim() == 2, "weight: expected 2 dimensions [out_features, in_features], got shape ",
              weight.sizes());
  TORCH_CHECK(weight.size(0) >= 1, "weight: expected at least 1 row, got shape ", weight.sizes());
  TORCH_CHECK(weight.size(1) >= 1 && weight.size(1) <= kMaxInFeatures, "weight: expected 1 to ", kMaxInFeatures,
              " columns, got shape ", weight.sizes());
  const ElementType type = element_type(weight.scalar_type(), "weight");
  const at::Tensor tensor = weight.stride(1) == 1 ? weight : weight.contiguous();
  return {tensor, {tensor.const_data_ptr(), tensor.stride(0), type}, tensor.size(0), tensor.size(1)};
}

std::vector<float> column_vector(const at::Tensor& tensor, const char* name, int64_t columns) {
  TORCH_CHECK(tensor.device().is_cpu(), name, ": expected a CPU tensor, got one on ", tensor.device());
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == columns, name, ": expected shape [", columns,
              "], one value for each column, got ", tensor.sizes());
  const at::Tensor floats = tensor.to(at::kFloat).contiguous();
  const float* values = floats.const_data_ptr<float>();
  return std::vector<float>(values, values + columns);
}

std::vector<float> importance_or_ones(const std::optional<at::Tensor>& importance, int64_t columns) {
  if (!importance) return std::vector<float>(columns, 1.0f);
  TORCH_CHECK(importance->is_floating_point(), "column_importance: expected a floating-point dtype, got ",
              importance->scalar_type());
  std::vector<float> values = column_vector(*importance, "column_importance", columns);
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k) {
    TORCH_CHECK_VALUE(std::isfinite(values[k]) && values[k] >= 0,
                      "column_importance: expected finite values >= 0, got ", values[k], " at column ", k);
    sum += values[k];
  }
  TORCH_CHECK_VALUE(sum > 0, "column_importance: expected at least one value > 0, got only zeros");
  for (float& value : values) value = static_cast<float>(value * (columns / sum));
  return values;
}

[[noreturn]] void raise_non_finite(const WeightRows& weight) {
  const at::Tensor floats = weight.tensor.to(at::kFloat).contiguous();
  const float* values = floats.const_data_ptr<float>();
  for (int64_t i = 0; i < floats.numel(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(values[i]), "weight: expected finite values, got ", values[i], " at row ",
                      i / weight.in_features, ", column ", i % weight.in_features);
  }
  TORCH_CHECK(false, "weight: a kernel reported values that are not finite, but there are none");
}

// Rank-1 fit |weight| ~ r g' by alternating least squares, columns weighted by their importance; the column scales are
// g^(3/4). The full g divides by the magnitudes that outliers give a column too, and by the chance of a few hundred
// rows; measured on all-MiniLM-L6-v2, weight error and damage are lowest at exponents of 0.7 to 0.8 for 2, 3 and 4
// planes.
at::Tensor fit_column_scales(const at::Tensor& weight, const std::optional<at::Tensor>& column_importance) {
  const WeightRows dense = weight_rows(weight);
  const int64_t columns = dense.in_features;
  const std::vector<float> importance = importance_or_ones(column_importance, columns);
  const CodecKernels& kernels = checked_kernels().codec;

  const int64_t rows_per_chunk = std::max(kRowsPerChunk, (dense.out_features + kRowChunks - 1) / kRowChunks);
  const int64_t chunks = (dense.out_features + rows_per_chunk - 1) / rows_per_chunk;
  const auto chunk_end = [&](int64_t chunk) { return std::min(dense.out_features, (chunk + 1) * rows_per_chunk); };

  std::vector<float> chunk_largest(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      chunk_largest[chunk] = kernels.largest_magnitude(dense.rows, columns, chunk * rows_per_chunk, chunk_end(chunk));
    }
  });
  if (*std::min_element(chunk_largest.begin(), chunk_largest.end()) < 0) raise_non_finite(dense);
  const float largest = *std::max_element(chunk_largest.begin(), chunk_largest.end());

  std::vector<double> scales(columns, 1.0);
  if (largest > 0) {
    // A power of two keeps the squares of tiny and of huge weights in range.
    const float factor = std::ldexp(1.0f, std::clamp(-std::ilogb(largest), -126, 126));
    std::vector<float> projection(padded(columns), 0.0f);
    std::vector<float> chunk_sums(chunks * padded(columns));
    std::vector<float> chunk_squares(chunks);
    for (int round = 0; round < kColumnScaleRounds; ++round) {
      double norm = 0;
      for (int64_t k = 0; k < columns; ++k) norm += importance[k] * scales[k] * scales[k];
      for (int64_t k = 0; k < columns; ++k) projection[k] = static_cast<float>(importance[k] * scales[k] / norm);
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          chunk_squares[chunk] =
              kernels.accumulate_column_scales(dense.rows, columns, chunk * rows_per_chunk, chunk_end(chunk), factor,
                                               projection.data(), chunk_sums.data() + chunk * padded(columns));
        }
      });
      std::vector<double> fitted(columns, 0.0);
      double mean = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t k = 0; k < columns; ++k) fitted[k] += chunk_sums[chunk * padded(columns) + k];
      }
      for (const double value : fitted) mean += value / static_cast<double>(columns);
      if (!(mean > 0)) break;  // every column with weight has importance 0
      double change = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double scale = fitted[k] / mean;
        change = std::max(change, std::abs(scale - scales[k]) / std::max(scale, kSmallestColumnScale));
        scales[k] = scale;
      }
      if (change < kColumnScaleTolerance) break;
    }
  }

  double mean = 0;
  for (double& scale : scales) {
    scale = std::sqrt(scale) * std::sqrt(std::sqrt(scale));
    mean += scale / static_cast<double>(columns);
  }
  at::Tensor result = at::empty({columns}, at::kHalf);
  at::Half* halves = result.mutable_data_ptr<at::Half>();
  for (int64_t k = 0; k < columns; ++k) {
    halves[k] = static_cast<float>(std::clamp(scales[k] / mean, kSmallestColumnScale, kLargestFloat16));
  }
  return result;
}

[[noreturn]] void raise_failed_row(const WeightRows& weight, int64_t row) {
  const at::Tensor floats = weight.tensor.select(0, row).to(at::kFloat).contiguous();
  const float* values = floats.const_data_ptr<float>();
  for (int64_t k = 0; k < weight.in_features; ++k) {
    TORCH_CHECK_VALUE(std::isfinite(values[k]), "weight: expected finite values, got ", values[k], " at row ", row,
                      ", column ", k);
  }
  TORCH_CHECK_VALUE(false, "weight: row ", row,
                    " is too large to pack: its scales, in float16, must not exceed 65504; its largest magnitude is ",
                    floats.abs().max().item<float>());
}

using PackedTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

PackedTensors quantize(const at::Tensor& weight, int64_t planes, int64_t outliers,
                       const std::optional<at::Tensor>& column_scales,
                       const std::optional<at::Tensor>& column_importance, bool means) {
  const WeightRows dense = weight_rows(weight);
  const int64_t columns = dense.in_features;
  TORCH_CHECK_VALUE(planes >= 1 && planes <= kMaxPlanes, "planes: expected 1 to ", kMaxPlanes, ", got ", planes);
  TORCH_CHECK_VALUE(outliers >= 0 && outliers <= columns, "outliers: expected 0 to in_features = ", columns,
                    " a row, got ", outliers);

  std::vector<float> inverse_scales(padded(columns), 0.0f);
  std::vector<float> fit_weights(padded(columns), 0.0f);
  std::vector<float> selection_weights(padded(columns), 0.0f);
  std::vector<float> scales(columns, 1.0f);
  if (column_scales) {
    TORCH_CHECK(column_scales->scalar_type() == at::kHalf, "column_scales: expected dtype float16, got ",
                column_scales->scalar_type());
    scales = column_vector(*column_scales, "column_scales", columns);
  }
  const std::vector<float> importance = importance_or_ones(column_importance, columns);
  double square_sum = 0;
  for (int64_t k = 0; k < columns; ++k) {
    TORCH_CHECK_VALUE(std::isfinite(scales[k]) && scales[k] > 0, "column_scales: expected finite values > 0, got ",
                      scales[k], " at column ", k);
    square_sum += static_cast<double>(scales[k]) * scales[k];
  }
  for (int64_t k = 0; k < columns; ++k) {
    const double square = static_cast<double>(scales[k]) * scales[k] * (columns / square_sum);
    inverse_scales[k] = 1.0f / scales[k];
    selection_weights[k] = static_cast<float>(square);
    fit_weights[k] = static_cast<float>(square * importance[k]);
  }

  const int64_t row_tiles = (dense.out_features - 1) / kRowsPerTile + 1;
  const int64_t words = (columns - 1) / kColumnsPerWord + 1;
  at::Tensor signs = at::empty({row_tiles, planes, words, kRowsPerTile}, at::kInt);
  at::Tensor plane_scales = at::empty({row_tiles, planes, kRowsPerTile}, at::kHalf);
  at::Tensor outlier_columns = at::empty({row_tiles, outliers, kRowsPerTile}, at::kUInt16);
  at::Tensor outlier_deltas = at::empty({row_tiles, outliers, kRowsPerTile}, at::kChar);
  at::Tensor outlier_scales = at::empty({row_tiles, kRowsPerTile}, at::kHalf);
  at::Tensor row_means = at::empty({means ? row_tiles : 0, kRowsPerTile}, at::kHalf);

  QuantizeTask task{};
  task.weight = dense.rows;
  task.out_features = dense.out_features;
  task.in_features = columns;
  task.planes = planes;
  task.outliers = outliers;
  task.means = means;
  task.fit_rounds = kFitRounds;
  task.inverse_column_scales = inverse_scales.data();
  task.fit_weights = fit_weights.data();
  task.selection_weights = selection_weights.data();
  task.signs = signs.mutable_data_ptr<int32_t>();
  task.scales = static_cast<uint16_t*>(plane_scales.mutable_data_ptr());
  task.outlier_columns = static_cast<uint16_t*>(outlier_columns.mutable_data_ptr());
  task.outlier_deltas = outlier_deltas.mutable_data_ptr<int8_t>();
  task.outlier_scales = static_cast<uint16_t*>(outlier_scales.mutable_data_ptr());
  task.row_means = means ? static_cast<uint16_t*>(row_means.mutable_data_ptr()) : nullptr;

  const CodecKernels& kernels = checked_kernels().codec;
  const int64_t scratch_floats = kQuantizeScratchPerColumn * padded(columns) + kQuantizeScratchPerOutlier * outliers;
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_failed{kNone};
  at::parallel_for(0, row_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_floats);
    const int64_t failed = kernels.quantize(task, begin, end, scratch.data());
    if (failed < 0) return;
    int64_t known = first_failed.load();
    while (failed < known && !first_failed.compare_exchange_weak(known, failed)) {
    }
  });
  if (first_failed.load() != kNone) raise_failed_row(dense, first_failed.load());
  return {signs, plane_scales, outlier_columns, outlier_deltas, outlier_scales, row_means};
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) {
  m.impl("fit_column_scales", &loop_singular_bit::fit_column_scales);
  m.impl("quantize", &loop_singular_bit::quantize);
}
