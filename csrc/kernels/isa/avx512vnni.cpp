#include "simd/avx512.h"

#include "generic/column_scales.h"
#include "generic/dequantize.h"
#include "generic/quantize.h"
#include "isa/avx512vnni_linear.h"
#include "kernel_table.h"

namespace loop_singular_bit {

const KernelTable kAvx512VnniKernels = {
    "avx512vnni",
    {quantize, dequantize_row, largest_magnitude, accumulate_column_scales},
    avx512vnni::kKernels,
};

}  // namespace loop_singular_bit
