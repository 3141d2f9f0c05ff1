// packed_embedding: rows of a packed table [num_embeddings, embedding_dim], dequantized one by one.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "element_type.h"
#include "packed_weight_args.h"

namespace loop_singular_bit {
namespace {

// Weights per task of parallel_for.
constexpr int64_t kGrainWeights = 16384;

at::Tensor packed_embedding(const at::Tensor& indices, const at::Tensor& signs, const at::Tensor& scales,
                            const at::Tensor& outlier_columns, const at::Tensor& outlier_deltas,
                            const at::Tensor& outlier_scales, const std::optional<at::Tensor>& column_scales,
                            const std::optional<at::Tensor>& means, int64_t num_embeddings, int64_t embedding_dim,
                            at::ScalarType dtype) {
  const PackedWeightView weight = packed_weight_view(signs, scales, outlier_columns, outlier_deltas, outlier_scales,
                                                     column_scales, means, num_embeddings, embedding_dim);
  TORCH_CHECK(indices.device().is_cpu(), "indices: expected a CPU tensor, got one on ", indices.device());
  TORCH_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
              "indices: expected dtype int64 or int32, got ", indices.scalar_type());
  const ElementType type = element_type(dtype, "dtype");
  const at::Tensor rows = indices.to(at::kLong).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < num_embeddings,
                      "indices: expected values from 0 to num_embeddings - 1 = ", num_embeddings - 1, ", got ", row[i]);
  }

  const CodecKernels& kernels = checked_kernels().codec;
  std::vector<int64_t> shape = indices.sizes().vec();
  shape.push_back(embedding_dim);
  at::Tensor result = at::empty(shape, signs.options().dtype(dtype));
  char* output = static_cast<char*>(result.mutable_data_ptr());
  at::parallel_for(0, count, kGrainWeights / embedding_dim + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(weight.words * kColumnsPerWord);
    for (int64_t i = begin; i < end; ++i) {
      kernels.dequantize_row(weight, row[i], scratch.data(), output + i * embedding_dim * element_bytes(type), type);
    }
  });
  return result;
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) { m.impl("packed_embedding", &loop_singular_bit::packed_embedding); }
