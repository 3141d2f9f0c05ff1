// Prefill with AVX-512 VNNI. Planes with common levels are expanded to bytes once for a row tile
// (generic/prefill_levels.h), which then stay in L2 for all tokens; a single plane is multiplied as it is stored.
// Blocks of up to thirteen vectors of codes keep their sums for the whole tile in registers. Outliers are four to a
// dpbusd: their activations are looked up in a table that has the vectors side by side.
//
// Every token has one vector of codes (int8) or two (int16: high halves, then low halves, each with its scale): vector
// v belongs to token v / halves. 64 vectors make a slab.
#pragma once

#include <immintrin.h>

#include "generic/prefill_levels.h"
#include "isa/avx512vnni_gemv.h"
#include "simd/avx512.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

// Signs are fetched into L2 this far ahead of their expansion.
constexpr int64_t kSignsAhead = 16384;

constexpr int64_t kSlabVectors = 64;
constexpr int64_t kBlockVectors = 13;  // 26 sums, two registers of weights and one of codes
constexpr int64_t kPrefillUnitTokens = 64;
constexpr int64_t kExpandedWordBytes = kRowsPerTile * kColumnsPerWord;

inline int64_t halves_of(ActivationPrecision precision) { return precision == ActivationPrecision::kInt16 ? 2 : 1; }

