// Memory in whole pages, and files that are read without surprises: exact counts, unchanged since they were opened.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace loop_singular_bit::runtime {

constexpr int64_t kPageBytes = 4096;  // what O_DIRECT wants offsets, lengths and memory to be multiples of

constexpr int64_t page_floor(int64_t bytes) { return bytes / kPageBytes * kPageBytes; }
constexpr int64_t page_ceiling(int64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

// Zeroed memory from the kernel, not from malloc's heap: pages that were never written are not resident, and all of it
// goes back at the end.
class PageMemory {
 public:
  PageMemory() = default;
  // huge_pages: aligned for, and advised to use, pages of 2 MiB. Throws Error(kMemoryBudget) when there is none.
  explicit PageMemory(int64_t bytes, bool huge_pages = false);
  PageMemory(PageMemory&& other) noexcept { swap(other); }
  PageMemory& operator=(PageMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PageMemory();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // Makes whole pages what they were at the start: zero, not resident, and no mapping of a file.
  static void reset(void* pages, int64_t bytes);

 private:
  void swap(PageMemory& other);

  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  void* mapping_ = nullptr;
  int64_t mapping_bytes_ = 0;
};

// All errors are Error(kDisk) and name the file.
class DataFile {
 public:
  explicit DataFile(const std::string& path);
  DataFile(const DataFile&) = delete;
  DataFile& operator=(const DataFile&) = delete;
  ~DataFile();

  const std::string& path() const { return path_; }
  int64_t size() const { return status_.st_size; }

  // Throws when size, modification time or identity are not those of the start.
  void check_unchanged() const;

  // Through the page cache. expect() tells the system of a read that follows: several are then read at once.
  void expect(int64_t offset, int64_t bytes) const;
  void read(int64_t offset, int64_t bytes, void* target) const;

  // From here on read_pages() bypasses the page cache where the file system can do that; the answer.
  bool use_direct();

  // Reads whole pages; offset and target are multiples of kPageBytes. The file may end within the last page.
  void read_pages(int64_t offset, int64_t bytes, void* target) const;

  // Maps whole pages read-only in place of the memory at target, and brings them in. The file may end within the last
  // page. A file that was cut short is an error here; afterwards touching it would end the process with a signal.
  void map_pages(int64_t offset, int64_t bytes, void* target) const;

 private:
  [[noreturn]] void fail_read(int64_t offset, int64_t bytes, int error) const;

  std::string path_;
  int descriptor_ = -1;
  int direct_descriptor_ = -1;
  struct stat status_ = {};
};

// Whole small file as text. Throws Error(kCheckpoint) when it is missing or larger than `limit`.
std::string read_text_file(const std::string& path, int64_t limit);

// Of this process, in bytes: the peak (VmHWM) and the present (VmRSS) of resident memory.
int64_t peak_resident_bytes();
int64_t resident_bytes();
// Of the machine, or of the control group that limits this process.
int64_t available_memory_bytes();

}  // namespace loop_singular_bit::runtime
