// Vector primitives for AVX2 with AVX-VNNI: those of simd/avx2.h, and products of bytes, sixteen lanes of four as two
// registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx2.h"

namespace loop_singular_bit {
namespace {

// The left bytes of a product are 0..255 here and -128..127 on other machines.
constexpr bool kLeftBytesAreSigned = false;
// Sums of 16 lanes that fit the registers beside the operands.
constexpr int kProductTokens = 6;

struct Bytes64 {
  __m256i low, high;
};

struct Counts16 {  // int32
  __m256i low, high;
};

// Eight groups of four signed bytes, each group to be multiplied with all lanes.
struct ByteGroups {
  const int8_t* bytes;
};

inline Bytes64 load_bytes(const void* source) {
  const __m256i* halves = static_cast<const __m256i*>(source);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

inline void store_bytes(void* target, Bytes64 v) {
  __m256i* halves = static_cast<__m256i*>(target);
  _mm256_storeu_si256(halves, v.low);
  _mm256_storeu_si256(halves + 1, v.high);
}

inline Bytes64 splat_byte(int value) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(value));
  return {v, v};
}

inline Bytes64 bytes_and(Bytes64 a, Bytes64 b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}

inline Bytes64 bytes_xor_words(Bytes64 a, int32_t word) {
  const __m256i all = _mm256_set1_epi32(word);
  return {_mm256_xor_si256(a.low, all), _mm256_xor_si256(a.high, all)};
}

inline Bytes64 bytes_add(Bytes64 a, Bytes64 b) {
  return {_mm256_add_epi8(a.low, b.low), _mm256_add_epi8(a.high, b.high)};
}

alignas(32) constexpr uint32_t kLowBits[4][8] = {
    {0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101},
    {0x02020202, 0x02020202, 0x02020202, 0x02020202, 0x02020202, 0x02020202, 0x02020202, 0x02020202},
    {0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x04040404},
    {0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x08080808, 0x08080808},
};

// Bit kBit (0..3) of every byte. The mask stays in memory: compilers would load all masks into registers outside of the
// loop, and then spill accumulators.
template <int kBit>
inline Bytes64 keep_low_bit(Bytes64 a) {
  Bytes64 result;
  __asm__("vpand %2, %1, %0" : "=x"(result.low) : "x"(a.low), "m"(kLowBits[kBit]));
  __asm__("vpand %2, %1, %0" : "=x"(result.high) : "x"(a.high), "m"(kLowBits[kBit]));
  return result;
}

// Bits 4..7 of each byte move to 0..3; what else a byte holds is undefined.
inline Bytes64 upper_bits(Bytes64 a) { return {_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)}; }

// `value` in the bytes that have the one bit of `bit`, else 0.
inline Bytes64 keep_where_bit(Bytes64 bytes, Bytes64 bit, Bytes64 value) {
  const Bytes64 set = bytes_and(bytes, bit);
  return {_mm256_and_si256(_mm256_cmpeq_epi8(set.low, bit.low), value.low),
          _mm256_and_si256(_mm256_cmpeq_epi8(set.high, bit.high), value.high)};
}

// Lane i = (a[i], b[i], c[i], d[i]).
inline Bytes64 interleave_bytes(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d) {
  const auto load_sixteen = [](const int8_t* source) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  };
  const __m128i va = load_sixteen(a), vb = load_sixteen(b), vc = load_sixteen(c), vd = load_sixteen(d);
  const __m128i ab_low = _mm_unpacklo_epi8(va, vb), ab_high = _mm_unpackhi_epi8(va, vb);
  const __m128i cd_low = _mm_unpacklo_epi8(vc, vd), cd_high = _mm_unpackhi_epi8(vc, vd);
  return {_mm256_set_m128i(_mm_unpackhi_epi16(ab_low, cd_low), _mm_unpacklo_epi16(ab_low, cd_low)),
          _mm256_set_m128i(_mm_unpackhi_epi16(ab_high, cd_high), _mm_unpacklo_epi16(ab_high, cd_high))};
}

inline Counts16 zero_counts() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