inline int64_t align_bytes(int64_t bytes) {
  return (bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
}

// Vectors of a slab are split as evenly as possible into blocks, both halves of a token in the same one.
struct Block {
  int64_t begin, end;
};

inline Block block_of(int64_t vectors, int64_t halves, int64_t index, int64_t count) {
  const int64_t tokens = vectors / halves;
  return {tokens * index / count * halves, tokens * (index + 1) / count * halves};
}

// Blocks must not exceed kBlockVectors after rounding to whole tokens.
inline int64_t block_count(int64_t vectors, int64_t halves) {
  const int64_t per_block = kBlockVectors / halves * halves;
  return (vectors + per_block - 1) / per_block;
}

// Where things lie in the prepared activations. Sizes depend on the width only, so that slabs are found by index.
struct PrefillLayout {
  int64_t width;             // in_features, padded to the codes' 64
  int64_t table_rows;        // in_features + 1: the last row is zeros, for outlier columns out of range
  int64_t sums_offset;       // float [kSlabVectors]: sum of the token's activations
  int64_t scales_offset;     // float [kSlabVectors]
  int64_t code_sums_offset;  // int32 [kSlabVectors]
  int64_t table_offset;      // uint8 [table_rows, 64 or 16]: code + 128
  int64_t slab_bytes;
};

inline PrefillLayout prefill_layout(int64_t in_features) {
  PrefillLayout layout;
  layout.width = code_bytes(in_features);
  layout.table_rows = in_features + 1;
  layout.sums_offset = layout.width * kSlabVectors;  // int32 [width / 4, vectors of the block] for each block
  layout.scales_offset = layout.sums_offset + kSlabVectors * 4;
  layout.code_sums_offset = layout.scales_offset + kSlabVectors * 4;
  layout.table_offset = layout.code_sums_offset + kSlabVectors * 4;
  layout.slab_bytes = layout.table_offset + layout.table_rows * kSlabVectors;
  return layout;
}

// ---- preparation ----

inline __m512 load_scaled(const PackedWeightView& weight, const LinearInput& input, int64_t token, int64_t k) {
  const __mmask16 mask = first_lanes(weight.in_features > k ? weight.in_features - k : 0);
  const __m512 value = load_lanes(input.data, token * input.row_stride + k, mask, input.type);
  if (weight.column_scales == nullptr) return value;
  return _mm512_mul_ps(value, load_lanes<ElementType::kFloat16>(weight.column_scales, k, mask));
}

inline void transpose_bytes_16x16(const __m128i* rows, __m128i* columns) {
  __m128i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
    a[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
    a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    columns[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
    columns[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
  }
}

// Vectors of one table row: sixteen, or 64 when the slab has more. The latter are stored so that the unpacking of
// sum_slab_outliers() restores their order: byte 16 * l + 4 * g + j is vector 16 * g + 4 * l + j.
inline int64_t table_vectors(int64_t slab_vectors) { return slab_vectors <= 16 ? 16 : 64; }

// natural: int8 [64 vectors, 64 columns]
inline void write_table(const int8_t* natural, int64_t row_vectors, int64_t columns, uint8_t* table) {
  const __m128i offset = _mm_set1_epi8(-128);
  for (int64_t first = 0; first < columns; first += 16) {
    const int64_t count = columns - first < 16 ? columns - first : 16;
    __m128i transposed[4][16];
    for (int64_t group = 0; group < row_vectors / 16; ++group) {
      __m128i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        rows[i] = _mm_xor_si128(
            offset, _mm_loadu_si128(reinterpret_cast<const __m128i*>(natural + (group * 16 + i) * 64 + first)));
      }
      transpose_bytes_16x16(rows, transposed[group]);
    }
    for (int64_t column = 0; column < count; ++column) {
      __m128i* row = reinterpret_cast<__m128i*>(table + (first + column) * row_vectors);
      if (row_vectors == 16) {
        _mm_storeu_si128(row, transposed[0][column]);
        continue;
      }
      const __m128i low01 = _mm_unpacklo_epi32(transposed[0][column], transposed[1][column]);
      const __m128i low23 = _mm_unpacklo_epi32(transposed[2][column], transposed[3][column]);
      const __m128i high01 = _mm_unpackhi_epi32(transposed[0][column], transposed[1][column]);
      const __m128i high23 = _mm_unpackhi_epi32(transposed[2][column], transposed[3][column]);
      _mm_storeu_si128(row, _mm_unpacklo_epi64(low01, low23));
      _mm_storeu_si128(row + 1, _mm_unpackhi_epi64(low01, low23));
      _mm_storeu_si128(row + 2, _mm_unpacklo_epi64(high01, high23));
      _mm_storeu_si128(row + 3, _mm_unpackhi_epi64(high01, high23));
    }
  }
}

// Tokens [token_begin, token_end) become one slab.
inline void prepare_slab(const PackedWeightView& weight, const LinearInput& input, int64_t token_begin,
                         int64_t token_end, ActivationPrecision precision, const PrefillLayout& layout, char* slab) {
  const int64_t halves = halves_of(precision);
  const int64_t tokens = token_end - token_begin;
  const int64_t vectors = tokens * halves;
  float* sums = reinterpret_cast<float*>(slab + layout.sums_offset);
  float* scales = reinterpret_cast<float*>(slab + layout.scales_offset);
  int32_t* code_sums = reinterpret_cast<int32_t*>(slab + layout.code_sums_offset);
  uint8_t* table = reinterpret_cast<uint8_t*>(slab + layout.table_offset);

  float inverse[kSlabVectors];
  for (int64_t t = 0; t < tokens; ++t) {
    __m512 largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < weight.in_features; k += 16) {
      const __m512 value = load_scaled(weight, input, token_begin + t, k);
      largest = _mm512_max_ps(_mm512_abs_ps(value), largest);
      sum = _mm512_add_ps(sum, value);
    }
    const CodeScale scale = code_scale(_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(sum), precision);
    inverse[t] = scale.inverse;
    for (int64_t half = 0; half < halves; ++half) {
      sums[t * halves + half] = _mm512_reduce_add_ps(sum);
      scales[t * halves + half] = half + 1 < halves ? 256.0f * scale.scale : scale.scale;
    }
  }

  // Where each vector's codes go: blocks one after another, in each the vectors side by side.
  int32_t* targets[kSlabVectors];
  int64_t strides[kSlabVectors];
  const int64_t blocks = block_count(vectors, halves);
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_of(vectors, halves, index, blocks);
    int32_t* codes = reinterpret_cast<int32_t*>(slab + layout.width * block.begin);
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
    for (int64_t t = 0; t < tokens; ++t) {
      alignas(64) float columns[64];
      for (int64_t i = 0; i < 64; i += 16) {
        _mm512_store_ps(columns + i, load_scaled(weight, input, token_begin + t, k + i));
      }
      const __m512 factor = _mm512_set1_ps(inverse[t]);
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
  for (int64_t v = 0; v < vectors; ++v) code_sums[v] = _mm512_reduce_add_epi32(code_sum[v]);
  __builtin_memset(table + weight.in_features * row_vectors, 128, row_vectors);
}

// ---- the outliers of a tile ----

// Row by row instead of [outliers, 32], padded to a multiple of sixteen with deltas of 0.
struct TileOutliers {
  int64_t count;              // padded
  const uint16_t* columns;    // [32, count], clamped to the table
  const int8_t* deltas;       // [32, count]
  const int32_t* delta_sums;  // [32]
};

inline int64_t padded_outliers(int64_t outliers) { return (outliers + 15) / 16 * 16; }

inline void transpose_words_8x8(const uint16_t* source, uint16_t* target, int64_t target_stride, __m128i limit) {
  __m128i rows[8], a[8], b[8];
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm_min_epu16(limit, _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * kRowsPerTile)));
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 2 * i * target_stride), _mm_unpacklo_epi16(b[i], b[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + (2 * i + 1) * target_stride),
                     _mm_unpackhi_epi16(b[i], b[i + 4]));
  }
}

