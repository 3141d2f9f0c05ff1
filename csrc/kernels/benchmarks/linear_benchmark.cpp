// Packed linear on every supported instruction set, kernels alone: threads share nothing but the weight, each has its
// own slab of row tiles. kernel_benchmarks --benchmark_filter='gemv.*avx512vnni'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "machine_limits.h"

namespace loop_singular_bit {
namespace {

constexpr int64_t kCycledBytes = int64_t{256} << 20;  // more than any cache of the machines this is run on

struct Shape {
  int64_t out_features, in_features, planes, outliers;
};

template <typename Element>
void fill(std::vector<Element>* elements, uint64_t* state, uint64_t mask, uint64_t base) {
  for (Element& element : *elements) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    element = static_cast<Element>(base + (*state & mask));
  }
}

// Several copies of one random weight, so that a kernel that walks through them reads memory and not a cache.
class Weights {
 public:
  Weights(const Shape& shape, int64_t copies) : shape_(shape), copies_(copies) {
    tiles_ = (shape.out_features + kRowsPerTile - 1) / kRowsPerTile;
    words_ = (shape.in_features + kColumnsPerWord - 1) / kColumnsPerWord;
    const int64_t rows = copies * tiles_ * kRowsPerTile;
    signs_.resize(rows * shape.planes * words_);
    scales_.resize(rows * shape.planes);
    outlier_columns_.resize(rows * shape.outliers);
    outlier_deltas_.resize(rows * shape.outliers);
    outlier_scales_.resize(rows);
    column_scales_.resize(shape.in_features, 0x3c00);
    uint64_t state = 88172645463325252ull;
    fill(&signs_, &state, ~uint64_t{0}, 0);
    fill(&outlier_deltas_, &state, 0xff, 0);
    fill(&outlier_scales_, &state, 0xff, 0x1000);
    // Halving scales are on the grid for every number of planes but 4; so is any one plane.
    static const int64_t kLevels[4][4] = {{126}, {84, 42}, {72, 36, 18}, {66, 33, 18, 9}};
    const int64_t per_tile = shape.planes * kRowsPerTile;
    for (size_t i = 0; i < scales_.size(); ++i) {
      const int64_t plane = static_cast<int64_t>(i) % per_tile / kRowsPerTile;
      scales_[i] = float16_of_small_integer(kLevels[shape.planes - 1][plane]);
    }
    for (int64_t group = 0; group < copies * tiles_; ++group) {
      for (int64_t i = 0; i < shape.outliers; ++i) {
        for (int64_t row = 0; row < kRowsPerTile; ++row) {
          state ^= state << 13;
          state ^= state >> 7;
          state ^= state << 17;
          const int64_t begin = i * shape.in_features / shape.outliers;
          const int64_t end = (i + 1) * shape.in_features / shape.outliers;
          outlier_columns_[(group * shape.outliers + i) * kRowsPerTile + row] =
              static_cast<uint16_t>(begin + static_cast<int64_t>(state % static_cast<uint64_t>(end - begin)));
        }
      }
    }
  }

  PackedWeightView view(int64_t copy) const {
    const int64_t rows = copy * tiles_ * kRowsPerTile;
    PackedWeightView view{};
    view.signs = signs_.data() + rows * shape_.planes * words_;
    view.scales = scales_.data() + rows * shape_.planes;
    view.outlier_columns = outlier_columns_.data() + rows * shape_.outliers;
    view.outlier_deltas = outlier_deltas_.data() + rows * shape_.outliers;
    view.outlier_scales = outlier_scales_.data() + rows;
    view.column_scales = column_scales_.data();
    view.out_features = shape_.out_features;
    view.in_features = shape_.in_features;
    view.row_tiles = tiles_;
    view.words = words_;
    view.planes = shape_.planes;
    view.outliers = shape_.outliers;
    return view;
  }

  static int64_t bytes(const Shape& shape) {
    const int64_t rows = (shape.out_features + kRowsPerTile - 1) / kRowsPerTile * kRowsPerTile;
    const int64_t words = (shape.in_features + kColumnsPerWord - 1) / kColumnsPerWord;
    return rows * (shape.planes * (words * 4 + 2) + shape.outliers * 3 + 2) + shape.in_features * 2;
  }

  int64_t copies() const { return copies_; }

 private:
  static uint16_t float16_of_small_integer(int64_t value) {
    int64_t exponent = 0;
    while ((value >> (exponent + 1)) != 0) ++exponent;
    // 2^-16 keeps outputs of wide weights within float16.
    return static_cast<uint16_t>(((exponent + 15 - 16 + 8) << 10) | ((value << (10 - exponent)) & 1023));
  }

