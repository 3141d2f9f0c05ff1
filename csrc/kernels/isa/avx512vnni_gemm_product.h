// The products of prefill with AVX-512 VNNI. Planes with common levels are expanded to bytes once for a row tile
// (generic/prefill_levels.h), which then stay in L2 for all tokens; a single plane that is not looked up, for 16-bit
// codes or for scales without common levels, is multiplied as it is stored. Blocks of up to thirteen vectors of codes
// keep their sums for the whole tile in registers; the first of them expands the tile while it multiplies.
#pragma once

#include <immintrin.h>

#include "generic/prefill_levels.h"
#include "isa/avx512vnni_gemv.h"
#include "isa/avx512vnni_prefill_activations.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

// Signs are fetched into L2 this far ahead of their expansion.
constexpr int64_t kSignsAhead = 16384;
constexpr int64_t kExpandedWordBytes = kRowsPerTile * kColumnsPerWord;

// ---- expansion ----
//
// expanded[word][b][row] = four bytes, for the columns b, 8 + b, 16 + b and 24 + b of the word: sum of the levels of
// the planes whose sign is +.
//
// Planes are looked up in pairs: two bits of a byte and two for the row within a quarter of the register make an index
// into sixteen bytes, of which four belong to each row: 0, the one level, the other, both. Shifts and shuffles leave
// the ports of dpbusd alone, a test into a mask register would not.

constexpr int64_t kPlanesPerPair = 2;

// Tables of a row tile's planes, for the rows 0..15 and 16..31.
struct LevelTables {
  __m512i pairs[kMaxPlanes / kPlanesPerPair][2];
};

inline LevelTables level_tables(const PrefillLevels& levels, int64_t planes) {
  LevelTables tables;
  for (int64_t pair = 0; pair * kPlanesPerPair < planes; ++pair) {
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i first = _mm512_loadu_si512(levels.level[2 * pair] + 16 * half);
      const __m512i second =
          2 * pair + 1 < planes ? _mm512_loadu_si512(levels.level[2 * pair + 1] + 16 * half) : _mm512_setzero_si512();
      tables.pairs[pair][half] =
          _mm512_or_si512(_mm512_or_si512(_mm512_slli_epi32(first, 8), _mm512_slli_epi32(second, 16)),
                          _mm512_slli_epi32(_mm512_add_epi32(first, second), 24));
    }
  }
  return tables;
}

// A word of the planes, its bits paired: those of two planes for one column side by side.
template <int kPairs>
struct PairedBits {
  __m512i even[kPairs][2], odd[kPairs][2];  // columns' bits in a byte; [half of the tile]
};

// `signs` is the word in the first plane; planes are plane_stride apart.
template <int kPairs>
inline void pair_bits(const int32_t* signs, int64_t planes, int64_t plane_stride, PairedBits<kPairs>* bits) {
  const __m512i even_bits = _mm512_set1_epi8(0x55);
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    const int32_t* first = signs + 2 * pair * plane_stride;
    const int32_t* second = kPairs == 1 || 2 * pair + 1 < planes ? first + plane_stride : first;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_loadu_si512(first + 16 * half), b = _mm512_loadu_si512(second + 16 * half);
      // even_bits ? a : b
      bits->even[pair][half] = _mm512_ternarylogic_epi32(even_bits, a, _mm512_slli_epi32(b, 1), 0xca);
      bits->odd[pair][half] = _mm512_ternarylogic_epi32(even_bits, _mm512_srli_epi32(a, 1), b, 0xca);
    }
  }
}

// The levels of one column of every byte: `bits` are the even ones for column and column + 1 of the odd.
//
// Volatile: g++ 12 would rather keep bits and tables in registers than the sums of multiply_expanded_block().
template <int kPairs>
inline __m512i look_up_levels(const volatile __m512i (*bits)[2], int half, unsigned column,
                              const volatile LevelTables& tables) {
  const __m512i two_bits = _mm512_set1_epi8(3);
  const __m512i row_in_quarter = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  __m512i sum;
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    // (bits & two_bits) | row_in_quarter
    const __m512i index =
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits[pair][half], column), two_bits, row_in_quarter, 0xea);
    const __m512i level = _mm512_shuffle_epi8(tables.pairs[pair][half], index);
    sum = pair == 0 ? level : _mm512_add_epi8(sum, level);
  }
  return sum;
}

