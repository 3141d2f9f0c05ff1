// Decode with AVX-512 VNNI. Lane = row: a row tile is two registers of sixteen rows, whose sign words are masked with
// one bit of every byte and multiplied with four codes by one dpbusd: 64 weights for one AND and one dpbusd, without
// unpacking and without horizontal sums.
#pragma once

#include <immintrin.h>

#include "isa/avx512vnni_activations.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

inline void prefetch(const void* address, int64_t bytes_ahead) {
  _mm_prefetch(static_cast<const char*>(address) + bytes_ahead, _MM_HINT_T1);
}

// The signs of a range of row tiles are one stream, fetched into L2 this far ahead. A core does not keep enough lines
// in flight with prefetches alone (11 GB/s on Zen 4); most of the stream comes from the hardware prefetcher, which
// follows it as long as little else misses L1. Other loads therefore wait until a group of tiles has had its signs.
constexpr int64_t kDecodeAhead = 8 * 1024;
// Row tiles in a group: their outliers, in ascending order of columns, then share what L1 holds of the activations.
constexpr int64_t kTileGroup = 4;
// Scales are fetched this far ahead.
constexpr int64_t kScalesAhead = 256;

struct RowSums {
  __m512 low, high;  // rows 0..15 and 16..31 of a tile
};

struct RowCounts {
  __m512i low, high;
};

inline RowSums to_float(const RowCounts& counts) {
  return {_mm512_cvtepi32_ps(counts.low), _mm512_cvtepi32_ps(counts.high)};
}

inline RowSums multiply_add(const RowSums& a, const RowSums& b, const RowSums& c) {
  return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}

inline RowSums splat_rows(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }

inline RowSums load_rows(const float* source) { return {_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16)}; }

inline void store_rows(float* target, const RowSums& rows) {
  _mm512_storeu_ps(target, rows.low);
  _mm512_storeu_ps(target + 16, rows.high);
}

inline RowSums load_float16_rows(const uint16_t* source) {
  return {load_float16_lanes(source), load_float16_lanes(source + 16)};
}

// sum over all columns of sign * code = 2 * (sum where the sign is +) - code_sum
inline RowCounts signed_counts(const RowCounts& positive, int32_t code_sum) {
  const __m512i all = _mm512_set1_epi32(code_sum);
  return {_mm512_sub_epi32(_mm512_slli_epi32(positive.low, 1), all),
          _mm512_sub_epi32(_mm512_slli_epi32(positive.high, 1), all)};
}

// Sum of the magnitudes where the sign, which a flip changes for negative activations, is +. Magnitudes are the
// unsigned bytes of dpbusd; masked signs are the signed ones, so that the mask of bit 7 selects -128 times a magnitude.
//
// Accumulator b holds 2^b times its part, exactly: at most 65536 / 8 columns x 2^7 x 255 < 2^28. The sum of all parts
// is at most 65536 x 255 < 2^24, and so is signed_counts(): exact in float.
//
// A function of its own: g++ 12 spills masks and signs where it is inlined. Without loops over the accumulators: for
// those it keeps them in memory, where clearing them and adding them up costs two cycles per row of 4096 columns.
__attribute__((noinline)) RowCounts sum_positive(const int32_t* plane, const int8_t* magnitudes, const int32_t* flips,
                                                 int64_t words, int64_t ahead) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i low[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
  __m512i high[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
  const __m512i mask0 = _mm512_set1_epi8(1), mask1 = _mm512_set1_epi8(2), mask2 = _mm512_set1_epi8(4);
  const __m512i mask3 = _mm512_set1_epi8(8), mask4 = _mm512_set1_epi8(16), mask5 = _mm512_set1_epi8(32);
  const __m512i mask6 = _mm512_set1_epi8(64), mask7 = _mm512_set1_epi8(-128);
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile, magnitudes += kColumnsPerWord) {
    prefetch(plane, ahead);
    prefetch(plane + 16, ahead);
    const __m512i flip = _mm512_set1_epi32(flips[word]);
    const __m512i signs_low = _mm512_xor_si512(flip, _mm512_loadu_si512(plane));
    const __m512i signs_high = _mm512_xor_si512(flip, _mm512_loadu_si512(plane + 16));
    const auto accumulate = [&](int b, __m512i mask) __attribute__((always_inline)) {
      int32_t four_magnitudes;
      __builtin_memcpy(&four_magnitudes, magnitudes + 4 * b, sizeof(four_magnitudes));
      const __m512i x = _mm512_set1_epi32(four_magnitudes);
      low[b] = dot_accumulate(low[b], x, _mm512_and_si512(signs_low, mask));
      high[b] = dot_accumulate(high[b], x, _mm512_and_si512(signs_high, mask));
    };
    accumulate(0, mask0);
    accumulate(1, mask1);
    accumulate(2, mask2);
    accumulate(3, mask3);
    accumulate(4, mask4);
    accumulate(5, mask5);
    accumulate(6, mask6);
    accumulate(7, mask7);
  }
  const auto sum_of_parts = [](const __m512i* parts) __attribute__((always_inline)) {
    const __m512i sum01 = _mm512_add_epi32(parts[0], _mm512_srai_epi32(parts[1], 1));
    const __m512i sum23 = _mm512_add_epi32(_mm512_srai_epi32(parts[2], 2), _mm512_srai_epi32(parts[3], 3));
    const __m512i sum45 = _mm512_add_epi32(_mm512_srai_epi32(parts[4], 4), _mm512_srai_epi32(parts[5], 5));
    const __m512i sum67 = _mm512_sub_epi32(_mm512_srai_epi32(parts[6], 6), _mm512_srai_epi32(parts[7], 7));
    return _mm512_add_epi32(_mm512_add_epi32(sum01, sum23), _mm512_add_epi32(sum45, sum67));
  };
  return {sum_of_parts(low), sum_of_parts(high)};
}

