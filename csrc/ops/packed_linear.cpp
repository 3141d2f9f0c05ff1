// packed_linear: input [..., in_features] x packed weight [out_features, in_features] -> [..., out_features], and
// packed_linear_group: the same input times several weights in one call.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <vector>

#include "dispatch.h"
#include "packed_weight_args.h"

namespace loop_singular_bit {
namespace {

// Memory that a thread keeps from call to call. Grows, never shrinks; starts as zeros.
class ThreadBuffer {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset();
      bytes_ = 0;
      const size_t rounded = static_cast<size_t>((bytes + kPage - 1) / kPage * kPage);
      void* memory = std::aligned_alloc(kPage, rounded);
      if (memory == nullptr) throw std::bad_alloc();
      std::memset(memory, 0, rounded);
      data_.reset(memory);
      bytes_ = static_cast<int64_t>(rounded);
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kPage = 4096;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t bytes_ = 0;
};

// One per token: what lies behind a DecodeActivations depends on in_features, its zeros must survive.
thread_local ThreadBuffer decode_buffers[kMaxDecodeTokens];
thread_local ThreadBuffer prefill_activations;
thread_local ThreadBuffer prefill_scratch;

// Below this many sign bits times tokens, handing work to another thread costs more than it saves.
constexpr int64_t kSerialSigns = int64_t{1} << 19;

ElementType element_type(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK(false, "packed_linear: ", name, ": expected dtype float32, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

ActivationPrecision activation_precision_named(c10::string_view name) {
  if (name == "int8") return ActivationPrecision::kInt8;
  if (name == "int16") return ActivationPrecision::kInt16;
  if (name == "exact") return ActivationPrecision::kExact;
  TORCH_CHECK_VALUE(false, "packed_linear: activation_precision: expected 'int8', 'int16' or 'exact', got '", name,
                    "'");
}

template <typename Body>
void for_each(int64_t count, bool is_small, const Body& body) {
  if (is_small || count == 1) {
    body(0, count);
  } else {
    at::parallel_for(0, count, 1, body);
  }
}

int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// The tokens of a call, and how precisely to take them.
struct Tokens {
  LinearInput input;
  int64_t count;
  ActivationPrecision precision;
  at::Tensor rows;  // owns what `input` points to
};

Tokens advanced(Tokens tokens, int64_t first, int64_t count) {
  tokens.input.data =
      static_cast<const char*>(tokens.input.data) + first * tokens.input.row_stride * element_bytes(tokens.input.type);
  tokens.count = count;
  return tokens;
}

LinearOutput advanced(LinearOutput output, int64_t tokens) {
  output.data = static_cast<char*>(output.data) + tokens * output.row_stride * element_bytes(output.type);
  return output;
}

// One weight of a call, and where its results go.
struct Product {
  PackedWeightView weight;
  LinearOutput output;
  at::Tensor bias;  // owns what `output.bias` points to
  // Activations are prepared for the column scales of a weight, and for one plane or more: once for all products with
  // the same set.
  int64_t activation_set;
};

using Products = std::span<const Product>;

bool have_equal_column_scales(const PackedWeightView& a, const PackedWeightView& b) {
  if (a.column_scales == b.column_scales) return true;
  if (a.column_scales == nullptr || b.column_scales == nullptr) return false;
  return std::memcmp(a.column_scales, b.column_scales, static_cast<size_t>(a.in_features) * sizeof(uint16_t)) == 0;
}

// What a kernel prepares serves both.
bool share_activations(const PackedWeightView& a, const PackedWeightView& b) {
  return (a.planes == 1) == (b.planes == 1) && have_equal_column_scales(a, b);
}

// Returns the number of sets.
int64_t assign_activation_sets(std::span<Product> products) {
  int64_t sets = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const auto fits = [&](const Product& other) { return share_activations(other.weight, products[i].weight); };
    const auto earlier = std::find_if(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(i), fits);
    const bool is_new = earlier == products.begin() + static_cast<std::ptrdiff_t>(i);
    products[i].activation_set = is_new ? sets++ : earlier->activation_set;
  }
  return sets;
}

// The row tiles of several weights as one sequence, to be split among threads by what they cost: a tile belongs to the
// range in which its cost begins.
struct TileRange {
  int64_t begin, end;
};

TileRange tiles_within(int64_t tiles, int64_t tile_cost, int64_t begin, int64_t end) {
  const auto first_from = [&](int64_t cost) {
    return std::clamp<int64_t>((cost + tile_cost - 1) / tile_cost, 0, tiles);
  };
  return {first_from(std::max<int64_t>(begin, 0)), first_from(std::max<int64_t>(end, 0))};
}

// Calls body(product, tile_begin, tile_end) for the tiles of all products that are within [begin, end).
template <typename Cost, typename Body>
void for_each_product(Products products, const Cost& tile_cost, int64_t begin, int64_t end, const Body& body) {
  for (const Product& product : products) {
    const int64_t cost = tile_cost(product.weight);
    const TileRange tiles = tiles_within(product.weight.row_tiles, cost, begin, end);
    if (tiles.begin < tiles.end) body(product, tiles.begin, tiles.end);
    begin -= product.weight.row_tiles * cost;
    end -= product.weight.row_tiles * cost;
  }
}

template <typename Cost>
int64_t total_cost(Products products, const Cost& tile_cost) {
  int64_t total = 0;
  for (const Product& product : products) total += product.weight.row_tiles * tile_cost(product.weight);
  return total;
}

// Decoding reads memory.
int64_t stored_tile_bytes(const PackedWeightView& weight) {
  return kRowsPerTile * (4 * weight.planes * weight.words + 3 * weight.outliers);
}

// Every thread prepares the tokens for itself: that takes a microsecond, and fetching what another core has just
// written, line by line in the order of the outliers, takes many.
void decode(const LinearKernels& kernels, Products products, const Tokens& tokens, bool is_small) {
  const int64_t bytes = kernels.decode_activation_bytes(products.front().weight.in_features, tokens.precision);
  for_each(total_cost(products, stored_tile_bytes), is_small, [&](int64_t begin, int64_t end) {
    const DecodeActivations* prepared[kMaxDecodeTokens];
    int64_t prepared_set = -1;
    for_each_product(products, stored_tile_bytes, begin, end, [&](const Product& product, int64_t first, int64_t last) {
      for (int64_t token = 0; token < tokens.count && product.activation_set != prepared_set; ++token) {
        auto* activations = static_cast<DecodeActivations*>(decode_buffers[token].at_least(bytes));
        kernels.prepare_decode(product.weight, tokens.input, token, tokens.precision, activations);
        prepared[token] = activations;
      }
      prepared_set = product.activation_set;
      kernels.gemv(product.weight, prepared, tokens.count, first, last, product.output);
    });
  });
}

// Prefilling multiplies: once for each tile, whatever the number of planes.
int64_t one_per_tile(const PackedWeightView&) { return 1; }

void prefill(const LinearKernels& kernels, Products products, const Tokens& tokens, bool is_small,
             int64_t first_token) {
  int64_t set_bytes = 0, scratch_bytes = 0;
  c10::SmallVector<const Product*, 4> first_of_set;
  for (const Product& product : products) {
    const PackedWeightView& weight = product.weight;
    set_bytes = std::max(set_bytes, kernels.prefill_activation_bytes(weight, tokens.count, tokens.precision));
    scratch_bytes = std::max(scratch_bytes, kernels.prefill_scratch_bytes(weight, tokens.count, tokens.precision));
    // Sets are numbered as they come.
    if (product.activation_set == static_cast<int64_t>(first_of_set.size())) first_of_set.push_back(&product);
  }
  const int64_t activation_sets = static_cast<int64_t>(first_of_set.size());
  set_bytes = (set_bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
  char* const activations = static_cast<char*>(prefill_activations.at_least(activation_sets * set_bytes));
  const int64_t units = (tokens.count + kernels.prefill_unit_tokens - 1) / kernels.prefill_unit_tokens;
  for_each(activation_sets * units, is_small, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t set = begin / units, unit = begin % units, count = std::min(end - begin, units - unit);
      kernels.prepare_prefill(first_of_set[static_cast<size_t>(set)]->weight, tokens.input, tokens.count, unit,
                              unit + count, tokens.precision, activations + set * set_bytes);
      begin += count;
    }
  });
  for_each(total_cost(products, one_per_tile), is_small, [&](int64_t begin, int64_t end) {
    void* scratch = prefill_scratch.at_least(scratch_bytes);
    for_each_product(products, one_per_tile, begin, end, [&](const Product& product, int64_t first, int64_t last) {
      kernels.gemm(product.weight, activations + product.activation_set * set_bytes, tokens.count, tokens.precision,
                   first, last, scratch, advanced(product.output, first_token));
    });
  });
}

void prefill_in_chunks(const LinearKernels& kernels, Products products, const Tokens& tokens, bool is_small) {
  int64_t at_once = tokens.count;
  for (const Product& product : products) {
    at_once = std::min(at_once, kernels.prefill_token_limit(product.weight, tokens.precision));
  }
  for (int64_t first = 0; first < tokens.count; first += at_once) {
    const int64_t count = std::min(tokens.count - first, at_once);
    prefill(kernels, products, advanced(tokens, first, count), is_small, first);
  }
}

// All products by the route that each would take alone.
void multiply(std::span<Product> products, const Tokens& tokens) {
  const LinearKernels& kernels = checked_kernels().linear;
  int64_t signs = 0;
  for (const Product& product : products) {
    signs += product.weight.row_tiles * kRowsPerTile * product.weight.in_features * product.weight.planes;
  }
  const bool is_small = signs * tokens.count <= kSerialSigns;
  const auto decodes = [&](const Product& product) {
    return tokens.count <= kernels.decode_token_limit(product.weight, tokens.precision);
  };
  const auto boundary = std::partition(products.begin(), products.end(), decodes);
  const std::span<Product> decoded(products.begin(), boundary), prefilled(boundary, products.end());
  if (!decoded.empty()) {
    assign_activation_sets(decoded);
    decode(kernels, decoded, tokens, is_small);
  }
  if (prefilled.empty()) return;
  const int64_t units = (tokens.count + kernels.prefill_unit_tokens - 1) / kernels.prefill_unit_tokens;
  // Few tokens leave threads without any to prepare, unless all sets are prepared at once. Many are better multiplied
  // set by set, while they are in cache.
  if (assign_activation_sets(prefilled) == 1 || units < at::get_num_threads()) {
    return prefill_in_chunks(kernels, prefilled, tokens, is_small);
  }
  const auto by_set = [](const Product& a, const Product& b) { return a.activation_set < b.activation_set; };
  std::sort(prefilled.begin(), prefilled.end(), by_set);
  for (auto begin = prefilled.begin(); begin != prefilled.end();) {
    const auto end = std::upper_bound(begin, prefilled.end(), *begin, by_set);
    const std::span<Product> same_set(begin, end);
    for (Product& product : same_set) product.activation_set = 0;
    prefill_in_chunks(kernels, same_set, tokens, is_small);
    begin = end;
  }
}

Tokens checked_tokens(const at::Tensor& input, c10::string_view activation_precision) {
  Tokens tokens{};
  tokens.precision = activation_precision_named(activation_precision);
  tokens.input.type = element_type(input, "input");
  TORCH_CHECK(input.device().is_cpu(), "packed_linear: input: expected a CPU tensor, got one on ", input.device());
  TORCH_CHECK(input.dim() >= 1, "packed_linear: input: expected at least 1 dimension [..., in_features], got a scalar");
  const int64_t in_features = input.size(-1);
  tokens.count = in_features == 0 ? 0 : input.numel() / in_features;
  // Rows may lie at any distance from each other, elements of a row must be adjacent.
  const bool is_matrix = input.dim() <= 2 && (input.stride(-1) == 1 || in_features == 1);
  tokens.rows = is_matrix || input.is_contiguous() ? input : input.contiguous();
  tokens.input.data = tokens.rows.const_data_ptr();
  tokens.input.row_stride = is_matrix && input.dim() == 2 ? tokens.rows.stride(0) : in_features;
  return tokens;
}

// Allocates `result`; `product` points into it.
void set_output(const at::Tensor& input, const Tokens& tokens, const std::optional<at::Tensor>& bias, Product* product,
                at::Tensor* result) {
  const int64_t out_features = product->weight.out_features;
  LinearOutput& output = product->output;
  output.type = tokens.input.type;
  output.row_stride = out_features;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "packed_linear: bias: expected shape [",
                out_features, "], got ", bias->sizes());
    TORCH_CHECK(bias->device().is_cpu(), "packed_linear: bias: expected a CPU tensor, got one on ", bias->device());
    product->bias = bias->contiguous();
    output.bias = product->bias.const_data_ptr();
    output.bias_type = element_type(*bias, "bias");
  }
  at::DimVector shape(input.sizes());
  shape.back() = out_features;
  *result = at::empty(shape, input.options());
  output.data = result->mutable_data_ptr();
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& signs, const at::Tensor& scales,
                         const at::Tensor& outlier_columns, const at::Tensor& outlier_deltas,
                         const at::Tensor& outlier_scales, const std::optional<at::Tensor>& column_scales,
                         const std::optional<at::Tensor>& means, const std::optional<at::Tensor>& bias,
                         int64_t out_features, c10::string_view activation_precision) {
  const Tokens tokens = checked_tokens(input, activation_precision);
  Product product{};
  product.weight = packed_weight_view(signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales,
                                      means, out_features, input.size(-1));
  at::Tensor result;
  set_output(input, tokens, bias, &product, &result);
  if (tokens.count > 0) multiply({&product, 1}, tokens);
  return result;
}

