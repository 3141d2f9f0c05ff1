// Attention, normalization, rotation and gating of a transformer decoder. Include after a simd/ header.
#pragma once

#include "decoder_kernels.h"
#include "generic/dequantize.h"

namespace loop_singular_bit {
namespace {
namespace decoder {

constexpr int64_t kVectorsPerPass = kVectorRegisters >= 32 ? 4 : 2;
constexpr float kInt8Max = 127.0f;

inline float sum_of_lanes(F32x16 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float largest_of_lanes(F32x16 v) {
  float lanes[kLanes];
  store(lanes, v);
  float largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// exp(x) to about 2 units in the last place, x limited to the range of float32: 2^n * polynomial(x - n log 2).
inline F32x16 exponential(F32x16 x) {
  const F32x16 limited = min(max(x, splat(-87.0f)), splat(88.0f));
  const F32x16 rounding = splat(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction
  const F32x16 n = sub(fused_multiply_add(limited, splat(1.44269504f), rounding), rounding);
  const F32x16 high = fused_multiply_add(n, splat(-0.693145752f), limited);
  const F32x16 rest = fused_multiply_add(n, splat(-1.42860677e-6f), high);
  F32x16 polynomial = splat(1.98756915e-4f);
  polynomial = fused_multiply_add(polynomial, rest, splat(1.39819994e-3f));
  polynomial = fused_multiply_add(polynomial, rest, splat(8.33345186e-3f));
  polynomial = fused_multiply_add(polynomial, rest, splat(4.16657962e-2f));
  polynomial = fused_multiply_add(polynomial, rest, splat(1.66666657e-1f));
  polynomial = fused_multiply_add(polynomial, rest, splat(0.5f));
  polynomial = fused_multiply_add(mul(polynomial, rest), rest, add(rest, splat(1.0f)));
  // As an integer, (n + 127) * 2^23 is the bits of 2^n.
  return mul(polynomial, truncate_to_int(mul(add(n, splat(127.0f)), splat(8388608.0f))));
}

inline F32x16 load_int8(const int8_t* source) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(source[i]);
  return load(lanes);
}

template <CacheType type>
F32x16 load_cached(const void* base, int64_t index) {
  if constexpr (type == CacheType::kFloat32) {
    return load(static_cast<const float*>(base) + index);
  } else if constexpr (type == CacheType::kFloat16) {
    return load_float16(static_cast<const uint16_t*>(base) + index);
  } else {
    return load_int8(static_cast<const int8_t*>(base) + index);
  }
}

// ---- append ----

inline float largest_magnitude_of(const float* values, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// codes[i * stride] = values[i] / scale, rounded; the scale.
inline float store_int8(const float* values, int64_t count, int64_t stride, int8_t* codes) {
  const float largest = largest_magnitude_of(values, count);
  const float inverse = largest > 1e-30f ? kInt8Max / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float code = values[i] * inverse;
    // The largest may come out a little above 127. False for a NaN, whose conversion to an integer would be undefined.
    const bool is_in_range = code > -kInt8Max - 0.5f && code < kInt8Max + 0.5f;
    codes[i * stride] = is_in_range ? static_cast<int8_t>(__builtin_lrintf(code)) : static_cast<int8_t>(0);
  }
  return largest - largest == 0.0f ? largest / kInt8Max : largest - largest;
}

// Beyond its range float16 has infinities, which would turn into NaN in a sum.
inline F32x16 within_float16(F32x16 v) { return min(max(v, splat(-kLargestFloat16)), splat(kLargestFloat16)); }

inline void store_halves(const float* values, int64_t count, int64_t stride, uint16_t* halves) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    uint16_t lanes[kLanes];
    store_float16(lanes, within_float16(load_elements_partly<ElementType::kFloat32>(values, i, left)));
    for (int64_t j = 0; j < left; ++j) halves[(i + j) * stride] = lanes[j];
  }
}

inline void append(const CachedHead& head, int64_t position, const float* key, const float* value) {
  const int64_t count = head.head_dim;
  const int64_t key_start = position / kPositionsPerBlock * count * kPositionsPerBlock + position % kPositionsPerBlock;
  const int64_t value_start = position * head.value_stride;
  switch (head.type) {
    case CacheType::kFloat32:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<float*>(head.keys)[key_start + i * kPositionsPerBlock] = key[i];
        static_cast<float*>(head.values)[value_start + i] = value[i];
      }
      return;
    case CacheType::kFloat16:
      store_halves(key, count, kPositionsPerBlock, static_cast<uint16_t*>(head.keys) + key_start);
      store_halves(value, count, 1, static_cast<uint16_t*>(head.values) + value_start);
      return;
    default:
      head.key_scales[position] =
          store_int8(key, count, kPositionsPerBlock, static_cast<int8_t*>(head.keys) + key_start);
      head.value_scales[position] = store_int8(value, count, 1, static_cast<int8_t*>(head.values) + value_start);
      return;
  }
}

// ---- attend ----

// The positions that a pass over the cache covers, and the scores of its queries there.
struct Pass {
  int64_t first_block;
  int64_t blocks;
  float* scores[kQueriesPerPass];  // from the first position of the first block
};

template <CacheType type>
void score(const CachedHead& head, const AttentionQuery* queries, const Pass& pass) {
  const int64_t bytes = type == CacheType::kFloat32 ? 4 : type == CacheType::kFloat16 ? 2 : 1;
  for (int64_t block = 0; block < pass.blocks; ++block) {
    const int64_t position_block = pass.first_block + block;
    const char* keys =
        static_cast<const char*>(head.keys) + position_block * head.head_dim * kPositionsPerBlock * bytes;
    F32x16 sums[kQueriesPerPass];
    for (int64_t i = 0; i < kQueriesPerPass; ++i) sums[i] = splat(0.0f);
    for (int64_t d = 0; d < head.head_dim; ++d) {
      const F32x16 key = load_cached<type>(keys, d * kPositionsPerBlock);
      for (int64_t i = 0; i < kQueriesPerPass; ++i) {
        sums[i] = fused_multiply_add(splat(queries[i].query[d]), key, sums[i]);
      }
    }
    for (int64_t i = 0; i < kQueriesPerPass; ++i) {
      if constexpr (type == CacheType::kInt8) {
        sums[i] = mul(sums[i], load(head.key_scales + position_block * kPositionsPerBlock));
      }
      store(pass.scores[i] + block * kPositionsPerBlock, sums[i]);
    }
  }
}

// scores -> exp(score - largest) at the positions that are seen, 0 elsewhere; one over their sum.
inline float softmax(const AttentionQuery& query, const Pass& pass, float* scores) {
  constexpr float kUnseen = -3.0e38f;
  const int64_t offset = pass.first_block * kPositionsPerBlock;
  const int64_t count = pass.blocks * kPositionsPerBlock;
  for (int64_t i = 0; i < query.begin - offset; ++i) scores[i] = kUnseen;
  for (int64_t i = query.end - offset; i < count; ++i) scores[i] = kUnseen;
  F32x16 largest = splat(kUnseen);
  for (int64_t i = 0; i < count; i += kLanes) largest = max(load(scores + i), largest);
  const F32x16 shift = splat(largest_of_lanes(largest));
  for (int64_t i = 0; i < count; i += kLanes) store(scores + i, exponential(sub(load(scores + i), shift)));
  for (int64_t i = 0; i < query.begin - offset; ++i) scores[i] = 0.0f;
  for (int64_t i = query.end - offset; i < count; ++i) scores[i] = 0.0f;
  F32x16 sum = splat(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) sum = add(sum, load(scores + i));
  return 1.0f / decoder::sum_of_lanes(sum);
}

template <CacheType type, int64_t vectors>
void sum_values(const CachedHead& head, const Pass& pass, int64_t begin, int64_t end, int64_t column,
                F32x16 sums[kQueriesPerPass][kVectorsPerPass]) {
  for (int64_t i = 0; i < kQueriesPerPass; ++i) {
    for (int64_t j = 0; j < vectors; ++j) sums[i][j] = splat(0.0f);
  }
  const int64_t offset = pass.first_block * kPositionsPerBlock;
  for (int64_t position = begin; position < end; ++position) {
    F32x16 values[vectors];
    for (int64_t j = 0; j < vectors; ++j) {
      values[j] = load_cached<type>(head.values, position * head.value_stride + column + j * kLanes);
    }
    for (int64_t i = 0; i < kQueriesPerPass; ++i) {
      const F32x16 probability = splat(pass.scores[i][position - offset]);
      for (int64_t j = 0; j < vectors; ++j) sums[i][j] = fused_multiply_add(probability, values[j], sums[i][j]);
    }
  }
}

inline void store_columns(F32x16 sum, float factor, int64_t column, int64_t head_dim, float* output) {
  float lanes[kLanes];
  store(lanes, mul(sum, splat(factor)));
  for (int64_t i = 0; i < kLanes && column + i < head_dim; ++i) output[column + i] = lanes[i];
}

template <CacheType type>
void attend_pass(const CachedHead& head, const AttentionQuery* queries, int64_t count, float* scratch) {
  int64_t begin = queries[0].begin;
  int64_t end = queries[0].end;
  for (int64_t i = 1; i < kQueriesPerPass; ++i) {
    begin = queries[i].begin < begin ? queries[i].begin : begin;
    end = queries[i].end > end ? queries[i].end : end;
  }
  Pass pass;
  pass.first_block = begin / kPositionsPerBlock;
  pass.blocks = (end + kPositionsPerBlock - 1) / kPositionsPerBlock - pass.first_block;
  for (int64_t i = 0; i < kQueriesPerPass; ++i) pass.scores[i] = scratch + i * pass.blocks * kPositionsPerBlock;
  score<type>(head, queries, pass);
  float factors[kQueriesPerPass];
  for (int64_t i = 0; i < kQueriesPerPass; ++i) {
    factors[i] = softmax(queries[i], pass, pass.scores[i]);
    if constexpr (type == CacheType::kInt8) {
      for (int64_t position = begin; position < end; ++position) {
        pass.scores[i][position - pass.first_block * kPositionsPerBlock] *= head.value_scales[position];
      }
    }
  }
  F32x16 sums[kQueriesPerPass][kVectorsPerPass];
  int64_t column = 0;
  for (; column + kVectorsPerPass * kLanes <= head.value_stride; column += kVectorsPerPass * kLanes) {
    sum_values<type, kVectorsPerPass>(head, pass, begin, end, column, sums);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < kVectorsPerPass; ++j) {
        store_columns(sums[i][j], factors[i], column + j * kLanes, head.head_dim, queries[i].output);
      }
    }
  }
  for (; column < head.value_stride; column += kLanes) {
    sum_values<type, 1>(head, pass, begin, end, column, sums);
    for (int64_t i = 0; i < count; ++i) {
      store_columns(sums[i][0], factors[i], column, head.head_dim, queries[i].output);
    }
  }
}

