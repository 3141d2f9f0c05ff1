#include "simd/neon.h"

#include "generic/byte_linear.h"
#include "generic/calibrated_quantize.h"
#include "generic/column_scales.h"
#include "generic/decoder.h"
#include "generic/dequantize.h"
#include "generic/factorization.h"
#include "generic/quantize.h"
#include "kernel_table.h"

namespace loop_singular_bit {

const KernelTable kNeonKernels = {
    "neon",
    {quantize, dequantize_row, largest_magnitude, accumulate_column_scales},
    byte_linear::kKernels,
    {multiply_add, dot, factor_diagonal, factor_panel, sweep, compute_gradient, loss, refit_scales, descend, write_rows,
     sum_column_gradients, write_signs},
    decoder::kKernels,
};

}  // namespace loop_singular_bit
