// float32 <-> bfloat16 and float16, one element at a time. Included by instruction-set sources only.
#pragma once

#include <cstdint>

#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bfloat16(uint16_t half) { return float_from_bits(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float_from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  // A float with the same mantissa and an exponent too small by 112; the product sets it right, for subnormals as well.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000);
  const uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude << 13) : bits_from_float(scaled);
  return float_from_bits(bits | sign);
}

// Rounds to nearest even; NaN stays NaN.
inline uint16_t float16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal in float16: the adder rounds at its last bit
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

inline float load_element(const void* data, int64_t index, ElementType type) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return type == ElementType::kBFloat16 ? float_from_bfloat16(half) : float_from_float16(half);
}

inline void store_element(void* data, int64_t index, ElementType type, float value) {
  if (type == ElementType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        type == ElementType::kBFloat16 ? bfloat16_from_float(value) : float16_from_float(value);
  }
}

}  // namespace
}  // namespace loop_singular_bit
