// Vector primitives for AVX-512 (F, BW, DQ, VL): sixteen lanes are one register. Contracts: simd/scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace loop_singular_bit {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;  // of sixteen lanes

struct F32x16 {
  __m512 all;
};

struct Mask16 {
  __mmask16 all;
};

// ---- memory ----

inline F32x16 load(const float* source) { return {_mm512_loadu_ps(source)}; }

inline F32x16 load_bfloat16(const uint16_t* source) {
  const __m512i lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16))};
}

inline F32x16 load_float16(const uint16_t* source) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}

inline void store(float* target, F32x16 v) { _mm512_storeu_ps(target, v.all); }

inline void store_bfloat16(uint16_t* target, F32x16 v) {
  const __m512i bits = _mm512_castps_si512(v.all);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v.all, v.all, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet)));
}

inline void store_float16(uint16_t* target, F32x16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(v.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline F32x16 splat(float value) { return {_mm512_set1_ps(value)}; }

inline void transpose(F32x16 rows[kLanes]) {
  __m512 pairs[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].all, rows[i + 1].all);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].all, rows[i + 1].all);
  }
  __m512 quads[kLanes];  // 4x4 blocks within each 128 bits
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 even_top = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 odd_top = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 even_bottom = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i].all = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
    rows[i + 4].all = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
    rows[i + 8].all = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
    rows[i + 12].all = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
  }
}

// ---- arithmetic ----

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.all, b.all)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.all, b.all)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.all, b.all)}; }
inline F32x16 fused_multiply_add(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.all, b.all)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.all, b.all)}; }

// ---- lanes as 32 bits ----

inline F32x16 splat_bits(uint32_t bits) { return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(bits)))}; }

inline F32x16 bits_and(F32x16 a, F32x16 b) { return {_mm512_and_ps(a.all, b.all)}; }
inline F32x16 bits_or(F32x16 a, F32x16 b) { return {_mm512_or_ps(a.all, b.all)}; }
inline F32x16 bits_xor(F32x16 a, F32x16 b) { return {_mm512_xor_ps(a.all, b.all)}; }

inline F32x16 truncate_to_int(F32x16 a) { return {_mm512_castsi512_ps(_mm512_cvttps_epi32(a.all))}; }
inline F32x16 float_from_int(F32x16 a) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(a.all))}; }

// ---- masks ----

inline Mask16 greater(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.all, b.all, _CMP_GT_OQ)}; }
inline Mask16 greater_equal(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.all, b.all, _CMP_GE_OQ)}; }

inline Mask16 has_bits(F32x16 a, F32x16 b) {
  return {_mm512_test_epi32_mask(_mm512_castps_si512(a.all), _mm512_castps_si512(b.all))};
}

inline Mask16 mask_from_bits(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
inline uint32_t mask_bits(Mask16 mask) { return mask.all; }

inline F32x16 select(Mask16 mask, F32x16 where_true, F32x16 where_false) {
  return {_mm512_mask_mov_ps(where_false.all, mask.all, where_true.all)};
}

inline F32x16 keep(Mask16 mask, F32x16 a) { return {_mm512_maskz_mov_ps(mask.all, a.all)}; }

inline F32x16 add_where(Mask16 mask, F32x16 a, F32x16 b) { return {_mm512_mask_add_ps(a.all, mask.all, a.all, b.all)}; }

inline F32x16 bits_or_where(Mask16 mask, F32x16 a, F32x16 b) {
  return {_mm512_mask_or_ps(a.all, mask.all, a.all, b.all)};
}

}  // namespace
}  // namespace loop_singular_bit
