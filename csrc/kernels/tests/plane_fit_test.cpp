// The fits inside the quantizer, on the scalar primitives: no round of refinement may raise the cost.
// clang-format off: generic headers come after the primitives they are written in.
#include "simd/scalar.h"
#include "generic/outlier_selection.h"
#include "generic/plane_fit.h"
#include "generic/uniform_fit.h"
// clang-format on

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace loop_singular_bit {
namespace {

constexpr int64_t kColumns = 320;

struct Problem {
  explicit Problem(uint64_t seed) : values(kColumns * kLanes), weights(kColumns) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random) * (seed % 2 == 0 ? normal(random) : 1.0f) + 0.2f;
    for (float& weight : weights) {
      const float root = normal(random);
      weight = 0.2f + root * root;
    }
    tile = {values.data(), kColumns, kColumns};
  }
  std::vector<float> values;
  std::vector<float> weights;
  WeightTile tile;
};

template <typename Fit>
void expect_monotone_refinement() {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Problem problem(seed);
    Fit fit;
    fit.fit(problem.tile, problem.weights.data(), 0);
    F32x16 before = weighted_cost(fit, problem.tile, problem.weights.data());
    for (int round = 0; round < 12; ++round) {
      fit.refine(problem.tile, problem.weights.data(), 1);
      const F32x16 after = weighted_cost(fit, problem.tile, problem.weights.data());
      for (int lane = 0; lane < kLanes; ++lane) {
        EXPECT_LE(after.lane[lane], before.lane[lane] * (1 + 1e-5f)) << "planes " << Fit::kCount << ", round " << round;
      }
      before = after;
    }
  }
}

TEST(PlaneFit, RefinementNeverRaisesTheCost) {
  expect_monotone_refinement<PlaneFit<1, false>>();
  expect_monotone_refinement<PlaneFit<2, false>>();
  expect_monotone_refinement<PlaneFit<3, false>>();
  expect_monotone_refinement<PlaneFit<4, false>>();
  expect_monotone_refinement<PlaneFit<1, true>>();
  expect_monotone_refinement<PlaneFit<2, true>>();
  expect_monotone_refinement<PlaneFit<3, true>>();
  expect_monotone_refinement<PlaneFit<4, true>>();
}

TEST(UniformFit, RefinementNeverRaisesTheCost) {
  expect_monotone_refinement<UniformFit<5, false>>();
  expect_monotone_refinement<UniformFit<8, false>>();
  expect_monotone_refinement<UniformFit<5, true>>();
  expect_monotone_refinement<UniformFit<8, true>>();
}

// Fails for a greedy-only quantizer.
TEST(PlaneFit, RefinementGainsOverTheGreedyStart) {
  const Problem problem(1);
  PlaneFit<2, false> greedy, refined;
  greedy.fit(problem.tile, problem.weights.data(), 0);
  refined.fit(problem.tile, problem.weights.data(), kFitRounds);
  const F32x16 before = weighted_cost(greedy, problem.tile, problem.weights.data());
  const F32x16 after = weighted_cost(refined, problem.tile, problem.weights.data());
  float ratio = 0;
  for (int lane = 0; lane < kLanes; ++lane) ratio += after.lane[lane] / before.lane[lane] / kLanes;
  EXPECT_LT(ratio, 0.93f);
}

TEST(OutlierSelection, TakesTheLargestScoresLowerColumnsFirst) {
  std::mt19937_64 random(5);
  for (const int64_t columns : {int64_t{1}, int64_t{13}, int64_t{100}, kColumns}) {
    const int64_t padded = (columns + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
    for (const uint64_t distinct : {1, 3, 1000000}) {  // few distinct scores: many ties
      for (const int64_t count : {int64_t{1}, (columns + 1) / 2, columns}) {
        std::vector<float> scores(padded * kLanes, float_from_bits(kNanBits));
        std::vector<float> values(padded * kLanes, float_from_bits(kNanBits));
        for (int64_t i = 0; i < columns * kLanes; ++i) {
          scores[i] = static_cast<float>(random() % distinct) * 1e-3f;
          values[i] = static_cast<float>(i);
        }
        std::vector<int32_t> chosen(count * kLanes);
        std::vector<float> chosen_values(count * kLanes);
        const WeightTile tile = {values.data(), columns, padded};
        const OutlierList list = {chosen.data(), chosen_values.data(), count};
        take_outliers(scores.data(), tile, list);
        for (int lane = 0; lane < kLanes; ++lane) {
          std::vector<int32_t> expected(columns);
          for (int64_t k = 0; k < columns; ++k) expected[k] = static_cast<int32_t>(k);
          std::stable_sort(expected.begin(), expected.end(),
                           [&](int32_t a, int32_t b) { return scores[a * kLanes + lane] > scores[b * kLanes + lane]; });
          expected.resize(count);
          std::sort(expected.begin(), expected.end());
          for (int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(chosen[i * kLanes + lane], expected[i]) << columns << " columns, " << count << " wanted";
            ASSERT_EQ(chosen_values[i * kLanes + lane], static_cast<float>(expected[i] * kLanes + lane));
            ASSERT_NE(values[expected[i] * kLanes + lane], values[expected[i] * kLanes + lane]);
          }
        }
        put_outliers_back(tile, list);
        for (int64_t i = 0; i < columns * kLanes; ++i) ASSERT_EQ(values[i], static_cast<float>(i));
      }
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
