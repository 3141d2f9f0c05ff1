// Brings the weights of a forward pass into memory, unit by unit in the order of execution, ahead of the computation.
//
// A unit is one linear; of a large one it is the signs of some row tiles, and the scales and outliers of all of them,
// or of many, are a unit of their own before them: so a pass is few reads. Units pass through buffers with room for a
// few of the largest, or more smaller ones: they are read there (direct), or mapped there from the page cache and
// unmapped after use (mmap). Units at the start of the order may be pinned: from the second pass on they stay in
// memory, resident ones from the first; a first token should not wait for more memory than it needs. Threads of its own
// read ahead; every unit is checked before it is handed out.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "buffer_placement.h"
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
  std::array<StoredTensor, kParts> parts;      // the slices of these tiles; only those that are read with this unit
  std::array<int64_t, kParts> buffer_offsets;  // of the parts
  std::array<int64_t, kParts>
      aligned_offsets;  // where a part must be copied for its elements to be aligned; -1: nowhere
  std::vector<PageRange> reads;
  int64_t buffer_bytes;
  bool needs_copy;  // some part is not aligned in the file
  int scales_unit;  // the unit before this one with all parts but the signs: scales, outliers, means; -1: they are here
  bool is_scales;   // of the units after this one: nothing to compute with
};

// The units of one forward pass, none larger than max_bytes unless one row tile is.
std::vector<WeightUnit> make_units(const PackedCheckpoint& checkpoint, int64_t max_bytes);

int64_t unit_bytes(const WeightUnit& unit);  // in the file

// Of memory for units to pass through: `buffers` of the largest. 1: nothing is read ahead.
int64_t stream_buffer_bytes(const std::vector<WeightUnit>& units, int64_t buffers);

struct UnitView {
  PackedWeightView packed;  // of a packed matrix: of these row tiles only
  const void* dense;        // of a dense matrix: its first row here
  int64_t first_row;
  int64_t rows;
};

struct StreamOptions {
  BackEnd back_end = BackEnd::kResident;
  int64_t pinned_units = 0;           // kResident pins all
  int64_t buffers = 2;                // see stream_buffer_bytes()
  std::function<bool()> should_stop;  // asked while waiting for the disk
};

class WeightStream {
 public:
  WeightStream(const PackedCheckpoint& checkpoint, std::vector<WeightUnit> units, StreamOptions options);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  const std::vector<WeightUnit>& units() const { return units_; }

  // Waits until the unit, and that of its scales, are in memory and checked. One is held at a time; they are
  // asked for in ascending order, and from the start again: any other order works as well, but waits. Throws Error.
  UnitView acquire(int unit);
  void release(int unit);

  // Whether the unit and that of its scales stay in memory; its view.
  bool is_resident(int unit) const {
    const int scales_unit = units_[unit].scales_unit;
    return resident_[unit] != nullptr && (scales_unit < 0 || resident_[scales_unit] != nullptr);
  }
  UnitView resident_view(int unit) const {
    const int scales_unit = units_[unit].scales_unit;
    return view(unit, resident_[unit], scales_unit < 0 ? nullptr : resident_[scales_unit]);
  }

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
    bool is_pinned = false;
    BufferRange place;  // unless pinned
    std::exception_ptr error;
  };

  // Pinned units are copies: a mapping whose file is cut short later would end the process with a signal.
  bool uses_mapping(const Slot& slot) const {
    return options_.back_end == BackEnd::kMmap && !units_[slot.unit].needs_copy && !slot.is_pinned;
  }
  UnitView view(int unit, const std::byte* base, const std::byte* scales_base) const;
  void check(int unit, const std::byte* base) const;
  void read_range(const Slot& slot, const PageRange& range) const;
  void finish(const Slot& slot) const;
  void read_ahead();
  bool take_work(Slot** slot, size_t* range);
  bool add_slot();
  int next_to_read() const;
  std::byte* wait_for(int unit, int scales_unit, std::unique_lock<std::mutex>& lock);
  void drain(int kept_unit, std::unique_lock<std::mutex>& lock);
  void forget(std::list<Slot>::iterator slot);
  void retire(int unit);

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
  PageMemory buffers_;
  BufferPlacement placement_;
  std::list<Slot> slots_;  // units in the order of execution that are being read, or are there
  int reads_in_flight_ = 0;
  int next_unit_ = 0;
  bool may_pin_ = false;
  int wanted_ = -1;
  bool is_paused_ = false;
  bool is_stopping_ = false;
  int64_t bytes_read_ = 0;
  double seconds_waited_ = 0.0;
  std::vector<std::thread> threads_;
};

}  // namespace loop_singular_bit::runtime
