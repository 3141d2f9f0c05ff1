// The body of a SimdProbe. Include after a simd/ header.
#pragma once

#include "tests/simd_probe.h"

namespace loop_singular_bit {
namespace {

struct ProbeOutput {
  uint32_t* next;

  void put(F32x16 v) {
    float lanes[kLanes];
    store(lanes, v);
    __builtin_memcpy(next, lanes, sizeof(lanes));
    next += kLanes;
  }
  void put(Mask16 mask) {
    for (int i = 0; i < kLanes; ++i) next[i] = mask_bits(mask) >> i & 1;
    next += kLanes;
  }
  void put(const uint16_t* halves) {
    for (int i = 0; i < kLanes; ++i) next[i] = halves[i];
    next += kLanes;
  }
};

inline int64_t run_probe(const float* a_lanes, const float* b_lanes, const float* c_lanes, const uint16_t* half_lanes,
                         uint32_t bits, uint32_t* out) {
  ProbeOutput output = {out};
  const F32x16 a = load(a_lanes);
  const F32x16 b = load(b_lanes);
  const F32x16 c = load(c_lanes);
  const Mask16 mask = mask_from_bits(bits);
  uint16_t halves[kLanes];

  output.put(a);
  output.put(load_bfloat16(half_lanes));
  output.put(load_float16(half_lanes));
  store_bfloat16(halves, a);
  output.put(halves);
  store_float16(halves, a);
  output.put(halves);
  output.put(splat(a_lanes[3]));
  output.put(splat_bits(bits));

  output.put(add(a, b));
  output.put(sub(a, b));
  output.put(mul(a, b));
  output.put(div(a, b));
  output.put(fused_multiply_add(a, b, c));
  output.put(min(a, b));
  output.put(max(a, b));

  output.put(bits_and(a, b));
  output.put(bits_or(a, b));
  output.put(bits_xor(a, b));
  // In the range of int32.
  const F32x16 small = max(min(a, splat(2e9f)), splat(-2e9f));
  output.put(truncate_to_int(small));
  output.put(float_from_int(truncate_to_int(small)));

  output.put(mask);
  output.put(greater(a, b));
  output.put(greater_equal(a, b));
  output.put(has_bits(a, splat_bits(bits)));
  output.put(select(mask, a, b));
  output.put(keep(mask, a));
  output.put(add_where(mask, splat(2.5f), b));
  output.put(bits_or_where(mask, a, b));

  F32x16 rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = mul(a, splat(static_cast<float>(i + 1)));
  transpose(rows);
  for (int i = 0; i < kLanes; ++i) output.put(rows[i]);
  return output.next - out;
}

}  // namespace
}  // namespace loop_singular_bit
