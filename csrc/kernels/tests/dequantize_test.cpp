// Dequantizing against plain loops in double, against the golden file, and with hostile bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch.h"
#include "reference.h"

namespace loop_singular_bit {
namespace {

std::vector<float> dequantize_with(const KernelTable& table, const PackedWeightView& view) {
  std::vector<float> dense(view.out_features * view.in_features);
  std::vector<float> scratch(view.words * kColumnsPerWord);
  for (int64_t n = 0; n < view.out_features; ++n) {
    table.codec.dequantize_row(view, n, scratch.data(), dense.data() + n * view.in_features, ElementType::kFloat32);
  }
  return dense;
}

TEST(Dequantize, AgreesWithTheReference) {
  uint64_t seed = 100;
  for (const int64_t columns : {1, 15, 16, 31, 32, 33, 100, 257}) {
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
      for (const int64_t outliers : {int64_t{0}, int64_t{1}, (columns + 6) / 7}) {
        const RandomPackedWeight weight({37, columns, planes, outliers, seed % 2 == 0, seed % 3 == 0}, seed);
        ++seed;
        const PackedWeightView view = weight.view();
        const std::vector<double> expected = reference_dequantize(view);
        const std::vector<float> first = dequantize_with(*supported_kernels().back(), view);
        for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(first[i], expected[i], 1e-6);
        for (const KernelTable* table : supported_kernels()) {
          EXPECT_EQ(dequantize_with(*table, view), first) << table->name;  // every bit
        }
      }
    }
  }
}

TEST(Dequantize, RoundsToTheAskedType) {
  const RandomPackedWeight weight({33, 83, 3, 2, true, true}, 1);
  const PackedWeightView view = weight.view();
  for (const KernelTable* table : supported_kernels()) {
    const std::vector<float> exact = dequantize_with(*table, view);
    std::vector<float> scratch(view.words * kColumnsPerWord);
    for (int64_t n = 0; n < view.out_features; ++n) {
      std::vector<uint16_t> row(view.in_features + 1, 0x1234);
      table->codec.dequantize_row(view, n, scratch.data(), row.data(), ElementType::kFloat16);
      for (int64_t k = 0; k < view.in_features; ++k) {
        EXPECT_EQ(row[k], float16_bits(exact[n * view.in_features + k])) << table->name;
      }
      EXPECT_EQ(row.back(), 0x1234) << table->name;
      table->codec.dequantize_row(view, n, scratch.data(), row.data(), ElementType::kBFloat16);
      for (int64_t k = 0; k < view.in_features; ++k) {
        const float value = exact[n * view.in_features + k];
        EXPECT_LE(std::fabs(bfloat16_value(row[k]) - value), std::fabs(value) / 256) << table->name;
      }
      EXPECT_EQ(row.back(), 0x1234) << table->name;
    }
  }
}

TEST(Dequantize, SkipsColumnsOutOfRange) {
  RandomPackedWeight weight({32, 40, 2, 3, true, false}, 2);
  const std::vector<double> expected = [&] {
    PackedWeightView without = weight.view();
    without.outliers = 0;
    return reference_dequantize(without);
  }();
  for (size_t i = 0; i < weight.outlier_columns.size(); ++i) {
    weight.outlier_columns[i] = static_cast<uint16_t>(i % 2 == 0 ? 65535 : 40 + i);
    weight.outlier_deltas[i] = -128;
  }
  for (const KernelTable* table : supported_kernels()) {
    const std::vector<float> dense = dequantize_with(*table, weight.view());
    for (size_t i = 0; i < dense.size(); ++i) EXPECT_NEAR(dense[i], expected[i], 1e-6) << table->name;
  }
}

TEST(Dequantize, AddsUpOutliersOfOneColumn) {
  RandomPackedWeight weight({32, 40, 2, 3, false, false}, 3);
  for (uint16_t& column : weight.outlier_columns) column = 17;
  const std::vector<double> expected = reference_dequantize(weight.view());
  for (const KernelTable* table : supported_kernels()) {
    const std::vector<float> dense = dequantize_with(*table, weight.view());
    for (size_t i = 0; i < dense.size(); ++i) EXPECT_NEAR(dense[i], expected[i], 1e-6) << table->name;
  }
}

TEST(Dequantize, ScalesThatAreNotNumbersStayInTheirRow) {
  RandomPackedWeight weight({40, 50, 3, 2, true, true}, 4);
  weight.scale(5, 1) = 0x7e00;        // NaN
  weight.scale(6, 0) = 0x7c00;        // infinity
  weight.outlier_scales[7] = 0xfe00;  // NaN
  weight.means[8] = 0x7e00;           // NaN
  const std::vector<double> expected = reference_dequantize(weight.view());
  for (const KernelTable* table : supported_kernels()) {
    const std::vector<float> dense = dequantize_with(*table, weight.view());
    for (size_t i = 0; i < dense.size(); ++i) {
      if (std::isfinite(expected[i])) {
        EXPECT_NEAR(dense[i], expected[i], 1e-6) << table->name;
      } else {
        EXPECT_FALSE(std::isfinite(dense[i])) << table->name << ", row " << i / 50;
      }
    }
  }
}

// ---- golden bytes ----

template <typename T>
std::vector<T> elements_of_hexadecimal(const std::string& text) {
  std::vector<T> elements(text.size() / 2 / sizeof(T));
  for (size_t i = 0; i < elements.size() * sizeof(T); ++i) {
    const int byte = std::stoi(text.substr(2 * i, 2), nullptr, 16);
    reinterpret_cast<unsigned char*>(elements.data())[i] = static_cast<unsigned char>(byte);
  }
  return elements;
}

std::vector<double> numbers_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<double> numbers;
  for (double number; stream >> number;) numbers.push_back(number);
  return numbers;
}

