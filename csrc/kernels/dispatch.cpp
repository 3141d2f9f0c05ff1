#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace loop_singular_bit {
namespace {

// Every instruction set that this build contains, best first.
const std::vector<const KernelTable*>& built_kernels() {
  static const std::vector<const KernelTable*> tables = {
#if defined(__x86_64__)
      &kAvx512VnniKernels,
      &kAvxVnniKernels,
      &kAvx2Kernels,
#elif defined(__aarch64__) && defined(__linux__)
      &kNeonKernels,
#endif
      &kScalarKernels,
  };
  return tables;
}

#if defined(__x86_64__)
// __builtin_cpu_supports knows neither "f16c" nor "avxvnni" in clang 14.
bool has_f16c() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}

bool has_avx_vnni() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

bool machine_supports(const KernelTable* table) {
#if defined(__x86_64__)
  if (table == &kAvx512VnniKernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  }
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (table == &kAvxVnniKernels) return has_avx2 && has_avx_vnni();
  if (table == &kAvx2Kernels) return has_avx2;
#elif defined(__aarch64__) && defined(__linux__)
  if (table == &kNeonKernels) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return table == &kScalarKernels;
}

const KernelTable* find_supported(const std::string& name) {
  for (const KernelTable* table : supported_kernels()) {
    if (name == table->name) return table;
  }
  return nullptr;
}

std::atomic<const KernelTable*>& active_slot() {
  static std::atomic<const KernelTable*> slot{[] {
    const std::string forced = forced_isa_name();
    return forced.empty() ? supported_kernels().front() : find_supported(forced);
  }()};
  return slot;
}

}  // namespace

const std::vector<const KernelTable*>& supported_kernels() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> supported;
    for (const KernelTable* table : built_kernels()) {
      if (machine_supports(table)) supported.push_back(table);
    }
    return supported;
  }();
  return tables;
}

const KernelTable* active_kernels() { return active_slot().load(std::memory_order_relaxed); }

bool set_active_kernels(const std::string& name) {
  const KernelTable* table = find_supported(name);
  if (table == nullptr) return false;
  active_slot().store(table, std::memory_order_relaxed);
  return true;
}

std::string kernel_selection_error(const std::string& name) {
  bool known = false;
  for (const KernelTable* table : built_kernels()) known = known || name == table->name;
  std::string message = "instruction set '" + name + "' is " + (known ? "not supported by this machine" : "unknown") +
                        "; this machine supports: ";
  for (size_t i = 0; i < supported_kernels().size(); ++i) {
    if (i > 0) message += ", ";
    message += supported_kernels()[i]->name;
  }
  return message;
}

std::string forced_isa_name() {
  const char* value = std::getenv("LOOP_SINGULAR_BIT_ISA");
  return value == nullptr ? "" : value;
}

}  // namespace loop_singular_bit
