// Vector primitives for any machine: sixteen lanes as an array. The other simd/ headers provide the same names with the
// same results, bit for bit, for everything that is not a NaN.
#pragma once

#include <cstdint>

#include "generic/element_types.h"

namespace loop_singular_bit {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 8;  // of sixteen lanes: how far loops are unrolled

struct F32x16 {
  float lane[kLanes];
};

// Lanes are all ones or all zeros.
struct Mask16 {
  uint32_t lane[kLanes];
};

// ---- memory ----

inline F32x16 load(const float* source) {
  F32x16 v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = source[i];
  return v;
}

inline F32x16 load_bfloat16(const uint16_t* source) {
  F32x16 v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = float_from_bfloat16(source[i]);
  return v;
}

inline F32x16 load_float16(const uint16_t* source) {
  F32x16 v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = float_from_float16(source[i]);
  return v;
}

inline void store(float* target, F32x16 v) {
  for (int i = 0; i < kLanes; ++i) target[i] = v.lane[i];
}

inline void store_bfloat16(uint16_t* target, F32x16 v) {
  for (int i = 0; i < kLanes; ++i) target[i] = bfloat16_from_float(v.lane[i]);
}

inline void store_float16(uint16_t* target, F32x16 v) {
  for (int i = 0; i < kLanes; ++i) target[i] = float16_from_float(v.lane[i]);
}

inline F32x16 splat(float value) {
  F32x16 v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = value;
  return v;
}

// Row i, lane j of `rows` becomes row j, lane i.
inline void transpose(F32x16 rows[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = rows[j].lane[i];
      rows[j].lane[i] = rows[i].lane[j];
      rows[i].lane[j] = upper;
    }
  }
}

// ---- arithmetic ----

inline F32x16 add(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}

inline F32x16 sub(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}

inline F32x16 mul(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}

inline F32x16 div(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] /= b.lane[i];
  return a;
}

// a * b + c, rounded once.
inline F32x16 fused_multiply_add(F32x16 a, F32x16 b, F32x16 c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}

// b where either is a NaN.
inline F32x16 min(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

// b where either is a NaN.
inline F32x16 max(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}

// ---- lanes as 32 bits ----

inline F32x16 splat_bits(uint32_t bits) { return splat(float_from_bits(bits)); }

inline F32x16 bits_and(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = float_from_bits(bits_from_float(a.lane[i]) & bits_from_float(b.lane[i]));
  return a;
}

inline F32x16 bits_or(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = float_from_bits(bits_from_float(a.lane[i]) | bits_from_float(b.lane[i]));
  return a;
}

inline F32x16 bits_xor(F32x16 a, F32x16 b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = float_from_bits(bits_from_float(a.lane[i]) ^ bits_from_float(b.lane[i]));
  return a;
}

// Lanes are converted to int32 toward zero; each must be in range.
inline F32x16 truncate_to_int(F32x16 a) {
  for (int i = 0; i < kLanes; ++i) {
    a.lane[i] = float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(a.lane[i])));
  }
  return a;
}

// The inverse: lanes hold int32.
inline F32x16 float_from_int(F32x16 a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = static_cast<float>(static_cast<int32_t>(bits_from_float(a.lane[i])));
  return a;
}

// ---- masks; comparisons are false where either side is a NaN ----

inline Mask16 greater(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < kLanes; ++i) mask.lane[i] = a.lane[i] > b.lane[i] ? ~0u : 0u;
  return mask;
}

inline Mask16 greater_equal(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < kLanes; ++i) mask.lane[i] = a.lane[i] >= b.lane[i] ? ~0u : 0u;
  return mask;
}

// Where a and b have a bit in common.
inline Mask16 has_bits(F32x16 a, F32x16 b) {
  Mask16 mask;
  for (int i = 0; i < kLanes; ++i) {
    mask.lane[i] = (bits_from_float(a.lane[i]) & bits_from_float(b.lane[i])) != 0 ? ~0u : 0u;
  }
  return mask;
}

// Lane i from bit i.
inline Mask16 mask_from_bits(uint32_t bits) {
  Mask16 mask;
  for (int i = 0; i < kLanes; ++i) mask.lane[i] = (bits >> i & 1) != 0 ? ~0u : 0u;
  return mask;
}

inline uint32_t mask_bits(Mask16 mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask.lane[i] & 1) << i;
  return bits;
}

inline F32x16 select(Mask16 mask, F32x16 where_true, F32x16 where_false) {
  for (int i = 0; i < kLanes; ++i) {
    where_true.lane[i] = float_from_bits((bits_from_float(where_true.lane[i]) & mask.lane[i]) |
                                         (bits_from_float(where_false.lane[i]) & ~mask.lane[i]));
  }
  return where_true;
}

// a where mask, else 0.
inline F32x16 keep(Mask16 mask, F32x16 a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = float_from_bits(bits_from_float(a.lane[i]) & mask.lane[i]);
  return a;
}

// a + b where mask, else a; a must not be -0.0.
inline F32x16 add_where(Mask16 mask, F32x16 a, F32x16 b) { return add(a, keep(mask, b)); }

// a | b where mask, else a.
inline F32x16 bits_or_where(Mask16 mask, F32x16 a, F32x16 b) { return bits_or(a, keep(mask, b)); }

}  // namespace
}  // namespace loop_singular_bit
