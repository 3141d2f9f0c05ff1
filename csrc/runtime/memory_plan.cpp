#include "memory_plan.h"

#include <algorithm>
#include <thread>

#include "error.h"
#include "json.h"
#include "key_value_cache.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kDefaultContext = 2048;
constexpr int64_t kMaxPrefillTokens = 512;
constexpr int64_t kThreadStackBytes = 128 << 10;
constexpr int64_t kReaderThreads = 4;
// What cannot be known before: the heap's slack, stacks of short calls, pages that are only partly used.
constexpr int64_t kReserveBytes = 4 * kMiB;

// Of units that are not worth dividing further, unless a limit on layers demands it.
constexpr int64_t kSmallUnitBytes = kMiB / 4;
// All weights are at least so many times what the buffers hold.
constexpr int64_t kWeightsPerBuffers = 16;

struct Sizes {
  int64_t max_unit_bytes;
  int64_t buffers;
  int64_t prefill_tokens;
};

// From what is fastest to what is smallest. A unit's memory is free only when its computation ends: with many small
// ones little of the buffers lies idle, and a computation that waits for the disk stays in few megabytes. A unit of 2
// MiB is one read; smaller ones would be more reads. From some hundred tokens on a pass over the weights takes longer
// to compute than to read, and longer chunks gain little; from some ten on it takes about as long, and less room to
// read ahead costs more than shorter chunks.
constexpr Sizes kSizes[] = {{2 * kMiB, 16, 512},    {2 * kMiB, 16, 256}, {2 * kMiB, 16, 128}, {2 * kMiB, 16, 64},
                            {2 * kMiB, 16, 32},     {2 * kMiB, 8, 32},   {kMiB, 8, 32},       {kMiB, 8, 16},
                            {kMiB, 4, 16},          {kMiB / 2, 4, 16},   {kMiB / 2, 4, 8},    {kSmallUnitBytes, 2, 8},
                            {kSmallUnitBytes, 2, 1}};
constexpr int64_t kResidentUnitBytes = 16 * kMiB;

