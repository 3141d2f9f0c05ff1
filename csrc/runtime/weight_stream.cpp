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
constexpr size_t kMaxSlots = 64;
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
    // Equal pieces: a last read of a few pages would take almost as long as the others.
    const int64_t pieces = std::max<int64_t>(1, (range.bytes + kReadBytes / 2) / kReadBytes);
    const int64_t piece = page_ceiling((range.bytes + pieces - 1) / pieces);
    for (int64_t done = 0; done < range.bytes; done += piece) {
      unit.reads.push_back(
          {range.file, range.offset + done, std::min(piece, range.bytes - done), range.buffer_offset + done});
    }
  }
}

// The parts for which `is_wanted` of some row tiles.
template <typename IsWanted>
WeightUnit make_unit(const StoredMatrix& matrix, int index, int64_t tile_begin, int64_t tile_end, IsWanted is_wanted) {
  WeightUnit unit{};
  unit.matrix = index;
  unit.tile_begin = tile_begin;
  unit.tile_end = tile_end;
  unit.scales_unit = -1;
  for (int part = 0; part < kParts; ++part) {
    const StoredTensor& whole = matrix.parts[part];
    if (whole.file < 0 || whole.bytes == 0 || !is_wanted(part)) continue;
    const int64_t stride = matrix.tile_bytes(static_cast<Part>(part));
    // A dense matrix may end within its last tile.
    const int64_t first = stride * tile_begin;
    const int64_t bytes = stride == 0 ? whole.bytes : std::min(stride * tile_end, whole.bytes) - first;
    unit.parts[part] = {whole.file, whole.offset + first, bytes};
  }
  place_parts(unit);
  return unit;
}

