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

// ---- prefetch ----
//
// One stream of addresses does not use all of the memory: four streams far apart read 1.1 to 1.4 times as fast, on one
// thread and on two (Zen 4, 4 KiB pages). So a range of row tiles is cut into kTileStreams parts that take turns, tile
// by tile. While a group of tiles, one of each part, is computed, the next group is fetched into L2, a line from every
// plane of every tile in turn.

constexpr int64_t kTileStreams = 4;
constexpr int64_t kCacheLine = 64;
// Two groups must leave room in L2 for the activations.
constexpr int64_t kLargestGroupBytes = 256 * 1024;
// Within a tile whose own lines were not fetched in this way: the first of a range.
constexpr int64_t kFirstTileAhead = 4096;

// Scales of the next tiles of a part.
constexpr int64_t kScalesAhead = 256;

struct SignPrefetch {
  const char* const* streams;
  int64_t count;   // of streams
  int64_t cursor;  // the stream to fetch from next
  int64_t offset;  // where in it
  int64_t step;    // 0 when there is nothing to fetch
  int64_t ahead;   // also fetch this far ahead in the tile itself

  // Two lines: as many as a word of a tile has.
  inline void fetch_two(const int32_t* here) {
    prefetch(here, ahead);
    prefetch(here + 16, ahead);
    prefetch(streams[cursor], offset);
    prefetch(streams[cursor], offset + kCacheLine);
    const bool is_last = cursor + 1 == count;
    offset += is_last ? step : 0;
    cursor = is_last ? 0 : cursor + 1;
  }
};

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

inline RowSums load_float16_rows(const uint16_t* source) {
  return {load_float16_lanes(source), load_float16_lanes(source + 16)};
}

// sum over all columns of sign * code = 2 * (sum where the sign is +) - code_sum
inline RowCounts signed_counts(const RowCounts& positive, int32_t code_sum) {
  const __m512i all = _mm512_set1_epi32(code_sum);
  return {_mm512_sub_epi32(_mm512_slli_epi32(positive.low, 1), all),
          _mm512_sub_epi32(_mm512_slli_epi32(positive.high, 1), all)};
}