struct Int16Counts {
  RowCounts high_codes, low_codes;
};

// The same for both halves of 16-bit codes. Four masks and one shift: more accumulators would not fit the registers.
inline Int16Counts sum_positive_int16(const int32_t* plane, const int8_t* high_codes, const int8_t* low_codes,
                                      int64_t words, int64_t ahead) {
  __m512i sums[2][2][4];  // [half of the code][half of the tile][bit % 4]
  for (auto& of_code : sums) {
    for (auto& of_tile : of_code) {
      for (__m512i& sum : of_tile) sum = _mm512_setzero_si512();
    }
  }
  const __m512i mask0 = _mm512_set1_epi8(1), mask1 = _mm512_set1_epi8(2), mask2 = _mm512_set1_epi8(4);
  const __m512i mask3 = _mm512_set1_epi8(8);
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile) {
    prefetch(plane, ahead);
    prefetch(plane + 16, ahead);
    __m512i signs_low = _mm512_loadu_si512(plane), signs_high = _mm512_loadu_si512(plane + 16);
    const auto accumulate = [&](int b, int64_t group, __m512i mask) __attribute__((always_inline)) {
      int32_t high, low;
      __builtin_memcpy(&high, high_codes + word * kColumnsPerWord + 4 * group, sizeof(high));
      __builtin_memcpy(&low, low_codes + word * kColumnsPerWord + 4 * group, sizeof(low));
      const __m512i bits_low = _mm512_and_si512(signs_low, mask), bits_high = _mm512_and_si512(signs_high, mask);
      const __m512i x = _mm512_set1_epi32(high), y = _mm512_set1_epi32(low);
      sums[0][0][b] = dot_accumulate(sums[0][0][b], bits_low, x);
      sums[0][1][b] = dot_accumulate(sums[0][1][b], bits_high, x);
      sums[1][0][b] = dot_accumulate(sums[1][0][b], bits_low, y);
      sums[1][1][b] = dot_accumulate(sums[1][1][b], bits_high, y);
    };
    accumulate(0, 0, mask0);
    accumulate(1, 1, mask1);
    accumulate(2, 2, mask2);
    accumulate(3, 3, mask3);
    signs_low = _mm512_srli_epi16(signs_low, 4);
    signs_high = _mm512_srli_epi16(signs_high, 4);
    accumulate(0, 4, mask0);
    accumulate(1, 5, mask1);
    accumulate(2, 6, mask2);
    accumulate(3, 7, mask3);
  }
  const auto unshifted = [](const __m512i* sum) __attribute__((always_inline)) {
    const __m512i upper = _mm512_add_epi32(sum[2], _mm512_srai_epi32(sum[3], 1));
    return _mm512_add_epi32(sum[0], _mm512_srai_epi32(_mm512_add_epi32(sum[1], _mm512_srai_epi32(upper, 1)), 1));
  };
  return {{unshifted(sums[0][0]), unshifted(sums[0][1])}, {unshifted(sums[1][0]), unshifted(sums[1][1])}};
}

