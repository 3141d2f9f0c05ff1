// Stands in for dispatch.cpp where the table of AVX-VNNI is compiled for AVX-512 VNNI: few machines have both, and the
// 256-bit products of bytes are the same. Without either, only the scalar table is left to test.
#include "dispatch.h"

namespace loop_singular_bit {

const std::vector<const KernelTable*>& supported_kernels() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> supported;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")) {
      supported.push_back(&kAvxVnniKernels);
    }
    supported.push_back(&kScalarKernels);
    return supported;
  }();
  return tables;
}

const KernelTable* active_kernels() { return supported_kernels().front(); }

}  // namespace loop_singular_bit
