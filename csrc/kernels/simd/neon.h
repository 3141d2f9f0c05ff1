// Vector primitives for AArch64: sixteen lanes as four registers. Contracts: simd/scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace loop_singular_bit {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 8;  // of sixteen lanes

struct F32x16 {
  float32x4_t quad[4];
};

struct Mask16 {
  uint32x4_t quad[4];
};

inline uint32x4_t as_bits(float32x4_t v) { return vreinterpretq_u32_f32(v); }
inline float32x4_t as_float(uint32x4_t v) { return vreinterpretq_f32_u32(v); }

// ---- memory ----

inline F32x16 load(const float* source) {
  return {{vld1q_f32(source), vld1q_f32(source + 4), vld1q_f32(source + 8), vld1q_f32(source + 12)}};
}

inline F32x16 load_bfloat16(const uint16_t* source) {
  F32x16 v;
  for (int i = 0; i < 4; ++i) v.quad[i] = as_float(vshll_n_u16(vld1_u16(source + 4 * i), 16));
  return v;
}

inline F32x16 load_float16(const uint16_t* source) {
  F32x16 v;
  for (int i = 0; i < 4; ++i) v.quad[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + 4 * i)));
  return v;
}

inline void store(float* target, F32x16 v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(target + 4 * i, v.quad[i]);
}

// Rounds to nearest even; NaN stays NaN.
inline void store_bfloat16(uint16_t* target, F32x16 v) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = as_bits(v.quad[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(target + 4 * i, vshrn_n_u32(vbslq_u32(vceqq_f32(v.quad[i], v.quad[i]), rounded, quiet), 16));
  }
}

inline void store_float16(uint16_t* target, F32x16 v) {
  for (int i = 0; i < 4; ++i) vst1_u16(target + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.quad[i])));
}

inline F32x16 splat(float value) {
  const float32x4_t v = vdupq_n_f32(value);
  return {{v, v, v, v}};
}

inline void transpose(F32x16 rows[kLanes]) {
  F32x16 columns[kLanes];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const float32x4x2_t top = vtrnq_f32(rows[4 * i].quad[j], rows[4 * i + 1].quad[j]);
      const float32x4x2_t bottom = vtrnq_f32(rows[4 * i + 2].quad[j], rows[4 * i + 3].quad[j]);
      columns[4 * j].quad[i] = vcombine_f32(vget_low_f32(top.val[0]), vget_low_f32(bottom.val[0]));
      columns[4 * j + 1].quad[i] = vcombine_f32(vget_low_f32(top.val[1]), vget_low_f32(bottom.val[1]));
      columns[4 * j + 2].quad[i] = vcombine_f32(vget_high_f32(top.val[0]), vget_high_f32(bottom.val[0]));
      columns[4 * j + 3].quad[i] = vcombine_f32(vget_high_f32(top.val[1]), vget_high_f32(bottom.val[1]));
    }
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = columns[i];
}

// ---- arithmetic ----

inline F32x16 add(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vaddq_f32(a.quad[i], b.quad[i]);
  return a;
}

inline F32x16 sub(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vsubq_f32(a.quad[i], b.quad[i]);
  return a;
}

inline F32x16 mul(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vmulq_f32(a.quad[i], b.quad[i]);
  return a;
}

inline F32x16 div(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vdivq_f32(a.quad[i], b.quad[i]);
  return a;
}

inline F32x16 fused_multiply_add(F32x16 a, F32x16 b, F32x16 c) {
  for (int i = 0; i < 4; ++i) c.quad[i] = vfmaq_f32(c.quad[i], a.quad[i], b.quad[i]);
  return c;
}

// Not vminq: it gives a NaN where either is one, and -0 where zeros differ in sign.
inline F32x16 min(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vbslq_f32(vcltq_f32(a.quad[i], b.quad[i]), a.quad[i], b.quad[i]);
  return a;
}

inline F32x16 max(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vbslq_f32(vcgtq_f32(a.quad[i], b.quad[i]), a.quad[i], b.quad[i]);
  return a;
}

// ---- lanes as 32 bits ----

inline F32x16 splat_bits(uint32_t bits) {
  const float32x4_t v = as_float(vdupq_n_u32(bits));
  return {{v, v, v, v}};
}

inline F32x16 bits_and(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = as_float(vandq_u32(as_bits(a.quad[i]), as_bits(b.quad[i])));
  return a;
}

inline F32x16 bits_or(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = as_float(vorrq_u32(as_bits(a.quad[i]), as_bits(b.quad[i])));
  return a;
}

inline F32x16 bits_xor(F32x16 a, F32x16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = as_float(veorq_u32(as_bits(a.quad[i]), as_bits(b.quad[i])));
  return a;
}

inline F32x16 truncate_to_int(F32x16 a) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vreinterpretq_f32_s32(vcvtq_s32_f32(a.quad[i]));
  return a;
}

inline F32x16 float_from_int(F32x16 a) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vcvtq_f32_s32(vreinterpretq_s32_f32(a.quad[i]));
  return a;
}

// ---- masks ----

inline Mask16 greater(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < 4; ++i) mask.quad[i] = vcgtq_f32(a.quad[i], b.quad[i]);
  return mask;
}

inline Mask16 greater_equal(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < 4; ++i) mask.quad[i] = vcgeq_f32(a.quad[i], b.quad[i]);
  return mask;
}

inline Mask16 has_bits(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < 4; ++i) mask.quad[i] = vtstq_u32(as_bits(a.quad[i]), as_bits(b.quad[i]));
  return mask;
}

inline Mask16 mask_from_bits(uint32_t bits) {
  const uint32x4_t all = vdupq_n_u32(bits);
  const uint32x4_t first = {1, 2, 4, 8};
  return {{vtstq_u32(all, first), vtstq_u32(all, vshlq_n_u32(first, 4)), vtstq_u32(all, vshlq_n_u32(first, 8)),
           vtstq_u32(all, vshlq_n_u32(first, 12))}};
}

inline uint32_t mask_bits(Mask16 mask) {
  const uint32x4_t first = {1, 2, 4, 8};
  const uint32x4_t low =
      vorrq_u32(vandq_u32(mask.quad[0], first), vandq_u32(mask.quad[1], vshlq_n_u32(first, 4)));
  const uint32x4_t high = vorrq_u32(vandq_u32(mask.quad[2], vshlq_n_u32(first, 8)),
                                    vandq_u32(mask.quad[3], vshlq_n_u32(first, 12)));
  return vaddvq_u32(vorrq_u32(low, high));
}

inline F32x16 select(Mask16 mask, F32x16 where_true, F32x16 where_false) {
  for (int i = 0; i < 4; ++i) where_true.quad[i] = vbslq_f32(mask.quad[i], where_true.quad[i], where_false.quad[i]);
  return where_true;
}

inline F32x16 keep(Mask16 mask, F32x16 a) {
  for (int i = 0; i < 4; ++i) a.quad[i] = as_float(vandq_u32(mask.quad[i], as_bits(a.quad[i])));
  return a;
}

inline F32x16 add_where(Mask16 mask, F32x16 a, F32x16 b) { return add(a, keep(mask, b)); }

inline F32x16 bits_or_where(Mask16 mask, F32x16 a, F32x16 b) { return bits_or(a, keep(mask, b)); }

}  // namespace
}  // namespace loop_singular_bit
