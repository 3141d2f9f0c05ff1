#include "packed_checkpoint.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kFormatVersion = 1;
constexpr int64_t kMaxJsonBytes = 100'000'000;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

struct PartSpec {
  const char* name;
  const char* dtype;
};

constexpr PartSpec kPartSpecs[kParts] = {
    {"signs", "I32"},         {"scales", "F16"}, {"outlier_columns", "U16"}, {"outlier_scales", "F16"},
    {"column_scales", "F16"}, {"means", "F16"},  {"outlier_deltas", "I8"}};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::vector<int64_t> part_shape(const StoredMatrix& matrix, Part part) {
  const int64_t tiles = matrix.row_tiles();
  switch (part) {
    case kSigns:
      return {tiles, matrix.planes, matrix.words(), kRowsPerTile};
    case kScales:
      return {tiles, matrix.planes, kRowsPerTile};
    case kOutlierColumns:
    case kOutlierDeltas:
      return {tiles, matrix.outliers, kRowsPerTile};
    case kColumnScales:
      return {matrix.in_features};
    default:
      return {tiles, kRowsPerTile};
  }
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float float_of_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exact for subnormals too: the multiplication moves the exponent from float32's bias to float16's.
  return float_from_bits(sign | magnitude << 13) * 0x1p112f;
}

}  // namespace

int64_t StoredMatrix::bytes() const {
  int64_t total = 0;
  for (const StoredTensor& part : parts) total += part.bytes;
  return total;
}

int64_t StoredMatrix::tile_bytes(Part part) const {
  if (!is_packed) {
    return part == 0 ? kRowsPerTile * in_features * (dense_type == ElementType::kFloat32 ? 4 : 2) : 0;
  }
  if (parts[part].file < 0 || part == kColumnScales) return 0;
  return parts[part].bytes / row_tiles();
}

PackedCheckpoint::PackedCheckpoint(const std::string& directory) : directory_(directory) {
  const std::string config_path = directory + "/config.json";
  json_ = Json::parse(read_text_file(config_path, kMaxJsonBytes), config_path);
  const Json* quantization = json_.find("quantization_config");
  if (quantization == nullptr) {
    fail(ErrorKind::kCheckpoint, config_path,
         ": no quantization_config: this is not a packed checkpoint; make one with ", "`loop-singular-bit compress`");
  }
  const Json& method = quantization->at("quant_method");
  if (method.string() != "loop_singular_bit") {
    fail(ErrorKind::kCheckpoint, method.where(), ": expected \"loop_singular_bit\", got ",
         json_quoted(method.string()));
  }
  const int64_t version = quantization->at("format_version").integer(INT64_MIN, INT64_MAX);
  if (version != kFormatVersion) {
    fail(ErrorKind::kCheckpoint, config_path, ": this version reads packed format ", kFormatVersion,
         ", the checkpoint has ", version);
  }
  config_ = parse_model_config(json_);
  modules_ = &quantization->at("modules");
  tied_modules_ = quantization->find("tied_modules");
  if (const Json* preset = quantization->find("preset")) preset_ = preset->string();
  open_files(directory);
  embedding_ = take_matrix("model.embed_tokens", config_.vocabulary, config_.hidden_size);
  take_layers();
  final_norm_ = take_vector("model.norm.weight", config_.hidden_size);
  const bool is_tied = config_.tied_head || (tied_modules_ != nullptr && tied_modules_->find("lm_head") != nullptr);
  if (is_tied && find("lm_head.weight") == nullptr && modules_->find("lm_head") == nullptr) {
    head_.matrix = embedding_;
    head_.bias = take_optional_vector("lm_head.bias", config_.vocabulary);
  } else {
    head_ = take_linear("lm_head", config_.vocabulary, config_.hidden_size);
  }
  check_all_used();
}