// Sum of the codes where the sign is +.
//
// Accumulator b holds 2^b times its part, exactly: at most 65536 / 8 columns x 2^7 x 128 = 2^27. The sum of all parts
// is at most 65536 x 128 = 2^23, so that signed_counts() stays within 2^24 and is exact in float.
inline RowCounts sum_positive(const int32_t* plane, const int8_t* codes, int64_t words, SignPrefetch* next) {
  __m512i low[8], high[8];
  for (int b = 0; b < 8; ++b) low[b] = high[b] = _mm512_setzero_si512();
  const __m512i mask0 = _mm512_set1_epi8(1), mask1 = _mm512_set1_epi8(2), mask2 = _mm512_set1_epi8(4);
  const __m512i mask3 = _mm512_set1_epi8(8), mask4 = _mm512_set1_epi8(16), mask5 = _mm512_set1_epi8(32);
  const __m512i mask6 = _mm512_set1_epi8(64), mask7 = _mm512_set1_epi8(-128);
  SignPrefetch fetch = *next;
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile, codes += kColumnsPerWord) {
    fetch.fetch_two(plane);
    const __m512i signs_low = _mm512_loadu_si512(plane), signs_high = _mm512_loadu_si512(plane + 16);
    const auto accumulate = [&](int b, __m512i mask) __attribute__((always_inline)) {
      int32_t four_codes;
      __builtin_memcpy(&four_codes, codes + 4 * b, sizeof(four_codes));
      const __m512i x = _mm512_set1_epi32(four_codes);
      low[b] = dot_accumulate(low[b], _mm512_and_si512(signs_low, mask), x);
      high[b] = dot_accumulate(high[b], _mm512_and_si512(signs_high, mask), x);
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
  *next = fetch;
  RowCounts positive = {low[0], high[0]};
  for (int b = 1; b < 8; ++b) {
    positive.low = _mm512_add_epi32(positive.low, _mm512_srai_epi32(low[b], b));
    positive.high = _mm512_add_epi32(positive.high, _mm512_srai_epi32(high[b], b));
  }
  return positive;
}

struct Int16Counts {
  RowCounts high_codes, low_codes;
};

// The same for both halves of 16-bit codes. Four masks and one shift: more accumulators would not fit the registers.
inline Int16Counts sum_positive_int16(const int32_t* plane, const int8_t* high_codes, const int8_t* low_codes,
                                      int64_t words, SignPrefetch* next) {
  __m512i sums[2][2][4];  // [half of the code][half of the tile][bit % 4]
  for (auto& of_code : sums) {
    for (auto& of_tile : of_code) {
      for (__m512i& sum : of_tile) sum = _mm512_setzero_si512();
    }
  }
  const __m512i mask0 = _mm512_set1_epi8(1), mask1 = _mm512_set1_epi8(2), mask2 = _mm512_set1_epi8(4);
  const __m512i mask3 = _mm512_set1_epi8(8);
  SignPrefetch fetch = *next;
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile) {
    fetch.fetch_two(plane);
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
  *next = fetch;
  const auto unshifted = [](const __m512i* sum) __attribute__((always_inline)) {
    const __m512i upper = _mm512_add_epi32(sum[2], _mm512_srai_epi32(sum[3], 1));
    return _mm512_add_epi32(sum[0], _mm512_srai_epi32(_mm512_add_epi32(sum[1], _mm512_srai_epi32(upper, 1)), 1));
  };
  return {{unshifted(sums[0][0]), unshifted(sums[0][1])}, {unshifted(sums[1][0]), unshifted(sums[1][1])}};
}

// sum over all columns of sign * columns[k] in float.
inline RowSums sum_signed(const int32_t* plane, const float* columns, float sum, int64_t words, SignPrefetch* next) {
  __m512 low[4], high[4];
  for (int i = 0; i < 4; ++i) low[i] = high[i] = _mm512_setzero_ps();
  SignPrefetch fetch = *next;
  for (int64_t word = 0; word < words; ++word, plane += kRowsPerTile, columns += kColumnsPerWord) {
    fetch.fetch_two(plane);
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
  *next = fetch;
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

// sum of delta * activation over a tile's outliers, without outlier_scales.
inline RowSums sum_outliers(const uint16_t* outlier_columns, const int8_t* deltas, int64_t outliers,
                            const float* columns) {
  RowSums sums = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < outliers; ++i, outlier_columns += kRowsPerTile, deltas += kRowsPerTile) {
    // The next tile of the same part of the range.
    prefetch(outlier_columns, outliers * kRowsPerTile * 2);
    prefetch(deltas, outliers * kRowsPerTile);
    sums.low = _mm512_fmadd_ps(load_int8_lanes(deltas), gather_columns(columns, outlier_columns), sums.low);
    sums.high = _mm512_fmadd_ps(load_int8_lanes(deltas + 16), gather_columns(columns, outlier_columns + 16), sums.high);
  }
  return sums;
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

// Codes behind a DecodeActivations: int8 grouped by bit, padded to 64 columns; for kInt16 the high halves, then the
// low.
inline int64_t code_bytes(int64_t in_features) { return (in_features + 63) / 64 * 64; }

template <ActivationPrecision kPrecision>
inline RowSums linear_tile(const PackedWeightView& weight, const DecodeActivations& activations, int64_t tile,
                           SignPrefetch* next) {
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
      sums = sum_signed(signs, activations.columns, activations.sum, weight.words, next);
    } else if (kPrecision == ActivationPrecision::kInt16) {
      const int8_t* low_codes = codes + code_bytes(weight.in_features);
      const Int16Counts counts = sum_positive_int16(signs, codes, low_codes, weight.words, next);
      const RowSums high = to_float(signed_counts(counts.high_codes, activations.high_code_sum));
      const RowSums low = to_float(signed_counts(counts.low_codes, activations.code_sum));
      sums = multiply_add(code_scale, multiply_add(splat_rows(256.0f), high, low), splat_rows(0.0f));
    } else {
      const RowCounts counts = signed_counts(sum_positive(signs, codes, weight.words, next), activations.code_sum);
      sums = multiply_add(code_scale, to_float(counts), sum_exact_columns(signs, activations));
    }
    rows = multiply_add(load_float16_rows(scales), sums, rows);
  }
  const int64_t first_outlier = tile * weight.outliers * kRowsPerTile;
  const uint16_t* outlier_scales = weight.outlier_scales + tile * kRowsPerTile;
  prefetch(outlier_scales, kScalesAhead);
  const RowSums outliers = sum_outliers(weight.outlier_columns + first_outlier, weight.outlier_deltas + first_outlier,
                                        weight.outliers, activations.columns);
  rows = multiply_add(load_float16_rows(outlier_scales), outliers, rows);
  if (weight.means != nullptr) {
    rows = multiply_add(load_float16_rows(weight.means + tile * kRowsPerTile), splat_rows(activations.sum), rows);
  }
  return rows;
}

// A range of row tiles in the order in which they are computed.
struct TileOrder {
  int64_t begin, end;
  int64_t parts;        // that take turns
  int64_t part_length;  // tiles in each but the last
};

inline TileOrder tile_order(const PackedWeightView& weight, int64_t begin, int64_t end) {
  const int64_t tile_bytes = weight.planes * weight.words * kRowsPerTile * 4;
  int64_t parts = kTileStreams;
  while (parts > 1 && (parts * tile_bytes > kLargestGroupBytes || end - begin < 4 * parts)) parts /= 2;
  return {begin, end, parts, (end - begin + parts - 1) / parts};
}

// Sets streams[] to the planes of the group with index `group`; returns their number.
inline int64_t group_streams(const PackedWeightView& weight, const TileOrder& order, int64_t group,
                             const char** streams) {
  int64_t count = 0;
  if (group >= order.part_length) return 0;
  for (int64_t part = 0; part < order.parts; ++part) {
    const int64_t tile = order.begin + part * order.part_length + group;
    if (tile >= order.end) break;
    for (int64_t plane = 0; plane < weight.planes; ++plane) {
      const int64_t index = tile * weight.planes + plane;
      streams[count++] = reinterpret_cast<const char*>(weight.signs + index * weight.words * kRowsPerTile);
    }
  }
  return count;
}

template <ActivationPrecision kPrecision>
inline void gemv_tiles(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
                       int64_t tile_begin, int64_t tile_end, const LinearOutput& output) {
  const TileOrder order = tile_order(weight, tile_begin, tile_end);
  const char* streams[kTileStreams * kMaxPlanes];
  const char* const nothing = reinterpret_cast<const char*>(activations[0]);
  for (int64_t group = 0; group < order.part_length; ++group) {
    const int64_t count = group_streams(weight, order, group + 1, streams);
    SignPrefetch next = {streams, count, 0, 0, 2 * kCacheLine, group == 0 ? kFirstTileAhead : 0};
    SignPrefetch none = {&nothing, 1, 0, 0, 0, 0};
    if (count == 0) {
      next = none;
      next.ahead = group == 0 ? kFirstTileAhead : 0;
    }
    for (int64_t part = 0; part < order.parts; ++part) {
      const int64_t tile = order.begin + part * order.part_length + group;
      if (tile >= order.end) break;
      for (int64_t token = 0; token < tokens; ++token) {
        SignPrefetch* fetch = token == 0 ? &next : &none;
        store_rows(weight, output, token, tile, linear_tile<kPrecision>(weight, *activations[token], tile, fetch));
      }
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
  const int64_t halves = precision == ActivationPrecision::kInt16 ? 2 : 1;
  return static_cast<int64_t>(sizeof(DecodeActivations)) + halves * code_bytes(in_features);
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

  const float largest =
      precision == ActivationPrecision::kInt8 ? select_exact_columns(scaled, width, activations) : largest_of(scaled);
  const CodeScale scale = code_scale(largest, scaled.sum, precision);
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
    for (int64_t k = 0; k < width; k += 64) {
      _mm512_storeu_si512(codes + k, encode_int8(columns + k, inverse, &sum, nullptr));
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
