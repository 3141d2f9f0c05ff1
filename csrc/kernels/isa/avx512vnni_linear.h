// The table of AVX-512 VNNI.
#pragma once

#include "isa/avx512vnni_gemm.h"
#include "isa/avx512vnni_gemv.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

inline int64_t decode_token_limit(const PackedWeightView&, ActivationPrecision) { return kMaxDecodeTokens; }

constexpr LinearKernels kKernels = {
    decode_token_limit,       decode_activation_bytes, prepare_decode,  gemv, kPrefillUnitTokens,
    prefill_activation_bytes, prefill_scratch_bytes,   prepare_prefill, gemm,
};

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
