// output[m, n] = bias[n] + sum_k input[m, k] * weight[n, k] for a packed weight, by two routes:
//
//   decode   few tokens: one pass over the stored bits for each token (gemv), bound by memory
//   prefill  many tokens: a row tile is expanded once and used for all of them (gemm), bound by multiplications
//
// Either way the activations are prepared once for a call and then read by all row tiles. Preparing them looks at
// in_features and column_scales of the weight, and at whether it has one plane: they serve every weight that has the
// same. Every output element is computed by one thread in one order: results do not depend on how row tiles are split.
#pragma once

#include <cstdint>

#include "packed_weight_view.h"

namespace loop_singular_bit {

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16 };

// How activations (input times column_scales) enter the products with the signs, and in prefill those with outliers. In
// decode outliers see the float activations; means always do.
enum class ActivationPrecision : int32_t {
  kInt8,   // decode: a sign and 8 bits, prefill: int8; the kExactColumns largest are kept as float where they stand out
  kInt16,  // 16 bits per token as two int8 halves
  kExact,  // float32
};

constexpr int64_t kExactColumns = 16;
constexpr int64_t kActivationAlignment = 64;  // of every buffer that a kernel prepares
// gemv takes at most this many tokens in one call.
constexpr int64_t kMaxDecodeTokens = 8;

// A token with a NaN or an infinity among its activations gives NaN or an infinity in every output.
struct LinearInput {
  const void* data;    // [tokens, in_features]
  int64_t row_stride;  // elements from one token to the next
  ElementType type;
};

struct LinearOutput {
  void* data;          // [tokens, out_features]
  int64_t row_stride;  // elements from one token to the next
  ElementType type;
  ElementType bias_type;
  const void* bias;  // [out_features], or nullptr
};

// The largest activations of a token, which are kept as float: their codes are 0.
struct ExactColumns {
  int32_t exact_count;
  int32_t exact_columns[kExactColumns];
  float exact_values[kExactColumns];
};

// One prepared token. The owner allocates decode_activation_bytes() at kActivationAlignment, zero before the first use,
// and may hand the same memory to any later call of any table. The codes, whose form belongs to the instruction set,
// follow the struct.
struct DecodeActivations : ExactColumns {
  int64_t dirty_columns;  // `columns` is zero from here on
  float sum;              // of columns[0 .. in_features)
  float code_scale;       // activation ~ code_scale * code
  int32_t code_sum;       // as the instruction set needs it: of the codes or of their magnitudes
  int32_t high_code_sum;  // where 16-bit codes are kept as 256 * high + low; code_sum is then of the low halves
  ActivationPrecision precision;
  // Every uint16 is in range here, so that no outlier column can lead out of the buffer.
  alignas(kActivationAlignment) float columns[kMaxInFeatures];
};

struct LinearKernels {
  // ---- decode ----

  // Up to this many tokens decode is the faster route. At most kMaxDecodeTokens.
  int64_t (*decode_token_limit)(const PackedWeightView& weight, ActivationPrecision precision);

  int64_t (*decode_activation_bytes)(int64_t in_features, ActivationPrecision precision);

  // Reads one token of `input`.
  void (*prepare_decode)(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                         ActivationPrecision precision, DecodeActivations* activations);

  // Writes output[t, n] for `tokens` prepared tokens and the rows of tiles [tile_begin, tile_end).
  void (*gemv)(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
               int64_t tile_begin, int64_t tile_end, const LinearOutput& output);

  // ---- prefill ----

  // Tokens are prepared in units of this many, independently of each other; the last unit may be shorter.
  int64_t prefill_unit_tokens;

  // gemm is at its best with at most this many tokens, a multiple of prefill_unit_tokens: more of them make for
  // prepared activations that no cache holds.
  int64_t (*prefill_token_limit)(const PackedWeightView& weight, ActivationPrecision precision);

  // Memory for the prepared tokens of one call (shared by all threads), and for one thread of gemm.
  int64_t (*prefill_activation_bytes)(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision);
  int64_t (*prefill_scratch_bytes)(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision);

  void (*prepare_prefill)(const PackedWeightView& weight, const LinearInput& input, int64_t tokens, int64_t unit_begin,
                          int64_t unit_end, ActivationPrecision precision, void* activations);

  // Writes output[m, n] for all tokens and the rows of tiles [tile_begin, tile_end).
  void (*gemm)(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
               int64_t tile_begin, int64_t tile_end, void* scratch, const LinearOutput& output);
};

}  // namespace loop_singular_bit
