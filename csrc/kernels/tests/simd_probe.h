// Every vector primitive applied to given lanes, compiled once for each simd/ header and compared by simd_test.cpp.
#pragma once

#include <cstdint>

namespace loop_singular_bit {

// 16 lanes each. Results follow each other in `out`, 16 words of 32 bits for each primitive.
struct SimdProbe {
  const char* isa;  // name of the kernel table that uses these primitives
  int64_t (*run)(const float* a, const float* b, const float* c, const uint16_t* halves, uint32_t bits, uint32_t* out);
};

// Enough for what run() writes.
constexpr int64_t kProbeWords = 64 * 16;

extern const SimdProbe kScalarProbe;
extern const SimdProbe kAvx2Probe;
extern const SimdProbe kAvx512Probe;
extern const SimdProbe kNeonProbe;

}  // namespace loop_singular_bit