inline Counts16 counts_add(Counts16 a, Counts16 b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

inline Counts16 counts_sub(Counts16 a, int32_t b) {
  const __m256i all = _mm256_set1_epi32(b);
  return {_mm256_sub_epi32(a.low, all), _mm256_sub_epi32(a.high, all)};
}

template <int kBits>
inline Counts16 shift_counts_right(Counts16 a) {
  return {_mm256_srai_epi32(a.low, kBits), _mm256_srai_epi32(a.high, kBits)};
}

inline F32x16 float_from_counts(Counts16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

inline ByteGroups load_groups(const int8_t* bytes) { return {bytes}; }

// sums + four products per lane. The left bytes multiply group kGroup.
template <int kGroup>
inline Counts16 dot_accumulate(Counts16 sums, Bytes64 left, ByteGroups right) {
  int32_t four;
  __builtin_memcpy(&four, right.bytes + 4 * kGroup, sizeof(four));
  const __m256i x = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_epi32(sums.low, left.low, x), _mm256_dpbusd_epi32(sums.high, left.high, x)};
}

// The same with unsigned right bytes and left bytes of 0..127.
template <int kGroup>
inline Counts16 dot_accumulate_unsigned(Counts16 sums, Bytes64 left, ByteGroups right) {
  int32_t four;
  __builtin_memcpy(&four, right.bytes + 4 * kGroup, sizeof(four));
  const __m256i x = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_epi32(sums.low, x, left.low), _mm256_dpbusd_epi32(sums.high, x, left.high)};
}

inline Counts16 dot_accumulate_four(Counts16 sums, Bytes64 left, const int8_t* right) {
  return dot_accumulate<0>(sums, left, ByteGroups{right});
}

// ---- between floats and bytes ----

struct Int8x16 {
  __m128i all;
};

// One word's codes, in groups of four.
struct Codes32 {
  __m128i low, high;
};

struct Int32x4 {
  __m128i all;
};

inline __m256i int16_from_float(F32x16 a) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
  return _mm256_permute4x64_epi64(pairs, 0xd8);
}

inline Int8x16 int8_from_int16(__m256i a) {
  return {_mm_packs_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1))};
}

// Rounds to nearest even, saturates.
inline Int8x16 round_to_int8(F32x16 a) { return int8_from_int16(int16_from_float(a)); }

// As unsigned bytes, for values from 0 to 255.
inline Int8x16 round_to_uint8(F32x16 a) {
  const __m256i words = int16_from_float(a);
  return {_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1))};
}

// Rounded value = 256 * high + low, for magnitudes up to 127 * 256.
inline void round_to_halves(F32x16 a, Int8x16* high, Int8x16* low) {
  const __m256i code = int16_from_float(a);
  *high = int8_from_int16(_mm256_srai_epi16(_mm256_add_epi16(code, _mm256_set1_epi16(128)), 8));
  *low = int8_from_int16(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 8));
}

inline void store_int8(int8_t* target, Int8x16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(target), a.all); }

// Group b, b = 0..7, holds the codes of columns b, 8 + b, 16 + b and 24 + b.
inline Codes32 group_by_bit(Int8x16 first, Int8x16 second) {
  const __m128i even = _mm_unpacklo_epi8(first.all, second.all), odd = _mm_unpackhi_epi8(first.all, second.all);
  return {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
}

inline void store_codes(int8_t* target, Codes32 codes) {
  store_int8(target, {codes.low});
  store_int8(target + 16, {codes.high});
}

inline Int32x4 zero_sums() { return {_mm_setzero_si128()}; }

inline Int32x4 add_codes(Int32x4 sums, Codes32 codes) {
  const __m128i ones = _mm_set1_epi8(1);
  return {_mm_dpbusd_epi32(_mm_dpbusd_epi32(sums.all, ones, codes.low), ones, codes.high)};
}

inline Int32x4 add_unsigned_codes(Int32x4 sums, Codes32 codes) {
  const __m128i ones = _mm_set1_epi8(1);
  return {_mm_dpbusd_epi32(_mm_dpbusd_epi32(sums.all, codes.low, ones), codes.high, ones)};
}

inline int32_t total(Int32x4 sums) {
  const __m128i pairs = _mm_add_epi32(sums.all, _mm_unpackhi_epi64(sums.all, sums.all));
  return _mm_cvtsi128_si32(pairs) + _mm_extract_epi32(pairs, 1);
}

inline F32x16 load_int8(const int8_t* source) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}

// Lane i = source[indices[i]]. Scalar loads and inserts are faster than vgatherdps.
inline F32x16 gather(const float* source, const uint16_t* indices) {
  __m128 quad[4];
  for (int i = 0; i < 4; ++i) {
    uint64_t four;
    __builtin_memcpy(&four, indices + 4 * i, sizeof(four));
    quad[i] = _mm_load_ss(source + (four & 0xffff));
    quad[i] = _mm_insert_ps(quad[i], _mm_load_ss(source + (four >> 16 & 0xffff)), 0x10);
    quad[i] = _mm_insert_ps(quad[i], _mm_load_ss(source + (four >> 32 & 0xffff)), 0x20);
    quad[i] = _mm_insert_ps(quad[i], _mm_load_ss(source + (four >> 48)), 0x30);
  }
  return {_mm256_set_m128(quad[1], quad[0]), _mm256_set_m128(quad[3], quad[2])};
}

}  // namespace
}  // namespace loop_singular_bit
