// Attention, normalization, rotation, gating and dense products of every table against plain loops in double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "dispatch.h"
#include "reference.h"

namespace loop_singular_bit {
namespace {

std::vector<float> random_floats(int64_t count, std::mt19937& random, float size = 1.0f) {
  std::normal_distribution<float> normal(0.0f, size);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// One head's cache, filled by the kernel under test.
struct Cache {
  Cache(const DecoderKernels& kernels, CacheType type, int64_t head_dim, int64_t positions, std::mt19937& random)
      : keys(random_floats(positions * head_dim, random)),
        values(random_floats(positions * head_dim, random)),
        // Garbage where nothing was written: it must not show.
        key_memory(padded(positions) * head_dim, 1e30f),
        value_memory(padded(positions) * padded(head_dim), 1e30f),
        scales(2 * padded(positions), 1.0f) {
    head.keys = key_memory.data();
    head.values = value_memory.data();
    head.key_scales = scales.data();
    head.value_scales = scales.data() + padded(positions);
    head.type = type;
    head.head_dim = head_dim;
    head.value_stride = padded(head_dim);
    for (int64_t i = 0; i < positions; ++i) {
      kernels.append(head, i, keys.data() + i * head_dim, values.data() + i * head_dim);
    }
  }

  std::vector<float> keys, values;
  std::vector<float> key_memory, value_memory, scales;  // floats hold the smaller types as well
  CachedHead head{};
};

std::vector<double> reference_attention(const Cache& cache, const AttentionQuery& query) {
  const int64_t dim = cache.head.head_dim;
  std::vector<double> scores;
  double largest = -INFINITY;
  for (int64_t i = query.begin; i < query.end; ++i) {
    double score = 0.0;
    for (int64_t d = 0; d < dim; ++d) score += double{query.query[d]} * cache.keys[i * dim + d];
    scores.push_back(score);
    largest = std::max(largest, score);
  }
  double sum = 0.0;
  std::vector<double> output(dim, 0.0);
  for (int64_t i = query.begin; i < query.end; ++i) {
    const double probability = std::exp(scores[i - query.begin] - largest);
    sum += probability;
    for (int64_t d = 0; d < dim; ++d) output[d] += probability * cache.values[i * dim + d];
  }
  for (double& value : output) value /= sum;
  return output;
}

class DecoderKernelsTest : public testing::TestWithParam<const KernelTable*> {
 protected:
  const DecoderKernels& kernels() const { return GetParam()->decoder; }
  std::mt19937 random_{7};
};

TEST_P(DecoderKernelsTest, AttentionIsThatOfPlainLoops) {
  // Rounding of keys and values to the cache's type, relative to values of size 1.
  const std::pair<CacheType, double> types[] = {
      {CacheType::kFloat32, 1e-5}, {CacheType::kFloat16, 5e-3}, {CacheType::kInt8, 0.15}};
  for (const auto& [type, bound] : types) {
    for (const int64_t head_dim : {16, 24, 64, 80, 128}) {
      for (const int64_t positions : {1, 15, 16, 17, 70}) {
        const Cache cache(kernels(), type, head_dim, positions, random_);
        for (const int64_t count : {1, 3, 4, 6}) {
          std::vector<float> vectors = random_floats(count * head_dim, random_, 0.2f);
          const std::vector<float> queries = vectors;
          std::vector<AttentionQuery> batch;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t end = std::max<int64_t>(1, positions - (count - 1 - i));
            // Every other query sees a window only; results replace the queries.
            const int64_t begin = i % 2 == 0 ? 0 : std::max<int64_t>(0, end - 5);
            batch.push_back({vectors.data() + i * head_dim, vectors.data() + i * head_dim, begin, end});
          }
          std::vector<float> scratch(kQueriesPerPass * (positions + 32));
          kernels().attend(cache.head, batch.data(), count, scratch.data());
          for (int64_t i = 0; i < count; ++i) {
            AttentionQuery original = batch[i];
            original.query = queries.data() + i * head_dim;
            const std::vector<double> expected = reference_attention(cache, original);
            for (int64_t d = 0; d < head_dim; ++d) {
              ASSERT_NEAR(vectors[i * head_dim + d], expected[d], bound)
                  << GetParam()->name << " head_dim " << head_dim << " positions " << positions << " query " << i;
            }
          }
        }
      }
    }
  }
}

TEST_P(DecoderKernelsTest, CachesRoundToNearest) {
  const int64_t dim = 33;
  const Cache half(kernels(), CacheType::kFloat16, dim, 1, random_);
  const Cache code(kernels(), CacheType::kInt8, dim, 1, random_);
  float largest = 0.0f;
  for (const float value : code.values) largest = std::max(largest, std::fabs(value));
  for (int64_t d = 0; d < dim; ++d) {
    const uint16_t bits = static_cast<const uint16_t*>(half.head.values)[d];
    EXPECT_EQ(bits, float16_bits(half.values[d]));
    const double value = static_cast<const int8_t*>(code.head.values)[d] * double{code.head.value_scales[0]};
    EXPECT_NEAR(value, code.values[d], 0.501 * largest / 127);
  }
}

TEST_P(DecoderKernelsTest, NormalizationIsThatOfPlainLoops) {
  for (const int64_t count : {1, 16, 24, 100, 4096}) {
    const std::vector<float> input = random_floats(count, random_, 3.0f);
    const std::vector<float> weight = random_floats(count, random_);
    double squares = 0.0;
    for (const float value : input) squares += double{value} * value;
    const double factor = 1.0 / std::sqrt(squares / count + 1e-5);
    std::vector<float> output = input;
    kernels().normalize(output.data(), weight.data(), count, 1e-5f, output.data());
    for (int64_t i = 0; i < count; ++i) {
      const double expected = input[i] * factor * weight[i];
      ASSERT_NEAR(output[i], expected, 1e-5 * std::fabs(expected) + 1e-12);
    }
  }
}

TEST_P(DecoderKernelsTest, RotationIsThatOfPlainLoops) {
  for (const int64_t count : {2, 16, 24, 128}) {
    std::vector<float> vector = random_floats(count, random_);
    const std::vector<float> before = vector;
    std::vector<float> cosines, sines;
    for (int64_t i = 0; i < count / 2; ++i) {
      cosines.push_back(std::cos(0.3f * i));
      sines.push_back(std::sin(0.3f * i));
    }
    kernels().rotate(cosines.data(), sines.data(), count, vector.data());
    for (int64_t i = 0; i < count / 2; ++i) {
      const double a = before[i], b = before[count / 2 + i];
      ASSERT_NEAR(vector[i], a * cosines[i] - b * sines[i], 1e-6);
      ASSERT_NEAR(vector[count / 2 + i], b * cosines[i] + a * sines[i], 1e-6);
    }
  }
}

TEST_P(DecoderKernelsTest, GatingIsThatOfPlainLoops) {
  for (const int64_t count : {1, 16, 37}) {
    std::vector<float> gate = random_floats(count, random_, 20.0f);
    gate[0] = -200.0f;
    const std::vector<float> before = gate;
    const std::vector<float> up = random_floats(count, random_);
    kernels().gate(up.data(), count, gate.data());
    for (int64_t i = 0; i < count; ++i) {
      const double expected = before[i] / (1.0 + std::exp(-double{before[i]})) * up[i];
      ASSERT_NEAR(gate[i], expected, 1e-6 * std::fabs(expected) + 1e-30) << before[i];
    }
  }
}

TEST_P(DecoderKernelsTest, DenseProductsAreThoseOfPlainLoops) {
  const int64_t rows = 9, tokens = 6;
  for (const int64_t columns : {1, 16, 50}) {
    const std::vector<float> weight = random_floats(rows * columns, random_);
    const std::vector<float> input = random_floats(tokens * columns, random_);
    const std::vector<float> bias = random_floats(rows, random_);
    std::vector<uint16_t> halves(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) halves[i] = float16_bits(weight[i]);
    for (const bool is_half : {false, true}) {
      std::vector<float> output(tokens * rows, 0.0f);
      kernels().dense_linear(is_half ? static_cast<const void*>(halves.data()) : weight.data(),
                             is_half ? ElementType::kFloat16 : ElementType::kFloat32, columns, 0, rows, input.data(),
                             columns, tokens, bias.data(), output.data(), rows);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = 0; n < rows; ++n) {
          double expected = bias[n];
          for (int64_t k = 0; k < columns; ++k) {
            const double w = is_half ? float16_value(halves[n * columns + k]) : weight[n * columns + k];
            expected += w * input[t * columns + k];
          }
          ASSERT_NEAR(output[t * rows + n], expected, 1e-4);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryTable, DecoderKernelsTest, testing::ValuesIn(supported_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace loop_singular_bit
