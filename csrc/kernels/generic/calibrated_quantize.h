// Signs, scales and outlier deltas for the least tr(E H E'). Include after a simd/ header.
//
// sweep() is GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the form of Babai's nearest plane: with H = U U' the error
// is the sum over columns j of (sum over i <= j of E_i U_ij)^2, so that column j makes good for the columns before it.
// descend() then moves single weights to the best level given all others, which the sweep cannot: it never goes back.
#pragma once

#include "generic/block_product.h"
#include "generic/element_types.h"
#include "generic/plane_levels.h"

namespace loop_singular_bit {
namespace {

constexpr float kLargestBlockDelta = 127.0f;
constexpr float kScaleRidge = 1e-3f;
// Every plane scale is a whole multiple of a row's unit, and the multiples add up to this.
constexpr float kMultipleSum = 126.0f;

inline void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, splat(0.0f));
}

template <int kPlanes>
struct BlockLevels {
  PlaneLevels<kPlanes> vector[kBlockVectors];

  explicit BlockLevels(const CalibratedBlock& block) {
    for (int v = 0; v < kBlockVectors; ++v) {
      F32x16 scale[kPlanes];
      for (int p = 0; p < kPlanes; ++p) scale[p] = load(block.scales + p * kBlockRows + v * kLanes);
      vector[v].set(scale);
    }
  }
};

// The int8 multiple of `scale` nearest to a value.
inline float nearest_delta(float value, float scale) {
  if (!(scale > 0.0f)) return 0.0f;
  const float multiple = __builtin_rintf(value / scale);
  return multiple > kLargestBlockDelta ? kLargestBlockDelta
                                       : (multiple < -kLargestBlockDelta ? -kLargestBlockDelta : multiple);
}

// float16 whose 127-fold reaches `largest`, or falls short by less than half a step.
inline float delta_scale(float largest) {
  const float exact = largest / kLargestBlockDelta;
  const uint16_t half = float16_from_float(exact < kLargestFloat16 ? exact : kLargestFloat16);
  const float scale = float_from_float16(half);
  return largest > scale * (kLargestBlockDelta + 0.5f) ? float_from_float16(static_cast<uint16_t>(half + 1)) : scale;
}

template <int kPlanes>
void sweep_planes(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  const BlockLevels<kPlanes> levels(block);
  const int64_t stride = problem.stride;
  float* errors = scratch;
  float* carried = scratch + block.columns * kBlockRows;
  for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
    clear(carried, kBlockColumns * kBlockRows);
    multiply_add(problem.factor + begin * stride, 1, stride, begin, end - begin, errors, kBlockRows, carried,
                 kBlockRows);
    for (int64_t k = begin; k < end; ++k) {
      const float pivot = problem.factor[k * stride + k];
      const float column_factor = problem.column_factors[k];
      const F32x16 per_pivot = splat(1.0f / pivot);
      const F32x16 per_factor = splat(1.0f / column_factor);
      float* error = errors + k * kBlockRows;
      float* plane_values = block.plane_values + k * kBlockRows;
      float targets[kBlockRows];
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32x16 weight = load(block.weight + k * kBlockRows + v * kLanes);
        const F32x16 sum = load(carried + (k - begin) * kBlockRows + v * kLanes);
        const F32x16 target = mul(fused_multiply_add(sum, per_pivot, weight), per_factor);
        const F32x16 value = levels.vector[v].nearest(target);
        store(targets + v * kLanes, target);
        store(plane_values + v * kLanes, value);
        store(error + v * kLanes, sub(weight, mul(splat(column_factor), value)));
      }
      for (int32_t i = block.outlier_begin[k]; i < block.outlier_begin[k + 1]; ++i) {
        const int32_t slot = block.outlier_slots[i];
        const int64_t row = slot % kBlockRows;
        block.outlier_deltas[slot] = targets[row] - plane_values[row];
        error[row] = block.weight[k * kBlockRows + row] - column_factor * targets[row];
      }
      for (int64_t l = k + 1; l < end; ++l) {
        const F32x16 left = splat(problem.factor[l * stride + k]);
        float* target = carried + (l - begin) * kBlockRows;
        for (int v = 0; v < kBlockVectors; ++v) {
          store(target + v * kLanes, fused_multiply_add(left, load(error + v * kLanes), load(target + v * kLanes)));
        }
      }
    }
  }
  // Only now: the sweep moves weights, so that a scale chosen before could be too small.
  for (int64_t row = 0; row < kBlockRows; ++row) {
    float largest = 0.0f;
    for (int64_t o = 0; o < block.outliers; ++o) {
      const float delta = __builtin_fabsf(block.outlier_deltas[o * kBlockRows + row]);
      largest = delta > largest ? delta : largest;
    }
    const float scale = delta_scale(largest);
    block.outlier_scales[row] = scale;
    for (int64_t o = 0; o < block.outliers; ++o) {
      float* delta = block.outlier_deltas + o * kBlockRows + row;
      *delta = nearest_delta(*delta, scale);
    }
  }
}

