// The quantizer: known signal-to-noise ratios, the rules of the format, the same bytes on every instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "dispatch.h"
#include "reference.h"

namespace loop_singular_bit {
namespace {

struct QuantizeOptions {
  int64_t planes = 2;
  int64_t outliers = 0;
  bool means = false;
  std::vector<float> column_scales;  // values of float16, or empty: all 1
  std::vector<float> importance;     // or empty: all 1
  ElementType type = ElementType::kFloat32;
};

int64_t padded_columns(int64_t columns) { return (columns + kColumnPadding - 1) / kColumnPadding * kColumnPadding; }

// What the quantizer writes. Arrays start filled with a pattern, so that what it fails to write is seen.
struct Quantized {
  std::vector<int32_t> signs;
  std::vector<uint16_t> scales, outlier_columns, outlier_scales, means, column_scales;
  std::vector<int8_t> outlier_deltas;
  int64_t failed_row = -1;
  PackedWeightView view{};

  bool operator==(const Quantized& other) const {
    return signs == other.signs && scales == other.scales && outlier_columns == other.outlier_columns &&
           outlier_deltas == other.outlier_deltas && outlier_scales == other.outlier_scales && means == other.means;
  }
};

Quantized quantize_with(const KernelTable& table, const std::vector<float>& weight, int64_t rows,
                        const QuantizeOptions& options) {
  const int64_t columns = static_cast<int64_t>(weight.size()) / rows;
  std::vector<float> inverse_scales(padded_columns(columns), 0.0f);
  std::vector<float> selection_weights(padded_columns(columns), 0.0f);
  std::vector<float> fit_weights(padded_columns(columns), 0.0f);
  for (int64_t k = 0; k < columns; ++k) {
    const float scale = options.column_scales.empty() ? 1.0f : options.column_scales[k];
    inverse_scales[k] = 1.0f / scale;
    selection_weights[k] = scale * scale;
    fit_weights[k] = scale * scale * (options.importance.empty() ? 1.0f : options.importance[k]);
  }
  std::vector<uint16_t> halves;
  if (options.type != ElementType::kFloat32) {
    for (const float value : weight) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      halves.push_back(options.type == ElementType::kFloat16 ? float16_bits(value) : static_cast<uint16_t>(bits >> 16));
    }
  }

  Quantized packed;
  PackedWeightView& view = packed.view;
  view.out_features = rows;
  view.in_features = columns;
  view.planes = options.planes;
  view.outliers = options.outliers;
  view.row_tiles = (rows + kRowsPerTile - 1) / kRowsPerTile;
  view.words = (columns + kColumnsPerWord - 1) / kColumnsPerWord;
  const int64_t padded_rows = view.row_tiles * kRowsPerTile;
  packed.signs.assign(padded_rows * view.planes * view.words, 0x55aa55aa);
  packed.scales.assign(padded_rows * view.planes, 0x55aa);
  packed.outlier_columns.assign(padded_rows * view.outliers, 0x55aa);
  packed.outlier_deltas.assign(padded_rows * view.outliers, 0x55);
  packed.outlier_scales.assign(padded_rows, 0x55aa);
  if (options.means) packed.means.assign(padded_rows, 0x55aa);
  for (const float scale : options.column_scales) packed.column_scales.push_back(float16_bits(scale));
  view.signs = packed.signs.data();
  view.scales = packed.scales.data();
  view.outlier_columns = packed.outlier_columns.data();
  view.outlier_deltas = packed.outlier_deltas.data();
  view.outlier_scales = packed.outlier_scales.data();
  view.means = options.means ? packed.means.data() : nullptr;
  view.column_scales = packed.column_scales.empty() ? nullptr : packed.column_scales.data();

  QuantizeTask task{};
  task.weight = {halves.empty() ? static_cast<const void*>(weight.data()) : halves.data(), columns, options.type};
  task.out_features = rows;
  task.in_features = columns;
  task.planes = options.planes;
  task.outliers = options.outliers;
  task.means = options.means;
  task.fit_rounds = kFitRounds;
  task.inverse_column_scales = inverse_scales.data();
  task.fit_weights = fit_weights.data();
  task.selection_weights = selection_weights.data();
  task.signs = packed.signs.data();
  task.scales = packed.scales.data();
  task.outlier_columns = packed.outlier_columns.data();
  task.outlier_deltas = packed.outlier_deltas.data();
  task.outlier_scales = packed.outlier_scales.data();
  task.row_means = options.means ? packed.means.data() : nullptr;
  std::vector<float> scratch(kQuantizeScratchPerColumn * padded_columns(columns) +
                             kQuantizeScratchPerOutlier * options.outliers);
  packed.failed_row = table.codec.quantize(task, 0, view.row_tiles, scratch.data());
  return packed;
}

std::vector<float> random_weight(int64_t count, uint64_t seed, bool laplace = false) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::exponential_distribution<float> exponential;
  std::vector<float> weight(count);
  for (float& value : weight) {
    value = laplace ? (random() & 1 ? 1.0f : -1.0f) * exponential(random) : normal(random);
  }
  return weight;
}