inline TileOutliers transpose_outliers(const PackedWeightView& weight, int64_t tile, uint16_t* columns, int8_t* deltas,
                                       int32_t* delta_sums) {
  const int64_t count = padded_outliers(weight.outliers);
  // Every uint16 is a table row when in_features is 65536.
  const int64_t last_row = weight.in_features < 65535 ? weight.in_features : 65535;
  const __m128i limit = _mm_set1_epi16(static_cast<int16_t>(last_row));
  const uint16_t* tile_columns = weight.outlier_columns + tile * weight.outliers * kRowsPerTile;
  const int8_t* tile_deltas = weight.outlier_deltas + tile * weight.outliers * kRowsPerTile;
  for (int64_t first = 0; first < count; first += 16) {
    const uint16_t* from_columns = tile_columns + first * kRowsPerTile;
    const int8_t* from_deltas = tile_deltas + first * kRowsPerTile;
    uint16_t last_columns[16 * kRowsPerTile];
    int8_t last_deltas[16 * kRowsPerTile];
    if (first + 16 > weight.outliers) {
      const int64_t left = weight.outliers - first;
      __builtin_memset(last_columns, 0, sizeof(last_columns));
      __builtin_memset(last_deltas, 0, sizeof(last_deltas));
      __builtin_memcpy(last_columns, from_columns, static_cast<size_t>(left * kRowsPerTile * 2));
      __builtin_memcpy(last_deltas, from_deltas, static_cast<size_t>(left * kRowsPerTile));
      from_columns = last_columns;
      from_deltas = last_deltas;
    }
    for (int64_t row = 0; row < kRowsPerTile; row += 8) {
      transpose_words_8x8(from_columns + row, columns + row * count + first, count, limit);
      transpose_words_8x8(from_columns + 8 * kRowsPerTile + row, columns + row * count + first + 8, count, limit);
    }
    for (int64_t row = 0; row < kRowsPerTile; row += 16) {
      __m128i from[16], to[16];
      for (int i = 0; i < 16; ++i) {
        from[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from_deltas + i * kRowsPerTile + row));
      }
      transpose_bytes_16x16(from, to);
      for (int i = 0; i < 16; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(deltas + (row + i) * count + first), to[i]);
      }
    }
  }
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    __m128i sum = _mm_setzero_si128();
    for (int64_t i = 0; i < count; i += 16) {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(deltas + row * count + i));
      sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), sixteen);
    }
    sum = _mm_hadd_epi32(sum, sum);
    delta_sums[row] = _mm_cvtsi128_si32(_mm_hadd_epi32(sum, sum));
  }
  return {count, columns, deltas, delta_sums};
}

// sums[vector][row] = sum of delta * code over the row's outliers, as float, for one slab.
// |sum| <= 65536 x 128 x 255 < 2^31 before the table's offset of 128 is taken back.
inline void sum_slab_outliers(const TileOutliers& outliers, const uint8_t* table, int64_t row_vectors, float* sums) {
  for (int64_t half_tile = 0; half_tile < kRowsPerTile; half_tile += 16) {
    F32x16 rows[4][16];  // [group of 16 vectors][row]
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = half_tile + i;
      const uint16_t* columns = outliers.columns + row * outliers.count;
      const int8_t* deltas = outliers.deltas + row * outliers.count;
      __m512i sum[4];
      for (__m512i& s : sum) s = _mm512_set1_epi32(-128 * outliers.delta_sums[row]);
      for (int64_t q = 0; q < outliers.count; q += 4) {
        int32_t four_deltas;
        __builtin_memcpy(&four_deltas, deltas + q, sizeof(four_deltas));
        const __m512i delta = _mm512_set1_epi32(four_deltas);
        if (row_vectors == 64) {
          const __m512i a = _mm512_loadu_si512(table + static_cast<int64_t>(columns[q]) * 64);
          const __m512i b = _mm512_loadu_si512(table + static_cast<int64_t>(columns[q + 1]) * 64);
          const __m512i c = _mm512_loadu_si512(table + static_cast<int64_t>(columns[q + 2]) * 64);
          const __m512i d = _mm512_loadu_si512(table + static_cast<int64_t>(columns[q + 3]) * 64);
          const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
          const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
          sum[0] = dot_accumulate(sum[0], _mm512_unpacklo_epi16(ab_low, cd_low), delta);
          sum[1] = dot_accumulate(sum[1], _mm512_unpackhi_epi16(ab_low, cd_low), delta);
          sum[2] = dot_accumulate(sum[2], _mm512_unpacklo_epi16(ab_high, cd_high), delta);
          sum[3] = dot_accumulate(sum[3], _mm512_unpackhi_epi16(ab_high, cd_high), delta);
        } else {
          const auto load = [&](int64_t j) __attribute__((always_inline)) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + static_cast<int64_t>(columns[q + j]) * 16));
          };
          const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
          const __m128i ab_low = _mm_unpacklo_epi8(a, b), ab_high = _mm_unpackhi_epi8(a, b);
          const __m128i cd_low = _mm_unpacklo_epi8(c, d), cd_high = _mm_unpackhi_epi8(c, d);
          const __m512i joined = join_lanes(_mm_unpacklo_epi16(ab_low, cd_low), _mm_unpackhi_epi16(ab_low, cd_low),
                                            _mm_unpacklo_epi16(ab_high, cd_high), _mm_unpackhi_epi16(ab_high, cd_high));
          sum[0] = dot_accumulate(sum[0], joined, delta);
        }
      }
      for (int64_t group = 0; group < row_vectors / 16; ++group) rows[group][i].all = _mm512_cvtepi32_ps(sum[group]);
    }
    for (int64_t group = 0; group < row_vectors / 16; ++group) {
      transpose(rows[group]);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_ps(sums + (group * 16 + i) * kRowsPerTile + half_tile, rows[group][i].all);
      }
    }
  }
}