std::string megabytes(int64_t bytes) {
  return join((bytes + 50'000) / 1'000'000, ".", (bytes + 50'000) / 100'000 % 10, " MB");
}

int64_t sum(const std::vector<PlanLine>& lines) {
  int64_t total = 0;
  for (const PlanLine& line : lines) total += line.bytes;
  return total;
}

class Planner {
 public:
  Planner(const PackedCheckpoint& checkpoint, const KernelTable& kernels, const ModelOptions& options,
          int64_t base_bytes, int64_t table_bytes)
      : checkpoint_(checkpoint), kernels_(kernels), options_(options), base_(base_bytes), tables_(table_bytes) {
    const ModelConfig& config = checkpoint.config();
    if (options.context < 0 || options.context > config.max_positions) {
      fail(ErrorKind::kUsage, "context: expected 1 to the model's ", config.max_positions, " positions, got ",
           options.context);
    }
    if (options.budget_bytes < 0) fail(ErrorKind::kUsage, "budget: expected at least 0, got ", options.budget_bytes);
    if (options.threads < 0) fail(ErrorKind::kUsage, "threads: expected at least 0, got ", options.threads);
    if (options.max_layers < 0) fail(ErrorKind::kUsage, "max_layers: expected at least 0, got ", options.max_layers);
    if (options.prefill_tokens < 0) {
      fail(ErrorKind::kUsage, "prefill_tokens: expected at least 0, got ", options.prefill_tokens);
    }
    context_ = options.context > 0 ? options.context : std::min(config.max_positions, kDefaultContext);
    threads_ =
        options.threads > 0 ? options.threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  }

  MemoryPlan make() {
    const int64_t available = base_ + available_memory_bytes();
    limit_ = options_.budget_bytes > 0 ? options_.budget_bytes : INT64_MAX;
    const bool may_be_resident = options_.max_layers == 0 || options_.max_layers >= checkpoint_.config().layers;
    if (options_.back_end == BackEnd::kResident && !may_be_resident) {
      fail(ErrorKind::kUsage, "the back end resident keeps all ", checkpoint_.config().layers,
           " layers in memory, which ", "max_layers ", options_.max_layers, " forbids");
    }
    if (options_.back_end.value_or(BackEnd::kResident) == BackEnd::kResident && may_be_resident) {
      for (const Sizes& sizes : kSizes) {
        const MemoryPlan plan = with_sizes(BackEnd::kResident, limited(sizes));
        const int64_t most = options_.back_end ? limit_ : std::min(limit_, available);
        if (plan.total_bytes <= most) return plan;
      }
      if (options_.back_end) refuse(with_sizes(BackEnd::kResident, limited(std::end(kSizes)[-1])));
    }
    // Where the page cache holds the whole file, it is faster than any disk.
    const bool is_cacheable = weight_bytes() < available / 2;
    const BackEnd back_end = options_.back_end.value_or(is_cacheable ? BackEnd::kMmap : BackEnd::kDirect);
    for (const Sizes& sizes : kSizes) {
      MemoryPlan plan = with_sizes(back_end, limited(sizes));
      if (plan.total_bytes > limit_) continue;
      return with_pinned_units(plan);
    }
    refuse(with_sizes(back_end, limited(std::end(kSizes)[-1])));
  }

 private:
  Sizes limited(Sizes sizes) const {
    const int64_t wanted = options_.prefill_tokens > 0 ? options_.prefill_tokens : sizes.prefill_tokens;
    sizes.prefill_tokens = std::min({wanted, context_, options_.prefill_tokens > 0 ? context_ : kMaxPrefillTokens});
    // More would take the place of weights that could stay, or of a layer.
    const int64_t layers = options_.max_layers > 0 ? layer_limit() / options_.max_layers : INT64_MAX;
    const int64_t most = std::min(weight_bytes() / kWeightsPerBuffers, layers);
    while (sizes.buffers > 2 && most / sizes.buffers < kSmallUnitBytes) sizes.buffers /= 2;
    if (!options_.prefetch) sizes.buffers = 1;
    sizes.max_unit_bytes = std::min(sizes.max_unit_bytes, std::max(kSmallUnitBytes, most / sizes.buffers));
    // A row tile is the least that can be read, whatever the limit.
    const auto exceeds_limit = [&] {
      return stream_buffer_bytes(make_units(checkpoint_, sizes.max_unit_bytes), sizes.buffers) > layers;
    };
    while (options_.max_layers > 0 && sizes.max_unit_bytes > 1 && exceeds_limit()) sizes.max_unit_bytes /= 2;
    return sizes;
  }

  int64_t weight_bytes() const {
    int64_t total = checkpoint_.matrices()[checkpoint_.head().matrix].bytes();
    for (const StoredLayer& layer : checkpoint_.layers()) total += layer_bytes(layer);
    return total;
  }

  int64_t layer_bytes(const StoredLayer& layer) const {
    int64_t total = 0;
    for (const StoredLinear* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down}) {
      total += checkpoint_.matrices()[linear->matrix].bytes();
    }
    return total;
  }

  int64_t layer_limit() const {
    if (options_.max_layers == 0) return INT64_MAX;
    int64_t largest = 0;
    for (const StoredLayer& layer : checkpoint_.layers()) largest = std::max(largest, layer_bytes(layer));
    return options_.max_layers * largest;
  }

  static int64_t weights_in_memory(const MemoryPlan& plan) {
    int64_t total = 0;
    for (const PlanLine& line : plan.lines) {
      if (line.name.starts_with("weights")) total += line.bytes;
    }
    return total;
  }

  MemoryPlan with_sizes(BackEnd back_end, const Sizes& sizes) const {
    MemoryPlan plan{};
    plan.back_end = back_end;
    plan.context = context_;
    plan.prefill_tokens = sizes.prefill_tokens;
    plan.threads = threads_;
    plan.max_unit_bytes = back_end == BackEnd::kResident ? kResidentUnitBytes : sizes.max_unit_bytes;
    plan.buffers = sizes.buffers;
    plan.budget_bytes = options_.budget_bytes;
    const std::vector<WeightUnit> units = make_units(checkpoint_, plan.max_unit_bytes);
    plan.unit_count = static_cast<int64_t>(units.size());
    plan.weight_bytes = plan.streamed_bytes = weight_bytes();
    int64_t all = 0;
    for (const WeightUnit& unit : units) all += unit.buffer_bytes;
    const DecoderBytes decoder = Decoder::bytes(checkpoint_, kernels_, decoder_options(options_, plan));
    const ModelConfig& config = checkpoint_.config();
    plan.lines = {
        {"process before", base_},
        {"names, norms, biases", tables_},
        {join("keys and values of ", context_, " tokens"), KeyValueCache::bytes(config, context_, options_.cache_type)},
        {join("activations of ", plan.prefill_tokens, " tokens"), decoder.activations},
        {"attention scores", decoder.attention},
        {"logits", 2 * config.vocabulary * static_cast<int64_t>(sizeof(float))},
        {"threads and reserve", (threads_ + kReaderThreads) * kThreadStackBytes + kReserveBytes}};
    if (back_end == BackEnd::kResident) {
      plan.pinned_units = plan.unit_count;
      plan.streamed_bytes = 0;
      plan.lines.push_back({"weights, all", all});
    } else {
      plan.lines.push_back({join("weights, ", plan.buffers, plan.buffers == 1 ? " buffer" : " buffers"),
                            stream_buffer_bytes(units, plan.buffers)});
    }
    plan.total_bytes = sum(plan.lines);
    return plan;
  }

  // Spends what is left of the budget on the first units.
  MemoryPlan with_pinned_units(MemoryPlan plan) const {
    if (options_.budget_bytes == 0) return plan;
    const int64_t spare = std::min(limit_ - plan.total_bytes, layer_limit() - weights_in_memory(plan));
    int64_t pinned_bytes = 0;
    for (const WeightUnit& unit : make_units(checkpoint_, plan.max_unit_bytes)) {
      if (pinned_bytes + unit.buffer_bytes > spare) break;
      pinned_bytes += unit.buffer_bytes;
      plan.streamed_bytes -= unit_bytes(unit);
      ++plan.pinned_units;
    }
    if (plan.pinned_units > 0)
      plan.lines.push_back({join("weights, first ", plan.pinned_units, " units"), pinned_bytes});
    plan.total_bytes = sum(plan.lines);
    return plan;
  }

  [[noreturn]] void refuse(const MemoryPlan& plan) const {
    std::string parts;
    for (const PlanLine& line : plan.lines)
      parts += (parts.empty() ? "" : " + ") + line.name + " " + megabytes(line.bytes);
    const ModelConfig& config = checkpoint_.config();
    const int64_t token_bytes =
        KeyValueCache::bytes(config, kPositionsPerBlock, options_.cache_type) / kPositionsPerBlock;
    throw Error(
        ErrorKind::kMemoryBudget,
        join("a budget of ", megabytes(options_.budget_bytes), " cannot be met: the smallest plan for the back end ",
             back_end_name(plan.back_end), " needs ", megabytes(plan.total_bytes), ": ", parts,
             ". A context token costs ", (token_bytes + 1023) / 1024, " KiB"),
        plan.total_bytes);
  }

  const PackedCheckpoint& checkpoint_;
  const KernelTable& kernels_;
  const ModelOptions& options_;
  int64_t base_;
  int64_t tables_;
  int64_t context_;
  int threads_;
  int64_t limit_ = INT64_MAX;
};

