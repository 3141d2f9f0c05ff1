// Which instruction set runs: detected once, forced by name through LOOP_SINGULAR_BIT_ISA or set_active_kernels().
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace loop_singular_bit {

// Tables that this machine can run, best first; never empty.
const std::vector<const KernelTable*>& supported_kernels();

// The table in use: the one named by the environment variable LOOP_SINGULAR_BIT_ISA, else the best supported one.
// nullptr when the variable names no supported table; kernel_selection_error() then says what was expected and what
// came.
const KernelTable* active_kernels();

// Makes the named table the active one for the whole process. False, and no change, when it is unknown or unsupported.
bool set_active_kernels(const std::string& name);

// "instruction set 'avx9' is unknown; this machine supports: avx512vnni, avx2, scalar"
std::string kernel_selection_error(const std::string& name);

// Value of LOOP_SINGULAR_BIT_ISA, or "" when unset.
std::string forced_isa_name();

}  // namespace loop_singular_bit
