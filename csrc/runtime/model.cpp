#include "model.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <numeric>

#include "dispatch.h"
#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

const KernelTable& checked_kernels() {
  const KernelTable* table = active_kernels();
  if (table == nullptr) fail(ErrorKind::kUsage, "LOOP_SINGULAR_BIT_ISA: ", kernel_selection_error(forced_isa_name()));
  return *table;
}

std::function<bool()> readable(int descriptor) {
  if (descriptor < 0) return nullptr;
  return [descriptor] {
    pollfd poll_descriptor{descriptor, POLLIN, 0};
    return poll(&poll_descriptor, 1, 0) > 0;
  };
}

struct Opened {
  std::unique_ptr<PackedCheckpoint> checkpoint;
  MemoryPlan plan;
};

Opened open_and_plan(const ModelOptions& options) {
  const int64_t base = resident_bytes();
  Opened opened{std::make_unique<PackedCheckpoint>(options.directory), {}};
  const int64_t tables = std::max<int64_t>(resident_bytes() - base, opened.checkpoint->vector_bytes());
  opened.plan = make_plan(*opened.checkpoint, checked_kernels(), options, base, tables);
  return opened;
}

}  // namespace

Model::Model(ModelOptions options) : options_(std::move(options)) {
  Opened opened = open_and_plan(options_);
  checkpoint_ = std::move(opened.checkpoint);
  plan_ = std::move(opened.plan);
  check_budget();
  StreamOptions stream;
  stream.back_end = plan_.back_end;
  stream.pinned_units = plan_.pinned_units;
  stream.buffers = plan_.buffers;
  stream.should_stop = readable(options_.interrupt_descriptor);
  stream_ = std::make_unique<WeightStream>(*checkpoint_, make_units(*checkpoint_, plan_.max_unit_bytes), stream);
  DecoderOptions decoder = decoder_options(options_, plan_);
  decoder.should_stop = stream.should_stop;
  decoder_ = std::make_unique<Decoder>(*checkpoint_, *stream_, checked_kernels(), decoder);
}

MemoryPlan Model::plan_for(const ModelOptions& options) { return open_and_plan(options).plan; }

ModelStatistics Model::statistics() const {
  return {stream_->bytes_read(), stream_->seconds_waited(), stream_->is_direct(), peak_resident_bytes(),
          decoder_->length()};
}

void Model::start(const std::vector<int32_t>& prompt, const SamplingOptions& sampling, bool reuse_cache) {
  if (prompt.empty()) fail(ErrorKind::kUsage, "prompt: expected at least one token");
  sampler_.emplace(sampling);
  int64_t shared = 0;
  const auto count = static_cast<int64_t>(prompt.size());
  // Keys that were turned by other frequencies are of no use.
  if (reuse_cache && std::max(decoder_->length(), count) <= config().rotary.fixed_length()) {
    // The last token is computed in any case: its logits are needed.
    const int64_t most = std::min(decoder_->length(), count - 1);
    while (shared < most && tokens_[shared] == prompt[shared]) ++shared;
  }
  decoder_->truncate(shared);
  tokens_ = prompt;
}

int32_t Model::next() {
  if (!sampler_) fail(ErrorKind::kUsage, "next: no sequence was started");
  const int64_t known = decoder_->length();
  logits_.resize(static_cast<size_t>(config().vocabulary));
  decoder_->process(tokens_.data() + known, static_cast<int64_t>(tokens_.size()) - known, /*all_logits=*/false,
                    logits_.data());
  check_budget();
  const int32_t token = sampler_->choose(logits_.data(), config().vocabulary, tokens_);
  tokens_.push_back(token);
  return token;
}

void Model::logits(const std::vector<int32_t>& tokens, float* output) {
  decoder_->truncate(0);
  sampler_.reset();
  tokens_ = tokens;
  decoder_->process(tokens.data(), static_cast<int64_t>(tokens.size()), /*all_logits=*/true, output);
  check_budget();
}

void Model::check_budget() const {
  if (options_.budget_bytes == 0) return;
  const int64_t peak = peak_resident_bytes();
  if (peak <= options_.budget_bytes) return;
  throw Error(ErrorKind::kMemoryBudget,
              join("peak resident memory of the process is ", peak / 1'000'000, " MB, above the budget of ",
                   options_.budget_bytes / 1'000'000, " MB; the plan was ", plan_.total_bytes / 1'000'000, " MB"),
              peak + peak / 20);
}

double measure_read_rate(const std::string& path, int64_t bytes, int64_t buffer_bytes, bool looks) {
  constexpr int64_t kMaxReadBytes = int64_t{2} << 20;
  constexpr int kThreads = 4;
  DataFile file(path);
  file.use_direct();
  const int64_t total = std::min(bytes, file.size());
  const int64_t read_bytes = std::clamp(page_floor(buffer_bytes / kThreads), kPageBytes, kMaxReadBytes);
  const int64_t buffers = std::max<int64_t>(1, buffer_bytes / (read_bytes * kThreads));  // of each thread
  const PageMemory memory(kThreads * buffers * read_bytes, /*huge_pages=*/true);
  // The first use of a page takes longer than a read into it.
  for (int64_t i = 0; i < memory.bytes(); i += kPageBytes) memory.data()[i] = std::byte{1};
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};  // so that nobody can leave out the looking
  const auto read = [&](int thread) {
    int64_t offset = 0;
    for (int64_t i = 0; (offset = next.fetch_add(read_bytes)) < total; ++i) {
      std::byte* const target = memory.data() + (i % buffers * kThreads + thread) * read_bytes;
      file.read_pages(offset, read_bytes, target);
      if (!looks) continue;
      const auto* const words = reinterpret_cast<const uint64_t*>(target);
      sum += std::accumulate(words, words + read_bytes / static_cast<int64_t>(sizeof(uint64_t)), uint64_t{0});
    }
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::future<void>> readers;
  for (int i = 0; i < kThreads; ++i) readers.push_back(std::async(std::launch::async, read, i));
  for (std::future<void>& reader : readers) reader.get();
  return static_cast<double>(total) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace loop_singular_bit::runtime
