#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int kLinearsPerLayer = 7;
constexpr int64_t kQueriesPerTask = 64;
constexpr int64_t kGatePerTask = 2048;
// Below this many sign bits times tokens, handing work to another thread costs more than it saves.
constexpr int64_t kSerialSigns = int64_t{1} << 17;
constexpr std::chrono::milliseconds kStopInterval{2};
// From here on there are two ranges of row tiles per thread: one that is slowed down leaves its second to the others.
// Fewer are longer, which is faster where nothing comes in between.
constexpr int64_t kLongSigns = int64_t{1} << 22;

// A view without memory, to ask kernels for sizes.
PackedWeightView shape_of(const StoredMatrix& matrix) {
  PackedWeightView view{};
  view.out_features = matrix.out_features;
  view.in_features = matrix.in_features;
  view.row_tiles = matrix.row_tiles();
  view.words = matrix.words();
  view.planes = matrix.planes;
  view.outliers = matrix.outliers;
  return view;
}

int64_t row_floats(const ModelConfig& config) {
  const int64_t attention = (config.heads + 2 * config.key_value_heads) * config.head_dim;
  return 2 * config.hidden_size + std::max(attention, 2 * config.intermediate_size);
}

int64_t score_floats(const DecoderOptions& options) {
  // Rounded out to whole blocks on both sides.
  return kQueriesPerPass * (options.context + 2 * kPositionsPerBlock);
}

struct KernelBytes {
  int64_t decode = 0;          // of one token
  int64_t decode_touched = 0;  // of these, what becomes resident
  int64_t prefill_activations = 0;
  int64_t prefill_scratch = 0;  // per thread
};

KernelBytes kernel_bytes(const PackedCheckpoint& checkpoint, const KernelTable& kernels,
                         const DecoderOptions& options) {
  KernelBytes bytes;
  for (const StoredMatrix& matrix : checkpoint.matrices()) {
    if (!matrix.is_packed) continue;
    const PackedWeightView view = shape_of(matrix);
    const ActivationPrecision precision = options.activation_precision;
    const int64_t tokens = options.prefill_tokens;
    const int64_t decode = kernels.linear.decode_activation_bytes(matrix.in_features, precision);
    bytes.decode = std::max(bytes.decode, decode);
    // What lies between the columns of a token and its codes is never written.
    const int64_t unused = (kMaxInFeatures - matrix.in_features) * static_cast<int64_t>(sizeof(float));
    bytes.decode_touched = std::max(bytes.decode_touched, decode - unused + 2 * kPageBytes);
    bytes.prefill_activations =
        std::max(bytes.prefill_activations, kernels.linear.prefill_activation_bytes(view, tokens, precision));
    bytes.prefill_scratch =
        std::max(bytes.prefill_scratch, page_ceiling(kernels.linear.prefill_scratch_bytes(view, tokens, precision)));
  }
  bytes.decode = page_ceiling(bytes.decode);
  bytes.decode_touched = std::min(page_ceiling(bytes.decode_touched), bytes.decode);
  return bytes;
}

int64_t decode_tokens(const DecoderOptions& options) { return std::min(kMaxDecodeTokens, options.prefill_tokens); }

void check_finite(const float* values, int64_t count, const char* what) {
  // On the bits, so that the loop vectorizes: NaN and infinities have the largest exponent.
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, values + i, sizeof(bits));
    largest = std::max(largest, bits & kExponent);
  }
  if (largest != kExponent) return;
  fail(ErrorKind::kCheckpoint, what, ": not a number among them: the weights overflow or are damaged");
}

}  // namespace

DecoderBytes Decoder::bytes(const PackedCheckpoint& checkpoint, const KernelTable& kernels,
                            const DecoderOptions& options) {
  const ModelConfig& config = checkpoint.config();
  const KernelBytes kernel = kernel_bytes(checkpoint, kernels, options);
  const int64_t floats = options.prefill_tokens * (row_floats(config) + config.head_dim);
  return {page_ceiling(floats * static_cast<int64_t>(sizeof(float))) +
              options.threads * (decode_tokens(options) * kernel.decode_touched + kernel.prefill_scratch) +
              page_ceiling(kernel.prefill_activations),
          options.threads * score_floats(options) * static_cast<int64_t>(sizeof(float))};
}

