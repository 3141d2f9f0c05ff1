// The table of AVX-512 VNNI.
#pragma once

#include "isa/avx512vnni_gemv.h"
#include "isa/scalar_linear.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

inline int64_t decode_token_limit(const PackedWeightView&, ActivationPrecision) { return kMaxDecodeTokens; }

constexpr LinearKernels kKernels = {
    decode_token_limit,
    decode_activation_bytes,
    prepare_decode,
    gemv,
    scalar_linear::kPrefillUnitTokens,
    scalar_linear::prefill_activation_bytes,
    scalar_linear::prefill_scratch_bytes,
    scalar_linear::prepare_prefill,
    scalar_linear::gemm,
};

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
