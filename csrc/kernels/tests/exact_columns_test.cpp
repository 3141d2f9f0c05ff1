// Int8 activations: the columns that are kept exactly where they stand out.
#include "linear_cases.h"

namespace loop_singular_bit {
namespace {

enum class Tail { kNone, kMassive, kStudent, kTies, kSparse };

// [tokens, width]; every fourth token is Gaussian and nothing else, so that units hold both kinds.
std::vector<double> heavy_tailed(Tail tail, int64_t tokens, int64_t width, uint64_t seed) {
  RandomPackedWeight noise({1, 1, 1, 0, false, false}, seed);
  std::vector<double> source(tokens * width);
  for (int64_t t = 0; t < tokens; ++t) {
    double* token = source.data() + t * width;
    for (int64_t k = 0; k < width; ++k) token[k] = noise.gaussian();
    if (t % 4 == 3) continue;
    switch (tail) {
      case Tail::kNone:
        break;
      case Tail::kMassive:  // the same columns in all tokens, and one of each token's own
        for (int64_t k : {width / 3, width / 2, width - 1}) token[k] *= 200;
        token[t * 31 % width] = -300;
        break;
      case Tail::kStudent:
        for (int64_t k = 0; k < width; ++k) {
          double square = 0;
          for (int i = 0; i < 3; ++i) square += std::pow(noise.gaussian(), 2) / 3;
          token[k] /= std::sqrt(square);
        }
        break;
      case Tail::kTies:  // the last of the sixteen are a choice among equals
        for (int64_t k = 0; k < width; ++k) token[k] = k % 2 == 0 ? 1 : -1;
        for (int64_t i = 0; i < 6; ++i) token[(i * 53 + t) % width] = 100;
        for (int64_t i = 0; i < 24; ++i) token[(i * 17 + 5 + t) % width] = i % 2 == 0 ? 40 : -40;
        break;
      case Tail::kSparse:  // fewer than seventeen that are not 0
        for (int64_t k = 0; k < width; ++k) token[k] = k % 64 == 7 && k < 900 ? 1e3 * token[k] : 0;
        break;
    }
  }
  return source;
}

constexpr Tail kTails[] = {Tail::kNone, Tail::kMassive, Tail::kStudent, Tail::kTies, Tail::kSparse};

TEST(ExactColumns, OutstandingActivations) {
  int64_t i = 0;
  for (int64_t width : {33, 64, 257, 700, 1030}) {
    for (Tail tail : kTails) {
      for (int64_t tokens : {1, 5, 16, 17, 70, 130}) {
        ++i;
        if (tokens > 20 && i % 4 != 0) continue;  // the time budget
        const PackedWeightShape shape = {40, width, 1 + i % 5, i % 23, i % 2 == 0, i % 3 == 0};
        const RandomPackedWeight packed(shape, i);
        check(packed, {shape, tokens, ActivationPrecision::kInt8, Route::kPrefill, kTypes[i % 3], i % 4 == 0},
              heavy_tailed(tail, tokens, width, i), i);
        if (tokens > 5) continue;
        check(packed, {shape, tokens, ActivationPrecision::kInt8, Route::kDecode, kTypes[i % 3], i % 4 == 0},
              heavy_tailed(tail, tokens, width, i), i);
      }
    }
  }
}

TEST(ExactColumns, OutstandingActivationsWithScalesOffTheGrid) {
  for (int64_t planes : {2, 3, 5}) {
    const PackedWeightShape shape = {70, 500, planes, 6, true, true};
    RandomPackedWeight packed(shape, planes);
    for (int64_t n = 0; n < 32; ++n) {
      for (int64_t p = 0; p < planes; ++p) packed.scale(n, p) = float16_bits(packed.uniform(0.0, 0.1));
    }
    check(packed, {shape, 37, ActivationPrecision::kInt8, Route::kPrefill, ElementType::kFloat32, true},
          heavy_tailed(Tail::kMassive, 37, 500, 1), 1);
  }
}

// Outliers at the massive columns of every row, repeated, and out of range.
TEST(ExactColumns, OutstandingActivationsMeetOutliers) {
  const PackedWeightShape shape = {33, 300, 2, 7, true, false};
  RandomPackedWeight packed(shape, 2);
  const uint16_t columns[] = {100, 100, 150, 299, 300, 301, 65535};
  for (size_t i = 0; i < packed.outlier_columns.size(); ++i) packed.outlier_columns[i] = columns[i / 32 % 7];
  for (Route route : {Route::kDecode, Route::kPrefill}) {
    check(packed, {shape, 9, ActivationPrecision::kInt8, route, ElementType::kFloat32, false},
          heavy_tailed(Tail::kMassive, 9, 300, 1), 1);
  }
}

// In prefill the other tokens of a call change nothing, not one bit.
TEST(ExactColumns, TokensAreIndependent) {
  const PackedWeightShape shape = {40, 600, 2, 9, true, true};
  const RandomPackedWeight packed(shape, 4);
  const int64_t tokens = 75;
  for (Tail tail : kTails) {
    const std::vector<double> source = heavy_tailed(tail, tokens, shape.in_features, 6);
    const Elements all(source, ElementType::kFloat32), bias(std::vector<double>(40, 0.0), ElementType::kFloat32);
    const Case together = {shape, tokens, ActivationPrecision::kInt8, Route::kPrefill, ElementType::kFloat32, false};
    for (const KernelTable* table : supported_kernels()) {
      const std::vector<uint8_t> expected = run(*table, packed.view(), together, all, bias, 1);
      for (int64_t t = 0; t < tokens; t += 3) {
        Case alone = together;
        alone.tokens = 1;
        const Elements one({source.begin() + t * 600, source.begin() + (t + 1) * 600}, ElementType::kFloat32);
        const std::vector<uint8_t> row(expected.begin() + t * 160, expected.begin() + (t + 1) * 160);
        ASSERT_EQ(run(*table, packed.view(), alone, one, bias, 1), row) << table->name << " token " << t;
      }
    }
  }
}

TEST(ExactColumns, NotANumberBesideOutstandingActivations) {
  const PackedWeightShape shape = {33, 300, 2, 3, true, false};
  const RandomPackedWeight packed(shape, 1);
  for (double poison : {static_cast<double>(NAN), static_cast<double>(-INFINITY)}) {
    std::vector<double> source = heavy_tailed(Tail::kMassive, 20, 300, 1);
    source[4 * 300 + 9] = poison;
    const Elements input(source, ElementType::kFloat32);
    for (const KernelTable* table : supported_kernels()) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        const Case c = {shape, 20, ActivationPrecision::kInt8, route, ElementType::kFloat32, false};
        const std::vector<uint8_t> result = run(*table, packed.view(), c, input, input, 1);
        for (int64_t i = 0; i < 20 * 33; ++i) {
          const bool is_finite = std::isfinite(Elements::value_at(result.data(), i, c.type));
          ASSERT_EQ(is_finite, i / 33 != 4) << table->name << " " << c.name() << " token " << i / 33;
        }
      }
    }
  }
}

