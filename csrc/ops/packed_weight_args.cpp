#include "packed_weight_args.h"

#include <c10/util/Exception.h>

#include "dispatch.h"

namespace loop_singular_bit {
namespace {

void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.device().is_cpu(), name, ": expected a CPU tensor, got one on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

}  // namespace

PackedWeightView packed_weight_view(const at::Tensor& signs, const at::Tensor& scales,
                                    const at::Tensor& outlier_columns, const at::Tensor& outlier_deltas,
                                    const at::Tensor& outlier_scales, const std::optional<at::Tensor>& column_scales,
                                    const std::optional<at::Tensor>& means, int64_t out_features, int64_t in_features) {
  TORCH_CHECK(out_features >= 1, "out_features: expected at least 1, got ", out_features);
  TORCH_CHECK(in_features >= 1 && in_features <= kMaxInFeatures, "in_features: expected 1 to ", kMaxInFeatures,
              ", got ", in_features);
  TORCH_CHECK(signs.dim() == 4, "signs: expected 4 dimensions [row_tiles, planes, words, 32], got shape ",
              signs.sizes());
  TORCH_CHECK(outlier_columns.dim() == 3,
              "outlier_columns: expected 3 dimensions [row_tiles, outliers, 32], got shape ", outlier_columns.sizes());
  const int64_t row_tiles = (out_features - 1) / kRowsPerTile + 1;
  const int64_t words = (in_features - 1) / kColumnsPerWord + 1;
  const int64_t planes = signs.size(1);
  const int64_t outliers = outlier_columns.size(1);
  TORCH_CHECK(planes >= 1 && planes <= kMaxPlanes, "signs: expected 1 to ", kMaxPlanes, " planes, got ", planes);
  TORCH_CHECK(outliers <= in_features, "outlier_columns: expected at most in_features = ", in_features,
              " outliers a row, got ", outliers);
  check_tensor(signs, "signs", at::kInt, {row_tiles, planes, words, kRowsPerTile});
  check_tensor(scales, "scales", at::kHalf, {row_tiles, planes, kRowsPerTile});
  check_tensor(outlier_columns, "outlier_columns", at::kUInt16, {row_tiles, outliers, kRowsPerTile});
  check_tensor(outlier_deltas, "outlier_deltas", at::kChar, {row_tiles, outliers, kRowsPerTile});
  check_tensor(outlier_scales, "outlier_scales", at::kHalf, {row_tiles, kRowsPerTile});
  if (column_scales) check_tensor(*column_scales, "column_scales", at::kHalf, {in_features});
  if (means) check_tensor(*means, "means", at::kHalf, {row_tiles, kRowsPerTile});

  PackedWeightView view{};
  view.signs = signs.const_data_ptr<int32_t>();
  view.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  view.outlier_columns = static_cast<const uint16_t*>(outlier_columns.const_data_ptr());
  view.outlier_deltas = outlier_deltas.const_data_ptr<int8_t>();
  view.outlier_scales = static_cast<const uint16_t*>(outlier_scales.const_data_ptr());
  view.column_scales = column_scales ? static_cast<const uint16_t*>(column_scales->const_data_ptr()) : nullptr;
  view.means = means ? static_cast<const uint16_t*>(means->const_data_ptr()) : nullptr;
  view.out_features = out_features;
  view.in_features = in_features;
  view.row_tiles = row_tiles;
  view.words = words;
  view.planes = planes;
  view.outliers = outliers;
  return view;
}

const KernelTable& checked_kernels() {
  const KernelTable* table = active_kernels();
  TORCH_CHECK(table != nullptr, "LOOP_SINGULAR_BIT_ISA: ", kernel_selection_error(forced_isa_name()));
  return *table;
}

}  // namespace loop_singular_bit