Decoder::Decoder(const PackedCheckpoint& checkpoint, WeightStream& stream, const KernelTable& kernels,
                 const DecoderOptions& options)
    : checkpoint_(checkpoint),
      config_(checkpoint.config()),
      stream_(stream),
      kernels_(kernels),
      options_(options),
      pool_(options.threads),
      cache_(config_, options.context, options.cache_type) {
  const int64_t rows = options_.prefill_tokens;
  memory_ = PageMemory(rows * row_floats(config_) * static_cast<int64_t>(sizeof(float)));
  residual_ = floats(0);
  normed_ = floats(rows * config_.hidden_size);
  queries_ = gate_ = floats(2 * rows * config_.hidden_size);
  keys_ = queries_ + rows * config_.heads * config_.head_dim;
  values_ = keys_ + rows * config_.key_value_heads * config_.head_dim;
  up_ = gate_ + rows * config_.intermediate_size;

  const KernelBytes kernel = kernel_bytes(checkpoint_, kernels_, options_);
  rotation_ = PageMemory(rows * config_.head_dim * static_cast<int64_t>(sizeof(float)));
  decode_activation_bytes_ = kernel.decode;
  decode_tokens_ = decode_tokens(options_);
  decode_activations_ = PageMemory(options_.threads * decode_tokens_ * kernel.decode);
  prepared_matrix_.assign(static_cast<size_t>(options_.threads), -1);
  prefill_activations_ = PageMemory(kernel.prefill_activations);
  prefill_scratch_bytes_ = kernel.prefill_scratch;
  prefill_scratch_ = PageMemory(options_.threads * kernel.prefill_scratch);
  scores_per_thread_ = score_floats(options_);
  scores_ = PageMemory(options_.threads * scores_per_thread_ * static_cast<int64_t>(sizeof(float)));

  // Units follow each other linear by linear.
  const auto& units = stream_.units();
  for (size_t i = 0; i < units.size(); ++i) {
    if (units[i].is_scales) continue;
    if (units[i].tile_begin == 0) linear_units_.emplace_back();
    linear_units_.back().push_back(static_cast<int>(i));
  }
  const StoredMatrix& embedding = checkpoint_.matrices()[checkpoint_.embedding()];
  if (embedding.is_packed) {
    const StoredTensor& scales = embedding.parts[kColumnScales];
    if (scales.file >= 0) {
      embedding_column_scales_.resize(static_cast<size_t>(embedding.in_features));
      checkpoint_.files()[scales.file]->read(scales.offset, scales.bytes, embedding_column_scales_.data());
    }
    int64_t tile_bytes = 0;
    for (int part = 0; part < kParts; ++part) tile_bytes += embedding.tile_bytes(static_cast<Part>(part));
    embedding_tile_.resize(static_cast<size_t>(tile_bytes));
    embedding_scratch_.resize(static_cast<size_t>(embedding.words() * kColumnsPerWord));
  } else {
    embedding_tile_.resize(static_cast<size_t>(embedding.in_features * 4));
  }
}

void Decoder::truncate(int64_t length) { length_ = std::min(length, length_); }

void Decoder::process(const int32_t* tokens, int64_t count, bool all_logits, float* logits) {
  if (count < 1) fail(ErrorKind::kUsage, "tokens: expected at least one");
  if (length_ + count > options_.context) {
    fail(ErrorKind::kUsage, "context: ", length_, " tokens and ", count, " more do not fit into ", options_.context);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= config_.vocabulary) {
      fail(ErrorKind::kUsage, "tokens: expected 0 to ", config_.vocabulary - 1, ", got ", tokens[i], " at ", i);
    }
  }
  const std::vector<float> frequencies = config_.rotary.frequencies(length_ + count);
  for (int64_t first = 0; first < count; first += options_.prefill_tokens) {
    const int64_t here = std::min(options_.prefill_tokens, count - first);
    const bool is_last = first + here == count;
    process_chunk(tokens + first, here, frequencies,
                  all_logits ? here
                  : is_last  ? 1
                             : 0,
                  all_logits ? logits + first * config_.vocabulary : logits);
  }
}