TEST(Dequantize, DecodesTheGoldenFile) {
  std::ifstream file(std::string(GOLDEN_DIRECTORY) + "/packed_format_v1.txt");
  ASSERT_TRUE(file.is_open()) << GOLDEN_DIRECTORY;
  std::map<std::string, std::string> fields;
  int weights = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.find(' ');
    if (line != "end") {
      fields[line.substr(0, space)] = line.substr(space + 1);
      continue;
    }
    const auto signs = elements_of_hexadecimal<int32_t>(fields["signs"]);
    const auto scales = elements_of_hexadecimal<uint16_t>(fields["scales"]);
    const auto outlier_columns = elements_of_hexadecimal<uint16_t>(fields["outlier_columns"]);
    const auto outlier_deltas = elements_of_hexadecimal<int8_t>(fields["outlier_deltas"]);
    const auto outlier_scales = elements_of_hexadecimal<uint16_t>(fields["outlier_scales"]);
    const auto column_scales = elements_of_hexadecimal<uint16_t>(fields["column_scales"]);
    const auto means = elements_of_hexadecimal<uint16_t>(fields["means"]);
    PackedWeightView view{};
    view.signs = signs.data();
    view.scales = scales.data();
    view.outlier_columns = outlier_columns.data();
    view.outlier_deltas = outlier_deltas.data();
    view.outlier_scales = outlier_scales.data();
    view.column_scales = column_scales.empty() ? nullptr : column_scales.data();
    view.means = means.empty() ? nullptr : means.data();
    view.out_features = std::stoll(fields["out_features"]);
    view.in_features = std::stoll(fields["in_features"]);
    view.planes = std::stoll(fields["planes"]);
    view.outliers = std::stoll(fields["outliers"]);
    view.row_tiles = (view.out_features + kRowsPerTile - 1) / kRowsPerTile;
    view.words = (view.in_features + kColumnsPerWord - 1) / kColumnsPerWord;
    ASSERT_EQ(static_cast<int64_t>(signs.size()), view.row_tiles * view.planes * view.words * kRowsPerTile);
    ASSERT_EQ(static_cast<int64_t>(outlier_deltas.size()), view.row_tiles * view.outliers * kRowsPerTile);
    const std::vector<double> expected = numbers_of(fields["expected"]);
    ASSERT_EQ(static_cast<int64_t>(expected.size()), view.out_features * view.in_features);
    for (const KernelTable* table : supported_kernels()) {
      const std::vector<float> dense = dequantize_with(*table, view);
      for (size_t i = 0; i < dense.size(); ++i) {
        EXPECT_NEAR(dense[i], expected[i], 1e-6 * (1 + std::fabs(expected[i])))
            << table->name << ", " << fields["weight"] << ", row " << i / view.in_features << ", column "
            << i % view.in_features;
      }
    }
    ++weights;
    fields.clear();
  }
  EXPECT_GE(weights, 2);
}

}  // namespace
}  // namespace loop_singular_bit
