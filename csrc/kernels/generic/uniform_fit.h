// The one step of sign planes whose scales halve from plane to plane: a uniform grid of odd multiples of the
// last plane's scale. Same interface as PlaneFit. Include after a simd/ header.
#pragma once

#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

template <int kPlanes, bool kMeans>
class UniformFit {
 public:
  static constexpr int kCount = kPlanes;
  static constexpr bool kHasMean = kMeans;

  void clear(const WeightTile& tile, const float* weights) {
    mean_ = kMeans ? weighted_mean(tile, weights) : splat(0.0f);
    set_step(splat(0.0f));
  }

  // Tries grids that clip ever more of the largest weights, then refines the best.
  void fit(const WeightTile& tile, const float* weights, int rounds) {
    clear(tile, weights);
    F32x16 largest = splat(0.0f);
    for (int64_t k = 0; k < tile.padded_columns; ++k) {
      largest = max(magnitude(sub(load(tile.values + k * kLanes), mean_)), largest);
    }
    F32x16 candidate = mul(largest, splat(1.0f / (2 * kLargestCode + 1)));
    F32x16 best_step = candidate;
    F32x16 best_cost = splat_bits(kInfinityBits);
    for (int i = 0; i < kCandidates; ++i) {
      set_step(candidate);
      const F32x16 cost = weighted_cost(*this, tile, weights);
      const Mask16 better = greater(best_cost, cost);
      best_cost = select(better, cost, best_cost);
      best_step = select(better, candidate, best_step);
      candidate = mul(candidate, splat(kShrink));
    }
    set_step(best_step);
    refine(tile, weights, rounds);
  }

  // Rounds of alternating least squares: nearest codes, then the step (and the mean) that suits them best.
  void refine(const WeightTile& tile, const float* weights, int rounds) {
    for (int round = 0; round < rounds; ++round) {
      const F32x16 zero = splat(0.0f);
      F32x16 product = zero;  // of value and code
      F32x16 square = zero;   // of the code
      F32x16 code_sum = zero;
      F32x16 value_sum = zero;
      F32x16 weight_sum = zero;
      for (int64_t begin = 0; begin < tile.padded_columns; begin += kSummationBlock) {
        const int64_t end = block_end(tile, begin);
        F32x16 block_product = zero;
        F32x16 block_square = zero;
        F32x16 block_code = zero;
        F32x16 block_value = zero;
        F32x16 block_weight = zero;
        for (int64_t k = begin; k < end; ++k) {
          const F32x16 value = sub(load(tile.values + k * kLanes), mean_);
          const F32x16 size = magnitude(value);
          const Mask16 counts = greater_equal(size, zero);
          const F32x16 weight = splat(weights[k]);
          const F32x16 multiple = odd_multiple(size);
          const F32x16 weighted_multiple = mul(weight, multiple);
          block_product = add_where(counts, block_product, mul(weighted_multiple, size));
          block_square = add_where(counts, block_square, mul(weighted_multiple, multiple));
          if (kMeans) {
            const F32x16 sign_bit = bits_xor(value, size);
            block_code = add_where(counts, block_code, bits_or(weighted_multiple, sign_bit));
            block_value = add_where(counts, block_value, mul(weight, value));
            block_weight = add_where(counts, block_weight, weight);
          }
        }
        product = add(product, block_product);
        square = add(square, block_square);
        code_sum = add(code_sum, block_code);
        value_sum = add(value_sum, block_value);
        weight_sum = add(weight_sum, block_weight);
      }
      if (kMeans) {
        // Two unknowns; value_sum and product belong to what is left of the present mean.
        const F32x16 share = div(code_sum, weight_sum);
        const F32x16 left_square = sub(square, mul(share, code_sum));
        const Mask16 solvable = greater(left_square, mul(splat(1e-6f), square));
        const F32x16 step = select(solvable, div(sub(product, mul(share, value_sum)), left_square), step_);
        const F32x16 shift = div(sub(value_sum, mul(step, code_sum)), weight_sum);
        mean_ = select(solvable, add(mean_, shift), mean_);
        set_step(magnitude(step));
      } else {
        set_step(select(greater(square, zero), div(product, square), step_));
      }
    }
  }

  void round_to_format(const WeightTile&, const float*) {
    if (kMeans) mean_ = round_to_float16(mean_);
    // Steps that round to 0 would lose rows that float16 can still tell from 0.
    const F32x16 smallest = splat(kSmallestFloat16);
    const F32x16 rounded = round_to_float16(step_);
    set_step(select(greater_equal(scale(0), smallest), max(rounded, smallest), rounded));
  }

  F32x16 mean() const { return mean_; }
  F32x16 scale(int plane) const { return mul(step_, splat(static_cast<float>(1 << (kPlanes - 1 - plane)))); }

  F32x16 code(F32x16 value) const {
    return bits_or(truncate_to_int(grid_index(value)), splat_bits(1u << (kPlanes - 1)));
  }

  F32x16 distance(F32x16 value) const { return magnitude(sub(value, mul(step_, odd_multiple(value)))); }

 private:
  static constexpr int kLargestCode = (1 << (kPlanes - 1)) - 1;
  static constexpr int kCandidates = 12;
  static constexpr float kShrink = 0.9f;
  static constexpr float kSmallestFloat16 = 5.9604645e-8f;  // 2^-24
  static constexpr uint32_t kInfinityBits = 0x7f800000;

  void set_step(F32x16 step) {
    step_ = step;
    indices_per_value_ = select(greater(step, splat(0.0f)), div(splat(0.5f), step), splat(0.0f));
  }

  // 0 .. kLargestCode, with a fraction.
  F32x16 grid_index(F32x16 value) const {
    return min(mul(value, indices_per_value_), splat(static_cast<float>(kLargestCode)));
  }

  F32x16 odd_multiple(F32x16 value) const {
    const F32x16 index = whole_part(grid_index(value));
    return add(add(index, index), splat(1.0f));
  }

  F32x16 mean_;
  F32x16 step_;
  F32x16 indices_per_value_;
};

}  // namespace
}  // namespace loop_singular_bit
