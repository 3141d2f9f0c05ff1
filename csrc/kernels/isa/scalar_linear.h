// Packed linear in plain loops, for machines without a faster table. Rows of a tile are the inner loops, so that a
// compiler vectorizes them for whatever it targets. Prefill walks the planes as decode does.
#pragma once

#include "generic/activations.h"
#include "generic/element_types.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace scalar_linear {

// One prepared token, wherever its arrays lie. Codes are int16 in natural order, zero-padded to whole words: shorter
// codes fit as well.
struct Token {
  ActivationPrecision precision;
  const int16_t* codes;  // unless kExact
  const float* columns;  // nullptr: activation ~ code_scale * code
  int64_t column_limit;  // activations from here on are 0
  float sum;
  float code_scale;
  int32_t code_sum;
  int32_t exact_count;
  const int32_t* exact_columns;
  const float* exact_values;
};

inline float activation(const Token& token, int64_t column) {
  if (column >= token.column_limit) return 0.0f;
  if (token.columns != nullptr) return token.columns[column];
  for (int32_t i = 0; i < token.exact_count; ++i) {
    if (token.exact_columns[i] == column) return token.exact_values[i];
  }
  return token.code_scale * static_cast<float>(token.codes[column]);
}

inline int64_t padded_columns(int64_t in_features) {
  return (in_features + kColumnsPerWord - 1) / kColumnsPerWord * kColumnsPerWord;
}

inline float scaled_activation(const PackedWeightView& weight, const LinearInput& input, int64_t token, int64_t k) {
  const float value = load_element(input.data, token * input.row_stride + k, input.type);
  return weight.column_scales != nullptr ? value * float_from_float16(weight.column_scales[k]) : value;
}

inline int16_t code_of(float activation, float inverse_scale) {
  const float scaled = activation * inverse_scale;
  // Comparisons are false for NaN, whose conversion to an integer would be undefined.
  const bool in_range = scaled > -32768.0f && scaled < 32767.0f;
  return in_range ? static_cast<int16_t>(lrintf(scaled)) : static_cast<int16_t>(0);
}

// sums[row] = sum of the codes at the columns whose sign is +. |sums| <= 65536 * 32512 < 2^31.
inline void sum_positive(const int32_t* plane, const int16_t* codes, int64_t words, int32_t* sums) {
  for (int64_t row = 0; row < kRowsPerTile; ++row) sums[row] = 0;
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t bit = 0; bit < kColumnsPerWord; ++bit) {
      const int32_t code = codes[word * kColumnsPerWord + bit];
      for (int64_t row = 0; row < kRowsPerTile; ++row) {
        const uint32_t signs = static_cast<uint32_t>(plane[word * kRowsPerTile + row]);
        sums[row] += -static_cast<int32_t>((signs >> bit) & 1) & code;
      }
    }
  }
}

// sums[row] = sum over k of sign * columns[k]. Words are summed on their own first: shorter chains round less.
inline void sum_signed(const int32_t* plane, const float* columns, int64_t words, float* sums) {
  for (int64_t row = 0; row < kRowsPerTile; ++row) sums[row] = 0.0f;
  for (int64_t word = 0; word < words; ++word) {
    float partial[kRowsPerTile] = {};
    for (int64_t bit = 0; bit < kColumnsPerWord; ++bit) {
      const uint32_t column = bits_from_float(columns[word * kColumnsPerWord + bit]);
      for (int64_t row = 0; row < kRowsPerTile; ++row) {
        const uint32_t signs = static_cast<uint32_t>(plane[word * kRowsPerTile + row]);
        partial[row] += float_from_bits(column ^ (~(signs >> bit) << 31));
      }
    }
    for (int64_t row = 0; row < kRowsPerTile; ++row) sums[row] += partial[row];
  }
}

