// Prefill with AVX-512 VNNI: for every row tile the products of all tokens' codes with the levels of the planes
// (isa/avx512vnni_gemm_product.h) or with one plane (isa/avx512vnni_gemm_lookup.h), its outliers
// (isa/avx512vnni_gemm_outliers.h), and what makes outputs of them.
#pragma once

#include <immintrin.h>

#include "generic/prefill_levels.h"
#include "isa/avx512vnni_gemm_exact.h"
#include "isa/avx512vnni_gemm_lookup.h"
#include "isa/avx512vnni_gemm_outliers.h"
#include "isa/avx512vnni_gemm_product.h"
#include "isa/avx512vnni_prefill_activations.h"

namespace loop_singular_bit {
namespace {
namespace avx512vnni {

// What one thread needs for a tile.
struct PrefillScratch {
  uint8_t* expanded;          // [words, 8, 32, 4]; or the signs of the tile, transposed to look up
  float* outlier_sums;        // [kSlabVectors, 32]
  float* partial;             // [vectors, 32]: planes so far, when they go one by one
  int32_t* delta_sums;        // [32]
  uint16_t* outlier_columns;  // [32, padded outliers]
  int8_t* outlier_deltas;     // [32, padded outliers]
  float* exact_weights;       // [slots, 32]: of the exact columns of a slab
  int64_t bytes;
};

inline PrefillScratch prefill_scratch(const PackedWeightView& weight, int64_t vectors, bool looks_up, void* memory) {
  char* base = static_cast<char*>(memory);
  PrefillScratch scratch;
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* begin = base + offset;
    offset += align_bytes(bytes);
    return begin;
  };
  scratch.expanded = reinterpret_cast<uint8_t*>(
      take(looks_up ? lookup_sign_bytes(weight.in_features) : weight.words * kExpandedWordBytes));
  scratch.outlier_sums = reinterpret_cast<float*>(take(kSlabVectors * kRowsPerTile * 4));
  scratch.partial = reinterpret_cast<float*>(take(vectors * kRowsPerTile * 4));
  scratch.delta_sums = reinterpret_cast<int32_t*>(take(kRowsPerTile * 4));
  scratch.outlier_columns = reinterpret_cast<uint16_t*>(take(kRowsPerTile * padded_outliers(weight.outliers) * 2));
  scratch.outlier_deltas = reinterpret_cast<int8_t*>(take(kRowsPerTile * padded_outliers(weight.outliers)));
  scratch.exact_weights = reinterpret_cast<float*>(take(UnitExactColumns::most_slots(kSlabVectors) * kRowsPerTile * 4));
  scratch.bytes = offset;
  return scratch;
}

// A run of planes that share one integer product.
struct PlaneRun {
  int64_t begin, end;
  bool is_first, is_last;
  bool is_first_tile, has_next_tile;
};

// Vectors of whole slabs, but for the last.
struct VectorRange {
  int64_t begin, end;
  int64_t halves;
};

// As multiply_block(). The first block, index 0, transposes the signs of the tile.
inline void look_up_tile(const PackedWeightView& weight, const PrefillLayout& layout, const char* slab,
                         const Block& block, int64_t index, int64_t blocks, const int32_t* signs,
                         const int32_t* next_tile_signs, uint8_t* transposed, __m512i (*products)[2]) {
  LookupBlock half_tile;
  half_tile.words = weight.words;
  half_tile.groups = layout.groups;
  half_tile.tables = reinterpret_cast<const uint8_t*>(slab + layout.vector_bytes * block.begin);
  half_tile.too_large = reinterpret_cast<const uint8_t*>(slab + layout.too_large_offset + index * layout.groups);
  // The signs of the next tile are spread over up to four blocks.
  half_tile.next_bytes = next_tile_signs == nullptr || index >= 4 ? 0 : blocks == 1 ? 256 : blocks < 4 ? 128 : 64;
  for (int64_t half = 0; half < 2; ++half) {
    half_tile.signs = signs + half * 16;
    half_tile.transposed = transposed + half * layout.groups * kGroupSignBytes;
    half_tile.next_signs =
        reinterpret_cast<const char*>(next_tile_signs) + (index * 2 + half) * layout.groups * half_tile.next_bytes;
    if (index == 0) {
      look_up_block<true>(block.end - block.begin, half_tile, half, products);
    } else {
      look_up_block<false>(block.end - block.begin, half_tile, half, products);
    }
  }
}

inline void gemm_run(const PackedWeightView& weight, const PlaneRun& run, const PrefillLevels& levels,
                     const PrefillLayout& layout, const char* activations, const VectorRange& range, int64_t tile,
                     const TileOutliers& outliers, const PrefillScratch& scratch, const LinearOutput& output) {
  const int64_t halves = range.halves;
  const int32_t* signs = weight.signs + (tile * weight.planes + run.begin) * weight.words * kRowsPerTile;
  const int32_t* next_tile_signs =
      run.has_next_tile ? weight.signs + (tile + 1) * weight.planes * weight.words * kRowsPerTile : nullptr;
  const TilePlanes planes = {signs, run.end - run.begin, weight.words, level_tables(levels, run.end - run.begin),
                             scratch.expanded};
  const RowSums unit = load_rows(levels.unit);
  const __m512i total_low = _mm512_loadu_si512(levels.total), total_high = _mm512_loadu_si512(levels.total + 16);
  const RowSums outlier_scale = load_float16_rows(weight.outlier_scales + tile * kRowsPerTile);
  const RowSums mean =
      weight.means != nullptr ? load_float16_rows(weight.means + tile * kRowsPerTile) : splat_rows(0.0f);
  const bool has_outliers = run.is_last && outliers.count > 0;

  for (int64_t first = range.begin; first < range.end; first += kSlabVectors) {
    const char* slab = activations + first / kSlabVectors * layout.slab_bytes;
    const int64_t vectors = range.end - first < kSlabVectors ? range.end - first : kSlabVectors;
    const float* scales = reinterpret_cast<const float*>(slab + layout.scales_offset);
    const float* sums = reinterpret_cast<const float*>(slab + layout.sums_offset);
    const int32_t* code_sums = reinterpret_cast<const int32_t*>(slab + layout.code_sums_offset);
    if (has_outliers) {
      const uint8_t* table = reinterpret_cast<const uint8_t*>(slab + layout.table_offset);
      if (run.is_first_tile) fetch_table(table, layout.table_rows * table_vectors(vectors));
      sum_slab_outliers(outliers, table, table_vectors(vectors), scratch.outlier_sums);
    }
    const UnitExactColumns exact = exact_columns_of(layout, weight.in_features, slab);
    const bool has_exact_columns = run.is_last && exact.slot_count() > 0;
    const int64_t blocks = block_count(layout, vectors, halves);
    for (int64_t index = 0; index < blocks; ++index) {
      const Block block = block_of(vectors, halves, index, blocks);
      __m512i products[kBlockVectors][2];
      // The planes of the next tile are spread over the blocks of the first slab.
      NextSigns next = {nullptr, 0};
      const bool is_first_block = first == range.begin && index == 0;
      if (next_tile_signs != nullptr && first == range.begin) {
        const int64_t plane = weight.planes * index / blocks;
        next = {next_tile_signs + plane * weight.words * kRowsPerTile, weight.planes * (index + 1) / blocks - plane};
      }
      if (run.is_last && run.has_next_tile && first == range.begin) fetch_outliers(weight, tile + 1, index, blocks);
      if (layout.looks_up) {
        look_up_tile(weight, layout, slab, block, index, blocks, signs, next_tile_signs, scratch.expanded, products);
      } else {
        multiply_block(block.end - block.begin, is_first_block, planes,
                       reinterpret_cast<const int32_t*>(slab + layout.vector_bytes * block.begin), next, products);
      }
      // Its signs are in the cache by now.
      if (has_exact_columns && index == 0) {
        expand_exact_planes(weight, tile, exact, scratch.exact_weights);
        add_filtered_outliers(weight, tile, exact, scratch.exact_weights);
      }
      RowSums token_rows = splat_rows(0.0f);
      for (int64_t v = block.begin; v < block.end; ++v) {
        // 2 * product - total * code_sum = sum of level * sign * code, modulo 2^32; the sum itself is at most
        // 65536 x 255 x 128 < 2^31. What is looked up is the product less the sum of all negative codes; its code_sum
        // is that of the magnitudes.
        const __m512i code_sum = _mm512_set1_epi32(code_sums[v]);
        const __m512i* product = products[v - block.begin];
        const RowCounts counts = {
            _mm512_sub_epi32(_mm512_slli_epi32(product[0], 1), _mm512_mullo_epi32(total_low, code_sum)),
            _mm512_sub_epi32(_mm512_slli_epi32(product[1], 1), _mm512_mullo_epi32(total_high, code_sum))};
        float* partial = scratch.partial + (first + v) * kRowsPerTile;
        RowSums rows = multiply_add(unit, to_float(counts), run.is_first ? splat_rows(0.0f) : load_rows(partial));
        if (!run.is_last) {
          store_rows(partial, rows);
          continue;
        }
        if (has_outliers) {
          rows = multiply_add(outlier_scale, load_rows(scratch.outlier_sums + v * kRowsPerTile), rows);
        }
        token_rows = multiply_add(splat_rows(scales[v]), rows, token_rows);
        if ((v + 1) % halves == 0) {
          if (weight.means != nullptr) token_rows = multiply_add(mean, splat_rows(sums[v]), token_rows);
          if (has_exact_columns) {
            alignas(64) float with_exact[kRowsPerTile];
            store_rows(with_exact, token_rows);
            add_exact_columns(exact.token(v), scratch.exact_weights, with_exact);
            token_rows = load_rows(with_exact);
          }
          store_rows(weight, output, (first + v) / halves, tile, token_rows);
          token_rows = splat_rows(0.0f);
        }
      }
    }
  }
}

inline void gemm_integer(const PackedWeightView& weight, const PrefillLayout& layout, const char* activations,
                         const VectorRange& range, int64_t tile_begin, int64_t tile_end, void* memory,
                         const LinearOutput& output) {
  const PrefillScratch scratch = prefill_scratch(weight, range.end, layout.looks_up, memory);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float scales[kMaxPlanes][kRowsPerTile];
    for (int64_t p = 0; p < weight.planes; ++p) {
      store_rows(scales[p], load_float16_rows(weight.scales + (tile * weight.planes + p) * kRowsPerTile));
    }
    const TileOutliers outliers =
        transpose_outliers(weight, tile, scratch.outlier_columns, scratch.outlier_deltas, scratch.delta_sums);
    const bool is_first_tile = tile == tile_begin, has_next_tile = tile + 1 < tile_end;
    PrefillLevels levels;
    if (find_prefill_levels(scales, weight.planes, 255, &levels)) {
      gemm_run(weight, {0, weight.planes, true, true, is_first_tile, has_next_tile}, levels, layout, activations, range,
               tile, outliers, scratch, output);
      continue;
    }
    for (int64_t p = 0; p < weight.planes; ++p) {
      single_plane_levels(scales[p], &levels);
      gemm_run(weight, {p, p + 1, p == 0, p + 1 == weight.planes, is_first_tile, has_next_tile}, levels, layout,
               activations, range, tile, outliers, scratch, output);
    }
  }
}

// ---- the table's functions ----

// The table of outliers takes a byte for every column and vector. Up to here it leaves room in L2 for the expanded
// tile. What is looked up is multiplied slab by slab, and should not grow much beyond L3.
inline int64_t prefill_token_limit(const PackedWeightView& weight, ActivationPrecision precision) {
  const bool is_looked_up = looks_up(weight, precision);
  const int64_t most_bytes = is_looked_up ? int64_t{16} << 20 : int64_t{1} << 20;
  const int64_t vector_bytes = is_looked_up ? 3 * weight.in_features : weight.in_features;
  const int64_t units = most_bytes / (vector_bytes * halves_of(precision) * kPrefillUnitTokens);
  return kPrefillUnitTokens * (units < 1 ? 1 : units > 8 ? 8 : units);
}

inline int64_t prefill_activation_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return tokens * code_bytes(weight.in_features) * 4;
  const PrefillLayout layout = prefill_layout(weight, precision);
  const int64_t slabs = (tokens * halves_of(precision) + kSlabVectors - 1) / kSlabVectors;
  return slabs * layout.slab_bytes;
}

