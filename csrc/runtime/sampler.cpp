#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

// Sorting starts with this many tokens and goes on only when their probability is not enough.
constexpr int64_t kFirstSorted = 128;

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature >= 0.0) || !std::isfinite(options.temperature)) {
    fail(ErrorKind::kUsage, "temperature: expected at least 0, got ", options.temperature);
  }
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    fail(ErrorKind::kUsage, "top_p: expected more than 0 and at most 1, got ", options.top_p);
  }
  if (options.top_k < 0) fail(ErrorKind::kUsage, "top_k: expected at least 0, got ", options.top_k);
  if (!(options.repetition_penalty > 0.0) || !std::isfinite(options.repetition_penalty)) {
    fail(ErrorKind::kUsage, "repetition_penalty: expected more than 0, got ", options.repetition_penalty);
  }
}

int32_t Sampler::choose(float* logits, int64_t count, const std::vector<int32_t>& history) {
  if (options_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    is_seen_.assign(static_cast<size_t>(count), 0);
    for (const int32_t token : history) {
      if (is_seen_[token]) continue;
      is_seen_[token] = 1;
      logits[token] = logits[token] < 0.0f ? logits[token] * penalty : logits[token] / penalty;
    }
  }
  const int64_t likeliest = std::max_element(logits, logits + count) - logits;
  if (options_.temperature == 0.0) return static_cast<int32_t>(likeliest);

  const double largest = logits[likeliest];
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = static_cast<float>(std::exp((logits[i] - largest) / options_.temperature));
    total += logits[i];
  }
  const int64_t candidates = options_.top_k > 0 ? std::min(options_.top_k, count) : count;
  order_.resize(static_cast<size_t>(count));
  std::iota(order_.begin(), order_.end(), 0);
  int64_t kept = count;
  if (candidates < count || options_.top_p < 1.0) {
    const auto is_before = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    int64_t sorted = 0;
    const auto sort_more = [&](int64_t wanted) {
      wanted = std::min(wanted, candidates);
      std::partial_sort(order_.begin() + sorted, order_.begin() + wanted, order_.end(), is_before);
      sorted = wanted;
    };
    sort_more(candidates < count ? candidates : kFirstSorted);
    if (candidates < count) {
      total = 0.0;
      for (int64_t i = 0; i < candidates; ++i) total += logits[order_[i]];
    }
    double sum = 0.0;
    for (kept = 0; kept < candidates && sum < options_.top_p * total; ++kept) {
      if (kept == sorted) sort_more(4 * sorted);
      sum += logits[order_[kept]];
    }
    total = sum;
  }
  double rest = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  for (int64_t i = 0; i < kept; ++i) {
    rest -= logits[order_[i]];
    if (rest < 0.0) return order_[i];
  }
  return order_[kept - 1];
}

}  // namespace loop_singular_bit::runtime
