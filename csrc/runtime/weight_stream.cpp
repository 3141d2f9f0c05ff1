#include "weight_stream.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

// Several reads of this size at once keep a disk busier than one large one.
constexpr int64_t kReadBytes = int64_t{2} << 20;
constexpr int kReaderThreads = 4;
// Parts closer together than this in the file are read with what lies between them.
constexpr int64_t kMergeBytes = int64_t{64} << 10;
constexpr std::chrono::milliseconds kStopInterval{50};

constexpr int64_t kElementBytes[kParts] = {4, 2, 2, 2, 2, 2, 1};

void place_parts(WeightUnit& unit) {
  std::vector<int> order;
  for (int part = 0; part < kParts; ++part) {
    if (unit.parts[part].file >= 0) order.push_back(part);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const StoredTensor& left = unit.parts[a];
    const StoredTensor& right = unit.parts[b];
    return left.file != right.file ? left.file < right.file : left.offset < right.offset;
  });
  std::vector<PageRange> ranges;
  unit.buffer_bytes = 0;
  for (const int part : order) {
    const StoredTensor& tensor = unit.parts[part];
    const int64_t begin = page_floor(tensor.offset);
    const int64_t end = page_ceiling(tensor.offset + tensor.bytes);
    const bool is_near = !ranges.empty() && ranges.back().file == tensor.file &&
                         begin <= ranges.back().offset + ranges.back().bytes + kMergeBytes;
    if (!is_near) ranges.push_back({tensor.file, begin, 0, unit.buffer_bytes});
    PageRange& range = ranges.back();
    range.bytes = std::max(range.bytes, end - range.offset);
    unit.buffer_bytes = range.buffer_offset + range.bytes;
    unit.buffer_offsets[part] = range.buffer_offset + tensor.offset - range.offset;
  }
  for (const int part : order) {
    unit.aligned_offsets[part] = -1;
    if (unit.parts[part].offset % kElementBytes[part] == 0) continue;
    unit.needs_copy = true;
    unit.aligned_offsets[part] = unit.buffer_bytes;
    unit.buffer_bytes += page_ceiling(unit.parts[part].bytes);
  }
  for (const PageRange& range : ranges) {
    for (int64_t done = 0; done < range.bytes; done += kReadBytes) {
      unit.reads.push_back(
          {range.file, range.offset + done, std::min(kReadBytes, range.bytes - done), range.buffer_offset + done});
    }
  }
}

void add_units(const StoredMatrix& matrix, int index, int64_t max_bytes, std::vector<WeightUnit>& units) {
  int64_t tile_bytes = 0;
  for (int part = 0; part < kParts; ++part) tile_bytes += matrix.tile_bytes(static_cast<Part>(part));
  const int64_t tiles = matrix.row_tiles();
  const int64_t tiles_at_most = std::max<int64_t>(1, max_bytes / std::max<int64_t>(tile_bytes, 1));
  const int64_t pieces = (tiles + tiles_at_most - 1) / tiles_at_most;
  const int64_t tiles_per_unit = (tiles + pieces - 1) / pieces;
  for (int64_t begin = 0; begin < tiles; begin += tiles_per_unit) {
    WeightUnit unit{};
    unit.matrix = index;
    unit.tile_begin = begin;
    unit.tile_end = std::min(tiles, begin + tiles_per_unit);
    for (int part = 0; part < kParts; ++part) {
      const StoredTensor& whole = matrix.parts[part];
      if (whole.file < 0 || whole.bytes == 0) continue;
      const int64_t stride = matrix.tile_bytes(static_cast<Part>(part));
      // A dense matrix may end within its last tile.
      const int64_t first = stride * begin;
      const int64_t bytes = stride == 0 ? whole.bytes : std::min(stride * unit.tile_end, whole.bytes) - first;
      unit.parts[part] = {whole.file, whole.offset + first, bytes};
    }
    place_parts(unit);
    units.push_back(std::move(unit));
  }
}

bool is_finite_half(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

// One bit tells whether any half is infinite, NaN or (where that is wrong) negative; branch-free, so that it
// vectorizes.
bool are_halves_valid(const uint16_t* halves, int64_t count, bool allow_negative) {
  uint16_t invalid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t magnitude = halves[i] & 0x7fffu;
    const bool is_negative = !allow_negative && halves[i] > 0x8000u;
    invalid |= static_cast<uint16_t>(magnitude >= 0x7c00u) | static_cast<uint16_t>(is_negative);
  }
  return invalid == 0;
}

