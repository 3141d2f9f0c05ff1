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

constexpr int64_t kRowQuads = 4;  // of half a tile
// Of a group's signs, for half a tile.
constexpr int64_t kGroupSignBytes = kRowQuads * 64;

inline int64_t lookup_sign_bytes(int64_t in_features) { return lookup_groups(in_features) * 2 * kGroupSignBytes; }

inline void transpose_group(const __m512i* words, uint8_t* quads) {
  const __m512i low01 = _mm512_shuffle_i32x4(words[0], words[1], 0x44);
  const __m512i low23 = _mm512_shuffle_i32x4(words[2], words[3], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(words[0], words[1], 0xee);
  const __m512i high23 = _mm512_shuffle_i32x4(words[2], words[3], 0xee);
  _mm512_storeu_si512(quads, _mm512_shuffle_i32x4(low01, low23, 0x88));
  _mm512_storeu_si512(quads + 64, _mm512_shuffle_i32x4(low01, low23, 0xdd));
  _mm512_storeu_si512(quads + 128, _mm512_shuffle_i32x4(high01, high23, 0x88));
  _mm512_storeu_si512(quads + 192, _mm512_shuffle_i32x4(high01, high23, 0xdd));
}

// The signs of a row tile in the order of the tables: [half of the tile, groups, 4 quads of rows, 4 words, 4 rows].
// Words beyond the last are zeros.
inline void transpose_signs(const int32_t* signs, int64_t words, int64_t groups, uint8_t* target) {
  for (int64_t half = 0; half < 2; ++half) {
    const int32_t* source = signs + half * 16;
    uint8_t* quads = target + half * groups * kGroupSignBytes;
    __m512i word[kLookupWords];
    for (int64_t left = words; left > 0; left -= kLookupWords) {
      if (left >= kLookupWords) {
        for (int64_t i = 0; i < kLookupWords; ++i) word[i] = _mm512_loadu_si512(source + i * kRowsPerTile);
      } else {
        for (int64_t i = 0; i < kLookupWords; ++i) {
          word[i] = i < left ? _mm512_loadu_si512(source + i * kRowsPerTile) : _mm512_setzero_si512();
        }
      }
      transpose_group(word, quads);
      source += kLookupWords * kRowsPerTile;
      quads += kGroupSignBytes;
    }
  }
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
  const uint8_t* signs;      // [groups, 4, 64]
  const uint8_t* tables;     // LookupTables
  const uint8_t* too_large;  // [groups]: LookupSums of all vectors of the block
  const char* next_signs;    // to fetch into L2, [groups, kGroupSignBytes]
  int64_t groups;
};

// products[v][half of the tile] = sum over all columns of what is looked up, at most 65536 x 127 < 2^31.
//
// A function of its own for the compiler to keep the sums in registers.
template <int kVectors>
__attribute__((noinline)) void look_up_block(const LookupBlock& block, int64_t half, __m512i (*products)[2]) {
  __m512i sums[kVectors][kRowQuads];
  for (int v = 0; v < kVectors; ++v) {
    for (int q = 0; q < kRowQuads; ++q) sums[v][q] = _mm512_setzero_si512();
  }
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i first_signs = _mm512_set1_epi8(0x03), second_signs = _mm512_set1_epi8(0x0c);
  const __m512i first_bytes = _mm512_set1_epi32(0x0c080400), second_bytes = _mm512_set1_epi32(0x03020100);
  const uint8_t *signs = block.signs, *tables = block.tables, *too_large = block.too_large;
  const char* next_signs = block.next_signs;
  for (int64_t group = 0; group < block.groups; ++group) {
    for (int64_t i = 0; i < kGroupSignBytes; i += 64) _mm_prefetch(next_signs + i, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int nibble = 0; nibble < 2; ++nibble) {
      __m512i first[kRowQuads], second[kRowQuads];
#pragma GCC unroll 4
      for (int q = 0; q < kRowQuads; ++q) {
        const __m512i stored = _mm512_loadu_si512(signs + q * 64);
        const __m512i bits = nibble == 0 ? stored : _mm512_srli_epi32(stored, 4);
        // (bits & signs) | bytes
        first[q] = _mm512_ternarylogic_epi32(bits, first_signs, first_bytes, 0xea);
        second[q] = _mm512_ternarylogic_epi32(bits, second_signs, second_bytes, 0xea);
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
    signs += kGroupSignBytes;
    next_signs += kGroupSignBytes;
    ++too_large;
  }
  for (int v = 0; v < kVectors; ++v) products[v][half] = add_lanes(sums[v]);
}

inline void look_up_block(int64_t vectors, const LookupBlock& block, int64_t half, __m512i (*products)[2]) {
  switch (vectors) {
    case 1:
      return look_up_block<1>(block, half, products);
    case 2:
      return look_up_block<2>(block, half, products);
    case 3:
      return look_up_block<3>(block, half, products);
    default:
      return look_up_block<kLookupVectors>(block, half, products);
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
