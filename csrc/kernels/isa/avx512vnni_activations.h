// Activations for AVX-512 VNNI: loading, scaling, quantization, and the byte order that the sign words ask for.
#pragma once

#include <immintrin.h>

#include "generic/activations.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

// accumulator + u8 x s8, four products per lane. g++ 12 copies the accumulator before every dpbusd intrinsic; the tied
// operand prevents it. clang does better with the intrinsic.
inline __m512i dot_accumulate(__m512i accumulator, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(__clang__)
  return _mm512_dpbusd_epi32(accumulator, unsigned_bytes, signed_bytes);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(accumulator) : "v"(unsigned_bytes), "v"(signed_bytes));
  return accumulator;
#endif
}

// The first `count` (up to 16) lanes; 0 selects none.
inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load_float16_lanes(const uint16_t* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

// 16 elements as float; masked-out ones are not read and give 0.
template <ElementType kType>
inline __m512 load_lanes(const void* data, int64_t index, __mmask16 mask) {
  if (kType == ElementType::kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index);
  if (kType == ElementType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 load_lanes(const void* data, int64_t index, __mmask16 mask, ElementType type) {
  if (type == ElementType::kFloat32) return load_lanes<ElementType::kFloat32>(data, index, mask);
  if (type == ElementType::kFloat16) return load_lanes<ElementType::kFloat16>(data, index, mask);
  return load_lanes<ElementType::kBFloat16>(data, index, mask);
}

// Rounds to nearest even. Masked-out elements are not written.
inline void store_lanes(void* data, int64_t index, __mmask16 mask, ElementType type, __m512 values) {
  if (type == ElementType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + index, mask, values);
    return;
  }
  __m256i half;
  if (type == ElementType::kFloat16) {
    half = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i bias = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    half = _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40)));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, mask, half);
}

struct ScaledColumns {
  float sum, square_sum;
  __m512 group_max[4];  // of the magnitudes; column k belongs to group k % 64
};

// columns[k] = input[k] * column_scales[k], and zeros up to the next multiple of 64.
template <ElementType kType, bool kHasScales>
inline ScaledColumns scale_columns(const void* row, const uint16_t* column_scales, int64_t in_features,
                                   float* columns) {
  ScaledColumns result;
  __m512 sum[4], square_sum[4];
  for (int i = 0; i < 4; ++i) result.group_max[i] = sum[i] = square_sum[i] = _mm512_setzero_ps();
  for (int64_t block = 0; block < in_features; block += 64) {
    for (int i = 0; i < 4; ++i) {
      const int64_t k = block + 16 * i;
      const __mmask16 mask = first_lanes(in_features > k ? in_features - k : 0);
      __m512 value = load_lanes<kType>(row, k, mask);
      if (kHasScales) value = _mm512_mul_ps(value, load_lanes<ElementType::kFloat16>(column_scales, k, mask));
      _mm512_storeu_ps(columns + k, value);
      result.group_max[i] = _mm512_max_ps(_mm512_abs_ps(value), result.group_max[i]);
      sum[i] = _mm512_add_ps(sum[i], value);
      square_sum[i] = _mm512_fmadd_ps(value, value, square_sum[i]);
    }
  }
  const auto total = [](const __m512* v) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(v[0], v[1]), _mm512_add_ps(v[2], v[3])));
  };
  result.sum = total(sum);
  result.square_sum = total(square_sum);
  return result;
}

inline ScaledColumns scale_columns(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                                   float* columns) {
  const uint16_t* scales = weight.column_scales;
  const int64_t width = weight.in_features;
  if (input.type == ElementType::kFloat32) {
    const float* row = static_cast<const float*>(input.data) + token * input.row_stride;
    return scales != nullptr ? scale_columns<ElementType::kFloat32, true>(row, scales, width, columns)
                             : scale_columns<ElementType::kFloat32, false>(row, scales, width, columns);
  }
  const uint16_t* row = static_cast<const uint16_t*>(input.data) + token * input.row_stride;
  if (input.type == ElementType::kBFloat16) {
    return scales != nullptr ? scale_columns<ElementType::kBFloat16, true>(row, scales, width, columns)
                             : scale_columns<ElementType::kBFloat16, false>(row, scales, width, columns);
  }
  return scales != nullptr ? scale_columns<ElementType::kFloat16, true>(row, scales, width, columns)
                           : scale_columns<ElementType::kFloat16, false>(row, scales, width, columns);
}

inline float largest_of(const ScaledColumns& scaled) {
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(scaled.group_max[0], scaled.group_max[1]),
                                            _mm512_max_ps(scaled.group_max[2], scaled.group_max[3])));
}