// errors[k - begin] = weight - approximation of columns [begin, end).
inline void write_errors(const CalibratedBlock& block, const CalibrationProblem& problem, int64_t begin, int64_t end,
                         float* errors) {
  for (int64_t k = begin; k < end; ++k) {
    const F32x16 factor = splat(0.0f - problem.column_factors[k]);
    float* error = errors + (k - begin) * kBlockRows;
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t index = k * kBlockRows + v * kLanes;
      store(error + v * kLanes,
            fused_multiply_add(factor, load(block.plane_values + index), load(block.weight + index)));
    }
    for (int32_t i = block.outlier_begin[k]; i < block.outlier_begin[k + 1]; ++i) {
      const int32_t slot = block.outlier_slots[i];
      const int64_t row = slot % kBlockRows;
      error[row] -= problem.column_factors[k] * (block.outlier_deltas[slot] * block.outlier_scales[row]);
    }
  }
}

inline void compute_gradient(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  clear(block.gradient, block.columns * kBlockRows);
  for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
    write_errors(block, problem, begin, end, scratch);
    multiply_add(problem.hessian + begin * problem.stride, problem.stride, 1, end - begin, block.columns, scratch,
                 kBlockRows, block.gradient, kBlockRows);
  }
}

inline double loss(const CalibratedBlock& block, const CalibrationProblem& problem) {
  double total = 0.0;
  float errors[kBlockRows];
  for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
    F32x16 sum = splat(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      write_errors(block, problem, k, k + 1, errors);
      for (int v = 0; v < kBlockVectors; ++v) {
        sum = fused_multiply_add(load(errors + v * kLanes), load(block.gradient + k * kBlockRows + v * kLanes), sum);
      }
    }
    total += static_cast<double>(sum_lanes(sum));
  }
  return total;
}

// Of the least-squares problem in the scales of sixteen rows.
template <int kPlanes>
struct ScaleEquations {
  F32x16 matrix[kPlanes][kPlanes];
  F32x16 right[kPlanes];
};

// Solves (matrix + ridge) change = right by elimination.
template <int kPlanes>
void solve_scales(const ScaleEquations<kPlanes>& equations, F32x16 change[kPlanes]) {
  ScaleEquations<kPlanes> e = equations;
  F32x16 ridge = splat(0.0f);
  for (int p = 0; p < kPlanes; ++p) ridge = add(ridge, e.matrix[p][p]);
  ridge = mul(ridge, splat(kScaleRidge / kPlanes));
  for (int p = 0; p < kPlanes; ++p) e.matrix[p][p] = add(e.matrix[p][p], ridge);
  for (int p = 0; p < kPlanes; ++p) {
    for (int q = p + 1; q < kPlanes; ++q) {
      const F32x16 ratio = div(e.matrix[q][p], e.matrix[p][p]);
      for (int r = p; r < kPlanes; ++r) e.matrix[q][r] = sub(e.matrix[q][r], mul(ratio, e.matrix[p][r]));
      e.right[q] = sub(e.right[q], mul(ratio, e.right[p]));
    }
  }
  for (int p = kPlanes - 1; p >= 0; --p) {
    F32x16 right = e.right[p];
    for (int q = p + 1; q < kPlanes; ++q) right = sub(right, mul(e.matrix[p][q], change[q]));
    change[p] = div(right, e.matrix[p][p]);
  }
}

