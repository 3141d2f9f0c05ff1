// Exact columns in prefill. The columns of all tokens of a unit are listed once, without repetition: massive
// activations mostly share theirs. For every row tile their weights are expanded to float, outliers included, and
// multiplied with the values of each token. Include after a simd/ header.
#pragma once

#include "generic/activations.h"
#include "generic/element_types.h"

namespace loop_singular_bit {
namespace {

// Of the tokens of one unit. A slot is the number of a column in the list.
class UnitExactColumns {
 public:
  struct Token {
    int32_t count;
    uint16_t slots[kExactColumns];
    float values[kExactColumns];
  };

  static int64_t bytes(int64_t in_features, int64_t tokens) {
    const int64_t words = most_slots(tokens) + map_columns(in_features);
    return kHeaderBytes + tokens * static_cast<int64_t>(sizeof(Token)) + words * static_cast<int64_t>(sizeof(uint16_t));
  }
  static constexpr int64_t most_slots(int64_t tokens) { return tokens * kExactColumns; }

  UnitExactColumns(int64_t in_features, int64_t tokens, void* memory)
      : in_features_(in_features),
        all_tokens_(tokens),
        slot_count_(static_cast<int32_t*>(memory)),
        tokens_(reinterpret_cast<Token*>(static_cast<char*>(memory) + kHeaderBytes)),
        columns_(reinterpret_cast<uint16_t*>(tokens_ + tokens)),
        slot_of_column_(columns_ + most_slots(tokens)) {}

  void clear() const {
    *slot_count_ = 0;
    for (int64_t t = 0; t < all_tokens_; ++t) tokens_[t].count = 0;
    for (int64_t i = 0; i < kFilterWords; ++i) filter()[i] = 0;
  }

  // Columns are those of a token of this width.
  void add(int64_t token, const ExactColumns& exact) const {
    if (exact.exact_count == 0) return;
    if (*slot_count_ == 0) {
      for (int64_t k = 0; k < map_columns(in_features_); ++k) slot_of_column_[k] = kNoSlot;
    }
    Token& added = tokens_[token];
    added.count = exact.exact_count;
    for (int32_t i = 0; i < exact.exact_count; ++i) {
      uint16_t& slot = slot_of_column_[exact.exact_columns[i]];
      if (slot == kNoSlot) {
        columns_[*slot_count_] = static_cast<uint16_t>(exact.exact_columns[i]);
        slot = static_cast<uint16_t>((*slot_count_)++);
        filter()[exact.exact_columns[i] / 16 % kFilterWords] |=
            static_cast<uint16_t>(1u << exact.exact_columns[i] % 16);
      }
      added.slots[i] = slot;
      added.values[i] = exact.exact_values[i];
    }
  }

  int64_t slot_count() const { return *slot_count_; }
  int64_t column(int64_t slot) const { return columns_[slot]; }
  const Token& token(int64_t index) const { return tokens_[index]; }

  // Bit k % 16 of word k / 16 % kFilterWords is set for every exact column k, and for others.
  static constexpr int64_t kFilterWords = 64;
  uint16_t* filter() const { return reinterpret_cast<uint16_t*>(slot_count_ + 2); }

  // kNoSlot if it is no exact column of this unit, or out of range. Not to be called while slot_count() is 0.
  static constexpr uint16_t kNoSlot = 0xffff;
  uint16_t slot_of(uint16_t column) const { return slot_of_column_[column < in_features_ ? column : in_features_]; }

 private:
  static constexpr int64_t kHeaderBytes = 8 + kFilterWords * static_cast<int64_t>(sizeof(uint16_t));
  // The last one stands for all that are out of range.
  static constexpr int64_t map_columns(int64_t in_features) { return in_features + 1; }

  int64_t in_features_, all_tokens_;
  int32_t* slot_count_;
  Token* tokens_;
  uint16_t* columns_;         // [slots]
  uint16_t* slot_of_column_;  // [in_features + 1]; undefined while there are no slots
};

// What follows is rarely called. Inlined, it would cost the loops around it their registers.

// weights[slot][row] of a row tile, without outliers, means and column scales.
__attribute__((noinline)) void expand_exact_planes(const PackedWeightView& weight, int64_t tile,
                                                   const UnitExactColumns& exact, float* weights) {
  for (int64_t first_row = 0; first_row < kRowsPerTile; first_row += kLanes) {
    F32x16 lowest = splat(0.0f);  // with every sign -
    F32x16 twice[kMaxPlanes];
    for (int64_t p = 0; p < weight.planes; ++p) {
      const F32x16 scale = load_float16(weight.scales + (tile * weight.planes + p) * kRowsPerTile + first_row);
      lowest = sub(lowest, scale);
      twice[p] = add(scale, scale);
    }
    const int32_t* signs = weight.signs + tile * weight.planes * weight.words * kRowsPerTile + first_row;
    for (int64_t slot = 0; slot < exact.slot_count(); ++slot) {
      const int64_t column = exact.column(slot);
      const int32_t* word = signs + column / kColumnsPerWord * kRowsPerTile;
      const F32x16 bit = splat_bits(1u << (column % kColumnsPerWord));
      F32x16 sum = lowest;
      for (int64_t p = 0; p < weight.planes; ++p, word += weight.words * kRowsPerTile) {
        sum = add_where(has_bits(load(reinterpret_cast<const float*>(word)), bit), sum, twice[p]);
      }
      store(weights + slot * kRowsPerTile + first_row, sum);
    }
  }
}

// Adds the outliers of the tile. AVX-512 has its own way.
[[maybe_unused]] __attribute__((noinline)) void add_exact_outliers(const PackedWeightView& weight, int64_t tile,
                                                                   const UnitExactColumns& exact, float* weights) {
  float outlier_scales[kRowsPerTile];
  for (int64_t row = 0; row < kRowsPerTile; row += kLanes) {
    store(outlier_scales + row, load_float16(weight.outlier_scales + tile * kRowsPerTile + row));
  }
  const uint16_t* columns = weight.outlier_columns + tile * weight.outliers * kRowsPerTile;
  const int8_t* deltas = weight.outlier_deltas + tile * weight.outliers * kRowsPerTile;
  for (int64_t i = 0; i < weight.outliers; ++i, columns += kRowsPerTile, deltas += kRowsPerTile) {
    for (int64_t row = 0; row < kRowsPerTile; ++row) {
      const uint16_t slot = exact.slot_of(columns[row]);
      if (slot == UnitExactColumns::kNoSlot) continue;
      weights[slot * kRowsPerTile + row] += outlier_scales[row] * static_cast<float>(deltas[row]);
    }
  }
}

// rows[32] += sum over the exact columns of a token of value * weight.
__attribute__((noinline)) void add_exact_columns(const UnitExactColumns::Token& token, const float* weights,
                                                 float* rows) {
  F32x16 low = load(rows), high = load(rows + kLanes);
  for (int32_t i = 0; i < token.count; ++i) {
    const F32x16 value = splat(token.values[i]);
    const float* of_slot = weights + token.slots[i] * kRowsPerTile;
    low = fused_multiply_add(value, load(of_slot), low);
    high = fused_multiply_add(value, load(of_slot + kLanes), high);
  }
  store(rows, low);
  store(rows + kLanes, high);
}

}  // namespace
}  // namespace loop_singular_bit
