// Decode by byte products, for instruction sets that multiply four bytes per lane and add them up. Lane = row: sign
// words masked with one bit of every byte are multiplied with four codes, without unpacking and without horizontal
// sums. Include after a simd/ header with products of bytes.
#pragma once

#include "generic/byte_activations.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace byte_linear {

constexpr int64_t kHalfTile = kRowsPerTile / 2;  // rows that are worked on together: kLanes

// Into L2 and far ahead, as for the other instruction sets; not measured on the machines that these kernels are for.
constexpr int64_t kSignsAhead = 16384;
constexpr int64_t kOutlierColumnsAhead = kSignsAhead / 2;
constexpr int64_t kOutlierDeltasAhead = kSignsAhead / 4;

inline void prefetch(const void* address, int64_t bytes_ahead) {
  __builtin_prefetch(static_cast<const char*>(address) + bytes_ahead, 0, 2);
}

struct RowSums {
  F32x16 half[2];
};

// What multiplies the sign words. kInt16: signed codes. kInt8: unsigned ones, and a word of flips for every word: signs
// of columns with negative activations change.
struct DecodeCodes {
  const int8_t* codes;
  const int32_t* flips;  // nullptr: codes are signed

  DecodeCodes from_word(int64_t word) const {
    return {codes + word * kColumnsPerWord, flips != nullptr ? flips + word : nullptr};
  }
};

template <bool kIsSigned, int kGroup>
inline Counts16 accumulate(Counts16 sums, Bytes64 bits, ByteGroups groups) {
  if constexpr (kIsSigned) {
    return dot_accumulate<kGroup>(sums, bits, groups);
  } else {
    return dot_accumulate_unsigned<kGroup>(sums, bits, groups);
  }
}

// sums[b] += 2^b times the sum of the codes in columns b and b + 4 of every byte, where the sign is +. Four masks and a
// shift: eight accumulators would not fit the registers. A function of its own: inlined into sum_signed_codes(), g++ 12
// keeps the accumulators of both halves of the tile alive, on the stack.
template <bool kPrefetches, bool kIsSigned>
__attribute__((noinline)) void add_positive(const int32_t* signs, DecodeCodes of_words, int64_t words,
                                            Counts16 sums[4]) {
  const int8_t* codes = of_words.codes;
  Counts16 sum0 = sums[0], sum1 = sums[1], sum2 = sums[2], sum3 = sums[3];
  for (int64_t word = 0; word < words; ++word, signs += kRowsPerTile, codes += kColumnsPerWord) {
    if (kPrefetches) {
      prefetch(signs, kSignsAhead);
      prefetch(signs + kHalfTile, kSignsAhead);
    }
    Bytes64 lower = load_bytes(signs);
    if constexpr (!kIsSigned) lower = bytes_xor_words(lower, of_words.flips[word]);
    const ByteGroups groups = load_groups(codes);
    sum0 = accumulate<kIsSigned, 0>(sum0, keep_low_bit<0>(lower), groups);
    sum1 = accumulate<kIsSigned, 1>(sum1, keep_low_bit<1>(lower), groups);
    sum2 = accumulate<kIsSigned, 2>(sum2, keep_low_bit<2>(lower), groups);
    sum3 = accumulate<kIsSigned, 3>(sum3, keep_low_bit<3>(lower), groups);
    const Bytes64 upper = upper_bits(lower);
    sum0 = accumulate<kIsSigned, 4>(sum0, keep_low_bit<0>(upper), groups);
    sum1 = accumulate<kIsSigned, 5>(sum1, keep_low_bit<1>(upper), groups);
    sum2 = accumulate<kIsSigned, 6>(sum2, keep_low_bit<2>(upper), groups);
    sum3 = accumulate<kIsSigned, 7>(sum3, keep_low_bit<3>(upper), groups);
  }
  sums[0] = sum0;
  sums[1] = sum1;
  sums[2] = sum2;
  sums[3] = sum3;
}

