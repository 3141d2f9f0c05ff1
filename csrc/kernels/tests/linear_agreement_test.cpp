// Every table against the scalar one, on weights of any bytes and shapes that nobody chose.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "reference.h"

namespace loop_singular_bit {
namespace {

constexpr int64_t kMostColumns = 700;
constexpr ActivationPrecision kPrecisions[] = {ActivationPrecision::kInt8, ActivationPrecision::kInt16,
                                               ActivationPrecision::kExact};

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

Memory allocate(int64_t bytes, int fill) {
  const int64_t size = (bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
  Memory memory(std::aligned_alloc(kActivationAlignment, std::max(size, kActivationAlignment)));
  std::memset(memory.get(), fill, bytes);
  return memory;
}

struct Problem {
  PackedWeightView weight;
  std::vector<float> input;  // [tokens, input_stride]
  int64_t input_stride;
  int64_t tokens;
  std::vector<float> bias;
  ActivationPrecision precision;
};

// Buffers for decode go from one table, weight and precision to the next, as the contract allows.
class DecodeBuffers {
 public:
  DecodeBuffers() {
    for (const KernelTable* table : supported_kernels()) {
      for (ActivationPrecision precision : kPrecisions) {
        bytes_ = std::max(bytes_, table->linear.decode_activation_bytes(kMostColumns, precision));
      }
    }
    for (Memory& memory : memory_) memory = allocate(bytes_, 0);
  }

  std::vector<float> decode(const LinearKernels& linear, const Problem& problem) {
    std::vector<float> output(problem.tokens * problem.weight.out_features);
    const LinearInput input = {problem.input.data(), problem.input_stride, ElementType::kFloat32};
    for (int64_t first = 0; first < problem.tokens; first += kMaxDecodeTokens) {
      const int64_t tokens = std::min(problem.tokens - first, kMaxDecodeTokens);
      const DecodeActivations* prepared[kMaxDecodeTokens];
      for (int64_t i = 0; i < tokens; ++i) {
        auto* activations = static_cast<DecodeActivations*>(memory_[i].get());
        linear.prepare_decode(problem.weight, input, first + i, problem.precision, activations);
        prepared[i] = activations;
      }
      linear.gemv(problem.weight, prepared, tokens, 0, problem.weight.row_tiles,
                  {output.data() + first * problem.weight.out_features, problem.weight.out_features,
                   ElementType::kFloat32, ElementType::kFloat32, problem.bias.data()});
    }
    return output;
  }

 private:
  int64_t bytes_ = 0;
  Memory memory_[kMaxDecodeTokens];
};

std::vector<float> prefill(const LinearKernels& linear, const Problem& problem) {
  std::vector<float> output(problem.tokens * problem.weight.out_features);
  const LinearInput input = {problem.input.data(), problem.input_stride, ElementType::kFloat32};
  const Memory activations =
      allocate(linear.prefill_activation_bytes(problem.weight, problem.tokens, problem.precision), 0xcc);
  const Memory scratch =
      allocate(linear.prefill_scratch_bytes(problem.weight, problem.tokens, problem.precision), 0xcc);
  const int64_t units = (problem.tokens + linear.prefill_unit_tokens - 1) / linear.prefill_unit_tokens;
  linear.prepare_prefill(problem.weight, input, problem.tokens, 0, units, problem.precision, activations.get());
  linear.gemm(
      problem.weight, activations.get(), problem.tokens, problem.precision, 0, problem.weight.row_tiles, scratch.get(),
      {output.data(), problem.weight.out_features, ElementType::kFloat32, ElementType::kFloat32, problem.bias.data()});
  return output;
}

// The sum of the magnitudes of all terms of an output: what rounding errors are relative to.
double sum_of_magnitudes(const Problem& problem, int64_t token, int64_t row) {
  const PackedWeightView& weight = problem.weight;
  double planes = 0;
  for (int64_t plane = 0; plane < weight.planes; ++plane) planes += std::fabs(plane_scale(weight, row, plane));
  const double mean = weight.means != nullptr ? std::fabs(float16_value(weight.means[row])) : 0.0;
  std::vector<double> magnitudes(weight.in_features);
  double sum = 0;
  for (int64_t k = 0; k < weight.in_features; ++k) {
    const double scale = weight.column_scales != nullptr ? float16_value(weight.column_scales[k]) : 1.0;
    magnitudes[k] = std::fabs(problem.input[token * problem.input_stride + k] * scale);
    sum += magnitudes[k] * (planes + mean);
  }
  for (int64_t i = 0; i < weight.outliers; ++i) {
    const int64_t slot = (row / kRowsPerTile * weight.outliers + i) * kRowsPerTile + row % kRowsPerTile;
    if (weight.outlier_columns[slot] >= weight.in_features) continue;
    sum += std::fabs(weight.outlier_deltas[slot] * float16_value(weight.outlier_scales[row])) *
           magnitudes[weight.outlier_columns[slot]];
  }
  return sum + std::fabs(problem.bias[row]);
}

void expect_agreement(const Problem& problem, const std::vector<float>& actual, const std::vector<float>& expected,
                      double relative_tolerance, const std::string& where) {
  for (int64_t token = 0; token < problem.tokens; ++token) {
    for (int64_t row = 0; row < problem.weight.out_features; ++row) {
      const int64_t i = token * problem.weight.out_features + row;
      const double tolerance = relative_tolerance * sum_of_magnitudes(problem, token, row) + 1e-30;
      ASSERT_NEAR(actual[i], expected[i], tolerance) << where << " token " << token << " row " << row;
    }
  }
}

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed) {}

  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  bool one_in(int64_t times) { return between(1, times) == 1; }

