// quantize_calibrated: a dense weight and the second moment of its inputs -> packed tensors.
//
// Minimizes tr(E H E') over signs, scales and outlier deltas: a fit and a sweep to start with, then rounds of least
// squares in the scales and coordinate descent over the rest. What is computed for a row block or a matrix tile does
// not depend on which thread does it: the bytes are those of one thread.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "element_type.h"
#include "packed_weight_args.h"

namespace loop_singular_bit {
namespace {

constexpr int64_t kMaxCalibratedPlanes = 4;
constexpr int kDampingAttempts = 6;
constexpr double kSmallestRaisedDamping = 1e-3;
constexpr int64_t kBlocksPerChunk = 4;
constexpr double kColumnRidge = 1e-2;
constexpr int kColumnSolverSteps = 30;
constexpr double kColumnSolverTolerance = 1e-4;
constexpr float kLargestColumnFactor = 8.0f;

int64_t padded_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Work items in an order that gives two halves of a triangle about the same work.
int64_t alternate(int64_t index, int64_t count) { return index % 2 == 0 ? index / 2 : count - 1 - index / 2; }

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[std::max<int64_t>(count, 1)]); }

// H over the columns divided by their scales, as lower and upper triangle, and its damping.
class Hessian {
 public:
  Hessian(const at::Tensor& second_moment, const std::vector<float>& column_scales)
      : columns_(second_moment.size(0)),
        stride_(padded_to(columns_, kBlockColumns)),
        values_(floats(columns_ * stride_)),
        factor_(floats(columns_ * stride_)) {
    const float* source = second_moment.const_data_ptr<float>();
    at::parallel_for(0, columns_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        float* row = values_.get() + j * stride_;
        for (int64_t k = 0; k < columns_; ++k) row[k] = source[j * columns_ + k] * column_scales[j] * column_scales[k];
        std::fill(row + columns_, row + stride_, 0.0f);
      }
    });
    for (int64_t k = 0; k < columns_; ++k) mean_ += static_cast<double>(at(k)) / static_cast<double>(columns_);
    TORCH_CHECK_VALUE(std::isfinite(mean_) && mean_ > 0,
                      "hessian: expected finite values and a positive mean on the diagonal, got a mean of ", mean_);
    for (int64_t k = 0; k < columns_; ++k) {
      TORCH_CHECK_VALUE(at(k) >= 0, "hessian: expected a diagonal >= 0, got ", at(k), " at column ", k);
      // Nothing ever came in here: any value of the weight will do, only not a singular matrix.
      if (at(k) == 0) at(k) = static_cast<float>(mean_);
    }
  }

  // Adds `damping` times the mean of the diagonal to the diagonal and factors; ten times as much as long as that fails.
  // Returns the damping that worked.
  double damp_and_factor(double damping) {
    double added = 0;
    for (int attempt = 0; attempt < kDampingAttempts; ++attempt) {
      for (int64_t k = 0; k < columns_; ++k) at(k) += static_cast<float>((damping - added) * mean_);
      added = damping;
      std::memcpy(factor_.get(), values_.get(), columns_ * stride_ * sizeof(float));
      if (factor()) return damping;
      damping = std::max(10 * damping, kSmallestRaisedDamping);
    }
    TORCH_CHECK_VALUE(false, "hessian: not positive definite, even with a damping of ", added,
                      " times the mean of its diagonal");
  }

  CalibrationProblem problem(const std::vector<float>& column_factors) const {
    return {values_.get(), factor_.get(), stride_, column_factors.data()};
  }

  int64_t stride() const { return stride_; }
  const float* row(int64_t k) const { return values_.get() + k * stride_; }
  float pivot(int64_t k) const { return factor_[k * stride_ + k]; }

  // The factor's memory, for other matrices of the same shape, once the factor is not needed any more.
  float* reuse_factor() { return factor_.get(); }

 private:
  float& at(int64_t k) { return values_[k * stride_ + k]; }

  bool factor() {
    const CalibratedKernels& kernels = checked_kernels().calibrated;
    const Floats negated = floats(kBlockColumns * stride_);
    for (int64_t begin = (columns_ - 1) / kBlockColumns * kBlockColumns; begin >= 0; begin -= kBlockColumns) {
      const int64_t end = std::min(begin + kBlockColumns, columns_);
      if (kernels.factor_diagonal(factor_.get(), stride_, begin, end) >= 0) return false;
      const int64_t tiles = begin / kBlockColumns;
      at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) {
          kernels.factor_panel(factor_.get(), stride_, begin, end, tile * kBlockColumns, negated.get());
        }
      });
      at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) {
          const int64_t lanes = alternate(index, tiles) * kBlockColumns;
          kernels.multiply_add(negated.get() + lanes, stride_, 1, end - begin, begin - lanes,
                               factor_.get() + begin * stride_ + lanes, stride_,
                               factor_.get() + lanes * stride_ + lanes, stride_);
        }
      });
    }
    return true;
  }

  int64_t columns_;
  int64_t stride_;
  Floats values_;
  Floats factor_;
  double mean_ = 0;
};

