// Every instruction set provides one complete table. Kernels take pointers and extents; they do not allocate, print,
// throw, lock or start threads. The caller splits row tiles among its threads and owns all scratch memory.
#pragma once

#include "calibrated_kernels.h"
#include "codec_kernels.h"
#include "decoder_kernels.h"
#include "linear_kernels.h"

namespace loop_singular_bit {

struct KernelTable {
  const char* name;
  CodecKernels codec;            // dense rows <-> packed weight
  LinearKernels linear;          // packed weight x activations
  CalibratedKernels calibrated;  // dense weight and statistics of its inputs -> packed weight
  DecoderKernels decoder;        // attention, normalization and the like, for the native runtime
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kNeonKernels;

}  // namespace loop_singular_bit
