// Prefill with AVX2 and no dot-product instruction. As for AVX-512 (isa/avx512vnni_gemm.h) a row tile is expanded to
// bytes once; products are vpmaddubsw, whose int16 sums of two must not saturate: levels sum to at most 127, so that a
// pair is at most 2 x 127 x 128 = 32512. While the levels are small, several pairs are added before they are widened.
//
// Every token has one vector of codes (int8) or two (int16: high halves, then low halves, each with its scale). Sixteen
// vectors make a slab.
#pragma once

#include <immintrin.h>

#include "generic/prefill_exact_columns.h"
#include "generic/prefill_levels.h"
#include "isa/avx2_gemv.h"
#include "isa/scalar_linear.h"
#include "linear_kernels.h"

namespace loop_singular_bit {
namespace {
namespace avx2 {

constexpr int64_t kSlabVectors = 16;
constexpr int64_t kPrefillUnitTokens = 16;
constexpr int kBlockVectors = 6;  // 12 sums, two registers of weights, one of codes and one in between
constexpr int32_t kLargestLevelTotal = 127;
constexpr int64_t kExpandedWordBytes = kRowsPerTile * kColumnsPerWord;

inline int64_t halves_of(ActivationPrecision precision) { return precision == ActivationPrecision::kInt16 ? 2 : 1; }

// One slab of prepared activations: codes int8 [16, width], grouped by bit as the signs are; natural int8
// [in_features + 1, 16] for the outliers, the last row zeros for columns out of range; then what belongs to a vector;
// then the exact columns (int8).
struct SlabLayout {
  int64_t width;
  int64_t natural_offset;
  int64_t vectors_offset;
  int64_t exact_offset;
  int64_t bytes;
};

struct SlabVector {
  float sum;  // of the token's activations
  float scale;
  int32_t code_sum;
};

inline SlabLayout slab_layout(int64_t in_features) {
  SlabLayout layout;
  layout.width = padded_codes(in_features);
  layout.natural_offset = layout.width * kSlabVectors;
  layout.vectors_offset = layout.natural_offset + (in_features + 1) * kSlabVectors;
  layout.exact_offset = layout.vectors_offset + kSlabVectors * static_cast<int64_t>(sizeof(SlabVector));
  layout.bytes = layout.exact_offset + UnitExactColumns::bytes(in_features, kSlabVectors);
  layout.bytes = (layout.bytes + kActivationAlignment - 1) / kActivationAlignment * kActivationAlignment;
  return layout;
}

// Eight codes, natural columns k .. k + 7, go to their vector: as byte k / 8 % 4 of the dwords of bits 0..7 of the
// word, and to column `vector` of the natural codes.
inline void store_codes(const int8_t* eight, int64_t k, int64_t in_features, int64_t vector, const SlabLayout& layout,
                        char* slab) {
  int8_t* codes = reinterpret_cast<int8_t*>(slab) + vector * layout.width + k / kColumnsPerWord * kColumnsPerWord;
  int8_t* natural = reinterpret_cast<int8_t*>(slab + layout.natural_offset) + vector;
  for (int64_t bit = 0; bit < 8; ++bit) {
    codes[4 * bit + k % kColumnsPerWord / 8] = eight[bit];
    if (k + bit < in_features) natural[(k + bit) * kSlabVectors] = eight[bit];
  }
}

inline UnitExactColumns exact_columns_of(const SlabLayout& layout, int64_t in_features, const char* slab) {
  // Kernels read what they prepared.
  return UnitExactColumns(in_features, kSlabVectors, const_cast<char*>(slab) + layout.exact_offset);
}

__attribute__((noinline)) float choose_exact_columns(const PackedWeightView& weight, const LinearInput& input,
                                                     int64_t token, const TokenRange& range, ExactColumns* exact) {
  alignas(32) float block[kExactGroups];
  const auto block_at = [&](int64_t k) {
    for (int64_t i = 0; i < kExactGroups; i += kLanesPerVector) {
      _mm256_store_ps(block + i, load_scaled(weight, input, token, k + i));
    }
    return block;
  };
  return select_outstanding_columns(range.largest, range.square_sum, weight.in_features, block_at, exact);
}

// The codes of the exact columns of a vector become 0.
inline void erase_exact_codes(const ExactColumns& exact, int64_t vector, const SlabLayout& layout, char* slab,
                              int32_t* code_sum) {
  for (int32_t i = 0; i < exact.exact_count; ++i) {
    const int64_t k = exact.exact_columns[i], of_word = k % kColumnsPerWord;
    char* code = slab + vector * layout.width + (k - of_word) + of_word % 8 * 4 + of_word / 8;
    *code_sum -= static_cast<int8_t>(*code);
    *code = 0;
    slab[layout.natural_offset + k * kSlabVectors + vector] = 0;
  }
}

inline void prepare_slab(const PackedWeightView& weight, const LinearInput& input, int64_t token_begin,
                         int64_t token_end, ActivationPrecision precision, char* slab) {
  const SlabLayout layout = slab_layout(weight.in_features);
  const int64_t halves = halves_of(precision);
  SlabVector* vectors = reinterpret_cast<SlabVector*>(slab + layout.vectors_offset);
  __builtin_memset(slab + layout.natural_offset, 0, static_cast<size_t>(layout.vectors_offset - layout.natural_offset));
  const UnitExactColumns exact_columns = exact_columns_of(layout, weight.in_features, slab);
  exact_columns.clear();
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t vector = (token - token_begin) * halves;
    const TokenRange range = scan_token(weight, input, token, nullptr);
    ExactColumns exact;
    exact.exact_count = 0;
    float largest = range.largest;
    if (precision == ActivationPrecision::kInt8) {
      largest = choose_exact_columns(weight, input, token, range, &exact);
      exact_columns.add(vector, exact);
    }
    const CodeScale scale = code_scale(largest, range.sum, prefill_code_max(precision));
    const __m256 inverse = _mm256_set1_ps(scale.inverse);
    const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(prefill_code_max(precision)));
    __m256i sum = _mm256_setzero_si256(), high_sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < layout.width; k += kLanesPerVector) {
      const __m256i codes = codes_of(load_scaled(weight, input, token, k), inverse, limit);
      int8_t eight[kLanesPerVector];
      store_low_bytes(eight, codes);
      store_codes(eight, k, weight.in_features, vector + halves - 1, layout, slab);
      if (halves == 2) {
        const __m256i high = high_half(codes);
        store_low_bytes(eight, high);
        store_codes(eight, k, weight.in_features, vector, layout, slab);
        high_sum = _mm256_add_epi32(high_sum, high);
        sum = _mm256_add_epi32(sum, _mm256_sub_epi32(codes, _mm256_slli_epi32(high, 8)));
      } else {
        sum = _mm256_add_epi32(sum, codes);
      }
    }
    if (halves == 2) vectors[vector] = {range.sum, 256.0f * scale.scale, sum_int32(high_sum)};
    SlabVector& last = vectors[vector + halves - 1];
    last = {range.sum, scale.scale, sum_int32(sum)};
    erase_exact_codes(exact, vector, layout, slab, &last.code_sum);
  }
}