  Shape shape_;
  int64_t copies_, tiles_, words_;
  std::vector<int32_t> signs_;
  std::vector<uint16_t> scales_, outlier_columns_, outlier_scales_, column_scales_;
  std::vector<int8_t> outlier_deltas_;
};

struct Memory {
  explicit Memory(int64_t bytes) : data(std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096), &std::free) {
    std::memset(data.get(), 0, bytes);
  }
  std::unique_ptr<void, decltype(&std::free)> data;
};

std::vector<float> random_input(int64_t count) {
  std::vector<float> input(count);
  uint64_t state = 1234567;
  for (float& value : input) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    value = static_cast<float>(static_cast<int64_t>(state % 2001) - 1000) / 1000.0f;
  }
  return input;
}

void report(benchmark::State& state, double macs_per_iteration, double bytes_per_iteration) {
  state.counters["MAC/s"] = benchmark::Counter(macs_per_iteration, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bytes/s"] = benchmark::Counter(bytes_per_iteration, benchmark::Counter::kIsIterationInvariantRate);
}

// One token, weights from memory, as the operator does it: every thread prepares the token and has a slab of the rows.
void gemv_dram(benchmark::State& state, const KernelTable* table, Shape shape, ActivationPrecision precision) {
  const Weights weights(shape, kCycledBytes / Weights::bytes(shape) + 1);
  const int64_t threads = state.range(0);
  const LinearKernels& linear = table->linear;
  const std::vector<float> input = random_input(shape.in_features);
  std::vector<float> output(shape.out_features);
  std::vector<std::unique_ptr<Memory>> memory;
  for (int64_t thread = 0; thread < threads; ++thread) {
    memory.push_back(std::make_unique<Memory>(linear.decode_activation_bytes(shape.in_features, precision)));
  }
  int64_t copy = 0;
  for (auto _ : state) {
    const PackedWeightView view = weights.view(copy++ % weights.copies());
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread) {
      auto* activations = static_cast<DecodeActivations*>(memory[thread]->data.get());
      const DecodeActivations* prepared[] = {activations};
      linear.prepare_decode(view, {input.data(), shape.in_features, ElementType::kFloat32}, 0, precision, activations);
      linear.gemv(view, prepared, 1, view.row_tiles * thread / threads, view.row_tiles * (thread + 1) / threads,
                  {output.data(), shape.out_features, ElementType::kFloat32, ElementType::kFloat32, nullptr});
    }
    benchmark::ClobberMemory();
  }
  report(state, static_cast<double>(shape.out_features * shape.in_features),
         static_cast<double>(Weights::bytes(shape)));
}

// Multiplies one row tile, which stays in cache, with a prepared token.
class CachedGemv {
 public:
  CachedGemv(const KernelTable* table, const Shape& shape, ActivationPrecision precision)
      : linear_(table->linear),
        shape_(shape),
        weights_(shape, 1),
        view_(weights_.view(0)),
        memory_(linear_.decode_activation_bytes(shape.in_features, precision)),
        output_(shape.out_features) {
    const std::vector<float> input = random_input(shape.in_features);
    linear_.prepare_decode(view_, {input.data(), shape.in_features, ElementType::kFloat32}, 0, precision, token());
  }

  void operator()() {
    const DecodeActivations* const prepared[] = {token()};
    linear_.gemv(view_, prepared, 1, 0, view_.row_tiles,
                 {output_.data(), shape_.out_features, ElementType::kFloat32, ElementType::kFloat32, nullptr});
    benchmark::ClobberMemory();
  }

