// What the kernels compute, in plain loops and double precision, and packed weights to compute it with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "packed_weight_view.h"

namespace loop_singular_bit {

inline double float16_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  double value;
  if (exponent == 31) {
    value = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, -24);
  } else {
    value = std::ldexp(1024 + mantissa, exponent - 25);
  }
  return bits & 0x8000 ? -value : value;
}

// Rounds to nearest even.
inline uint16_t float16_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = magnitude < std::ldexp(1.0, -14) ? -14 : std::ilogb(magnitude);
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 2048 carries over
  return sign | static_cast<uint16_t>(mantissa < 1024 ? mantissa : ((exponent + 14) << 10) + mantissa);
}

inline double bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline bool sign_is_positive(const PackedWeightView& weight, int64_t n, int64_t plane, int64_t k) {
  const int64_t tile = n / kRowsPerTile;
  const int64_t word = ((tile * weight.planes + plane) * weight.words + k / kColumnsPerWord) * kRowsPerTile;
  return (static_cast<uint32_t>(weight.signs[word + n % kRowsPerTile]) >> (k % kColumnsPerWord)) & 1;
}

inline double plane_scale(const PackedWeightView& weight, int64_t n, int64_t plane) {
  const int64_t tile = n / kRowsPerTile;
  return float16_value(weight.scales[(tile * weight.planes + plane) * kRowsPerTile + n % kRowsPerTile]);
}

// One row, [in_features]. Outliers at columns out of range are skipped.
inline std::vector<double> reference_dequantize_row(const PackedWeightView& weight, int64_t n) {
  std::vector<double> row(weight.in_features, weight.means != nullptr ? float16_value(weight.means[n]) : 0.0);
  for (int64_t plane = 0; plane < weight.planes; ++plane) {
    const double scale = plane_scale(weight, n, plane);
    for (int64_t k = 0; k < weight.in_features; ++k) row[k] += sign_is_positive(weight, n, plane, k) ? scale : -scale;
  }
  for (int64_t i = 0; i < weight.outliers; ++i) {
    const int64_t slot = (n / kRowsPerTile * weight.outliers + i) * kRowsPerTile + n % kRowsPerTile;
    const int64_t column = weight.outlier_columns[slot];
    if (column < weight.in_features) {
      row[column] += weight.outlier_deltas[slot] * float16_value(weight.outlier_scales[n]);
    }
  }
  if (weight.column_scales != nullptr) {
    for (int64_t k = 0; k < weight.in_features; ++k) row[k] *= float16_value(weight.column_scales[k]);
  }
  return row;
}

// [out_features, in_features]
inline std::vector<double> reference_dequantize(const PackedWeightView& weight) {
  std::vector<double> dense;
  for (int64_t n = 0; n < weight.out_features; ++n) {
    const std::vector<double> row = reference_dequantize_row(weight, n);
    dense.insert(dense.end(), row.begin(), row.end());
  }
  return dense;
}

// input [tokens, in_features] -> [tokens, out_features]
inline std::vector<double> reference_linear(const PackedWeightView& weight, const std::vector<double>& input,
                                            const std::vector<double>& bias) {
  const int64_t tokens = static_cast<int64_t>(input.size()) / weight.in_features;
  std::vector<double> output(tokens * weight.out_features);
  for (int64_t n = 0; n < weight.out_features; ++n) {
    const std::vector<double> row = reference_dequantize_row(weight, n);
    for (int64_t token = 0; token < tokens; ++token) {
      double sum = bias.empty() ? 0.0 : bias[n];
      for (int64_t k = 0; k < weight.in_features; ++k) sum += row[k] * input[token * weight.in_features + k];
      output[token * weight.out_features + n] = sum;
    }
  }
  return output;
}

struct PackedWeightShape {
  int64_t out_features;
  int64_t in_features;
  int64_t planes;
  int64_t outliers;
  bool column_scales;
  bool means;
};