// rows[row] = output without bias for one row tile and one token.
inline void linear_tile(const PackedWeightView& weight, const Token& token, int64_t tile, float* rows) {
  for (int64_t row = 0; row < kRowsPerTile; ++row) rows[row] = 0.0f;
  for (int64_t plane = 0; plane < weight.planes; ++plane) {
    const int64_t plane_index = tile * weight.planes + plane;
    const int32_t* signs = weight.signs + plane_index * weight.words * kRowsPerTile;
    float sums[kRowsPerTile];
    if (token.precision == ActivationPrecision::kExact) {
      sum_signed(signs, token.columns, weight.words, sums);
    } else {
      int32_t positive[kRowsPerTile];
      sum_positive(signs, token.codes, weight.words, positive);
      for (int64_t row = 0; row < kRowsPerTile; ++row) {
        sums[row] = token.code_scale * static_cast<float>(2 * static_cast<int64_t>(positive[row]) - token.code_sum);
      }
      for (int32_t i = 0; i < token.exact_count; ++i) {
        const int32_t column = token.exact_columns[i];
        const int32_t* word = signs + column / kColumnsPerWord * kRowsPerTile;
        for (int64_t row = 0; row < kRowsPerTile; ++row) {
          const bool is_positive = (static_cast<uint32_t>(word[row]) >> (column % kColumnsPerWord)) & 1;
          sums[row] += is_positive ? token.exact_values[i] : -token.exact_values[i];
        }
      }
    }
    for (int64_t row = 0; row < kRowsPerTile; ++row) {
      rows[row] += float_from_float16(weight.scales[plane_index * kRowsPerTile + row]) * sums[row];
    }
  }
  float outliers[kRowsPerTile] = {};
  for (int64_t i = 0; i < weight.outliers; ++i) {
    const int64_t first = (tile * weight.outliers + i) * kRowsPerTile;
    for (int64_t row = 0; row < kRowsPerTile; ++row) {
      outliers[row] += static_cast<float>(weight.outlier_deltas[first + row]) *
                       activation(token, weight.outlier_columns[first + row]);
    }
  }
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    const int64_t n = tile * kRowsPerTile + row;
    rows[row] += float_from_float16(weight.outlier_scales[n]) * outliers[row];
    if (weight.means != nullptr) rows[row] += float_from_float16(weight.means[n]) * token.sum;
  }
}

inline void store_rows(const LinearOutput& output, int64_t token, int64_t first_row, int64_t out_features,
                       const float* rows) {
  for (int64_t row = 0; row < kRowsPerTile && first_row + row < out_features; ++row) {
    const int64_t n = first_row + row;
    const float bias = output.bias != nullptr ? load_element(output.bias, n, output.bias_type) : 0.0f;
    store_element(output.data, token * output.row_stride + n, output.type, rows[row] + bias);
  }
}

inline void erase_exact_codes(const ExactColumns& exact, int16_t* codes, int32_t* code_sum) {
  for (int32_t i = 0; i < exact.exact_count; ++i) {
    *code_sum -= codes[exact.exact_columns[i]];
    codes[exact.exact_columns[i]] = 0;
  }
}

inline int64_t decode_token_limit(const PackedWeightView&, ActivationPrecision) { return kMaxDecodeTokens; }

inline int64_t decode_activation_bytes(int64_t in_features, ActivationPrecision) {
  return static_cast<int64_t>(sizeof(DecodeActivations)) +
         padded_columns(in_features) * static_cast<int64_t>(sizeof(int16_t));
}

inline void prepare_decode(const PackedWeightView& weight, const LinearInput& input, int64_t token,
                           ActivationPrecision precision, DecodeActivations* activations) {
  float* columns = activations->columns;
  float sum = 0.0f, square_sum = 0.0f, largest = 0.0f;
  for (int64_t k = 0; k < weight.in_features; ++k) {
    columns[k] = scaled_activation(weight, input, token, k);
    sum += columns[k];
    square_sum += columns[k] * columns[k];
    largest = magnitude_of(columns[k]) > largest ? magnitude_of(columns[k]) : largest;
  }
  activations->sum = sum;
  clear_beyond(weight.in_features, activations);
  activations->precision = precision;
  activations->exact_count = 0;
  if (precision == ActivationPrecision::kExact) return;
  if (precision == ActivationPrecision::kInt8) {
    largest = select_outstanding_columns(largest, square_sum, weight.in_features, activations);
  }
  const CodeScale scale = code_scale(largest, sum, decode_code_max(precision));
  int16_t* codes = reinterpret_cast<int16_t*>(activations + 1);
  int32_t code_sum = 0;
  for (int64_t k = 0; k < padded_columns(weight.in_features); ++k) {
    codes[k] = k < weight.in_features ? code_of(columns[k], scale.inverse) : static_cast<int16_t>(0);
    code_sum += codes[k];
  }
  erase_exact_codes(*activations, codes, &code_sum);
  activations->code_sum = code_sum;
  activations->code_scale = scale.scale;
}

inline void gemv(const PackedWeightView& weight, const DecodeActivations* const* activations, int64_t tokens,
                 int64_t tile_begin, int64_t tile_end, const LinearOutput& output) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t t = 0; t < tokens; ++t) {
      const DecodeActivations& prepared = *activations[t];
      const Token token = {prepared.precision,     reinterpret_cast<const int16_t*>(&prepared + 1),
                           prepared.columns,       kMaxInFeatures,
                           prepared.sum,           prepared.code_scale,
                           prepared.code_sum,      prepared.exact_count,
                           prepared.exact_columns, prepared.exact_values};
      float rows[kRowsPerTile];
      linear_tile(weight, token, tile, rows);
      store_rows(output, t, tile * kRowsPerTile, weight.out_features, rows);
    }
  }
}