// sum over all columns of sign * columns[k] in float.
inline RowSums sum_signed(const int32_t* plane, const float* columns, float sum, int64_t words, int64_t ahead) {
  __m512 low[4], high[4];
  for (int i = 0; i < 4; ++i) low[i] = high[i] = _mm512_setzero_ps();
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile, columns += kColumnsPerWord) {
    prefetch(plane, ahead);
    prefetch(plane + 16, ahead);
    const __m512i signs_low = _mm512_loadu_si512(plane), signs_high = _mm512_loadu_si512(plane + 16);
    __m512i bit = _mm512_set1_epi32(1);
    for (int b = 0; b < 32; b += 4) {
      for (int i = 0; i < 4; ++i) {
        const __m512 x = _mm512_set1_ps(columns[b + i]);
        low[i] = _mm512_mask_add_ps(low[i], _mm512_test_epi32_mask(signs_low, bit), low[i], x);
        high[i] = _mm512_mask_add_ps(high[i], _mm512_test_epi32_mask(signs_high, bit), high[i], x);
        bit = _mm512_slli_epi32(bit, 1);
      }
    }
  }
  const __m512 two = _mm512_set1_ps(2.0f), all = _mm512_set1_ps(sum);
  const __m512 positive_low = _mm512_add_ps(_mm512_add_ps(low[0], low[1]), _mm512_add_ps(low[2], low[3]));
  const __m512 positive_high = _mm512_add_ps(_mm512_add_ps(high[0], high[1]), _mm512_add_ps(high[2], high[3]));
  return {_mm512_fmsub_ps(two, positive_low, all), _mm512_fmsub_ps(two, positive_high, all)};
}

// sum over the exact columns of sign * value; the signs are read where they lie.
inline RowSums sum_exact_columns(const int32_t* plane, const DecodeActivations& activations) {
  RowSums sums = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
  for (int32_t i = 0; i < activations.exact_count; ++i) {
    const int32_t column = activations.exact_columns[i];
    const int32_t* word = plane + column / kColumnsPerWord * kRowsPerTile;
    const __m128i to_top = _mm_cvtsi32_si128(31 - static_cast<int32_t>(column % kColumnsPerWord));
    const __m512i value = _mm512_castps_si512(_mm512_set1_ps(activations.exact_values[i]));
    // value ^ (~signs & sign_bit): negative where the sign is -.
    const __m512i low =
        _mm512_ternarylogic_epi32(value, _mm512_sll_epi32(_mm512_loadu_si512(word), to_top), sign_bit, 0xd2);
    const __m512i high =
        _mm512_ternarylogic_epi32(value, _mm512_sll_epi32(_mm512_loadu_si512(word + 16), to_top), sign_bit, 0xd2);
    sums.low = _mm512_add_ps(sums.low, _mm512_castsi512_ps(low));
    sums.high = _mm512_add_ps(sums.high, _mm512_castsi512_ps(high));
  }
  return sums;
}

// Sixteen activations by column index. Scalar loads and inserts: twice as fast as vgatherdps on Zen 4 and Zen 5.
// Indices are read in pairs, which costs fewer instructions than one by one or four at once.
//
// g++ 12 folds a 16-byte load into the four-byte memory operand of vinsertps, but not a four-byte one. What lies behind
// the last column are the codes.
inline __m512 gather_columns(const float* columns, const uint16_t* indices) {
  __m128 quads[4];
  for (int i = 0; i < 4; ++i) {
    uint32_t pairs[2];
    __builtin_memcpy(pairs, indices + 4 * i, sizeof(pairs));
    __m128 quad = _mm_load_ss(columns + (pairs[0] & 0xffff));
    quad = _mm_insert_ps(quad, _mm_loadu_ps(columns + (pairs[0] >> 16)), 0x10);
    quad = _mm_insert_ps(quad, _mm_loadu_ps(columns + (pairs[1] & 0xffff)), 0x20);
    quads[i] = _mm_insert_ps(quad, _mm_loadu_ps(columns + (pairs[1] >> 16)), 0x30);
  }
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set_m128(quads[1], quads[0])),
                            _mm256_set_m128(quads[3], quads[2]), 1);
}

inline __m512 load_int8_lanes(const int8_t* source) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
}

