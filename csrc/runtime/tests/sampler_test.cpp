#include "sampler.h"

#include <gtest/gtest.h>

#include <cmath>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

// How often each of five tokens with probabilities .4 .3 .15 .1 .05 is chosen.
std::vector<double> frequencies(SamplingOptions options) {
  constexpr int kDraws = 20000;
  Sampler sampler(options);
  std::vector<double> counts(5, 0.0);
  for (int i = 0; i < kDraws; ++i) {
    float logits[] = {std::log(0.15f), std::log(0.4f), std::log(0.05f), std::log(0.3f), std::log(0.1f)};
    counts[sampler.choose(logits, 5, {})] += 1.0 / kDraws;
  }
  return counts;
}

void expect_near(const std::vector<double>& value, const std::vector<double>& expected) {
  // Four standard deviations of 20,000 draws.
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(value[i], expected[i], 0.014) << i;
}

TEST(Sampler, DrawsByProbability) {
  expect_near(frequencies({.temperature = 1.0}), {0.15, 0.4, 0.05, 0.3, 0.1});
  expect_near(frequencies({.temperature = 1.0, .top_k = 2}), {0, 4.0 / 7, 0, 3.0 / 7, 0});
  expect_near(frequencies({.temperature = 1.0, .top_p = 0.71}), {3.0 / 17, 8.0 / 17, 0, 6.0 / 17, 0});
  expect_near(frequencies({.temperature = 1.0, .top_p = 0.39}), {0, 1, 0, 0, 0});
  // Squares of the probabilities.
  const double sum = 0.0225 + 0.16 + 0.0025 + 0.09 + 0.01;
  expect_near(frequencies({.temperature = 0.5}), {0.0225 / sum, 0.16 / sum, 0.0025 / sum, 0.09 / sum, 0.01 / sum});
}

TEST(Sampler, WithoutTemperatureTheLikeliestWinsAndAmongEqualsTheLower) {
  Sampler sampler({});
  float logits[] = {1.0f, 3.0f, 2.0f, 3.0f};
  EXPECT_EQ(sampler.choose(logits, 4, {}), 1);
}

TEST(Sampler, RepetitionPenaltyCountsATokenOnce) {
  Sampler sampler({.repetition_penalty = 2.0});
  float logits[] = {4.0f, 3.0f, -1.0f};
  EXPECT_EQ(sampler.choose(logits, 3, {0, 0, 2}), 1);
  EXPECT_EQ(logits[0], 2.0f);
  EXPECT_EQ(logits[2], -2.0f);
}

TEST(Sampler, TheWholeVocabularyIsSortedOnlyAsFarAsNeeded) {
  // Even probabilities: top_p needs more than the first stretch that is sorted.
  constexpr int kTokens = 3000;
  Sampler sampler({.temperature = 1.0, .top_p = 0.5, .seed = 3});
  int32_t largest = 0;
  for (int i = 0; i < 500; ++i) {
    std::vector<float> logits(kTokens, 0.0f);
    largest = std::max(largest, sampler.choose(logits.data(), kTokens, {}));
  }
  EXPECT_LT(largest, kTokens / 2 + 1);
  EXPECT_GT(largest, kTokens / 2 - 20);
}

TEST(Sampler, RefusesOptionsOutOfRange) {
  EXPECT_THROW(Sampler({.temperature = -0.1}), Error);
  EXPECT_THROW(Sampler({.temperature = NAN}), Error);
  EXPECT_THROW(Sampler({.top_p = 0.0}), Error);
  EXPECT_THROW(Sampler({.top_p = 1.1}), Error);
  EXPECT_THROW(Sampler({.top_k = -1}), Error);
  EXPECT_THROW(Sampler({.repetition_penalty = 0.0}), Error);
}

}  // namespace
}  // namespace loop_singular_bit::runtime
