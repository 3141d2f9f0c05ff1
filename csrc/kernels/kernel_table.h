// Every instruction set provides one complete table. Kernels take pointers and extents; they do not allocate, print,
// throw, lock or start threads. The caller splits row tiles among its threads and owns all scratch memory.
#pragma once

#include "codec_kernels.h"
#include "linear_kernels.h"

namespace loop_singular_bit {

struct KernelTable {
  const char* name;
  CodecKernels codec;    // dense rows <-> packed weight
  LinearKernels linear;  // packed weight x activations
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512VnniKernels;

}  // namespace loop_singular_bit
