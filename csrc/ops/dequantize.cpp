// dequantize: packed tensors -> the dense weight [out_features, in_features].
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

at::Tensor dequantize(const at::Tensor& signs, const at::Tensor& scales, const at::Tensor& outlier_columns,
                      const at::Tensor& outlier_deltas, const at::Tensor& outlier_scales,
                      const std::optional<at::Tensor>& column_scales, const std::optional<at::Tensor>& means,
                      int64_t out_features, int64_t in_features, at::ScalarType dtype) {
  const PackedWeightView weight = packed_weight_view(signs, scales, outlier_columns, outlier_deltas, outlier_scales,
                                                     column_scales, means, out_features, in_features);
  const ElementType type = element_type(dtype, "dtype");
  const CodecKernels& kernels = checked_kernels().codec;
  at::Tensor result = at::empty({out_features, in_features}, signs.options().dtype(dtype));
  char* output = static_cast<char*>(result.mutable_data_ptr());
  at::parallel_for(0, out_features, kRowsPerTile, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(weight.words * kColumnsPerWord);
    for (int64_t row = begin; row < end; ++row) {
      kernels.dequantize_row(weight, row, scratch.data(), output + row * in_features * element_bytes(type), type);
    }
  });
  return result;
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) { m.impl("dequantize", &loop_singular_bit::dequantize); }
