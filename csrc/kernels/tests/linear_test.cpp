#include "linear_cases.h"

namespace loop_singular_bit {
namespace {

TEST(Linear, MatchesReferenceForEveryShape) {
  const int64_t widths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 130, 257, 320, 1000};
  const int64_t heights[] = {1, 31, 32, 33, 170};
  int64_t i = 0;
  for (int64_t width : widths) {
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes, ++i) {
      for (ActivationPrecision precision : kPrecisions) {
        for (Route route : {Route::kDecode, Route::kPrefill}) {
          const PackedWeightShape shape = {heights[i % 5], width,     planes, std::min<int64_t>(width, i % 7),
                                           i % 2 == 0,     i % 3 == 0};
          const int64_t tokens = 1 + i * 5 % (route == Route::kDecode ? 11 : 29);
          const RandomPackedWeight packed(shape, i);
          check(packed, {shape, tokens, precision, route, kTypes[(i + planes) % 3], i % 4 < 2}, {}, i);
        }
      }
    }
  }
}

TEST(Linear, MatchesReferenceForEveryNumberOfTokens) {
  const PackedWeightShape shapes[] = {
      {40, 200, 1, 3, true, false}, {40, 200, 2, 5, true, true}, {40, 200, 3, 5, false, true}};
  for (const PackedWeightShape& shape : shapes) {
    const RandomPackedWeight packed(shape, 7);
    for (int64_t tokens :
         {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 23, 24, 25, 31, 32, 33, 63, 64, 65, 129}) {
      for (ActivationPrecision precision : kPrecisions) {
        check(packed, {shape, tokens, precision, Route::kPrefill, ElementType::kFloat32, true}, {}, tokens);
      }
    }
  }
}

TEST(Linear, ManyOutliersInARow) {
  for (int64_t outliers : {1, 4, 15, 16, 17, 64, 130}) {
    const PackedWeightShape shape = {33, 130, 2, outliers, false, false};
    const RandomPackedWeight packed(shape, outliers);
    for (ActivationPrecision precision : kPrecisions) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        check(packed, {shape, 9, precision, route, ElementType::kFloat32, false}, {}, outliers);
      }
    }
  }
}

// Plane scales of any size are allowed; only prefill's fast route wants them on the grid of the format.
TEST(Linear, PlaneScalesOffTheGrid) {
  for (int64_t planes = 2; planes <= kMaxPlanes; ++planes) {
    const PackedWeightShape shape = {70, 100, planes, 2, true, true};
    RandomPackedWeight packed(shape, planes);
    for (int64_t n = 0; n < 32; ++n) {
      for (int64_t p = 0; p < planes; ++p) packed.scale(n, p) = float16_bits(packed.uniform(0.0, 0.1));
    }
    for (int64_t p = 0; p < planes; ++p) packed.scale(40, p) = 0;  // a row of zeros is on every grid
    packed.scale(69, planes - 1) = 1;                              // the smallest subnormal
    for (ActivationPrecision precision : kPrecisions) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        check(packed, {shape, 14, precision, route, ElementType::kFloat32, false}, {}, planes);
      }
    }
  }
}

// Integer activations are their own codes, float sums of integers below 2^24 are exact: every output has one value.
void expect_exact_integers(const RandomPackedWeight& packed, int64_t tokens, const std::vector<double>& source) {
  const PackedWeightView weight = packed.view();
  const Case c = {{}, tokens, ActivationPrecision::kInt8, Route::kPrefill, ElementType::kFloat32, false};
  const Elements input(source, c.type);
  std::vector<double> expected;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t n = 0; n < weight.out_features; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < weight.in_features; ++k) {
        const double value = source[token * weight.in_features + k];
        for (int64_t p = 0; p < weight.planes; ++p) {
          sum += plane_scale(weight, n, p) * (sign_is_positive(weight, n, p, k) ? value : -value);
        }
      }
      expected.push_back(sum);
    }
  }
  const std::vector<uint8_t> bytes = Elements(expected, c.type).bytes;
  const std::vector<uint8_t> floats(bytes.begin(), bytes.begin() + static_cast<int64_t>(expected.size()) * 4);
  for (const KernelTable* table : supported_kernels()) {
    for (int64_t tiles_per_range : {int64_t{1}, weight.row_tiles}) {
      EXPECT_TRUE(run(*table, weight, c, input, input, tiles_per_range) == floats)
          << table->name << " K=" << weight.in_features << " P=" << weight.planes << " tokens=" << tokens;
    }
  }
}

