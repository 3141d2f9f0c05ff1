#include <benchmark/benchmark.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "machine_limits.h"

namespace loop_singular_bit {
namespace {

void read_dram(benchmark::State& state) {
  const int64_t bytes = int64_t{256} << 20;
  const std::unique_ptr<char, decltype(&std::free)> data(static_cast<char*>(std::aligned_alloc(4096, bytes)),
                                                         &std::free);
  std::memset(data.get(), 1, bytes);
  for (auto _ : state) benchmark::DoNotOptimize(loop_singular_bit_read_memory(data.get(), bytes, state.range(0)));
  state.SetBytesProcessed(state.iterations() * bytes);
}
BENCHMARK(read_dram)->Name("machine/read_dram")->ArgName("threads")->DenseRange(1, 2)->UseRealTime();

void int8_products(benchmark::State& state) {
  int64_t products = 0;
  for (auto _ : state) products += loop_singular_bit_spin_int8_products(100000, state.range(0));
  state.counters["MAC/s"] = benchmark::Counter(static_cast<double>(products), benchmark::Counter::kIsRate);
  state.counters["GHz"] = loop_singular_bit_measured_clock() / 1e9;
}
BENCHMARK(int8_products)->Name("machine/int8_products")->ArgName("threads")->DenseRange(1, 2)->UseRealTime();

}  // namespace
}  // namespace loop_singular_bit
