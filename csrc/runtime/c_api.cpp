#include "c_api.h"

#include <cstdlib>
#include <cstring>
#include <thread>

#include "dispatch.h"
#include "error.h"
#include "json.h"
#include "model.h"

struct loop_singular_bit_model {
  loop_singular_bit::runtime::Model model;
};

namespace loop_singular_bit::runtime {
namespace {

thread_local std::string last_error;

const char* kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUsage:
      return "usage";
    case ErrorKind::kCheckpoint:
      return "checkpoint";
    case ErrorKind::kUnsupported:
      return "unsupported";
    case ErrorKind::kDisk:
      return "disk";
    case ErrorKind::kMemoryBudget:
      return "memory_budget";
    default:
      return "interrupted";
  }
}

void remember(const char* kind, const char* message, int64_t needed_bytes) {
  last_error =
      join("{\"kind\": \"", kind, "\", \"message\": ", json_quoted(message), ", \"needed_bytes\": ", needed_bytes, "}");
}

// No exception may leave through the C interface.
template <typename Result, typename Body>
Result guarded(Result failure, const Body& body) {
  try {
    return body();
  } catch (const Error& error) {
    remember(kind_name(error.kind), error.what(), error.needed_bytes);
  } catch (const std::bad_alloc&) {
    remember("memory_budget", "the system gives no more memory", 0);
  } catch (const std::exception& error) {
    remember("usage", error.what(), 0);
  }
  return failure;
}

char* copied(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

// Options come from a program, not from a file: what is wrong with them is the caller's mistake.
Json parse_options(const char* text, std::initializer_list<std::string_view> known) {
  Json options = Json::parse(text, "options");
  for (const auto& [key, value] : options.object()) {
    bool is_known = false;
    for (const std::string_view name : known) is_known = is_known || name == key;
    if (!is_known) fail(ErrorKind::kUsage, "options: ", json_quoted(key), " is unknown");
  }
  return options;
}

template <typename Value, typename Read>
void read_option(const Json& options, const char* key, Value& target, const Read& read) {
  if (const Json* value = options.find(key)) target = static_cast<Value>(read(*value));
}

int64_t as_integer(const Json& value) { return value.integer(INT64_MIN, INT64_MAX); }
double as_number(const Json& value) { return value.number(); }
bool as_boolean(const Json& value) { return value.boolean(); }

ModelOptions model_options(const char* text) {
  const Json json =
      parse_options(text, {"directory", "budget_bytes", "context", "back_end", "activation_precision", "cache_type",
                           "threads", "prefetch", "max_layers", "prefill_tokens", "interrupt_descriptor"});
  ModelOptions options;
  options.directory = json.at("directory").string();
  read_option(json, "budget_bytes", options.budget_bytes, as_integer);
  read_option(json, "context", options.context, as_integer);
  if (const Json* name = json.find("back_end"); name != nullptr && name->string() != "auto") {
    options.back_end = back_end_named(name->string());
  }
  read_option(json, "activation_precision", options.activation_precision,
              [](const Json& value) { return activation_precision_named(value.string()); });
  read_option(json, "cache_type", options.cache_type,
              [](const Json& value) { return cache_type_named(value.string()); });
  read_option(json, "threads", options.threads, as_integer);
  read_option(json, "prefetch", options.prefetch, as_boolean);
  read_option(json, "max_layers", options.max_layers, as_integer);
  read_option(json, "prefill_tokens", options.prefill_tokens, as_integer);
  read_option(json, "interrupt_descriptor", options.interrupt_descriptor, as_integer);
  return options;
}

std::string describe(const Model& model) {
  const ModelConfig& config = model.config();
  std::string end_tokens;
  for (const int32_t token : config.end_tokens) end_tokens += join(end_tokens.empty() ? "" : ", ", token);
  return join("{\"plan\": ", plan_json(model.plan()), ", \"model_type\": ", json_quoted(config.model_type),
              ", \"layers\": ", config.layers, ", \"vocabulary\": ", config.vocabulary,
              ", \"max_positions\": ", config.max_positions, ", \"end_tokens\": [", end_tokens, "]}");
}

}  // namespace
}  // namespace loop_singular_bit::runtime