double sqnr_db(const std::vector<float>& weight, const Quantized& packed) {
  const std::vector<double> restored = reference_dequantize(packed.view);
  double signal = 0, noise = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    signal += static_cast<double>(weight[i]) * weight[i];
    noise += (weight[i] - restored[i]) * (weight[i] - restored[i]);
  }
  return 10 * std::log10(signal / noise);
}

double stored_scale(const Quantized& packed, int64_t row, int64_t plane) {
  return plane_scale(packed.view, row, plane);
}

int64_t outlier_slot(const Quantized& packed, int64_t row, int64_t i) {
  return (row / kRowsPerTile * packed.view.outliers + i) * kRowsPerTile + row % kRowsPerTile;
}

TEST(Quantize, ReachesTheKnownSignalToNoiseRatios) {
  const double gaussian[] = {4.40, 9.30, 14.30};
  const double laplace[] = {3.01, 7.55, 12.50};
  constexpr int64_t kRows = 64;
  const std::vector<float> normal_weight = random_weight(kRows * 4096, 1);
  const std::vector<float> laplace_weight = random_weight(kRows * 4096, 2, /*laplace=*/true);
  const KernelTable& table = *supported_kernels().front();
  for (int planes = 1; planes <= 3; ++planes) {
    QuantizeOptions options;
    options.planes = planes;
    EXPECT_NEAR(sqnr_db(normal_weight, quantize_with(table, normal_weight, kRows, options)), gaussian[planes - 1], 0.1);
    EXPECT_NEAR(sqnr_db(laplace_weight, quantize_with(table, laplace_weight, kRows, options)), laplace[planes - 1],
                0.1);
  }
  // Four planes have many local optima; these are the bars of a greedy start.
  QuantizeOptions options;
  options.planes = 4;
  EXPECT_GT(sqnr_db(normal_weight, quantize_with(table, normal_weight, kRows, options)), 19.2);
  EXPECT_GT(sqnr_db(laplace_weight, quantize_with(table, laplace_weight, kRows, options)), 16.2);
  double before = 0;
  for (int planes = 5; planes <= 8; ++planes) {
    options.planes = planes;
    const double ratio = sqnr_db(normal_weight, quantize_with(table, normal_weight, kRows, options));
    EXPECT_GT(ratio, std::max(before + 5, 24.3)) << planes << " planes";
    before = ratio;
  }
}

TEST(Quantize, SameBytesOnEveryInstructionSet) {
  const struct {
    int64_t rows, columns;
  } shapes[] = {{1, 1}, {5, 7}, {33, 100}, {64, 257}, {40, 1000}};
  uint64_t seed = 10;
  for (const auto& shape : shapes) {
    ++seed;
    std::vector<float> weight = random_weight(shape.rows * shape.columns, seed, seed % 2 == 0);
    weight[weight.size() / 2] *= 100;
    std::vector<float> scales, importance;
    for (int64_t k = 0; k < shape.columns; ++k) {
      scales.push_back(static_cast<float>(float16_value(float16_bits(0.5 + k % 7 * 0.25))));
      importance.push_back(0.25f + k % 5);
    }
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
      for (int64_t outliers : {int64_t{0}, int64_t{1}, (shape.columns + 127) / 128, shape.columns}) {
        QuantizeOptions options;
        options.planes = planes;
        options.outliers = outliers;
        options.means = (planes + outliers) % 2 == 1;
        options.type = static_cast<ElementType>(planes % 3);
        if (planes % 2 == 0) options.column_scales = scales;
        if (planes % 4 == 0) options.importance = importance;
        const Quantized expected = quantize_with(*supported_kernels().back(), weight, shape.rows, options);
        EXPECT_EQ(expected.failed_row, -1);
        for (const KernelTable* table : supported_kernels()) {
          EXPECT_TRUE(quantize_with(*table, weight, shape.rows, options) == expected)
              << table->name << ", " << shape.rows << " x " << shape.columns << ", planes " << planes << ", outliers "
              << outliers;
        }
      }
    }
  }
}