RandomPackedWeight weight_of_units(int64_t rows, int64_t width, int64_t planes) {
  RandomPackedWeight packed({rows, width, planes, 0, false, false}, static_cast<uint64_t>(width));
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t p = 0; p < planes; ++p) packed.scale(n, p) = float16_bits(std::ldexp(1.0, planes - 1 - p));
  }
  return packed;
}

enum class Codes { kSmall, kSomeLarge, kLarge, kExtreme, kAllPositive, kAllNegative };
constexpr Codes kCodes[] = {Codes::kSmall,   Codes::kSomeLarge,   Codes::kLarge,
                            Codes::kExtreme, Codes::kAllPositive, Codes::kAllNegative};

// [tokens, width], the largest of each token 127, which does not stand out.
std::vector<double> integers(Codes codes, int64_t tokens, int64_t width, RandomPackedWeight* random) {
  std::vector<double> source;
  for (int64_t i = 0; i < tokens * width; ++i) {
    const bool is_large = codes == Codes::kLarge || (codes == Codes::kSomeLarge && i % 300 < 20);
    const double largest = is_large ? 127 : 60;
    double value = std::nearbyint(random->uniform(-largest, largest));
    if (codes == Codes::kExtreme) value = random->uniform(-1, 1) < 0 ? -127 : 127;
    if (codes == Codes::kAllPositive) value = 127;
    if (codes == Codes::kAllNegative) value = -127;
    if (i % width == width / 2) value = codes == Codes::kAllNegative ? -127 : 127;
    source.push_back(value);
  }
  return source;
}

TEST(Linear, IntegersAreExactForEveryNumberOfTokens) {
  RandomPackedWeight packed = weight_of_units(70, 333, 1);
  for (int64_t tokens = 1; tokens <= 70; ++tokens) {
    expect_exact_integers(packed, tokens, integers(kCodes[tokens % 6], tokens, 333, &packed));
  }
  expect_exact_integers(packed, 200, integers(Codes::kSomeLarge, 200, 333, &packed));
}

// Widths around words and groups of words.
TEST(Linear, IntegersAreExactForEveryWidth) {
  const int64_t widths[] = {1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 257};
  for (int64_t planes : {1, 2}) {
    for (int64_t width : widths) {
      RandomPackedWeight packed = weight_of_units(33, width, planes);
      for (Codes codes : kCodes) expect_exact_integers(packed, 6, integers(codes, 6, width, &packed));
    }
  }
  for (int64_t width : {4096, 4097, 8192, 8200}) {
    RandomPackedWeight packed = weight_of_units(33, width, 1);
    for (int64_t tokens : {7, 16, 17, 33, 66}) {
      expect_exact_integers(packed, tokens, integers(kCodes[tokens % 3], tokens, width, &packed));
    }
  }
}

TEST(Linear, IntegersAreExactBesideExactColumns) {
  for (int64_t width : {700, 4100}) {
    RandomPackedWeight packed = weight_of_units(40, width, 1);
    std::vector<double> source = integers(Codes::kSomeLarge, 19, width, &packed);
    for (int64_t token = 0; token < 19; ++token) {
      if (token % 3 == 2) continue;
      // All of them are kept as float, the 17th largest is a code.
      for (int64_t i = 0; i < kExactColumns; ++i) {
        source[token * width + (i * 131 + token * token) % width] = (i % 2 == 0 ? 1 : -1) * (20000.0 + 100.0 * i);
      }
      source[token * width + (3 + token * token) % width] = -127;
    }
    expect_exact_integers(packed, 19, source);
  }
}

// Integer sums at their largest: every sign set, every code at its limit, the widest weight.
TEST(Linear, WorstCaseSumsDoNotOverflow) {
  const int64_t width = kMaxInFeatures;
  for (int64_t planes : {1, 2, 4, 5, 7, 8}) {
    const PackedWeightShape shape = {33, width, planes, 1, false, false};
    RandomPackedWeight packed(shape, planes);
    for (int32_t positive : {-1, 0}) {
      std::fill(packed.signs.begin(), packed.signs.end(), positive);
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        for (ActivationPrecision precision : {ActivationPrecision::kInt8, ActivationPrecision::kInt16}) {
          for (double value : {1.0, -1.0}) {
            if (planes != 8 && value < 0 && positive == 0) continue;  // the time budget
            check(packed, {shape, 1, precision, route, ElementType::kFloat32, false}, std::vector<double>(width, value),
                  1);
          }
        }
      }
      // Low halves of 16-bit codes at -128: the code is 256 * h - 128 for largest = 32512.
      std::vector<double> low(width, -128.0);
      low[0] = 32512.0;
      check(packed, {shape, 1, ActivationPrecision::kInt16, Route::kPrefill, ElementType::kFloat32, false}, low, 1);
    }
  }
}