// sum over all columns of sign * code, for the rows of a tile.
//
// sums[b] is at most 65536 / 4 columns x 2^3 x 255 < 2^25 and a multiple of 2^b; the result is at most 65536 x 255 <
// 2^24: exact, also in float.
template <bool kIsSigned>
inline RowSums sum_signed_codes(const int32_t* plane, const DecodeCodes& codes, int64_t words, int32_t code_sum) {
  constexpr int64_t kWordsPerChunk = 32;  // the second half tile finds its signs in L1
  Counts16 sums[2][4];
  for (auto& of_half : sums) {
    for (Counts16& sum : of_half) sum = zero_counts();
  }
  for (int64_t word = 0; word < words; word += kWordsPerChunk) {
    const int64_t count = words - word < kWordsPerChunk ? words - word : kWordsPerChunk;
    const int32_t* signs = plane + word * kRowsPerTile;
    add_positive<true, kIsSigned>(signs, codes.from_word(word), count, sums[0]);
    add_positive<false, kIsSigned>(signs + kHalfTile, codes.from_word(word), count, sums[1]);
  }
  RowSums result;
  for (int half = 0; half < 2; ++half) {
    const Counts16* sum = sums[half];
    const Counts16 even = counts_add(sum[0], shift_counts_right<2>(sum[2]));
    const Counts16 odd = counts_add(shift_counts_right<1>(sum[1]), shift_counts_right<3>(sum[3]));
    const Counts16 positive = counts_add(even, odd);
    result.half[half] = float_from_counts(counts_sub(counts_add(positive, positive), code_sum));
  }
  return result;
}

// sums[t] = sum over all columns of sign * columns[t][k] in float, for sixteen rows. Words are summed on their own
// first: shorter chains round less.
template <int kTokens>
inline void sum_signed_columns(const int32_t* signs, const float* const* columns, const float* column_sums,
                               int64_t words, F32x16* sums) {
  F32x16 positive[kTokens];
  for (int t = 0; t < kTokens; ++t) positive[t] = splat(0.0f);
  for (int64_t word = 0; word < words; ++word) {
    const F32x16 bits = load(reinterpret_cast<const float*>(signs + word * kRowsPerTile));
    F32x16 of_word[kTokens];
    for (int t = 0; t < kTokens; ++t) of_word[t] = splat(0.0f);
    for (int64_t bit = 0; bit < kColumnsPerWord; ++bit) {
      const Mask16 is_positive = has_bits(bits, splat_bits(1u << bit));
      for (int t = 0; t < kTokens; ++t) {
        of_word[t] = add_where(is_positive, of_word[t], splat(columns[t][word * kColumnsPerWord + bit]));
      }
    }
    for (int t = 0; t < kTokens; ++t) positive[t] = add(positive[t], of_word[t]);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = sub(add(positive[t], positive[t]), splat(column_sums[t]));
}

// sum over the exact columns of sign * value, for sixteen rows; the signs are read where they lie.
inline F32x16 sum_exact_columns(const int32_t* signs, const DecodeActivations& activations) {
  F32x16 sum = splat(0.0f);
  for (int32_t i = 0; i < activations.exact_count; ++i) {
    const int32_t column = activations.exact_columns[i];
    const float value = activations.exact_values[i];
    const int32_t* word = signs + column / kColumnsPerWord * kRowsPerTile;
    const F32x16 bit = splat_bits(1u << (column % kColumnsPerWord));
    const Mask16 is_positive = has_bits(load(reinterpret_cast<const float*>(word)), bit);
    sum = add(sum, select(is_positive, splat(value), splat(-value)));
  }
  return sum;
}

// sum of delta * activation over a tile's outliers [outliers, 32], without outlier_scales.
inline RowSums sum_outliers(const uint16_t* outlier_columns, const int8_t* deltas, int64_t outliers,
                            const float* columns) {
  RowSums sums = {{splat(0.0f), splat(0.0f)}};
  for (int64_t i = 0; i < outliers; ++i, outlier_columns += kRowsPerTile, deltas += kRowsPerTile) {
    prefetch(outlier_columns, kOutlierColumnsAhead);
    prefetch(deltas, kOutlierDeltasAhead);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = half * kHalfTile;
      sums.half[half] =
          fused_multiply_add(load_int8(deltas + first), gather(columns, outlier_columns + first), sums.half[half]);
    }
  }
  return sums;
}

template <ElementType kType>
inline void store_up_to_sixteen(void* data, int64_t index, int64_t count, F32x16 v) {
  constexpr int64_t kElementBytes = kType == ElementType::kFloat32 ? 4 : 2;
  alignas(64) unsigned char elements[kLanes * kElementBytes];
  unsigned char* target = static_cast<unsigned char*>(data) + index * kElementBytes;
  unsigned char* whole = count >= kLanes ? target : elements;
  if constexpr (kType == ElementType::kFloat32) {
    store(reinterpret_cast<float*>(whole), v);
  } else if constexpr (kType == ElementType::kBFloat16) {
    store_bfloat16(reinterpret_cast<uint16_t*>(whole), v);
  } else {
    store_float16(reinterpret_cast<uint16_t*>(whole), v);
  }
  if (count < kLanes) __builtin_memcpy(target, elements, count * kElementBytes);
}

