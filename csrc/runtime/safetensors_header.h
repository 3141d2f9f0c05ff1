// The header of a safetensors file, checked against the file: which tensor lies where.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "files.h"

namespace loop_singular_bit::runtime {

struct TensorEntry {
  std::string name;
  std::string dtype;  // as the header writes it, such as "BF16"
  std::vector<int64_t> shape;
  int64_t offset;  // of the first byte, from the start of the file
  int64_t bytes;
};

// Sorted by name. Throws Error(kCheckpoint) naming file and tensor: no safetensors file, sizes that contradict each
// other or the file, tensors that overlap or leave holes.
std::vector<TensorEntry> read_safetensors_header(const DataFile& file);

}  // namespace loop_singular_bit::runtime
