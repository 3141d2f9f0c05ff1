// Prefill by byte products: a row tile is expanded to levels once and multiplied with the codes of all tokens; outliers
// are multiplied four at a time with codes that lie token by token. Exact columns are added in float. Include after a
// simd/ header with products of bytes.
#pragma once

#include "generic/byte_activations.h"
#include "generic/byte_decode.h"
#include "generic/byte_levels.h"
#include "generic/prefill_exact_columns.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

inline int64_t align(int64_t bytes) {
  return (bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---- prepared activations: units of sixteen tokens ----

constexpr int64_t kUnitTokens = kLanes;

struct PrefillUnit {
  float sums[kUnitTokens];
  float code_scales[kUnitTokens];
  int32_t code_sums[2][kUnitTokens];  // of the int8 codes, or of the high and low halves of 16-bit codes
};

// Where the parts of a unit lie. Tokens beyond the last one have codes of 0.
class UnitLayout {
 public:
  UnitLayout(const PackedWeightView& weight, ActivationPrecision precision)
      : precision_(precision),
        halves_(precision == ActivationPrecision::kInt16 ? 2 : 1),
        in_features_(weight.in_features),
        padded_columns_(round_up(weight.in_features, 64)),
        code_stride_(weight.words * kColumnsPerWord + kActivationAlignment) {}

  int halves() const { return halves_; }

  int64_t unit_bytes() const {
    if (precision_ == ActivationPrecision::kExact) {
      return header_bytes() + kUnitTokens * column_stride() * static_cast<int64_t>(sizeof(float));
    }
    const int64_t exact_bytes =
        has_exact_columns() ? align(UnitExactColumns::bytes(in_features_, kUnitTokens)) : int64_t{0};
    return header_bytes() + halves_ * kUnitTokens * (code_stride_ + padded_columns_) + exact_bytes;
  }

  bool has_exact_columns() const { return precision_ == ActivationPrecision::kInt8; }
  UnitExactColumns exact_columns(void* unit) const {
    return UnitExactColumns(in_features_, kUnitTokens, token_lanes(unit, halves_));
  }

  // kExact: float [in_features] and zeros up to a multiple of 64.
  int64_t column_stride() const { return padded_columns_; }
  float* columns(void* unit, int64_t token) const {
    return reinterpret_cast<float*>(static_cast<char*>(unit) + header_bytes()) + token * column_stride();
  }

  // The codes of one token, grouped by bit.
  // Not a multiple of 4096 apart for most weights: tokens of a block would evict each other from L1.
  int8_t* codes(void* unit, int half, int64_t token) const {
    return reinterpret_cast<int8_t*>(unit) + header_bytes() + (half * kUnitTokens + token) * code_stride_;
  }

  // int8 [columns, 16 tokens]: codes, plus 128 where left bytes are unsigned.
  int8_t* token_lanes(void* unit, int half) const {
    return codes(unit, halves_, 0) + half * kUnitTokens * padded_columns_;
  }

 private:
  static int64_t header_bytes() { return align(sizeof(PrefillUnit)); }

  ActivationPrecision precision_;
  int halves_;
  int64_t in_features_;
  int64_t padded_columns_;
  int64_t code_stride_;
};

inline int64_t prefill_activation_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  return (tokens + kUnitTokens - 1) / kUnitTokens * UnitLayout(weight, precision).unit_bytes();
}

// One word of sixteen tokens, in order: [token][column].
struct UnitCodes {
  alignas(kActivationAlignment) int8_t codes[kUnitTokens][kColumnsPerWord] = {};
};

// target[column * 16 + token]
inline void store_token_lanes(int8_t* target, const UnitCodes& natural) {
  const Bytes64 offset = splat_byte(kLeftBytesAreSigned ? 0 : 128);
  for (int64_t first = 0; first < kColumnsPerWord; first += kLanes) {
    for (int64_t token = 0; token < kUnitTokens; token += 4) {
      alignas(kActivationAlignment) int8_t quads[64];
      const int8_t(*rows)[kColumnsPerWord] = natural.codes + token;
      store_bytes(quads, bytes_add(interleave_bytes(rows[0] + first, rows[1] + first, rows[2] + first, rows[3] + first),
                                   offset));
      for (int64_t k = 0; k < kLanes; ++k) {
        __builtin_memcpy(target + (first + k) * kUnitTokens + token, quads + 4 * k, 4);
      }
    }
  }
}

// The codes of the exact columns of a token become 0.
inline void erase_exact_codes(const UnitExactColumns& exact, int64_t token, const UnitLayout& layout, void* memory) {
  PrefillUnit* unit = static_cast<PrefillUnit*>(memory);
  int8_t* codes = layout.codes(memory, 0, token);
  int8_t* lanes = layout.token_lanes(memory, 0);
  const UnitExactColumns::Token& columns = exact.token(token);
  for (int32_t i = 0; i < columns.count; ++i) {
    const int64_t k = exact.column(columns.slots[i]), of_word = k % kColumnsPerWord;
    int8_t* code = codes + (k - of_word) + of_word % 8 * 4 + of_word / 8;
    unit->code_sums[0][token] -= *code;
    *code = 0;
    lanes[k * kUnitTokens + token] = static_cast<int8_t>(kLeftBytesAreSigned ? 0 : 128);
  }
}

template <ElementType kType>
__attribute__((noinline)) float choose_exact_columns(const PackedWeightView& weight, const LinearInput& input,
                                                     int64_t token, const TokenRange& range, ExactColumns* exact) {
  float block[kExactGroups];
  const auto block_at = [&](int64_t k) {
    for (int64_t i = 0; i < kExactGroups; i += kLanes)
      store(block + i, load_scaled<kType>(weight, input, token, k + i));
    return block;
  };
  return select_outstanding_columns(range.largest, range.square_sum, weight.in_features, block_at, exact);
}

template <ElementType kType, int kHalves>
inline void prepare_codes(const PackedWeightView& weight, const LinearInput& input, int64_t first_token, int64_t tokens,
                          const UnitLayout& layout, void* memory) {
  PrefillUnit* unit = static_cast<PrefillUnit*>(memory);
  const UnitExactColumns exact_columns = layout.exact_columns(memory);
  if (layout.has_exact_columns()) exact_columns.clear();
  F32x16 inverse_scales[kUnitTokens];
  Int32x4 sums[kHalves][kUnitTokens];
  for (int64_t t = 0; t < tokens; ++t) {
    const TokenRange range = range_of<kType>(weight, input, first_token + t);
    float largest = range.largest;
    if (layout.has_exact_columns()) {
      ExactColumns exact;
      largest = choose_exact_columns<kType>(weight, input, first_token + t, range, &exact);
      exact_columns.add(t, exact);
    }
    const CodeScale scale = code_scale(largest, range.sum, kHalves == 2 ? kInt16CodeMax : kInt8CodeMax);
    unit->sums[t] = range.sum;
    unit->code_scales[t] = scale.scale;
    inverse_scales[t] = splat(scale.inverse);
    for (auto& of_half : sums) of_half[t] = zero_sums();
  }
  UnitCodes natural[kHalves];
  for (int64_t word = 0; word < weight.words; ++word) {
    const int64_t k = word * kColumnsPerWord;
    for (int64_t t = 0; t < tokens; ++t) {
      const F32x16 first = load_scaled<kType>(weight, input, first_token + t, k);
      const F32x16 second = load_scaled<kType>(weight, input, first_token + t, k + kLanes);
      const WordCodes codes = encode<kHalves>(first, second, inverse_scales[t]);
      for (int half = 0; half < kHalves; ++half) {
        store_int8(natural[half].codes[t], codes.first[half]);
        store_int8(natural[half].codes[t] + kLanes, codes.second[half]);
        const Codes32 grouped = group_by_bit(codes.first[half], codes.second[half]);
        sums[half][t] = add_codes(sums[half][t], grouped);
        store_codes(layout.codes(memory, half, t) + k, grouped);
      }
    }
    for (int half = 0; half < kHalves; ++half) {
      store_token_lanes(layout.token_lanes(memory, half) + k * kUnitTokens, natural[half]);
    }
  }
  for (int half = 0; half < kHalves; ++half) {
    for (int64_t t = 0; t < tokens; ++t) unit->code_sums[half][t] = total(sums[half][t]);
  }
  if (layout.has_exact_columns()) {
    for (int64_t t = 0; t < tokens; ++t) erase_exact_codes(exact_columns, t, layout, memory);
  }
}

template <ElementType kType>
inline void prepare_unit(const PackedWeightView& weight, const LinearInput& input, int64_t first_token, int64_t tokens,
                         ActivationPrecision precision, const UnitLayout& layout, void* memory) {
  switch (precision) {
    case ActivationPrecision::kInt8:
      return prepare_codes<kType, 1>(weight, input, first_token, tokens, layout, memory);
    case ActivationPrecision::kInt16:
      return prepare_codes<kType, 2>(weight, input, first_token, tokens, layout, memory);
    case ActivationPrecision::kExact:
      for (int64_t t = 0; t < tokens; ++t) {
        float* columns = layout.columns(memory, t);
        static_cast<PrefillUnit*>(memory)->sums[t] = scale_columns<kType>(weight, input, first_token + t, columns).sum;
      }
  }
}

inline void prepare_prefill(const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
                            int64_t unit_begin, int64_t unit_end, ActivationPrecision precision, void* activations) {
  const UnitLayout layout(weight, precision);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t first = unit * kUnitTokens;
    const int64_t count = tokens - first < kUnitTokens ? tokens - first : kUnitTokens;
    void* memory = static_cast<char*>(activations) + unit * layout.unit_bytes();
    switch (input.type) {
      case ElementType::kFloat32:
        prepare_unit<ElementType::kFloat32>(weight, input, first, count, precision, layout, memory);
        break;
      case ElementType::kBFloat16:
        prepare_unit<ElementType::kBFloat16>(weight, input, first, count, precision, layout, memory);
        break;
      case ElementType::kFloat16:
        prepare_unit<ElementType::kFloat16>(weight, input, first, count, precision, layout, memory);
        break;
    }
  }
}

