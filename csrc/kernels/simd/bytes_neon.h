// Products of bytes for AArch64 with the dot product instructions: sixteen lanes of four bytes as four registers.
// Include after simd/neon.h. Contracts: simd/bytes_avxvnni.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace loop_singular_bit {
namespace {

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

inline Bytes64 bytes_add(Bytes64 a, Bytes64 b) {
  for (int i = 0; i < 4; ++i) a.quad[i] = vaddq_s8(a.quad[i], b.quad[i]);
  return a;
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

inline Counts16 dot_accumulate_four(Counts16 sums, Bytes64 left, const int8_t* right) {
  int32_t four;
  __builtin_memcpy(&four, right, sizeof(four));
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sums.quad[i] = vdotq_s32(sums.quad[i], left.quad[i], x);
  return sums;
}

// ---- between floats and bytes ----

inline int16x8_t int16_from_float(float32x4_t low, float32x4_t high) {
  return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(low)), vqmovn_s32(vcvtnq_s32_f32(high)));
}

inline void store_rounded_int8(int8_t* target, F32x16 a) {
  vst1_s8(target, vqmovn_s16(int16_from_float(a.quad[0], a.quad[1])));
  vst1_s8(target + 8, vqmovn_s16(int16_from_float(a.quad[2], a.quad[3])));
}

inline void store_rounded_halves(int8_t* high, int8_t* low, F32x16 a) {
  for (int i = 0; i < 2; ++i) {
    const int16x8_t code = int16_from_float(a.quad[2 * i], a.quad[2 * i + 1]);
    vst1_s8(high + 8 * i, vqmovn_s16(vshrq_n_s16(vaddq_s16(code, vdupq_n_s16(128)), 8)));
    vst1_s8(low + 8 * i, vmovn_s16(code));
  }
}

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
