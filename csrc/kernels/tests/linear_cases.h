// Packed linear by every table and route against a plain model of the contract, codes and exact columns included.
#pragma once

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
  std::vector<bool> is_exact;   // what is no code
  double exact_magnitude = 0;   // of those together
};

// The sixteen largest where they stand out, the lower column among equals.
std::vector<int64_t> reference_exact_columns(const std::vector<float>& columns, bool is_decode) {
  std::vector<int64_t> order(columns.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int64_t>(k);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return std::fabs(columns[a]) > std::fabs(columns[b]); });
  const float largest = std::fabs(columns[order[0]]);
  const float rest = order.size() > kExactColumns ? std::fabs(columns[order[kExactColumns]]) : 0.0f;
  order.resize(std::min<size_t>(order.size(), kExactColumns));
  const float outstanding = is_decode ? 4.4f : 5.0f, gain = is_decode ? 1.25f : 1.5f;
  double square_sum = 0;
  for (float value : columns) square_sum += static_cast<double>(value) * value;
  const bool stands_out = largest * largest * static_cast<float>(columns.size()) >
                          outstanding * outstanding * static_cast<float>(square_sum);
  return stands_out && largest >= gain * rest ? order : std::vector<int64_t>();
}

ReferenceToken reference_token(const PackedWeightView& weight, const Case& c, const double* input) {
  const int64_t width = weight.in_features;
  std::vector<float> columns(width);
  for (int64_t k = 0; k < width; ++k) {
    columns[k] = static_cast<float>(input[k]);
    if (weight.column_scales != nullptr) columns[k] *= static_cast<float>(float16_value(weight.column_scales[k]));
  }
  ReferenceToken token;
  token.is_exact.assign(width, c.precision == ActivationPrecision::kExact);
  if (c.precision == ActivationPrecision::kInt8) {
    for (int64_t k : reference_exact_columns(columns, c.route == Route::kDecode)) token.is_exact[k] = true;
  }
  float largest = 0;
  for (int64_t k = 0; k < width; ++k) {
    if (!token.is_exact[k]) largest = std::max(largest, std::fabs(columns[k]));
  }
  const float short_code_max = c.route == Route::kDecode ? 255.0f : 127.0f;
  const float code_max = c.precision == ActivationPrecision::kInt16 ? 127.0f * 256 : short_code_max;
  for (int64_t k = 0; k < width; ++k) {
    const double code = largest > 0 ? std::nearbyint(columns[k] * (code_max / largest)) : 0.0;
    token.columns.push_back(columns[k]);
    token.coded.push_back(token.is_exact[k] ? columns[k] : code * (largest / code_max));
    token.direct.push_back(c.route == Route::kDecode ? token.columns.back() : token.coded.back());
    token.exact_magnitude += token.is_exact[k] ? std::fabs(columns[k]) : 0.0;
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
        double sum = 0, of_codes = 0, terms = 0;
        for (int64_t k = 0; k < weight.in_features; ++k) {
          const double term = sign_is_positive(weight, n, plane, k) ? x.coded[k] : -x.coded[k];
          sum += term;
          of_codes += x.is_exact[k] ? 0.0 : term;
          terms += std::fabs(x.coded[k]);
        }
        const double scale = plane_scale(weight, n, plane);
        expected += scale * sum;
        // Exact columns are summed as floats beside the integer sums.
        const double beside = c.precision == ActivationPrecision::kInt8 ? std::fabs(of_codes) + x.exact_magnitude : 0.0;
        magnitude += scale * (c.precision == ActivationPrecision::kExact ? terms : std::fabs(sum) + beside);
        scale_rounding += scale * std::fabs(of_codes);
      }
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

}  // namespace
}  // namespace loop_singular_bit