inline int64_t prefill_scratch_bytes(const PackedWeightView& weight, int64_t tokens, ActivationPrecision precision) {
  if (precision == ActivationPrecision::kExact) return float_scratch(tokens, nullptr).bytes;
  return prefill_scratch(weight, tokens * halves_of(precision), looks_up(weight, precision), nullptr).bytes;
}

inline void prepare_prefill(const PackedWeightView& weight, const LinearInput& input, int64_t tokens,
                            int64_t unit_begin, int64_t unit_end, ActivationPrecision precision, void* activations) {
  const int64_t begin = unit_begin * kPrefillUnitTokens;
  const int64_t end = unit_end * kPrefillUnitTokens < tokens ? unit_end * kPrefillUnitTokens : tokens;
  if (precision == ActivationPrecision::kExact) {
    float* columns = static_cast<float*>(activations);
    for (int64_t t = begin; t < end; ++t) {
      scale_columns(weight, input, t, columns + t * code_bytes(weight.in_features));
    }
    return;
  }
  const PrefillLayout layout = prefill_layout(weight, precision);
  const int64_t slab_tokens = kSlabVectors / halves_of(precision);
  for (int64_t t = begin; t < end; t += slab_tokens) {
    prepare_slab(weight, input, t, t + slab_tokens < end ? slab_tokens : end - t, precision, layout,
                 static_cast<char*>(activations) + t / slab_tokens * layout.slab_bytes);
  }
}

inline void gemm(const PackedWeightView& weight, const void* activations, int64_t tokens, ActivationPrecision precision,
                 int64_t tile_begin, int64_t tile_end, void* scratch, const LinearOutput& output) {
  if (precision == ActivationPrecision::kExact) {
    gemm_float(weight, static_cast<const float*>(activations), tokens, tile_begin, tile_end, scratch, output);
    return;
  }
  const PrefillLayout layout = prefill_layout(weight, precision);
  const int64_t halves = halves_of(precision), vectors = tokens * halves;
  // All slabs share an expanded tile. Signs to look up cost little to read again, while tables stay in L2.
  const int64_t at_once = layout.looks_up ? kSlabVectors : vectors;
  for (int64_t first = 0; first < vectors; first += at_once) {
    const VectorRange range = {first, vectors - first < at_once ? vectors : first + at_once, halves};
    gemm_integer(weight, layout, static_cast<const char*>(activations), range, tile_begin, tile_end, scratch, output);
  }
}

}  // namespace avx512vnni
}  // namespace
}  // namespace loop_singular_bit