uint16_t largest(const uint16_t* values, int64_t count) {
  uint16_t result = 0;
  for (int64_t i = 0; i < count; ++i) result = std::max(result, values[i]);
  return result;
}

}  // namespace

std::vector<WeightUnit> make_units(const PackedCheckpoint& checkpoint, int64_t max_bytes) {
  std::vector<WeightUnit> units;
  const auto add = [&](const StoredLinear& linear) {
    add_units(checkpoint.matrices()[linear.matrix], linear.matrix, max_bytes, units);
  };
  for (const StoredLayer& layer : checkpoint.layers()) {
    for (const StoredLinear* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down}) {
      add(*linear);
    }
  }
  add(checkpoint.head());
  return units;
}

int64_t unit_bytes(const WeightUnit& unit) {
  int64_t total = 0;
  for (const StoredTensor& part : unit.parts) total += part.bytes;
  return total;
}

WeightStream::WeightStream(const PackedCheckpoint& checkpoint, std::vector<WeightUnit> units, StreamOptions options)
    : checkpoint_(checkpoint),
      units_(std::move(units)),
      options_(std::move(options)),
      resident_(units_.size(), nullptr) {
  const int count = static_cast<int>(units_.size());
  pinned_units_ = options_.back_end == BackEnd::kResident
                      ? count
                      : static_cast<int>(std::min<int64_t>(count, options_.pinned_units));
  int64_t pinned_bytes = 0;
  int64_t largest = 0;
  for (int unit = 0; unit < count; ++unit) {
    if (is_pinned(unit)) pinned_bytes += units_[unit].buffer_bytes;
    largest = std::max(largest, buffer_bytes_of(unit));
  }
  if (pinned_bytes > 0) pinned_memory_ = PageMemory(pinned_bytes, /*huge_pages=*/true);
  std::byte* base = pinned_memory_.data();
  for (int unit = 0; unit < pinned_units_; ++unit) {
    pinned_bases_.push_back(base);
    base += units_[unit].buffer_bytes;
  }
  // Twice as many slots as buffers: most units are smaller than the largest.
  slots_.resize(options_.buffers > 1 ? 2 * static_cast<size_t>(options_.buffers) : 1);
  buffer_bytes_ = largest * options_.buffers;
  // A direct read into pages of 4 KiB is hundreds of pieces for the disk; into huge ones it is one or two, and with
  // some disks twice as fast.
  if (buffer_bytes_ > 0) buffers_ = PageMemory(buffer_bytes_, /*huge_pages=*/options_.back_end != BackEnd::kMmap);
  is_direct_ = options_.back_end != BackEnd::kMmap;
  for (const auto& file : checkpoint_.files()) {
    if (options_.back_end != BackEnd::kMmap) is_direct_ = file->use_direct() && is_direct_;
  }
  for (int i = 0; i < kReaderThreads; ++i) threads_.emplace_back([this] { read_ahead(); });
}

WeightStream::~WeightStream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int64_t WeightStream::bytes_read() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_read_;
}

UnitView WeightStream::view(int index, const std::byte* base) const {
  const WeightUnit& unit = units_[index];
  const StoredMatrix& matrix = checkpoint_.matrices()[unit.matrix];
  const auto address = [&](Part part) -> const void* {
    const StoredTensor& tensor = unit.parts[part];
    if (tensor.file < 0) return nullptr;
    return base + (unit.aligned_offsets[part] >= 0 ? unit.aligned_offsets[part] : unit.buffer_offsets[part]);
  };
  UnitView view{};
  view.first_row = unit.tile_begin * kRowsPerTile;
  view.rows = std::min(unit.tile_end * kRowsPerTile, matrix.out_features) - view.first_row;
  if (!matrix.is_packed) {
    view.dense = address(kSigns);
    return view;
  }
  PackedWeightView& packed = view.packed;
  packed.signs = static_cast<const int32_t*>(address(kSigns));
  packed.scales = static_cast<const uint16_t*>(address(kScales));
  packed.outlier_columns = static_cast<const uint16_t*>(address(kOutlierColumns));
  packed.outlier_deltas = static_cast<const int8_t*>(address(kOutlierDeltas));
  packed.outlier_scales = static_cast<const uint16_t*>(address(kOutlierScales));
  packed.column_scales = static_cast<const uint16_t*>(address(kColumnScales));
  packed.means = static_cast<const uint16_t*>(address(kMeans));
  packed.out_features = view.rows;
  packed.in_features = matrix.in_features;
  packed.row_tiles = unit.tile_end - unit.tile_begin;
  packed.words = matrix.words();
  packed.planes = matrix.planes;
  packed.outliers = matrix.outliers;
  return view;
}