void Decoder::process_chunk(const int32_t* tokens, int64_t count, const std::vector<float>& frequencies,
                            int64_t logit_tokens, float* logits) {
  const int64_t hidden = config_.hidden_size;
  for (int64_t t = 0; t < count; ++t) expect_embedding(tokens[t]);
  for (int64_t t = 0; t < count; ++t) embed(tokens[t], residual_ + t * hidden);
  turn_positions(count, frequencies);
  for (int64_t index = 0; index < config_.layers; ++index) {
    const StoredLayer& layer = checkpoint_.layers()[index];
    const LinearUnits* units = &linear_units_[index * kLinearsPerLayer];
    normalize_rows(layer.attention_norm, residual_, count, normed_);
    linears({{units[0], layer.query, queries_}, {units[1], layer.key, keys_}, {units[2], layer.value, values_}},
            normed_, hidden, count);
    attention(index, count);
    linears({{units[3], layer.output, normed_}}, queries_, config_.heads * config_.head_dim, count);
    add_rows(normed_, count);
    normalize_rows(layer.feed_forward_norm, residual_, count, normed_);
    linears({{units[4], layer.gate, gate_}, {units[5], layer.up, up_}}, normed_, hidden, count);
    const int64_t values = count * config_.intermediate_size;
    pool_.for_each(values, kGatePerTask, [&](int64_t begin, int64_t end, int) {
      kernels_.decoder.gate(up_ + begin, end - begin, gate_ + begin);
    });
    linears({{units[6], layer.down, normed_}}, gate_, config_.intermediate_size, count);
    add_rows(normed_, count);
  }
  if (logit_tokens > 0) {
    const float* last = residual_ + (count - logit_tokens) * hidden;
    normalize_rows(checkpoint_.final_norm(), last, logit_tokens, normed_);
    linears({{linear_units_.back(), checkpoint_.head(), logits}}, normed_, hidden, logit_tokens);
    check_finite(logits, logit_tokens * config_.vocabulary, "logits");
  }
  length_ += count;
}

// Cosines and sines of the positions from length_ on.
void Decoder::turn_positions(int64_t count, const std::vector<float>& frequencies) {
  const int64_t half = config_.head_dim / 2;
  const float factor = config_.rotary.attention_factor();
  float* const cosines = reinterpret_cast<float*>(rotation_.data());
  float* const sines = cosines + options_.prefill_tokens * half;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(length_ + t) * frequencies[static_cast<size_t>(i)];
      cosines[t * half + i] = factor * std::cos(angle);
      sines[t * half + i] = factor * std::sin(angle);
    }
  }
}

// ---- embedding ----

// The unit that has the row, where the head's weights are the embedding's and stay in memory; -1: none.
int Decoder::resident_embedding_unit(int32_t token) const {
  const int embedding = checkpoint_.embedding();
  if (!checkpoint_.matrices()[embedding].is_packed || checkpoint_.head().matrix != embedding) return -1;
  const LinearUnits& units = linear_units_.back();
  const int unit = units[token / kRowsPerTile / stream_.units()[units.front()].tile_end];
  return stream_.is_resident(unit) ? unit : -1;
}

// Beside the streamed weights each of these small reads waits for large ones: together they wait once.
void Decoder::expect_embedding(int32_t token) const {
  if (resident_embedding_unit(token) >= 0) return;
  const StoredMatrix& matrix = checkpoint_.matrices()[checkpoint_.embedding()];
  const int64_t tile = token / kRowsPerTile;
  for (int part = 0; part < kParts; ++part) {
    const int64_t bytes = matrix.tile_bytes(static_cast<Part>(part));
    if (bytes == 0) continue;
    const StoredTensor& tensor = matrix.parts[part];
    checkpoint_.files()[tensor.file]->expect(tensor.offset + tile * bytes, bytes);
  }
}

void Decoder::embed(int32_t token, float* output) {
  const StoredMatrix& matrix = checkpoint_.matrices()[checkpoint_.embedding()];
  const int unit = resident_embedding_unit(token);
  if (unit >= 0) {
    const UnitView view = stream_.resident_view(unit);
    kernels_.codec.dequantize_row(view.packed, token - view.first_row, embedding_scratch_.data(), output,
                                  ElementType::kFloat32);
  } else if (matrix.is_packed) {
    read_packed_embedding(token, output);
  } else {
    read_dense_embedding(token, output);
  }
  check_finite(output, config_.hidden_size, matrix.name.c_str());
}