// What quantize() gives with the diagonal of the problem as importance: scales and places of outliers to start from.
struct Start {
  at::Tensor scales;
  at::Tensor outlier_columns;
};

Start fit_start(const at::Tensor& weight, int64_t planes, int64_t outliers, const std::vector<float>& column_scales,
                const Hessian& hessian) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const int64_t padded = padded_to(columns, kColumnPadding);
  std::vector<float> inverse_scales(padded, 0.0f);
  std::vector<float> fit_weights(padded, 0.0f);
  std::vector<float> selection_weights(padded, 0.0f);
  double square_sum = 0;
  double pivot_sum = 0;
  for (int64_t k = 0; k < columns; ++k) {
    square_sum += static_cast<double>(column_scales[k]) * column_scales[k];
    pivot_sum += static_cast<double>(hessian.pivot(k)) * hessian.pivot(k);
  }
  for (int64_t k = 0; k < columns; ++k) {
    const double square = static_cast<double>(column_scales[k]) * column_scales[k];
    const double pivot = static_cast<double>(hessian.pivot(k)) * hessian.pivot(k);
    inverse_scales[k] = 1.0f / column_scales[k];
    selection_weights[k] = static_cast<float>(square * (columns / square_sum));
    fit_weights[k] = static_cast<float>(pivot * (columns / pivot_sum));
  }
  const int64_t row_tiles = (rows - 1) / kRowsPerTile + 1;
  const int64_t words = (columns - 1) / kColumnsPerWord + 1;
  at::Tensor signs = at::empty({row_tiles, planes, words, kRowsPerTile}, at::kInt);
  at::Tensor deltas = at::empty({row_tiles, outliers, kRowsPerTile}, at::kChar);
  at::Tensor outlier_scales = at::empty({row_tiles, kRowsPerTile}, at::kHalf);
  Start start{at::empty({row_tiles, planes, kRowsPerTile}, at::kHalf),
              at::empty({row_tiles, outliers, kRowsPerTile}, at::kUInt16)};

  QuantizeTask task{};
  task.weight = {weight.const_data_ptr(), weight.stride(0), element_type(weight.scalar_type(), "weight")};
  task.out_features = rows;
  task.in_features = columns;
  task.planes = planes;
  task.outliers = outliers;
  task.means = false;
  task.fit_rounds = kFitRounds;
  task.inverse_column_scales = inverse_scales.data();
  task.fit_weights = fit_weights.data();
  task.selection_weights = selection_weights.data();
  task.signs = signs.mutable_data_ptr<int32_t>();
  task.scales = static_cast<uint16_t*>(start.scales.mutable_data_ptr());
  task.outlier_columns = static_cast<uint16_t*>(start.outlier_columns.mutable_data_ptr());
  task.outlier_deltas = deltas.mutable_data_ptr<int8_t>();
  task.outlier_scales = static_cast<uint16_t*>(outlier_scales.mutable_data_ptr());

  const CodecKernels& kernels = checked_kernels().codec;
  std::vector<int64_t> failed(row_tiles, -1);
  at::parallel_for(0, row_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kQuantizeScratchPerColumn * padded + kQuantizeScratchPerOutlier * outliers);
    for (int64_t tile = begin; tile < end; ++tile)
      failed[tile] = kernels.quantize(task, tile, tile + 1, scratch.data());
  });
  for (const int64_t row : failed) {
    TORCH_CHECK_VALUE(row < 0, "weight: row ", row,
                      " is too large to pack: its scales, in float16, must not exceed 65504");
  }
  return start;
}