template <typename Value, size_t count>
Value named(const char* what, const std::string& name, const std::pair<const char*, Value> (&choices)[count]) {
  std::string list;
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
    list += (list.empty() ? "" : ", ") + std::string(choice);
  }
  fail(ErrorKind::kUsage, what, ": expected one of ", list, ", got ", json_quoted(name));
}

constexpr std::pair<const char*, BackEnd> kBackEnds[] = {
    {"resident", BackEnd::kResident}, {"mmap", BackEnd::kMmap}, {"direct", BackEnd::kDirect}};

}  // namespace

MemoryPlan make_plan(const PackedCheckpoint& checkpoint, const KernelTable& kernels, const ModelOptions& options,
                     int64_t base_bytes, int64_t table_bytes) {
  return Planner(checkpoint, kernels, options, base_bytes, table_bytes).make();
}

DecoderOptions decoder_options(const ModelOptions& options, const MemoryPlan& plan) {
  DecoderOptions decoder;
  decoder.activation_precision = options.activation_precision;
  decoder.cache_type = options.cache_type;
  decoder.context = plan.context;
  decoder.prefill_tokens = plan.prefill_tokens;
  decoder.threads = plan.threads;
  return decoder;
}

const char* back_end_name(BackEnd back_end) {
  for (const auto& [name, value] : kBackEnds) {
    if (value == back_end) return name;
  }
  return "unknown";
}

BackEnd back_end_named(const std::string& name) { return named("back_end", name, kBackEnds); }

ActivationPrecision activation_precision_named(const std::string& name) {
  static constexpr std::pair<const char*, ActivationPrecision> kChoices[] = {{"int8", ActivationPrecision::kInt8},
                                                                             {"int16", ActivationPrecision::kInt16},
                                                                             {"exact", ActivationPrecision::kExact}};
  return named("activation_precision", name, kChoices);
}

CacheType cache_type_named(const std::string& name) {
  static constexpr std::pair<const char*, CacheType> kChoices[] = {
      {"float16", CacheType::kFloat16}, {"int8", CacheType::kInt8}, {"float32", CacheType::kFloat32}};
  return named("cache_type", name, kChoices);
}

std::string plan_json(const MemoryPlan& plan) {
  std::string lines;
  for (const PlanLine& line : plan.lines) {
    lines += join(lines.empty() ? "" : ", ", "{\"name\": ", json_quoted(line.name), ", \"bytes\": ", line.bytes, "}");
  }
  return join("{\"back_end\": \"", back_end_name(plan.back_end), "\", \"context\": ", plan.context,
              ", \"prefill_tokens\": ", plan.prefill_tokens, ", \"threads\": ", plan.threads,
              ", \"max_unit_bytes\": ", plan.max_unit_bytes, ", \"buffers\": ", plan.buffers,
              ", \"units\": ", plan.unit_count, ", \"pinned_units\": ", plan.pinned_units,
              ", \"weight_bytes\": ", plan.weight_bytes, ", \"streamed_bytes\": ", plan.streamed_bytes,
              ", \"budget_bytes\": ", plan.budget_bytes, ", \"total_bytes\": ", plan.total_bytes, ", \"lines\": [",
              lines, "]}");
}

}  // namespace loop_singular_bit::runtime