void Decoder::read_packed_embedding(int32_t token, float* output) {
  const StoredMatrix& matrix = checkpoint_.matrices()[checkpoint_.embedding()];
  const int64_t tile = token / kRowsPerTile;
  const void* parts[kParts] = {};
  std::byte* target = embedding_tile_.data();
  for (int part = 0; part < kParts; ++part) {
    const int64_t bytes = matrix.tile_bytes(static_cast<Part>(part));
    if (bytes == 0) continue;
    const DataFile& file = *checkpoint_.files()[matrix.parts[part].file];
    file.check_unchanged();
    file.read(matrix.parts[part].offset + tile * bytes, bytes, target);
    parts[part] = target;
    target += bytes;
  }
  PackedWeightView view = shape_of(matrix);
  view.signs = static_cast<const int32_t*>(parts[kSigns]);
  view.scales = static_cast<const uint16_t*>(parts[kScales]);
  view.outlier_columns = static_cast<const uint16_t*>(parts[kOutlierColumns]);
  view.outlier_deltas = static_cast<const int8_t*>(parts[kOutlierDeltas]);
  view.outlier_scales = static_cast<const uint16_t*>(parts[kOutlierScales]);
  view.means = static_cast<const uint16_t*>(parts[kMeans]);
  view.column_scales = embedding_column_scales_.empty() ? nullptr : embedding_column_scales_.data();
  view.row_tiles = 1;
  const int64_t lane = token % kRowsPerTile;
  for (int64_t i = 0; i < matrix.outliers; ++i) {
    const int64_t column = view.outlier_columns[i * kRowsPerTile + lane];
    if (column < matrix.in_features) continue;
    fail(ErrorKind::kCheckpoint, checkpoint_.files()[matrix.parts[kSigns].file]->path(), ": tensor ", matrix.name,
         ".outlier_columns: expected columns below ", matrix.in_features, ", got ", column, " at row ", token);
  }
  kernels_.codec.dequantize_row(view, lane, embedding_scratch_.data(), output, ElementType::kFloat32);
}

void Decoder::read_dense_embedding(int32_t token, float* output) {
  const StoredMatrix& matrix = checkpoint_.matrices()[checkpoint_.embedding()];
  const int64_t row_bytes = matrix.in_features * (matrix.dense_type == ElementType::kFloat32 ? 4 : 2);
  const DataFile& file = *checkpoint_.files()[matrix.parts[0].file];
  file.check_unchanged();
  file.read(matrix.parts[0].offset + token * row_bytes, row_bytes, embedding_tile_.data());
  // A product with 1 is the conversion to float32.
  constexpr float kOne = 1.0f;
  kernels_.decoder.dense_linear(embedding_tile_.data(), matrix.dense_type, /*in_features=*/1, /*row_begin=*/0,
                                /*row_end=*/matrix.in_features, &kOne, /*input_stride=*/1, /*tokens=*/1,
                                /*bias=*/nullptr, output, /*output_stride=*/matrix.in_features);
}

// ---- linears ----

// Looked at rarely: asking is a system call.
void Decoder::stop_if_asked() {
  if (!options_.should_stop) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - stop_asked_ < kStopInterval) return;
  stop_asked_ = now;
  if (options_.should_stop()) fail(ErrorKind::kInterrupted, "interrupted");
}

int64_t Decoder::grain(int64_t tiles, int64_t work) const {
  if (work <= kSerialSigns) return tiles;
  const int64_t ranges = pool_.threads() * (work < kLongSigns ? 1 : 2);
  return (tiles + ranges - 1) / ranges;
}

bool Decoder::is_decode(const PackedWeightView& weight, int64_t tokens) const {
  return tokens <= std::min(decode_tokens_, kernels_.linear.decode_token_limit(weight, options_.activation_precision));
}