// A weight in blocks of 64 rows, on its way to the packed form.
class CalibratedWeight {
 public:
  CalibratedWeight(const at::Tensor& weight, const Start& start, const std::vector<float>& column_scales)
      : rows_(weight.size(0)),
        columns_(weight.size(1)),
        planes_(start.scales.size(1)),
        outliers_(start.outlier_columns.size(1)),
        blocks_((rows_ - 1) / kBlockRows + 1),
        weight_(floats(blocks_ * block_floats())),
        plane_values_(floats(blocks_ * block_floats())),
        gradient_(floats(blocks_ * block_floats())),
        scales_(blocks_ * planes_ * kBlockRows, 0.0f),
        outlier_columns_(blocks_ * outliers_ * kBlockRows, 0),
        outlier_deltas_(blocks_ * outliers_ * kBlockRows, 0.0f),
        outlier_scales_(blocks_ * kBlockRows, 0.0f),
        outlier_begin_(blocks_ * (columns_ + 1), 0),
        outlier_slots_(blocks_ * outliers_ * kBlockRows, 0) {
    const float* source = weight.const_data_ptr<float>();
    const at::Half* start_scales = start.scales.const_data_ptr<at::Half>();
    const uint16_t* start_columns = static_cast<const uint16_t*>(start.outlier_columns.const_data_ptr());
    std::vector<float> inverse(columns_);
    for (int64_t k = 0; k < columns_; ++k) inverse[k] = 1.0f / column_scales[k];
    at::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* target = weight_.get() + b * block_floats();
        std::fill(target, target + block_floats(), 0.0f);
        std::fill_n(plane_values_.get() + b * block_floats(), block_floats(), 0.0f);
        const int64_t valid = std::min(kBlockRows, rows_ - b * kBlockRows);
        for (int64_t row = 0; row < valid; ++row) {
          const float* values = source + (b * kBlockRows + row) * columns_;
          for (int64_t k = 0; k < columns_; ++k) target[k * kBlockRows + row] = values[k] * inverse[k];
        }
        for (int64_t row = 0; row < valid; ++row) {
          const int64_t tile = (b * kBlockRows + row) / kRowsPerTile;
          const int64_t lane = row % kRowsPerTile;
          for (int64_t p = 0; p < planes_; ++p) {
            scales_[(b * planes_ + p) * kBlockRows + row] =
                static_cast<float>(start_scales[(tile * planes_ + p) * kRowsPerTile + lane]);
          }
          for (int64_t o = 0; o < outliers_; ++o) {
            outlier_columns_[(b * outliers_ + o) * kBlockRows + row] =
                start_columns[(tile * outliers_ + o) * kRowsPerTile + lane];
          }
        }
        sort_outliers(b, valid);
      }
    });
  }

  int64_t blocks() const { return blocks_; }

  CalibratedBlock block(int64_t b) {
    return {columns_,
            planes_,
            outliers_,
            weight_.get() + b * block_floats(),
            plane_values_.get() + b * block_floats(),
            gradient_.get() + b * block_floats(),
            scales_.data() + b * planes_ * kBlockRows,
            outlier_columns_.data() + b * outliers_ * kBlockRows,
            outlier_deltas_.data() + b * outliers_ * kBlockRows,
            outlier_scales_.data() + b * kBlockRows,
            outlier_begin_.data() + b * (columns_ + 1),
            outlier_slots_.data() + b * outliers_ * kBlockRows};
  }

  // signs, scales, outlier_columns, outlier_deltas, outlier_scales.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed() {
    const int64_t row_tiles = (rows_ - 1) / kRowsPerTile + 1;
    const int64_t words = (columns_ - 1) / kColumnsPerWord + 1;
    at::Tensor signs = at::empty({row_tiles, planes_, words, kRowsPerTile}, at::kInt);
    at::Tensor scales = at::zeros({row_tiles, planes_, kRowsPerTile}, at::kHalf);
    at::Tensor columns = at::zeros({row_tiles, outliers_, kRowsPerTile}, at::kUInt16);
    at::Tensor deltas = at::zeros({row_tiles, outliers_, kRowsPerTile}, at::kChar);
    at::Tensor outlier_scales = at::zeros({row_tiles, kRowsPerTile}, at::kHalf);
    int32_t* sign_words = signs.mutable_data_ptr<int32_t>();
    at::Half* scale_values = scales.mutable_data_ptr<at::Half>();
    uint16_t* column_values = static_cast<uint16_t*>(columns.mutable_data_ptr());
    int8_t* delta_values = deltas.mutable_data_ptr<int8_t>();
    at::Half* outlier_scale_values = outlier_scales.mutable_data_ptr<at::Half>();
    const CalibratedKernels& kernels = checked_kernels().calibrated;
    at::parallel_for(0, row_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t b = tile * kRowsPerTile / kBlockRows;
        const int64_t first_row = tile * kRowsPerTile % kBlockRows;
        const CalibratedBlock source = block(b);
        kernels.write_signs(source, first_row, rows_ - b * kBlockRows,
                            sign_words + tile * planes_ * words * kRowsPerTile);
        const int64_t valid = std::min(kRowsPerTile, rows_ - tile * kRowsPerTile);
        for (int64_t lane = 0; lane < valid; ++lane) {
          const int64_t row = first_row + lane;
          outlier_scale_values[tile * kRowsPerTile + lane] = source.outlier_scales[row];
          for (int64_t p = 0; p < planes_; ++p) {
            scale_values[(tile * planes_ + p) * kRowsPerTile + lane] = source.scales[p * kBlockRows + row];
          }
          for (int64_t o = 0; o < outliers_; ++o) {
            const int64_t target = (tile * outliers_ + o) * kRowsPerTile + lane;
            column_values[target] = source.outlier_columns[o * kBlockRows + row];
            delta_values[target] = static_cast<int8_t>(source.outlier_deltas[o * kBlockRows + row]);
          }
        }
      }
    });
    return {signs, scales, columns, deltas, outlier_scales};
  }

 private:
  int64_t block_floats() const { return columns_ * kBlockRows; }

  void sort_outliers(int64_t b, int64_t valid_rows) {
    int32_t* begin = outlier_begin_.data() + b * (columns_ + 1);
    int32_t* slots = outlier_slots_.data() + b * outliers_ * kBlockRows;
    const uint16_t* columns = outlier_columns_.data() + b * outliers_ * kBlockRows;
    for (int64_t o = 0; o < outliers_; ++o) {
      for (int64_t row = 0; row < valid_rows; ++row) ++begin[columns[o * kBlockRows + row] + 1];
    }
    for (int64_t k = 0; k < columns_; ++k) begin[k + 1] += begin[k];
    std::vector<int32_t> next(begin, begin + columns_);
    for (int64_t o = 0; o < outliers_; ++o) {
      for (int64_t row = 0; row < valid_rows; ++row) {
        slots[next[columns[o * kBlockRows + row]]++] = static_cast<int32_t>(o * kBlockRows + row);
      }
    }
  }

  int64_t rows_;
  int64_t columns_;
  int64_t planes_;
  int64_t outliers_;
  int64_t blocks_;
  Floats weight_;
  Floats plane_values_;
  Floats gradient_;
  std::vector<float> scales_;
  std::vector<uint16_t> outlier_columns_;
  std::vector<float> outlier_deltas_;
  std::vector<float> outlier_scales_;
  std::vector<int32_t> outlier_begin_;
  std::vector<int32_t> outlier_slots_;
};

