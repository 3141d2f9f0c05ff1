// Scales of 1 to 4 sign planes, fitted by alternating least squares ("alternating binary coding", Xu et al. 2018,
// arXiv 1802.00150): nearest of the 2^P levels, then the P scales that suit those codes best. Include after a simd/
// header.
#pragma once

#include "generic/uniform_fit.h"
#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

// Every plane scale is stored as an integer multiple of a row's unit, and these integers add up to kLevelSum.
constexpr float kLevelSum = 126.0f;

// Keeps the normal equations solvable when a code is not used.
constexpr float kRidge = 1e-4f;

// A weight is seen as (sign, magnitude) around the mean. The levels lie symmetrically, so that the magnitude's nearest
// level among the 2^(P-1) that are not negative decides all planes. With kMeans false the mean is 0.
template <int kPlanes, bool kMeans>
class PlaneFit {
 public:
  static constexpr int kCount = kPlanes;
  static constexpr bool kHasMean = kMeans;

  // The mean alone, all scales 0: distance() is then the distance from the mean.
  void clear(const WeightTile& tile, const float* weights) {
    mean_ = kMeans ? weighted_mean(tile, weights) : splat(0.0f);
    for (int p = 0; p < kPlanes; ++p) scale_[p] = splat(0.0f);
    set_levels();
  }

  // From scratch: greedy planes, then `rounds` rounds. With three planes and more that often ends in a poor local
  // optimum where a uniform grid does not, and the other way round for long tails: the better of both starts is kept.
  void fit(const WeightTile& tile, const float* weights, int rounds) {
    clear(tile, weights);
    start_greedily(tile, weights);
    refine(tile, weights, rounds);
    if constexpr (kPlanes >= 3) keep_better_start(tile, weights, rounds);
  }

  // `rounds` rounds from the present scales.
  void refine(const WeightTile& tile, const float* weights, int rounds) {
    Sums sums;
    set_levels();
    if (!kMeans) sum_above<0>(tile, weights, &sums);
    for (int round = 0; round < rounds; ++round) {
      if (kMeans) {
        sum_above<0>(tile, weights, &sums);
      } else if (round > 0) {
        sum_above<1>(tile, weights, &sums);
      }
      solve(normal_equations(sums));
      set_levels();
      if (kPlanes == 1 && !kMeans) break;  // closed form
    }
  }

  // Moves mean and scales to what the format can hold: mean in float16, scales snapped and in float16.
  void round_to_format(const WeightTile& tile, const float* weights) {
    if (kMeans) mean_ = round_to_float16(mean_);
    set_levels();
    Sums sums;
    sum_above<0>(tile, weights, &sums);
    snap(normal_equations(sums));
    for (int p = 0; p < kPlanes; ++p) scale_[p] = round_to_float16(scale_[p]);
    set_levels();
  }

  F32x16 mean() const { return mean_; }
  F32x16 scale(int plane) const { return scale_[plane]; }

  // Sign pattern of the level nearest to a magnitude: bit kPlanes - 1 - p is plane p.
  F32x16 code(F32x16 value) const {
    F32x16 code = pattern_[0];
    for (int i = 1; i < kLevels; ++i) code = select(greater(value, threshold_[i]), pattern_[i], code);
    return code;
  }

  // Distance of a magnitude from its nearest level.
  F32x16 distance(F32x16 value) const {
    F32x16 nearest = magnitude(sub(value, level_[0]));
    for (int i = 1; i < kLevels; ++i) nearest = min(nearest, magnitude(sub(value, level_[i])));
    return nearest;
  }

 private:
  static constexpr int kLevels = 1 << (kPlanes - 1);
  static constexpr int kUniformRounds = 2;
  static constexpr int kUnknowns = kPlanes + (kMeans ? 1 : 0);
  // Independent chains of additions hide their latency; with many levels there are enough of them anyway.
  static constexpr int kStreams = kPlanes <= 3 ? 2 : 1;

  // For each threshold: what lies above it. Entry 0 counts everything but NaN.
  struct Sums {
    F32x16 weight[kLevels];
    F32x16 weighted_magnitude[kLevels];
    F32x16 weighted_sign[kLevels];  // kMeans only, as the next
    F32x16 weighted_value;
  };

  struct NormalEquations {
    F32x16 matrix[kUnknowns][kUnknowns];
    F32x16 right[kUnknowns];
    F32x16 total_weight;
  };