// Linears of the same input. Where their weights are in memory they are one parallel region.
void Decoder::linears(std::initializer_list<Application> applications, const float* input, int64_t input_stride,
                      int64_t tokens) {
  stop_if_asked();
  bool is_together = true;
  for (const Application& application : applications) {
    const StoredMatrix& matrix = checkpoint_.matrices()[application.linear.matrix];
    is_together = is_together && matrix.is_packed && is_decode(shape_of(matrix), tokens);
    for (const int unit : application.units) is_together = is_together && stream_.is_resident(unit);
  }
  if (!is_together) {
    for (const Application& application : applications) linear(application, input, input_stride, tokens);
    return;
  }
  products_.clear();
  for (const Application& application : applications) {
    for (const int unit : application.units) {
      const UnitView view = stream_.resident_view(unit);
      products_.push_back(product_of(view, application.linear, application.output));
    }
  }
  std::fill(prepared_matrix_.begin(), prepared_matrix_.end(), -1);
  decode({input, input_stride, ElementType::kFloat32}, tokens);
}

void Decoder::linear(const Application& application, const float* input, int64_t input_stride, int64_t tokens) {
  const StoredLinear& linear = application.linear;
  const StoredMatrix& matrix = checkpoint_.matrices()[linear.matrix];
  const LinearInput source{input, input_stride, ElementType::kFloat32};
  std::fill(prepared_matrix_.begin(), prepared_matrix_.end(), -1);
  for (const int unit : application.units) {
    stop_if_asked();
    const UnitView view = stream_.acquire(unit);
    if (!matrix.is_packed) {
      const float* bias = linear.bias.empty() ? nullptr : linear.bias.data() + view.first_row;
      pool_.for_each(view.rows, kRowsPerTile, [&](int64_t begin, int64_t end, int) {
        kernels_.decoder.dense_linear(view.dense, matrix.dense_type, matrix.in_features, begin, end, input,
                                      input_stride, tokens, bias, application.output + view.first_row,
                                      matrix.out_features);
      });
    } else if (is_decode(view.packed, tokens)) {
      products_.assign(1, product_of(view, linear, application.output));
      decode(source, tokens);
    } else {
      prefill(product_of(view, linear, application.output), unit == application.units.front(), source, tokens);
    }
    stream_.release(unit);
  }
}

Decoder::Product Decoder::product_of(const UnitView& view, const StoredLinear& linear, float* output) const {
  Product product{};
  product.weight = view.packed;
  product.matrix = linear.matrix;
  product.output.data = output + view.first_row;
  product.output.row_stride = checkpoint_.matrices()[linear.matrix].out_features;
  product.output.type = ElementType::kFloat32;
  product.output.bias_type = ElementType::kFloat32;
  product.output.bias = linear.bias.empty() ? nullptr : linear.bias.data() + view.first_row;
  return product;
}

// products_, as one region over the row tiles of all of them.
void Decoder::decode(const LinearInput& input, int64_t tokens) {
  const LinearKernels& kernels = kernels_.linear;
  int64_t tiles = 0;
  int64_t signs = 0;
  for (const Product& product : products_) {
    const PackedWeightView& weight = product.weight;
    tiles += weight.row_tiles;
    signs += weight.row_tiles * kRowsPerTile * weight.in_features * weight.planes;
  }
  pool_.for_each(tiles, grain(tiles, signs * tokens), [&](int64_t begin, int64_t end, int thread) {
    DecodeActivations* prepared[kMaxDecodeTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      prepared[t] = reinterpret_cast<DecodeActivations*>(decode_activations_.data() +
                                                         (thread * decode_tokens_ + t) * decode_activation_bytes_);
    }
    int64_t first = 0;  // tile of the region that the product begins with
    for (const Product& product : products_) {
      const PackedWeightView& weight = product.weight;
      const int64_t from = std::max(begin - first, int64_t{0});
      const int64_t to = std::min(end - first, weight.row_tiles);
      first += weight.row_tiles;
      if (from >= to) continue;
      int& prepared_matrix = prepared_matrix_[static_cast<size_t>(thread)];
      if (prepared_matrix != product.matrix) {
        for (int64_t t = 0; t < tokens; ++t) {
          kernels.prepare_decode(weight, input, t, options_.activation_precision, prepared[t]);
        }
        prepared_matrix = product.matrix;
      }
      kernels.gemv(weight, prepared, tokens, from, to, product.output);
    }
  });
}

