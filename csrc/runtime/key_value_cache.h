// Keys and values of all layers for a fixed number of positions. Memory becomes resident as positions are filled.
#pragma once

#include <cstdint>

#include "decoder_kernels.h"
#include "files.h"
#include "model_config.h"

namespace loop_singular_bit::runtime {

class KeyValueCache {
 public:
  KeyValueCache(const ModelConfig& config, int64_t positions, CacheType type);

  CachedHead head(int64_t layer, int64_t key_value_head) const;
  int64_t positions() const { return positions_; }

  // Of all layers, for this many positions.
  static int64_t bytes(const ModelConfig& config, int64_t positions, CacheType type);

 private:
  int64_t positions_;
  int64_t heads_per_layer_;
  int64_t head_dim_;
  CacheType type_;
  PageMemory keys_;
  PageMemory values_;
  PageMemory scales_;
};

}  // namespace loop_singular_bit::runtime