using namespace loop_singular_bit::runtime;

extern "C" {

const char* loop_singular_bit_error(void) { return last_error.c_str(); }

void loop_singular_bit_free(char* text) { std::free(text); }

loop_singular_bit_model* loop_singular_bit_open(const char* options) {
  return guarded<loop_singular_bit_model*>(nullptr,
                                           [&] { return new loop_singular_bit_model{Model(model_options(options))}; });
}

void loop_singular_bit_close(loop_singular_bit_model* model) { delete model; }

char* loop_singular_bit_plan(const char* options) {
  return guarded<char*>(nullptr, [&] { return copied(plan_json(Model::plan_for(model_options(options)))); });
}

char* loop_singular_bit_describe(loop_singular_bit_model* model) {
  return guarded<char*>(nullptr, [&] { return copied(describe(model->model)); });
}

char* loop_singular_bit_statistics(loop_singular_bit_model* model) {
  return guarded<char*>(nullptr, [&] {
    const ModelStatistics statistics = model->model.statistics();
    return copied(join("{\"bytes_read\": ", statistics.bytes_read, ", \"seconds_waited\": ", statistics.seconds_waited,
                       ", \"direct\": ", statistics.is_direct ? "true" : "false", ", \"peak_resident_bytes\": ",
                       statistics.peak_resident_bytes, ", \"length\": ", statistics.length, "}"));
  });
}

int loop_singular_bit_start(loop_singular_bit_model* model, const int32_t* tokens, int64_t count,
                            const char* sampling) {
  return guarded<int>(-1, [&] {
    const Json json =
        parse_options(sampling, {"temperature", "top_p", "top_k", "repetition_penalty", "seed", "reuse_cache"});
    SamplingOptions options;
    bool reuse_cache = false;
    read_option(json, "temperature", options.temperature, as_number);
    read_option(json, "top_p", options.top_p, as_number);
    read_option(json, "top_k", options.top_k, as_integer);
    read_option(json, "repetition_penalty", options.repetition_penalty, as_number);
    read_option(json, "seed", options.seed, as_integer);
    read_option(json, "reuse_cache", reuse_cache, as_boolean);
    model->model.start(std::vector<int32_t>(tokens, tokens + count), options, reuse_cache);
    return 0;
  });
}

int32_t loop_singular_bit_next(loop_singular_bit_model* model) {
  return guarded<int32_t>(-1, [&] { return model->model.next(); });
}

int loop_singular_bit_logits(loop_singular_bit_model* model, const int32_t* tokens, int64_t count, float* output) {
  return guarded<int>(-1, [&] {
    model->model.logits(std::vector<int32_t>(tokens, tokens + count), output);
    return 0;
  });
}

char* loop_singular_bit_system(void) {
  return guarded<char*>(nullptr, [] {
    const loop_singular_bit::KernelTable* active = loop_singular_bit::active_kernels();
    std::string supported;
    for (const loop_singular_bit::KernelTable* table : loop_singular_bit::supported_kernels()) {
      supported += join(supported.empty() ? "" : ", ", json_quoted(table->name));
    }
    return copied(join("{\"isa\": ", active == nullptr ? "null" : json_quoted(active->name), ", \"supported_isas\": [",
                       supported, "], \"threads\": ", std::thread::hardware_concurrency(),
                       ", \"available_bytes\": ", available_memory_bytes(), "}"));
  });
}

double loop_singular_bit_read_rate(const char* path, int64_t bytes, int64_t buffer_bytes, int32_t looks) {
  return guarded<double>(-1.0, [&] { return measure_read_rate(path, bytes, buffer_bytes, looks != 0); });
}

}  // extern "C"
