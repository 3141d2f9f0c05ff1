// Quantizing a weight for the least error of its outputs: what each instruction set provides for quantize_calibrated.
//
// The error of a layer's outputs is tr(E H E'), E = weight - approximation, H = second moment of the inputs. Rows of
// the weight do not depend on each other: 64 of them are worked on together, transposed, so that a lane is a row. Every
// sum over columns runs in a fixed order within a lane: all instruction sets and any number of threads give the same
// bytes.
#pragma once

#include <cstdint>

namespace loop_singular_bit {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 64;

// 64 rows of a weight and what approximates them:
//
//   approximation[k, row] = column_factors[k] * (plane_values[k, row] + outlier_deltas[., row] * outlier_scales[row])
//   plane_values[k, row]  = sum over the planes of +-scales[plane, row]
struct CalibratedBlock {
  int64_t columns;
  int64_t planes;                   // 1..4
  int64_t outliers;                 // per row
  const float* weight;              // [columns, 64], divided by the column scales at the start
  float* plane_values;              // [columns, 64]
  float* gradient;                  // [columns, 64]: H (weight - approximation)
  float* scales;                    // [planes, 64], descending, not negative; of float16
  const uint16_t* outlier_columns;  // [outliers, 64], ascending within a row
  float* outlier_deltas;            // [outliers, 64], whole numbers -127..127
  float* outlier_scales;            // [64], of float16
  const int32_t* outlier_begin;     // [columns + 1]: where a column's outliers begin in outlier_slots
  const int32_t* outlier_slots;     // [outliers * 64]: slot * 64 + row, by column
};

// H over the columns divided by their scales, damped, and what the column scales have been multiplied by since.
struct CalibrationProblem {
  const float* hessian;         // [columns, columns], rows `stride` apart
  const float* factor;          // the same shape; row j: U[0..j, j] with H = U U', U upper triangular; sweep() only
  int64_t stride;               // multiple of 64
  const float* column_factors;  // [columns], > 0
};

struct CalibratedKernels {
  // y[o, 0..64) += sum over i < inputs of matrix[i * input_stride + o * output_stride] * x[i, 0..64), for o < outputs.
  void (*multiply_add)(const float* matrix, int64_t input_stride, int64_t output_stride, int64_t inputs,
                       int64_t outputs, const float* x, int64_t x_stride, float* y, int64_t y_stride);

  // sum over k < columns of row[k] * vector[k]; columns is a multiple of 16.
  float (*dot)(const float* row, const float* vector, int64_t columns);

  // Steps of the factorization H = U U' of a matrix whose rows hold the lower triangle, from the last columns to the
  // first; row j then holds U[0..j, j]. factor_diagonal() returns the column without a positive pivot, or -1.
  // factor_panel() solves columns [lane_begin, lane_begin + 64) of rows [begin, end) and writes their negative to
  // negated[(row - begin) * stride + column]. The caller subtracts the product of the panel with itself from the rows
  // above.
  int64_t (*factor_diagonal)(float* matrix, int64_t stride, int64_t begin, int64_t end);
  void (*factor_panel)(float* matrix, int64_t stride, int64_t begin, int64_t end, int64_t lane_begin, float* negated);

  // Chooses all plane_values, outlier_deltas and outlier_scales, column by column, each making good for the errors of
  // the columns before it. scratch: (columns + 64) * 64 floats.
  void (*sweep)(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch);

  // Computes the gradient anew. scratch: 64 * 64 floats.
  void (*compute_gradient)(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch);

  // tr(E H E') of the block, from the gradient.
  double (*loss)(const CalibratedBlock& block, const CalibrationProblem& problem);

  // Least squares in the scales of each row, signs and outliers fixed, snapped to whole multiples of a unit that add up
  // to 126; rows keep their scales where this would not help. scratch: (planes * columns + planes * 64) * 64 floats.
  void (*refit_scales)(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch);

  // One pass of coordinate descent over plane_values and outlier_deltas, column by column. scratch: 64 * 64 floats.
  void (*descend)(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch);

  // approximation / column_factors of the block, a row per row: rows[row * stride + k].
  void (*write_rows)(const CalibratedBlock& block, float* rows, int64_t stride);

  // sums[k] = sum over the rows of gradient * approximation / column_factors.
  void (*sum_column_gradients)(const CalibratedBlock& block, double* sums);

  // Signs of 32 rows, from row 0 or 32 of the block: int32 [planes, words, 32]. Rows from `rows` on get 0 bits.
  void (*write_signs)(const CalibratedBlock& block, int64_t first_row, int64_t rows, int32_t* signs);
};

}  // namespace loop_singular_bit