void add_units(const StoredMatrix& matrix, int index, int64_t max_bytes, std::vector<WeightUnit>& units) {
  const int64_t tiles = matrix.row_tiles();
  const int64_t sign_bytes = std::max<int64_t>(1, matrix.tile_bytes(kSigns));
  int64_t other_bytes = 0;
  for (int part = kSigns + 1; part < kParts; ++part) other_bytes += matrix.tile_bytes(static_cast<Part>(part));
  if (tiles * (sign_bytes + other_bytes) <= max_bytes) {
    units.push_back(make_unit(matrix, index, 0, tiles, [](int) { return true; }));
    return;
  }
  const int64_t tiles_at_most = std::max<int64_t>(1, max_bytes / sign_bytes);
  const int64_t pieces = (tiles + tiles_at_most - 1) / tiles_at_most;
  const int64_t tiles_per_unit = (tiles + pieces - 1) / pieces;
  const int64_t units_per_scales = std::max<int64_t>(1, max_bytes / std::max<int64_t>(1, other_bytes * tiles_per_unit));
  int scales_unit = -1;
  for (int64_t begin = 0, piece = 0; begin < tiles; begin += tiles_per_unit, ++piece) {
    if (matrix.is_packed && piece % units_per_scales == 0) {
      const int64_t end = std::min(tiles, begin + units_per_scales * tiles_per_unit);
      scales_unit = static_cast<int>(units.size());
      units.push_back(make_unit(matrix, index, begin, end, [](int part) { return part != kSigns; }));
      units.back().is_scales = true;
    }
    const int64_t end = std::min(tiles, begin + tiles_per_unit);
    units.push_back(make_unit(matrix, index, begin, end, [](int part) { return part == kSigns; }));
    units.back().scales_unit = scales_unit;
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

int64_t stream_buffer_bytes(const std::vector<WeightUnit>& units, int64_t buffers) {
  int64_t largest = 0;
  int64_t largest_with_scales = 0;
  for (const WeightUnit& unit : units) {
    const int64_t scales_bytes = unit.scales_unit < 0 ? 0 : units[static_cast<size_t>(unit.scales_unit)].buffer_bytes;
    largest = std::max(largest, unit.buffer_bytes);
    largest_with_scales = std::max(largest_with_scales, unit.buffer_bytes + scales_bytes);
  }
  // With scales anywhere in twice the room, the unit that needs them fits on one side.
  return std::max(largest * buffers, largest_with_scales * (buffers > 1 ? 2 : 1));
}

WeightStream::WeightStream(const PackedCheckpoint& checkpoint, std::vector<WeightUnit> units, StreamOptions options)
    : checkpoint_(checkpoint),
      units_(std::move(units)),
      options_(std::move(options)),
      resident_(units_.size(), nullptr),
      placement_(0, false) {
  const int count = static_cast<int>(units_.size());
  may_pin_ = options_.back_end == BackEnd::kResident;
  pinned_units_ = may_pin_ ? count : static_cast<int>(std::min<int64_t>(count, options_.pinned_units));
  int64_t pinned_bytes = 0;
  for (int unit = 0; unit < pinned_units_; ++unit) pinned_bytes += units_[unit].buffer_bytes;
  if (pinned_bytes > 0) pinned_memory_ = PageMemory(pinned_bytes, /*huge_pages=*/true);
  std::byte* base = pinned_memory_.data();
  for (int unit = 0; unit < pinned_units_; ++unit) {
    pinned_bases_.push_back(base);
    base += units_[unit].buffer_bytes;
  }
  const int64_t buffer_bytes = may_pin_ ? 0 : stream_buffer_bytes(units_, options_.buffers);
  // A direct read into pages of 4 KiB is hundreds of pieces for the disk; into huge ones it is one or two, and with
  // some disks twice as fast.
  if (buffer_bytes > 0) buffers_ = PageMemory(buffer_bytes, /*huge_pages=*/options_.back_end != BackEnd::kMmap);
  placement_ =
      BufferPlacement(buffer_bytes, /*may_choose=*/options_.back_end != BackEnd::kMmap && options_.buffers > 1);
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

UnitView WeightStream::view(int index, const std::byte* base, const std::byte* scales_base) const {
  const WeightUnit& unit = units_[index];
  const StoredMatrix& matrix = checkpoint_.matrices()[unit.matrix];
  const auto address_in = [](const WeightUnit& holder, const std::byte* memory, Part part) -> const std::byte* {
    if (holder.parts[part].file < 0) return nullptr;
    return memory + (holder.aligned_offsets[part] >= 0 ? holder.aligned_offsets[part] : holder.buffer_offsets[part]);
  };
  const auto address = [&](Part part) -> const void* {
    if (unit.scales_unit < 0 || part == kSigns) return address_in(unit, base, part);
    const WeightUnit& scales = units_[unit.scales_unit];
    const std::byte* const begin = address_in(scales, scales_base, part);
    return begin == nullptr ? nullptr : begin + (unit.tile_begin - scales.tile_begin) * matrix.tile_bytes(part);
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
  // Signs may be anything.
  if (!matrix.is_packed || unit.scales_unit >= 0) return;
  const UnitView view = this->view(index, base, /*scales_base=*/nullptr);
  const PackedWeightView& packed = view.packed;
  const auto check_halves = [&](const char* name, const uint16_t* halves, int64_t per_tile, bool allow_negative) {
    if (halves == nullptr) return;
    const int64_t count = packed.row_tiles * per_tile * kRowsPerTile;
    if (are_halves_valid(halves, count, allow_negative)) return;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i / (per_tile * kRowsPerTile) * kRowsPerTile + i % kRowsPerTile;
      if (row >= view.rows || (is_finite_half(halves[i]) && (allow_negative || halves[i] <= 0x8000u))) continue;
      fail(ErrorKind::kCheckpoint, checkpoint_.files()[matrix.parts[kSigns].file]->path(), ": tensor ", matrix.name,
           ".", name, ": expected finite values", allow_negative ? "" : " of at least 0", ", got the float16 bits ",
           halves[i], " at row ", view.first_row + row);
    }
  };
  check_halves("scales", packed.scales, packed.planes, /*allow_negative=*/false);
  check_halves("outlier_scales", packed.outlier_scales, 1, /*allow_negative=*/true);
  check_halves("means", packed.means, 1, /*allow_negative=*/true);
  if (packed.column_scales != nullptr &&
      !are_halves_valid(packed.column_scales, packed.in_features, /*allow_negative=*/true)) {
    fail(ErrorKind::kCheckpoint, checkpoint_.files()[matrix.parts[kSigns].file]->path(), ": tensor ", matrix.name,
         ".column_scales: expected finite values");
  }
  const int64_t columns = packed.row_tiles * packed.outliers * kRowsPerTile;
  if (packed.in_features > UINT16_MAX || largest(packed.outlier_columns, columns) < packed.in_features) return;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t row = i / (packed.outliers * kRowsPerTile) * kRowsPerTile + i % kRowsPerTile;
    if (row >= view.rows || packed.outlier_columns[i] < packed.in_features) continue;
    fail(ErrorKind::kCheckpoint, checkpoint_.files()[matrix.parts[kSigns].file]->path(), ": tensor ", matrix.name,
         ".outlier_columns: expected columns below ", packed.in_features, ", got ", packed.outlier_columns[i],
         " at row ", view.first_row + row);
  }
}

void WeightStream::read_range(const Slot& slot, const PageRange& range) const {
  const DataFile& file = *checkpoint_.files()[range.file];
  if (uses_mapping(slot)) {
    file.map_pages(range.offset, range.bytes, slot.base + range.buffer_offset);
  } else {
    file.read_pages(range.offset, range.bytes, slot.base + range.buffer_offset);
  }
}

void WeightStream::finish(const Slot& slot) const {
  const WeightUnit& unit = units_[slot.unit];
  for (int part = 0; part < kParts; ++part) {
    if (unit.parts[part].file < 0) continue;
    checkpoint_.files()[unit.parts[part].file]->check_unchanged();
    if (unit.aligned_offsets[part] < 0 || uses_mapping(slot)) continue;
    std::memcpy(slot.base + unit.aligned_offsets[part], slot.base + unit.buffer_offsets[part], unit.parts[part].bytes);
  }
  check(slot.unit, slot.base);
}

// ---- reading ahead ----

bool WeightStream::take_work(Slot** slot, size_t* range) {
  for (Slot& candidate : slots_) {
    if (candidate.state != State::kFilling || candidate.issued == units_[candidate.unit].reads.size()) continue;
    *slot = &candidate;
    *range = candidate.issued++;
    return true;
  }
  if (!add_slot()) return false;
  *slot = &slots_.back();
  *range = slots_.back().issued++;
  return true;
}

// For the next unit, if there is one to read and room for it.
bool WeightStream::add_slot() {
  if (is_paused_ || slots_.size() >= kMaxSlots) return false;
  const int unit = next_to_read();
  if (unit < 0 || (options_.buffers == 1 && unit != wanted_)) return false;
  std::vector<BufferRange> used;
  for (const Slot& other : slots_) {
    // The order came round to a unit that is still in use: a pass of few units.
    if (other.unit == unit) return false;
    used.push_back(other.place);
  }
  Slot slot{};
  slot.unit = unit;
  slot.is_pinned = may_pin_ && unit < pinned_units_;
  if (slot.is_pinned) {
    slot.base = pinned_bases_[unit];
  } else {
    const int64_t bytes = units_[unit].buffer_bytes;
    const int64_t begin = placement_.place(bytes, used);
    if (begin < 0) return false;
    slot.place = {begin, begin + bytes};
    slot.base = buffers_.data() + begin;
    placement_.take(slot.place);
  }
  slots_.push_back(slot);
  next_unit_ = (unit + 1) % static_cast<int>(units_.size());
  may_pin_ = may_pin_ || next_unit_ == 0;
  return true;
}

// The first unit from next_unit_ on that is not resident; -1: all are.
int WeightStream::next_to_read() const {
  const int count = static_cast<int>(units_.size());
  for (int i = 0; i < count; ++i) {
    const int unit = (next_unit_ + i) % count;
    if (resident_[unit] == nullptr) return unit;
  }
  return -1;
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
    const std::vector<PageRange>& ranges = units_[slot->unit].reads;
    const PageRange& range = ranges[index];
    if (reads_in_flight_++ == 0) placement_.begin_reads(BufferPlacement::Clock::now());
    lock.unlock();
    std::exception_ptr error;
    try {
      read_range(*slot, range);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    bytes_read_ += range.bytes;
    const auto now = BufferPlacement::Clock::now();
    placement_.count_read(range.bytes, now);
    if (--reads_in_flight_ == 0) placement_.end_reads(now);
    if (error != nullptr && slot->error == nullptr) slot->error = error;
    if (++slot->done < ranges.size()) continue;
    if (slot->error == nullptr) {
      lock.unlock();
      try {
        finish(*slot);
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

// Forgets what was read ahead, but for one unit. Nothing more is read before the next unit is asked for: after an error
// that would find the same fault.
void WeightStream::drain(int kept_unit, std::unique_lock<std::mutex>& lock) {
  is_paused_ = true;
  // Ranges that no thread has taken yet are taken still: a slot is short.
  progress_.wait(lock, [&] {
    return std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.state == State::kReady; });
  });
  for (auto slot = slots_.begin(); slot != slots_.end();) {
    const auto next = std::next(slot);
    if (slot->unit != kept_unit) forget(slot);
    slot = next;
  }
}

void WeightStream::forget(std::list<Slot>::iterator slot) {
  if (uses_mapping(*slot)) PageMemory::reset(slot->base, units_[slot->unit].buffer_bytes);
  slots_.erase(slot);
}

// The memory of a unit; that of its scales is in use already.
std::byte* WeightStream::wait_for(int unit, int scales_unit, std::unique_lock<std::mutex>& lock) {
  if (resident_[unit] != nullptr) return resident_[unit];
  auto slot = slots_.begin();
  if (slot != slots_.end() && slot->unit == scales_unit) ++slot;
  wanted_ = unit;
  if (slot == slots_.end() || slot->unit != unit) {
    if (slot != slots_.end() || next_to_read() != unit) {
      drain(scales_unit, lock);
      next_unit_ = unit;
    }
    is_paused_ = false;
    add_slot();
    slot = std::prev(slots_.end());
  }
  work_.notify_all();
  const auto is_ready = [&] { return slot->state == State::kReady; };
  if (!is_ready()) {
    const auto start = std::chrono::steady_clock::now();
    while (!progress_.wait_for(lock, kStopInterval, is_ready)) {
      if (options_.should_stop && options_.should_stop()) fail(ErrorKind::kInterrupted, "interrupted");
    }
    seconds_waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (slot->error != nullptr) {
    const std::exception_ptr error = slot->error;
    drain(/*kept_unit=*/-1, lock);
    std::rethrow_exception(error);
  }
  return slot->base;
}

UnitView WeightStream::acquire(int unit) {
  if (is_resident(unit)) return resident_view(unit);
  std::unique_lock<std::mutex> lock(mutex_);
  const int scales_unit = units_[unit].scales_unit;
  const std::byte* const scales_base = scales_unit < 0 ? nullptr : wait_for(scales_unit, /*scales_unit=*/-1, lock);
  return view(unit, wait_for(unit, scales_unit, lock), scales_base);
}

void WeightStream::release(int unit) {
  if (is_resident(unit)) return;
  const std::unique_lock<std::mutex> lock(mutex_);
  retire(unit);
  const int scales_unit = units_[unit].scales_unit;
  const bool is_last = static_cast<size_t>(unit) + 1 == units_.size() || units_[unit + 1].scales_unit != scales_unit;
  if (scales_unit >= 0 && is_last) retire(scales_unit);
  work_.notify_all();
}

void WeightStream::retire(int unit) {
  const auto slot = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& other) { return other.unit == unit; });
  if (slot == slots_.end()) return;
  if (slot->is_pinned) resident_[unit] = slot->base;
  forget(slot);
}

}  // namespace loop_singular_bit::runtime
