// Where in the buffers the next unit goes: to the lowest place that is free, or to the next one after the last unit.
//
// Both are right, and which is faster depends on the disk. The lowest place keeps a computation that waits for the disk
// in few megabytes. A virtual disk is a processor that copies: where it shares a cache with the processors that
// compute, few megabytes stay in that cache; where it does not, every line of them has to be fetched back from the
// other cache first, and memory that nobody has used for a while is faster. The rate of both is measured while reading,
// from taking turns on: that is never much slower.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace loop_singular_bit::runtime {

struct BufferRange {
  int64_t begin = 0;
  int64_t end = 0;
};

class BufferPlacement {
 public:
  using Clock = std::chrono::steady_clock;

  // May choose: otherwise always the lowest place.
  BufferPlacement(int64_t buffer_bytes, bool may_choose)
      : buffer_bytes_(buffer_bytes), may_choose_(may_choose), is_in_turn_(may_choose) {}

  // The begin of a place of `bytes` beside the ranges in use; -1: there is none now.
  int64_t place(int64_t bytes, const std::vector<BufferRange>& used) const;
  // What place() gave was taken.
  void take(BufferRange range) { last_end_ = range.end; }

  // For the rate: reads are in flight from `now` on; a read of so many bytes has ended; none is in flight any more.
  void begin_reads(Clock::time_point now) { reads_since_ = now; }
  void count_read(int64_t bytes, Clock::time_point now);
  void end_reads(Clock::time_point now) { reading_ += now - reads_since_; }

  bool is_in_turn() const { return is_in_turn_; }

 private:
  int64_t first_free(int64_t begin, int64_t bytes, const std::vector<BufferRange>& used) const;

  int64_t buffer_bytes_;
  bool may_choose_;
  bool is_in_turn_;
  int64_t last_end_ = 0;

  // A stretch is some megabytes read with one choice.
  int64_t stretch_bytes_ = 0;
  Clock::duration reading_{};  // time with reads in flight
  Clock::time_point reads_since_{};
  int stretches_ = 0;             // since the last change
  int stretches_per_trial_ = 2;   // then the other choice is tried for one; doubles up to a pass of a large model
  double rates_[2] = {0.0, 0.0};  // bytes per second of the lowest place and in turn; 0: not known
};

}  // namespace loop_singular_bit::runtime
