// The table of AVX-512 VNNI.
#pragma once

#include "isa/avx512vnni_gemm.h"
#include "isa/avx512vnni_gemv.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

// Where gemm overtakes one gemv for each token, measured on Zen 4 at 4096 columns. gemm has a fixed cost for a tile,
// gemv one for each plane.
inline int64_t decode_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return kMaxDecodeTokens / weight.planes;
  if (precision == ActivationPrecision::kInt16) return weight.planes == 1 ? 2 : 1;
  return weight.planes == 1 ? 3 : weight.planes <= 3 ? 2 : 1;
}

constexpr LinearKernels kKernels = {
    decode_token_limit,       decode_activation_bytes, prepare_decode,  gemv, kPrefillUnitTokens, prefill_token_limit,
    prefill_activation_bytes, prefill_scratch_bytes,   prepare_prefill, gemm,
};

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
