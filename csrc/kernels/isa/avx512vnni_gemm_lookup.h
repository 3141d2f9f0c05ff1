// The products of one plane in prefill with AVX-512 VNNI: looked up in tables (isa/avx512vnni_lookup_table.h), which
// takes fewer instructions than to multiply. Two shuffles, an addition of bytes and a dpbusd by ones, which adds up the
// four bytes of a row, make 256 products; two dpbusd by codes would make 128.
#pragma once

#include <immintrin.h>

#include "isa/avx512vnni_activations.h"
#include "isa/avx512vnni_gemv.h"
#include "isa/avx512vnni_lookup_table.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

constexpr int kRowQuads = 4;                         // of half a tile
constexpr int64_t kGroupSignBytes = kRowQuads * 64;  // of half a tile

inline int64_t lookup_sign_bytes(int64_t in_features) { return lookup_groups(in_features) * 2 * kGroupSignBytes; }

// The signs of a group for half a tile in the order of the tables: [4 quads of rows, 4 words, 4 rows]. `signs` are the
// first word's, words are kRowsPerTile apart; those beyond words_left are zeros.
inline void transpose_signs(const int32_t* signs, int64_t words_left, uint8_t* target) {
  int32_t padded[kLookupWords * kRowsPerTile];
  if (words_left < kLookupWords) {
    __builtin_memset(padded, 0, sizeof(padded));
    for (int64_t i = 0; i < words_left; ++i) {
      __builtin_memcpy(padded + i * kRowsPerTile, signs + i * kRowsPerTile, 16 * sizeof(int32_t));
    }
    signs = padded;
  }
  __m512i words[kLookupWords];
  for (int64_t i = 0; i < kLookupWords; ++i) words[i] = _mm512_loadu_si512(signs + i * kRowsPerTile);
  const __m512i low01 = _mm512_shuffle_i32x4(words[0], words[1], 0x44);
  const __m512i low23 = _mm512_shuffle_i32x4(words[2], words[3], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(words[0], words[1], 0xee);
  const __m512i high23 = _mm512_shuffle_i32x4(words[2], words[3], 0xee);
  _mm512_storeu_si512(target, _mm512_shuffle_i32x4(low01, low23, 0x88));
  _mm512_storeu_si512(target + 64, _mm512_shuffle_i32x4(low01, low23, 0xdd));
  _mm512_storeu_si512(target + 128, _mm512_shuffle_i32x4(high01, high23, 0x88));
  _mm512_storeu_si512(target + 192, _mm512_shuffle_i32x4(high01, high23, 0xdd));
}

// Lane q = the sum of the lanes of quads[q].
inline __m512i add_lanes(const __m512i* quads) {
  const __m512i sums01 =
      _mm512_add_epi32(_mm512_shuffle_i32x4(quads[0], quads[1], 0x44), _mm512_shuffle_i32x4(quads[0], quads[1], 0xee));
  const __m512i sums23 =
      _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2], quads[3], 0x44), _mm512_shuffle_i32x4(quads[2], quads[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(sums01, sums23, 0x88), _mm512_shuffle_i32x4(sums01, sums23, 0xdd));
}

// Half a row tile, and what to look it up in.
struct LookupBlock {
  const int32_t* signs;      // [words, 32], of which 16
  uint8_t* transposed;       // [groups, kGroupSignBytes]; written by the first block
  const uint8_t* tables;     // LookupTables
  const uint8_t* too_large;  // [groups]: LookupSums of all vectors of the block
  const char* next_signs;    // to fetch into L2, next_bytes for each group
  int64_t next_bytes;
  int64_t words, groups;
};

// products[v][half of the tile] = sum over all columns of what is looked up, at most 65536 x 127 < 2^31.
//
// A function of its own for the compiler to keep the sums in registers.
template <int kVectors, bool kIsFirst>
__attribute__((noinline)) void look_up_block(const LookupBlock& block, int64_t half, __m512i (*products)[2]) {
  __m512i sums[kVectors][kRowQuads];
  for (int v = 0; v < kVectors; ++v) {
    for (int q = 0; q < kRowQuads; ++q) sums[v][q] = _mm512_setzero_si512();
  }
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i first_pair = _mm512_set1_epi8(0x03), second_pair = _mm512_set1_epi8(0x0c);
  const __m512i first_bytes = _mm512_set1_epi32(0x0c080400), second_bytes = _mm512_set1_epi32(0x03020100);
  uint8_t* transposed = block.transposed;
  const uint8_t *tables = block.tables, *too_large = block.too_large;
  const char* next_signs = block.next_signs;
  for (int64_t group = 0; group < block.groups; ++group, transposed += kGroupSignBytes) {
    for (int64_t i = 0; i < block.next_bytes; i += 64) prefetch(next_signs, i);
    next_signs += block.next_bytes;
    if constexpr (kIsFirst) {
      transpose_signs(block.signs + group * kLookupWords * kRowsPerTile, block.words - group * kLookupWords,
                      transposed);
    }
#pragma GCC unroll 2
    for (int nibble = 0; nibble < 2; ++nibble) {
      __m512i first[kRowQuads], second[kRowQuads];
#pragma GCC unroll 4
      for (int q = 0; q < kRowQuads; ++q) {
        const __m512i signs = _mm512_loadu_si512(transposed + q * 64);
        const __m512i bits = nibble == 0 ? signs : _mm512_srli_epi32(signs, 4);
        // (bits & pair) | bytes
        first[q] = _mm512_ternarylogic_epi32(bits, first_pair, first_bytes, 0xea);
        second[q] = _mm512_ternarylogic_epi32(bits, second_pair, second_bytes, 0xea);
      }
      const auto look_up = [&](int v, auto&& add) __attribute__((always_inline)) {
        const __m512i first_table = _mm512_loadu_si512(tables + v * 2 * kLookupTableBytes);
        const __m512i second_table = _mm512_loadu_si512(tables + v * 2 * kLookupTableBytes + kLookupTableBytes);
#pragma GCC unroll 4
        for (int q = 0; q < kRowQuads; ++q) {
          sums[v][q] =
              add(sums[v][q], _mm512_shuffle_epi8(first_table, first[q]), _mm512_shuffle_epi8(second_table, second[q]));
        }
      };
      if ((*too_large >> nibble & 1) == 0) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          look_up(v, [&](__m512i sum, __m512i a, __m512i b)
                         __attribute__((always_inline)) { return dot_accumulate(sum, _mm512_add_epi8(a, b), ones); });
        }
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          look_up(v, [&](__m512i sum, __m512i a, __m512i b) __attribute__((always_inline)) {
            return dot_accumulate(dot_accumulate(sum, a, ones), b, ones);
          });
        }
      }
      tables += kVectors * 2 * kLookupTableBytes;
    }
    ++too_large;
  }
  for (int v = 0; v < kVectors; ++v) products[v][half] = add_lanes(sums[v]);
}

template <bool kIsFirst>
inline void look_up_block(int64_t vectors, const LookupBlock& block, int64_t half, __m512i (*products)[2]) {
  switch (vectors) {
    case 1:
      return look_up_block<1, kIsFirst>(block, half, products);
    case 2:
      return look_up_block<2, kIsFirst>(block, half, products);
    case 3:
      return look_up_block<3, kIsFirst>(block, half, products);
    default:
      return look_up_block<kLookupVectors, kIsFirst>(block, half, products);
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