// ---- a thread's scratch ----

// For the levels of a tile, its outliers row by row, the weights of the exact columns of one unit, and the outputs of
// all tokens for its rows.
class Scratch {
 public:
  Scratch(const PackedWeightView& weight, int64_t tokens, void* memory)
      : outlier_stride_(round_up(weight.outliers, 4)), memory_(static_cast<char*>(memory)) {
    deltas_at_ = align(weight.words * kColumnsPerWord * kRowsPerTile);
    columns_at_ = deltas_at_ + align(kRowsPerTile * outlier_stride_);
    exact_at_ = columns_at_ + align(kRowsPerTile * outlier_stride_ * static_cast<int64_t>(sizeof(uint16_t)));
    rows_at_ =
        exact_at_ + UnitExactColumns::most_slots(kUnitTokens) * kRowsPerTile * static_cast<int64_t>(sizeof(float));
    bytes_ = rows_at_ + round_up(tokens, kUnitTokens) * kRowsPerTile * static_cast<int64_t>(sizeof(float));
  }

  int64_t bytes() const { return bytes_; }
  int8_t* levels() const { return reinterpret_cast<int8_t*>(memory_); }
  // [32, outlier_stride]; kExact: [outliers, 32]
  int64_t outlier_stride() const { return outlier_stride_; }
  int8_t* outlier_deltas() const { return reinterpret_cast<int8_t*>(memory_ + deltas_at_); }
  uint16_t* outlier_columns() const { return reinterpret_cast<uint16_t*>(memory_ + columns_at_); }
  // [slots, 32]
  float* exact_weights() const { return reinterpret_cast<float*>(memory_ + exact_at_); }
  // [tokens, 32]
  float* rows(int64_t token) const { return reinterpret_cast<float*>(memory_ + rows_at_) + token * kRowsPerTile; }