// expanded[word][bit][row] = four bytes, for the columns bit, 8 + bit, 16 + bit and 24 + bit of the word.
inline void expand_planes(const int32_t* signs, int64_t planes, int64_t words, const PrefillLevels& levels,
                          uint8_t* expanded) {
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    __m256i level[kMaxPlanes];
    for (int64_t p = 0; p < planes; ++p) {
      const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels.level[p] + 8 * quarter));
      level[p] = _mm256_mullo_epi32(rows, _mm256_set1_epi32(0x01010101));
    }
    for (int64_t word = 0; word < words; ++word) {
      __m256i sums[8] = {};
      for (int64_t p = 0; p < planes; ++p) {
        const int32_t* source = signs + (p * words + word) * kRowsPerTile + 8 * quarter;
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
        for (int b = 0; b < 8; ++b) {
          const __m256i mask = _mm256_set1_epi8(static_cast<char>(1 << b));
          const __m256i is_plus = _mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask);
          sums[b] = _mm256_add_epi8(sums[b], _mm256_and_si256(is_plus, level[p]));
        }
      }
      for (int b = 0; b < 8; ++b) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(expanded + (word * 8 + b) * 128 + quarter * 32), sums[b]);
      }
    }
  }
}

// products[v][row] = sum over all columns of byte * code, for 16 rows and kVectors vectors that lie `stride` apart.
// Pairs may be added `pairs_at_once` times before an int16 could overflow.
template <int kVectors>
inline void multiply_block(const uint8_t* expanded, const int8_t* codes, int64_t stride, int64_t steps,
                           int64_t pairs_at_once, int32_t* products) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[kVectors][2];
  for (int v = 0; v < kVectors; ++v) sums[v][0] = sums[v][1] = _mm256_setzero_si256();
  const auto code_quad = [&](int v, int64_t step) __attribute__((always_inline)) {
    int32_t quad;
    __builtin_memcpy(&quad, codes + v * stride + 4 * step, sizeof(quad));
    return _mm256_set1_epi32(quad);
  };
  const auto weights = [&](int64_t step, int half) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(expanded + step * 128 + 32 * half));
  };
  if (pairs_at_once < 4) {
    for (int64_t step = 0; step < steps; ++step) {
      const __m256i low = weights(step, 0), high = weights(step, 1);
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) {
        const __m256i x = code_quad(v, step);
        sums[v][0] = _mm256_add_epi32(sums[v][0], _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
        sums[v][1] = _mm256_add_epi32(sums[v][1], _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(products + v * kRowsPerTile), sums[v][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(products + v * kRowsPerTile + 8), sums[v][1]);
    }
    return;
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < 16; ++i) products[v * kRowsPerTile + i] = 0;
  }
  for (int64_t begin = 0; begin < steps; begin += pairs_at_once) {
    const int64_t end = begin + pairs_at_once < steps ? begin + pairs_at_once : steps;
    for (int64_t step = begin; step < end; ++step) {
      const __m256i low = weights(step, 0), high = weights(step, 1);
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) {
        const __m256i x = code_quad(v, step);
        sums[v][0] = _mm256_add_epi16(sums[v][0], _mm256_maddubs_epi16(low, x));
        sums[v][1] = _mm256_add_epi16(sums[v][1], _mm256_maddubs_epi16(high, x));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int half = 0; half < 2; ++half) {
        __m256i* product = reinterpret_cast<__m256i*>(products + v * kRowsPerTile + 8 * half);
        _mm256_storeu_si256(product,
                            _mm256_add_epi32(_mm256_loadu_si256(product), _mm256_madd_epi16(sums[v][half], ones)));
        sums[v][half] = _mm256_setzero_si256();
      }
    }
  }
}

