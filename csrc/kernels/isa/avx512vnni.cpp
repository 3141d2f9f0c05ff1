#include "simd/avx512.h"

#include "generic/calibrated_quantize.h"
#include "generic/column_scales.h"
#include "generic/decoder.h"
#include "generic/dequantize.h"
#include "generic/factorization.h"
#include "generic/quantize.h"
#include "isa/avx512vnni_linear.h"
#include "kernel_table.h"

namespace loop_singular_bit {

const KernelTable kAvx512VnniKernels = {
    "avx512vnni",
    {quantize, dequantize_row, largest_magnitude, accumulate_column_scales},
    avx512vnni::kKernels,
    {multiply_add, dot, factor_diagonal, factor_panel, sweep, compute_gradient, loss, refit_scales, descend, write_rows,
     sum_column_gradients, write_signs},
    decoder::kKernels,
};

}  // namespace loop_singular_bit