inline void attend(const CachedHead& head, const AttentionQuery* queries, int64_t count, float* scratch) {
  for (int64_t first = 0; first < count; first += kQueriesPerPass) {
    const int64_t here = count - first < kQueriesPerPass ? count - first : kQueriesPerPass;
    AttentionQuery pass_queries[kQueriesPerPass];
    for (int64_t i = 0; i < kQueriesPerPass; ++i) pass_queries[i] = queries[first + (i < here ? i : here - 1)];
    switch (head.type) {
      case CacheType::kFloat32:
        attend_pass<CacheType::kFloat32>(head, pass_queries, here, scratch);
        break;
      case CacheType::kFloat16:
        attend_pass<CacheType::kFloat16>(head, pass_queries, here, scratch);
        break;
      default:
        attend_pass<CacheType::kInt8>(head, pass_queries, here, scratch);
        break;
    }
  }
}

// ---- elementwise ----

inline void normalize(const float* input, const float* weight, int64_t count, float epsilon, float* output) {
  F32x16 squares = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32x16 v = load(input + i);
    squares = fused_multiply_add(v, v, squares);
  }
  float sum = decoder::sum_of_lanes(squares);
  for (int64_t j = i; j < count; ++j) sum += input[j] * input[j];
  const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + epsilon);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    store(output + i, mul(mul(load(input + i), splat(factor)), load(weight + i)));
  }
  for (; i < count; ++i) output[i] = input[i] * factor * weight[i];
}

