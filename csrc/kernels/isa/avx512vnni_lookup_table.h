// The tables in which prefill with AVX-512 VNNI looks up the products of one plane.
//
// A byte of a sign word holds the signs of four pairs of neighbouring columns. For every pair there are four sums, of
// the codes whose sign is +; less the smallest of them they are at most 127 + 127 and fit a byte. Sixteen bytes, as
// many as a shuffle selects from, hold the sums for one pair of each of the four bytes of a word. Four words side by
// side fill the four lanes of a register.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "packed_weight_view.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

constexpr int64_t kLookupWords = 4;    // a group
constexpr int64_t kLookupVectors = 4;  // of a block; with 16 rows, as many sums as the registers hold beside the rest
constexpr int64_t kLookupTableBytes = 64;  // of one vector for one pair of each byte of a group's words

inline int64_t lookup_groups(int64_t in_features) {
  constexpr int64_t kColumns = kLookupWords * kColumnsPerWord;
  return (in_features + kColumns - 1) / kColumns;
}

// The tables of a block of vectors: [groups, 2 nibbles, vectors, 2 pairs of the nibble, 4 words, 16].
struct LookupTables {
  uint8_t* data;
  int64_t vectors;

  uint8_t* at(int64_t group, int64_t nibble, int64_t vector) const {
    return data + (group * 2 + nibble) * nibble_bytes() + vector * 2 * kLookupTableBytes;
  }
  int64_t nibble_bytes() const { return vectors * 2 * kLookupTableBytes; }
  static int64_t vector_bytes(int64_t groups) { return groups * 4 * kLookupTableBytes; }
};

// Bytes of a table for a word: the index is the two signs and the number b of the byte: signs + 4 * b for the first
// pair of a nibble, 4 * signs + b for the second. So neither needs a shift.
inline int64_t place_in_lookup_table(int64_t pair, int64_t byte, int64_t signs) {
  return pair == 0 ? signs + 4 * byte : 4 * signs + byte;
}

// What the products of 64 columns are made of.
struct LookupSums {
  __m512i magnitudes;  // int32: of the codes of four neighbouring columns
  uint32_t too_large;  // bit n is set if the two sums of some byte's nibble n together may exceed 255
};

// Writes the tables of one vector for two words; `half` of the group they are. tables.at(group, 1) is nibble_stride
// bytes behind `target` = tables.at(group, 0).
inline LookupSums write_lookup_tables(__m512i codes, int64_t half, uint8_t* target, int64_t nibble_stride) {
  // Lanes: the first pair of the words 0 and 1, the second pair of both. In each, the pairs of the four bytes, first
  // of what codes add where the sign is +, then where it is -.
  const __m512i first_nibble = _mm512_set_epi16(61, 57, 53, 49, 29, 25, 21, 17, 45, 41, 37, 33, 13, 9, 5, 1,  //
                                                60, 56, 52, 48, 28, 24, 20, 16, 44, 40, 36, 32, 12, 8, 4, 0);
  const __m512i second_nibble = _mm512_add_epi16(first_nibble, _mm512_set1_epi16(2));
  const __m128i first_of_pair = _mm_setr_epi8(8, 0, 8, 0, 10, 2, 10, 2, 12, 4, 12, 4, 14, 6, 14, 6);
  const __m128i second_of_pair = _mm_setr_epi8(9, 9, 1, 1, 11, 11, 3, 3, 13, 13, 5, 5, 15, 15, 7, 7);
  // [signs, byte] instead of [byte, signs]
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto both_pairs = [&](__m128i index) {
    const __m128i transposed = _mm_shuffle_epi8(index, transpose);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastsi128_si256(index)),
                              _mm256_broadcastsi128_si256(transposed), 1);
  };
  const __m512i first = both_pairs(first_of_pair), second = both_pairs(second_of_pair);

  const __m512i positive = _mm512_max_epi8(codes, _mm512_setzero_si512());
  const __m512i negative = _mm512_sub_epi8(positive, codes);
  const __m512i nibbles[2] = {first_nibble, second_nibble};
  for (int64_t nibble = 0; nibble < 2; ++nibble) {
    const __m512i pairs = _mm512_permutex2var_epi16(positive, nibbles[nibble], negative);
    const __m512i sums = _mm512_add_epi8(_mm512_shuffle_epi8(pairs, first), _mm512_shuffle_epi8(pairs, second));
    __m256i* tables = reinterpret_cast<__m256i*>(target + nibble * nibble_stride);
    _mm256_storeu_si256(tables + half, _mm512_castsi512_si256(sums));
    _mm256_storeu_si256(tables + 2 + half, _mm512_extracti64x4_epi64(sums, 1));
  }
  const __m512i magnitudes =
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_add_epi8(positive, negative), _mm512_set1_epi8(1));
  const uint32_t mask = _mm512_cmpgt_epi32_mask(magnitudes, _mm512_set1_epi32(255));
  return {magnitudes, ((mask & 0x5555) != 0 ? 1u : 0u) | ((mask & 0xaaaa) != 0 ? 2u : 0u)};
}

// The code of column k, which was `code`, becomes 0.
inline void erase_looked_up_code(const LookupTables& tables, int64_t vector, int64_t k, int32_t code) {
  const int64_t word = k / kColumnsPerWord, byte = k % kColumnsPerWord / 8, pair = k % 8 / 2, bit = k % 2;
  uint8_t* table =
      tables.at(word / kLookupWords, pair / 2, vector) + pair % 2 * kLookupTableBytes + word % kLookupWords * 16;
  for (int64_t signs = 0; signs < 4; ++signs) {
    const bool is_positive = (signs >> bit & 1) != 0;
    const int32_t added = is_positive ? (code > 0 ? code : 0) : (code < 0 ? -code : 0);
    table[place_in_lookup_table(pair % 2, byte, signs)] -= static_cast<uint8_t>(added);
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
