// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace loop_singular_bit::runtime {

struct SamplingOptions {
  double temperature = 0.0;  // 0: the likeliest token
  double top_p = 1.0;        // sample from the likeliest tokens with at least this probability together
  int64_t top_k = 0;         // sample from this many likeliest tokens; 0: all
  double repetition_penalty = 1.0;
  uint64_t seed = 0;
};

class Sampler {
 public:
  // Throws Error(kUsage) when an option is out of range.
  explicit Sampler(const SamplingOptions& options);

  // Applied in the order of Transformers: repetition penalty on the tokens of `history`, temperature, top_k, top_p.
  // Among equals the lower token wins. Changes the logits.
  int32_t choose(float* logits, int64_t count, const std::vector<int32_t>& history);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
  std::vector<uint8_t> is_seen_;
  std::vector<int32_t> order_;
};

}  // namespace loop_singular_bit::runtime