TEST(Quantize, EveryElementTypeGivesTheSameBytesForTheSameNumbers) {
  std::vector<float> weight(40 * 70);
  std::mt19937_64 random(3);
  for (float& value : weight) value = static_cast<float>(static_cast<int>(random() % 255) - 127) / 64;  // exact in all
  QuantizeOptions options;
  options.outliers = 2;
  for (const KernelTable* table : supported_kernels()) {
    options.type = ElementType::kFloat32;
    const Quantized expected = quantize_with(*table, weight, 40, options);
    for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
      options.type = type;
      EXPECT_TRUE(quantize_with(*table, weight, 40, options) == expected) << table->name;
    }
  }
}

TEST(Quantize, ScalesKeepTheRulesOfTheFormat) {
  constexpr int64_t kRows = 70;
  for (const bool laplace : {false, true}) {
    std::vector<float> weight = random_weight(kRows * 300, 4, laplace);
    for (float& value : weight) value *= 0.03f;
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
      QuantizeOptions options;
      options.planes = planes;
      options.outliers = 3;
      const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
      for (int64_t row = 0; row < kRows; ++row) {
        double sum = 0;
        for (int64_t p = 0; p < planes; ++p) {
          sum += stored_scale(packed, row, p);
          EXPECT_GE(stored_scale(packed, row, p), 0);
          if (p > 0) {
            EXPECT_LE(stored_scale(packed, row, p), stored_scale(packed, row, p - 1));
          }
        }
        if (planes > 4) {
          for (int64_t p = 1; p < planes; ++p) {
            EXPECT_EQ(stored_scale(packed, row, p - 1), 2 * stored_scale(packed, row, p));
          }
          continue;
        }
        double multiples = 0;
        for (int64_t p = 0; p < planes; ++p) {
          const double multiple = std::round(126 * stored_scale(packed, row, p) / sum);
          EXPECT_NEAR(stored_scale(packed, row, p), multiple * sum / 126, stored_scale(packed, row, p) / 1000);
          multiples += multiple;
        }
        EXPECT_EQ(multiples, 126);
      }
    }
  }
}

TEST(Quantize, SignsAreNearestUnderTheStoredScales) {
  constexpr int64_t kRows = 32;
  constexpr int64_t kColumns = 200;
  const std::vector<float> weight = random_weight(kRows * kColumns, 5);
  for (const bool means : {false, true}) {
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
      QuantizeOptions options;
      options.planes = planes;
      options.means = means;
      const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
      const std::vector<double> restored = reference_dequantize(packed.view);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t k = 0; k < kColumns; ++k) {
          const double value = weight[row * kColumns + k] - (means ? float16_value(packed.means[row]) : 0);
          double nearest = std::numeric_limits<double>::infinity();
          for (int pattern = 0; pattern < 1 << planes; ++pattern) {
            double level = 0;
            for (int64_t p = 0; p < planes; ++p) {
              level += (pattern >> p & 1 ? 1 : -1) * stored_scale(packed, row, p);
            }
            nearest = std::min(nearest, std::fabs(value - level));
          }
          ASSERT_LE(std::fabs(weight[row * kColumns + k] - restored[row * kColumns + k]), nearest + 1e-6);
        }
      }
    }
  }
}

TEST(Quantize, OutliersAscendAndAreExactToHalfAStep) {
  constexpr int64_t kRows = 48;
  constexpr int64_t kColumns = 150;
  const std::vector<float> weight = random_weight(kRows * kColumns, 6, /*laplace=*/true);
  for (const int64_t outliers : {int64_t{1}, int64_t{5}, int64_t{80}, kColumns}) {
    for (int64_t planes = 1; planes <= 5; ++planes) {
      QuantizeOptions options;
      options.planes = planes;
      options.outliers = outliers;
      const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
      const std::vector<double> restored = reference_dequantize(packed.view);
      for (int64_t row = 0; row < kRows; ++row) {
        const double half_step = float16_value(packed.outlier_scales[row]) / 2;
        for (int64_t i = 0; i < outliers; ++i) {
          const int64_t column = packed.outlier_columns[outlier_slot(packed, row, i)];
          ASSERT_LT(column, kColumns);
          if (i > 0) {
            ASSERT_GT(column, packed.outlier_columns[outlier_slot(packed, row, i - 1)]);
          }
          const int64_t at = row * kColumns + column;
          EXPECT_LE(std::fabs(weight[at] - restored[at]), half_step * 1.01 + 1e-6);
        }
      }
    }
  }
}

