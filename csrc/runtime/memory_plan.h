// Before anything large is allocated: what will be resident, line by line, and which back end, buffers and chunk sizes
// fit into the declared budget.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"
#include "packed_checkpoint.h"
#include "weight_stream.h"

namespace loop_singular_bit::runtime {

struct ModelOptions {
  std::string directory;
  int64_t budget_bytes = 0;  // of resident memory of the whole process; 0: none
  int64_t context = 0;       // 0: the model's, at most 2048
  std::optional<BackEnd> back_end;
  ActivationPrecision activation_precision = ActivationPrecision::kInt8;
  CacheType cache_type = CacheType::kFloat16;
  int threads = 0;  // 0: one per processor
  bool prefetch = true;
  int64_t max_layers = 0;         // weights of at most this many decoder layers in memory; 0: no limit
  int64_t prefill_tokens = 0;     // 0: as many as fit, at most 512
  int interrupt_descriptor = -1;  // readable: stop
};

struct PlanLine {
  std::string name;
  int64_t bytes;
};

struct MemoryPlan {
  BackEnd back_end;
  int64_t context;
  int64_t prefill_tokens;
  int threads;
  int64_t max_unit_bytes;
  int64_t buffers;  // of the largest unit
  int64_t pinned_units;
  int64_t unit_count;
  int64_t weight_bytes;    // of all units, in the files: what one token reads
  int64_t streamed_bytes;  // of those that are read for every token
  int64_t budget_bytes;
  std::vector<PlanLine> lines;
  int64_t total_bytes;
};

// base_bytes: resident before the checkpoint was opened; table_bytes: what opening it added.
// Throws Error(kMemoryBudget) with the lines of the smallest plan when nothing fits, Error(kUsage) for a bad option.
MemoryPlan make_plan(const PackedCheckpoint& checkpoint, const KernelTable& kernels, const ModelOptions& options,
                     int64_t base_bytes, int64_t table_bytes);

DecoderOptions decoder_options(const ModelOptions& options, const MemoryPlan& plan);

const char* back_end_name(BackEnd back_end);
// Throws Error(kUsage) that lists the choices.
BackEnd back_end_named(const std::string& name);
ActivationPrecision activation_precision_named(const std::string& name);
CacheType cache_type_named(const std::string& name);

std::string plan_json(const MemoryPlan& plan);

}  // namespace loop_singular_bit::runtime
