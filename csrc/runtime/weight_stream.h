// Brings the weights of a forward pass into memory, unit by unit in the order of execution, ahead of the computation.
//
// A unit is one linear, or some row tiles of it. Units at the start of the order may be pinned: they stay in memory
// after their first use. The others pass through buffers with room for a few of the largest, or more smaller ones: they
// are read there (direct), or mapped there from the page cache and unmapped after use (mmap). Threads of its own read
// ahead; every unit is checked before it is handed out.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "packed_checkpoint.h"
#include "packed_weight_view.h"

namespace loop_singular_bit::runtime {

enum class BackEnd { kResident, kMmap, kDirect };

struct PageRange {
  int file;
  int64_t offset;  // whole pages
  int64_t bytes;
  int64_t buffer_offset;
};

struct WeightUnit {
  int matrix;
  int64_t tile_begin;
  int64_t tile_end;
  std::array<StoredTensor, kParts> parts;      // the slices of these tiles
  std::array<int64_t, kParts> buffer_offsets;  // of the parts
  std::array<int64_t, kParts>
      aligned_offsets;  // where a part must be copied for its elements to be aligned; -1: nowhere
  std::vector<PageRange> reads;
  int64_t buffer_bytes;
  bool needs_copy;  // some part is not aligned in the file
};

// The units of one forward pass, none larger than max_bytes unless one row tile is.
std::vector<WeightUnit> make_units(const PackedCheckpoint& checkpoint, int64_t max_bytes);

int64_t unit_bytes(const WeightUnit& unit);  // in the file

struct UnitView {
  PackedWeightView packed;  // of a packed matrix: of these row tiles only
  const void* dense;        // of a dense matrix: its first row here
  int64_t first_row;
  int64_t rows;
};

struct StreamOptions {
  BackEnd back_end = BackEnd::kResident;
  int64_t pinned_units = 0;           // kResident pins all
  int64_t buffers = 2;                // room for so many of the largest units; 1: nothing is read ahead
  std::function<bool()> should_stop;  // asked while waiting for the disk
};

class WeightStream {
 public:
  WeightStream(const PackedCheckpoint& checkpoint, std::vector<WeightUnit> units, StreamOptions options);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  const std::vector<WeightUnit>& units() const { return units_; }

  // Waits until the unit is in memory and checked. One unit is held at a time; units are asked for in ascending order,
  // and from the start again: any other order works as well, but waits. Throws Error.
  UnitView acquire(int unit);
  void release(int unit);

  // Whether the unit stays in memory; its view.
  bool is_resident(int unit) const { return resident_[unit] != nullptr; }
  UnitView resident_view(int unit) const { return view(unit, resident_[unit]); }

  int64_t bytes_read() const;
  double seconds_waited() const { return seconds_waited_; }
  // Whether reads bypass the page cache.
  bool is_direct() const { return is_direct_; }

 private:
  enum class State { kFilling, kReady };

  struct Slot {
    int unit = -1;
    State state = State::kFilling;
    size_t issued = 0;
    size_t done = 0;
    std::byte* base = nullptr;
    int64_t buffer_begin = 0;  // bytes that the unit occupies
    int64_t buffer_end = 0;
    std::exception_ptr error;
  };

  // Pinned units are copies: a mapping whose file is cut short later would end the process with a signal.
  bool uses_mapping(int unit) const {
    return options_.back_end == BackEnd::kMmap && !units_[unit].needs_copy && !is_pinned(unit);
  }
  bool is_pinned(int unit) const { return unit < pinned_units_; }
  UnitView view(int unit, const std::byte* base) const;
  void check(int unit, const std::byte* base) const;
  void read_range(int unit, const PageRange& range, std::byte* base) const;
  void finish(int unit, std::byte* base) const;
  void read_ahead();
  bool take_work(Slot** slot, size_t* range);
  int64_t buffer_bytes_of(int unit) const { return is_pinned(unit) ? 0 : units_[unit].buffer_bytes; }
  int64_t free_buffer_offset(int64_t bytes) const;
  void drain(std::unique_lock<std::mutex>& lock);

  const PackedCheckpoint& checkpoint_;
  const std::vector<WeightUnit> units_;
  const StreamOptions options_;
  int pinned_units_ = 0;
  bool is_direct_ = false;
  std::vector<std::byte*> pinned_bases_;
  PageMemory pinned_memory_;
  std::vector<std::byte*> resident_;  // base of each unit that stays; nullptr: not here

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable progress_;
  // Units are mapped into it, or copied. A mapping of the whole file would not do: the system may map more around a
  // page than was asked for, up to 2 MiB, and that would stay resident.
  int64_t buffer_bytes_ = 0;
  PageMemory buffers_;
  std::vector<Slot> slots_;
  size_t front_ = 0;     // the oldest slot in use
  size_t occupied_ = 0;  // slots in use, from front_ on
  int next_unit_ = 0;
  int wanted_ = -1;
  bool is_paused_ = false;
  bool is_stopping_ = false;
  int64_t bytes_read_ = 0;
  double seconds_waited_ = 0.0;
  std::vector<std::thread> threads_;
};

}  // namespace loop_singular_bit::runtime