// ---- prefill: for every token a header, its columns as float (kExact) or its codes ----

constexpr int64_t kPrefillUnitTokens = 1;

struct PrefillToken : ExactColumns {
  float sum;
  float code_scale;
  int32_t code_sum;
};

inline int64_t align(int64_t bytes) {
  return (bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
}

inline int64_t prefill_token_bytes(const PackedWeightView& weight, ActivationPrecision precision) {
  const bool is_exact = precision == ActivationPrecision::kExact;
  const int64_t element = static_cast<int64_t>(is_exact ? sizeof(float) : sizeof(int16_t));
  return align(sizeof(PrefillToken)) + align(padded_columns(weight.in_features) * element);
}

inline int64_t prefill_activation_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  return tokens * prefill_token_bytes(weight, precision);
}

inline int64_t prefill_token_limit(const PackedWeightView&, ActivationPrecision) { return 64; }

inline int64_t prefill_scratch_bytes(const PackedWeightView&, int64_t, ActivationPrecision) { return 0; }

inline void prepare_prefill(const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
                            int64_t unit_begin, int64_t unit_end, ActivationPrecision precision, void* activations) {
  for (int64_t token = unit_begin; token < unit_end && token < tokens; ++token) {
    char* memory = static_cast<char*>(activations) + token * prefill_token_bytes(weight, precision);
    PrefillToken* prepared = reinterpret_cast<PrefillToken*>(memory);
    float* columns = reinterpret_cast<float*>(memory + align(sizeof(PrefillToken)));
    int16_t* codes = reinterpret_cast<int16_t*>(columns);
    float largest = 0.0f, square_sum = 0.0f;
    prepared->sum = 0.0f;
    prepared->code_sum = 0;
    prepared->exact_count = 0;
    for (int64_t k = 0; k < weight.in_features; ++k) {
      const float value = scaled_activation(weight, input, token, k);
      prepared->sum += value;
      square_sum += value * value;
      largest = magnitude_of(value) > largest ? magnitude_of(value) : largest;
      if (precision == ActivationPrecision::kExact) columns[k] = value;
    }
    if (precision == ActivationPrecision::kInt8) {
      float block[kExactGroups];
      const auto block_at = [&](int64_t first) {
        for (int64_t i = 0; i < kExactGroups; ++i) {
          block[i] = first + i < weight.in_features ? scaled_activation(weight, input, token, first + i) : 0.0f;
        }
        return block;
      };
      largest = select_outstanding_columns(largest, square_sum, weight.in_features, block_at, prepared);
    }
    const CodeScale scale = code_scale(largest, prepared->sum, prefill_code_max(precision));
    prepared->code_scale = scale.scale;
    for (int64_t k = weight.in_features; k < padded_columns(weight.in_features); ++k) {
      if (precision == ActivationPrecision::kExact) {
        columns[k] = 0.0f;
      } else {
        codes[k] = 0;
      }
    }
    if (precision == ActivationPrecision::kExact) continue;
    for (int64_t k = 0; k < weight.in_features; ++k) {
      codes[k] = code_of(scaled_activation(weight, input, token, k), scale.inverse);
      prepared->code_sum += codes[k];
    }
    erase_exact_codes(*prepared, codes, &prepared->code_sum);
  }
}

inline void gemm(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
                 int64_t tile_begin, int64_t tile_end, void*, const LinearOutput& output) {
  const bool is_exact = precision == ActivationPrecision::kExact;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t t = 0; t < tokens; ++t) {
      const char* memory = static_cast<const char*>(activations) + t * prefill_token_bytes(weight, precision);
      const PrefillToken& prepared = *reinterpret_cast<const PrefillToken*>(memory);
      const void* columns = memory + align(sizeof(PrefillToken));
      Token token{};
      token.precision = precision;
      token.codes = is_exact ? nullptr : static_cast<const int16_t*>(columns);
      token.columns = is_exact ? static_cast<const float*>(columns) : nullptr;
      token.column_limit = weight.in_features;
      token.sum = prepared.sum;
      token.code_scale = prepared.code_scale;
      token.code_sum = prepared.code_sum;
      token.exact_count = prepared.exact_count;
      token.exact_columns = prepared.exact_columns;
      token.exact_values = prepared.exact_values;
      float rows[kRowsPerTile];
      linear_tile(weight, token, tile, rows);
      store_rows(output, t, tile * kRowsPerTile, weight.out_features, rows);
    }
  }
}

constexpr LinearKernels kKernels = {
    decode_token_limit,       decode_activation_bytes, prepare_decode,  gemv, kPrefillUnitTokens, prefill_token_limit,
    prefill_activation_bytes, prefill_scratch_bytes,   prepare_prefill, gemm,
};

}  // namespace scalar_linear
}  // namespace
}  // namespace loop_singular_bit
