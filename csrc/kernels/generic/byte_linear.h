// LinearKernels by byte products. Include after a simd/ header with products of bytes.
#pragma once

#include "generic/byte_decode.h"
#include "generic/byte_prefill.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

// Expanding a tile costs as much as decoding two to three tokens of one plane.
inline int64_t decode_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  switch (precision) {
    case ActivationPrecision::kInt8:
      return weight.planes == 1 ? 4 : 2;
    case ActivationPrecision::kInt16:
      return weight.planes == 1 ? 2 : 1;
    default:
      return 2;
  }
}

// The codes of so many tokens take about half of a 1 MiB L2; a tile's levels take another 128 KiB at 4096 columns.
inline int64_t prefill_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  const int64_t units = (int64_t{512} << 10) / UnitLayout(weight, precision).unit_bytes();
  return kUnitTokens * (units < 2 ? 2 : units);
}

constexpr LinearKernels kKernels = {
    decode_token_limit,       decode_activation_bytes, prepare_decode,  gemv, kUnitTokens, prefill_token_limit,
    prefill_activation_bytes, prefill_scratch_bytes,   prepare_prefill, gemm,
};

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
