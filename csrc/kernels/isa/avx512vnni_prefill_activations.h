// Activations for prefill with AVX-512 VNNI: quantized, in the order of the sign words for the products, or as sums for
// one plane to look up, and as a table for the outliers.
//
// Every token has one vector of codes (int8) or two (int16: high halves, then low halves, each with its scale): vector
// v belongs to token v / halves. 64 vectors make a slab.
#pragma once

#include <immintrin.h>

#include "generic/prefill_exact_columns.h"
#include "isa/avx512vnni_activations.h"
#include "isa/avx512vnni_gemv.h"
#include "isa/avx512vnni_lookup_table.h"
#include "isa/avx512vnni_outlier_table.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

constexpr int64_t kSlabVectors = 64;
constexpr int64_t kBlockVectors = 13;  // 26 sums, two registers of weights and one of codes
constexpr int64_t kPrefillUnitTokens = 64;

inline int64_t halves_of(ActivationPrecision precision) { return precision == ActivationPrecision::kInt16 ? 2 : 1; }

inline int64_t align_bytes(int64_t bytes) {
  return (bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
}

// One plane of int8 codes is looked up, all else is multiplied: two low halves of -128 would not fit a byte.
inline bool looks_up(const PackedWeightView& weight, ActivationPrecision precision) {
  return weight.planes == 1 && precision == ActivationPrecision::kInt8;
}

// Where things lie in the prepared activations. Sizes depend on the width only, so that slabs are found by index.
struct PrefillLayout {
  bool looks_up;
  int64_t block_vectors;     // most of them
  int64_t width;             // in_features, padded to the codes' 64 or to groups of words
  int64_t groups;            // of words, to look up
  int64_t vector_bytes;      // codes: int32 [width / 4, vectors of the block] for each block; or LookupTables of each
  int64_t table_rows;        // in_features + 1: the last row is zeros, for outlier columns out of range
  int64_t sums_offset;       // float [kSlabVectors]: sum of the token's activations
  int64_t scales_offset;     // float [kSlabVectors]
  int64_t code_sums_offset;  // int32 [kSlabVectors]: of the codes, or of their magnitudes, to look up
  int64_t too_large_offset;  // uint8 [blocks, groups]: LookupSums of the vectors of a block
  int64_t exact_offset;      // UnitExactColumns of the vectors; none in kInt16
  int64_t table_offset;      // uint8 [table_rows, table_vectors()]: code + 128
  int64_t slab_bytes;
};

inline PrefillLayout prefill_layout(const PackedWeightView& weight, ActivationPrecision precision) {
  PrefillLayout layout;
  layout.looks_up = looks_up(weight, precision);
  layout.groups = layout.looks_up ? lookup_groups(weight.in_features) : 0;
  if (layout.looks_up) {
    layout.block_vectors = kLookupVectors;
    layout.width = layout.groups * kLookupWords * kColumnsPerWord;
    layout.vector_bytes = LookupTables::vector_bytes(layout.groups);
  } else {
    layout.block_vectors = kBlockVectors;
    layout.width = layout.vector_bytes = code_bytes(weight.in_features);
  }
  layout.table_rows = weight.in_features + 1;
  int64_t offset = layout.vector_bytes * kSlabVectors;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = offset;
    offset += align_bytes(bytes);
    return begin;
  };
  layout.sums_offset = take(kSlabVectors * 4);
  layout.scales_offset = take(kSlabVectors * 4);
  layout.code_sums_offset = take(kSlabVectors * 4);
  layout.too_large_offset = take(kSlabVectors / kLookupVectors * layout.groups);
  layout.exact_offset = take(UnitExactColumns::bytes(weight.in_features, kSlabVectors));
  layout.table_offset = take(layout.table_rows * kSlabVectors);
  layout.slab_bytes = offset;
  return layout;
}

// Vectors of a slab are split as evenly as possible into blocks, both halves of a token in the same one.
struct Block {
  int64_t begin, end;
};

inline Block block_of(int64_t vectors, int64_t halves, int64_t index, int64_t count) {
  const int64_t tokens = vectors / halves;
  return {tokens * index / count * halves, tokens * (index + 1) / count * halves};
}