TEST(Linear, AnyBytesAreMemorySafe) {
  for (int64_t width : {1, 33, 100}) {
    const PackedWeightShape shape = {33, width, 3, 1, true, true};
    RandomPackedWeight packed(shape, width);
    std::fill(packed.outlier_columns.begin(), packed.outlier_columns.end(), uint16_t{65535});
    std::fill(packed.outlier_deltas.begin(), packed.outlier_deltas.end(), int8_t{-128});
    for (ActivationPrecision precision : kPrecisions) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        check(packed, {shape, 14, precision, route, ElementType::kFloat32, true}, {}, width);
      }
    }
    // Not a number in, not a number out; nothing else is promised but that it ends.
    std::fill(packed.scales.begin(), packed.scales.end(), uint16_t{0x7e00});
    std::fill(packed.outlier_scales.begin(), packed.outlier_scales.end(), uint16_t{0xfc00});
    const Elements input(std::vector<double>(14 * width, 1.0), ElementType::kFloat32);
    for (const KernelTable* table : supported_kernels()) {
      for (ActivationPrecision precision : kPrecisions) {
        for (Route route : {Route::kDecode, Route::kPrefill}) {
          const Case c = {shape, 14, precision, route, ElementType::kFloat32, false};
          const std::vector<uint8_t> result = run(*table, packed.view(), c, input, input, 1);
          EXPECT_TRUE(std::isnan(Elements::value_at(result.data(), 0, c.type))) << table->name << " " << c.name();
        }
      }
    }
  }
}

TEST(Linear, DeltasOfMinus128) {
  const PackedWeightShape shape = {64, 300, 2, 20, false, false};
  RandomPackedWeight packed(shape, 3);
  std::fill(packed.outlier_deltas.begin(), packed.outlier_deltas.end(), int8_t{-128});
  for (ActivationPrecision precision : kPrecisions) {
    for (Route route : {Route::kDecode, Route::kPrefill}) {
      check(packed, {shape, 20, precision, route, ElementType::kFloat32, false}, {}, 3);
    }
  }
}

TEST(Linear, NotANumberStaysInItsToken) {
  const PackedWeightShape shape = {33, 70, 2, 3, true, false};
  const RandomPackedWeight packed(shape, 1);
  for (double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    std::vector<double> source(20 * 70, 0.5);
    source[4 * 70 + 9] = poison;
    const Elements input(source, ElementType::kFloat32);
    for (const KernelTable* table : supported_kernels()) {
      for (ActivationPrecision precision : kPrecisions) {
        for (Route route : {Route::kDecode, Route::kPrefill}) {
          const Case c = {shape, 20, precision, route, ElementType::kFloat32, false};
          const std::vector<uint8_t> result = run(*table, packed.view(), c, input, input, 1);
          for (int64_t i = 0; i < 20 * 33; ++i) {
            const bool is_finite = std::isfinite(Elements::value_at(result.data(), i, c.type));
            ASSERT_EQ(is_finite, i / 33 != 4) << table->name << " " << c.name() << " token " << i / 33;
          }
        }
      }
    }
  }
}

TEST(Linear, ExtremeActivations) {
  const PackedWeightShape shape = {33, 200, 2, 2, false, false};
  const RandomPackedWeight packed(shape, 1);
  std::vector<double> zeros(20 * 200, 0.0), equal(20 * 200, -3.0), few(20 * 200, 0.0), tiny(20 * 200, 1e-20);
  for (int64_t i = 0; i < 20 * 200; i += 41) few[i] = static_cast<double>(i - 2000);
  std::vector<double> huge(20 * 200, 1e30);  // squares are beyond float
  for (int64_t i = 0; i < 20 * 200; i += 67) huge[i] = -1e33;
  for (const std::vector<double>& source : {zeros, equal, few, tiny, huge}) {
    for (ActivationPrecision precision : kPrecisions) {
      for (Route route : {Route::kDecode, Route::kPrefill}) {
        check(packed, {shape, 20, precision, route, ElementType::kFloat32, false}, source, 1);
      }
    }
  }
}