// Looks at every value at once, and only where that finds something at the rows that count: padding may hold anything.
void WeightStream::check(int index, const std::byte* base) const {
  const WeightUnit& unit = units_[index];
  const StoredMatrix& matrix = checkpoint_.matrices()[unit.matrix];
  if (!matrix.is_packed) return;
  const UnitView view = this->view(index, base);
  const PackedWeightView& packed = view.packed;
  const auto check_halves = [&](const char* name, const uint16_t* halves, int64_t per_tile, bool allow_negative) {
    if (halves == nullptr) return;
    const int64_t count = packed.row_tiles * per_tile * kRowsPerTile;
    if (are_halves_valid(halves, count, allow_negative)) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / (per_tile * kRowsPerTile) * kRowsPerTile + i % kRowsPerTile;
      if (row >= view.rows || (is_finite_half(halves[i]) && (allow_negative || halves[i] <= 0x8000u))) continue;
      fail(ErrorKind::kCheckpoint, checkpoint_.files()[unit.parts[kSigns].file]->path(), ": tensor ", matrix.name, ".",
           name, ": expected finite values", allow_negative ? "" : " of at least 0", ", got the float16 bits ",
           halves[i], " at row ", view.first_row + row);
    }
  };
  check_halves("scales", packed.scales, packed.planes, /*allow_negative=*/false);
  check_halves("outlier_scales", packed.outlier_scales, 1, /*allow_negative=*/true);
  check_halves("means", packed.means, 1, /*allow_negative=*/true);
  if (packed.column_scales != nullptr &&
      !are_halves_valid(packed.column_scales, packed.in_features, /*allow_negative=*/true)) {
    fail(ErrorKind::kCheckpoint, checkpoint_.files()[unit.parts[kSigns].file]->path(), ": tensor ", matrix.name,
         ".column_scales: expected finite values");
  }
  const int64_t columns = packed.row_tiles * packed.outliers * kRowsPerTile;
  if (packed.in_features > UINT16_MAX || largest(packed.outlier_columns, columns) < packed.in_features) return;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t row = i / (packed.outliers * kRowsPerTile) * kRowsPerTile + i % kRowsPerTile;
    if (row >= view.rows || packed.outlier_columns[i] < packed.in_features) continue;
    fail(ErrorKind::kCheckpoint, checkpoint_.files()[unit.parts[kSigns].file]->path(), ": tensor ", matrix.name,
         ".outlier_columns: expected columns below ", packed.in_features, ", got ", packed.outlier_columns[i],
         " at row ", view.first_row + row);
  }
}

void WeightStream::read_range(int unit, const PageRange& range, std::byte* base) const {
  const DataFile& file = *checkpoint_.files()[range.file];
  if (uses_mapping(unit)) {
    file.map_pages(range.offset, range.bytes, base + range.buffer_offset);
  } else {
    file.read_pages(range.offset, range.bytes, base + range.buffer_offset);
  }
}

void WeightStream::finish(int index, std::byte* base) const {
  const WeightUnit& unit = units_[index];
  for (int part = 0; part < kParts; ++part) {
    if (unit.parts[part].file < 0) continue;
    checkpoint_.files()[unit.parts[part].file]->check_unchanged();
    if (unit.aligned_offsets[part] < 0 || uses_mapping(index)) continue;
    std::memcpy(base + unit.aligned_offsets[part], base + unit.buffer_offsets[part], unit.parts[part].bytes);
  }
  check(index, base);
}

// ---- reading ahead ----

// The lowest place that has room beside the units in use; -1: none yet. As long as computing keeps up with the disk,
// few units are in use, and the memory they take turns in stays in a cache, where a disk fills it faster.
int64_t WeightStream::free_buffer_offset(int64_t bytes) const {
  int64_t offset = 0;
  for (bool is_moved = true; is_moved;) {
    is_moved = false;
    for (size_t i = 0; i < occupied_; ++i) {
      const Slot& slot = slots_[(front_ + i) % slots_.size()];
      if (slot.buffer_begin >= offset + bytes || slot.buffer_end <= offset) continue;
      offset = slot.buffer_end;
      is_moved = true;
    }
  }
  return offset + bytes <= buffer_bytes_ ? offset : -1;
}