// Blocks must not exceed layout.block_vectors after rounding to whole tokens.
inline int64_t block_count(const PrefillLayout& layout, int64_t vectors, int64_t halves) {
  const int64_t per_block = layout.block_vectors / halves * halves;
  return (vectors + per_block - 1) / per_block;
}

inline __m512 load_scaled(const PackedWeightView& weight, const LinearInput& input, int64_t token, int64_t k) {
  const __mmask16 mask = first_lanes(weight.in_features > k ? weight.in_features - k : 0);
  const __m512 value = load_lanes(input.data, token * input.row_stride + k, mask, input.type);
  if (weight.column_scales == nullptr) return value;
  return _mm512_mul_ps(value, load_lanes<ElementType::kFloat16>(weight.column_scales, k, mask));
}

inline UnitExactColumns exact_columns_of(const PrefillLayout& layout, int64_t in_features, const char* slab) {
  // Kernels read what they prepared.
  return UnitExactColumns(in_features, kSlabVectors, const_cast<char*>(slab) + layout.exact_offset);
}

struct TokenStatistics {
  float sum, square_sum, largest;
  __m512 group_max[4];  // of the magnitudes; column k belongs to group k % 64
};

inline TokenStatistics statistics_of(const PackedWeightView& weight, const LinearInput& input, int64_t token) {
  TokenStatistics result;
  __m512 sum[4], square_sum[4];
  for (int i = 0; i < 4; ++i) result.group_max[i] = sum[i] = square_sum[i] = _mm512_setzero_ps();
  for (int64_t block = 0; block < weight.in_features; block += 64) {
    for (int i = 0; i < 4; ++i) {
      const __m512 value = load_scaled(weight, input, token, block + 16 * i);
      result.group_max[i] = _mm512_max_ps(_mm512_abs_ps(value), result.group_max[i]);
      sum[i] = _mm512_add_ps(sum[i], value);
      square_sum[i] = _mm512_fmadd_ps(value, value, square_sum[i]);
    }
  }
  const auto total = [](const __m512* v) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(v[0], v[1]), _mm512_add_ps(v[2], v[3])));
  };
  const __m512* largest = result.group_max;
  result.sum = total(sum);
  result.square_sum = total(square_sum);
  result.largest =
      _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3])));
  return result;
}

// A function of its own: the loops of prepare_slab() need the registers.
__attribute__((noinline)) float choose_exact_columns(const PackedWeightView& weight, const LinearInput& input,
                                                     int64_t token, const TokenStatistics& statistics,
                                                     ExactColumns* exact) {
  const auto load = [&](int64_t k) { return load_scaled(weight, input, token, k); };
  const auto select = [&] { return select_exact_columns(statistics.group_max, weight.in_features, load, exact); };
  return select_if_outstanding(kPrefillOutstanding, statistics.largest, statistics.square_sum, weight.in_features,
                               select, exact);
}

// The codes of the exact columns of a vector become 0. Its codes lie four to an int32, `stride` apart.
inline void erase_exact_codes(const UnitExactColumns& exact, int64_t vector, int32_t* codes, int64_t stride,
                              uint8_t* table, int64_t row_vectors, int32_t* code_sum) {
  const UnitExactColumns::Token& columns = exact.token(vector);
  const int64_t of_row = place_in_table_row(row_vectors, vector);
  for (int32_t i = 0; i < columns.count; ++i) {
    const int64_t k = exact.column(columns.slots[i]), of_word = k % kColumnsPerWord;
    const int64_t quad = k / kColumnsPerWord * 8 + of_word % 8;
    int8_t* code = reinterpret_cast<int8_t*>(codes + quad * stride) + of_word / 8;
    *code_sum -= *code;
    *code = 0;
    table[k * row_vectors + of_row] = 128;
  }
}

// Tokens [token_begin, token_begin + tokens) become one slab.
struct SlabInput {
  const PackedWeightView& weight;
  const LinearInput& input;
  int64_t token_begin, tokens;
  int64_t halves;
  const float* inverse;  // of the scales
  const UnitExactColumns& exact_columns;
};

inline void load_columns(const SlabInput& slab, int64_t token, int64_t k, float* columns) {
  for (int64_t i = 0; i < 64; i += 16) {
    _mm512_store_ps(columns + i, load_scaled(slab.weight, slab.input, slab.token_begin + token, k + i));
  }
}