// Relative error of int8 activations against the product with float ones: what the codes and the exact columns are for.
TEST(ExactColumns, Int8ErrorOfHeavyTailedInputs) {
  const int64_t tokens = 8, width = 4096;
  const PackedWeightShape shape = {64, width, 2, 41, false, false};
  const RandomPackedWeight packed(shape, 5);
  for (Tail tail : {Tail::kNone, Tail::kMassive, Tail::kStudent}) {
    const Elements input(heavy_tailed(tail, tokens, width, 9), ElementType::kFloat32);
    const std::vector<double> expected = reference_linear(packed.view(), input.values, {});
    for (const KernelTable* table : supported_kernels()) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        const Case c = {shape, tokens, ActivationPrecision::kInt8, route, ElementType::kFloat32, false};
        const std::vector<uint8_t> result = run(*table, packed.view(), c, input, input, 2);
        for (int64_t t = 0; t < tokens; ++t) {
          double error = 0, norm = 0;
          for (int64_t i = t * 64; i < (t + 1) * 64; ++i) {
            error += std::pow(Elements::value_at(result.data(), i, c.type) - expected[i], 2);
            norm += std::pow(expected[i], 2);
          }
          const double relative = std::sqrt(error / norm);
          EXPECT_LT(relative, route == Route::kDecode ? 0.007 : 0.016)
              << table->name << " " << c.name() << " token " << t;
        }
      }
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
