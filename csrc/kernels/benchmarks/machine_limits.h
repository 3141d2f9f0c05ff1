// What the machine can do at most: the yardsticks of the other benchmarks.
#pragma once

#include <cstdint>

namespace loop_singular_bit {

// Reads every byte once, with software prefetch; the sum keeps the compiler from dropping the reads.
int64_t read_memory(const void* data, int64_t bytes);

// Multiply-accumulates of one call of spin_int8_products: the widest int8 dot product, from registers to registers.
int64_t spin_int8_products(int64_t rounds);

// Clock of this core in Hz now, from a chain of dependent additions at one per cycle.
double measured_clock();

}  // namespace loop_singular_bit
