// Activations for AVX2: loading, scaling, quantization.
#pragma once

#include <immintrin.h>

#include "generic/activations.h"
#include "generic/element_types.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx2 {

constexpr int64_t kLanesPerVector = 8;

// Codes are padded to whole words of signs, twice: loops may take 64 columns at a time.
inline int64_t padded_codes(int64_t in_features) { return (in_features + 63) / 64 * 64; }

inline __m256 load_eight(const void* data, int64_t index, ElementType type) {
  if (type == ElementType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
  if (type == ElementType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Elements [index, index + count) and zeros behind them; count may be anything.
inline __m256 load_some(const void* data, int64_t index, int64_t count, ElementType type) {
  if (count >= kLanesPerVector) return load_eight(data, index, type);
  alignas(32) float lanes[kLanesPerVector] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load_element(data, index + i, type);
  return _mm256_load_ps(lanes);
}

inline __m256 magnitude_lanes(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline float sum_lanes(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

inline float largest_lane(__m256 v) {
  __m128 largest = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  largest = _mm_max_ps(largest, _mm_movehl_ps(largest, largest));
  return _mm_cvtss_f32(_mm_max_ss(largest, _mm_movehdup_ps(largest)));
}

// Eight columns of a token from column k on, times their scales; zeros beyond the last.
inline __m256 load_scaled(const PackedWeightView& weight, const LinearInput& input, int64_t token, int64_t k) {
  const int64_t left = weight.in_features - k;
  const __m256 value = load_some(input.data, token * input.row_stride + k, left, input.type);
  if (weight.column_scales == nullptr) return value;
  return _mm256_mul_ps(value, load_some(weight.column_scales, k, left, ElementType::kFloat16));
}

struct TokenRange {
  float sum, square_sum, largest;
};

// Also writes columns[0 .. padded) unless nullptr.
inline TokenRange scan_token(const PackedWeightView& weight, const LinearInput& input, int64_t token, float* columns) {
  __m256 sum = _mm256_setzero_ps(), square_sum = _mm256_setzero_ps(), largest = _mm256_setzero_ps();
  for (int64_t k = 0; k < weight.in_features; k += kLanesPerVector) {
    const __m256 value = load_scaled(weight, input, token, k);
    if (columns != nullptr) _mm256_storeu_ps(columns + k, value);
    sum = _mm256_add_ps(sum, value);
    square_sum = _mm256_fmadd_ps(value, value, square_sum);
    largest = _mm256_max_ps(magnitude_lanes(value), largest);
  }
  return {sum_lanes(sum), sum_lanes(square_sum), largest_lane(largest)};
}

// Codes of eight activations as int32, within +-limit. Not a number becomes some code: its token's scale is not a
// number either.
inline __m256i codes_of(__m256 activations, __m256 inverse, __m256i limit) {
  const __m256i codes = _mm256_cvtps_epi32(_mm256_mul_ps(activations, inverse));
  return _mm256_max_epi32(_mm256_min_epi32(codes, limit), _mm256_sub_epi32(_mm256_setzero_si256(), limit));
}

inline int32_t sum_int32(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Low byte of each lane.
inline void store_low_bytes(int8_t* target, __m256i v) {
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(v, gather);
  const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), joined);
}

inline __m256i high_half(__m256i codes) {
  return _mm256_srai_epi32(_mm256_add_epi32(codes, _mm256_set1_epi32(128)), 8);
}

}  // namespace avx2
}  // namespace
}  // namespace loop_singular_bit