inline void rotate(const float* cosines, const float* sines, int64_t count, float* vector) {
  const int64_t half = count / 2;
  float* other = vector + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F32x16 a = load(vector + i);
    const F32x16 b = load(other + i);
    const F32x16 cosine = load(cosines + i);
    const F32x16 sine = load(sines + i);
    store(vector + i, sub(mul(a, cosine), mul(b, sine)));
    store(other + i, add(mul(b, cosine), mul(a, sine)));
  }
  for (; i < half; ++i) {
    const float a = vector[i];
    const float b = other[i];
    vector[i] = a * cosines[i] - b * sines[i];
    other[i] = b * cosines[i] + a * sines[i];
  }
}

inline void gate(const float* up, int64_t count, float* gate) {
  const F32x16 one = splat(1.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const F32x16 g = load_elements_partly<ElementType::kFloat32>(gate, i, left);
    const F32x16 u = load_elements_partly<ElementType::kFloat32>(up, i, left);
    float lanes[kLanes];
    store(lanes, mul(div(g, add(one, exponential(sub(splat(0.0f), g)))), u));
    __builtin_memcpy(gate + i, lanes, left * sizeof(float));
  }
}

// ---- dense weights ----

template <ElementType type>
void dense_rows(const void* weight, int64_t in_features, int64_t row_begin, int64_t row_end, const float* input,
                int64_t input_stride, int64_t tokens, const float* bias, float* output, int64_t output_stride) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t start = row * in_features;
    for (int64_t first = 0; first < tokens; first += kQueriesPerPass) {
      const int64_t here = tokens - first < kQueriesPerPass ? tokens - first : kQueriesPerPass;
      const float* inputs[kQueriesPerPass];
      F32x16 sums[kQueriesPerPass];
      for (int64_t i = 0; i < kQueriesPerPass; ++i) {
        inputs[i] = input + (first + (i < here ? i : here - 1)) * input_stride;
        sums[i] = splat(0.0f);
      }
      int64_t k = 0;
      for (; k + kLanes <= in_features; k += kLanes) {
        const F32x16 w = load_elements<type>(weight, start + k);
        for (int64_t i = 0; i < kQueriesPerPass; ++i) sums[i] = fused_multiply_add(w, load(inputs[i] + k), sums[i]);
      }
      if (k < in_features) {
        const F32x16 w = load_elements_partly<type>(weight, start + k, in_features - k);
        for (int64_t i = 0; i < kQueriesPerPass; ++i) {
          const F32x16 x = load_elements_partly<ElementType::kFloat32>(inputs[i], k, in_features - k);
          sums[i] = fused_multiply_add(w, x, sums[i]);
        }
      }
      for (int64_t i = 0; i < here; ++i) {
        output[(first + i) * output_stride + row] =
            decoder::sum_of_lanes(sums[i]) + (bias != nullptr ? bias[row] : 0.0f);
      }
    }
  }
}

inline void dense_linear(const void* weight, ElementType type, int64_t in_features, int64_t row_begin, int64_t row_end,
                         const float* input, int64_t input_stride, int64_t tokens, const float* bias, float* output,
                         int64_t output_stride) {
  const auto rows = type == ElementType::kFloat32    ? dense_rows<ElementType::kFloat32>
                    : type == ElementType::kBFloat16 ? dense_rows<ElementType::kBFloat16>
                                                     : dense_rows<ElementType::kFloat16>;
  rows(weight, in_features, row_begin, row_end, input, input_stride, tokens, bias, output, output_stride);
}

constexpr DecoderKernels kKernels = {append, attend, normalize, rotate, gate, dense_linear};

}  // namespace decoder
}  // namespace
}  // namespace loop_singular_bit
