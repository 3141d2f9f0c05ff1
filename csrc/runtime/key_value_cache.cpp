#include "key_value_cache.h"

namespace loop_singular_bit::runtime {
namespace {

int64_t element_bytes(CacheType type) { return type == CacheType::kFloat32 ? 4 : type == CacheType::kFloat16 ? 2 : 1; }

int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Per head.
struct HeadBytes {
  int64_t keys, values, scales;
};

HeadBytes head_bytes(int64_t head_dim, int64_t positions, CacheType type) {
  const int64_t rounded = padded(positions, kPositionsPerBlock);
  return {rounded * head_dim * element_bytes(type), rounded * padded(head_dim, kValuePadding) * element_bytes(type),
          type == CacheType::kInt8 ? 2 * rounded * static_cast<int64_t>(sizeof(float)) : 0};
}

}  // namespace

KeyValueCache::KeyValueCache(const ModelConfig& config, int64_t positions, CacheType type)
    : positions_(padded(positions, kPositionsPerBlock)),
      heads_per_layer_(config.key_value_heads),
      head_dim_(config.head_dim),
      type_(type) {
  const HeadBytes one = head_bytes(head_dim_, positions_, type);
  const int64_t heads = config.layers * heads_per_layer_;
  keys_ = PageMemory(one.keys * heads);
  values_ = PageMemory(one.values * heads);
  scales_ = PageMemory(one.scales * heads);
}

int64_t KeyValueCache::bytes(const ModelConfig& config, int64_t positions, CacheType type) {
  const HeadBytes one = head_bytes(config.head_dim, positions, type);
  const int64_t heads = config.layers * config.key_value_heads;
  return page_ceiling(one.keys * heads) + page_ceiling(one.values * heads) + page_ceiling(one.scales * heads);
}

CachedHead KeyValueCache::head(int64_t layer, int64_t key_value_head) const {
  const HeadBytes one = head_bytes(head_dim_, positions_, type_);
  const int64_t index = layer * heads_per_layer_ + key_value_head;
  CachedHead head{};
  head.keys = keys_.data() + index * one.keys;
  head.values = values_.data() + index * one.values;
  if (type_ == CacheType::kInt8) {
    head.key_scales = reinterpret_cast<float*>(scales_.data() + index * one.scales);
    head.value_scales = head.key_scales + positions_;
  }
  head.type = type_;
  head.head_dim = head_dim_;
  head.value_stride = padded(head_dim_, kValuePadding);
  return head;
}

}  // namespace loop_singular_bit::runtime