 private:
  int64_t outlier_stride_;
  char* memory_;
  int64_t deltas_at_, columns_at_, exact_at_, rows_at_, bytes_;
};

inline int64_t prefill_scratch_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision) {
  return Scratch(weight, tokens, nullptr).bytes();
}

// ---- products ----

// counts[t] = sum over all columns of byte * code, for sixteen rows. At most 65536 x 255 x 128 < 2^31 where bytes are
// unsigned, half of it where they are signed.
template <int kTokens>
inline void multiply_levels(const int8_t* bytes, const int8_t* const* codes, int64_t words, Counts16* counts) {
  Counts16 sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = zero_counts();
  for (int64_t word = 0; word < words; ++word, bytes += 8 * 64) {
    ByteGroups groups[kTokens];
    for (int t = 0; t < kTokens; ++t) groups[t] = load_groups(codes[t] + word * kColumnsPerWord);
    const Bytes64 bytes0 = load_bytes(bytes), bytes1 = load_bytes(bytes + 64);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<0>(sums[t], bytes0, groups[t]);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<1>(sums[t], bytes1, groups[t]);
    const Bytes64 bytes2 = load_bytes(bytes + 128), bytes3 = load_bytes(bytes + 192);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<2>(sums[t], bytes2, groups[t]);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<3>(sums[t], bytes3, groups[t]);
    const Bytes64 bytes4 = load_bytes(bytes + 256), bytes5 = load_bytes(bytes + 320);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<4>(sums[t], bytes4, groups[t]);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<5>(sums[t], bytes5, groups[t]);
    const Bytes64 bytes6 = load_bytes(bytes + 384), bytes7 = load_bytes(bytes + 448);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<6>(sums[t], bytes6, groups[t]);
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_accumulate<7>(sums[t], bytes7, groups[t]);
  }
  for (int t = 0; t < kTokens; ++t) counts[t] = sums[t];
}

