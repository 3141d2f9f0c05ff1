#include "buffer_placement.h"

#include <algorithm>

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kStretchBytes = int64_t{64} << 20;
constexpr int kMaxStretchesPerTrial = 32;

}  // namespace

int64_t BufferPlacement::first_free(int64_t begin, int64_t bytes, const std::vector<BufferRange>& used) const {
  for (bool is_moved = true; is_moved;) {
    is_moved = false;
    for (const BufferRange& range : used) {
      if (range.begin >= begin + bytes || range.end <= begin) continue;
      begin = range.end;
      is_moved = true;
    }
  }
  return begin + bytes <= buffer_bytes_ ? begin : -1;
}

int64_t BufferPlacement::place(int64_t bytes, const std::vector<BufferRange>& used) const {
  const int64_t next = is_in_turn_ ? first_free(last_end_, bytes, used) : -1;
  return next >= 0 ? next : first_free(0, bytes, used);
}

void BufferPlacement::count_read(int64_t bytes, Clock::time_point now) {
  if (!may_choose_) return;
  stretch_bytes_ += bytes;
  if (stretch_bytes_ < kStretchBytes) return;
  const double seconds = std::chrono::duration<double>(reading_ + (now - reads_since_)).count();
  const double rate = static_cast<double>(stretch_bytes_) / std::max(seconds, 1e-9);
  stretch_bytes_ = 0;
  reading_ = {};
  reads_since_ = now;
  // What was measured before the last change is old.
  double& mine = rates_[is_in_turn_];
  mine = stretches_ == 0 ? rate : (mine + rate) / 2;
  ++stretches_;
  if (rates_[!is_in_turn_] <= mine) {
    if (stretches_ < stretches_per_trial_) return;
    stretches_per_trial_ = std::min(2 * stretches_per_trial_, kMaxStretchesPerTrial);
  }
  is_in_turn_ = !is_in_turn_;
  stretches_ = 0;
}

}  // namespace loop_singular_bit::runtime
