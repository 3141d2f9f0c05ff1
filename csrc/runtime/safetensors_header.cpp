#include "safetensors_header.h"

#include <algorithm>
#include <string_view>

#include "error.h"
#include "json.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the safetensors package
constexpr int64_t kLengthBytes = 8;
constexpr size_t kMaxDimensions = 16;

int64_t item_bytes(const Json& dtype) {
  static constexpr std::pair<std::string_view, int64_t> kSizes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
      {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};
  for (const auto& [name, bytes] : kSizes) {
    if (name == dtype.string()) return bytes;
  }
  fail(ErrorKind::kCheckpoint, dtype.where(), ": the dtype ", json_quoted(dtype.string()), " is unknown");
}

TensorEntry parse_entry(const std::string& name, const Json& fields, int64_t data_start, int64_t data_bytes) {
  TensorEntry entry{name, fields.at("dtype").string(), {}, 0, item_bytes(fields.at("dtype"))};
  if (fields.at("shape").array().size() > kMaxDimensions) {
    fail(ErrorKind::kCheckpoint, fields.where(), ": expected at most ", kMaxDimensions, " dimensions");
  }
  for (const Json& extent : fields.at("shape").array()) {
    entry.shape.push_back(extent.integer(0, int64_t{1} << 40));
    if (__builtin_mul_overflow(entry.bytes, entry.shape.back(), &entry.bytes)) {
      fail(ErrorKind::kCheckpoint, fields.where(), ": the shape overflows 64 bits");
    }
  }
  const Json::Array& range = fields.at("data_offsets").array();
  if (range.size() != 2)
    fail(ErrorKind::kCheckpoint, fields.where(), ": expected two data_offsets, got ", range.size());
  const int64_t begin = range[0].integer(0, data_bytes);
  const int64_t end = range[1].integer(begin, data_bytes);
  if (end - begin != entry.bytes) {
    fail(ErrorKind::kCheckpoint, fields.where(), ": dtype and shape need ", entry.bytes, " bytes, data_offsets span ",
         end - begin);
  }
  entry.offset = data_start + begin;
  return entry;
}

void check_gapless(const std::string& path, std::vector<const TensorEntry*> entries, int64_t data_start, int64_t size) {
  std::sort(entries.begin(), entries.end(), [](const TensorEntry* a, const TensorEntry* b) {
    return a->offset != b->offset ? a->offset < b->offset : a->bytes < b->bytes;
  });
  int64_t position = data_start;
  for (const TensorEntry* entry : entries) {
    if (entry->offset != position) {
      fail(ErrorKind::kCheckpoint, path, ": tensor ", entry->name, ": expected at byte ", position,
           " of the file, where the one before ends; it is at ", entry->offset);
    }
    position += entry->bytes;
  }
  if (position != size) {
    fail(ErrorKind::kCheckpoint, path, ": the tensors end at byte ", position, ", the file at ", size);
  }
}

}  // namespace

std::vector<TensorEntry> read_safetensors_header(const DataFile& file) {
  if (file.size() < kLengthBytes) {
    fail(ErrorKind::kCheckpoint, file.path(), ": not a safetensors file: it has ", file.size(), " bytes");
  }
  uint8_t length_bytes[kLengthBytes];
  file.read(0, kLengthBytes, length_bytes);
  uint64_t length = 0;
  for (int64_t i = kLengthBytes - 1; i >= 0; --i) length = length << 8 | length_bytes[i];
  if (length > kMaxHeaderBytes || static_cast<int64_t>(length) > file.size() - kLengthBytes) {
    fail(ErrorKind::kCheckpoint, file.path(), ": not a safetensors file, or truncated: a header of ", length,
         " bytes in a file of ", file.size());
  }
  std::string text(length, '\0');
  file.read(kLengthBytes, static_cast<int64_t>(length), text.data());
  const Json header = Json::parse(text, file.path());
  const int64_t data_start = kLengthBytes + static_cast<int64_t>(length);
  std::vector<TensorEntry> entries;
  for (const auto& [name, fields] : header.object()) {
    if (name != "__metadata__") entries.push_back(parse_entry(name, fields, data_start, file.size() - data_start));
  }
  std::vector<const TensorEntry*> pointers;
  for (const TensorEntry& entry : entries) pointers.push_back(&entry);
  check_gapless(file.path(), pointers, data_start, file.size());
  return entries;
}

}  // namespace loop_singular_bit::runtime