inline void write_slab_codes(const SlabInput& input, const PrefillLayout& layout, char* slab) {
  const PackedWeightView& weight = input.weight;
  const int64_t halves = input.halves, vectors = input.tokens * halves;
  int32_t* code_sums = reinterpret_cast<int32_t*>(slab + layout.code_sums_offset);
  uint8_t* table = reinterpret_cast<uint8_t*>(slab + layout.table_offset);

  // Where each vector's codes go: blocks one after another, in each the vectors side by side.
  int32_t* targets[kSlabVectors];
  int64_t strides[kSlabVectors];
  const int64_t blocks = block_count(layout, vectors, halves);
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_of(vectors, halves, index, blocks);
    int32_t* codes = reinterpret_cast<int32_t*>(slab + layout.vector_bytes * block.begin);
    for (int64_t v = block.begin; v < block.end; ++v) {
      targets[v] = codes + (v - block.begin);
      strides[v] = block.end - block.begin;
    }
  }

  alignas(64) int8_t natural[kSlabVectors * 64];
  __builtin_memset(natural, 0, sizeof(natural));
  __m512i code_sum[kSlabVectors];
  for (int64_t v = 0; v < vectors; ++v) code_sum[v] = _mm512_setzero_si512();
  const int64_t row_vectors = table_vectors(vectors);
  for (int64_t k = 0; k < weight.in_features; k += 64) {
    for (int64_t t = 0; t < input.tokens; ++t) {
      alignas(64) float columns[64];
      load_columns(input, t, k, columns);
      const __m512 factor = _mm512_set1_ps(input.inverse[t]);
      __m512i grouped[2];
      if (halves == 2) {
        const Int16Codes codes = encode_int16(columns, factor, &code_sum[2 * t], &code_sum[2 * t + 1],
                                              natural + 2 * t * 64, natural + (2 * t + 1) * 64);
        grouped[0] = codes.high;
        grouped[1] = codes.low;
      } else {
        grouped[0] = encode_int8(columns, factor, &code_sum[t], natural + t * 64);
      }
      for (int64_t half = 0; half < halves; ++half) {
        alignas(64) int32_t quads[16];
        _mm512_store_si512(quads, grouped[half]);
        const int64_t v = t * halves + half;
        for (int64_t i = 0; i < 16; ++i) targets[v][(k / 4 + i) * strides[v]] = quads[i];
      }
    }
    const int64_t columns_left = weight.in_features - k;
    write_table(natural, row_vectors, columns_left < 64 ? columns_left : 64, table + k * row_vectors);
  }
  for (int64_t v = 0; v < vectors; ++v) {
    code_sums[v] = _mm512_reduce_add_epi32(code_sum[v]);
    erase_exact_codes(input.exact_columns, v, targets[v], strides[v], table, row_vectors, &code_sums[v]);
  }
}

// As erase_exact_codes().
inline void erase_exact_lookups(const UnitExactColumns& exact, int64_t vector, const LookupTables& tables,
                                int64_t vector_of_tables, uint8_t* table, int64_t row_vectors, int32_t* magnitude_sum) {
  const UnitExactColumns::Token& columns = exact.token(vector);
  const int64_t of_row = place_in_table_row(row_vectors, vector);
  for (int32_t i = 0; i < columns.count; ++i) {
    const int64_t k = exact.column(columns.slots[i]);
    const int32_t code = table[k * row_vectors + of_row] - 128;
    erase_looked_up_code(tables, vector_of_tables, k, code);
    *magnitude_sum -= code < 0 ? -code : code;
    table[k * row_vectors + of_row] = 128;
  }
}

