// What config.json says about a decoder: Llama, Mistral, Qwen2 and Qwen3.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"
#include "rotary_embedding.h"

namespace loop_singular_bit::runtime {

struct ModelConfig {
  std::string model_type;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t layers;
  int64_t heads;
  int64_t key_value_heads;
  int64_t head_dim;
  int64_t vocabulary;
  int64_t max_positions;
  float norm_epsilon;
  bool tied_head;  // the output head has the weight of the embedding
  bool query_key_norms;
  // Per layer: a query at position q sees the positions above q - window; 0 means all.
  std::vector<int64_t> windows;
  RotaryEmbedding rotary;
  std::vector<int32_t> end_tokens;
};

// Throws Error(kCheckpoint) naming what is missing, out of range or not supported.
ModelConfig parse_model_config(const Json& config);

}  // namespace loop_singular_bit::runtime