inline void store_rows(const PackedWeightView& weight, const LinearOutput& output, int64_t token, int64_t tile,
                       const RowSums& rows) {
  const int64_t first = tile * kRowsPerTile;
  const int64_t left = weight.out_features - first;
  const __mmask16 low = first_lanes(left), high = first_lanes(left > 16 ? left - 16 : 0);
  RowSums result = rows;
  if (output.bias != nullptr) {
    result.low = _mm512_add_ps(result.low, load_lanes(output.bias, first, low, output.bias_type));
    result.high = _mm512_add_ps(result.high, load_lanes(output.bias, first + 16, high, output.bias_type));
  }
  const int64_t index = token * output.row_stride + first;
  store_lanes(output.data, index, low, output.type, result.low);
  store_lanes(output.data, index + 16, high, output.type, result.high);
}

// Codes behind a DecodeActivations, grouped by bit and padded to 64 columns: magnitudes, then a word of flips for every
// 32 columns, in which a bit is set where the activation is negative; for kInt16 the high halves, then the low.
inline int64_t code_bytes(int64_t in_features) { return (in_features + 63) / 64 * 64; }
inline int64_t flip_bytes(int64_t in_features) { return code_bytes(in_features) / 8; }

// The planes of a row tile: sum over all columns of scale * sign * activation.
template <ActivationPrecision kPrecision>
inline RowSums sum_planes(const PackedWeightView& weight, const DecodeActivations& activations, int64_t tile,
                          int64_t ahead) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(&activations + 1);
  const RowSums code_scale = splat_rows(activations.code_scale);
  RowSums rows = splat_rows(0.0f);
  for (int64_t plane = 0; plane < weight.planes; ++plane) {
    const int64_t index = tile * weight.planes + plane;
    const int32_t* signs = weight.signs + index * weight.words * kRowsPerTile;
    const uint16_t* scales = weight.scales + index * kRowsPerTile;
    prefetch(scales, kScalesAhead);
    RowSums sums;
    if (kPrecision == ActivationPrecision::kExact) {
      sums = sum_signed(signs, activations.columns, activations.sum, weight.words, ahead);
    } else if (kPrecision == ActivationPrecision::kInt16) {
      const int8_t* low_codes = codes + code_bytes(weight.in_features);
      const Int16Counts counts = sum_positive_int16(signs, codes, low_codes, weight.words, ahead);
      const RowSums high = to_float(signed_counts(counts.high_codes, activations.high_code_sum));
      const RowSums low = to_float(signed_counts(counts.low_codes, activations.code_sum));
      sums = multiply_add(code_scale, multiply_add(splat_rows(256.0f), high, low), splat_rows(0.0f));
    } else {
      const int32_t* flips = reinterpret_cast<const int32_t*>(codes + code_bytes(weight.in_features));
      const RowCounts counts =
          signed_counts(sum_positive(signs, codes, flips, weight.words, ahead), activations.code_sum);
      sums = multiply_add(code_scale, to_float(counts), sum_exact_columns(signs, activations));
    }
    rows = multiply_add(load_float16_rows(scales), sums, rows);
  }
  return rows;
}

// Adds outlier_scale * sum of delta * activation to the rows of kTiles tiles, and what the means contribute. The tiles
// advance together: all of them read the same few lines of the activations.
template <int kTiles>
inline void add_outliers(const PackedWeightView& weight, const DecodeActivations& activations, int64_t first_tile,
                         RowSums* rows) {
  const int64_t per_tile = weight.outliers * kRowsPerTile;
  const uint16_t* columns = weight.outlier_columns + first_tile * per_tile;
  const int8_t* deltas = weight.outlier_deltas + first_tile * per_tile;
  RowSums sums[kTiles];
  for (RowSums& sum : sums) sum = splat_rows(0.0f);
  for (int64_t i = 0; i < weight.outliers; ++i, columns += kRowsPerTile, deltas += kRowsPerTile) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      const uint16_t* tile_columns = columns + t * per_tile;
      const int8_t* tile_deltas = deltas + t * per_tile;
      // Those of the next group.
      prefetch(tile_columns, kTiles * per_tile * 2);
      prefetch(tile_deltas, kTiles * per_tile);
      sums[t].low =
          _mm512_fmadd_ps(load_int8_lanes(tile_deltas), gather_columns(activations.columns, tile_columns), sums[t].low);
      sums[t].high = _mm512_fmadd_ps(load_int8_lanes(tile_deltas + 16),
                                     gather_columns(activations.columns, tile_columns + 16), sums[t].high);
    }
  }
  for (int t = 0; t < kTiles; ++t) {
    const int64_t first_row = (first_tile + t) * kRowsPerTile;
    prefetch(weight.outlier_scales + first_row, kScalesAhead);
    rows[t] = multiply_add(load_float16_rows(weight.outlier_scales + first_row), sums[t], rows[t]);
    if (weight.means != nullptr) {
      rows[t] = multiply_add(load_float16_rows(weight.means + first_row), splat_rows(activations.sum), rows[t]);
    }
  }
}