// ---- the products ----

// expanded[word][b][row] = four bytes, for the columns b, 8 + b, 16 + b and 24 + b of the word: sum of the levels of
// the planes whose sign is +.
template <int kPlanes>
inline void expand_planes(const int32_t* signs, int64_t words, const PrefillLevels& levels, uint8_t* expanded) {
  __m512i level[kPlanes][2];
  for (int p = 0; p < kPlanes; ++p) {
    for (int half = 0; half < 2; ++half) {
      level[p][half] =
          _mm512_mullo_epi32(_mm512_loadu_si512(levels.level[p] + 16 * half), _mm512_set1_epi32(0x01010101));
    }
  }
  for (int64_t word = 0; word < words; ++word, expanded += kExpandedWordBytes) {
    __m512i bits[kPlanes][2];
    for (int p = 0; p < kPlanes; ++p) {
      const int32_t* source = signs + (p * words + word) * kRowsPerTile;
      prefetch(source, kSignsAhead);
      prefetch(source + 16, kSignsAhead);
      bits[p][0] = _mm512_loadu_si512(source);
      bits[p][1] = _mm512_loadu_si512(source + 16);
    }
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(1 << b));
      for (int half = 0; half < 2; ++half) {
        __m512i sum = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bits[0][half], mask), level[0][half]);
        for (int p = 1; p < kPlanes; ++p) {
          sum = _mm512_mask_add_epi8(sum, _mm512_test_epi8_mask(bits[p][half], mask), sum, level[p][half]);
        }
        _mm512_storeu_si512(expanded + b * 128 + half * 64, sum);
      }
    }
  }
}

inline void expand_planes(const int32_t* signs, int64_t planes, int64_t words, const PrefillLevels& levels,
                          uint8_t* expanded) {
  switch (planes) {
    case 2:
      return expand_planes<2>(signs, words, levels, expanded);
    case 3:
      return expand_planes<3>(signs, words, levels, expanded);
    case 4:
      return expand_planes<4>(signs, words, levels, expanded);
    case 5:
      return expand_planes<5>(signs, words, levels, expanded);
    case 6:
      return expand_planes<6>(signs, words, levels, expanded);
    case 7:
      return expand_planes<7>(signs, words, levels, expanded);
    default:
      return expand_planes<8>(signs, words, levels, expanded);
  }
}

// Planes of the next tile, to fetch into L2 while this one is multiplied: expansion alone is too fast for memory.
struct NextSigns {
  const int32_t* signs;
  int64_t planes;
};

// products[v][half of the tile] = sum over all columns of byte * code for kVectors vectors.
// |sum| <= 65536 x 255 x 128 < 2^31.
template <int kVectors>
inline void multiply_expanded_block(const uint8_t* expanded, const int32_t* codes, int64_t words, const NextSigns& next,
                                    __m512i (*products)[2]) {
  // Few vectors have few sums, and a dpbusd takes four cycles or five: more chains hide that.
  constexpr int kChains = kVectors >= 3 ? 1 : kVectors == 2 ? 2 : 4;
  __m512i sums[kChains][kVectors][2];
  for (int c = 0; c < kChains; ++c) {
    for (int v = 0; v < kVectors; ++v) sums[c][v][0] = sums[c][v][1] = _mm512_setzero_si512();
  }
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t plane = 0; plane < next.planes; ++plane) {
      const int32_t* signs = next.signs + (plane * words + word) * kRowsPerTile;
      prefetch(signs, 0);
      prefetch(signs + 16, 0);
    }
    for (int b = 0; b < 8; b += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c, expanded += 128, codes += kVectors) {
        const __m512i low = _mm512_loadu_si512(expanded), high = _mm512_loadu_si512(expanded + 64);
#pragma GCC unroll 13
        for (int v = 0; v < kVectors; ++v) {
          const __m512i x = _mm512_set1_epi32(codes[v]);
          sums[c][v][0] = dot_accumulate(sums[c][v][0], low, x);
          sums[c][v][1] = dot_accumulate(sums[c][v][1], high, x);
        }
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int half = 0; half < 2; ++half) {
      products[v][half] = sums[0][v][half];
      for (int c = 1; c < kChains; ++c) products[v][half] = _mm512_add_epi32(products[v][half], sums[c][v][half]);
    }
  }
}

