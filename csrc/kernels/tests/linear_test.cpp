#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "dispatch.h"
#include "linear_kernels.h"
#include "reference.h"

namespace loop_singular_bit {
namespace {

enum class Route { kDecode, kPrefill };

struct Case {
  PackedWeightShape shape;
  int64_t tokens;
  ActivationPrecision precision;
  Route route;
  ElementType type;
  bool bias;

  std::string name() const {
    const char* precisions[] = {"int8", "int16", "exact"};
    const char* types[] = {"float32", "bfloat16", "float16"};
    return std::string(route == Route::kDecode ? "decode" : "prefill") + " N=" + std::to_string(shape.out_features) +
           " K=" + std::to_string(shape.in_features) + " P=" + std::to_string(shape.planes) +
           " O=" + std::to_string(shape.outliers) + " tokens=" + std::to_string(tokens) + " " +
           precisions[static_cast<int>(precision)] + " " + types[static_cast<int>(type)] +
           (shape.column_scales ? " column_scales" : "") + (shape.means ? " means" : "") + (bias ? " bias" : "");
  }
};

// Memory as the contract of the kernels asks for it. Poisoned unless zeros are promised.
class AlignedBuffer {
 public:
  AlignedBuffer(int64_t bytes, int fill)
      : data_(std::aligned_alloc(kActivationAlignment, (bytes + 2 * kActivationAlignment - 1) / kActivationAlignment *
                                                           kActivationAlignment)) {
    std::memset(data_.get(), fill, bytes);
  }
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Elements of the given type, with their values after rounding to it.
struct Elements {
  std::vector<uint8_t> bytes;
  std::vector<double> values;

  Elements(const std::vector<double>& source, ElementType type) : values(source.size()) {
    const size_t size = type == ElementType::kFloat32 ? 4 : 2;
    bytes.resize(source.size() * size + 1);
    for (size_t i = 0; i < source.size(); ++i) {
      const float value = static_cast<float>(source[i]);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (type == ElementType::kBFloat16) bits = bits >> 16;
      if (type == ElementType::kFloat16) bits = float16_bits(source[i]);
      std::memcpy(bytes.data() + i * size, &bits, size);
    }
    for (size_t i = 0; i < source.size(); ++i) values[i] = value_at(bytes.data(), i, type);
  }

