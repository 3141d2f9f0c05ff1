// A packed checkpoint on disk (docs/packed_format.md): its configuration, and where each weight of the decoder lies.
// Holds no weights but the small vectors: norms and biases.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "linear_kernels.h"
#include "model_config.h"
#include "safetensors_header.h"

namespace loop_singular_bit::runtime {

// The tensors of a packed weight in the order in which a checkpoint stores them.
enum Part { kSigns, kScales, kOutlierColumns, kOutlierScales, kColumnScales, kMeans, kOutlierDeltas, kParts };

struct StoredTensor {
  int file = -1;  // index into PackedCheckpoint::files(); -1: there is none
  int64_t offset = 0;
  int64_t bytes = 0;
};

// One weight [out_features, in_features], packed or dense.
struct StoredMatrix {
  std::string name;
  int64_t out_features = 0;
  int64_t in_features = 0;
  bool is_packed = false;
  int64_t planes = 0;
  int64_t outliers = 0;
  std::array<StoredTensor, kParts> parts;  // dense: everything is in parts[0]
  ElementType dense_type = ElementType::kFloat32;

  int64_t row_tiles() const { return (out_features + kRowsPerTile - 1) / kRowsPerTile; }
  int64_t words() const { return (in_features + kColumnsPerWord - 1) / kColumnsPerWord; }
  int64_t bytes() const;
  // Bytes of one row tile in each part; what belongs to all rows (column_scales) counts 0.
  int64_t tile_bytes(Part part) const;
};

struct StoredLinear {
  int matrix = -1;          // index into PackedCheckpoint::matrices()
  std::vector<float> bias;  // [out_features], or empty
};

struct StoredLayer {
  std::vector<float> attention_norm;
  std::vector<float> feed_forward_norm;
  std::vector<float> query_norm;  // [head_dim], or empty
  std::vector<float> key_norm;
  StoredLinear query, key, value, output, gate, up, down;
};

class PackedCheckpoint {
 public:
  // Throws Error(kCheckpoint) or Error(kDisk) naming file and tensor.
  explicit PackedCheckpoint(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  const std::vector<std::unique_ptr<DataFile>>& files() const { return files_; }
  const std::vector<StoredMatrix>& matrices() const { return matrices_; }
  const std::vector<StoredLayer>& layers() const { return layers_; }
  int embedding() const { return embedding_; }  // index into matrices()
  const StoredLinear& head() const { return head_; }
  const std::vector<float>& final_norm() const { return final_norm_; }
  const std::string& preset() const { return preset_; }

  // Of norms and biases, which stay in memory.
  int64_t vector_bytes() const;

 private:
  struct Located {
    TensorEntry entry;
    int file;
    bool is_used = false;
  };

  void open_files(const std::string& directory);
  Located* find(const std::string& name);
  Located& take(const std::string& name, const std::vector<int64_t>& shape);
  std::vector<float> take_vector(const std::string& name, int64_t count);
  std::vector<float> take_optional_vector(const std::string& name, int64_t count);
  int take_matrix(const std::string& name, int64_t out_features, int64_t in_features);
  void take_packed_parts(StoredMatrix& matrix, const Json& fields);
  StoredLinear take_linear(const std::string& name, int64_t out_features, int64_t in_features);
  void take_layers();
  void check_all_used();

  std::string directory_;
  Json json_;
  const Json* modules_ = nullptr;
  const Json* tied_modules_ = nullptr;
  ModelConfig config_;
  std::vector<std::unique_ptr<DataFile>> files_;
  std::vector<Located> tensors_;  // sorted by name
  std::vector<StoredMatrix> matrices_;
  std::vector<StoredLayer> layers_;
  int embedding_ = -1;
  StoredLinear head_;
  std::vector<float> final_norm_;
  std::string preset_;
};

}  // namespace loop_singular_bit::runtime