inline void multiply_block(int64_t vectors, const uint8_t* expanded, const int8_t* codes, int64_t stride, int64_t steps,
                           int64_t pairs_at_once, int32_t* products) {
  switch (vectors) {
    case 1:
      return multiply_block<1>(expanded, codes, stride, steps, pairs_at_once, products);
    case 2:
      return multiply_block<2>(expanded, codes, stride, steps, pairs_at_once, products);
    case 3:
      return multiply_block<3>(expanded, codes, stride, steps, pairs_at_once, products);
    case 4:
      return multiply_block<4>(expanded, codes, stride, steps, pairs_at_once, products);
    case 5:
      return multiply_block<5>(expanded, codes, stride, steps, pairs_at_once, products);
    default:
      return multiply_block<kBlockVectors>(expanded, codes, stride, steps, pairs_at_once, products);
  }
}

// sums[v][row] = sum of delta * code over the row's outliers, as int32: at most 65536 x 128 x 128 = 2^30.
inline void sum_slab_outliers(const PackedWeightView& weight, int64_t tile, const int8_t* natural, int32_t* sums) {
  const int64_t first = tile * weight.outliers * kRowsPerTile;
  const uint16_t* columns = weight.outlier_columns + first;
  const int8_t* deltas = weight.outlier_deltas + first;
  const auto load_codes = [&](int64_t slot) __attribute__((always_inline)) {
    const int64_t column = columns[slot] < weight.in_features ? columns[slot] : weight.in_features;
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(natural + column * kSlabVectors)));
  };
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
    for (int64_t i = 0; i < weight.outliers; i += 2) {
      const int64_t slot = i * kRowsPerTile + row;
      const bool has_second = i + 1 < weight.outliers;
      const int64_t second = has_second ? slot + kRowsPerTile : slot;
      const uint32_t first_delta = static_cast<uint16_t>(deltas[slot]);
      const uint32_t second_delta = has_second ? static_cast<uint16_t>(deltas[second]) : 0;
      const __m256i pair = _mm256_set1_epi32(static_cast<int32_t>(first_delta | (second_delta << 16)));
      const __m256i a = load_codes(slot), b = load_codes(second);
      low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), pair));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), pair));
    }
    // Vectors 0-3, 8-11 and 4-7, 12-15.
    alignas(32) int32_t lanes[kSlabVectors];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), _mm256_permute2x128_si256(low, high, 0x31));
    for (int64_t v = 0; v < kSlabVectors; ++v) sums[v * kRowsPerTile + row] = lanes[v];
  }
}

struct PrefillScratch {
  uint8_t* expanded;  // [words, 8, 32, 4]
  float* partial;     // [vectors, 32]: planes so far, when they take several runs
  float* exact;       // [slots, 32]: weights of the exact columns of a slab
  int64_t bytes;
};