// The same for one plane as it is stored, with bytes of 0 and 1: two cheap instructions in place of one load from L2,
// and nothing to expand.
template <int kVectors>
inline void multiply_signs_block(const int32_t* signs, const int32_t* codes, int64_t words, __m512i (*products)[2]) {
  constexpr int kChains = kVectors >= 3 ? 1 : kVectors == 2 ? 2 : 4;
  __m512i sums[kChains][kVectors][2];
  for (int c = 0; c < kChains; ++c) {
    for (int v = 0; v < kVectors; ++v) sums[c][v][0] = sums[c][v][1] = _mm512_setzero_si512();
  }
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t word = 0; word < words; ++word, signs += kRowsPerTile) {
    prefetch(signs, kSignsAhead);
    prefetch(signs + 16, kSignsAhead);
    __m512i signs_low = _mm512_loadu_si512(signs), signs_high = _mm512_loadu_si512(signs + 16);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b, codes += kVectors) {
      const __m512i low = _mm512_and_si512(signs_low, ones), high = _mm512_and_si512(signs_high, ones);
      signs_low = _mm512_srli_epi16(signs_low, 1);
      signs_high = _mm512_srli_epi16(signs_high, 1);
#pragma GCC unroll 13
      for (int v = 0; v < kVectors; ++v) {
        const __m512i x = _mm512_set1_epi32(codes[v]);
        sums[b % kChains][v][0] = dot_accumulate(sums[b % kChains][v][0], low, x);
        sums[b % kChains][v][1] = dot_accumulate(sums[b % kChains][v][1], high, x);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int half = 0; half < 2; ++half) {
      products[v][half] = sums[0][v][half];
      for (int c = 1; c < kChains; ++c) products[v][half] = _mm512_add_epi32(products[v][half], sums[c][v][half]);
    }
  }
}

// A number of vectors known when compiling.
template <int kVectors>
struct VectorCount {
  static constexpr int value = kVectors;
};

template <typename Function>
inline void with_vector_count(int64_t vectors, const Function& function) {
  switch (vectors) {
    case 1:
      return function(VectorCount<1>{});
    case 2:
      return function(VectorCount<2>{});
    case 3:
      return function(VectorCount<3>{});
    case 4:
      return function(VectorCount<4>{});
    case 5:
      return function(VectorCount<5>{});
    case 6:
      return function(VectorCount<6>{});
    case 7:
      return function(VectorCount<7>{});
    case 8:
      return function(VectorCount<8>{});
    case 9:
      return function(VectorCount<9>{});
    case 10:
      return function(VectorCount<10>{});
    case 11:
      return function(VectorCount<11>{});
    case 12:
      return function(VectorCount<12>{});
    default:
      return function(VectorCount<kBlockVectors>{});
  }
}

// `signs` is one plane, or nullptr to multiply the expanded tile.
inline void multiply_block(int64_t vectors, const int32_t* signs, const uint8_t* expanded, const int32_t* codes,
                           int64_t words, const NextSigns& next, __m512i (*products)[2]) {
  with_vector_count(vectors, [&](auto count) {
    if (signs != nullptr) {
      multiply_signs_block<decltype(count)::value>(signs, codes, words, products);
    } else {
      multiply_expanded_block<decltype(count)::value>(expanded, codes, words, next, products);
    }
  });
}

// What one thread needs for a tile.
struct PrefillScratch {
  uint8_t* expanded;          // [words, 8, 32, 4]
  float* outlier_sums;        // [kSlabVectors, 32]
  float* partial;             // [vectors, 32]: planes so far, when they go one by one
  int32_t* delta_sums;        // [32]
  uint16_t* outlier_columns;  // [32, padded outliers]
  int8_t* outlier_deltas;     // [32, padded outliers]
  int64_t bytes;
};

inline PrefillScratch prefill_scratch(const PackedWeightView& weight, int64_t vectors, void* memory) {
  char* base = static_cast<char*>(memory);
  PrefillScratch scratch;
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* begin = base + offset;
    offset += align_bytes(bytes);
    return begin;
  };
  scratch.expanded = reinterpret_cast<uint8_t*>(take(weight.words * kExpandedWordBytes));
  scratch.outlier_sums = reinterpret_cast<float*>(take(kSlabVectors * kRowsPerTile * 4));
  scratch.partial = reinterpret_cast<float*>(take(vectors * kRowsPerTile * 4));
  scratch.delta_sums = reinterpret_cast<int32_t*>(take(kRowsPerTile * 4));
  scratch.outlier_columns = reinterpret_cast<uint16_t*>(take(kRowsPerTile * padded_outliers(weight.outliers) * 2));
  scratch.outlier_deltas = reinterpret_cast<int8_t*>(take(kRowsPerTile * padded_outliers(weight.outliers)));
  scratch.bytes = offset;
  return scratch;
}

