// Vector primitives for AArch64 with the dot product instructions: sixteen lanes as four registers.
// Contracts: simd/scalar.h.
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
  const uint32x4_t low = vorrq_u32(vandq_u32(mask.quad[0], first), vandq_u32(mask.quad[1], vshlq_n_u32(first, 4)));
  const uint32x4_t high =
      vorrq_u32(vandq_u32(mask.quad[2], vshlq_n_u32(first, 8)), vandq_u32(mask.quad[3], vshlq_n_u32(first, 12)));
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

// ---- products of bytes, by the dot product instructions; contracts: simd/avxvnni.h ----

constexpr bool kLeftBytesAreSigned = true;
constexpr int kProductTokens = 4;

struct Bytes64 {
  int8x16_t quad[4];
};

struct Counts16 {
  int32x4_t quad[4];
};

struct ByteGroups {
  int8x16_t half[2];
};

inline Bytes64 load_bytes(const void* source) {
  const int8_t* bytes = static_cast<const int8_t*>(source);
  return {{vld1q_s8(bytes), vld1q_s8(bytes + 16), vld1q_s8(bytes + 32), vld1q_s8(bytes + 48)}};
}

inline void store_bytes(void* target, Bytes64 v) {
  int8_t* bytes = static_cast<int8_t*>(target);
  for (int i = 0; i < 4; ++i) vst1q_s8(bytes + 16 * i, v.quad[i]);
}

inline Bytes64 splat_byte(int value) {
  const int8x16_t v = vdupq_n_s8(static_cast<int8_t>(value));
  return {{v, v, v, v}};
}

inline Bytes64 bytes_and(Bytes64 a, Bytes64 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vandq_s8(a.quad[i], b.quad[i]);
  return a;
}

inline Bytes64 bytes_xor_words(Bytes64 a, int32_t word) {
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(word));
  for (int i = 0; i < 4; ++i) a.quad[i] = veorq_s8(a.quad[i], all);
  return a;
}

inline Bytes64 bytes_add(Bytes64 a, Bytes64 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vaddq_s8(a.quad[i], b.quad[i]);
  return a;
}

template <int kBit>
inline Bytes64 keep_low_bit(Bytes64 a) {
  return bytes_and(a, splat_byte(1 << kBit));
}

inline Bytes64 upper_bits(Bytes64 a) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vshrq_n_s8(a.quad[i], 4);
  return a;
}

inline Bytes64 keep_where_bit(Bytes64 bytes, Bytes64 bit, Bytes64 value) {
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t is_set = vtstq_s8(bytes.quad[i], bit.quad[i]);
    bytes.quad[i] = vandq_s8(vreinterpretq_s8_u8(is_set), value.quad[i]);
  }
  return bytes;
}

inline Bytes64 interleave_bytes(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d) {
  const int8x16x2_t ab = vzipq_s8(vld1q_s8(a), vld1q_s8(b));
  const int8x16x2_t cd = vzipq_s8(vld1q_s8(c), vld1q_s8(d));
  Bytes64 result;
  for (int i = 0; i < 2; ++i) {
    const int16x8x2_t abcd = vzipq_s16(vreinterpretq_s16_s8(ab.val[i]), vreinterpretq_s16_s8(cd.val[i]));
    result.quad[2 * i] = vreinterpretq_s8_s16(abcd.val[0]);
    result.quad[2 * i + 1] = vreinterpretq_s8_s16(abcd.val[1]);
  }
  return result;
}

inline Counts16 zero_counts() {
  const int32x4_t zero = vdupq_n_s32(0);
  return {{zero, zero, zero, zero}};
}

inline Counts16 counts_add(Counts16 a, Counts16 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vaddq_s32(a.quad[i], b.quad[i]);
  return a;
}

inline Counts16 counts_sub(Counts16 a, int32_t b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vsubq_s32(a.quad[i], vdupq_n_s32(b));
  return a;
}

template <int kBits>
inline Counts16 shift_counts_right(Counts16 a) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vshrq_n_s32(a.quad[i], kBits);
  return a;
}

inline F32x16 float_from_counts(Counts16 a) {
  F32x16 v;
  for (int i = 0; i < 4; ++i) v.quad[i] = vcvtq_f32_s32(a.quad[i]);
  return v;
}

inline ByteGroups load_groups(const int8_t* bytes) { return {{vld1q_s8(bytes), vld1q_s8(bytes + 16)}}; }

template <int kGroup>
inline Counts16 dot_accumulate(Counts16 sums, Bytes64 left, ByteGroups right) {
  for (int i = 0; i < 4; ++i) {
    sums.quad[i] = vdotq_laneq_s32(sums.quad[i], left.quad[i], right.half[kGroup / 4], kGroup % 4);
  }
  return sums;
}

