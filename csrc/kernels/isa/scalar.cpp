#include "simd/scalar.h"

#include "generic/column_scales.h"
#include "generic/dequantize.h"
#include "generic/quantize.h"
#include "isa/scalar_linear.h"
#include "kernel_table.h"

namespace loop_singular_bit {

const KernelTable kScalarKernels = {
    "scalar",
    {quantize, dequantize_row, largest_magnitude, accumulate_column_scales},
    scalar_linear::kKernels,
};

}  // namespace loop_singular_bit
