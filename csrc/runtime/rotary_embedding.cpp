#include "rotary_embedding.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr double kDefaultTheta = 10000.0;  // of Transformers' configuration classes
constexpr double kMostPositions = 4294967296.0;
constexpr double kDefaultBetaFast = 32.0;
constexpr double kDefaultBetaSlow = 1.0;

double positive(const Json& value) {
  if (!(value.number() > 0.0) || !std::isfinite(value.number())) {
    fail(ErrorKind::kCheckpoint, value.where(), ": expected a positive number, got ", value.number());
  }
  return value.number();
}

// null counts as left out.
double positive_or(const Json& object, const char* key, double fallback) {
  const Json* value = object.find(key);
  return value == nullptr ? fallback : positive(*value);
}

std::vector<float> unscaled_frequencies(double theta, int64_t head_dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    frequencies.push_back(1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
  return frequencies;
}

// The tokens of pre-training, which the scalings refer to.
double original_positions(const Json& config, const Json& rope, int64_t max_positions) {
  if (config.find("original_max_position_embeddings") != nullptr) {
    return positive(config.at("original_max_position_embeddings"));
  }
  return positive_or(rope, "original_max_position_embeddings", static_cast<double>(max_positions));
}

int64_t at_least(int64_t positions, double scaled) {
  return std::max(positions, static_cast<int64_t>(std::min(scaled, kMostPositions)));
}

float checked_attention_factor(const Json& rope, double fallback) {
  const double factor = positive_or(rope, "attention_factor", fallback);
  if (!std::isfinite(static_cast<float>(factor)) || !(factor > 0.0)) {
    fail(ErrorKind::kCheckpoint, rope.where(), ": expected a positive attention factor, got ", factor);
  }
  return static_cast<float>(factor);
}

// Where a pair turns `rotations` times within `positions`, as an index that need not be whole.
double pair_with_rotations(double rotations, int64_t head_dim, double theta, double positions) {
  return static_cast<double>(head_dim) * std::log(positions / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(theta));
}

// The attention temperature of arXiv:2309.00071, section 3.4.
double yarn_temperature(double factor, double weight) {
  return factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

std::vector<float> divided(const std::vector<float>& frequencies, const Json& factors) {
  if (factors.array().size() != frequencies.size()) {
    fail(ErrorKind::kCheckpoint, factors.where(), ": expected ", frequencies.size(), " numbers, one per pair, got ",
         factors.array().size());
  }
  std::vector<float> result;
  for (size_t i = 0; i < frequencies.size(); ++i) {
    result.push_back(frequencies[i] / static_cast<float>(positive(factors.array()[i])));
  }
  return result;
}

}  // namespace

RotaryEmbedding::RotaryEmbedding(const Json& config, int64_t head_dim, int64_t max_positions)
    : head_dim_(head_dim), max_positions_(max_positions) {
  const Json* rope = config.find("rope_parameters");
  if (rope == nullptr) rope = config.find("rope_scaling");
  const Json& settings = rope == nullptr ? config : *rope;
  theta_ = positive_or(settings, "rope_theta", positive_or(config, "rope_theta", kDefaultTheta));
  const double partial =
      positive_or(settings, "partial_rotary_factor", positive_or(config, "partial_rotary_factor", 1.0));
  if (partial != 1.0) {
    fail(ErrorKind::kUnsupported, config.where(), ": partial_rotary_factor ", partial, " is not supported, only 1");
  }
  frequencies_ = unscaled_frequencies(theta_, head_dim);
  const Json* type = rope == nullptr ? nullptr : rope->find("rope_type");
  if (rope != nullptr && type == nullptr) type = rope->find("type");
  const std::string name = type == nullptr ? "default" : type->string();
  if (name == "default") return;
  if (name == "linear") {
    scale_linear(*rope);
  } else if (name == "llama3") {
    scale_llama3(*rope, original_positions(config, *rope, max_positions));
  } else if (name == "yarn") {
    scale_yarn(*rope, original_positions(config, *rope, max_positions));
  } else if (name == "longrope") {
    scale_longrope(*rope, original_positions(config, *rope, max_positions));
  } else if (name == "dynamic") {
    if (head_dim <= 2) fail(ErrorKind::kCheckpoint, type->where(), ": dynamic needs a head_dim above 2");
    dynamic_factor_ = std::max(1.0, positive(rope->at("factor")));
    fixed_length_ = max_positions;
    max_positions_ = at_least(max_positions, static_cast<double>(max_positions) * dynamic_factor_);
  } else {
    fail(ErrorKind::kUnsupported, type->where(), ": expected default, linear, llama3, yarn, dynamic or longrope, got ",
         json_quoted(name));
  }
}

std::vector<float> RotaryEmbedding::frequencies(int64_t length) const {
  if (length <= fixed_length_) return frequencies_;
  if (dynamic_factor_ == 0.0) return long_frequencies_;
  // "NTK-aware": the base grows so that the slowest pair turns as far at `length` as it did at the original one.
  const double growth =
      dynamic_factor_ * static_cast<double>(length) / static_cast<double>(fixed_length_) - (dynamic_factor_ - 1.0);
  const double power = static_cast<double>(head_dim_) / static_cast<double>(head_dim_ - 2);
  return unscaled_frequencies(theta_ * std::pow(growth, power), head_dim_);
}

void RotaryEmbedding::scale_linear(const Json& rope) {
  const double factor = positive(rope.at("factor"));
  for (float& frequency : frequencies_) frequency = static_cast<float>(frequency / factor);
}

// Wavelengths beyond the original context are stretched by `factor`, short ones stay, between them the two are blended.
void RotaryEmbedding::scale_llama3(const Json& rope, double original) {
  const double factor = positive(rope.at("factor"));
  const double low = positive(rope.at("low_freq_factor"));
  const double high = positive(rope.at("high_freq_factor"));
  if (high <= low) fail(ErrorKind::kCheckpoint, rope.where(), ": expected high_freq_factor above low_freq_factor");
  for (float& frequency : frequencies_) {
    const double wavelength = 2.0 * std::numbers::pi / frequency;
    if (wavelength < original / high) continue;
    if (wavelength > original / low) {
      frequency = static_cast<float>(frequency / factor);
      continue;
    }
    const double blend = (original / wavelength - low) / (high - low);
    frequency = static_cast<float>((1.0 - blend) * frequency / factor + blend * frequency);
  }
}

// arXiv:2309.00071: pairs that turn often within the original context stay, those that turn less than once are
// stretched by `factor`, with a ramp between them; attention is made a little sharper.
void RotaryEmbedding::scale_yarn(const Json& rope, double original) {
  const double factor = positive_or(rope, "factor", static_cast<double>(max_positions_) / original);
  const double fast = positive_or(rope, "beta_fast", kDefaultBetaFast);
  const double slow = positive_or(rope, "beta_slow", kDefaultBetaSlow);
  if (theta_ <= 1.0) fail(ErrorKind::kCheckpoint, rope.where(), ": yarn needs a rope_theta above 1, got ", theta_);
  double low = pair_with_rotations(fast, head_dim_, theta_, original);
  double high = pair_with_rotations(slow, head_dim_, theta_, original);
  const Json* truncate = rope.find("truncate");
  if (truncate == nullptr || truncate->boolean()) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(head_dim_ - 1));
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    const auto ramp = static_cast<float>(std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0));
    const auto stretched = static_cast<float>(frequencies_[i] / factor);
    frequencies_[i] = stretched * ramp + frequencies_[i] * (1.0f - ramp);
  }
  const Json* weight = rope.find("mscale");
  const Json* weight_all = rope.find("mscale_all_dim");
  double temperature = yarn_temperature(factor, 1.0);
  if (weight != nullptr && weight_all != nullptr && weight->number() != 0.0 && weight_all->number() != 0.0) {
    temperature = yarn_temperature(factor, weight->number()) / yarn_temperature(factor, weight_all->number());
  }
  attention_factor_ = checked_attention_factor(rope, temperature);
  max_positions_ = at_least(max_positions_, original * factor);
}

// arXiv:2402.13753: a factor of its own for every pair, one set within the original context and one beyond.
void RotaryEmbedding::scale_longrope(const Json& rope, double original) {
  const double factor = positive_or(rope, "factor", static_cast<double>(max_positions_) / original);
  long_frequencies_ = divided(frequencies_, rope.at("long_factor"));
  frequencies_ = divided(frequencies_, rope.at("short_factor"));
  fixed_length_ = static_cast<int64_t>(std::min(original, kMostPositions));
  const double sharpened = factor <= 1.0 ? 1.0 : std::sqrt(1.0 + std::log(factor) / std::log(original));
  attention_factor_ = checked_attention_factor(rope, sharpened);
  max_positions_ = at_least(max_positions_, original * factor);
}

}  // namespace loop_singular_bit::runtime