template <int kPlanes>
F32x16 quadratic_form(const F32x16 matrix[kPlanes][kPlanes], const F32x16 a[kPlanes]) {
  F32x16 total = splat(0.0f);
  for (int p = 0; p < kPlanes; ++p) {
    F32x16 product = splat(0.0f);
    for (int q = 0; q < kPlanes; ++q) product = add(product, mul(matrix[p][q], a[q]));
    total = add(total, mul(product, a[p]));
  }
  return total;
}

// Replaces scales, which may be negative, by signed whole multiples of a unit: among those next to the present ratios
// the ones that, with their best unit, leave the least error. `right` belongs to the scales themselves, not to a
// change.
template <int kPlanes>
void snap_scales(const F32x16 matrix[kPlanes][kPlanes], const F32x16 right[kPlanes], F32x16 scale[kPlanes]) {
  const F32x16 zero = splat(0.0f);
  F32x16 sign[kPlanes];
  F32x16 sum = zero;
  for (int p = 0; p < kPlanes; ++p) {
    sign[p] = select(greater(zero, scale[p]), splat(-1.0f), splat(1.0f));
    sum = add(sum, magnitude(scale[p]));
  }
  const F32x16 per_unit = select(greater(sum, zero), div(splat(kMultipleSum), sum), zero);
  F32x16 floors[kPlanes];
  for (int p = 1; p < kPlanes; ++p) {
    floors[p] = float_from_int(truncate_to_int(mul(magnitude(scale[p]), per_unit)));
  }
  F32x16 best_gain = splat(-1.0f);
  F32x16 best[kPlanes];
  for (int p = 0; p < kPlanes; ++p) best[p] = zero;
  for (int choice = 0; choice < 1 << (kPlanes - 1); ++choice) {
    F32x16 multiple[kPlanes];
    multiple[0] = splat(kMultipleSum);
    for (int p = 1; p < kPlanes; ++p) {
      multiple[p] = add(floors[p], splat((choice >> (p - 1) & 1) != 0 ? 1.0f : 0.0f));
      multiple[0] = sub(multiple[0], multiple[p]);
    }
    const Mask16 possible = greater_equal(multiple[0], zero);
    for (int p = 0; p < kPlanes; ++p) multiple[p] = mul(multiple[p], sign[p]);
    F32x16 linear = zero;
    for (int p = 0; p < kPlanes; ++p) linear = add(linear, mul(right[p], multiple[p]));
    const F32x16 unit = div(linear, quadratic_form<kPlanes>(matrix, multiple));
    const F32x16 gain = keep(possible, keep(greater(unit, zero), mul(linear, unit)));
    const Mask16 better = greater(gain, best_gain);
    best_gain = select(better, gain, best_gain);
    for (int p = 0; p < kPlanes; ++p) best[p] = select(better, mul(unit, multiple[p]), best[p]);
  }
  for (int p = 0; p < kPlanes; ++p) scale[p] = best[p];
}

inline F32x16 nearest_float16(F32x16 a) {
  const F32x16 limit = splat(kLargestFloat16);
  return round_to_float16(max(min(a, limit), sub(splat(0.0f), limit)));
}

