#include "thread_pool.h"

#include <gtest/gtest.h>

#include <chrono>

namespace loop_singular_bit::runtime {
namespace {

TEST(ThreadPool, EveryIndexIsDoneOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int round = 0; round < 3000; ++round) {
      const int64_t count = round % 70;
      std::vector<std::atomic<int>> done(count);
      pool.for_each(count, 1 + round % 7, [&](int64_t begin, int64_t end, int thread) {
        EXPECT_LT(thread, threads);
        for (int64_t i = begin; i < end; ++i) done[i].fetch_add(1);
      });
      for (const auto& count_of : done) ASSERT_EQ(count_of.load(), 1);
    }
  }
}

TEST(ThreadPool, WakesThreadsThatSleep) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int64_t> sum{0};
    pool.for_each(100, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sum.fetch_add(i);
    });
    EXPECT_EQ(sum.load(), 4950);
  }
}

}  // namespace
}  // namespace loop_singular_bit::runtime