inline F32x16 load_bias(const LinearOutput& output, int64_t index, int64_t count) {
  switch (output.bias_type) {
    case ElementType::kFloat32:
      return load_up_to_sixteen<ElementType::kFloat32>(output.bias, index, count);
    case ElementType::kBFloat16:
      return load_up_to_sixteen<ElementType::kBFloat16>(output.bias, index, count);
    default:
      return load_up_to_sixteen<ElementType::kFloat16>(output.bias, index, count);
  }
}

// Adds the bias and rounds to the output's type, to nearest even.
inline void store_rows(const PackedWeightView& weight, const LinearOutput& output, int64_t token, int64_t tile,
                       const RowSums& rows) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = tile * kRowsPerTile + half * kHalfTile;
    const int64_t count = weight.out_features - first;
    if (count <= 0) return;
    F32x16 result = rows.half[half];
    if (output.bias != nullptr) result = add(result, load_bias(output, first, count));
    const int64_t index = token * output.row_stride + first;
    switch (output.type) {
      case ElementType::kFloat32:
        store_up_to_sixteen<ElementType::kFloat32>(output.data, index, count, result);
        break;
      case ElementType::kBFloat16:
        store_up_to_sixteen<ElementType::kBFloat16>(output.data, index, count, result);
        break;
      case ElementType::kFloat16:
        store_up_to_sixteen<ElementType::kFloat16>(output.data, index, count, result);
        break;
    }
  }
}

inline RowSums linear_tile(const PackedWeightView& weight, const DecodeActivations& activations, int64_t tile) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(&activations + 1);
  const float* columns = activations.columns;
  const F32x16 code_scale = splat(activations.code_scale);
  RowSums rows = {{splat(0.0f), splat(0.0f)}};
  for (int64_t plane = 0; plane < weight.planes; ++plane) {
    const int64_t index = tile * weight.planes + plane;
    const int32_t* signs = weight.signs + index * weight.words * kRowsPerTile;
    RowSums sums;
    if (activations.precision == ActivationPrecision::kExact) {
      for (int64_t half = 0; half < 2; ++half) {
        sum_signed_columns<1>(signs + half * kHalfTile, &columns, &activations.sum, weight.words, &sums.half[half]);
      }
    } else if (activations.precision == ActivationPrecision::kInt16) {
      const RowSums high = sum_signed_codes<true>(signs, {codes, nullptr}, weight.words, activations.high_code_sum);
      const RowSums low = sum_signed_codes<true>(signs, {codes + weight.words * kColumnsPerWord, nullptr}, weight.words,
                                                 activations.code_sum);
      for (int64_t half = 0; half < 2; ++half) {
        sums.half[half] = mul(code_scale, fused_multiply_add(splat(256.0f), high.half[half], low.half[half]));
      }
    } else {
      const int32_t* flips = reinterpret_cast<const int32_t*>(codes + weight.words * kColumnsPerWord);
      const RowSums coded = sum_signed_codes<false>(signs, {codes, flips}, weight.words, activations.code_sum);
      for (int64_t half = 0; half < 2; ++half) {
        const F32x16 exact = sum_exact_columns(signs + half * kHalfTile, activations);
        sums.half[half] = fused_multiply_add(code_scale, coded.half[half], exact);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      const F32x16 scales = load_float16(weight.scales + index * kRowsPerTile + half * kHalfTile);
      rows.half[half] = fused_multiply_add(scales, sums.half[half], rows.half[half]);
    }
  }
  const int64_t first_outlier = tile * weight.outliers * kRowsPerTile;
  const RowSums outliers = sum_outliers(weight.outlier_columns + first_outlier, weight.outlier_deltas + first_outlier,
                                        weight.outliers, columns);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = tile * kRowsPerTile + half * kHalfTile;
    rows.half[half] =
        fused_multiply_add(load_float16(weight.outlier_scales + first), outliers.half[half], rows.half[half]);
    if (weight.means != nullptr) {
      rows.half[half] = fused_multiply_add(load_float16(weight.means + first), splat(activations.sum), rows.half[half]);
    }
  }
  return rows;
}

