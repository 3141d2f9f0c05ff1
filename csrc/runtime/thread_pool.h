// Threads for short parallel regions: they spin for a moment between regions and sleep after it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace loop_singular_bit::runtime {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end, thread) for ranges of at most `grain` that together are [0, count); returns when all are
  // done. The calling thread takes part as thread 0. body must not throw.
  template <typename Body>
  void for_each(int64_t count, int64_t grain, const Body& body) {
    if (count <= grain || workers_.empty()) {
      if (count > 0) body(int64_t{0}, count, 0);
      return;
    }
    run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<const Body*>(context))(begin, end, thread);
        },
        &body);
  }

 private:
  using Call = void (*)(const void* context, int64_t begin, int64_t end, int thread);

  void run(int64_t count, int64_t grain, Call call, const void* context);
  void work(int thread);
  void take_ranges(uint32_t region, int thread);

  std::vector<std::thread> workers_;
  // The region that is running. Read only by threads that have claimed a range of it: it stays until they are done.
  int64_t count_ = 0;
  int64_t grain_ = 1;
  uint32_t ranges_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  // Number of the region in the upper half, ranges that nobody has claimed in the lower: who comes late finds nothing,
  // and nobody waits for a thread that the system has put to sleep between regions.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<uint32_t> pending_{0};  // ranges that are not finished
  std::atomic<bool> is_stopping_{false};
};

}  // namespace loop_singular_bit::runtime