// A packed weight that owns its arrays, filled at random in the way the quantizer would: plane scales on the grid of
// the format, outlier columns ascending.
class RandomPackedWeight {
 public:
  RandomPackedWeight(const PackedWeightShape& shape, uint64_t seed) : random_(seed) {
    view_.out_features = shape.out_features;
    view_.in_features = shape.in_features;
    view_.planes = shape.planes;
    view_.outliers = shape.outliers;
    view_.row_tiles = (shape.out_features + kRowsPerTile - 1) / kRowsPerTile;
    view_.words = (shape.in_features + kColumnsPerWord - 1) / kColumnsPerWord;
    const int64_t rows = view_.row_tiles * kRowsPerTile;
    signs.resize(rows * view_.planes * view_.words);
    scales.assign(rows * view_.planes, 0);
    outlier_columns.assign(rows * view_.outliers, 0);
    outlier_deltas.assign(rows * view_.outliers, 0);
    outlier_scales.assign(rows, 0);
    if (shape.column_scales) column_scales.resize(shape.in_features);
    if (shape.means) means.assign(rows, 0);

    // Also in padded rows and columns: readers must not depend on zeros there.
    for (int32_t& word : signs) word = static_cast<int32_t>(random_());
    for (int64_t n = 0; n < view_.out_features; ++n) fill_row(n);
    for (uint16_t& scale : column_scales) scale = float16_bits(uniform(0.5, 2.0));
    for (int64_t n = 0; n < view_.out_features && shape.means; ++n) means[n] = float16_bits(uniform(-0.01, 0.01));
  }

  // Call again after changing the arrays' size; pointers stay valid while it is unchanged.
  PackedWeightView view() const {
    PackedWeightView view = view_;
    view.signs = signs.data();
    view.scales = scales.data();
    view.outlier_columns = outlier_columns.data();
    view.outlier_deltas = outlier_deltas.data();
    view.outlier_scales = outlier_scales.data();
    view.column_scales = column_scales.empty() ? nullptr : column_scales.data();
    view.means = means.empty() ? nullptr : means.data();
    return view;
  }

  uint16_t& scale(int64_t n, int64_t plane) {
    return scales[(n / kRowsPerTile * view_.planes + plane) * kRowsPerTile + n % kRowsPerTile];
  }

  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }
  double gaussian() { return normal_(random_); }

  std::vector<int32_t> signs;
  std::vector<uint16_t> scales, outlier_columns, outlier_scales, column_scales, means;
  std::vector<int8_t> outlier_deltas;

 private:
  void fill_row(int64_t n) {
    const int64_t planes = view_.planes;
    if (planes > 4) {
      const double last = float16_value(float16_bits(uniform(0.0005, 0.001)));
      for (int64_t p = 0; p < planes; ++p)
        scale(n, p) = float16_bits(std::ldexp(last, static_cast<int>(planes - 1 - p)));
    } else {
      const double unit = uniform(0.0003, 0.0006);
      int64_t left = 126;
      for (int64_t p = 0; p < planes; ++p) {
        const int64_t levels = p + 1 == planes ? left : static_cast<int64_t>(left * uniform(0.55, 0.7));
        scale(n, p) = float16_bits(static_cast<double>(levels) * unit);
        left -= levels;
      }
    }
    outlier_scales[n] = float16_bits(uniform(0.001, 0.002));
    int64_t column = 0;
    for (int64_t i = 0; i < view_.outliers; ++i) {
      const int64_t end = (i + 1) * view_.in_features / view_.outliers;
      column += static_cast<int64_t>(random_() % static_cast<uint64_t>(end - column));
      const int64_t slot = (n / kRowsPerTile * view_.outliers + i) * kRowsPerTile + n % kRowsPerTile;
      outlier_columns[slot] = static_cast<uint16_t>(column);
      outlier_deltas[slot] = static_cast<int8_t>(static_cast<int64_t>(random_() % 255) - 127);
      ++column;
    }
  }

  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  PackedWeightView view_{};
};

}  // namespace loop_singular_bit
