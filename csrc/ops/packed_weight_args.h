// The one place that checks packed tensors and turns them into a view for the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernel_table.h"
#include "packed_weight_view.h"

namespace loop_singular_bit {

// Shapes, dtypes, device and contiguity are checked, contents are not: kernels are memory-safe for any bytes.
// The view borrows from the tensors.
PackedWeightView packed_weight_view(const at::Tensor& signs, const at::Tensor& scales,
                                    const at::Tensor& outlier_columns, const at::Tensor& outlier_deltas,
                                    const at::Tensor& outlier_scales, const std::optional<at::Tensor>& column_scales,
                                    const std::optional<at::Tensor>& means, int64_t out_features, int64_t in_features);

// The active kernel table; raises when LOOP_SINGULAR_BIT_ISA names none that this machine supports.
const KernelTable& checked_kernels();

}  // namespace loop_singular_bit
