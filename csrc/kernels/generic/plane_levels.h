// The 2^P values that P sign planes of a row can give. Include after a simd/ header.
#pragma once

#include "generic/weight_tile.h"

namespace loop_singular_bit {
namespace {

// Lane = row. A pattern holds the signs in its lowest bits: bit kPlanes - 1 - p is plane p, 1 is +.
template <int kPlanes>
class PlaneLevels {
 public:
  void set(const F32x16* scale) {
    for (uint32_t i = 0; i < kLevels; ++i) {
      level_[i] = splat(0.0f);
      for (int p = 0; p < kPlanes; ++p) {
        const bool is_plus = (i >> (kPlanes - 1 - p)) & 1;
        level_[i] = is_plus ? add(level_[i], scale[p]) : sub(level_[i], scale[p]);
      }
    }
  }

  F32x16 nearest(F32x16 value) const {
    F32x16 best = level_[0];
    F32x16 distance = magnitude(sub(value, level_[0]));
    for (uint32_t i = 1; i < kLevels; ++i) {
      const F32x16 other = magnitude(sub(value, level_[i]));
      best = select(greater(distance, other), level_[i], best);
      distance = min(distance, other);
    }
    return best;
  }

  F32x16 pattern(F32x16 value) const {
    F32x16 best = splat_bits(0);
    F32x16 distance = magnitude(sub(value, level_[0]));
    for (uint32_t i = 1; i < kLevels; ++i) {
      const F32x16 other = magnitude(sub(value, level_[i]));
      best = select(greater(distance, other), splat_bits(i), best);
      distance = min(distance, other);
    }
    return best;
  }

  static Mask16 is_positive(F32x16 pattern, int plane) {
    return has_bits(pattern, splat_bits(uint32_t{1} << (kPlanes - 1 - plane)));
  }

 private:
  static constexpr uint32_t kLevels = 1u << kPlanes;
  F32x16 level_[kLevels];
};

}  // namespace
}  // namespace loop_singular_bit
