// Every operator's schema, in one place. Implementations end their own files with TORCH_LIBRARY_IMPL.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "dispatch.h"
#include "packed_weight_args.h"

namespace loop_singular_bit {
namespace {

std::string isa() { return checked_kernels().name; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_kernels()) names.emplace_back(table->name);
  return names;
}

void set_isa(const std::string& name) {
  TORCH_CHECK_VALUE(set_active_kernels(name), "set_isa: ", kernel_selection_error(name));
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY(loop_singular_bit, m) {
  // Dense -> packed.
  m.def("fit_column_scales(Tensor weight, Tensor? column_importance=None) -> Tensor");
  m.def(
      "quantize(Tensor weight, int planes, int outliers, Tensor? column_scales=None, "
      "Tensor? column_importance=None, bool means=False) -> (Tensor signs, Tensor scales, Tensor outlier_columns, "
      "Tensor outlier_deltas, Tensor outlier_scales, Tensor means)");
  m.def(
      "quantize_calibrated(Tensor weight, Tensor hessian, int planes, int outliers, Tensor? column_scales=None, "
      "int rounds=5, float damping=0.01) -> (Tensor signs, Tensor scales, Tensor outlier_columns, "
      "Tensor outlier_deltas, Tensor outlier_scales, Tensor column_scales, Tensor losses, Tensor damping)");

  // Packed -> dense.
  m.def(
      "dequantize(Tensor signs, Tensor scales, Tensor outlier_columns, Tensor outlier_deltas, Tensor outlier_scales, "
      "Tensor? column_scales, Tensor? means, int out_features, int in_features, *, ScalarType dtype) -> Tensor");
  m.def(
      "packed_embedding(Tensor indices, Tensor signs, Tensor scales, Tensor outlier_columns, Tensor outlier_deltas, "
      "Tensor outlier_scales, Tensor? column_scales, Tensor? means, int num_embeddings, int embedding_dim, *, "
      "ScalarType dtype) -> Tensor");

  // Packed x activations.
  m.def(
      "packed_linear(Tensor input, Tensor signs, Tensor scales, Tensor outlier_columns, Tensor outlier_deltas, "
      "Tensor outlier_scales, Tensor? column_scales, Tensor? means, Tensor? bias, int out_features, *, "
      "str activation_precision='int8') -> Tensor");
  // weights: for each weight signs, scales, outlier_columns, outlier_deltas, outlier_scales, column_scales, means and
  // bias, with an empty tensor for what it does not have.
  m.def(
      "packed_linear_group(Tensor input, Tensor[] weights, int[] out_features, *, str activation_precision='int8') "
      "-> Tensor[]");

  // Memory.
  m.def("copy_to_huge_pages(Tensor[] tensors) -> Tensor[]");

  // Instruction sets.
  m.def("isa() -> str", &loop_singular_bit::isa);
  m.def("supported_isas() -> str[]", &loop_singular_bit::supported_isas);
  m.def("set_isa(str name) -> ()", &loop_singular_bit::set_isa);
}