  // The fastest of a few short runs.
  double seconds_per_row() {
    using Clock = std::chrono::steady_clock;
    constexpr int kRuns = 20, kCalls = 200;
    double best = std::numeric_limits<double>::infinity();
    for (int run = 0; run < kRuns; ++run) {
      const auto begin = Clock::now();
      for (int call = 0; call < kCalls; ++call) (*this)();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return best / kCalls / static_cast<double>(shape_.out_features);
  }

 private:
  DecodeActivations* token() { return static_cast<DecodeActivations*>(memory_.data.get()); }

  const LinearKernels& linear_;
  Shape shape_;
  Weights weights_;
  PackedWeightView view_;
  Memory memory_;
  std::vector<float> output_;
};

// One row tile over and over: what the kernel costs when memory costs nothing, for a plane of a row and for an outlier.
void gemv_cached(benchmark::State& state, const KernelTable* table, Shape shape, ActivationPrecision precision) {
  CachedGemv gemv(table, shape, precision);
  for (auto _ : state) gemv();
  report(state, static_cast<double>(shape.out_features * shape.in_features), 0);
  Shape planes_only = shape;
  planes_only.outliers = 0;
  const double clock = loop_singular_bit_measured_clock();
  const double cycles = gemv.seconds_per_row() * clock;
  const double cycles_of_planes = CachedGemv(table, planes_only, precision).seconds_per_row() * clock;
  state.counters["GHz"] = clock / 1e9;
  state.counters["cycles/row"] = cycles;
  state.counters["cycles/row/plane"] = cycles_of_planes / static_cast<double>(shape.planes);
  if (shape.outliers > 0) {
    state.counters["cycles/outlier"] = (cycles - cycles_of_planes) / static_cast<double>(shape.outliers);
  }
}

void prepare_decode(benchmark::State& state, const KernelTable* table, int64_t in_features) {
  const Shape shape = {32, in_features, 1, 1};
  const Weights weights(shape, 1);
  const std::vector<float> input = random_input(in_features);
  const Memory memory(table->linear.decode_activation_bytes(in_features, ActivationPrecision::kInt8));
  for (auto _ : state) {
    table->linear.prepare_decode(weights.view(0), {input.data(), in_features, ElementType::kFloat32}, 0,
                                 ActivationPrecision::kInt8, static_cast<DecodeActivations*>(memory.data.get()));
    benchmark::ClobberMemory();
  }
}

// Many tokens, weights in cache.
void gemm(benchmark::State& state, const KernelTable* table, Shape shape, int64_t tokens,
          ActivationPrecision precision) {
  const Weights weights(shape, 1);
  const LinearKernels& linear = table->linear;
  const PackedWeightView view = weights.view(0);
  const std::vector<float> input = random_input(tokens * shape.in_features);
  std::vector<float> output(tokens * shape.out_features);
  const Memory activations(linear.prefill_activation_bytes(view, tokens, precision));
  const Memory scratch(linear.prefill_scratch_bytes(view, tokens, precision));
  const int64_t units = (tokens + linear.prefill_unit_tokens - 1) / linear.prefill_unit_tokens;
  for (auto _ : state) {
    linear.prepare_prefill(view, {input.data(), shape.in_features, ElementType::kFloat32}, tokens, 0, units, precision,
                           activations.data.get());
    linear.gemm(view, activations.data.get(), tokens, precision, 0, view.row_tiles, scratch.data.get(),
                {output.data(), shape.out_features, ElementType::kFloat32, ElementType::kFloat32, nullptr});
    benchmark::ClobberMemory();
  }
  report(state, static_cast<double>(tokens * shape.out_features * shape.in_features), 0);
}

void register_benchmarks() {
  const int64_t shapes[][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}};
  for (const KernelTable* table : supported_kernels()) {
    const std::string isa = table->name;
    for (int64_t planes = 1; planes <= 4; ++planes) {
      const std::string suffix = "/b" + std::to_string(planes) + "/" + isa;
      for (int64_t outliers : {0, 41}) {
        const Shape shape = {32, 4096, planes, outliers};
        benchmark::RegisterBenchmark(
            ("gemv_cached/K4096/outliers" + std::to_string(outliers) + suffix).c_str(),
            [=](benchmark::State& state) { gemv_cached(state, table, shape, ActivationPrecision::kInt8); });
      }
      for (const int64_t* size : shapes) {
        const std::string name = std::to_string(size[0]) + "x" + std::to_string(size[1]);
        const Shape shape = {size[0], size[1], planes, (size[1] + 99) / 100};
        benchmark::RegisterBenchmark(
            ("gemv_dram/" + name + suffix).c_str(),
            [=](benchmark::State& state) { gemv_dram(state, table, shape, ActivationPrecision::kInt8); })
            ->ArgName("threads")
            ->DenseRange(1, 2)
            ->UseRealTime();
      }
      for (int64_t tokens : {2, 4, 8, 32, 128, 512}) {
        const Shape shape = {1024, 4096, planes, 41};
        benchmark::RegisterBenchmark(
            ("gemm/1024x4096/tokens" + std::to_string(tokens) + suffix).c_str(),
            [=](benchmark::State& state) { gemm(state, table, shape, tokens, ActivationPrecision::kInt8); });
      }
    }
    const std::pair<const char*, ActivationPrecision> slower[] = {{"int16", ActivationPrecision::kInt16},
                                                                  {"exact", ActivationPrecision::kExact}};
    for (const auto& [name, precision] : slower) {
      const ActivationPrecision p = precision;
      benchmark::RegisterBenchmark(("gemv_cached/K4096/outliers41/" + std::string(name) + "/b2/" + isa).c_str(),
                                   [=](benchmark::State& state) { gemv_cached(state, table, {32, 4096, 2, 41}, p); });
      benchmark::RegisterBenchmark(("gemm/1024x4096/tokens128/" + std::string(name) + "/b2/" + isa).c_str(),
                                   [=](benchmark::State& state) { gemm(state, table, {1024, 4096, 2, 41}, 128, p); });
    }
    for (int64_t in_features : {256, 4096, 14336}) {
      benchmark::RegisterBenchmark(("prepare_decode/K" + std::to_string(in_features) + "/" + isa).c_str(),
                                   [=](benchmark::State& state) { prepare_decode(state, table, in_features); });
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit

int main(int argc, char** argv) {
  loop_singular_bit::register_benchmarks();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