// As select_exact_columns(), 64 columns at a time. load(k) gives the columns from k on, zeros beyond the last.
template <typename Load>
inline float select_exact_columns(const __m512* groups, int64_t in_features, const Load& load, ExactColumns* exact) {
  alignas(64) float group_max[kExactGroups];
  for (int i = 0; i < 4; ++i) _mm512_store_ps(group_max + 16 * i, groups[i]);
  float threshold = 0.0f;
  for (int64_t group = 0; group < kExactGroups; ++group) {
    const __m512 value = _mm512_set1_ps(group_max[group]);
    uint64_t at_least = 0;
    for (int i = 0; i < 4; ++i) {
      at_least |= static_cast<uint64_t>(_mm512_cmp_ps_mask(groups[i], value, _CMP_GE_OQ)) << (16 * i);
    }
    const bool reaches = __builtin_popcountll(at_least) >= kExactColumns;
    threshold = reaches && group_max[group] > threshold ? group_max[group] : threshold;
  }

  const __m512 thresholds = _mm512_set1_ps(threshold);
  ExactSelection selection = {0, 0.0f};
  __m512 below[4];
  for (int i = 0; i < 4; ++i) below[i] = _mm512_setzero_ps();
  exact->exact_count = 0;
  for (int64_t block = 0; block < in_features; block += 64) {
    uint64_t candidates = 0;
    for (int i = 0; i < 4; ++i) {
      const __m512 magnitude = _mm512_abs_ps(load(block + 16 * i));
      const __mmask16 is_below = _mm512_cmp_ps_mask(magnitude, thresholds, _CMP_LT_OQ);
      const __mmask16 is_candidate = _mm512_cmp_ps_mask(magnitude, thresholds, _CMP_GE_OQ);
      below[i] = _mm512_mask_max_ps(below[i], is_below, below[i], magnitude);
      candidates |= static_cast<uint64_t>(is_candidate) << (16 * i);
    }
    while (candidates != 0) {
      const int64_t k = block + __builtin_ctzll(candidates);
      alignas(64) float sixteen[16];
      _mm512_store_ps(sixteen, load(k / 16 * 16));
      offer_exact_column(k, sixteen[k % 16], &selection, exact);
      candidates &= candidates - 1;
    }
  }
  const float below_max =
      _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(below[0], below[1]), _mm512_max_ps(below[2], below[3])));
  return below_max > selection.rest_max ? below_max : selection.rest_max;
}

inline float select_exact_columns(const ScaledColumns& scaled, int64_t in_features, DecodeActivations* activations) {
  const auto load = [&](int64_t k) { return _mm512_loadu_ps(activations->columns + k); };
  return select_exact_columns(scaled.group_max, in_features, load, activations);
}

// A sign word masked with 1 << b, b = 0..7, leaves one bit in each of its four bytes: the columns b, 8 + b, 16 + b and
// 24 + b. So the codes of a word are stored as eight groups of four: code[4 * b + i] is column 8 * i + b.
inline __m512i group_codes_by_bit(__m512i natural) {
  const __m512i pair_bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  const __m512i interleave_lanes = _mm512_set_epi16(31, 23, 30, 22, 29, 21, 28, 20, 27, 19, 26, 18, 25, 17, 24, 16,  //
                                                    15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  return _mm512_permutexvar_epi16(interleave_lanes, _mm512_shuffle_epi8(natural, pair_bytes));
}

inline __m512i join_lanes(__m128i a, __m128i b, __m128i c, __m128i d) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c), 1);
}

// Quantizes 64 columns. Returns them grouped by bit; `natural` gets them in order.
inline __m512i encode_int8(const float* columns, __m512 inverse, __m512i* code_sum, int8_t* natural) {
  __m128i codes[4];
  for (int i = 0; i < 4; ++i) {
    codes[i] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(columns + 16 * i), inverse)));
  }
  const __m512i joined = join_lanes(codes[0], codes[1], codes[2], codes[3]);
  *code_sum = _mm512_dpbusd_epi32(*code_sum, _mm512_set1_epi8(1), joined);
  _mm512_storeu_si512(natural, joined);
  return group_codes_by_bit(joined);
}

// The same with magnitudes only, as unsigned bytes. Bit k of `negative` is set where columns[k] is negative.
inline __m512i encode_magnitudes(const float* columns, __m512 inverse, __m512i* code_sum, uint64_t* negative) {
  __m128i codes[4];
  *negative = 0;
  for (int i = 0; i < 4; ++i) {
    const __m512 value = _mm512_loadu_ps(columns + 16 * i);
    codes[i] = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_abs_ps(value), inverse)));
    *negative |= static_cast<uint64_t>(_mm512_movepi32_mask(_mm512_castps_si512(value))) << (16 * i);
  }
  const __m512i joined = join_lanes(codes[0], codes[1], codes[2], codes[3]);
  *code_sum = _mm512_dpbusd_epi32(*code_sum, joined, _mm512_set1_epi8(1));
  return group_codes_by_bit(joined);
}

struct Int16Codes {
  __m512i high, low;  // code = 256 * high + low, high in [-127, 127], low in [-128, 127]
};

inline Int16Codes encode_int16(const float* columns, __m512 inverse, __m512i* high_sum, __m512i* low_sum,
                               int8_t* natural_high, int8_t* natural_low) {
  __m128i high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(columns + 16 * i), inverse));
    high[i] = _mm512_cvtsepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8));
    low[i] = _mm512_cvtepi32_epi8(code);
  }
  const Int16Codes joined = {join_lanes(high[0], high[1], high[2], high[3]),
                             join_lanes(low[0], low[1], low[2], low[3])};
  *high_sum = _mm512_dpbusd_epi32(*high_sum, _mm512_set1_epi8(1), joined.high);
  *low_sum = _mm512_dpbusd_epi32(*low_sum, _mm512_set1_epi8(1), joined.low);
  if (natural_high != nullptr) _mm512_storeu_si512(natural_high, joined.high);
  if (natural_low != nullptr) _mm512_storeu_si512(natural_low, joined.low);
  return {group_codes_by_bit(joined.high), group_codes_by_bit(joined.low)};
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