template <ActivationPrecision kPrecision>
inline void gemv_tiles(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
                       int64_t tile_begin, int64_t tile_end, const LinearOutput& output) {
  for (int64_t begin = tile_begin; begin < tile_end; begin += kTileGroup) {
    const int64_t tiles = tile_end - begin < kTileGroup ? tile_end - begin : kTileGroup;
    for (int64_t token = 0; token < tokens; ++token) {
      // The first token has brought the signs for the others.
      const int64_t ahead = token == 0 ? kDecodeAhead : 0;
      RowSums rows[kTileGroup];
      for (int64_t t = 0; t < tiles; ++t) {
        rows[t] = sum_planes<kPrecision>(weight, *activations[token], begin + t, ahead);
      }
      if (tiles == kTileGroup) {
        add_outliers<kTileGroup>(weight, *activations[token], begin, rows);
      } else {
        for (int64_t t = 0; t < tiles; ++t) add_outliers<1>(weight, *activations[token], begin + t, rows + t);
      }
      for (int64_t t = 0; t < tiles; ++t) store_rows(weight, output, token, begin + t, rows[t]);
    }
  }
}

inline void gemv(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
                 int64_t tile_begin, int64_t tile_end, const LinearOutput& output) {
  switch (activations[0]->precision) {
    case ActivationPrecision::kInt8:
      return gemv_tiles<ActivationPrecision::kInt8>(weight, activations, tokens, tile_begin, tile_end, output);
    case ActivationPrecision::kInt16:
      return gemv_tiles<ActivationPrecision::kInt16>(weight, activations, tokens, tile_begin, tile_end, output);
    case ActivationPrecision::kExact:
      return gemv_tiles<ActivationPrecision::kExact>(weight, activations, tokens, tile_begin, tile_end, output);
  }
}

inline int64_t decode_activation_bytes(int64_t in_features, ActivationPrecision precision) {
  const int64_t second = precision == ActivationPrecision::kInt16 ? code_bytes(in_features) : flip_bytes(in_features);
  return static_cast<int64_t>(sizeof(DecodeActivations)) + code_bytes(in_features) + second;
}

inline void prepare_decode(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                           ActivationPrecision precision, DecodeActivations* activations) {
  const int64_t width = weight.in_features;
  float* columns = activations->columns;
  int8_t* codes = reinterpret_cast<int8_t*>(activations + 1);
  const ScaledColumns scaled = scale_columns(weight, input, token, columns);
  clear_beyond(width, activations);
  activations->sum = scaled.sum;
  activations->precision = precision;
  activations->exact_count = 0;
  if (precision == ActivationPrecision::kExact) return;

  float largest = largest_of(scaled);
  if (precision == ActivationPrecision::kInt8) {
    const auto select = [&] { return select_exact_columns(scaled, width, activations); };
    largest = select_if_outstanding(kDecodeOutstanding, largest, scaled.square_sum, width, select, activations);
  }
  const CodeScale scale = code_scale(largest, scaled.sum, decode_code_max(precision));
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  activations->code_scale = scale.scale;
  __m512i high_sum = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
  if (precision == ActivationPrecision::kInt16) {
    int8_t* low_codes = codes + code_bytes(width);
    for (int64_t k = 0; k < width; k += 64) {
      const Int16Codes halves = encode_int16(columns + k, inverse, &high_sum, &sum, nullptr, nullptr);
      _mm512_storeu_si512(codes + k, halves.high);
      _mm512_storeu_si512(low_codes + k, halves.low);
    }
    activations->high_code_sum = _mm512_reduce_add_epi32(high_sum);
  } else {
    for (int32_t i = 0; i < activations->exact_count; ++i) columns[activations->exact_columns[i]] = 0.0f;
    int8_t* flips = codes + code_bytes(width);
    for (int64_t k = 0; k < width; k += 64) {
      uint64_t negative;
      _mm512_storeu_si512(codes + k, encode_magnitudes(columns + k, inverse, &sum, &negative));
      __builtin_memcpy(flips + k / 8, &negative, sizeof(negative));
    }
    for (int32_t i = 0; i < activations->exact_count; ++i) {
      columns[activations->exact_columns[i]] = activations->exact_values[i];
    }
  }
  activations->code_sum = _mm512_reduce_add_epi32(sum);
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