template <int kPlanes>
void refit_scales_planes(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  const BlockLevels<kPlanes> levels(block);
  const int64_t plane_floats = block.columns * kBlockRows;
  float* products = scratch;  // [planes, columns, 64]: H (column_factors * signs)
  float* signs = scratch + kPlanes * plane_floats;
  clear(products, kPlanes * plane_floats);
  for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
    for (int64_t k = begin; k < end; ++k) {
      const F32x16 factor = splat(problem.column_factors[k]);
      const F32x16 negative = splat(0.0f - problem.column_factors[k]);
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32x16 pattern = levels.vector[v].pattern(load(block.plane_values + k * kBlockRows + v * kLanes));
        for (int p = 0; p < kPlanes; ++p) {
          store(signs + (p * kBlockColumns + k - begin) * kBlockRows + v * kLanes,
                select(PlaneLevels<kPlanes>::is_positive(pattern, p), factor, negative));
        }
      }
    }
    for (int p = 0; p < kPlanes; ++p) {
      multiply_add(problem.hessian + begin * problem.stride, problem.stride, 1, end - begin, block.columns,
                   signs + p * kBlockColumns * kBlockRows, kBlockRows, products + p * plane_floats, kBlockRows);
    }
  }

  for (int v = 0; v < kBlockVectors; ++v) {
    const F32x16 zero = splat(0.0f);
    ScaleEquations<kPlanes> total;
    for (int p = 0; p < kPlanes; ++p) {
      total.right[p] = zero;
      for (int q = 0; q < kPlanes; ++q) total.matrix[p][q] = zero;
    }
    for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
      const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
      ScaleEquations<kPlanes> sum;
      for (int p = 0; p < kPlanes; ++p) {
        sum.right[p] = zero;
        for (int q = 0; q < kPlanes; ++q) sum.matrix[p][q] = zero;
      }
      for (int64_t k = begin; k < end; ++k) {
        const int64_t index = k * kBlockRows + v * kLanes;
        const F32x16 factor = splat(problem.column_factors[k]);
        const F32x16 negative = splat(0.0f - problem.column_factors[k]);
        const F32x16 pattern = levels.vector[v].pattern(load(block.plane_values + index));
        const F32x16 gradient = load(block.gradient + index);
        for (int p = 0; p < kPlanes; ++p) {
          const F32x16 sign = select(PlaneLevels<kPlanes>::is_positive(pattern, p), factor, negative);
          sum.right[p] = fused_multiply_add(sign, gradient, sum.right[p]);
          for (int q = 0; q <= p; ++q) {
            sum.matrix[p][q] = fused_multiply_add(sign, load(products + q * plane_floats + index), sum.matrix[p][q]);
          }
        }
      }
      for (int p = 0; p < kPlanes; ++p) {
        total.right[p] = add(total.right[p], sum.right[p]);
        for (int q = 0; q <= p; ++q) total.matrix[p][q] = add(total.matrix[p][q], sum.matrix[p][q]);
      }
    }
    for (int p = 0; p < kPlanes; ++p) {
      for (int q = 0; q < p; ++q) total.matrix[q][p] = total.matrix[p][q];
    }

    F32x16 present[kPlanes];
    F32x16 scale[kPlanes];
    F32x16 right[kPlanes];  // for the scales themselves instead of their change
    for (int p = 0; p < kPlanes; ++p) present[p] = load(block.scales + p * kBlockRows + v * kLanes);
    solve_scales<kPlanes>(total, scale);
    for (int p = 0; p < kPlanes; ++p) {
      scale[p] = add(scale[p], present[p]);
      right[p] = total.right[p];
      for (int q = 0; q < kPlanes; ++q) right[p] = add(right[p], mul(total.matrix[p][q], present[q]));
    }
    if (kPlanes > 1) snap_scales<kPlanes>(total.matrix, right, scale);

    F32x16 change[kPlanes];
    F32x16 gain = zero;
    for (int p = 0; p < kPlanes; ++p) {
      scale[p] = nearest_float16(scale[p]);
      change[p] = sub(scale[p], present[p]);
      gain = add(gain, mul(change[p], total.right[p]));
    }
    gain = sub(add(gain, gain), quadratic_form<kPlanes>(total.matrix, change));
    // A NaN, from a row of zeros, is not greater.
    const Mask16 better = greater(gain, zero);
    for (int p = 0; p < kPlanes; ++p) {
      change[p] = keep(better, change[p]);
      scale[p] = select(better, scale[p], present[p]);
    }

    for (int64_t k = 0; k < block.columns; ++k) {
      const int64_t index = k * kBlockRows + v * kLanes;
      const F32x16 pattern = levels.vector[v].pattern(load(block.plane_values + index));
      F32x16 gradient = load(block.gradient + index);
      F32x16 value = zero;
      for (int p = 0; p < kPlanes; ++p) {
        gradient = sub(gradient, mul(change[p], load(products + p * plane_floats + index)));
        const F32x16 negative = sub(zero, scale[p]);
        value = add(value, select(PlaneLevels<kPlanes>::is_positive(pattern, p), scale[p], negative));
      }
      store(block.gradient + index, gradient);
      store(block.plane_values + index, value);
    }

    for (int p = 0; p < kPlanes; ++p) scale[p] = magnitude(scale[p]);
    for (int last = kPlanes - 1; last > 0; --last) {
      for (int p = 0; p < last; ++p) {
        const F32x16 larger = max(scale[p], scale[p + 1]);
        scale[p + 1] = min(scale[p], scale[p + 1]);
        scale[p] = larger;
      }
    }
    for (int p = 0; p < kPlanes; ++p) store(block.scales + p * kBlockRows + v * kLanes, scale[p]);
  }
}

