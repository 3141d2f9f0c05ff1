// Products, factorization, gradients and descent against plain loops in double, for every instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "dispatch.h"

namespace loop_singular_bit {
namespace {

std::vector<float> random_floats(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

int64_t padded(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns; }

// A well-conditioned second moment, rows padded(columns) apart.
std::vector<float> random_hessian(int64_t columns, uint32_t seed) {
  const int64_t samples = 2 * columns + 8;
  const std::vector<float> inputs = random_floats(samples * columns, seed);
  std::vector<float> hessian(columns * padded(columns), 0.0f);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = 0; k < columns; ++k) {
      double sum = j == k ? 0.1 * samples : 0.0;
      for (int64_t s = 0; s < samples; ++s)
        sum += static_cast<double>(inputs[s * columns + j]) * inputs[s * columns + k];
      hessian[j * padded(columns) + k] = static_cast<float>(sum / samples);
    }
  }
  return hessian;
}

TEST(Calibrated, MultiplyAddIsTheSumOfProducts) {
  for (const KernelTable* table : supported_kernels()) {
    for (const int64_t outputs : {1, 5, 6, 7, 12, 64}) {
      for (const int64_t inputs : {0, 1, 2, 33}) {
        const std::vector<float> matrix = random_floats((inputs + 1) * 70, 1);
        const std::vector<float> x = random_floats((inputs + 1) * 80, 2);
        std::vector<float> y = random_floats(outputs * 72, 3);
        const std::vector<float> before = y;
        table->calibrated.multiply_add(matrix.data(), /*input_stride=*/70, /*output_stride=*/1, inputs, outputs,
                                       x.data(), 80, y.data(), 72);
        for (int64_t o = 0; o < outputs; ++o) {
          for (int64_t lane = 0; lane < 72; ++lane) {
            double expected = before[o * 72 + lane];
            for (int64_t i = 0; i < inputs && lane < kBlockRows; ++i) {
              expected += static_cast<double>(matrix[i * 70 + o]) * x[i * 80 + lane];
            }
            ASSERT_NEAR(y[o * 72 + lane], expected, 1e-4) << table->name << " outputs " << outputs << " lane " << lane;
          }
        }
      }
    }
  }
}

TEST(Calibrated, DotIsTheSumOfProducts) {
  for (const KernelTable* table : supported_kernels()) {
    for (const int64_t columns : {16, 32, 48, 256}) {
      const std::vector<float> row = random_floats(columns, 4);
      const std::vector<float> vector = random_floats(columns, 5);
      double expected = 0;
      for (int64_t k = 0; k < columns; ++k) expected += static_cast<double>(row[k]) * vector[k];
      EXPECT_NEAR(table->calibrated.dot(row.data(), vector.data(), columns), expected, 1e-4) << table->name;
    }
  }
}

TEST(Calibrated, FactorTimesItsTransposeIsTheMatrix) {
  for (const KernelTable* table : supported_kernels()) {
    for (const int64_t columns : {1, 63, 64, 65, 130, 200}) {
      const int64_t stride = padded(columns);
      const std::vector<float> hessian = random_hessian(columns, 6);
      std::vector<float> factor = hessian;
      std::vector<float> negated(kBlockColumns * stride);
      for (int64_t begin = (columns - 1) / kBlockColumns * kBlockColumns; begin >= 0; begin -= kBlockColumns) {
        const int64_t end = begin + kBlockColumns < columns ? begin + kBlockColumns : columns;
        ASSERT_EQ(table->calibrated.factor_diagonal(factor.data(), stride, begin, end), -1);
        for (int64_t lanes = 0; lanes < begin; lanes += kBlockColumns) {
          table->calibrated.factor_panel(factor.data(), stride, begin, end, lanes, negated.data());
        }
        for (int64_t lanes = 0; lanes < begin; lanes += kBlockColumns) {
          table->calibrated.multiply_add(negated.data() + lanes, stride, 1, end - begin, begin - lanes,
                                         factor.data() + begin * stride + lanes, stride,
                                         factor.data() + lanes * stride + lanes, stride);
        }
      }
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t k = 0; k <= j; ++k) {
          double product = 0;
          for (int64_t l = j; l < columns; ++l) {
            product += static_cast<double>(factor[l * stride + j]) * factor[l * stride + k];
          }
          ASSERT_NEAR(product, hessian[j * stride + k], 2e-4) << table->name << " at " << j << ", " << k;
        }
      }
    }
  }
}

TEST(Calibrated, FactorizationNamesTheColumnWithoutAPositivePivot) {
  for (const KernelTable* table : supported_kernels()) {
    std::vector<float> matrix(2 * 64, 0.0f);
    matrix[0] = 1.0f;
    matrix[64 + 1] = 1.0f;
    matrix[64] = 2.0f;
    EXPECT_EQ(table->calibrated.factor_diagonal(matrix.data(), 64, 0, 2), 0) << table->name;
  }
}

