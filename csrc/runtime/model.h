// A packed model that runs: checkpoint, plan, weights, decoder and sampler in one. What programs use.
//
//   Model model({.directory = "model-b2", .budget_bytes = 400'000'000});
//   model.start(prompt, sampling);
//   while (length < limit) { token = model.next(); ... }
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"
#include "memory_plan.h"
#include "sampler.h"

namespace loop_singular_bit::runtime {

struct ModelStatistics {
  int64_t bytes_read = 0;
  double seconds_waited = 0.0;  // for the disk
  bool is_direct = false;       // reads bypass the page cache
  int64_t peak_resident_bytes = 0;
  int64_t length = 0;  // tokens in the cache
};

class Model {
 public:
  // Throws Error.
  explicit Model(ModelOptions options);

  // The plan that the constructor would follow; allocates nothing large.
  static MemoryPlan plan_for(const ModelOptions& options);

  const ModelConfig& config() const { return checkpoint_->config(); }
  const MemoryPlan& plan() const { return plan_; }
  ModelStatistics statistics() const;

  // Begins a new sequence. With reuse_cache the tokens that it shares with the present one are not computed again.
  void start(const std::vector<int32_t>& prompt, const SamplingOptions& sampling, bool reuse_cache);
  // The next token of the sequence.
  int32_t next();

  // Logits [tokens.size(), vocabulary] of a sequence of its own; ends the sequence of start().
  void logits(const std::vector<int32_t>& tokens, float* output);

 private:
  void check_budget() const;

  ModelOptions options_;
  std::unique_ptr<PackedCheckpoint> checkpoint_;
  MemoryPlan plan_;
  std::unique_ptr<WeightStream> stream_;
  std::unique_ptr<Decoder> decoder_;
  std::optional<Sampler> sampler_;
  std::vector<int32_t> tokens_;  // of the sequence; the decoder has seen the first decoder_->length() of them
  std::vector<float> logits_;
};

// Reads up to `bytes` of a file as streaming does, past the page cache where that is possible, into buffer_bytes of
// memory over and over: bytes per second. Of what is read every byte is looked at, or none: to look at it may cost a
// virtual disk, which is a processor that copies, as much as to read it.
double measure_read_rate(const std::string& path, int64_t bytes, int64_t buffer_bytes, bool looks);

}  // namespace loop_singular_bit::runtime
