// H = U U' with an upper triangular U, in blocks of 64 columns from the last to the first. Include after a simd/
// header.
//
// Only the lower triangle of rows is kept: row j holds U[0..j, j].
#pragma once

#include "generic/block_product.h"

namespace loop_singular_bit {
namespace {

inline int64_t factor_diagonal(float* matrix, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t j = end - 1; j >= begin; --j) {
    float* row = matrix + j * stride;
    const float pivot = row[j];
    if (!(pivot > 0.0f)) return j;
    const float root = __builtin_sqrtf(pivot);
    row[j] = root;
    for (int64_t i = begin; i < j; ++i) row[i] /= root;
    for (int64_t l = begin; l < j; ++l) {
      float* target = matrix + l * stride;
      for (int64_t i = begin; i <= l; ++i) target[i] -= row[l] * row[i];
    }
  }
  return -1;
}

// Lanes are columns before `begin`: x[j] = (h[j] - sum over l > j of U[j, l] x[l]) / U[j, j].
inline void factor_panel(float* matrix, int64_t stride, int64_t begin, int64_t end, int64_t lane_begin,
                         float* negated) {
  for (int64_t j = end - 1; j >= begin; --j) {
    float* row = matrix + j * stride + lane_begin;
    F32x16 x[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) x[v] = load(row + v * kLanes);
    for (int64_t l = end - 1; l > j; --l) {
      const F32x16 left = splat(matrix[l * stride + j]);
      const float* solved = negated + (l - begin) * stride + lane_begin;
      for (int v = 0; v < kBlockVectors; ++v) x[v] = fused_multiply_add(left, load(solved + v * kLanes), x[v]);
    }
    const F32x16 pivot = splat(matrix[j * stride + j]);
    float* target = negated + (j - begin) * stride + lane_begin;
    for (int v = 0; v < kBlockVectors; ++v) {
      const F32x16 value = div(x[v], pivot);
      store(row + v * kLanes, value);
      store(target + v * kLanes, sub(splat(0.0f), value));
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