// The planes' own residuals, column by column, without what the outliers add.
std::vector<double> plane_residuals(const std::vector<float>& weight, const Quantized& packed) {
  PackedWeightView planes_only = packed.view;
  planes_only.outliers = 0;
  std::vector<double> residuals = reference_dequantize(planes_only);
  for (size_t i = 0; i < residuals.size(); ++i) residuals[i] = std::fabs(weight[i] - residuals[i]);
  return residuals;
}

TEST(Quantize, OutliersAreWhatThePlanesLeaveBehind) {
  constexpr int64_t kRows = 32;
  constexpr int64_t kColumns = 512;
  constexpr int64_t kOutliers = 4;
  const std::vector<float> weight = random_weight(kRows * kColumns, 7);
  for (int64_t planes = 1; planes <= 4; ++planes) {
    QuantizeOptions options;
    options.planes = planes;
    options.outliers = kOutliers;
    const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
    const std::vector<double> residuals = plane_residuals(weight, packed);
    int64_t among_largest = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      std::vector<double> sorted(residuals.begin() + row * kColumns, residuals.begin() + (row + 1) * kColumns);
      std::sort(sorted.begin(), sorted.end(), std::greater<double>());
      for (int64_t i = 0; i < kOutliers; ++i) {
        const int64_t column = packed.outlier_columns[outlier_slot(packed, row, i)];
        among_largest += residuals[row * kColumns + column] >= sorted[2 * kOutliers];
      }
    }
    // The scales still move after the choice; all but a few stay among the largest.
    EXPECT_GE(among_largest, kRows * kOutliers * 9 / 10) << planes << " planes";
    QuantizeOptions without = options;
    without.outliers = 0;
    EXPECT_GT(sqnr_db(weight, packed),
              sqnr_db(weight, quantize_with(*supported_kernels().front(), weight, kRows, without)) + 0.3);
  }
}

TEST(Quantize, OneHugeWeightDoesNotSpoilItsRow) {
  constexpr int64_t kRows = 32;
  constexpr int64_t kColumns = 1536;
  std::vector<float> weight = random_weight(kRows * kColumns, 8);
  for (int64_t row = 0; row < kRows; ++row) weight[row * kColumns + 100 + row] = row % 2 == 0 ? 1e4f : -170.0f;
  const double bars[] = {4.4, 9.3, 14.2, 19.0, 24.0, 29.0};
  for (int64_t planes = 1; planes <= 6; ++planes) {
    QuantizeOptions options;
    options.planes = planes;
    options.outliers = 12;
    const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
    const std::vector<double> restored = reference_dequantize(packed.view);
    double signal = 0, noise = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t k = 0; k < kColumns; ++k) {
        const int64_t i = row * kColumns + k;
        if (k == 100 + row) {
          EXPECT_NEAR(restored[i], weight[i], 0.01 * std::fabs(weight[i]));
        } else if (std::find_if(packed.outlier_columns.begin(), packed.outlier_columns.end(),
                                [&](uint16_t column) { return column == k; }) == packed.outlier_columns.end()) {
          signal += static_cast<double>(weight[i]) * weight[i];
          noise += (weight[i] - restored[i]) * (weight[i] - restored[i]);
        }
      }
    }
    EXPECT_GT(10 * std::log10(signal / noise), bars[planes - 1]) << planes << " planes";
  }
}

TEST(Quantize, ImportanceLowersTheWeightedError) {
  constexpr int64_t kRows = 64;
  constexpr int64_t kColumns = 512;
  const std::vector<float> weight = random_weight(kRows * kColumns, 9, /*laplace=*/true);
  QuantizeOptions options;
  for (int64_t k = 0; k < kColumns; ++k) options.importance.push_back(k % 8 == 0 ? 20.0f : 0.1f);
  for (int64_t planes = 1; planes <= 4; ++planes) {
    options.planes = planes;
    QuantizeOptions plain = options;
    plain.importance.clear();
    const auto weighted_error = [&](const QuantizeOptions& chosen) {
      const std::vector<double> restored =
          reference_dequantize(quantize_with(*supported_kernels().front(), weight, kRows, chosen).view);
      double error = 0;
      for (size_t i = 0; i < weight.size(); ++i) {
        error += options.importance[i % kColumns] * (weight[i] - restored[i]) * (weight[i] - restored[i]);
      }
      return error;
    };
    EXPECT_LT(weighted_error(options), weighted_error(plain)) << planes << " planes";
  }
}