bool WeightStream::take_work(Slot** slot, size_t* range) {
  for (size_t i = 0; i < occupied_; ++i) {
    Slot& candidate = slots_[(front_ + i) % slots_.size()];
    if (candidate.state != State::kFilling || candidate.issued == units_[candidate.unit].reads.size()) continue;
    *slot = &candidate;
    *range = candidate.issued++;
    return true;
  }
  if (is_paused_ || occupied_ == slots_.size()) return false;
  const int count = static_cast<int>(units_.size());
  int skipped = 0;
  while (skipped < count && resident_[next_unit_] != nullptr) {
    next_unit_ = (next_unit_ + 1) % count;
    ++skipped;
  }
  if (skipped == count) return false;
  for (size_t i = 0; i < occupied_; ++i) {
    // The order came round to a unit that is still in use: a pass of fewer units than there are slots.
    if (slots_[(front_ + i) % slots_.size()].unit == next_unit_) return false;
  }
  if (options_.buffers == 1 && next_unit_ != wanted_) return false;
  const int64_t bytes = buffer_bytes_of(next_unit_);
  const int64_t offset = free_buffer_offset(bytes);
  if (offset < 0) return false;
  Slot& fresh = slots_[(front_ + occupied_++) % slots_.size()];
  fresh.buffer_begin = offset;
  fresh.buffer_end = offset + bytes;
  fresh.unit = next_unit_;
  fresh.state = State::kFilling;
  fresh.done = 0;
  fresh.issued = 1;
  fresh.error = nullptr;
  fresh.base = is_pinned(fresh.unit) ? pinned_bases_[fresh.unit] : buffers_.data() + offset;
  next_unit_ = (next_unit_ + 1) % count;
  *slot = &fresh;
  *range = 0;
  return true;
}

void WeightStream::read_ahead() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!is_stopping_) {
    Slot* slot = nullptr;
    size_t index = 0;
    if (!take_work(&slot, &index)) {
      work_.wait(lock);
      continue;
    }
    const int unit = slot->unit;
    const PageRange& range = units_[unit].reads[index];
    std::byte* const base = slot->base;
    lock.unlock();
    std::exception_ptr error;
    try {
      read_range(unit, range, base);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    bytes_read_ += range.bytes;
    if (error != nullptr && slot->error == nullptr) slot->error = error;
    if (++slot->done < units_[unit].reads.size()) continue;
    if (slot->error == nullptr) {
      lock.unlock();
      try {
        finish(unit, base);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      slot->error = error;
    }
    slot->state = State::kReady;
    progress_.notify_all();
  }
}

// Forgets what was read ahead.
void WeightStream::drain(std::unique_lock<std::mutex>& lock) {
  is_paused_ = true;
  const auto is_idle = [&] {
    for (size_t i = 0; i < occupied_; ++i) {
      const Slot& slot = slots_[(front_ + i) % slots_.size()];
      if (slot.state == State::kFilling) return false;
    }
    return true;
  };
  // Ranges that no thread has taken yet are taken still: a slot is short.
  progress_.wait(lock, is_idle);
  for (size_t i = 0; i < occupied_; ++i) {
    const Slot& slot = slots_[(front_ + i) % slots_.size()];
    if (uses_mapping(slot.unit)) PageMemory::reset(slot.base, units_[slot.unit].buffer_bytes);
  }
  occupied_ = 0;
}

UnitView WeightStream::acquire(int unit) {
  if (resident_[unit] != nullptr) return view(unit, resident_[unit]);
  std::unique_lock<std::mutex> lock(mutex_);
  if (occupied_ > 0 && slots_[front_].unit != unit) drain(lock);
  if (occupied_ == 0) next_unit_ = unit;
  wanted_ = unit;
  is_paused_ = false;
  work_.notify_all();
  const auto is_ready = [&] { return occupied_ > 0 && slots_[front_].state == State::kReady; };
  if (!is_ready()) {
    const auto start = std::chrono::steady_clock::now();
    while (!progress_.wait_for(lock, kStopInterval, is_ready)) {
      if (options_.should_stop && options_.should_stop()) fail(ErrorKind::kInterrupted, "interrupted");
    }
    seconds_waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  Slot& slot = slots_[front_];
  if (slot.error != nullptr) {
    const std::exception_ptr error = slot.error;
    drain(lock);
    std::rethrow_exception(error);
  }
  return view(unit, slot.base);
}

void WeightStream::release(int unit) {
  if (resident_[unit] != nullptr) return;
  const std::unique_lock<std::mutex> lock(mutex_);
  Slot& slot = slots_[front_];
  if (is_pinned(unit)) {
    resident_[unit] = slot.base;
  } else if (uses_mapping(unit)) {
    PageMemory::reset(slot.base, units_[unit].buffer_bytes);
  }
  front_ = (front_ + 1) % slots_.size();
  --occupied_;
  work_.notify_all();
}

}  // namespace loop_singular_bit::runtime