inline RowSums load_rows(const float* source) { return {_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16)}; }

inline void store_rows(float* target, const RowSums& rows) {
  _mm512_storeu_ps(target, rows.low);
  _mm512_storeu_ps(target + 16, rows.high);
}

// A run of planes that share one integer product.
struct PlaneRun {
  int64_t begin, end;
  bool is_first, is_last;
  bool has_next_tile;
};

inline void gemm_run(const PackedWeightView& weight, const PlaneRun& run, const PrefillLevels& levels,
                     const char* activations, int64_t tokens, int64_t halves, int64_t tile,
                     const TileOutliers& outliers, const PrefillScratch& scratch, const LinearOutput& output) {
  const PrefillLayout layout = prefill_layout(weight.in_features);
  const int32_t* signs = weight.signs + (tile * weight.planes + run.begin) * weight.words * kRowsPerTile;
  const bool is_one_plane = run.end - run.begin == 1;
  const int32_t* next_tile_signs =
      run.has_next_tile ? weight.signs + (tile + 1) * weight.planes * weight.words * kRowsPerTile : nullptr;
  if (!is_one_plane) expand_planes(signs, run.end - run.begin, weight.words, levels, scratch.expanded);
  const RowSums unit = load_rows(levels.unit);
  const __m512i total_low = _mm512_loadu_si512(levels.total), total_high = _mm512_loadu_si512(levels.total + 16);
  const RowSums outlier_scale = load_float16_rows(weight.outlier_scales + tile * kRowsPerTile);
  const RowSums mean =
      weight.means != nullptr ? load_float16_rows(weight.means + tile * kRowsPerTile) : splat_rows(0.0f);
  const bool has_outliers = run.is_last && outliers.count > 0;

  const int64_t all_vectors = tokens * halves;
  for (int64_t first = 0; first < all_vectors; first += kSlabVectors) {
    const char* slab = activations + first / kSlabVectors * layout.slab_bytes;
    const int64_t vectors = all_vectors - first < kSlabVectors ? all_vectors - first : kSlabVectors;
    const float* scales = reinterpret_cast<const float*>(slab + layout.scales_offset);
    const float* sums = reinterpret_cast<const float*>(slab + layout.sums_offset);
    const int32_t* code_sums = reinterpret_cast<const int32_t*>(slab + layout.code_sums_offset);
    if (has_outliers) {
      sum_slab_outliers(outliers, reinterpret_cast<const uint8_t*>(slab + layout.table_offset), table_vectors(vectors),
                        scratch.outlier_sums);
    }
    const int64_t blocks = block_count(vectors, halves);
    for (int64_t index = 0; index < blocks; ++index) {
      const Block block = block_of(vectors, halves, index, blocks);
      __m512i products[kBlockVectors][2];
      // The planes of the next tile are spread over the blocks of the first slab.
      NextSigns next = {nullptr, 0};
      if (next_tile_signs != nullptr && first == 0) {
        const int64_t plane = weight.planes * index / blocks;
        next = {next_tile_signs + plane * weight.words * kRowsPerTile, weight.planes * (index + 1) / blocks - plane};
      }
      multiply_block(block.end - block.begin, is_one_plane ? signs : nullptr, scratch.expanded,
                     reinterpret_cast<const int32_t*>(slab + layout.width * block.begin), weight.words, next, products);
      RowSums token_rows = splat_rows(0.0f);
      for (int64_t v = block.begin; v < block.end; ++v) {
        // 2 * product - total * code_sum = sum of level * sign * code, modulo 2^32; the sum itself is at most
        // 65536 x 255 x 128 < 2^31.
        const __m512i code_sum = _mm512_set1_epi32(code_sums[v]);
        const __m512i* product = products[v - block.begin];
        const RowCounts counts = {
            _mm512_sub_epi32(_mm512_slli_epi32(product[0], 1), _mm512_mullo_epi32(total_low, code_sum)),
            _mm512_sub_epi32(_mm512_slli_epi32(product[1], 1), _mm512_mullo_epi32(total_high, code_sum))};
        float* partial = scratch.partial + (first + v) * kRowsPerTile;
        RowSums rows = multiply_add(unit, to_float(counts), run.is_first ? splat_rows(0.0f) : load_rows(partial));
        if (!run.is_last) {
          store_rows(partial, rows);
          continue;
        }
        if (has_outliers) {
          rows = multiply_add(outlier_scale, load_rows(scratch.outlier_sums + v * kRowsPerTile), rows);
        }
        token_rows = multiply_add(splat_rows(scales[v]), rows, token_rows);
        if ((v + 1) % halves == 0) {
          if (weight.means != nullptr) token_rows = multiply_add(mean, splat_rows(sums[v]), token_rows);
          store_rows(weight, output, (first + v) / halves, tile, token_rows);
          token_rows = splat_rows(0.0f);
        }
      }
    }
  }
}