// Decode buffers are reused: what a wide token leaves behind must not reach a narrow one.
TEST(Linear, DecodeBufferKeepsNothingOfAWiderToken) {
  RandomPackedWeight wide({32, 5000, 1, 4, false, false}, 1), narrow({32, 40, 2, 8, false, false}, 2);
  for (size_t i = 0; i < narrow.outlier_columns.size(); ++i) narrow.outlier_columns[i] = static_cast<uint16_t>(37 * i);
  const Elements input(std::vector<double>(5000, 1.5), ElementType::kFloat32);
  for (const KernelTable* table : supported_kernels()) {
    const LinearKernels& linear = table->linear;
    for (ActivationPrecision precision : kPrecisions) {
      const AlignedBuffer used(linear.decode_activation_bytes(5000, precision), 0);
      const AlignedBuffer fresh(linear.decode_activation_bytes(5000, precision), 0);
      std::vector<float> outputs[2];
      for (int which = 0; which < 2; ++which) {
        auto* activations = static_cast<DecodeActivations*>(which == 0 ? used.get() : fresh.get());
        if (which == 0) {
          linear.prepare_decode(wide.view(), {input.bytes.data(), 5000, ElementType::kFloat32}, 0, precision,
                                activations);
        }
        linear.prepare_decode(narrow.view(), {input.bytes.data(), 40, ElementType::kFloat32}, 0, precision,
                              activations);
        outputs[which].resize(32);
        const DecodeActivations* prepared[] = {activations};
        linear.gemv(narrow.view(), prepared, 1, 0, 1,
                    {outputs[which].data(), 32, ElementType::kFloat32, ElementType::kFloat32, nullptr});
      }
      EXPECT_EQ(outputs[0], outputs[1]) << table->name;
    }
  }
}

// Rows in any distance from each other, outputs between other data, nothing aligned beyond its element.
TEST(Linear, StridesAndUnalignedPointers) {
  const PackedWeightShape shape = {45, 90, 3, 2, true, true};
  RandomPackedWeight packed(shape, 5);
  PackedWeightView weight = packed.view();
  std::vector<int32_t> signs(packed.signs.size() + 1);
  std::copy(packed.signs.begin(), packed.signs.end(), signs.begin() + 1);
  const Case c = {shape, 15, ActivationPrecision::kInt8, Route::kPrefill, ElementType::kFloat32, false};
  std::vector<float> input(15 * 113 + 1);
  for (float& value : input) value = static_cast<float>(packed.gaussian());
  std::vector<double> dense;
  for (int64_t token = 0; token < 15; ++token) {
    for (int64_t k = 0; k < 90; ++k) dense.push_back(input[1 + token * 113 + k]);
  }
  const Elements contiguous(dense, ElementType::kFloat32);
  for (const KernelTable* table : supported_kernels()) {
    const LinearKernels& linear = table->linear;
    weight.signs = packed.signs.data();
    std::vector<float> expected(15 * 45), actual(15 * 77 + 1, -7.0f);
    const std::vector<uint8_t> bytes = run(*table, weight, c, contiguous, contiguous, 1);
    std::memcpy(expected.data(), bytes.data(), bytes.size());
    weight.signs = signs.data() + 1;
    const AlignedBuffer activations(linear.prefill_activation_bytes(weight, 15, c.precision), 0xee);
    const AlignedBuffer scratch(linear.prefill_scratch_bytes(weight, 15, c.precision), 0xee);
    const int64_t units = (15 + linear.prefill_unit_tokens - 1) / linear.prefill_unit_tokens;
    linear.prepare_prefill(weight, {input.data() + 1, 113, ElementType::kFloat32}, 15, 0, units, c.precision,
                           activations.get());
    linear.gemm(weight, activations.get(), 15, c.precision, 0, 2, scratch.get(),
                {actual.data() + 1, 77, ElementType::kFloat32, ElementType::kFloat32, nullptr});
    EXPECT_EQ(actual[0], -7.0f);
    for (int64_t token = 0; token < 15; ++token) {
      for (int64_t n = 0; n < 77 && 1 + token * 77 + n < static_cast<int64_t>(actual.size()); ++n) {
        ASSERT_EQ(actual[1 + token * 77 + n], n < 45 ? expected[token * 45 + n] : -7.0f) << table->name << " " << n;
      }
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