  static double value_at(const uint8_t* bytes, size_t index, ElementType type) {
    if (type == ElementType::kFloat32) {
      float value;
      std::memcpy(&value, bytes + index * 4, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, bytes + index * 2, 2);
    return type == ElementType::kBFloat16 ? bfloat16_value(half) : float16_value(half);
  }
};

double unit_roundoff(ElementType type) {
  return type == ElementType::kFloat32 ? 0x1p-24 : type == ElementType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

// [tokens, out_features], in the case's type. Row tiles are handed out in ranges of `tiles_per_range`.
std::vector<uint8_t> run(const KernelTable& table, const PackedWeightView& weight, const Case& c, const Elements& input,
                         const Elements& bias, int64_t tiles_per_range) {
  const LinearKernels& linear = table.linear;
  const int64_t size = c.type == ElementType::kFloat32 ? 4 : 2;
  std::vector<uint8_t> result(c.tokens * weight.out_features * size, 0xee);
  const LinearInput in = {input.bytes.data(), weight.in_features, c.type};
  const void* bias_data = c.bias ? bias.bytes.data() : nullptr;
  auto output_from = [&](int64_t token) {
    return LinearOutput{result.data() + token * weight.out_features * size, weight.out_features, c.type, c.type,
                        bias_data};
  };
  auto for_tile_ranges = [&](auto&& body) {
    for (int64_t begin = 0; begin < weight.row_tiles; begin += tiles_per_range) {
      body(begin, std::min(weight.row_tiles, begin + tiles_per_range));
    }
  };
  if (c.route == Route::kDecode) {
    const int64_t bytes = linear.decode_activation_bytes(weight.in_features, c.precision);
    std::vector<std::unique_ptr<AlignedBuffer>> buffers;
    const DecodeActivations* prepared[kMaxDecodeTokens];
    for (int64_t i = 0; i < std::min(c.tokens, kMaxDecodeTokens); ++i) {
      buffers.push_back(std::make_unique<AlignedBuffer>(bytes, 0));
      prepared[i] = static_cast<const DecodeActivations*>(buffers.back()->get());
    }
    for (int64_t first = 0; first < c.tokens; first += kMaxDecodeTokens) {
      const int64_t tokens = std::min(c.tokens - first, kMaxDecodeTokens);
      for (int64_t i = 0; i < tokens; ++i) {
        linear.prepare_decode(weight, in, first + i, c.precision, static_cast<DecodeActivations*>(buffers[i]->get()));
      }
      for_tile_ranges(
          [&](int64_t begin, int64_t end) { linear.gemv(weight, prepared, tokens, begin, end, output_from(first)); });
    }
  } else {
    const AlignedBuffer activations(linear.prefill_activation_bytes(weight, c.tokens, c.precision), 0xee);
    const AlignedBuffer scratch(linear.prefill_scratch_bytes(weight, c.tokens, c.precision), 0xee);
    const int64_t units = (c.tokens + linear.prefill_unit_tokens - 1) / linear.prefill_unit_tokens;
    for (int64_t unit = units - 1; unit >= 0; --unit) {
      linear.prepare_prefill(weight, in, c.tokens, unit, unit + 1, c.precision, activations.get());
    }
    for_tile_ranges([&](int64_t begin, int64_t end) {
      linear.gemm(weight, activations.get(), c.tokens, c.precision, begin, end, scratch.get(), output_from(0));
    });
  }
  return result;
}

// One token as the products with the signs see it, computed with the same float operations as the contract states:
// columns * (code_max / largest), rounded to even.
struct ReferenceToken {
  std::vector<double> columns;  // scaled by column_scales, float
  std::vector<double> coded;    // what multiplies the signs
  std::vector<double> direct;   // what multiplies outliers and means
};

ReferenceToken reference_token(const PackedWeightView& weight, const Case& c, const double* input) {
  const int64_t width = weight.in_features;
  std::vector<float> columns(width);
  for (int64_t k = 0; k < width; ++k) {
    columns[k] = static_cast<float>(input[k]);
    if (weight.column_scales != nullptr) columns[k] *= static_cast<float>(float16_value(weight.column_scales[k]));
  }
  std::vector<bool> is_exact(width, c.precision == ActivationPrecision::kExact);
  if (c.precision == ActivationPrecision::kInt8 && c.route == Route::kDecode) {
    std::vector<int64_t> order(width);
    for (int64_t k = 0; k < width; ++k) order[k] = k;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return std::fabs(columns[a]) > std::fabs(columns[b]); });
    for (int64_t i = 0; i < std::min(width, kExactColumns); ++i) is_exact[order[i]] = true;
  }
  float largest = 0;
  for (int64_t k = 0; k < width; ++k) {
    if (!is_exact[k]) largest = std::max(largest, std::fabs(columns[k]));
  }
  const float code_max = c.precision == ActivationPrecision::kInt16 ? 127.0f * 256 : 127.0f;
  ReferenceToken token;
  for (int64_t k = 0; k < width; ++k) {
    const double code = largest > 0 ? std::nearbyint(columns[k] * (code_max / largest)) : 0.0;
    token.columns.push_back(columns[k]);
    token.coded.push_back(is_exact[k] ? columns[k] : code * (largest / code_max));
    token.direct.push_back(c.route == Route::kDecode ? token.columns.back() : token.coded.back());
  }
  return token;
}

void expect_matches_reference(const PackedWeightView& weight, const Case& c, const Elements& input,
                              const Elements& bias, const std::vector<uint8_t>& result, const std::string& where) {
  double worst = 0;  // error / tolerance
  std::string worst_at;
  for (int64_t token = 0; token < c.tokens; ++token) {
    const ReferenceToken x = reference_token(weight, c, input.values.data() + token * weight.in_features);
    double column_sum = 0, column_magnitude = 0;
    for (double value : x.columns) {
      column_sum += value;
      column_magnitude += std::fabs(value);
    }
    for (int64_t n = 0; n < weight.out_features; ++n) {
      double expected = c.bias ? bias.values[n] : 0.0;
      double magnitude = std::fabs(expected);  // of all terms, for the rounding of float sums
      double scale_rounding = 0;
      for (int64_t plane = 0; plane < weight.planes; ++plane) {
        double sum = 0, terms = 0;
        for (int64_t k = 0; k < weight.in_features; ++k) {
          sum += sign_is_positive(weight, n, plane, k) ? x.coded[k] : -x.coded[k];
          terms += std::fabs(x.coded[k]);
        }
        const double scale = plane_scale(weight, n, plane);
        expected += scale * sum;
        magnitude += scale * (c.precision == ActivationPrecision::kExact ? terms : std::fabs(sum));
        scale_rounding += scale * std::fabs(sum);
      }
      // Exact columns are summed as floats beside the integer sums.
      if (c.precision == ActivationPrecision::kInt8) magnitude += scale_rounding;
      for (int64_t i = 0; i < weight.outliers; ++i) {
        const int64_t slot = (n / kRowsPerTile * weight.outliers + i) * kRowsPerTile + n % kRowsPerTile;
        const int64_t column = weight.outlier_columns[slot];
        if (column >= weight.in_features) continue;
        const double term = weight.outlier_deltas[slot] * float16_value(weight.outlier_scales[n]) * x.direct[column];
        expected += term;
        magnitude += std::fabs(term);
      }
      if (weight.means != nullptr) {
        const double mean = float16_value(weight.means[n]);
        expected += mean * column_sum;
        magnitude += std::fabs(mean) * column_magnitude;
      }
      // Sums of floats: a few dozen roundings of the sum of magnitudes at most, since chains are split or integer.
      // Prefill multiplies integer levels by one unit per row: each plane scale may be off by its own float16 rounding
      // and by that of the unit, 2^-11 each.
      double tolerance = 64 * 0x1p-24 * magnitude + unit_roundoff(c.type) * std::fabs(expected) + 1e-12;
      if (c.route == Route::kPrefill && c.precision != ActivationPrecision::kExact) {
        tolerance += 0x1p-10 * scale_rounding;
      }
      const double actual = Elements::value_at(result.data(), token * weight.out_features + n, c.type);
      const double error = std::fabs(actual - expected) / tolerance;
      if (!(error <= worst)) {
        worst = error;
        worst_at = "token " + std::to_string(token) + " row " + std::to_string(n) + ": expected " +
                   std::to_string(expected) + ", got " + std::to_string(actual);
      }
    }
  }
  EXPECT_LE(worst, 1.0) << where << " " << c.name() << ": " << worst_at;
}

void check(const RandomPackedWeight& packed, const Case& c, std::vector<double> source, uint64_t seed) {
  const PackedWeightView weight = packed.view();
  RandomPackedWeight noise({1, 1, 1, 0, false, false}, seed);
  if (source.empty()) {
    for (int64_t i = 0; i < c.tokens * weight.in_features; ++i) {
      const double value = noise.gaussian();
      source.push_back(i % 97 == 5 ? 20 * value : value);
    }
  }
  std::vector<double> bias_source(weight.out_features);
  for (double& value : bias_source) value = noise.gaussian();
  const Elements input(source, c.type), bias(bias_source, c.type);
  for (const KernelTable* table : supported_kernels()) {
    const std::vector<uint8_t> result = run(*table, weight, c, input, bias, weight.row_tiles);
    expect_matches_reference(weight, c, input, bias, result, table->name);
    EXPECT_EQ(result, run(*table, weight, c, input, bias, 1)) << table->name << " " << c.name() << ": split in tiles";
  }
}

constexpr ActivationPrecision kPrecisions[] = {ActivationPrecision::kInt8, ActivationPrecision::kInt16,
                                               ActivationPrecision::kExact};
constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16};

TEST(Linear, MatchesReferenceForEveryShape) {
  const int64_t widths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 130, 257, 320, 1000};
  const int64_t heights[] = {1, 31, 32, 33, 70};
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
  const PackedWeightShape shapes[] = {{40, 200, 1, 3, true, false}, {40, 200, 2, 5, true, true}};
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
  for (const std::vector<double>& source : {zeros, equal, few, tiny}) {
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