void PackedCheckpoint::open_files(const std::string& directory) {
  std::vector<std::string> names;
  const std::string index_path = directory + "/" + kIndexFile;
  struct stat status;
  const bool has_index = stat(index_path.c_str(), &status) == 0;
  Json index;
  if (has_index) {
    index = Json::parse(read_text_file(index_path, kMaxJsonBytes), index_path);
    for (const auto& [tensor, file] : index.at("weight_map").object()) {
      if (!is_plain_name(file.string())) {
        fail(ErrorKind::kCheckpoint, file.where(), ": expected the name of a file in the same directory, got ",
             json_quoted(file.string()));
      }
      names.push_back(file.string());
    }
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
  } else {
    names.push_back(kSingleFile);
  }
  for (const std::string& name : names) {
    files_.push_back(std::make_unique<DataFile>(directory + "/" + name));
    for (TensorEntry& entry : read_safetensors_header(*files_.back())) {
      tensors_.push_back({std::move(entry), static_cast<int>(files_.size()) - 1});
    }
  }
  std::sort(tensors_.begin(), tensors_.end(),
            [](const Located& a, const Located& b) { return a.entry.name < b.entry.name; });
  for (size_t i = 1; i < tensors_.size(); ++i) {
    if (tensors_[i].entry.name == tensors_[i - 1].entry.name) {
      fail(ErrorKind::kCheckpoint, directory, ": tensor ", tensors_[i].entry.name, " is in two shards");
    }
  }
  if (!has_index) return;
  for (const auto& [tensor, file] : index.at("weight_map").object()) {
    const Located* located = find(tensor);
    if (located == nullptr || files_[located->file]->path() != directory + "/" + file.string()) {
      fail(ErrorKind::kCheckpoint, index_path, ": tensor ", tensor, " is not in ", file.string());
    }
  }
}

PackedCheckpoint::Located* PackedCheckpoint::find(const std::string& name) {
  const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                      [](const Located& a, const std::string& b) { return a.entry.name < b; });
  return found != tensors_.end() && found->entry.name == name ? &*found : nullptr;
}

PackedCheckpoint::Located& PackedCheckpoint::take(const std::string& name, const std::vector<int64_t>& shape) {
  Located* located = find(name);
  if (located == nullptr) fail(ErrorKind::kCheckpoint, directory_, ": tensor ", name, " is missing");
  if (located->entry.shape != shape) {
    fail(ErrorKind::kCheckpoint, files_[located->file]->path(), ": tensor ", name, ": expected shape ",
         shape_text(shape), ", got ", shape_text(located->entry.shape));
  }
  located->is_used = true;
  return *located;
}

std::vector<float> PackedCheckpoint::take_vector(const std::string& name, int64_t count) {
  const Located& located = take(name, {count});
  const DataFile& file = *files_[located.file];
  std::vector<float> values(static_cast<size_t>(count));
  if (located.entry.dtype == "F32") {
    file.read(located.entry.offset, located.entry.bytes, values.data());
  } else if (located.entry.dtype == "BF16" || located.entry.dtype == "F16") {
    std::vector<uint16_t> halves(values.size());
    file.read(located.entry.offset, located.entry.bytes, halves.data());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = located.entry.dtype == "F16" ? float_of_half(halves[i])
                                               : float_from_bits(static_cast<uint32_t>(halves[i]) << 16);
    }
  } else {
    fail(ErrorKind::kCheckpoint, file.path(), ": tensor ", name, ": expected F32, BF16 or F16, got ",
         located.entry.dtype);
  }
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(values[i] - values[i] == 0.0f)) {
      fail(ErrorKind::kCheckpoint, file.path(), ": tensor ", name, ": expected finite values, got ", values[i], " at ",
           i);
    }
  }
  return values;
}

std::vector<float> PackedCheckpoint::take_optional_vector(const std::string& name, int64_t count) {
  return find(name) == nullptr ? std::vector<float>() : take_vector(name, count);
}

void PackedCheckpoint::take_packed_parts(StoredMatrix& matrix, const Json& fields) {
  static constexpr const char* kKeys[] = {"kind",     "out_features",  "in_features", "planes",
                                          "outliers", "column_scales", "means"};
  for (const auto& [key, value] : fields.object()) {
    if (std::find(std::begin(kKeys), std::end(kKeys), key) == std::end(kKeys)) {
      fail(ErrorKind::kCheckpoint, value.where(), ": this key is unknown");
    }
  }
  const std::string& kind = fields.at("kind").string();
  if (kind != "linear" && kind != "embedding") {
    fail(ErrorKind::kCheckpoint, fields.where(), ".kind: expected linear or embedding, got ", json_quoted(kind));
  }
  if (matrix.in_features > kMaxInFeatures) {
    fail(ErrorKind::kCheckpoint, fields.where(), ".in_features: expected at most ", kMaxInFeatures);
  }
  fields.at("out_features").integer(matrix.out_features, matrix.out_features);
  fields.at("in_features").integer(matrix.in_features, matrix.in_features);
  matrix.is_packed = true;
  matrix.planes = fields.at("planes").integer(1, kMaxPlanes);
  matrix.outliers = fields.at("outliers").integer(0, matrix.in_features);
  const bool is_present[kParts] = {
      true, true, true, true, fields.at("column_scales").boolean(), fields.at("means").boolean(), true};
  for (int part = 0; part < kParts; ++part) {
    if (!is_present[part]) continue;
    const std::string name = matrix.name + "." + kPartSpecs[part].name;
    const Located& located = take(name, part_shape(matrix, static_cast<Part>(part)));
    if (located.entry.dtype != kPartSpecs[part].dtype) {
      fail(ErrorKind::kCheckpoint, files_[located.file]->path(), ": tensor ", name, ": expected dtype ",
           kPartSpecs[part].dtype, ", got ", located.entry.dtype);
    }
    matrix.parts[part] = {located.file, located.entry.offset, located.entry.bytes};
  }
  // A weight of zero elements under the name of a dense one keeps readers that know nothing of the format from running
  // with random weights.
  Located* guard = find(matrix.name + ".weight");
  if (guard != nullptr && guard->entry.bytes == 0) guard->is_used = true;
}

