// Prefill with AVX-512 and float activations: the tile as float, a chunk of columns at a time.
#pragma once

#include <immintrin.h>

#include "isa/avx512vnni_gemv.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

constexpr int64_t kChunkColumns = 512;  // x 32 rows x 4 bytes = 64 KiB

// weights[column][row], with mean and outliers, without column scales.
inline void expand_chunk(const PackedWeightView& weight, int64_t tile, int64_t first_word, int64_t words,
                         float* weights) {
  const RowSums mean =
      weight.means != nullptr ? load_float16_rows(weight.means + tile * kRowsPerTile) : splat_rows(0.0f);
  const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
  RowSums scales[kMaxPlanes];
  for (int64_t p = 0; p < weight.planes; ++p) {
    scales[p] = load_float16_rows(weight.scales + (tile * weight.planes + p) * kRowsPerTile);
  }
  for (int64_t word = 0; word < words; ++word) {
    for (int b = 0; b < 32; ++b) {
      const __m128i to_top = _mm_cvtsi32_si128(31 - b);
      RowSums sum = mean;
      for (int64_t p = 0; p < weight.planes; ++p) {
        const int32_t* signs =
            weight.signs + ((tile * weight.planes + p) * weight.words + first_word + word) * kRowsPerTile;
        // scale ^ (~signs & sign_bit)
        sum.low = _mm512_add_ps(sum.low, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
                                             _mm512_castps_si512(scales[p].low),
                                             _mm512_sll_epi32(_mm512_loadu_si512(signs), to_top), sign_bit, 0xd2)));
        sum.high =
            _mm512_add_ps(sum.high, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
                                        _mm512_castps_si512(scales[p].high),
                                        _mm512_sll_epi32(_mm512_loadu_si512(signs + 16), to_top), sign_bit, 0xd2)));
      }
      store_rows(weights + (word * kColumnsPerWord + b) * kRowsPerTile, sum);
    }
  }
  const int64_t first = first_word * kColumnsPerWord, last = first + words * kColumnsPerWord;
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    const float scale = _mm512_cvtss_f32(
        _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(weight.outlier_scales[tile * kRowsPerTile + row]))));
    for (int64_t i = 0; i < weight.outliers; ++i) {
      const int64_t slot = (tile * weight.outliers + i) * kRowsPerTile + row;
      const int64_t column = weight.outlier_columns[slot];
      if (column < first || column >= last) continue;
      weights[(column - first) * kRowsPerTile + row] += scale * static_cast<float>(weight.outlier_deltas[slot]);
    }
  }
}

constexpr int kFloatBlock = 12;

// sums[t][row] += sum over the chunk of weights * x, for kTokens tokens whose columns are `stride` apart.
template <int kTokens>
inline void multiply_chunk(const float* weights, const float* x, int64_t stride, int64_t columns, float* sums) {
  __m512 low[kTokens], high[kTokens];
  for (int t = 0; t < kTokens; ++t) low[t] = high[t] = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; ++k, weights += kRowsPerTile) {
    const __m512 w_low = _mm512_loadu_ps(weights), w_high = _mm512_loadu_ps(weights + 16);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512 value = _mm512_set1_ps(x[t * stride + k]);
      low[t] = _mm512_fmadd_ps(w_low, value, low[t]);
      high[t] = _mm512_fmadd_ps(w_high, value, high[t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* target = sums + t * kRowsPerTile;
    store_rows(target,
               {_mm512_add_ps(low[t], _mm512_loadu_ps(target)), _mm512_add_ps(high[t], _mm512_loadu_ps(target + 16))});
  }
}

struct FloatScratch {
  float* weights;  // [kChunkColumns, 32]
  float* sums;     // [tokens, 32]
  int64_t bytes;
};

inline FloatScratch float_scratch(int64_t tokens, void* memory) {
  float* base = static_cast<float*>(memory);
  const int64_t weights = kChunkColumns * kRowsPerTile;
  return {base, base + weights, (weights + tokens * kRowsPerTile) * 4};
}

inline void gemm_float(const PackedWeightView& weight, const float* columns, int64_t tokens, int64_t tile_begin,
                       int64_t tile_end, void* memory, const LinearOutput& output) {
  const FloatScratch scratch = float_scratch(tokens, memory);
  const int64_t stride = code_bytes(weight.in_features);
  constexpr int64_t kChunkWords = kChunkColumns / kColumnsPerWord;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    __builtin_memset(scratch.sums, 0, static_cast<size_t>(tokens * kRowsPerTile * 4));
    for (int64_t word = 0; word < weight.words; word += kChunkWords) {
      const int64_t words = weight.words - word < kChunkWords ? weight.words - word : kChunkWords;
      expand_chunk(weight, tile, word, words, scratch.weights);
      const float* x = columns + word * kColumnsPerWord;
      int64_t t = 0;
      for (; t + kFloatBlock <= tokens; t += kFloatBlock) {
        multiply_chunk<kFloatBlock>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                                    scratch.sums + t * kRowsPerTile);
      }
      for (; t + 4 <= tokens; t += 4) {
        multiply_chunk<4>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                          scratch.sums + t * kRowsPerTile);
      }
      for (; t < tokens; ++t) {
        multiply_chunk<1>(scratch.weights, x + t * stride, stride, words * kColumnsPerWord,
                          scratch.sums + t * kRowsPerTile);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      store_rows(weight, output, t, tile, load_rows(scratch.sums + t * kRowsPerTile));
    }
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