TEST(Quantize, MeansPayOnShiftedRows) {
  constexpr int64_t kRows = 40;
  std::vector<float> weight = random_weight(kRows * 400, 11);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] += static_cast<float>(i / 400 % 5) - 2;
  for (int64_t planes = 1; planes <= 6; ++planes) {
    QuantizeOptions options;
    options.planes = planes;
    const double without = sqnr_db(weight, quantize_with(*supported_kernels().front(), weight, kRows, options));
    options.means = true;
    EXPECT_GT(sqnr_db(weight, quantize_with(*supported_kernels().front(), weight, kRows, options)), without + 0.5)
        << planes << " planes";
  }
}

TEST(Quantize, DegenerateRows) {
  constexpr int64_t kColumns = 37;
  std::vector<float> weight(7 * kColumns);
  for (int64_t k = 0; k < kColumns; ++k) {
    weight[1 * kColumns + k] = 0.37f;
    weight[2 * kColumns + k] = k % 2 == 0 ? 0.37f : -0.37f;
    weight[3 * kColumns + k] = k == 5 ? -3.0f : 0.0f;
    weight[4 * kColumns + k] = 1e-6f * static_cast<float>(k % 3);
    weight[5 * kColumns + k] = 6e4f;
    weight[6 * kColumns + k] = 1e-30f;
  }
  for (const KernelTable* table : supported_kernels()) {
    for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
      for (const int64_t outliers : {int64_t{0}, int64_t{1}, kColumns}) {
        for (const bool means : {false, true}) {
          QuantizeOptions options;
          options.planes = planes;
          options.outliers = outliers;
          options.means = means;
          const Quantized packed = quantize_with(*table, weight, 7, options);
          ASSERT_EQ(packed.failed_row, -1) << table->name << ", planes " << planes;
          const std::vector<double> restored = reference_dequantize(packed.view);
          for (int64_t k = 0; k < kColumns; ++k) {
            EXPECT_EQ(restored[k], 0);
            EXPECT_NEAR(restored[1 * kColumns + k], 0.37, 4e-4);
            if (!means) {
              EXPECT_NEAR(restored[2 * kColumns + k], weight[2 * kColumns + k], 4e-4);
            }
            if (outliers > 0) {
              EXPECT_NEAR(restored[3 * kColumns + k], weight[3 * kColumns + k], 2e-3);
            }
            EXPECT_NEAR(restored[4 * kColumns + k], weight[4 * kColumns + k], 1.5e-6);
            EXPECT_NEAR(restored[5 * kColumns + k], 6e4, 50);
            EXPECT_NEAR(restored[6 * kColumns + k], 0, 1e-7);
          }
        }
      }
    }
  }
}

TEST(Quantize, OneColumn) {
  const std::vector<float> weight = random_weight(50, 12);
  for (int64_t planes = 1; planes <= kMaxPlanes; ++planes) {
    QuantizeOptions options;
    options.planes = planes;
    const std::vector<double> restored =
        reference_dequantize(quantize_with(*supported_kernels().front(), weight, 50, options).view);
    for (size_t i = 0; i < weight.size(); ++i) EXPECT_NEAR(restored[i], weight[i], std::fabs(weight[i]) / 500);
  }
}

TEST(Quantize, SumsStayAccurateOverTheWidestRows) {
  std::vector<float> weight(kMaxInFeatures);
  std::mt19937_64 random(13);
  double sum = 0;
  for (float& value : weight) {
    value = 1 + static_cast<float>(random() % 1000) / 10000;
    sum += value;
  }
  for (const KernelTable* table : supported_kernels()) {
    QuantizeOptions options;
    options.planes = 1;
    const Quantized packed = quantize_with(*table, weight, 1, options);
    EXPECT_EQ(packed.scales[0], float16_bits(sum / kMaxInFeatures)) << table->name;
  }
}