inline void gemm_integer(const PackedWeightView& weight, const char* activations, int64_t tokens, int64_t halves,
                         int64_t tile_begin, int64_t tile_end, void* memory, const LinearOutput& output) {
  const PrefillScratch scratch = prefill_scratch(weight, tokens * halves, memory);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float scales[kMaxPlanes][kRowsPerTile];
    for (int64_t p = 0; p < weight.planes; ++p) {
      store_rows(scales[p], load_float16_rows(weight.scales + (tile * weight.planes + p) * kRowsPerTile));
    }
    const TileOutliers outliers =
        transpose_outliers(weight, tile, scratch.outlier_columns, scratch.outlier_deltas, scratch.delta_sums);
    const bool has_next_tile = tile + 1 < tile_end;
    PrefillLevels levels;
    if (find_prefill_levels(scales, weight.planes, 255, &levels)) {
      gemm_run(weight, {0, weight.planes, true, true, has_next_tile}, levels, activations, tokens, halves, tile,
               outliers, scratch, output);
      continue;
    }
    for (int64_t p = 0; p < weight.planes; ++p) {
      single_plane_levels(scales[p], &levels);
      gemm_run(weight, {p, p + 1, p == 0, p + 1 == weight.planes, has_next_tile}, levels, activations, tokens, halves,
               tile, outliers, scratch, output);
    }
  }
}

// ---- float activations: the tile as float, a chunk of columns at a time ----

constexpr int64_t kChunkColumns = 512;  // x 32 rows x 4 bytes = 64 KiB

// weights[column][row], with mean and outliers, without column scales.
inline void expand_chunk(const PackedWeightView& weight, int64_t tile, int64_t first_word, int64_t words,
                         float* weights) {
  const RowSums mean =
      weight.means != nullptr ? load_float16_rows(weight.means + tile * kRowsPerTile) : splat_rows(0.0f);
  const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
  RowSums scales[kMaxPlanes];
  for (int64_t p = 0; p < weight.planes; ++p) {
    scales[p] = load_float16_rows(weight.scales + (tile * weight.planes + p) * kRowsPerTile);
  }
  for (int64_t word = 0; word < words; ++word) {
    for (int b = 0; b < 32; ++b) {
      const __m128i to_top = _mm_cvtsi32_si128(31 - b);
      RowSums sum = mean;
      for (int64_t p = 0; p < weight.planes; ++p) {
        const int32_t* signs =
            weight.signs + ((tile * weight.planes + p) * weight.words + first_word + word) * kRowsPerTile;
        // scale ^ (~signs & sign_bit)
        sum.low = _mm512_add_ps(sum.low, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
                                             _mm512_castps_si512(scales[p].low),
                                             _mm512_sll_epi32(_mm512_loadu_si512(signs), to_top), sign_bit, 0xd2)));
        sum.high =
            _mm512_add_ps(sum.high, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
                                        _mm512_castps_si512(scales[p].high),
                                        _mm512_sll_epi32(_mm512_loadu_si512(signs + 16), to_top), sign_bit, 0xd2)));
      }
      store_rows(weights + (word * kColumnsPerWord + b) * kRowsPerTile, sum);
    }
  }
  const int64_t first = first_word * kColumnsPerWord, last = first + words * kColumnsPerWord;
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    const float scale = _mm512_cvtss_f32(
        _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(weight.outlier_scales[tile * kRowsPerTile + row]))));
    for (int64_t i = 0; i < weight.outliers; ++i) {
      const int64_t slot = (tile * weight.outliers + i) * kRowsPerTile + row;
      const int64_t column = weight.outlier_columns[slot];
      if (column < first || column >= last) continue;
      weights[(column - first) * kRowsPerTile + row] += scale * static_cast<float>(weight.outlier_deltas[slot]);
    }
  }
}

constexpr int kFloatBlock = 12;