// Least squares in the column scales, everything else fixed: (H o Q'Q) change = sum over rows of Q o gradient, with
// Q = approximation / column_factors.
class ColumnScaleFit {
 public:
  // `matrix`: room for columns x stride floats.
  ColumnScaleFit(CalibratedWeight& weight, const Hessian& hessian, int64_t columns, float* matrix)
      : weight_(weight), hessian_(hessian), columns_(columns), stride_(hessian.stride()), matrix_(matrix) {}

  // Returns whether it found column factors that lower the loss; they are such that column_scales * column_factors is
  // of float16. The gradients are then out of date.
  bool improve(const std::vector<float>& column_scales, std::vector<float>* column_factors) {
    sum_right();
    sum_matrix();
    const std::vector<float> change = solve();
    std::vector<float> rounded(columns_);
    std::vector<float> rounded_change(stride_, 0.0f);
    for (int64_t k = 0; k < columns_; ++k) {
      const float present = (*column_factors)[k];
      const float factor =
          std::clamp(present + change[k], 1.0f / kLargestColumnFactor, kLargestColumnFactor) * column_scales[k];
      const float stored = static_cast<float>(static_cast<at::Half>(factor));
      const bool usable = stored > 0 && std::isfinite(stored);
      rounded[k] = usable ? stored / column_scales[k] : present;
      rounded_change[k] = rounded[k] - present;
    }
    std::vector<float> product(stride_, 0.0f);
    multiply(rounded_change, &product);
    double gain = 0;
    for (int64_t k = 0; k < columns_; ++k) {
      gain += static_cast<double>(rounded_change[k]) * (2 * right_[k] - static_cast<double>(product[k]));
    }
    if (!(gain > 0)) return false;
    *column_factors = rounded;
    return true;
  }