inline void gemv(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
                 int64_t tile_begin, int64_t tile_end, const LinearOutput& output) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t token = 0; token < tokens; ++token) {
      store_rows(weight, output, token, tile, linear_tile(weight, *activations[token], tile));
    }
  }
}

// Codes behind a DecodeActivations, grouped by bit: magnitudes and then a word of flips for every word; for kInt16 the
// high halves, then the low.
inline int64_t decode_activation_bytes(int64_t in_features, ActivationPrecision precision) {
  const int64_t words = (in_features + kColumnsPerWord - 1) / kColumnsPerWord;
  const int64_t of_word =
      precision == ActivationPrecision::kInt16 ? 2 * kColumnsPerWord : kColumnsPerWord + int64_t{sizeof(int32_t)};
  return static_cast<int64_t>(sizeof(DecodeActivations)) + words * of_word;
}

inline void encode_magnitudes(const PackedWeightView& weight, float inverse_scale, DecodeActivations* activations) {
  const F32x16 inverse_scales = splat(inverse_scale), zeros = splat(0.0f);
  int8_t* codes = reinterpret_cast<int8_t*>(activations + 1);
  int32_t* flips = reinterpret_cast<int32_t*>(codes + weight.words * kColumnsPerWord);
  Int32x4 sum = zero_sums();
  for (int64_t word = 0; word < weight.words; ++word) {
    const float* columns = activations->columns + word * kColumnsPerWord;
    const F32x16 first = load(columns), second = load(columns + kLanes);
    const Codes32 grouped = group_by_bit(round_to_uint8(mul(magnitude(first), inverse_scales)),
                                         round_to_uint8(mul(magnitude(second), inverse_scales)));
    sum = add_unsigned_codes(sum, grouped);
    store_codes(codes + word * kColumnsPerWord, grouped);
    flips[word] = static_cast<int32_t>(mask_bits(greater(zeros, first)) | mask_bits(greater(zeros, second)) << kLanes);
  }
  activations->code_sum = total(sum);
}

inline void encode_halves(const PackedWeightView& weight, float inverse_scale, DecodeActivations* activations) {
  constexpr int kHalves = 2;
  const F32x16 inverse_scales = splat(inverse_scale);
  int8_t* codes = reinterpret_cast<int8_t*>(activations + 1);
  Int32x4 sums[kHalves];
  for (Int32x4& sum : sums) sum = zero_sums();
  for (int64_t word = 0; word < weight.words; ++word, codes += kColumnsPerWord) {
    const float* columns = activations->columns + word * kColumnsPerWord;
    const WordCodes natural = encode<kHalves>(load(columns), load(columns + kLanes), inverse_scales);
    for (int half = 0; half < kHalves; ++half) {
      const Codes32 grouped = group_by_bit(natural.first[half], natural.second[half]);
      sums[half] = add_codes(sums[half], grouped);
      store_codes(codes + half * weight.words * kColumnsPerWord, grouped);
    }
  }
  activations->high_code_sum = total(sums[0]);
  activations->code_sum = total(sums[kHalves - 1]);
}

inline void prepare_decode(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                           ActivationPrecision precision, DecodeActivations* activations) {
  float* columns = activations->columns;
  const ColumnStatistics statistics = scale_columns(weight, input, token, columns);
  clear_beyond(weight.in_features, activations);
  activations->sum = statistics.sum;
  activations->precision = precision;
  activations->exact_count = 0;
  if (precision == ActivationPrecision::kExact) return;
  float largest = largest_of(statistics.group_max);
  if (precision == ActivationPrecision::kInt16) {
    const CodeScale scale = code_scale(largest, statistics.sum, kInt16CodeMax);
    activations->code_scale = scale.scale;
    return encode_halves(weight, scale.inverse, activations);
  }
  const auto select = [&] { return select_exact_columns(statistics, weight.in_features, activations); };
  largest = select_if_outstanding(kDecodeOutstanding, largest, statistics.square_sum, weight.in_features, select,
                                  activations);
  const CodeScale scale = code_scale(largest, statistics.sum, kMagnitudeCodeMax);
  activations->code_scale = scale.scale;
  for (int32_t i = 0; i < activations->exact_count; ++i) columns[activations->exact_columns[i]] = 0.0f;
  encode_magnitudes(weight, scale.inverse, activations);
  for (int32_t i = 0; i < activations->exact_count; ++i) {
    columns[activations->exact_columns[i]] = activations->exact_values[i];
  }
}

}  // namespace byte_linear
}  // namespace
}  // namespace loop_singular_bit