void Decoder::prefill(const Product& product, bool is_first, const LinearInput& input, int64_t tokens) {
  const LinearKernels& kernels = kernels_.linear;
  const ActivationPrecision precision = options_.activation_precision;
  const PackedWeightView& weight = product.weight;
  if (is_first) {
    const int64_t units = (tokens + kernels.prefill_unit_tokens - 1) / kernels.prefill_unit_tokens;
    pool_.for_each(units, 1, [&](int64_t begin, int64_t end, int) {
      kernels.prepare_prefill(weight, input, tokens, begin, end, precision, prefill_activations_.data());
    });
  }
  const int64_t tiles = weight.row_tiles;
  const int64_t signs = tiles * kRowsPerTile * weight.in_features * weight.planes;
  pool_.for_each(tiles, grain(tiles, signs * tokens), [&](int64_t begin, int64_t end, int thread) {
    kernels.gemm(weight, prefill_activations_.data(), tokens, precision, begin, end,
                 prefill_scratch_.data() + thread * prefill_scratch_bytes_, product.output);
  });
}

// ---- attention ----

void Decoder::attention(int64_t index, int64_t tokens) {
  const StoredLayer& layer = checkpoint_.layers()[index];
  const int64_t head_dim = config_.head_dim;
  const int64_t half = head_dim / 2;
  const int64_t group = config_.heads / config_.key_value_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const float* const cosines = reinterpret_cast<const float*>(rotation_.data());
  const float* const sines = cosines + options_.prefill_tokens * half;
  const DecoderKernels& kernels = kernels_.decoder;

  const auto rotate_head = [&](float* vector, const std::vector<float>& norm, int64_t token) {
    if (!norm.empty()) kernels.normalize(vector, norm.data(), head_dim, config_.norm_epsilon, vector);
    kernels.rotate(cosines + token * half, sines + token * half, head_dim, vector);
  };
  const auto append_token = [&](int64_t token) {
    for (int64_t head = 0; head < config_.heads; ++head) {
      float* query = queries_ + (token * config_.heads + head) * head_dim;
      rotate_head(query, layer.query_norm, token);
      for (int64_t i = 0; i < head_dim; ++i) query[i] *= scale;
    }
    for (int64_t head = 0; head < config_.key_value_heads; ++head) {
      float* key = keys_ + (token * config_.key_value_heads + head) * head_dim;
      rotate_head(key, layer.key_norm, token);
      kernels.append(cache_.head(index, head), length_ + token, key,
                     values_ + (token * config_.key_value_heads + head) * head_dim);
    }
  };
  // Whole blocks of positions per task: threads do not share cache lines of keys.
  pool_.for_each(tokens, kPositionsPerBlock, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) append_token(token);
  });

  const int64_t queries = tokens * group;
  const int64_t tasks_per_head = (queries + kQueriesPerTask - 1) / kQueriesPerTask;
  const int64_t window = config_.windows[index];
  const auto attend_task = [&](int64_t task, int thread) {
    const int64_t head = task / tasks_per_head;
    const int64_t first = task % tasks_per_head * kQueriesPerTask;
    const int64_t count = std::min(kQueriesPerTask, queries - first);
    AttentionQuery batch[kQueriesPerTask];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (first + i) / group;
      float* vector = queries_ + (token * config_.heads + head * group + (first + i) % group) * head_dim;
      const int64_t end = length_ + token + 1;
      batch[i] = {vector, vector, window > 0 ? std::max<int64_t>(0, end - window) : 0, end};
    }
    kernels.attend(cache_.head(index, head), batch, count,
                   reinterpret_cast<float*>(scores_.data()) + thread * scores_per_thread_);
  };
  const int64_t tasks = config_.key_value_heads * tasks_per_head;
  const bool is_small = queries * config_.key_value_heads * (length_ + tokens) * head_dim <= kSerialSigns;
  pool_.for_each(tasks, is_small ? tasks : 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) attend_task(task, thread);
  });
}

// ---- rows ----

void Decoder::normalize_rows(const std::vector<float>& weight, const float* input, int64_t tokens, float* output) {
  const int64_t hidden = config_.hidden_size;
  pool_.for_each(tokens, kPositionsPerBlock, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      kernels_.decoder.normalize(input + t * hidden, weight.data(), hidden, config_.norm_epsilon, output + t * hidden);
    }
  });
}

void Decoder::add_rows(const float* addend, int64_t tokens) {
  const int64_t count = tokens * config_.hidden_size;
  for (int64_t i = 0; i < count; ++i) residual_[i] += addend[i];
}

}  // namespace loop_singular_bit::runtime
