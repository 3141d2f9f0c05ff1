#include "buffer_placement.h"

#include <gtest/gtest.h>

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(BufferPlacement, GivesTheLowestPlaceThatIsFree) {
  const BufferPlacement placement(100, /*may_choose=*/false);
  EXPECT_EQ(placement.place(100, {}), 0);
  EXPECT_EQ(placement.place(101, {}), -1);
  // In any order of the ranges, and between them.
  EXPECT_EQ(placement.place(20, {{40, 100}, {0, 10}}), 10);
  EXPECT_EQ(placement.place(31, {{40, 100}, {0, 10}}), -1);
  EXPECT_EQ(placement.place(30, {{0, 10}, {50, 60}, {10, 50}}), 60);
  EXPECT_EQ(placement.place(41, {{0, 10}, {50, 60}, {10, 50}}), -1);
}

// A disk that fills memory at a rate of its own for each of the two ways.
class Disk {
 public:
  Disk(double lowest, double in_turn) : rates_{lowest, in_turn} {}

  // Reads so much; how much of it into places that took turns.
  int64_t read(int64_t bytes, BufferPlacement& placement) {
    int64_t in_turn = 0;
    placement.begin_reads(now_);
    for (int64_t done = 0; done < bytes; done += kMiB) {
      const double seconds = static_cast<double>(kMiB) / rates_[placement.is_in_turn()];
      if (placement.is_in_turn()) in_turn += kMiB;
      now_ += std::chrono::duration_cast<BufferPlacement::Clock::duration>(std::chrono::duration<double>(seconds));
      placement.count_read(kMiB, now_);
    }
    placement.end_reads(now_);
    now_ += std::chrono::seconds(5);  // idle: must not count
    return in_turn;
  }

  void set(double lowest, double in_turn) {
    rates_[0] = lowest;
    rates_[1] = in_turn;
  }

 private:
  double rates_[2];
  BufferPlacement::Clock::time_point now_{};
};

TEST(BufferPlacement, ChoosesWhatIsFaster) {
  constexpr int64_t kMuch = 16 << 10;
  for (const bool in_turn_is_faster : {false, true}) {
    BufferPlacement placement(32 * kMiB, /*may_choose=*/true);
    Disk disk(in_turn_is_faster ? 1e9 : 3e9, 2e9);
    int64_t in_turn = 0;
    for (int64_t i = 0; i < kMuch; i += 16) in_turn += disk.read(16 * kMiB, placement);
    const double share = static_cast<double>(in_turn) / static_cast<double>(kMuch * kMiB);
    if (in_turn_is_faster) {
      EXPECT_GT(share, 0.9);
    } else {
      EXPECT_LT(share, 0.1);
    }
    // And follows when that changes.
    disk.set(in_turn_is_faster ? 3e9 : 1e9, 2e9);
    for (int64_t i = 0; i < kMuch; i += 16) disk.read(16 * kMiB, placement);
    in_turn = disk.read(kMuch * kMiB, placement);
    const double later = static_cast<double>(in_turn) / static_cast<double>(kMuch * kMiB);
    if (in_turn_is_faster) {
      EXPECT_LT(later, 0.1);
    } else {
      EXPECT_GT(later, 0.9);
    }
  }
}

TEST(BufferPlacement, BeginsWithTakingTurns) {
  BufferPlacement placement(100 * kMiB, /*may_choose=*/true);
  placement.take({0, 60 * kMiB});
  EXPECT_EQ(placement.place(30 * kMiB, {}), 60 * kMiB);
  EXPECT_EQ(placement.place(50 * kMiB, {}), 0) << "what does not fit behind begins anew";
  EXPECT_EQ(placement.place(30 * kMiB, {{65 * kMiB, 80 * kMiB}}), 0);
  EXPECT_EQ(placement.place(15 * kMiB, {{65 * kMiB, 80 * kMiB}}), 80 * kMiB);
}

}  // namespace
}  // namespace loop_singular_bit::runtime