template <int kPlanes>
void descend_planes(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  const BlockLevels<kPlanes> levels(block);
  const int64_t stride = problem.stride;
  float* changes = scratch;  // [64, 64]: of the errors of the columns of a column block
  for (int64_t begin = 0; begin < block.columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < block.columns ? begin + kBlockColumns : block.columns;
    for (int64_t k = begin; k < end; ++k) {
      const float* hessian = problem.hessian + k * stride;
      const float column_factor = problem.column_factors[k];
      const float step = 1.0f / (hessian[k] * column_factor);
      float* plane_values = block.plane_values + k * kBlockRows;
      const float* gradient = block.gradient + k * kBlockRows;
      float* change = changes + (k - begin) * kBlockRows;
      float before[kBlockRows];
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32x16 value = load(plane_values + v * kLanes);
        const F32x16 target = fused_multiply_add(load(gradient + v * kLanes), splat(step), value);
        const F32x16 nearest = levels.vector[v].nearest(target);
        store(before + v * kLanes, value);
        store(plane_values + v * kLanes, nearest);
        store(change + v * kLanes, mul(splat(column_factor), sub(value, nearest)));
      }
      for (int32_t i = block.outlier_begin[k]; i < block.outlier_begin[k + 1]; ++i) {
        const int32_t slot = block.outlier_slots[i];
        const int64_t row = slot % kBlockRows;
        const float scale = block.outlier_scales[row];
        float* delta = block.outlier_deltas + slot;
        const float value = before[row] + *delta * scale;
        const float target = value + gradient[row] * step;
        // The planes keep their level unless the delta could not reach the target from there.
        float level = before[row];
        float nearest = nearest_delta(target - level, scale);
        const float other = nearest_delta(target - plane_values[row], scale);
        if (__builtin_fabsf(target - plane_values[row] - other * scale) <
            __builtin_fabsf(target - level - nearest * scale)) {
          level = plane_values[row];
          nearest = other;
        }
        if (!(__builtin_fabsf(target - level - nearest * scale) < __builtin_fabsf(target - value))) {
          level = before[row];
          nearest = *delta;
        }
        plane_values[row] = level;
        *delta = nearest;
        change[row] = column_factor * (value - (level + nearest * scale));
      }
      for (int64_t l = begin; l < end; ++l) {
        const F32x16 left = splat(hessian[l]);
        float* target = block.gradient + l * kBlockRows;
        for (int v = 0; v < kBlockVectors; ++v) {
          store(target + v * kLanes, fused_multiply_add(left, load(change + v * kLanes), load(target + v * kLanes)));
        }
      }
    }
    const float* rows = problem.hessian + begin * stride;
    multiply_add(rows, stride, 1, end - begin, begin, changes, kBlockRows, block.gradient, kBlockRows);
    multiply_add(rows + end, stride, 1, end - begin, block.columns - end, changes, kBlockRows,
                 block.gradient + end * kBlockRows, kBlockRows);
  }
}

inline void write_rows(const CalibratedBlock& block, float* rows, int64_t stride) {
  for (int64_t begin = 0; begin < block.columns; begin += kLanes) {
    const int64_t count = block.columns - begin < kLanes ? block.columns - begin : kLanes;
    for (int v = 0; v < kBlockVectors; ++v) {
      F32x16 tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = i < count ? load(block.plane_values + (begin + i) * kBlockRows + v * kLanes) : splat(0.0f);
      }
      transpose(tile);
      for (int64_t i = 0; i < kLanes; ++i) store(rows + (v * kLanes + i) * stride + begin, tile[i]);
    }
  }
  for (int64_t slot = 0; slot < block.outliers * kBlockRows; ++slot) {
    const int64_t row = slot % kBlockRows;
    rows[row * stride + block.outlier_columns[slot]] += block.outlier_deltas[slot] * block.outlier_scales[row];
  }
}