  // Plane p's scale is the mean magnitude of what the planes before it leave.
  void start_greedily(const WeightTile& tile, const float* weights) {
    for (int planes = 0; planes < kPlanes; ++planes) {
      F32x16 total = splat(0.0f);
      F32x16 total_weight = splat(0.0f);
      for (int64_t begin = 0; begin < tile.padded_columns; begin += kSummationBlock) {
        const int64_t end = block_end(tile, begin);
        F32x16 sum = splat(0.0f);
        F32x16 weight_sum = splat(0.0f);
        for (int64_t k = begin; k < end; ++k) {
          F32x16 left = magnitude(sub(load(tile.values + k * kLanes), mean_));
          for (int p = 0; p < planes; ++p) left = magnitude(sub(left, scale_[p]));
          const F32x16 weight = splat(weights[k]);
          const Mask16 counts = greater_equal(left, splat(0.0f));
          sum = add_where(counts, sum, mul(weight, left));
          weight_sum = add_where(counts, weight_sum, weight);
        }
        total = add(total, sum);
        total_weight = add(total_weight, weight_sum);
      }
      scale_[planes] = select(greater(total_weight, splat(0.0f)), div(total, total_weight), splat(0.0f));
    }
    sort_scales();
  }

  // Fits from halving scales as well and returns to the present ones where that cost more.
  void keep_better_start(const WeightTile& tile, const float* weights, int rounds) {
    const PlaneFit before = *this;
    UniformFit<kPlanes, kMeans> uniform;
    uniform.fit(tile, weights, kUniformRounds);
    mean_ = uniform.mean();
    for (int p = 0; p < kPlanes; ++p) scale_[p] = uniform.scale(p);
    refine(tile, weights, rounds);
    const Mask16 worse = greater(weighted_cost(*this, tile, weights), weighted_cost(before, tile, weights));
    mean_ = select(worse, before.mean_, mean_);
    for (int p = 0; p < kPlanes; ++p) scale_[p] = select(worse, before.scale_[p], scale_[p]);
    set_levels();
  }

  void sort_scales() {
    for (int last = kPlanes - 1; last > 0; --last) {
      for (int p = 0; p < last; ++p) {
        const F32x16 larger = max(scale_[p], scale_[p + 1]);
        scale_[p + 1] = min(scale_[p], scale_[p + 1]);
        scale_[p] = larger;
      }
    }
  }

  // Levels that are not negative in ascending order with their sign patterns, and the thresholds below them.
  void set_levels() {
    constexpr uint32_t kAllPlanes = (1u << kPlanes) - 1;
    for (int i = 0; i < kLevels; ++i) {
      F32x16 sum = scale_[0];
      for (int p = 1; p < kPlanes; ++p) {
        sum = (i >> (kPlanes - 1 - p) & 1) != 0 ? add(sum, scale_[p]) : sub(sum, scale_[p]);
      }
      const uint32_t pattern = static_cast<uint32_t>(i) | 1u << (kPlanes - 1);
      const Mask16 negative = greater(splat(0.0f), sum);
      level_[i] = magnitude(sum);
      pattern_[i] = select(negative, splat_bits(~pattern & kAllPlanes), splat_bits(pattern));
    }
    for (int last = kLevels - 1; last > 0; --last) {
      for (int i = 0; i < last; ++i) {
        const Mask16 swap = greater(level_[i], level_[i + 1]);
        const F32x16 level = select(swap, level_[i + 1], level_[i]);
        const F32x16 pattern = select(swap, pattern_[i + 1], pattern_[i]);
        level_[i + 1] = select(swap, level_[i], level_[i + 1]);
        pattern_[i + 1] = select(swap, pattern_[i], pattern_[i + 1]);
        level_[i] = level;
        pattern_[i] = pattern;
      }
    }
    threshold_[0] = splat(-1.0f);
    for (int i = 1; i < kLevels; ++i) threshold_[i] = mul(splat(0.5f), add(level_[i - 1], level_[i]));
  }

