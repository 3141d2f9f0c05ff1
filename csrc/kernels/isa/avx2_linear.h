// The table of AVX2.
#pragma once

#include "isa/avx2_gemm.h"
#include "isa/avx2_gemv.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx2 {

// Where gemm overtakes one gemv for each token, measured on Zen 4 at 4096 columns. gemm has a fixed cost for a tile,
// gemv one for each plane.
inline int64_t decode_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return kMaxDecodeTokens;
  const int64_t tokens = 12 / weight.planes;
  return tokens < kMaxDecodeTokens ? tokens : kMaxDecodeTokens;
}

constexpr LinearKernels kKernels = {
    decode_token_limit,       decode_activation_bytes, prepare_decode,  gemv, kPrefillUnitTokens, prefill_token_limit,
    prefill_activation_bytes, prefill_scratch_bytes,   prepare_prefill, gemm,
};

}  // namespace avx2
}  // namespace
}  // namespace loop_singular_bit
