#include "model_config.h"

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeadDim = 1024;
// Defaults of Transformers' configuration classes, for files that leave them out.
constexpr double kDefaultNormEpsilon = 1e-6;
constexpr int64_t kDefaultWindow = 4096;
constexpr int64_t kDefaultMaxWindowLayers = 28;

int64_t extent(const Json& config, const char* key, int64_t high = kMaxExtent) {
  return config.at(key).integer(1, high);
}

int64_t extent_or(const Json& config, const char* key, int64_t fallback, int64_t high = kMaxExtent) {
  const Json* value = config.find(key);
  return value == nullptr ? fallback : value->integer(1, high);
}

bool flag(const Json& config, const char* key) {
  const Json* value = config.find(key);
  return value != nullptr && value->boolean();
}

double number_or(const Json& object, const char* key, double fallback) {
  const Json* value = object.find(key);
  return value == nullptr ? fallback : value->number();
}

std::vector<int64_t> attention_windows(const Json& config, const ModelConfig& model) {
  std::vector<int64_t> windows(static_cast<size_t>(model.layers), 0);
  if (model.model_type == "mistral") {
    // Left out means the default, null means none: Transformers tells them apart.
    bool is_given = false;
    for (const auto& [key, value] : config.object()) is_given = is_given || key == "sliding_window";
    const int64_t window =
        is_given && config.find("sliding_window") == nullptr ? 0 : extent_or(config, "sliding_window", kDefaultWindow);
    windows.assign(windows.size(), window);
    return windows;
  }
  if (model.model_type == "llama" || !flag(config, "use_sliding_window")) return windows;
  const int64_t window = extent_or(config, "sliding_window", kDefaultWindow);
  const Json* types = config.find("layer_types");
  if (types != nullptr && static_cast<int64_t>(types->array().size()) != model.layers) {
    fail(ErrorKind::kCheckpoint, types->where(), ": expected one per layer, ", model.layers, ", got ",
         types->array().size());
  }
  const Json* first_value = config.find("max_window_layers");
  const int64_t first = first_value == nullptr ? kDefaultMaxWindowLayers : first_value->integer(0, kMaxLayers);
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    bool is_sliding = layer >= first;
    if (types != nullptr) {
      const Json& type = types->array()[static_cast<size_t>(layer)];
      is_sliding = type.string() == "sliding_attention";
      if (!is_sliding && type.string() != "full_attention") {
        fail(ErrorKind::kCheckpoint, type.where(), ": expected full_attention or sliding_attention, got ",
             json_quoted(type.string()));
      }
    }
    if (is_sliding) windows[static_cast<size_t>(layer)] = window;
  }
  return windows;
}

std::vector<int32_t> end_tokens(const Json& config) {
  std::vector<int32_t> tokens;
  const Json* value = config.find("eos_token_id");
  if (value == nullptr) return tokens;
  if (!value->is_array()) return {static_cast<int32_t>(value->integer(0, INT32_MAX))};
  for (const Json& token : value->array()) tokens.push_back(static_cast<int32_t>(token.integer(0, INT32_MAX)));
  return tokens;
}

}  // namespace

ModelConfig parse_model_config(const Json& config) {
  ModelConfig model{};
  model.model_type = config.at("model_type").string();
  if (model.model_type != "llama" && model.model_type != "mistral" && model.model_type != "qwen2" &&
      model.model_type != "qwen3") {
    fail(ErrorKind::kUnsupported, config.at("model_type").where(),
         ": the native runtime runs llama, mistral, qwen2 and qwen3, not ", json_quoted(model.model_type));
  }
  model.hidden_size = extent(config, "hidden_size");
  model.intermediate_size = extent(config, "intermediate_size");
  model.layers = extent(config, "num_hidden_layers", kMaxLayers);
  model.heads = extent(config, "num_attention_heads");
  model.key_value_heads = extent_or(config, "num_key_value_heads", model.heads, model.heads);
  if (model.heads % model.key_value_heads != 0) {
    fail(ErrorKind::kCheckpoint, config.where(), ": num_attention_heads ", model.heads,
         " is not a multiple of num_key_value_heads ", model.key_value_heads);
  }
  const bool has_head_dim = config.find("head_dim") != nullptr;
  if (!has_head_dim && model.hidden_size % model.heads != 0) {
    fail(ErrorKind::kCheckpoint, config.where(), ": hidden_size ", model.hidden_size,
         " is not a multiple of num_attention_heads ", model.heads);
  }
  const int64_t default_head_dim = model.model_type == "qwen3" ? 128 : model.hidden_size / model.heads;
  model.head_dim = has_head_dim ? extent(config, "head_dim", kMaxHeadDim) : default_head_dim;
  if (model.head_dim < 2 || model.head_dim % 2 != 0 || model.head_dim > kMaxHeadDim) {
    fail(ErrorKind::kCheckpoint, config.where(), ": head_dim: expected an even number up to ", kMaxHeadDim, ", got ",
         model.head_dim);
  }
  model.vocabulary = extent(config, "vocab_size");
  model.max_positions = extent(config, "max_position_embeddings", int64_t{1} << 32);
  model.norm_epsilon = static_cast<float>(number_or(config, "rms_norm_eps", kDefaultNormEpsilon));
  model.tied_head = flag(config, "tie_word_embeddings");
  model.query_key_norms = model.model_type == "qwen3";
  const Json* activation = config.find("hidden_act");
  if (activation != nullptr && activation->string() != "silu") {
    fail(ErrorKind::kUnsupported, activation->where(), ": expected silu, got ", json_quoted(activation->string()));
  }
  model.windows = attention_windows(config, model);
  model.rotary = RotaryEmbedding(config, model.head_dim, model.max_positions);
  model.max_positions = model.rotary.max_positions();
  model.end_tokens = end_tokens(config);
  return model;
}

}  // namespace loop_singular_bit::runtime