  // Sizes near multiples of a power of two, as often as any others.
  int64_t size_up_to(int64_t largest) {
    if (one_in(2)) return between(1, largest);
    const int64_t base = int64_t{1} << between(0, 9);
    return std::clamp<int64_t>(base * between(1, 4) + between(-1, 1), 1, largest);
  }

  // Scales on no grid, zero, subnormal, negative; outliers in any order, repeated, out of range.
  void spoil(RandomPackedWeight* packed, const PackedWeightShape& shape) {
    const int64_t rows = static_cast<int64_t>(packed->outlier_scales.size());
    for (int64_t row = 0; row < rows; ++row) {
      if (!one_in(4)) continue;
      const int64_t tile = row / kRowsPerTile;
      for (int64_t plane = 0; plane < shape.planes; ++plane) {
        packed->scales[(tile * shape.planes + plane) * kRowsPerTile + row % kRowsPerTile] = any_float16();
      }
      for (int64_t i = 0; i < shape.outliers; ++i) {
        const int64_t slot = (tile * shape.outliers + i) * kRowsPerTile + row % kRowsPerTile;
        packed->outlier_columns[slot] = static_cast<uint16_t>(between(0, one_in(2) ? 65535 : shape.in_features - 1));
        packed->outlier_deltas[slot] = static_cast<int8_t>(between(-128, 127));
      }
      packed->outlier_scales[row] = any_float16();
      if (shape.means) packed->means[row] = any_float16();
    }
    if (one_in(4)) {
      const int32_t all = one_in(2) ? -1 : 0;
      std::fill(packed->signs.begin(), packed->signs.end(), all);
    }
  }

  // Finite, of any exponent up to 2^3.
  uint16_t any_float16() {
    const int64_t choice = between(0, 9);
    if (choice == 0) return 0;
    if (choice == 1) return static_cast<uint16_t>(between(1, 0x3ff));
    return static_cast<uint16_t>(between(0x0400, 0x47ff) | (choice == 2 ? 0x8000 : 0));
  }

  float activation() {
    const float value = std::normal_distribution<float>()(random_);
    if (one_in(50)) return 100 * value;
    return one_in(20) ? 0.0f : value;
  }

  uint64_t seed() { return random_(); }

 private:
  std::mt19937_64 random_;
};

TEST(LinearAgreement, AnyShapeAndAnyBytes) {
  constexpr int kProblems = 150;
  DecodeBuffers buffers;
  Fuzzer fuzzer(20261121);
  for (int i = 0; i < kProblems; ++i) {
    PackedWeightShape shape;
    shape.out_features = fuzzer.size_up_to(100);
    shape.in_features = fuzzer.size_up_to(kMostColumns);
    shape.planes = fuzzer.between(1, kMaxPlanes);
    shape.outliers = fuzzer.between(0, std::min<int64_t>(shape.in_features, fuzzer.one_in(3) ? 40 : 5));
    shape.column_scales = fuzzer.one_in(2);
    shape.means = fuzzer.one_in(2);
    RandomPackedWeight packed(shape, fuzzer.seed());
    if (fuzzer.one_in(2)) fuzzer.spoil(&packed, shape);

    Problem problem;
    problem.weight = packed.view();
    problem.tokens = fuzzer.size_up_to(40);
    problem.input_stride = shape.in_features + fuzzer.between(0, 3);
    problem.input.resize(problem.tokens * problem.input_stride);
    for (float& value : problem.input) value = fuzzer.activation();
    problem.bias.resize(shape.out_features);
    for (float& value : problem.bias) value = fuzzer.activation();
    for (ActivationPrecision precision : kPrecisions) {
      problem.precision = precision;
      const std::vector<float> decoded = buffers.decode(kScalarKernels.linear, problem);
      const std::vector<float> prefilled = prefill(kScalarKernels.linear, problem);
      for (const KernelTable* table : supported_kernels()) {
        if (table == &kScalarKernels) continue;
        const std::string where = std::string(table->name) + " problem " + std::to_string(i) + " precision " +
                                  std::to_string(static_cast<int>(precision)) +
                                  ": N=" + std::to_string(shape.out_features) +
                                  " K=" + std::to_string(shape.in_features) + " P=" + std::to_string(shape.planes) +
                                  " O=" + std::to_string(shape.outliers) + " tokens=" + std::to_string(problem.tokens);
        // Codes and exact columns are the same everywhere; what is left is the rounding of float sums.
        expect_agreement(problem, buffers.decode(table->linear, problem), decoded, 1e-5, "decode " + where);
        // Integer levels move a plane's scale by its rounding to float16, and by that of the unit.
        const double levels = precision == ActivationPrecision::kExact ? 1e-5 : 0x1.2p-10;
        expect_agreement(problem, prefill(table->linear, problem), prefilled, levels, "prefill " + where);
        if (HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