 private:
  void sum_right() {
    const CalibratedKernels& kernels = checked_kernels().calibrated;
    std::vector<double> sums(weight_.blocks() * columns_);
    at::parallel_for(0, weight_.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) kernels.sum_column_gradients(weight_.block(b), sums.data() + b * columns_);
    });
    right_.assign(columns_, 0.0);
    for (int64_t b = 0; b < weight_.blocks(); ++b) {
      for (int64_t k = 0; k < columns_; ++k) right_[k] += sums[b * columns_ + k];
    }
  }

  void sum_matrix() {
    const CalibratedKernels& kernels = checked_kernels().calibrated;
    const int64_t tiles = stride_ / kBlockColumns;
    const Floats rows = floats(kBlocksPerChunk * kBlockRows * stride_);
    std::fill_n(rows.get(), kBlocksPerChunk * kBlockRows * stride_, 0.0f);
    std::fill_n(matrix_, columns_ * stride_, 0.0f);
    for (int64_t first = 0; first < weight_.blocks(); first += kBlocksPerChunk) {
      const int64_t count = std::min(kBlocksPerChunk, weight_.blocks() - first);
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          kernels.write_rows(weight_.block(first + b), rows.get() + b * kBlockRows * stride_, stride_);
        }
      });
      at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t lanes = alternate(index, tiles) * kBlockColumns;
          kernels.multiply_add(rows.get() + lanes, stride_, 1, count * kBlockRows, columns_ - lanes, rows.get() + lanes,
                               stride_, matrix_ + lanes * stride_ + lanes, stride_);
        }
      });
    }
    at::parallel_for(0, columns_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const float* hessian = hessian_.row(j);
        for (int64_t k = 0; k <= j; ++k) {
          const float value = matrix_[j * stride_ + k] * hessian[k];
          matrix_[j * stride_ + k] = value;
          matrix_[k * stride_ + j] = value;
        }
      }
    });
  }

  // Conjugate gradients, with a ridge toward the present factors.
  std::vector<float> solve() const {
    double ridge = 0;
    for (int64_t k = 0; k < columns_; ++k) ridge += matrix_[k * stride_ + k];
    ridge *= kColumnRidge / static_cast<double>(columns_);
    std::vector<float> solution(stride_, 0.0f);
    if (!(ridge > 0)) return solution;
    std::vector<double> residual = right_;
    std::vector<double> inverse(columns_);
    for (int64_t k = 0; k < columns_; ++k) inverse[k] = 1.0 / (matrix_[k * stride_ + k] + ridge);
    std::vector<float> direction(stride_, 0.0f);
    std::vector<float> product(stride_, 0.0f);
    double energy = 0;
    for (int64_t k = 0; k < columns_; ++k) {
      direction[k] = static_cast<float>(inverse[k] * residual[k]);
      energy += residual[k] * inverse[k] * residual[k];
    }
    const double first_energy = energy;
    for (int step = 0; step < kColumnSolverSteps; ++step) {
      if (!(energy > kColumnSolverTolerance * kColumnSolverTolerance * first_energy)) break;
      multiply(direction, &product);
      double curvature = 0;
      for (int64_t k = 0; k < columns_; ++k) {
        curvature += direction[k] * (static_cast<double>(product[k]) + ridge * direction[k]);
      }
      if (!(curvature > 0)) break;
      const double length = energy / curvature;
      double next_energy = 0;
      for (int64_t k = 0; k < columns_; ++k) {
        solution[k] += static_cast<float>(length * direction[k]);
        residual[k] -= length * (static_cast<double>(product[k]) + ridge * direction[k]);
        next_energy += residual[k] * inverse[k] * residual[k];
      }
      for (int64_t k = 0; k < columns_; ++k) {
        direction[k] = static_cast<float>(inverse[k] * residual[k] + next_energy / energy * direction[k]);
      }
      energy = next_energy;
    }
    return solution;
  }

  void multiply(const std::vector<float>& vector, std::vector<float>* product) const {
    const CalibratedKernels& kernels = checked_kernels().calibrated;
    const int64_t padded = padded_to(columns_, 16);
    at::parallel_for(0, columns_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) (*product)[k] = kernels.dot(matrix_ + k * stride_, vector.data(), padded);
    });
  }

  CalibratedWeight& weight_;
  const Hessian& hessian_;
  int64_t columns_;
  int64_t stride_;
  float* matrix_;
  std::vector<double> right_;
};