inline PrefillScratch prefill_scratch(const PackedWeightView& weight, int64_t vectors, void* memory) {
  const int64_t expanded_bytes = weight.words * kExpandedWordBytes;
  const int64_t partial_bytes = vectors * kRowsPerTile * 4;
  const int64_t exact_bytes = UnitExactColumns::most_slots(kSlabVectors) * kRowsPerTile * 4;
  char* base = static_cast<char*>(memory);
  return {reinterpret_cast<uint8_t*>(base), reinterpret_cast<float*>(base + expanded_bytes),
          reinterpret_cast<float*>(base + expanded_bytes + partial_bytes),
          expanded_bytes + partial_bytes + exact_bytes};
}

// Planes [begin, end) of a tile share one integer product.
struct PlaneRun {
  int64_t begin, end;
  bool is_first, is_last;
};

inline void gemm_run(const PackedWeightView& weight, const PlaneRun& run, const PrefillLevels& levels,
                     const char* activations, int64_t tokens, int64_t halves, int64_t tile,
                     const PrefillScratch& scratch, const LinearOutput& output) {
  const SlabLayout layout = slab_layout(weight.in_features);
  const int64_t steps = weight.words * 8;
  expand_planes(weight.signs + (tile * weight.planes + run.begin) * weight.words * kRowsPerTile, run.end - run.begin,
                weight.words, levels, scratch.expanded);
  int32_t largest_total = 1;
  for (int64_t row = 0; row < kRowsPerTile; ++row) {
    largest_total = levels.total[row] > largest_total ? levels.total[row] : largest_total;
  }
  const int64_t pairs_at_once = 32767 / (2 * 128 * largest_total);

  const int64_t all_vectors = tokens * halves;
  for (int64_t first = 0; first < all_vectors; first += kSlabVectors) {
    const char* slab = activations + first / kSlabVectors * layout.bytes;
    const SlabVector* vectors = reinterpret_cast<const SlabVector*>(slab + layout.vectors_offset);
    const int64_t count = all_vectors - first < kSlabVectors ? all_vectors - first : kSlabVectors;
    alignas(32) int32_t products[kSlabVectors * kRowsPerTile];
    alignas(32) int32_t outliers[kSlabVectors * kRowsPerTile];
    const bool has_outliers = run.is_last && weight.outliers > 0;
    if (has_outliers) {
      sum_slab_outliers(weight, tile, reinterpret_cast<const int8_t*>(slab + layout.natural_offset), outliers);
    }
    for (int64_t v = 0; v < count; v += kBlockVectors) {
      const int64_t width = count - v < kBlockVectors ? count - v : kBlockVectors;
      for (int64_t half = 0; half < 2; ++half) {
        multiply_block(width, scratch.expanded + 64 * half, reinterpret_cast<const int8_t*>(slab) + v * layout.width,
                       layout.width, steps, pairs_at_once, products + v * kRowsPerTile + 16 * half);
      }
    }
    const UnitExactColumns exact = exact_columns_of(layout, weight.in_features, slab);
    const bool has_exact_columns = run.is_last && exact.slot_count() > 0;
    if (has_exact_columns) {
      expand_exact_planes(weight, tile, exact, scratch.exact);
      add_exact_outliers(weight, tile, exact, scratch.exact);
    }
    __m256 token_rows[4] = {};
    for (int64_t v = 0; v < count; ++v) {
      const bool is_token_begin = v % halves == 0, is_token_end = (v + 1) % halves == 0;
      float* partial = scratch.partial + (first + v) * kRowsPerTile;
      const __m256i code_sum = _mm256_set1_epi32(vectors[v].code_sum);
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 8 * i, n = tile * kRowsPerTile + row;
        // 2 * product - total * code_sum = sum of level * sign * code, modulo 2^32; the sum itself is at most
        // 65536 x 127 x 128 = 2^30.
        const __m256i total = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels.total + row));
        const __m256i product = _mm256_load_si256(reinterpret_cast<const __m256i*>(products + v * kRowsPerTile + row));
        const __m256i sum = _mm256_sub_epi32(_mm256_slli_epi32(product, 1), _mm256_mullo_epi32(total, code_sum));
        const __m256 before = run.is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(partial + row);
        __m256 rows = _mm256_fmadd_ps(_mm256_loadu_ps(levels.unit + row), _mm256_cvtepi32_ps(sum), before);
        if (!run.is_last) {
          _mm256_storeu_ps(partial + row, rows);
          continue;
        }
        if (has_outliers) {
          const __m256i outlier =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(outliers + v * kRowsPerTile + row));
          rows = _mm256_fmadd_ps(load_float16_rows(weight.outlier_scales + n), _mm256_cvtepi32_ps(outlier), rows);
        }
        const __m256 so_far = is_token_begin ? _mm256_setzero_ps() : token_rows[i];
        token_rows[i] = _mm256_fmadd_ps(_mm256_set1_ps(vectors[v].scale), rows, so_far);
        if (is_token_end && weight.means != nullptr) {
          token_rows[i] =
              _mm256_fmadd_ps(load_float16_rows(weight.means + n), _mm256_set1_ps(vectors[v].sum), token_rows[i]);
        }
      }
      if (has_exact_columns) {
        alignas(32) float rows[kRowsPerTile];
        for (int i = 0; i < 4; ++i) _mm256_store_ps(rows + 8 * i, token_rows[i]);
        add_exact_columns(exact.token(v), scratch.exact, rows);
        for (int i = 0; i < 4; ++i) token_rows[i] = _mm256_load_ps(rows + 8 * i);
      }
      if (run.is_last && is_token_end) store_rows(weight, output, (first + v) / halves, tile, token_rows);
    }
  }
}

