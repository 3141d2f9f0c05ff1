// What a transformer decoder computes besides packed linears: attention over cached keys and values, normalization,
// rotation, gating, and products with weights that are not packed. All arithmetic is in float32.
#pragma once

#include <cstdint>

#include "linear_kernels.h"

namespace loop_singular_bit {

enum class CacheType : int32_t { kFloat32, kFloat16, kInt8 };

// Keys lie in blocks of this many positions, a position per vector lane.
constexpr int64_t kPositionsPerBlock = 16;
// Values of a position are padded to a multiple of this.
constexpr int64_t kValuePadding = 16;
constexpr int64_t kQueriesPerPass = 4;

// The cache of one key/value head.
struct CachedHead {
  void* keys;           // [position blocks, head_dim, 16]
  void* values;         // [positions, value_stride]
  float* key_scales;    // [position blocks * 16]: key = scale * code; kInt8 only
  float* value_scales;  // the same
  CacheType type;
  int64_t head_dim;
  int64_t value_stride;  // head_dim, padded
};

// One query and the positions that it sees: begin <= position < end, at least one.
struct AttentionQuery {
  const float* query;  // [head_dim], scaled already
  float* output;       // [head_dim]; may be the query's memory
  int64_t begin;
  int64_t end;
};

struct DecoderKernels {
  // Writes the key and the value of one position, [head_dim] each, rounded to the type of the cache.
  void (*append)(const CachedHead& head, int64_t position, const float* key, const float* value);

  // output = sum over the positions that are seen of softmax(query . key) * value. scratch: kQueriesPerPass floats for
  // each position from the first to the last that any query sees, rounded out to whole blocks.
  void (*attend)(const CachedHead& head, const AttentionQuery* queries, int64_t count, float* scratch);

  // output[i] = input[i] * weight[i] / sqrt(mean of input^2 + epsilon). output may be input.
  void (*normalize)(const float* input, const float* weight, int64_t count, float epsilon, float* output);

  // Rotates each pair (vector[i], vector[i + count / 2]) by the angle with cosines[i] and sines[i].
  void (*rotate)(const float* cosines, const float* sines, int64_t count, float* vector);

  // gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
  void (*gate)(const float* up, int64_t count, float* gate);

  // output[t, n] = bias[n] + sum_k input[t, k] * weight[n, k] for rows [row_begin, row_end) of a dense weight, all
  // float32 but the weight. Rows of input and output lie input_stride and output_stride apart; bias may be nullptr.
  void (*dense_linear)(const void* weight, ElementType type, int64_t in_features, int64_t row_begin, int64_t row_end,
                       const float* input, int64_t input_stride, int64_t tokens, const float* bias, float* output,
                       int64_t output_stride);
};

}  // namespace loop_singular_bit
