// The outliers of a row tile in prefill with AVX-512 VNNI: four to a dpbusd, their activations looked up in a table
// that has the vectors of a slab side by side.
#pragma once

#include <immintrin.h>

#include "isa/avx512vnni_gemv.h"
#include "isa/avx512vnni_prefill_activations.h"
#include "simd/avx512.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

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
template <int kRowVectors>
inline void sum_slab_outliers(const TileOutliers& outliers, const uint8_t* table, float* sums) {
  constexpr int kGroups = kRowVectors / 16;
  for (int64_t half_tile = 0; half_tile < kRowsPerTile; half_tile += 16) {
    F32x16 rows[kGroups][16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = half_tile + i;
      const uint16_t* columns = outliers.columns + row * outliers.count;
      const int8_t* deltas = outliers.deltas + row * outliers.count;
      __m512i sum[kGroups];
      for (__m512i& s : sum) s = _mm512_set1_epi32(-128 * outliers.delta_sums[row]);
      for (int64_t q = 0; q < outliers.count; q += 4) {
        int32_t four_deltas;
        __builtin_memcpy(&four_deltas, deltas + q, sizeof(four_deltas));
        const __m512i delta = _mm512_set1_epi32(four_deltas);
        __m512i codes[kGroups];
        look_up_four<kRowVectors>(table, columns + q, codes);
        for (int group = 0; group < kGroups; ++group) sum[group] = dot_accumulate(sum[group], codes[group], delta);
      }
      for (int group = 0; group < kGroups; ++group) rows[group][i].all = _mm512_cvtepi32_ps(sum[group]);
    }
    for (int64_t group = 0; group < kGroups; ++group) {
      transpose(rows[group]);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_ps(sums + (group * 16 + i) * kRowsPerTile + half_tile, rows[group][i].all);
      }
    }
  }
}

// The same for up to eight vectors.
inline void sum_few_outliers(const TileOutliers& outliers, const uint8_t* table, float* sums) {
  const __m512i two_fours = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  for (int64_t half_tile = 0; half_tile < kRowsPerTile; half_tile += 16) {
    F32x16 rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = half_tile + i;
      const uint16_t* columns = outliers.columns + row * outliers.count;
      const int8_t* deltas = outliers.deltas + row * outliers.count;
      __m512i sum = _mm512_zextsi256_si512(_mm256_set1_epi32(-128 * outliers.delta_sums[row]));
      for (int64_t q = 0; q < outliers.count; q += 8) {
        const __m128i eight_deltas = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(deltas + q));
        sum = dot_accumulate(sum, look_up_eight(table, columns + q),
                             _mm512_permutexvar_epi32(two_fours, _mm512_castsi128_si512(eight_deltas)));
      }
      const __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
      rows[i].all = _mm512_cvtepi32_ps(_mm512_zextsi256_si512(both));
    }
    transpose(rows);
    for (int64_t i = 0; i < 8; ++i) _mm512_storeu_ps(sums + i * kRowsPerTile + half_tile, rows[i].all);
  }
}

inline void sum_slab_outliers(const TileOutliers& outliers, const uint8_t* table, int64_t row_vectors, float* sums) {
  if (row_vectors == 8) return sum_few_outliers(outliers, table, sums);
  if (row_vectors == 16) return sum_slab_outliers<16>(outliers, table, sums);
  if (row_vectors == 32) return sum_slab_outliers<32>(outliers, table, sums);
  return sum_slab_outliers<64>(outliers, table, sums);
}

// Fetches one of `parts` of a tile's outliers.
inline void fetch_outliers(const PackedWeightView& weight, int64_t tile, int64_t part, int64_t parts) {
  const int64_t begin = weight.outliers * part / parts, end = weight.outliers * (part + 1) / parts;
  const uint16_t* columns = weight.outlier_columns + tile * weight.outliers * kRowsPerTile;
  const int8_t* deltas = weight.outlier_deltas + tile * weight.outliers * kRowsPerTile;
  for (int64_t i = begin; i < end; ++i) {
    prefetch(columns + i * kRowsPerTile, 0);
    if (i % 2 == 0) prefetch(deltas + i * kRowsPerTile, 0);
  }
}

// What another core has prepared is faster to fetch in order than row by row.
inline void fetch_table(const uint8_t* table, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(table, i);
}

// As add_exact_outliers(), 32 outliers at a time: most of them do not pass the filter.
__attribute__((noinline)) void add_filtered_outliers(const PackedWeightView& weight, int64_t tile,
                                                     const UnitExactColumns& exact, float* weights) {
  const __m512i filter_low = _mm512_loadu_si512(exact.filter());
  const __m512i filter_high = _mm512_loadu_si512(exact.filter() + 32);
  const __m512i fifteen = _mm512_set1_epi16(15), ones = _mm512_set1_epi16(1);
  alignas(64) float outlier_scales[kRowsPerTile];
  store_rows(outlier_scales, load_float16_rows(weight.outlier_scales + tile * kRowsPerTile));
  const uint16_t* columns = weight.outlier_columns + tile * weight.outliers * kRowsPerTile;
  const int8_t* deltas = weight.outlier_deltas + tile * weight.outliers * kRowsPerTile;
  for (int64_t i = 0; i < weight.outliers; ++i, columns += kRowsPerTile, deltas += kRowsPerTile) {
    const __m512i column = _mm512_loadu_si512(columns);
    const __m512i word = _mm512_permutex2var_epi16(filter_low, _mm512_srli_epi16(column, 4), filter_high);
    const __m512i bit = _mm512_sllv_epi16(ones, _mm512_and_si512(column, fifteen));
    for (uint32_t rows = _mm512_test_epi16_mask(word, bit); rows != 0; rows &= rows - 1) {
      const int64_t row = __builtin_ctz(rows);
      const uint16_t slot = exact.slot_of(columns[row]);
      if (slot == UnitExactColumns::kNoSlot) continue;
      weights[slot * kRowsPerTile + row] += outlier_scales[row] * static_cast<float>(deltas[row]);
    }
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