// A block with two planes and one outlier a row, at levels that have nothing to do with its weight.
struct Block {
  explicit Block(int64_t columns)
      : columns(columns),
        weight(random_floats(columns * kBlockRows, 7)),
        values(columns * kBlockRows),
        gradient(columns * kBlockRows),
        scales(2 * kBlockRows),
        outlier_columns(kBlockRows),
        deltas(kBlockRows),
        delta_scales(kBlockRows, 0.01f),
        begin(columns + 1, 0),
        slots(kBlockRows) {
    std::mt19937 generator(8);
    for (int64_t row = 0; row < kBlockRows; ++row) {
      scales[row] = 0.75f + row / 128.0f;
      scales[kBlockRows + row] = 0.25f;
      outlier_columns[row] = static_cast<uint16_t>(row % columns);
      deltas[row] = static_cast<float>(static_cast<int>(generator() % 255) - 127);
      ++begin[row % columns + 1];
    }
    for (int64_t k = 0; k < columns; ++k) begin[k + 1] += begin[k];
    std::vector<int32_t> next(begin.begin(), begin.end() - 1);
    for (int64_t row = 0; row < kBlockRows; ++row) slots[next[row % columns]++] = static_cast<int32_t>(row);
    for (int64_t i = 0; i < columns * kBlockRows; ++i) {
      const float first = generator() % 2 == 0 ? 1.0f : -1.0f;
      const float second = generator() % 2 == 0 ? 1.0f : -1.0f;
      values[i] = first * scales[i % kBlockRows] + second * scales[kBlockRows + i % kBlockRows];
    }
  }

  CalibratedBlock view() {
    return {columns,
            2,
            1,
            weight.data(),
            values.data(),
            gradient.data(),
            scales.data(),
            outlier_columns.data(),
            deltas.data(),
            delta_scales.data(),
            begin.data(),
            slots.data()};
  }

  double error(int64_t k, int64_t row, const std::vector<float>& factors) const {
    double value = values[k * kBlockRows + row];
    if (outlier_columns[row] == k) value += static_cast<double>(deltas[row]) * delta_scales[row];
    return weight[k * kBlockRows + row] - factors[k] * value;
  }

  double loss(const std::vector<float>& hessian, const std::vector<float>& factors) const {
    double total = 0;
    for (int64_t row = 0; row < kBlockRows; ++row) {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t k = 0; k < columns; ++k) {
          total += error(j, row, factors) * hessian[j * padded(columns) + k] * error(k, row, factors);
        }
      }
    }
    return total;
  }

  int64_t columns;
  std::vector<float> weight, values, gradient, scales;
  std::vector<uint16_t> outlier_columns;
  std::vector<float> deltas, delta_scales;
  std::vector<int32_t> begin, slots;
};

TEST(Calibrated, StepsLowerTheLossAndKeepTheGradientTrue) {
  for (const KernelTable* table : supported_kernels()) {
    for (const int64_t columns : {3, 64, 71}) {
      Block data(columns);
      const std::vector<float> hessian = random_hessian(columns, 9);
      std::vector<float> factors(columns);
      for (int64_t k = 0; k < columns; ++k)
        factors[k] = 0.9f + 0.2f * static_cast<float>(k) / static_cast<float>(columns);
      const CalibrationProblem problem = {hessian.data(), nullptr, padded(columns), factors.data()};
      std::vector<float> scratch((2 * columns + 2 * kBlockColumns) * kBlockRows);
      const CalibratedBlock block = data.view();
      const CalibratedKernels& kernels = table->calibrated;

      kernels.compute_gradient(block, problem, scratch.data());
      double before = data.loss(hessian, factors);
      EXPECT_NEAR(kernels.loss(block, problem), before, 1e-4 * before);
      for (int step = 0; step < 4; ++step) {
        if (step % 2 == 0) {
          kernels.refit_scales(block, problem, scratch.data());
        } else {
          kernels.descend(block, problem, scratch.data());
        }
        const double after = data.loss(hessian, factors);
        EXPECT_LE(after, before * (1 + 1e-6)) << table->name << " columns " << columns << " step " << step;
        EXPECT_NEAR(kernels.loss(block, problem), after, 1e-3 * after) << table->name << " step " << step;
        if (step < 2) {
          EXPECT_LT(after, 0.99 * before) << table->name << " columns " << columns << " step " << step;
        }
        before = after;
      }
      const std::vector<float> kept = data.gradient;
      kernels.compute_gradient(block, problem, scratch.data());
      for (size_t i = 0; i < kept.size(); ++i) ASSERT_NEAR(kept[i], data.gradient[i], 2e-3) << table->name;
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