// sums[t][row] += sum over the chunk of weights * x, for kTokens tokens whose columns are `stride` apart.
template <int kTokens>
inline void multiply_chunk(const float* weights, const float* x, int64_t stride, int64_t columns, float* sums) {
  __m512 low[kTokens], high[kTokens];
  for (int t = 0; t < kTokens; ++t) low[t] = high[t] = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; ++k, weights += kRowsPerTile) {
    const __m512 w_low = _mm512_loadu_ps(weights), w_high = _mm512_loadu_ps(weights + 16);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512 value = _mm512_set1_ps(x[t * stride + k]);
      low[t] = _mm512_fmadd_ps(w_low, value, low[t]);
      high[t] = _mm512_fmadd_ps(w_high, value, high[t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* target = sums + t * kRowsPerTile;
    store_rows(target,
               {_mm512_add_ps(low[t], _mm512_loadu_ps(target)), _mm512_add_ps(high[t], _mm512_loadu_ps(target + 16))});
  }
}

struct FloatScratch {
  float* weights;  // [kChunkColumns, 32]
  float* sums;     // [tokens, 32]
  int64_t bytes;
};

inline FloatScratch float_scratch(int64_t tokens, void* memory) {
  float* base = static_cast<float*>(memory);
  const int64_t weights = kChunkColumns * kRowsPerTile;
  return {base, base + weights, (weights + tokens * kRowsPerTile) * 4};
}

inline void gemm_float(const PackedWeightView& weight, const float* columns, int64_t tokens, int64_t tile_begin,
                       int64_t tile_end, void* memory, const LinearOutput& output) {
  const FloatScratch scratch = float_scratch(tokens, memory);
  const int64_t stride = code_bytes(weight.in_features);
  constexpr int64_t kChunkWords = kChunkColumns / kColumnsPerWord;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    __builtin_memset(scratch.sums, 0, static_cast<size_t>(tokens * kRowsPerTile * 4));
    for (int64_t word = 0; word < weight.words; word += kChunkWords) {
      const int64_t words = weight.words - word < kChunkWords ? weight.words - word : kChunkWords;
      expand_chunk(weight, tile, word, words, scratch.weights);
      const float* x = columns + word * kColumnsPerWord;
      int64_t t = 0;
      for (; t + kFloatBlock <= tokens; t += kFloatBlock) {
        multiply_chunk<kFloatBlock>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                                    scratch.sums + t * kRowsPerTile);
      }
      for (; t + 4 <= tokens; t += 4) {
        multiply_chunk<4>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                          scratch.sums + t * kRowsPerTile);
      }
      for (; t < tokens; ++t) {
        multiply_chunk<1>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                          scratch.sums + t * kRowsPerTile);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      store_rows(weight, output, t, tile, load_rows(scratch.sums + t * kRowsPerTile));
    }
  }
}

// ---- the table's functions ----

// The table of outliers takes a byte for every column and vector. Up to here it leaves room in L2 for the expanded
// tile.
inline int64_t prefill_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  constexpr int64_t kTableBytes = int64_t{1} << 20;
  const int64_t units = kTableBytes / (weight.in_features * halves_of(precision) * kPrefillUnitTokens);
  return kPrefillUnitTokens * (units < 1 ? 1 : units > 8 ? 8 : units);
}

inline int64_t prefill_activation_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return tokens * code_bytes(weight.in_features) * 4;
  const int64_t slabs = (tokens * halves_of(precision) + kSlabVectors - 1) / kSlabVectors;
  return slabs * prefill_layout(weight.in_features).slab_bytes;
}

inline int64_t prefill_scratch_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return float_scratch(tokens, nullptr).bytes;
  return prefill_scratch(weight, tokens * halves_of(precision), nullptr).bytes;
}

inline void prepare_prefill(const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
                            int64_t unit_begin, int64_t unit_end, ActivationPrecision precision, void* activations) {
  const int64_t begin = unit_begin * kPrefillUnitTokens;
  const int64_t end = unit_end * kPrefillUnitTokens < tokens ? unit_end * kPrefillUnitTokens : tokens;
  if (precision == ActivationPrecision::kExact) {
    float* columns = static_cast<float*>(activations);
    for (int64_t t = begin; t < end; ++t) {
      scale_columns(weight, input, t, columns + t * code_bytes(weight.in_features));
    }
    return;
  }
  const PrefillLayout layout = prefill_layout(weight.in_features);
  const int64_t slab_tokens = kSlabVectors / halves_of(precision);
  for (int64_t t = begin; t < end; t += slab_tokens) {
    prepare_slab(weight, input, t, t + slab_tokens < end ? t + slab_tokens : end, precision, layout,
                 static_cast<char*>(activations) + t / slab_tokens * layout.slab_bytes);
  }
}

inline void gemm(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
                 int64_t tile_begin, int64_t tile_end, void* scratch, const LinearOutput& output) {
  if (precision == ActivationPrecision::kExact) {
    gemm_float(weight, static_cast<const float*>(activations), tokens, tile_begin, tile_end, scratch, output);
  } else {
    gemm_integer(weight, static_cast<const char*>(activations), tokens, halves_of(precision), tile_begin, tile_end,
                 scratch, output);
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
