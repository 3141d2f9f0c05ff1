// copy_to_huge_pages: copies of tensors, one behind the other in memory that the kernel may back with huge pages.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace loop_singular_bit {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;
constexpr int64_t kTensorAlignment = 64;

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory that begins where a huge page can, and goes back to the kernel at the end.
class HugePageMemory {
 public:
  explicit HugePageMemory(int64_t bytes) : mapped_bytes_(static_cast<size_t>(bytes + kHugePageBytes)) {
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(mapping_ != MAP_FAILED, "copy_to_huge_pages: no memory for ", bytes, " bytes: ", std::strerror(errno));
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapping_));
    data_ = static_cast<char*>(mapping_) + (rounded_up(address, kHugePageBytes) - address);
    // Of the pages that are filled only: the rest of another one would be taken and not used. A kernel that has no huge
    // pages refuses, and the memory is as any other.
    const int64_t filled = bytes / kHugePageBytes * kHugePageBytes;
    if (filled > 0) madvise(data_, static_cast<size_t>(filled), MADV_HUGEPAGE);
  }
  HugePageMemory(const HugePageMemory&) = delete;
  HugePageMemory& operator=(const HugePageMemory&) = delete;
  ~HugePageMemory() { munmap(mapping_, mapped_bytes_); }

  char* data() const { return data_; }

 private:
  size_t mapped_bytes_;
  void* mapping_ = nullptr;
  char* data_ = nullptr;
};

// Every copy has a storage of its own: views of one storage would all be saved with all of it, and safetensors refuses
// them. The memory goes when the last of the copies does.
std::vector<at::Tensor> copy_to_huge_pages(at::TensorList tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    bytes += rounded_up(static_cast<int64_t>(tensor.nbytes()), kTensorAlignment);
  }
  const auto memory = std::make_shared<HugePageMemory>(bytes);
  char* next = memory->data();
  std::vector<at::Tensor> copies;
  copies.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor source = tensor.contiguous();
    if (source.nbytes() > 0) std::memcpy(next, source.const_data_ptr(), source.nbytes());
    copies.push_back(at::from_blob(next, source.sizes(), [memory](void*) {}, source.options()));
    next += rounded_up(static_cast<int64_t>(source.nbytes()), kTensorAlignment);
  }
  return copies;
}

}  // namespace
}  // namespace loop_singular_bit

TORCH_LIBRARY_IMPL(loop_singular_bit, CPU, m) { m.impl("copy_to_huge_pages", &loop_singular_bit::copy_to_huge_pages); }