template <int kMostTokens = kProductTokens>
inline void multiply_levels(const int8_t* bytes, const int8_t* const* codes, int tokens, int64_t words,
                            Counts16* counts) {
  if constexpr (kMostTokens > 1) {
    if (tokens < kMostTokens) return multiply_levels<kMostTokens - 1>(bytes, codes, tokens, words, counts);
  }
  multiply_levels<kMostTokens>(bytes, codes, words, counts);
}

// The unit of a token, and its place there.
struct TokenPlace {
  char* unit;
  int64_t token;
};

inline TokenPlace place_of(const UnitLayout& layout, const void* activations, int64_t token) {
  // Kernels read what they prepared; UnitLayout hands out pointers for both.
  char* memory = static_cast<char*>(const_cast<void*>(activations));
  return {memory + token / kUnitTokens * layout.unit_bytes(), token % kUnitTokens};
}

// sum of signed level * code, for sixteen rows.
inline F32x16 signed_levels(Counts16 counts, int32_t subtracted) {
  return float_from_counts(counts_sub(counts_add(counts, counts), subtracted));
}

// rows[t, 32] += units * code_scale * (sum of signed level * code), for all tokens.
inline void add_levels(const PackedWeightView& weight, const LevelGroup& group, const UnitLayout& layout,
                       const void* activations, int64_t tokens, const Scratch& scratch) {
  const int halves = layout.halves();
  const int step = kProductTokens / halves;
  const int32_t factor = code_sum_factor(group.levels);
  for (int64_t row = 0; row < kRowsPerTile; row += kLanes) {
    const int8_t* levels = scratch.levels() + row * weight.words * kColumnsPerWord;
    const F32x16 units = load(group.levels.unit + row);
    for (int64_t first = 0; first < tokens; first += step) {
      const int count = tokens - first < step ? static_cast<int>(tokens - first) : step;
      const int8_t* codes[kProductTokens];
      for (int i = 0; i < count * halves; ++i) {
        const TokenPlace place = place_of(layout, activations, first + i / halves);
        codes[i] = layout.codes(place.unit, i % halves, place.token);
      }
      Counts16 counts[kProductTokens];
      multiply_levels(levels, codes, count * halves, weight.words, counts);
      for (int i = 0; i < count; ++i) {
        const TokenPlace place = place_of(layout, activations, first + i);
        const PrefillUnit& unit = *reinterpret_cast<const PrefillUnit*>(place.unit);
        F32x16 sum = signed_levels(counts[i * halves], wrapping_product(factor, unit.code_sums[0][place.token]));
        if (halves == 2) {
          const int32_t low_sum = wrapping_product(factor, unit.code_sums[1][place.token]);
          sum = fused_multiply_add(splat(256.0f), sum, signed_levels(counts[i * halves + 1], low_sum));
        }
        float* target = scratch.rows(first + i) + row;
        const F32x16 scale = mul(units, splat(unit.code_scales[place.token]));
        store(target, fused_multiply_add(scale, sum, load(target)));
      }
    }
  }
}