  // Fills the sums of thresholds kFirst and up.
  template <int kFirst>
  void sum_above(const WeightTile& tile, const float* weights, Sums* sums) const {
    const F32x16 zero = splat(0.0f);
    for (int i = kFirst; i < kLevels; ++i) {
      sums->weight[i] = sums->weighted_magnitude[i] = zero;
      if (kMeans) sums->weighted_sign[i] = zero;
    }
    if (kMeans) sums->weighted_value = zero;
    for (int64_t begin = 0; begin < tile.padded_columns; begin += kSummationBlock) {
      const int64_t end = block_end(tile, begin);
      F32x16 weight_sum[kStreams][kLevels];
      F32x16 magnitude_sum[kStreams][kLevels];
      F32x16 sign_sum[kStreams][kLevels];
      F32x16 value_sum[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        for (int i = kFirst; i < kLevels; ++i) weight_sum[s][i] = magnitude_sum[s][i] = sign_sum[s][i] = zero;
        value_sum[s] = zero;
      }
      for (int64_t k = begin; k < end; k += kStreams) {
        for (int s = 0; s < kStreams; ++s) {
          F32x16 value = load(tile.values + (k + s) * kLanes);
          if (kMeans) value = sub(value, mean_);
          const F32x16 size = magnitude(value);
          const F32x16 weight = splat(weights[k + s]);
          const F32x16 weighted_size = mul(weight, size);
          const F32x16 sign_bit = bits_xor(value, size);
          for (int i = kFirst; i < kLevels; ++i) {
            const Mask16 above = greater(size, threshold_[i]);
            weight_sum[s][i] = add_where(above, weight_sum[s][i], weight);
            magnitude_sum[s][i] = add_where(above, magnitude_sum[s][i], weighted_size);
            if (kMeans) sign_sum[s][i] = add_where(above, sign_sum[s][i], bits_or(weight, sign_bit));
          }
          if (kMeans) {
            value_sum[s] = add_where(greater(size, threshold_[0]), value_sum[s], bits_or(weighted_size, sign_bit));
          }
        }
      }
      for (int s = 0; s < kStreams; ++s) {
        for (int i = kFirst; i < kLevels; ++i) {
          sums->weight[i] = add(sums->weight[i], weight_sum[s][i]);
          sums->weighted_magnitude[i] = add(sums->weighted_magnitude[i], magnitude_sum[s][i]);
          if (kMeans) sums->weighted_sign[i] = add(sums->weighted_sign[i], sign_sum[s][i]);
        }
        if (kMeans) sums->weighted_value = add(sums->weighted_value, value_sum[s]);
      }
    }
  }

  // Of the weighted least-squares problem in the scales (and the change of the mean) for the present codes.
  NormalEquations normal_equations(const Sums& sums) const {
    NormalEquations equations;
    const F32x16 zero = splat(0.0f);
    for (int p = 0; p < kUnknowns; ++p) {
      for (int q = 0; q < kUnknowns; ++q) equations.matrix[p][q] = zero;
      equations.right[p] = zero;
    }
    for (int i = 0; i < kLevels; ++i) {
      F32x16 weight = sums.weight[i];
      F32x16 weighted_magnitude = sums.weighted_magnitude[i];
      if (i + 1 < kLevels) {
        weight = sub(weight, sums.weight[i + 1]);
        weighted_magnitude = sub(weighted_magnitude, sums.weighted_magnitude[i + 1]);
      }
      F32x16 sign[kPlanes];
      for (int p = 0; p < kPlanes; ++p) {
        sign[p] = select(has_bits(pattern_[i], splat_bits(1u << (kPlanes - 1 - p))), splat(1.0f), splat(-1.0f));
      }
      for (int p = 0; p < kPlanes; ++p) {
        const F32x16 signed_weight = mul(sign[p], weight);
        for (int q = 0; q <= p; ++q) {
          equations.matrix[p][q] = add(equations.matrix[p][q], mul(signed_weight, sign[q]));
        }
        equations.right[p] = add(equations.right[p], mul(sign[p], weighted_magnitude));
        if (kMeans) {
          F32x16 weighted_sign = sums.weighted_sign[i];
          if (i + 1 < kLevels) weighted_sign = sub(weighted_sign, sums.weighted_sign[i + 1]);
          equations.matrix[kUnknowns - 1][p] = add(equations.matrix[kUnknowns - 1][p], mul(sign[p], weighted_sign));
        }
      }
    }
    if (kMeans) {
      equations.matrix[kUnknowns - 1][kUnknowns - 1] = sums.weight[0];
      equations.right[kUnknowns - 1] = sums.weighted_value;
    }
    for (int p = 0; p < kUnknowns; ++p) {
      for (int q = p + 1; q < kUnknowns; ++q) equations.matrix[p][q] = equations.matrix[q][p];
    }
    equations.total_weight = sums.weight[0];
    return equations;
  }

