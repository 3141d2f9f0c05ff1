#include "files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "error.h"
#include "safetensors_header.h"

namespace loop_singular_bit::runtime {
namespace {

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content) {
    const int descriptor = mkstemp(path_);
    EXPECT_GE(descriptor, 0);
    EXPECT_EQ(write(descriptor, content.data(), content.size()), static_cast<ssize_t>(content.size()));
    close(descriptor);
  }
  ~TemporaryFile() { unlink(path_); }
  const char* path() const { return path_; }

 private:
  char path_[64] = "/tmp/loop_singular_bit_files_test_XXXXXX";
};

std::string message_of(ErrorKind kind, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind, kind) << error.what();
    return error.what();
  }
  return "";
}

std::string safetensors(const std::string& header, size_t data_bytes) {
  std::string text(8, '\0');
  for (int i = 0; i < 8; ++i) text[i] = static_cast<char>(header.size() >> (8 * i) & 255);
  return text + header + std::string(data_bytes, 'x');
}

TEST(PageMemory, IsZeroAndAligned) {
  for (const bool huge_pages : {false, true}) {
    const PageMemory memory(10'000, huge_pages);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % (huge_pages ? 2 << 20 : kPageBytes), 0u);
    for (int64_t i = 0; i < memory.bytes(); ++i) ASSERT_EQ(memory.data()[i], std::byte{0});
  }
}

TEST(DataFile, ReadsPagesToTheEndOfTheFile) {
  std::string content(3 * kPageBytes + 100, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 % 251);
  const TemporaryFile temporary(content);
  for (const bool is_direct : {false, true}) {
    DataFile file(temporary.path());
    if (is_direct) file.use_direct();
    const PageMemory memory(3 * kPageBytes);
    file.read_pages(kPageBytes, 3 * kPageBytes, memory.data());
    EXPECT_EQ(std::memcmp(memory.data(), content.data() + kPageBytes, 2 * kPageBytes + 100), 0);
    const PageMemory place(4 * kPageBytes);
    file.map_pages(0, 4 * kPageBytes, place.data());
    EXPECT_EQ(std::memcmp(place.data(), content.data(), content.size()), 0);
    PageMemory::reset(place.data(), 4 * kPageBytes);
    for (int64_t i = 0; i < place.bytes(); ++i) ASSERT_EQ(place.data()[i], std::byte{0});
  }
}

TEST(DataFile, SaysWhenAFileIsCutShortOrChanged) {
  const TemporaryFile temporary(std::string(4 * kPageBytes, 'a'));
  for (const bool is_direct : {false, true}) {
    DataFile file(temporary.path());
    if (is_direct) file.use_direct();
    file.check_unchanged();
    ASSERT_EQ(truncate(temporary.path(), kPageBytes + 5), 0);
    const PageMemory memory(4 * kPageBytes);
    EXPECT_NE(
        message_of(ErrorKind::kDisk, [&] { file.read_pages(0, 4 * kPageBytes, memory.data()); }).find("truncated"),
        std::string::npos);
    EXPECT_NE(message_of(ErrorKind::kDisk, [&] { file.check_unchanged(); }).find("changed while in use"),
              std::string::npos);
    ASSERT_EQ(truncate(temporary.path(), 4 * kPageBytes), 0);
  }
}

TEST(DataFile, PassesOnWhatTheSystemReports) {
  // Nothing is mapped at address 0: the kernel answers EIO.
  const DataFile memory("/proc/self/mem");
  char byte;
  EXPECT_NE(message_of(ErrorKind::kDisk, [&] { memory.read(0, 1, &byte); }).find("Input/output error"),
            std::string::npos);
  EXPECT_NE(message_of(ErrorKind::kDisk, [] { DataFile("/nowhere/at/all"); }).find("No such file"), std::string::npos);
  EXPECT_NE(message_of(ErrorKind::kDisk, [] { DataFile("/tmp"); }).find("not a regular file"), std::string::npos);
}

TEST(SafetensorsHeader, FindsTensors) {
  const TemporaryFile temporary(safetensors(
      R"({"__metadata__": {"format": "pt"}, "b": {"dtype": "F16", "shape": [2, 3], "data_offsets": [4, 16]},)"
      R"( "a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "z": {"dtype": "I8", "shape": [0], "data_offsets": [16, 16]}})",
      16));
  const DataFile file(temporary.path());
  const std::vector<TensorEntry> entries = read_safetensors_header(file);
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(entries[1].offset, file.size() - 12);
  EXPECT_EQ(entries[1].bytes, 12);
}

TEST(SafetensorsHeader, RefusesWhatContradictsItself) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 4]}})", "need 3 bytes"},
      {R"({"a": {"dtype": "I8", "shape": [5], "data_offsets": [0, 5]}})", "expected an integer from 0 to 4"},
      {R"({"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}})", "the tensors end at"},
      {R"({"a": {"dtype": "I8", "shape": [3], "data_offsets": [1, 4]}})", "expected at byte"},
      {R"({"a": {"dtype": "I9", "shape": [4], "data_offsets": [0, 4]}})", "is unknown"},
      {R"({"a": {"dtype": "F64", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}})", "overflows"},
      {R"({"a": {"dtype": "I8", "shape": [-4], "data_offsets": [0, 4]}})", "expected an integer from 0"},
      {R"({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0]}})", "expected two data_offsets"},
      {R"({"a": {"dtype": "I8", "shape": [4]}})", "'data_offsets' is missing"},
      {R"(["a"])", "expected an object"}};
  for (const auto& [header, expected] : cases) {
    const TemporaryFile temporary(safetensors(header, 4));
    const DataFile file(temporary.path());
    const std::string message = message_of(ErrorKind::kCheckpoint, [&] { read_safetensors_header(file); });
    EXPECT_NE(message.find(expected), std::string::npos) << header << "\n" << message;
  }
  for (const std::string& content : {std::string("abc"), std::string(8, '\xff'), safetensors("{}", 0).substr(0, 9)}) {
    const TemporaryFile temporary(content);
    const DataFile file(temporary.path());
    EXPECT_NE(message_of(ErrorKind::kCheckpoint, [&] { read_safetensors_header(file); }).find("not a safetensors file"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace loop_singular_bit::runtime
