// Vector primitives for AVX2 with F16C: sixteen lanes as two registers. Contracts: simd/scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace loop_singular_bit {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 8;  // of sixteen lanes

struct F32x16 {
  __m256 low, high;
};

struct Mask16 {
  __m256 low, high;
};

// ---- memory ----

inline F32x16 load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }

inline F32x16 load_bfloat16(const uint16_t* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}

inline F32x16 load_float16(const uint16_t* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

inline void store(float* target, F32x16 v) {
  _mm256_storeu_ps(target, v.low);
  _mm256_storeu_ps(target + 8, v.high);
}

// Rounds to nearest even; NaN stays NaN. Lanes are left in the low 16 bits.
inline __m256i bfloat16_lanes(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

inline void store_bfloat16(uint16_t* target, F32x16 v) {
  const __m256i pairs = _mm256_packus_epi32(bfloat16_lanes(v.low), bfloat16_lanes(v.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(pairs, 0xd8));
}

inline void store_float16(uint16_t* target, F32x16 v) {
  const __m128i low = _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_set_m128i(high, low));
}

inline F32x16 splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline void transpose_8x8(__m256 r[8]) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  __m256 quads[8];
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

inline void transpose(F32x16 rows[kLanes]) {
  __m256 block[2][2][8];  // [half of the rows][half of the lanes]
  for (int i = 0; i < 8; ++i) {
    block[0][0][i] = rows[i].low;
    block[0][1][i] = rows[i].high;
    block[1][0][i] = rows[i + 8].low;
    block[1][1][i] = rows[i + 8].high;
  }
  transpose_8x8(block[0][0]);
  transpose_8x8(block[0][1]);
  transpose_8x8(block[1][0]);
  transpose_8x8(block[1][1]);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {block[0][0][i], block[1][0][i]};
    rows[i + 8] = {block[0][1][i], block[1][1][i]};
  }
}

// ---- arithmetic ----

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F32x16 fused_multiply_add(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

// ---- lanes as 32 bits ----

inline F32x16 splat_bits(uint32_t bits) {
  const __m256 v = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(bits)));
  return {v, v};
}

inline F32x16 bits_and(F32x16 a, F32x16 b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline F32x16 bits_or(F32x16 a, F32x16 b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline F32x16 bits_xor(F32x16 a, F32x16 b) { return {_mm256_xor_ps(a.low, b.low), _mm256_xor_ps(a.high, b.high)}; }

inline F32x16 truncate_to_int(F32x16 a) {
  return {_mm256_castsi256_ps(_mm256_cvttps_epi32(a.low)), _mm256_castsi256_ps(_mm256_cvttps_epi32(a.high))};
}

inline F32x16 float_from_int(F32x16 a) {
  return {_mm256_cvtepi32_ps(_mm256_castps_si256(a.low)), _mm256_cvtepi32_ps(_mm256_castps_si256(a.high))};
}

// ---- masks ----

inline Mask16 greater(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)};
}

inline Mask16 greater_equal(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)};
}

inline __m256 nonzero_lanes(__m256 v) {
  const __m256i zero = _mm256_cmpeq_epi32(_mm256_castps_si256(v), _mm256_setzero_si256());
  return _mm256_castsi256_ps(_mm256_xor_si256(zero, _mm256_set1_epi32(-1)));
}

inline Mask16 has_bits(F32x16 a, F32x16 b) {
  return {nonzero_lanes(_mm256_and_ps(a.low, b.low)), nonzero_lanes(_mm256_and_ps(a.high, b.high))};
}

inline Mask16 mask_from_bits(uint32_t bits) {
  const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
  const __m256i low_lanes = _mm256_setr_epi32(1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7);
  const __m256i high_lanes = _mm256_slli_epi32(low_lanes, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low_lanes), low_lanes)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high_lanes), high_lanes))};
}

inline uint32_t mask_bits(Mask16 mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask.low)) | static_cast<uint32_t>(_mm256_movemask_ps(mask.high))
                                                                   << 8;
}

inline F32x16 select(Mask16 mask, F32x16 where_true, F32x16 where_false) {
  return {_mm256_blendv_ps(where_false.low, where_true.low, mask.low),
          _mm256_blendv_ps(where_false.high, where_true.high, mask.high)};
}

inline F32x16 keep(Mask16 mask, F32x16 a) { return {_mm256_and_ps(mask.low, a.low), _mm256_and_ps(mask.high, a.high)}; }

inline F32x16 add_where(Mask16 mask, F32x16 a, F32x16 b) { return add(a, keep(mask, b)); }

inline F32x16 bits_or_where(Mask16 mask, F32x16 a, F32x16 b) { return bits_or(a, keep(mask, b)); }

}  // namespace
}  // namespace loop_singular_bit