TEST(Quantize, PaddingIsZero) {
  constexpr int64_t kRows = 37;
  constexpr int64_t kColumns = 45;
  const std::vector<float> weight = random_weight(kRows * kColumns, 14);
  for (int64_t planes : {1, 2, 4, 6}) {
    QuantizeOptions options;
    options.planes = planes;
    options.outliers = 2;
    options.means = true;
    const Quantized packed = quantize_with(*supported_kernels().front(), weight, kRows, options);
    for (int64_t row = kRows; row < 64; ++row) {
      EXPECT_EQ(packed.outlier_scales[row], 0);
      EXPECT_EQ(packed.means[row], 0);
      for (int64_t p = 0; p < planes; ++p) EXPECT_EQ(stored_scale(packed, row, p), 0);
      for (int64_t i = 0; i < 2; ++i) {
        EXPECT_EQ(packed.outlier_columns[outlier_slot(packed, row, i)], 0);
        EXPECT_EQ(packed.outlier_deltas[outlier_slot(packed, row, i)], 0);
      }
    }
    for (int64_t row = 0; row < 64; ++row) {
      for (int64_t p = 0; p < planes; ++p) {
        for (int64_t k = row < kRows ? kColumns : 0; k < 64; ++k) {
          EXPECT_FALSE(sign_is_positive(packed.view, row, p, k)) << row << " " << p << " " << k;
        }
      }
    }
  }
}

TEST(Quantize, NamesTheFirstRowThatCannotBeStored) {
  const float bad_values[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(), 1e9f, 3e38f};
  for (const KernelTable* table : supported_kernels()) {
    for (const float bad : bad_values) {
      for (int64_t planes : {1, 2, 4, 6}) {
        for (const int64_t outliers : {0, 1}) {
          std::vector<float> weight = random_weight(70 * 20, 15);
          weight[41 * 20 + 7] = bad;
          weight[60 * 20 + 3] = bad;
          QuantizeOptions options;
          options.planes = planes;
          options.outliers = outliers;
          EXPECT_EQ(quantize_with(*table, weight, 70, options).failed_row, 41)
              << table->name << ", " << bad << ", planes " << planes << ", outliers " << outliers;
        }
      }
    }
  }
}

TEST(ColumnScales, LargestMagnitudeSeesWhatIsNotFinite) {
  for (const KernelTable* table : supported_kernels()) {
    for (const int64_t columns : {1, 16, 37}) {
      std::vector<float> weight = random_weight(9 * columns, 16);
      weight[5 * columns] = -12.5f;
      const DenseRows rows = {weight.data(), columns, ElementType::kFloat32};
      EXPECT_EQ(table->codec.largest_magnitude(rows, columns, 0, 9), 12.5f) << table->name;
      EXPECT_LT(table->codec.largest_magnitude(rows, columns, 0, 5), 12.5f) << table->name;
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        weight[8 * columns + columns - 1] = bad;
        EXPECT_EQ(table->codec.largest_magnitude(rows, columns, 0, 9), -1.0f) << table->name;
      }
    }
  }
}

TEST(ColumnScales, AccumulatesProjections) {
  constexpr int64_t kRows = 21;
  constexpr int64_t kColumns = 77;
  const std::vector<float> weight = random_weight(kRows * kColumns, 17);
  std::vector<float> projection(padded_columns(kColumns), 0.0f);
  for (int64_t k = 0; k < kColumns; ++k) projection[k] = 0.01f * static_cast<float>(k % 9 + 1);
  std::vector<double> expected(kColumns, 0.0);
  double squares = 0;
  for (int64_t n = 2; n < kRows; ++n) {
    double r = 0;
    for (int64_t k = 0; k < kColumns; ++k) r += 0.5 * std::fabs(weight[n * kColumns + k]) * projection[k];
    for (int64_t k = 0; k < kColumns; ++k) expected[k] += r * 0.5 * std::fabs(weight[n * kColumns + k]);
    squares += r * r;
  }
  std::vector<float> first;
  for (const KernelTable* table : supported_kernels()) {
    std::vector<float> sums(padded_columns(kColumns), 99.0f);
    const DenseRows rows = {weight.data(), kColumns, ElementType::kFloat32};
    const float square_sum =
        table->codec.accumulate_column_scales(rows, kColumns, 2, kRows, 0.5f, projection.data(), sums.data());
    EXPECT_NEAR(square_sum, squares, 1e-5 * squares);
    for (int64_t k = 0; k < kColumns; ++k) EXPECT_NEAR(sums[k], expected[k], 1e-5 * expected[k]) << table->name;
    sums.push_back(square_sum);
    if (first.empty()) first = sums;
    EXPECT_EQ(sums, first) << table->name;
  }
}

}  // namespace
}  // namespace loop_singular_bit