// ---- the table's functions ----

// What is prepared should stay in L2 or close to it.
inline int64_t prefill_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  constexpr int64_t kPreparedBytes = int64_t{1} << 20;
  const int64_t units = kPreparedBytes / (2 * weight.in_features * halves_of(precision) * kPrefillUnitTokens);
  return kPrefillUnitTokens * (units < 1 ? 1 : units > 16 ? 16 : units);
}

inline int64_t prefill_activation_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) {
    return scalar_linear::prefill_activation_bytes(weight, tokens, precision);
  }
  const int64_t slabs = (tokens * halves_of(precision) + kSlabVectors - 1) / kSlabVectors;
  return slabs * slab_layout(weight.in_features).bytes;
}

inline int64_t prefill_scratch_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return 0;
  return prefill_scratch(weight, tokens * halves_of(precision), nullptr).bytes;
}

inline void prepare_prefill(const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
                            int64_t unit_begin, int64_t unit_end, ActivationPrecision precision, void* activations) {
  const int64_t begin = unit_begin * kPrefillUnitTokens;
  const int64_t end = unit_end * kPrefillUnitTokens < tokens ? unit_end * kPrefillUnitTokens : tokens;
  if (precision == ActivationPrecision::kExact) {
    return scalar_linear::prepare_prefill(weight, input, tokens, begin, end, precision, activations);
  }
  const int64_t slab_bytes = slab_layout(weight.in_features).bytes;
  const int64_t slab_tokens = kSlabVectors / halves_of(precision);
  for (int64_t t = begin; t < end; t += slab_tokens) {
    prepare_slab(weight, input, t, t + slab_tokens < end ? t + slab_tokens : end, precision,
                 static_cast<char*>(activations) + t / slab_tokens * slab_bytes);
  }
}

inline void gemm(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
                 int64_t tile_begin, int64_t tile_end, void* memory, const LinearOutput& output) {
  if (precision == ActivationPrecision::kExact) {
    return scalar_linear::gemm(weight, activations, tokens, precision, tile_begin, tile_end, memory, output);
  }
  const int64_t halves = halves_of(precision);
  const PrefillScratch scratch = prefill_scratch(weight, tokens * halves, memory);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float scales[kMaxPlanes][kRowsPerTile];
    for (int64_t p = 0; p < weight.planes; ++p) {
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(scales[p] + 8 * i,
                         load_float16_rows(weight.scales + (tile * weight.planes + p) * kRowsPerTile + 8 * i));
      }
    }
    // As many planes at once as have common levels: all of them, else four (eight planes are two runs), else one.
    for (int64_t begin = 0, end; begin < weight.planes; begin = end) {
      PrefillLevels levels;
      end = weight.planes;
      if (!find_prefill_levels(scales + begin, end - begin, kLargestLevelTotal, &levels)) {
        end = begin + 4 < weight.planes ? begin + 4 : weight.planes;
        if (!find_prefill_levels(scales + begin, end - begin, kLargestLevelTotal, &levels)) {
          end = begin + 1;
          single_plane_levels(scales[begin], &levels);
        }
      }
      gemm_run(weight, {begin, end, begin == 0, end == weight.planes}, levels, static_cast<const char*>(activations),
               tokens, halves, tile, scratch, output);
    }
  }
}

}  // namespace avx2
}  // namespace
}  // namespace loop_singular_bit