  // Gaussian elimination without pivoting: the matrix plus the ridge is positive definite.
  void solve(NormalEquations equations) {
    const F32x16 ridge = mul(splat(kRidge), equations.total_weight);
    for (int p = 0; p < kUnknowns; ++p) {
      equations.matrix[p][p] = add(equations.matrix[p][p], ridge);
      if (p < kPlanes) equations.right[p] = add(equations.right[p], mul(ridge, scale_[p]));
    }
    for (int pivot = 0; pivot < kUnknowns; ++pivot) {
      for (int p = pivot + 1; p < kUnknowns; ++p) {
        const F32x16 factor = div(equations.matrix[p][pivot], equations.matrix[pivot][pivot]);
        for (int q = pivot + 1; q < kUnknowns; ++q) {
          equations.matrix[p][q] = sub(equations.matrix[p][q], mul(factor, equations.matrix[pivot][q]));
        }
        equations.right[p] = sub(equations.right[p], mul(factor, equations.right[pivot]));
      }
    }
    F32x16 solution[kUnknowns];
    for (int p = kUnknowns - 1; p >= 0; --p) {
      F32x16 right = equations.right[p];
      for (int q = p + 1; q < kUnknowns; ++q) right = sub(right, mul(equations.matrix[p][q], solution[q]));
      solution[p] = div(right, equations.matrix[p][p]);
    }
    const Mask16 solvable = greater(equations.total_weight, splat(0.0f));
    for (int p = 0; p < kPlanes; ++p) scale_[p] = select(solvable, magnitude(solution[p]), scale_[p]);
    if (kMeans) mean_ = select(solvable, add(mean_, solution[kUnknowns - 1]), mean_);
    sort_scales();
  }

  // Replaces the scales by integer multiples of a unit: among the integers next to the present ratios those, with their
  // best unit, that cost least under the normal equations.
  void snap(const NormalEquations& equations) {
    F32x16 sum = scale_[0];
    for (int p = 1; p < kPlanes; ++p) sum = add(sum, scale_[p]);
    const F32x16 zero = splat(0.0f);
    const Mask16 positive = greater(sum, zero);
    const F32x16 per_unit = select(positive, div(splat(kLevelSum), sum), zero);
    F32x16 floors[kPlanes];
    for (int p = 1; p < kPlanes; ++p) floors[p] = whole_part(min(mul(scale_[p], per_unit), splat(kLevelSum)));

    F32x16 best_gain = zero;
    F32x16 best_unit = zero;
    F32x16 best[kPlanes];
    for (int p = 0; p < kPlanes; ++p) best[p] = zero;
    for (int choice = 0; choice < kLevels; ++choice) {
      F32x16 multiple[kPlanes];
      multiple[0] = splat(kLevelSum);
      for (int p = 1; p < kPlanes; ++p) {
        multiple[p] = add(floors[p], splat((choice >> (p - 1) & 1) != 0 ? 1.0f : 0.0f));
        multiple[0] = sub(multiple[0], multiple[p]);
      }
      F32x16 linear = zero;
      F32x16 quadratic = zero;
      for (int p = 0; p < kPlanes; ++p) {
        linear = add(linear, mul(equations.right[p], multiple[p]));
        F32x16 product = zero;
        for (int q = 0; q < kPlanes; ++q) product = add(product, mul(equations.matrix[p][q], multiple[q]));
        quadratic = add(quadratic, mul(product, multiple[p]));
      }
      const F32x16 unit = div(linear, quadratic);
      const F32x16 gain = select(greater_equal(multiple[0], zero), mul(linear, unit), zero);
      const Mask16 better = greater(gain, best_gain);
      best_gain = select(better, gain, best_gain);
      best_unit = select(better, unit, best_unit);
      for (int p = 0; p < kPlanes; ++p) best[p] = select(better, multiple[p], best[p]);
    }
    const Mask16 usable = greater(best_unit, zero);
    for (int p = 0; p < kPlanes; ++p) scale_[p] = select(usable, mul(best_unit, best[p]), scale_[p]);
    sort_scales();
  }

  F32x16 mean_;
  F32x16 scale_[kPlanes];  // descending, not negative
  F32x16 level_[kLevels];
  F32x16 pattern_[kLevels];
  F32x16 threshold_[kLevels];
};

}  // namespace
}  // namespace loop_singular_bit
