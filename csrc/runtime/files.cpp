#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;

std::string read_small_file(const char* path) {
  std::string text;
  const int descriptor = open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return text;
  char buffer[4096];
  ssize_t count = 0;
  while ((count = ::read(descriptor, buffer, sizeof(buffer))) > 0) text.append(buffer, static_cast<size_t>(count));
  close(descriptor);
  return text;
}

// The number behind `key`; -1 where there is none.
int64_t number_after(std::string_view text, std::string_view key) {
  const size_t found = text.find(key);
  if (found == std::string_view::npos) return -1;
  size_t start = found + key.size();
  while (start < text.size() && (text[start] == ' ' || text[start] == '\t')) ++start;
  int64_t number = -1;
  std::from_chars(text.data() + start, text.data() + text.size(), number);
  return number;
}

}  // namespace

// ---- PageMemory ----

PageMemory::PageMemory(int64_t bytes, bool huge_pages) : bytes_(page_ceiling(std::max<int64_t>(bytes, 1))) {
  const int64_t alignment = huge_pages ? kHugePageBytes : kPageBytes;
  mapping_bytes_ = bytes_ + alignment - kPageBytes;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw Error(ErrorKind::kMemoryBudget,
                join("the system gives no ", mapping_bytes_, " bytes of memory: ", std::strerror(errno)),
                mapping_bytes_);
  }
  const auto address = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<std::byte*>((address + alignment - 1) / alignment * alignment);
  // Elsewhere a huge page would make memory resident that nobody asked for.
  madvise(data_, bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

PageMemory::~PageMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

void PageMemory::reset(void* pages, int64_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(pages, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) {
    throw Error(ErrorKind::kMemoryBudget, join("the system gives no ", bytes, " bytes of memory"), bytes);
  }
  madvise(pages, bytes, MADV_NOHUGEPAGE);
}

void PageMemory::swap(PageMemory& other) {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
}

// ---- DataFile ----

DataFile::DataFile(const std::string& path) : path_(path), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0) fail(ErrorKind::kDisk, path_, ": cannot be opened: ", std::strerror(errno));
  if (fstat(descriptor_, &status_) != 0 || !S_ISREG(status_.st_mode)) {
    close(descriptor_);
    fail(ErrorKind::kDisk, path_, ": is not a regular file");
  }
}

DataFile::~DataFile() {
  if (direct_descriptor_ >= 0) close(direct_descriptor_);
  close(descriptor_);
}

void DataFile::check_unchanged() const {
  struct stat now;
  if (fstat(descriptor_, &now) != 0) fail(ErrorKind::kDisk, path_, ": ", std::strerror(errno));
  if (now.st_size != status_.st_size) {
    fail(ErrorKind::kDisk, path_, ": had ", status_.st_size, " bytes when it was opened and has ", now.st_size,
         " now: it was changed while in use");
  }
  if (now.st_mtim.tv_sec != status_.st_mtim.tv_sec || now.st_mtim.tv_nsec != status_.st_mtim.tv_nsec) {
    fail(ErrorKind::kDisk, path_, ": was changed while in use");
  }
}

void DataFile::fail_read(int64_t offset, int64_t bytes, int error) const {
  if (error == 0) {
    fail(ErrorKind::kDisk, path_, ": ends before byte ", offset + bytes, " of which a read of ", bytes,
         " bytes needs all: the file is truncated");
  }
  fail(ErrorKind::kDisk, path_, ": reading ", bytes, " bytes at offset ", offset, " failed: ", std::strerror(error));
}

void DataFile::expect(int64_t offset, int64_t bytes) const {
  // A hint: where it is not followed, reading takes longer.
  posix_fadvise(descriptor_, offset, bytes, POSIX_FADV_WILLNEED);
}

void DataFile::read(int64_t offset, int64_t bytes, void* target) const {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t count = pread(descriptor_, static_cast<char*>(target) + done, bytes - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_read(offset, bytes, count < 0 ? errno : 0);
    done += count;
  }
}

bool DataFile::use_direct() {
  if (direct_descriptor_ >= 0) return true;
  direct_descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (direct_descriptor_ < 0) return false;
  // Some file systems accept the flag and refuse the reads.
  const PageMemory page(kPageBytes);
  if (pread(direct_descriptor_, page.data(), kPageBytes, 0) < 0) {
    close(direct_descriptor_);
    direct_descriptor_ = -1;
  }
  return direct_descriptor_ >= 0;
}

void DataFile::read_pages(int64_t offset, int64_t bytes, void* target) const {
  const int64_t needed = std::min(bytes, size() - offset);
  if (direct_descriptor_ < 0) {
    read(offset, needed, target);
    // What is streamed is not read again soon: it must not push other files out of the cache.
    posix_fadvise(descriptor_, offset, needed, POSIX_FADV_DONTNEED);
    return;
  }
  for (int64_t done = 0; done < needed;) {
    const ssize_t count = pread(direct_descriptor_, static_cast<char*>(target) + done, bytes - done, offset + done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_read(offset, needed, count < 0 ? errno : 0);
    done += count;
    if (done < needed && count % kPageBytes != 0) fail_read(offset, needed, 0);
  }
}

void DataFile::map_pages(int64_t offset, int64_t bytes, void* target) const {
  check_unchanged();
  const int64_t needed = std::min(bytes, page_ceiling(size()) - offset);
  if (mmap(target, needed, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor_, offset) == MAP_FAILED) {
    fail(ErrorKind::kDisk, path_, ": cannot be mapped: ", std::strerror(errno));
  }
  if (madvise(target, needed, MADV_POPULATE_READ) == 0) return;
  if (errno != EINVAL) fail_read(offset, needed, errno);
  // A kernel before 5.14: touch every page.
  for (int64_t i = 0; i < needed; i += kPageBytes) {
    static_cast<void>(*(static_cast<const volatile std::byte*>(target) + i));
  }
}

std::string read_text_file(const std::string& path, int64_t limit) {
  try {
    const DataFile file(path);
    if (file.size() > limit) {
      fail(ErrorKind::kCheckpoint, path, ": expected at most ", limit, " bytes, got ", file.size());
    }
    std::string text(static_cast<size_t>(file.size()), '\0');
    file.read(0, file.size(), text.data());
    return text;
  } catch (const Error& error) {
    throw Error(ErrorKind::kCheckpoint, error.what());
  }
}

// ---- memory of the process and of the machine ----

int64_t peak_resident_bytes() { return number_after(read_small_file("/proc/self/status"), "VmHWM:") * 1024; }

int64_t resident_bytes() { return number_after(read_small_file("/proc/self/status"), "VmRSS:") * 1024; }

int64_t available_memory_bytes() {
  const int64_t machine = number_after(read_small_file("/proc/meminfo"), "MemAvailable:") * 1024;
  const int64_t limit = number_after(read_small_file("/sys/fs/cgroup/memory.max"), "");
  const int64_t used = number_after(read_small_file("/sys/fs/cgroup/memory.current"), "");
  const int64_t cached = number_after(read_small_file("/sys/fs/cgroup/memory.stat"), "\nfile ");
  if (limit < 0 || used < 0) return machine;
  return std::min(machine, std::max<int64_t>(0, limit - used + std::max<int64_t>(cached, 0)));
}

}  // namespace loop_singular_bit::runtime