inline void write_slab_lookups(const SlabInput& input, const PrefillLayout& layout, char* slab) {
  const int64_t in_features = input.weight.in_features, tokens = input.tokens;
  int32_t* magnitude_sums = reinterpret_cast<int32_t*>(slab + layout.code_sums_offset);
  uint8_t* table = reinterpret_cast<uint8_t*>(slab + layout.table_offset);
  uint8_t* too_large = reinterpret_cast<uint8_t*>(slab + layout.too_large_offset);

  LookupTables tables[kSlabVectors / kLookupVectors];
  int64_t block_of_vector[kSlabVectors], vector_of_block[kSlabVectors];
  const int64_t blocks = block_count(layout, tokens, 1);
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_of(tokens, 1, index, blocks);
    tables[index] = {reinterpret_cast<uint8_t*>(slab + layout.vector_bytes * block.begin), block.end - block.begin};
    for (int64_t v = block.begin; v < block.end; ++v) {
      block_of_vector[v] = index;
      vector_of_block[v] = v - block.begin;
    }
  }
  __builtin_memset(too_large, 0, static_cast<size_t>(blocks * layout.groups));

  alignas(64) int8_t natural[kSlabVectors * 64];
  __builtin_memset(natural, 0, sizeof(natural));
  __m512i magnitude_sum[kSlabVectors];
  for (int64_t v = 0; v < tokens; ++v) magnitude_sum[v] = _mm512_setzero_si512();
  const int64_t row_vectors = table_vectors(tokens);
  for (int64_t k = 0; k < layout.width; k += 64) {
    const int64_t group = k / 128, half = k / 64 % 2;
    for (int64_t v = 0; v < tokens; ++v) {
      alignas(64) float columns[64];
      load_columns(input, v, k, columns);
      __m512i code_sum = _mm512_setzero_si512();
      encode_int8(columns, _mm512_set1_ps(input.inverse[v]), &code_sum, natural + v * 64);
      const LookupTables& of_block = tables[block_of_vector[v]];
      const LookupSums sums = write_lookup_tables(_mm512_load_si512(natural + v * 64), half,
                                                  of_block.at(group, 0, vector_of_block[v]), of_block.nibble_bytes());
      magnitude_sum[v] = _mm512_add_epi32(magnitude_sum[v], sums.magnitudes);
      too_large[block_of_vector[v] * layout.groups + group] |= static_cast<uint8_t>(sums.too_large);
    }
    const int64_t columns_left = in_features - k;
    if (columns_left > 0) {
      write_table(natural, row_vectors, columns_left < 64 ? columns_left : 64, table + k * row_vectors);
    }
  }
  for (int64_t v = 0; v < tokens; ++v) {
    magnitude_sums[v] = _mm512_reduce_add_epi32(magnitude_sum[v]);
    erase_exact_lookups(input.exact_columns, v, tables[block_of_vector[v]], vector_of_block[v], table, row_vectors,
                        &magnitude_sums[v]);
  }
}

inline void prepare_slab(const PackedWeightView& weight, const LinearInput& input, int64_t token_begin, int64_t tokens,
                         ActivationPrecision precision, const PrefillLayout& layout, char* slab) {
  const int64_t halves = halves_of(precision);
  float* sums = reinterpret_cast<float*>(slab + layout.sums_offset);
  float* scales = reinterpret_cast<float*>(slab + layout.scales_offset);

  const UnitExactColumns exact_columns = exact_columns_of(layout, weight.in_features, slab);
  exact_columns.clear();
  float inverse[kSlabVectors];
  for (int64_t t = 0; t < tokens; ++t) {
    const TokenStatistics statistics = statistics_of(weight, input, token_begin + t);
    float largest = statistics.largest;
    if (precision == ActivationPrecision::kInt8) {
      ExactColumns exact;
      largest = choose_exact_columns(weight, input, token_begin + t, statistics, &exact);
      exact_columns.add(t, exact);
    }
    const CodeScale scale = code_scale(largest, statistics.sum, prefill_code_max(precision));
    inverse[t] = scale.inverse;
    for (int64_t half = 0; half < halves; ++half) {
      sums[t * halves + half] = statistics.sum;
      scales[t * halves + half] = half + 1 < halves ? 256.0f * scale.scale : scale.scale;
    }
  }
  const SlabInput slab_input = {weight, input, token_begin, tokens, halves, inverse, exact_columns};
  if (layout.looks_up) {
    write_slab_lookups(slab_input, layout, slab);
  } else {
    write_slab_codes(slab_input, layout, slab);
  }
  const int64_t row_vectors = table_vectors(tokens * halves);
  uint8_t* table = reinterpret_cast<uint8_t*>(slab + layout.table_offset);
  __builtin_memset(table + weight.in_features * row_vectors, 128, static_cast<size_t>(row_vectors));
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
