// Matrix products whose right side is 64 lanes wide. Include after a simd/ header.
#pragma once

#include "calibrated_kernels.h"

namespace loop_singular_bit {
namespace {

constexpr int kBlockVectors = kBlockRows / kLanes;

// Accumulators of kProductOutputs x kProductVectors vectors stay in registers.
constexpr int kProductOutputs = 6;
constexpr int kProductVectors = kVectorRegisters >= 32 ? 4 : 1;

template <int kOutputs, int kVectors>
void multiply_add_outputs(const float* matrix, int64_t input_stride, int64_t output_stride, int64_t inputs,
                          const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  F32x16 sum[kOutputs][kVectors];
  for (int o = 0; o < kOutputs; ++o) {
    for (int v = 0; v < kVectors; ++v) sum[o][v] = load(y + o * y_stride + v * kLanes);
  }
  for (int64_t i = 0; i < inputs; ++i) {
    F32x16 right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(x + i * x_stride + v * kLanes);
    for (int o = 0; o < kOutputs; ++o) {
      const F32x16 left = splat(matrix[i * input_stride + o * output_stride]);
      for (int v = 0; v < kVectors; ++v) sum[o][v] = fused_multiply_add(left, right[v], sum[o][v]);
    }
  }
  for (int o = 0; o < kOutputs; ++o) {
    for (int v = 0; v < kVectors; ++v) store(y + o * y_stride + v * kLanes, sum[o][v]);
  }
}

inline void multiply_add(const float* matrix, int64_t input_stride, int64_t output_stride, int64_t inputs,
                         int64_t outputs, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  int64_t o = 0;
  for (; o + kProductOutputs <= outputs; o += kProductOutputs) {
    for (int v = 0; v < kBlockVectors; v += kProductVectors) {
      multiply_add_outputs<kProductOutputs, kProductVectors>(matrix + o * output_stride, input_stride, output_stride,
                                                             inputs, x + v * kLanes, x_stride,
                                                             y + o * y_stride + v * kLanes, y_stride);
    }
  }
  for (; o < outputs; ++o) {
    for (int v = 0; v < kBlockVectors; v += kProductVectors) {
      multiply_add_outputs<1, kProductVectors>(matrix + o * output_stride, input_stride, output_stride, inputs,
                                               x + v * kLanes, x_stride, y + o * y_stride + v * kLanes, y_stride);
    }
  }
}

// Sums the lanes in a fixed order.
inline float sum_lanes(F32x16 a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float dot(const float* row, const float* vector, int64_t columns) {
  F32x16 even = splat(0.0f);
  F32x16 odd = splat(0.0f);
  int64_t k = 0;
  for (; k + 2 * kLanes <= columns; k += 2 * kLanes) {
    even = fused_multiply_add(load(row + k), load(vector + k), even);
    odd = fused_multiply_add(load(row + k + kLanes), load(vector + k + kLanes), odd);
  }
  if (k < columns) even = fused_multiply_add(load(row + k), load(vector + k), even);
  return sum_lanes(add(even, odd));
}

}  // namespace
}  // namespace loop_singular_bit