int PackedCheckpoint::take_matrix(const std::string& name, int64_t out_features, int64_t in_features) {
  StoredMatrix matrix;
  matrix.name = name;
  matrix.out_features = out_features;
  matrix.in_features = in_features;
  if (const Json* fields = modules_->find(name)) {
    take_packed_parts(matrix, *fields);
  } else {
    const Located& located = take(name + ".weight", {out_features, in_features});
    if (located.entry.dtype != "F32" && located.entry.dtype != "BF16" && located.entry.dtype != "F16") {
      fail(ErrorKind::kCheckpoint, files_[located.file]->path(), ": tensor ", name,
           ".weight: expected F32, BF16 or F16, ", "got ", located.entry.dtype);
    }
    matrix.dense_type = located.entry.dtype == "F32"    ? ElementType::kFloat32
                        : located.entry.dtype == "BF16" ? ElementType::kBFloat16
                                                        : ElementType::kFloat16;
    matrix.parts[0] = {located.file, located.entry.offset, located.entry.bytes};
  }
  matrices_.push_back(std::move(matrix));
  return static_cast<int>(matrices_.size()) - 1;
}

StoredLinear PackedCheckpoint::take_linear(const std::string& name, int64_t out_features, int64_t in_features) {
  StoredLinear linear;
  linear.matrix = take_matrix(name, out_features, in_features);
  linear.bias = take_optional_vector(name + ".bias", out_features);
  return linear;
}

void PackedCheckpoint::take_layers() {
  const int64_t hidden = config_.hidden_size;
  const int64_t queries = config_.heads * config_.head_dim;
  const int64_t keys = config_.key_value_heads * config_.head_dim;
  for (int64_t i = 0; i < config_.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    StoredLayer layer;
    layer.attention_norm = take_vector(prefix + "input_layernorm.weight", hidden);
    layer.feed_forward_norm = take_vector(prefix + "post_attention_layernorm.weight", hidden);
    if (config_.query_key_norms) {
      layer.query_norm = take_vector(prefix + "self_attn.q_norm.weight", config_.head_dim);
      layer.key_norm = take_vector(prefix + "self_attn.k_norm.weight", config_.head_dim);
    }
    layer.query = take_linear(prefix + "self_attn.q_proj", queries, hidden);
    layer.key = take_linear(prefix + "self_attn.k_proj", keys, hidden);
    layer.value = take_linear(prefix + "self_attn.v_proj", keys, hidden);
    layer.output = take_linear(prefix + "self_attn.o_proj", hidden, queries);
    layer.gate = take_linear(prefix + "mlp.gate_proj", config_.intermediate_size, hidden);
    layer.up = take_linear(prefix + "mlp.up_proj", config_.intermediate_size, hidden);
    layer.down = take_linear(prefix + "mlp.down_proj", hidden, config_.intermediate_size);
    layers_.push_back(std::move(layer));
  }
}

void PackedCheckpoint::check_all_used() {
  for (const Located& located : tensors_) {
    // Old checkpoints carry the rotary frequencies, which config.json determines.
    const bool is_known = located.is_used || located.entry.name.ends_with(".rotary_emb.inv_freq");
    if (!is_known) {
      fail(ErrorKind::kCheckpoint, files_[located.file]->path(), ": tensor ", located.entry.name, " is not part of a ",
           config_.model_type, " model");
    }
  }
}

int64_t PackedCheckpoint::vector_bytes() const {
  int64_t count = static_cast<int64_t>(final_norm_.size() + head_.bias.size());
  for (const StoredLayer& layer : layers_) {
    count += static_cast<int64_t>(layer.attention_norm.size() + layer.feed_forward_norm.size() +
                                  layer.query_norm.size() + layer.key_norm.size());
    for (const StoredLinear* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down}) {
      count += static_cast<int64_t>(linear->bias.size());
    }
  }
  return count * static_cast<int64_t>(sizeof(float));
}

}  // namespace loop_singular_bit::runtime