// Row by row, padded with zero deltas to whole groups of four. Columns out of range become column 0 with a delta of 0.
inline void transpose_outliers(const PackedWeightView& weight, int64_t tile, const Scratch& scratch) {
  const int64_t stride = scratch.outlier_stride();
  for (int64_t i = 0; i < stride; ++i) {
    const int64_t slot = (tile * weight.outliers + i) * kRowsPerTile;
    for (int64_t row = 0; row < kRowsPerTile; ++row) {
      const bool is_used = i < weight.outliers && weight.outlier_columns[slot + row] < weight.in_features;
      scratch.outlier_columns()[row * stride + i] = is_used ? weight.outlier_columns[slot + row] : uint16_t{0};
      scratch.outlier_deltas()[row * stride + i] = is_used ? weight.outlier_deltas[slot + row] : int8_t{0};
    }
  }
}

// Sixteen tokens: sum of delta * code over the outliers of a row. At most 65536 x 255 x 128 < 2^31.
inline F32x16 multiply_outliers(const int8_t* token_lanes, const uint16_t* columns, const int8_t* deltas,
                                int64_t outliers, int32_t delta_sum) {
  Counts16 counts = zero_counts();
  for (int64_t i = 0; i < outliers; i += 4) {
    const Bytes64 codes =
        interleave_bytes(token_lanes + columns[i] * kUnitTokens, token_lanes + columns[i + 1] * kUnitTokens,
                         token_lanes + columns[i + 2] * kUnitTokens, token_lanes + columns[i + 3] * kUnitTokens);
    counts = dot_accumulate_four(counts, codes, deltas + i);
  }
  return float_from_counts(counts_sub(counts, kLeftBytesAreSigned ? 0 : 128 * delta_sum));
}

// rows[t, 32] = outliers * outlier_scale * code_scale, for all tokens.
inline void set_outliers(const PackedWeightView& weight, int64_t tile, const UnitLayout& layout,
                         const void* activations, int64_t tokens, const Scratch& scratch) {
  transpose_outliers(weight, tile, scratch);
  const int64_t stride = scratch.outlier_stride();
  int32_t delta_sums[kRowsPerTile];
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    delta_sums[row] = 0;
    for (int64_t i = 0; i < stride; ++i) delta_sums[row] += scratch.outlier_deltas()[row * stride + i];
  }
  for (int64_t first = 0; first < tokens; first += kUnitTokens) {
    const TokenPlace place = place_of(layout, activations, first);
    const F32x16 code_scales = load(reinterpret_cast<const PrefillUnit*>(place.unit)->code_scales);
    for (int64_t half_row = 0; half_row < kRowsPerTile; half_row += kLanes) {
      F32x16 block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = half_row + i;
        const uint16_t* columns = scratch.outlier_columns() + row * stride;
        const int8_t* deltas = scratch.outlier_deltas() + row * stride;
        F32x16 sum = multiply_outliers(layout.token_lanes(place.unit, 0), columns, deltas, stride, delta_sums[row]);
        if (layout.halves() == 2) {
          const F32x16 low =
              multiply_outliers(layout.token_lanes(place.unit, 1), columns, deltas, stride, delta_sums[row]);
          sum = fused_multiply_add(splat(256.0f), sum, low);
        }
        const float scale = float_from_float16(weight.outlier_scales[tile * kRowsPerTile + row]);
        block[i] = mul(sum, mul(splat(scale), code_scales));
      }
      transpose(block);
      for (int64_t t = 0; t < kUnitTokens; ++t) store(scratch.rows(first + t) + half_row, block[t]);
    }
  }
}

