#include "thread_pool.h"

#include <algorithm>
#include <chrono>

namespace loop_singular_bit::runtime {
namespace {

// A sleeping thread takes tens of microseconds to wake: spinning bridges the serial parts of a layer.
constexpr auto kSpinTime = std::chrono::microseconds(100);
constexpr int kPausesPerLook = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The library looks whether somebody sleeps before it wakes them: without a fence that look may come before the new
// value is seen, and who goes to sleep in between is not woken.
void wake(std::atomic<uint32_t>& value) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  value.notify_all();
}

// Waits until `value` is not `old` any more.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      const uint32_t now = value.load(std::memory_order_acquire);
      if (now != old) return now;
      pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpinTime);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  is_stopping_.store(true, std::memory_order_relaxed);
  region_.fetch_add(1, std::memory_order_release);
  wake(region_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::take_ranges(uint32_t region, int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const auto unclaimed = static_cast<uint32_t>(ticket);
    if (ticket >> 32 != region || unclaimed == 0) return;
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire)) continue;
    const int64_t begin = static_cast<int64_t>(ranges_ - unclaimed) * grain_;
    call_(context_, begin, std::min(begin + grain_, count_), thread);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) wake(pending_);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run(int64_t count, int64_t grain, Call call, const void* context) {
  count_ = count;
  grain_ = grain;
  ranges_ = static_cast<uint32_t>((count + grain - 1) / grain);
  call_ = call;
  context_ = context;
  pending_.store(ranges_, std::memory_order_relaxed);
  const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
  ticket_.store(uint64_t{region} << 32 | ranges_, std::memory_order_release);
  region_.store(region, std::memory_order_release);
  wake(region_);
  take_ranges(region, 0);
  for (uint32_t left = pending_.load(std::memory_order_acquire); left != 0;) left = wait_for_change(pending_, left);
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    seen = wait_for_change(region_, seen);
    if (is_stopping_.load(std::memory_order_relaxed)) return;
    take_ranges(seen, thread);
  }
}

}  // namespace loop_singular_bit::runtime