// The same with unsigned right bytes and left bytes of 0..127.
template <int kGroup>
inline Counts16 dot_accumulate_unsigned(Counts16 sums, Bytes64 left, ByteGroups right) {
  const uint8x16_t x = vreinterpretq_u8_s8(right.half[kGroup / 4]);
  for (int i = 0; i < 4; ++i) {
    sums.quad[i] = vreinterpretq_s32_u32(
        vdotq_laneq_u32(vreinterpretq_u32_s32(sums.quad[i]), vreinterpretq_u8_s8(left.quad[i]), x, kGroup % 4));
  }
  return sums;
}

inline Counts16 dot_accumulate_four(Counts16 sums, Bytes64 left, const int8_t* right) {
  int32_t four;
  __builtin_memcpy(&four, right, sizeof(four));
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sums.quad[i] = vdotq_s32(sums.quad[i], left.quad[i], x);
  return sums;
}

// ---- between floats and bytes ----

struct Int8x16 {
  int8x16_t all;
};

struct Codes32 {
  int8x16_t low, high;
};

struct Int32x4 {
  int32x4_t all;
};

inline int16x8_t int16_from_float(float32x4_t low, float32x4_t high) {
  return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(low)), vqmovn_s32(vcvtnq_s32_f32(high)));
}

inline Int8x16 round_to_int8(F32x16 a) {
  return {vcombine_s8(vqmovn_s16(int16_from_float(a.quad[0], a.quad[1])),
                      vqmovn_s16(int16_from_float(a.quad[2], a.quad[3])))};
}

inline Int8x16 round_to_uint8(F32x16 a) {
  return {vreinterpretq_s8_u8(vcombine_u8(vqmovun_s16(int16_from_float(a.quad[0], a.quad[1])),
                                          vqmovun_s16(int16_from_float(a.quad[2], a.quad[3]))))};
}

inline void round_to_halves(F32x16 a, Int8x16* high, Int8x16* low) {
  const int16x8_t first = int16_from_float(a.quad[0], a.quad[1]), second = int16_from_float(a.quad[2], a.quad[3]);
  const int16x8_t half = vdupq_n_s16(128);
  high->all = vcombine_s8(vshrn_n_s16(vaddq_s16(first, half), 8), vshrn_n_s16(vaddq_s16(second, half), 8));
  low->all = vcombine_s8(vmovn_s16(first), vmovn_s16(second));
}

inline void store_int8(int8_t* target, Int8x16 a) { vst1q_s8(target, a.all); }

inline Codes32 group_by_bit(Int8x16 first, Int8x16 second) {
  const int8x16x2_t even_odd = vzipq_s8(first.all, second.all);
  const int8x16x2_t groups = vzipq_s8(even_odd.val[0], even_odd.val[1]);
  return {groups.val[0], groups.val[1]};
}

inline void store_codes(int8_t* target, Codes32 codes) {
  vst1q_s8(target, codes.low);
  vst1q_s8(target + 16, codes.high);
}

inline Int32x4 zero_sums() { return {vdupq_n_s32(0)}; }

inline Int32x4 add_codes(Int32x4 sums, Codes32 codes) {
  const int8x16_t ones = vdupq_n_s8(1);
  return {vdotq_s32(vdotq_s32(sums.all, codes.low, ones), codes.high, ones)};
}

inline Int32x4 add_unsigned_codes(Int32x4 sums, Codes32 codes) {
  const uint8x16_t ones = vdupq_n_u8(1);
  const uint32x4_t low = vdotq_u32(vreinterpretq_u32_s32(sums.all), vreinterpretq_u8_s8(codes.low), ones);
  return {vreinterpretq_s32_u32(vdotq_u32(low, vreinterpretq_u8_s8(codes.high), ones))};
}

inline int32_t total(Int32x4 sums) { return vaddvq_s32(sums.all); }

inline F32x16 load_int8(const int8_t* source) {
  const int8x16_t bytes = vld1q_s8(source);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}

inline F32x16 gather(const float* source, const uint16_t* indices) {
  F32x16 v;
  for (int i = 0; i < 4; ++i) {
    v.quad[i] = vld1q_dup_f32(source + indices[4 * i]);
    v.quad[i] = vld1q_lane_f32(source + indices[4 * i + 1], v.quad[i], 1);
    v.quad[i] = vld1q_lane_f32(source + indices[4 * i + 2], v.quad[i], 2);
    v.quad[i] = vld1q_lane_f32(source + indices[4 * i + 3], v.quad[i], 3);
  }
  return v;
}

}  // namespace
}  // namespace loop_singular_bit