// rows[t, 32] = everything but the bias, in float, for all tokens.
inline void set_exact(const PackedWeightView& weight, int64_t tile, const UnitLayout& layout, const void* activations,
                      int64_t tokens, const Scratch& scratch) {
  constexpr int kTogether = 4;
  const int64_t first_outlier = tile * weight.outliers * kRowsPerTile;
  for (int64_t i = 0; i < weight.outliers * kRowsPerTile; ++i) {
    const uint16_t column = weight.outlier_columns[first_outlier + i];
    const bool is_used = column < weight.in_features;
    scratch.outlier_columns()[i] = is_used ? column : uint16_t{0};
    scratch.outlier_deltas()[i] = is_used ? weight.outlier_deltas[first_outlier + i] : int8_t{0};
  }
  for (int64_t first = 0; first < tokens; first += kTogether) {
    const float* columns[kTogether];
    float sums[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const int64_t token = first + i < tokens ? first + i : tokens - 1;
      const TokenPlace place = place_of(layout, activations, token);
      columns[i] = layout.columns(place.unit, place.token);
      sums[i] = reinterpret_cast<const PrefillUnit*>(place.unit)->sums[place.token];
    }
    for (int64_t half = 0; half < 2; ++half) {
      F32x16 rows[kTogether];
      for (F32x16& row : rows) row = splat(0.0f);
      for (int64_t plane = 0; plane < weight.planes; ++plane) {
        const int64_t index = tile * weight.planes + plane;
        F32x16 signed_sums[kTogether];
        sum_signed_columns<kTogether>(weight.signs + index * weight.words * kRowsPerTile + half * kHalfTile, columns,
                                      sums, weight.words, signed_sums);
        const F32x16 scales = load_float16(weight.scales + index * kRowsPerTile + half * kHalfTile);
        for (int i = 0; i < kTogether; ++i) rows[i] = fused_multiply_add(scales, signed_sums[i], rows[i]);
      }
      for (int i = 0; i < kTogether; ++i) store(scratch.rows(first + i) + half * kHalfTile, rows[i]);
    }
    for (int i = 0; i < kTogether; ++i) {
      const RowSums outliers =
          sum_outliers(scratch.outlier_columns(), scratch.outlier_deltas(), weight.outliers, columns[i]);
      for (int64_t half = 0; half < 2; ++half) {
        float* target = scratch.rows(first + i) + half * kHalfTile;
        const F32x16 scales = load_float16(weight.outlier_scales + tile * kRowsPerTile + half * kHalfTile);
        store(target, fused_multiply_add(scales, outliers.half[half], load(target)));
      }
    }
  }
}

// rows[t, 32] += the exact columns of all tokens.
inline void add_unit_exact_columns(const PackedWeightView& weight, int64_t tile, const UnitLayout& layout,
                                   const void* activations, int64_t tokens, const Scratch& scratch) {
  for (int64_t first = 0; first < tokens; first += kUnitTokens) {
    const UnitExactColumns exact = layout.exact_columns(place_of(layout, activations, first).unit);
    if (exact.slot_count() == 0) continue;
    expand_exact_planes(weight, tile, exact, scratch.exact_weights());
    add_exact_outliers(weight, tile, exact, scratch.exact_weights());
    for (int64_t t = 0; t < kUnitTokens && first + t < tokens; ++t) {
      add_exact_columns(exact.token(t), scratch.exact_weights(), scratch.rows(first + t));
    }
  }
}

inline void gemm(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
                 int64_t tile_begin, int64_t tile_end, void* scratch_memory, const LinearOutput& output) {
  const UnitLayout layout(weight, precision);
  const Scratch scratch(weight, tokens, scratch_memory);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (precision == ActivationPrecision::kExact) {
      set_exact(weight, tile, layout, activations, tokens, scratch);
    } else {
      set_outliers(weight, tile, layout, activations, tokens, scratch);
      float scales[kMaxPlanes][kRowsPerTile];
      load_scales(weight, tile, scales);
      LevelGroup group = {0, weight.planes, {}};
      if (find_prefill_levels(scales, weight.planes, kLargestTotal, &group.levels)) {
        expand_planes(weight, tile, group, scratch.levels());
        add_levels(weight, group, layout, activations, tokens, scratch);
      } else {
        group.planes = 1;
        for (; group.first_plane < weight.planes; ++group.first_plane) {
          single_plane_levels(scales[group.first_plane], &group.levels);
          expand_planes(weight, tile, group, scratch.levels());
          add_levels(weight, group, layout, activations, tokens, scratch);
        }
      }
      if (layout.has_exact_columns()) add_unit_exact_columns(weight, tile, layout, activations, tokens, scratch);
    }
    for (int64_t token = 0; token < tokens; ++token) {
      const TokenPlace place = place_of(layout, activations, token);
      const F32x16 sum = splat(reinterpret_cast<const PrefillUnit*>(place.unit)->sums[place.token]);
      RowSums rows;
      for (int64_t half = 0; half < 2; ++half) {
        rows.half[half] = load(scratch.rows(token) + half * kHalfTile);
        if (weight.means == nullptr) continue;
        const F32x16 means = load_float16(weight.means + tile * kRowsPerTile + half * kHalfTile);
        rows.half[half] = fused_multiply_add(means, sum, rows.half[half]);
      }
      store_rows(weight, output, token, tile, rows);
    }
  }
}

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
