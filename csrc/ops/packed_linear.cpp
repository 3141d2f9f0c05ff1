// packed_linear: input [..., in_features] x packed weight [out_features, in_features] -> [..., out_features].
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

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

LinearInput advanced(LinearInput input, int64_t tokens) {
  const int64_t element = input.type == ElementType::kFloat32 ? 4 : 2;
  input.data = static_cast<const char*>(input.data) + tokens * input.row_stride * element;
  return input;
}

LinearOutput advanced(LinearOutput output, int64_t tokens) {
  const int64_t element = output.type == ElementType::kFloat32 ? 4 : 2;
  output.data = static_cast<char*>(output.data) + tokens * output.row_stride * element;
  return output;
}

// Every thread prepares the tokens for itself: that takes a microsecond, and fetching what another core has just
// written, line by line in the order of the outliers, takes many.
void decode(const LinearKernels& kernels, const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
            ActivationPrecision precision, bool is_small, const LinearOutput& output) {
  const int64_t bytes = kernels.decode_activation_bytes(weight.in_features, precision);
  for_each(weight.row_tiles, is_small, [&](int64_t begin, int64_t end) {
    const DecodeActivations* prepared[kMaxDecodeTokens];
    for (int64_t token = 0; token < tokens; ++token) {
      auto* activations = static_cast<DecodeActivations*>(decode_buffers[token].at_least(bytes));
      kernels.prepare_decode(weight, input, token, precision, activations);
      prepared[token] = activations;
    }
    kernels.gemv(weight, prepared, tokens, begin, end, output);
  });
}

void prefill(const LinearKernels& kernels, const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
             ActivationPrecision precision, bool is_small, const LinearOutput& output) {
  const int64_t activation_bytes = kernels.prefill_activation_bytes(weight, tokens, precision);
  const int64_t scratch_bytes = kernels.prefill_scratch_bytes(weight, tokens, precision);
  void* activations = prefill_activations.at_least(activation_bytes);
  const int64_t units = (tokens + kernels.prefill_unit_tokens - 1) / kernels.prefill_unit_tokens;
  for_each(units, is_small, [&](int64_t begin, int64_t end) {
    kernels.prepare_prefill(weight, input, tokens, begin, end, precision, activations);
  });
  for_each(weight.row_tiles, is_small, [&](int64_t begin, int64_t end) {
    kernels.gemm(weight, activations, tokens, precision, begin, end, prefill_scratch.at_least(scratch_bytes), output);
  });
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& signs, const at::Tensor& scales,
                         const at::Tensor& outlier_columns, const at::Tensor& outlier_deltas,
                         const at::Tensor& outlier_scales, const std::optional<at::Tensor>& column_scales,
                         const std::optional<at::Tensor>& means, const std::optional<at::Tensor>& bias,
                         int64_t out_features, c10::string_view activation_precision) {
  const ActivationPrecision precision = activation_precision_named(activation_precision);
  const ElementType type = element_type(input, "input");
  TORCH_CHECK(input.device().is_cpu(), "packed_linear: input: expected a CPU tensor, got one on ", input.device());
  TORCH_CHECK(input.dim() >= 1, "packed_linear: input: expected at least 1 dimension [..., in_features], got a scalar");
  const int64_t in_features = input.size(-1);
  const PackedWeightView weight = packed_weight_view(signs, scales, outlier_columns, outlier_deltas, outlier_scales,
                                                     column_scales, means, out_features, in_features);
  LinearOutput output{};
  output.type = type;
  output.row_stride = out_features;
  at::Tensor contiguous_bias;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "packed_linear: bias: expected shape [",
                out_features, "], got ", bias->sizes());
    TORCH_CHECK(bias->device().is_cpu(), "packed_linear: bias: expected a CPU tensor, got one on ", bias->device());
    contiguous_bias = bias->contiguous();
    output.bias = contiguous_bias.const_data_ptr();
    output.bias_type = element_type(*bias, "bias");
  }

  at::DimVector shape(input.sizes());
  shape.back() = out_features;
  at::Tensor result = at::empty(shape, input.options());
  const int64_t tokens = input.numel() / in_features;
  if (tokens == 0) return result;

  // Rows may lie at any distance from each other, elements of a row must be adjacent.
  const bool is_matrix = input.dim() <= 2 && (input.stride(-1) == 1 || in_features == 1);
  const at::Tensor rows = is_matrix || input.is_contiguous() ? input : input.contiguous();
  LinearInput source{};
  source.data = rows.const_data_ptr();
  source.row_stride = is_matrix && input.dim() == 2 ? rows.stride(0) : in_features;
  source.type = type;
  output.data = result.mutable_data_ptr();

  const LinearKernels& kernels = checked_kernels().linear;
  const bool is_small = weight.row_tiles * kRowsPerTile * in_features * weight.planes * tokens <= kSerialSigns;
  if (tokens <= kernels.decode_token_limit(weight, precision)) {
    decode(kernels, weight, source, tokens, precision, is_small, output);
    return result;
  }
  const int64_t at_once = kernels.prefill_token_limit(weight, precision);
  for (int64_t first = 0; first < tokens; first += at_once) {
    const int64_t count = tokens - first < at_once ? tokens - first : at_once;
    prefill(kernels, weight, advanced(source, first), count, precision, is_small, advanced(output, first));
  }
  return result;
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) { m.impl("packed_linear", &loop_singular_bit::packed_linear); }