inline void sum_column_gradients(const CalibratedBlock& block, double* sums) {
  for (int64_t k = 0; k < block.columns; ++k) {
    F32x16 sum = splat(0.0f);
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t index = k * kBlockRows + v * kLanes;
      sum = fused_multiply_add(load(block.gradient + index), load(block.plane_values + index), sum);
    }
    float total = sum_lanes(sum);
    for (int32_t i = block.outlier_begin[k]; i < block.outlier_begin[k + 1]; ++i) {
      const int32_t slot = block.outlier_slots[i];
      const int64_t row = slot % kBlockRows;
      total += block.gradient[k * kBlockRows + row] * (block.outlier_deltas[slot] * block.outlier_scales[row]);
    }
    sums[k] = static_cast<double>(total);
  }
}

template <int kPlanes>
void write_block_signs(const CalibratedBlock& block, int64_t first_row, int64_t rows, int32_t* signs) {
  const BlockLevels<kPlanes> levels(block);
  const int64_t words = (block.columns + kColumnsPerWord - 1) / kColumnsPerWord;
  for (int64_t lane = 0; lane < kRowsPerTile; lane += kLanes) {
    const int64_t left = rows - first_row - lane;
    const Mask16 valid = mask_from_bits(left >= kLanes ? 0xffffu : left <= 0 ? 0u : (1u << left) - 1);
    for (int64_t word = 0; word < words; ++word) {
      const int64_t begin = word * kColumnsPerWord;
      const int64_t count = block.columns - begin < kColumnsPerWord ? block.columns - begin : kColumnsPerWord;
      F32x16 bits[kPlanes];
      for (int p = 0; p < kPlanes; ++p) bits[p] = splat(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = (begin + i) * kBlockRows + first_row + lane;
        const F32x16 pattern = levels.vector[(first_row + lane) / kLanes].pattern(load(block.plane_values + index));
        const F32x16 bit = splat_bits(1u << i);
        for (int p = 0; p < kPlanes; ++p) {
          bits[p] = bits_or_where(PlaneLevels<kPlanes>::is_positive(pattern, p), bits[p], bit);
        }
      }
      for (int p = 0; p < kPlanes; ++p) {
        float lanes[kLanes];
        store(lanes, keep(valid, bits[p]));
        __builtin_memcpy(signs + (p * words + word) * kRowsPerTile + lane, lanes, sizeof(lanes));
      }
    }
  }
}

inline void sweep(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  switch (block.planes) {
    case 1:
      return sweep_planes<1>(block, problem, scratch);
    case 2:
      return sweep_planes<2>(block, problem, scratch);
    case 3:
      return sweep_planes<3>(block, problem, scratch);
    default:
      return sweep_planes<4>(block, problem, scratch);
  }
}

inline void refit_scales(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  switch (block.planes) {
    case 1:
      return refit_scales_planes<1>(block, problem, scratch);
    case 2:
      return refit_scales_planes<2>(block, problem, scratch);
    case 3:
      return refit_scales_planes<3>(block, problem, scratch);
    default:
      return refit_scales_planes<4>(block, problem, scratch);
  }
}

inline void descend(const CalibratedBlock& block, const CalibrationProblem& problem, float* scratch) {
  switch (block.planes) {
    case 1:
      return descend_planes<1>(block, problem, scratch);
    case 2:
      return descend_planes<2>(block, problem, scratch);
    case 3:
      return descend_planes<3>(block, problem, scratch);
    default:
      return descend_planes<4>(block, problem, scratch);
  }
}

inline void write_signs(const CalibratedBlock& block, int64_t first_row, int64_t rows, int32_t* signs) {
  switch (block.planes) {
    case 1:
      return write_block_signs<1>(block, first_row, rows, signs);
    case 2:
      return write_block_signs<2>(block, first_row, rows, signs);
    case 3:
      return write_block_signs<3>(block, first_row, rows, signs);
    default:
      return write_block_signs<4>(block, first_row, rows, signs);
  }
}

}  // namespace
}  // namespace loop_singular_bit
