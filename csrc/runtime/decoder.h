// The forward pass of a decoder: tokens in, logits out, keys and values kept.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

#include "kernel_table.h"
#include "key_value_cache.h"
#include "packed_checkpoint.h"
#include "thread_pool.h"
#include "weight_stream.h"

namespace loop_singular_bit::runtime {

struct DecoderOptions {
  ActivationPrecision activation_precision = ActivationPrecision::kInt8;
  CacheType cache_type = CacheType::kFloat16;
  int64_t context = 0;         // positions of the cache
  int64_t prefill_tokens = 0;  // at most this many tokens share one pass over the weights
  int threads = 1;
  std::function<bool()> should_stop;  // asked between units, every few milliseconds
};

// What the decoder allocates, apart from the cache.
struct DecoderBytes {
  int64_t activations;  // of one chunk of prefill_tokens, prepared forms and scratch included
  int64_t attention;    // scores
};

class Decoder {
 public:
  Decoder(const PackedCheckpoint& checkpoint, WeightStream& stream, const KernelTable& kernels,
          const DecoderOptions& options);

  static DecoderBytes bytes(const PackedCheckpoint& checkpoint, const KernelTable& kernels,
                            const DecoderOptions& options);

  // Appends tokens to the sequence. Writes the logits of the last token to logits[0 .. vocabulary), or of every token
  // to logits[count, vocabulary]. Throws Error, and leaves the sequence as long as whole chunks were done.
  void process(const int32_t* tokens, int64_t count, bool all_logits, float* logits);

  int64_t length() const { return length_; }
  // Forgets all tokens from position `length` on.
  void truncate(int64_t length);

 private:
  using LinearUnits = std::vector<int>;  // units of the stream to compute with

  // A linear to be applied.
  struct Application {
    const LinearUnits& units;
    const StoredLinear& linear;
    float* output;  // [tokens, out_features]
  };

  // A packed unit in memory, to be multiplied with few tokens.
  struct Product {
    PackedWeightView weight;
    int matrix;
    LinearOutput output;
  };

  int resident_embedding_unit(int32_t token) const;
  void expect_embedding(int32_t token) const;
  void embed(int32_t token, float* output);
  void read_packed_embedding(int32_t token, float* output);
  void read_dense_embedding(int32_t token, float* output);
  void process_chunk(const int32_t* tokens, int64_t count, const std::vector<float>& frequencies, int64_t logit_tokens,
                     float* logits);
  void turn_positions(int64_t count, const std::vector<float>& frequencies);
  void attention(int64_t layer, int64_t tokens);
  void linears(std::initializer_list<Application> applications, const float* input, int64_t input_stride,
               int64_t tokens);
  void linear(const Application& application, const float* input, int64_t input_stride, int64_t tokens);
  Product product_of(const UnitView& view, const StoredLinear& linear, float* output) const;
  void decode(const LinearInput& input, int64_t tokens);
  void prefill(const Product& product, bool is_first, const LinearInput& input, int64_t tokens);
  // Row tiles that a thread takes at a time, for this many sign bits times tokens.
  int64_t grain(int64_t tiles, int64_t work) const;
  bool is_decode(const PackedWeightView& weight, int64_t tokens) const;
  void stop_if_asked();
  void normalize_rows(const std::vector<float>& weight, const float* input, int64_t tokens, float* output);
  void add_rows(const float* addend, int64_t tokens);
  float* floats(int64_t offset) const { return reinterpret_cast<float*>(memory_.data()) + offset; }

  const PackedCheckpoint& checkpoint_;
  const ModelConfig& config_;
  WeightStream& stream_;
  const KernelTable& kernels_;
  const DecoderOptions options_;
  ThreadPool pool_;
  KeyValueCache cache_;
  int64_t length_ = 0;
  std::vector<LinearUnits> linear_units_;  // of each linear in the order of execution

  // [prefill_tokens] rows of each.
  PageMemory memory_;
  float* residual_ = nullptr;  // [hidden]
  float* normed_ = nullptr;    // [hidden]; also what a layer's halves give
  float* queries_ = nullptr;   // [heads * head_dim]; the attention's result as well
  float* keys_ = nullptr;      // [key_value_heads * head_dim]
  float* values_ = nullptr;
  float* gate_ = nullptr;  // [intermediate], in the memory of queries, keys and values
  float* up_ = nullptr;

  PageMemory rotation_;  // cosines, then sines: [prefill_tokens, head_dim / 2]
  // Every thread prepares the tokens of a decode step for itself: that takes a microsecond, and fetching what another
  // core has just written takes many.
  PageMemory decode_activations_;
  int64_t decode_activation_bytes_ = 0;  // per token
  int64_t decode_tokens_ = 0;            // per thread
  std::vector<int> prepared_matrix_;     // of each thread: the matrix its activations are prepared for; -1: none
  std::vector<Product> products_;        // of the present decode()
  PageMemory prefill_activations_;
  PageMemory prefill_scratch_;
  int64_t prefill_scratch_bytes_ = 0;  // per thread
  PageMemory scores_;
  int64_t scores_per_thread_ = 0;

  std::chrono::steady_clock::time_point stop_asked_{};

  std::vector<uint16_t> embedding_column_scales_;
  std::vector<std::byte> embedding_tile_;
  std::vector<float> embedding_scratch_;
};

}  // namespace loop_singular_bit::runtime
