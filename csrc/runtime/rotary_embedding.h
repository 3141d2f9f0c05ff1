// Rotary position embedding (arXiv:2104.09864) and its scalings for long contexts: by how much each pair of a query or
// a key turns per position.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "json.h"

namespace loop_singular_bit::runtime {

class RotaryEmbedding {
 public:
  RotaryEmbedding() = default;

  // From config.json; types default, linear, llama3, yarn, dynamic and longrope, as Transformers defines them.
  // Throws Error(kCheckpoint).
  RotaryEmbedding(const Json& config, int64_t head_dim, int64_t max_positions);

  // [head_dim / 2]: angle of a position = position * frequency, in float32. `length` is that of the sequence, the
  // tokens that are being processed included.
  std::vector<float> frequencies(int64_t length) const;

  // Multiplied into cosines and sines.
  float attention_factor() const { return attention_factor_; }

  // Beyond this length frequencies change, and with them the keys of positions that are computed anew.
  int64_t fixed_length() const { return fixed_length_; }

  // Positions that the scaling is made for: more than max_position_embeddings where that counts those before it.
  int64_t max_positions() const { return max_positions_; }

 private:
  void scale_linear(const Json& rope);
  void scale_llama3(const Json& rope, double original);
  void scale_yarn(const Json& rope, double original);
  void scale_longrope(const Json& rope, double original);

  double theta_ = 0.0;
  int64_t head_dim_ = 0;
  int64_t max_positions_ = 0;
  int64_t fixed_length_ = std::numeric_limits<int64_t>::max();
  double dynamic_factor_ = 0.0;  // 0: not dynamic
  float attention_factor_ = 1.0f;
  std::vector<float> frequencies_;
  std::vector<float> long_frequencies_;  // longrope, beyond fixed_length_
};

}  // namespace loop_singular_bit::runtime
