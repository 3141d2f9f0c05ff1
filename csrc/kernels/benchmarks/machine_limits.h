// What the machine can do at most: the yardsticks of the other benchmarks. A shared library of C functions, so that
// benchmarks/bench_packed_linear.py measures with the same code, between the operators it compares.
#pragma once

#include <cstdint>

extern "C" {

// Both share the work among `threads` OpenMP threads: those of torch when torch has loaded the same runtime, so that
// its idle workers do not compete with the measurement.

// Reads every byte once, with software prefetch. Returns a sum, so that no read can be dropped.
int64_t loop_singular_bit_read_memory(const void* data, int64_t bytes, int32_t threads);

// The widest int8 dot product, from registers to registers. Returns the multiply-accumulates done by all threads; 0
// where not known.
int64_t loop_singular_bit_spin_int8_products(int64_t rounds, int32_t threads);

// Clock of this core in Hz now, from a chain of dependent additions at one per cycle.
double loop_singular_bit_measured_clock();

}  // extern "C"
