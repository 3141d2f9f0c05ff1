// Dtypes of dense tensors that kernels read and write.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "linear_kernels.h"

namespace loop_singular_bit {

// `name` is what the error calls the tensor or argument.
inline ElementType element_type(at::ScalarType dtype, const char* name) {
  switch (dtype) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      TORCH_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ", dtype);
  }
}

inline int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace loop_singular_bit