std::vector<float> checked_column_scales(const std::optional<at::Tensor>& column_scales, int64_t columns) {
  std::vector<float> scales(columns, 1.0f);
  if (!column_scales) return scales;
  TORCH_CHECK(column_scales->device().is_cpu(), "column_scales: expected a CPU tensor, got one on ",
              column_scales->device());
  TORCH_CHECK(column_scales->scalar_type() == at::kHalf, "column_scales: expected dtype float16, got ",
              column_scales->scalar_type());
  TORCH_CHECK(column_scales->dim() == 1 && column_scales->size(0) == columns, "column_scales: expected shape [",
              columns, "], got ", column_scales->sizes());
  const at::Tensor contiguous = column_scales->contiguous();
  const at::Half* values = contiguous.const_data_ptr<at::Half>();
  for (int64_t k = 0; k < columns; ++k) {
    scales[k] = static_cast<float>(values[k]);
    TORCH_CHECK_VALUE(std::isfinite(scales[k]) && scales[k] > 0, "column_scales: expected finite values > 0, got ",
                      scales[k], " at column ", k);
  }
  return scales;
}

void check_finite(const at::Tensor& matrix, const char* name) {
  const float* values = matrix.const_data_ptr<float>();
  for (int64_t i = 0; i < matrix.numel(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(values[i]), name, ": expected finite values, got ", values[i], " at row ",
                      i / matrix.size(1), ", column ", i % matrix.size(1));
  }
}

using CalibratedResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

