// The table in which prefill with AVX-512 VNNI looks up the activations of outliers: a row for every column, with its
// codes of all vectors of a slab, plus 128 to make them unsigned.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa/avx512vnni_activations.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

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

// Places in a row: the next power of two, from 8 on.
inline int64_t table_vectors(int64_t slab_vectors) {
  return slab_vectors <= 8 ? 8 : slab_vectors <= 16 ? 16 : slab_vectors <= 32 ? 32 : 64;
}

// Rows are stored so that the unpacking of look_up_four() restores the order of vectors.
inline int64_t place_in_table_row(int64_t row_vectors, int64_t vector) {
  const int64_t group = vector / 16, four = vector % 16 / 4, of_four = vector % 4;
  if (row_vectors <= 16) return vector;
  if (row_vectors == 32) return four % 2 * 16 + (group * 2 + four / 2) * 4 + of_four;
  return four * 16 + group * 4 + of_four;
}

// natural: int8 [64 vectors, 64 columns]
inline void write_table(const int8_t* natural, int64_t row_vectors, int64_t columns, uint8_t* table) {
  const __m128i offset = _mm_set1_epi8(-128);
  for (int64_t first = 0; first < columns; first += 16) {
    const int64_t count = columns - first < 16 ? columns - first : 16;
    __m128i transposed[4][16];
    for (int64_t group = 0; group < (row_vectors + 15) / 16; ++group) {
      __m128i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        rows[i] = _mm_xor_si128(
            offset, _mm_loadu_si128(reinterpret_cast<const __m128i*>(natural + (group * 16 + i) * 64 + first)));
      }
      transpose_bytes_16x16(rows, transposed[group]);
    }
    for (int64_t column = 0; column < count; ++column) {
      __m128i* row = reinterpret_cast<__m128i*>(table + (first + column) * row_vectors);
      if (row_vectors == 8) {
        _mm_storel_epi64(row, transposed[0][column]);
        continue;
      }
      if (row_vectors == 16) {
        _mm_storeu_si128(row, transposed[0][column]);
        continue;
      }
      if (row_vectors == 32) {
        const __m128 a = _mm_castsi128_ps(transposed[0][column]), b = _mm_castsi128_ps(transposed[1][column]);
        _mm_storeu_si128(row, _mm_castps_si128(_mm_shuffle_ps(a, b, 0x88)));      // fours 0 and 2 of both
        _mm_storeu_si128(row + 1, _mm_castps_si128(_mm_shuffle_ps(a, b, 0xdd)));  // fours 1 and 3
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

// For rows of eight vectors: their codes at the columns 0 to 3 in the lanes 0 to 7, at 4 to 7 in the others.
inline __m512i look_up_eight(const uint8_t* table, const uint16_t* columns) {
  const auto row = [&](int i) __attribute__((always_inline)) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + static_cast<int64_t>(columns[i]) * 8));
  };
  const __m128i ab = _mm_unpacklo_epi8(row(0), row(1)), cd = _mm_unpacklo_epi8(row(2), row(3));
  const __m128i ef = _mm_unpacklo_epi8(row(4), row(5)), gh = _mm_unpacklo_epi8(row(6), row(7));
  return join_lanes(_mm_unpacklo_epi16(ab, cd), _mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ef, gh),
                    _mm_unpackhi_epi16(ef, gh));
}

// codes[g], lane 4 * l + j .. of 16 vectors: for each vector of group g the four bytes at the four columns.
template <int kRowVectors>
inline void look_up_four(const uint8_t* table, const uint16_t* columns, __m512i* codes) {
  const auto row = [&](int i) __attribute__((always_inline)) {
    return table + static_cast<int64_t>(columns[i]) * kRowVectors;
  };
  if constexpr (kRowVectors == 64) {
    const __m512i a = _mm512_loadu_si512(row(0)), b = _mm512_loadu_si512(row(1));
    const __m512i c = _mm512_loadu_si512(row(2)), d = _mm512_loadu_si512(row(3));
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    codes[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    codes[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    codes[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    codes[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  } else if constexpr (kRowVectors == 32) {
    const auto load = [&](int i) __attribute__((always_inline)) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row(i)));
    };
    const __m256i a = load(0), b = load(1), c = load(2), d = load(3);
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    codes[0] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(ab_low, cd_low)),
                                  _mm256_unpackhi_epi16(ab_low, cd_low), 1);
    codes[1] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(ab_high, cd_high)),
                                  _mm256_unpackhi_epi16(ab_high, cd_high), 1);
  } else {
    const auto load = [&](int i) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(i)));
    };
    const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
    const __m128i ab_low = _mm_unpacklo_epi8(a, b), ab_high = _mm_unpackhi_epi8(a, b);
    const __m128i cd_low = _mm_unpacklo_epi8(c, d), cd_high = _mm_unpackhi_epi8(c, d);
    codes[0] = join_lanes(_mm_unpacklo_epi16(ab_low, cd_low), _mm_unpackhi_epi16(ab_low, cd_low),
                          _mm_unpacklo_epi16(ab_high, cd_high), _mm_unpackhi_epi16(ab_high, cd_high));
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