// One list of tensors, without holes, is what PyTorch passes fastest, and gradients with it.
constexpr size_t kTensorsPerWeight = 8;

std::optional<at::Tensor> unless_empty(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<at::Tensor>(tensor);
}

std::vector<at::Tensor> packed_linear_group(const at::Tensor& input, at::TensorList weights,
                                            at::IntArrayRef out_features, c10::string_view activation_precision) {
  const size_t count = out_features.size();
  TORCH_CHECK_VALUE(count >= 1, "packed_linear_group: out_features: expected at least one weight, got an empty list");
  TORCH_CHECK_VALUE(weights.size() == count * kTensorsPerWeight, "packed_linear_group: weights: expected ", count,
                    " x ", kTensorsPerWeight, " tensors for as many out_features, got ", weights.size());
  const Tokens tokens = checked_tokens(input, activation_precision);
  std::vector<at::Tensor> results(count);
  c10::SmallVector<Product, 4> products(count);
  for (size_t i = 0; i < count; ++i) {
    const at::TensorList weight = weights.slice(i * kTensorsPerWeight, kTensorsPerWeight);
    try {
      products[i].weight =
          packed_weight_view(weight[0], weight[1], weight[2], weight[3], weight[4], unless_empty(weight[5]),
                             unless_empty(weight[6]), out_features[i], input.size(-1));
      set_output(input, tokens, unless_empty(weight[7]), &products[i], &results[i]);
    } catch (c10::Error& error) {
      error.add_context(c10::str("packed_linear_group: weight ", i, " of ", count));
      throw;
    }
  }
  if (tokens.count > 0) multiply({products.data(), count}, tokens);
  return results;
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) {
  m.impl("packed_linear", &loop_singular_bit::packed_linear);
  m.impl("packed_linear_group", &loop_singular_bit::packed_linear_group);
}