CalibratedResult quantize_calibrated(const at::Tensor& weight, const at::Tensor& hessian, int64_t planes,
                                     int64_t outliers, const std::optional<at::Tensor>& column_scales, int64_t rounds,
                                     double damping) {
  TORCH_CHECK(weight.device().is_cpu(), "weight: expected a CPU tensor, got one on ", weight.device());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1 && weight.size(1) <= kMaxInFeatures,
              "weight: expected shape [out_features, in_features] with at most ", kMaxInFeatures, " columns, got ",
              weight.sizes());
  element_type(weight.scalar_type(), "weight");
  const int64_t columns = weight.size(1);
  TORCH_CHECK(hessian.device().is_cpu(), "hessian: expected a CPU tensor, got one on ", hessian.device());
  TORCH_CHECK(hessian.scalar_type() == at::kFloat, "hessian: expected dtype float32, got ", hessian.scalar_type());
  TORCH_CHECK(hessian.dim() == 2 && hessian.size(0) == columns && hessian.size(1) == columns,
              "hessian: expected shape [", columns, ", ", columns, "], got ", hessian.sizes());
  TORCH_CHECK_VALUE(planes >= 1 && planes <= kMaxCalibratedPlanes, "planes: expected 1 to ", kMaxCalibratedPlanes,
                    ", got ", planes);
  TORCH_CHECK_VALUE(outliers >= 0 && outliers <= columns, "outliers: expected 0 to in_features = ", columns,
                    " a row, got ", outliers);
  TORCH_CHECK_VALUE(rounds >= 0 && rounds <= 1000, "rounds: expected 0 to 1000, got ", rounds);
  TORCH_CHECK_VALUE(std::isfinite(damping) && damping >= 0, "damping: expected a finite value >= 0, got ", damping);
  const std::vector<float> scales = checked_column_scales(column_scales, columns);
  const at::Tensor dense = weight.to(at::kFloat).contiguous();
  const at::Tensor second_moment = hessian.contiguous();
  check_finite(dense, "weight");
  check_finite(second_moment, "hessian");

  Hessian scaled(second_moment, scales);
  const double used_damping = scaled.damp_and_factor(damping);
  CalibratedWeight blocks(dense, fit_start(dense, planes, outliers, scales, scaled), scales);

  const CalibratedKernels& kernels = checked_kernels().calibrated;
  const int64_t scratch_floats = (std::max<int64_t>(planes, 1) * columns + planes * kBlockColumns) * kBlockRows;
  std::vector<float> column_factors(columns, 1.0f);
  at::Tensor losses = at::zeros({rounds + 2}, at::kDouble);
  std::vector<double> block_losses(blocks.blocks());
  const auto for_each_block = [&](auto&& work) {
    const CalibrationProblem problem = scaled.problem(column_factors);
    at::parallel_for(0, blocks.blocks(), 1, [&](int64_t begin, int64_t end) {
      const Floats scratch = floats(scratch_floats);
      for (int64_t b = begin; b < end; ++b) {
        const CalibratedBlock block = blocks.block(b);
        work(block, problem, scratch.get());
        block_losses[b] = kernels.loss(block, problem);
      }
    });
    double total = 0;
    for (const double loss : block_losses) total += loss;
    return total;
  };

  const double signal = for_each_block(kernels.compute_gradient);
  const auto record = [&](int64_t index, double loss) {
    losses.mutable_data_ptr<double>()[index] = signal > 0 ? loss / signal : 0.0;
  };
  record(0, for_each_block([&](const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
           kernels.sweep(block, problem, scratch);
           kernels.compute_gradient(block, problem, scratch);
         }));
  ColumnScaleFit column_fit(blocks, scaled, columns, scaled.reuse_factor());
  for (int64_t round = 0; round < rounds; ++round) {
    const bool moved = column_scales.has_value() && column_fit.improve(scales, &column_factors);
    record(round + 1,
           for_each_block([&](const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
             if (moved) kernels.compute_gradient(block, problem, scratch);
             kernels.refit_scales(block, problem, scratch);
             kernels.descend(block, problem, scratch);
           }));
  }
  record(rounds + 1, for_each_block(kernels.refit_scales));

  auto [signs, plane_scales, outlier_columns, outlier_deltas, outlier_scales] = blocks.packed();
  at::Tensor final_column_scales = at::empty({column_scales ? columns : 0}, at::kHalf);
  if (column_scales) {
    at::Half* values = final_column_scales.mutable_data_ptr<at::Half>();
    for (int64_t k = 0; k < columns; ++k) values[k] = scales[k] * column_factors[k];
  }
  at::Tensor damping_tensor = at::empty({}, at::kDouble);
  *damping_tensor.mutable_data_ptr<double>() = used_damping;
  return {signs,          plane_scales,        outlier_columns, outlier_deltas,
          outlier_scales, final_column_scales, losses,          damping_tensor};
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) {
  m.impl("quantize_calibrated", &loop_singular_bit::quantize_calibrated);
}