template <int kPairs>
inline void expand_words(const int32_t* signs, int64_t planes, int64_t words, const LevelTables& tables,
                         uint8_t* expanded) {
  for (int64_t word = 0; word < words; ++word, expanded += kExpandedWordBytes) {
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int32_t* source = signs + (plane * words + word) * kRowsPerTile;
      prefetch(source, kSignsAhead);
      prefetch(source + 16, kSignsAhead);
    }
    PairedBits<kPairs> bits;
    pair_bits(signs + word * kRowsPerTile, planes, words * kRowsPerTile, &bits);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      const unsigned column = static_cast<unsigned>(b / 2 * 2);
      for (int half = 0; half < 2; ++half) {
        _mm512_storeu_si512(expanded + b * 128 + half * 64,
                            look_up_levels<kPairs>(b % 2 == 0 ? bits.even : bits.odd, half, column, tables));
      }
    }
  }
}

// ---- multiplication ----

// What a block is multiplied with: `planes` planes of signs from `signs` on.
struct TilePlanes {
  const int32_t* signs;
  int64_t planes, words;
  LevelTables tables;  // unless there is only one plane
  uint8_t* expanded;   // [words, 8, 32, 4]
};

// Planes of the next tile, to fetch into L2 while this one is multiplied.
struct NextSigns {
  const int32_t* signs;
  int64_t planes;
};

// products[v][half of the tile] = sum over all columns of byte * code for kVectors vectors.
// |sum| <= 65536 x 255 x 128 < 2^31.
//
// With kPairs > 0 the tile is expanded on the way.
//
// A function of its own for the compiler to keep the sums in registers.
template <int kVectors, int kPairs>
__attribute__((noinline)) void multiply_expanded_block(const TilePlanes& tile, const int32_t* codes,
                                                       const NextSigns& next, __m512i (*products)[2]) {
  // Few vectors have few sums, and a dpbusd takes four cycles or five: more chains hide that.
  constexpr int kChains = kVectors >= 3 ? 1 : kVectors == 2 ? 2 : 4;
  __m512i sums[kChains][kVectors][2];
  for (int c = 0; c < kChains; ++c) {
    for (int v = 0; v < kVectors; ++v) sums[c][v][0] = sums[c][v][1] = _mm512_setzero_si512();
  }
  const int64_t words = tile.words;
  uint8_t* expanded = tile.expanded;
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t plane = 0; plane < next.planes; ++plane) {
      const int32_t* signs = next.signs + (plane * words + word) * kRowsPerTile;
      prefetch(signs, 0);
      prefetch(signs + 16, 0);
    }
    PairedBits<kPairs == 0 ? 1 : kPairs> bits;
    if constexpr (kPairs > 0) {
      pair_bits(tile.signs + word * kRowsPerTile, tile.planes, words * kRowsPerTile, &bits);
    }
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b, expanded += 128, codes += kVectors) {
      const int c = b % kChains;
      __m512i low, high;
      if constexpr (kPairs > 0) {
        const unsigned column = static_cast<unsigned>(b / 2 * 2);
        low = look_up_levels<kPairs>(b % 2 == 0 ? bits.even : bits.odd, 0, column, tile.tables);
        high = look_up_levels<kPairs>(b % 2 == 0 ? bits.even : bits.odd, 1, column, tile.tables);
        _mm512_storeu_si512(expanded, low);
        _mm512_storeu_si512(expanded + 64, high);
      } else {
        low = _mm512_loadu_si512(expanded);
        high = _mm512_loadu_si512(expanded + 64);
      }
#pragma GCC unroll 13
      for (int v = 0; v < kVectors; ++v) {
        const __m512i x = _mm512_set1_epi32(codes[v]);
        sums[c][v][0] = dot_accumulate(sums[c][v][0], low, x);
        sums[c][v][1] = dot_accumulate(sums[c][v][1], high, x);
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
__attribute__((noinline)) void multiply_signs_block(const int32_t* signs, const int32_t* codes, int64_t words,
                                                    __m512i (*products)[2]) {
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

// The first block of a tile expands it: on the way for up to four planes, beforehand for more.
inline void multiply_block(int64_t vectors, bool is_first, const TilePlanes& tile, const int32_t* codes,
                           const NextSigns& next, __m512i (*products)[2]) {
  const int64_t pairs = (tile.planes + kPlanesPerPair - 1) / kPlanesPerPair;
  if (is_first && pairs == 3) expand_words<3>(tile.signs, tile.planes, tile.words, tile.tables, tile.expanded);
  if (is_first && pairs == 4) expand_words<4>(tile.signs, tile.planes, tile.words, tile.tables, tile.expanded);
  with_vector_count(vectors, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    if (tile.planes == 1) {
      multiply_signs_block<kVectors>(tile.signs, codes, tile.words, products);
    } else if (is_first && pairs == 1) {
      multiply_expanded_block<kVectors, 1>(tile, codes, next, products);
    } else if (is_first && pairs == 2) {
      multiply_expanded_block<kVectors, 2>(tile, codes, next, products);
    } else {
      multiply_expanded_block<kVectors, 0>(tile, codes, next, products);
    }
  });
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
