#include "machine_limits.h"

#include <chrono>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512vnni"))) int64_t spin_avx512_vnni(int64_t rounds) {
  // Sixteen independent chains hide the latency; clobbers keep the loop out of the optimizer's hands.
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(
        "vpdpbusd %%zmm30, %%zmm31, %%zmm0\n vpdpbusd %%zmm30, %%zmm31, %%zmm1\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm2\n vpdpbusd %%zmm30, %%zmm31, %%zmm3\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm4\n vpdpbusd %%zmm30, %%zmm31, %%zmm5\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm6\n vpdpbusd %%zmm30, %%zmm31, %%zmm7\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm8\n vpdpbusd %%zmm30, %%zmm31, %%zmm9\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm10\n vpdpbusd %%zmm30, %%zmm31, %%zmm11\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm12\n vpdpbusd %%zmm30, %%zmm31, %%zmm13\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm14\n vpdpbusd %%zmm30, %%zmm31, %%zmm15\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
              "xmm13", "xmm14", "xmm15");
  }
  return rounds * 16 * 64;
}

__attribute__((target("avx2"))) int64_t spin_avx2(int64_t rounds) {
  // Without VNNI eight products cost a vpmaddubsw, a vpaddw and, now and then, a widening; count the first two.
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm8\n vpaddw %%ymm8, %%ymm0, %%ymm0\n"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm9\n vpaddw %%ymm9, %%ymm1, %%ymm1\n"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm10\n vpaddw %%ymm10, %%ymm2, %%ymm2\n"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm11\n vpaddw %%ymm11, %%ymm3, %%ymm3\n"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm12\n vpaddw %%ymm12, %%ymm4, %%ymm4\n"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpaddw %%ymm13, %%ymm5, %%ymm5\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");
  }
  return rounds * 6 * 32;
}

// Four streams far apart: one reads up to a third less.
__attribute__((target("avx2"))) int64_t read_avx2(const char* data, int64_t bytes) {
  constexpr int64_t kStreams = 4, kStep = 256, kAhead = 4096;
  const int64_t length = bytes / kStreams;
  __m256i sums[8] = {};
  for (int64_t i = 0; i + kStep <= length; i += kStep) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const char* begin = data + stream * length + i;
      for (int j = 0; j < 4; ++j) _mm_prefetch(begin + kAhead + 64 * j, _MM_HINT_T1);
      for (int j = 0; j < 8; ++j) {
        sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(begin + 32 * j)));
      }
    }
  }
  __m256i sum = sums[0];
  for (int j = 1; j < 8; ++j) sum = _mm256_add_epi64(sum, sums[j]);
  return _mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 1) + _mm256_extract_epi64(sum, 2) +
         _mm256_extract_epi64(sum, 3);
}

#endif

int64_t read_portable(const char* data, int64_t bytes) {
  int64_t sum = 0;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    int64_t value;
    std::memcpy(&value, data + i, sizeof(value));
    sum += value;
  }
  return sum;
}

int64_t read_share(const char* data, int64_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return read_avx2(data, bytes);
#endif
  return read_portable(data, bytes);
}

int64_t spin_share(int64_t rounds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni")) return spin_avx512_vnni(rounds);
  if (__builtin_cpu_supports("avx2")) return spin_avx2(rounds);
#endif
  static_cast<void>(rounds);
  return 0;
}

}  // namespace

int64_t loop_singular_bit_read_memory(const void* data, int64_t bytes, int32_t threads) {
  int64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static, 1)
  for (int32_t thread = 0; thread < threads; ++thread) {
    // Whole cache lines for each thread.
    const int64_t begin = bytes / 128 * thread / threads * 128, end = bytes / 128 * (thread + 1) / threads * 128;
    sum += read_share(static_cast<const char*>(data) + begin, end - begin);
  }
  return sum;
}

int64_t loop_singular_bit_spin_int8_products(int64_t rounds, int32_t threads) {
  int64_t products = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : products) schedule(static, 1)
  for (int32_t thread = 0; thread < threads; ++thread) products += spin_share(rounds);
  return products;
}

double loop_singular_bit_measured_clock() {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    constexpr int64_t kRounds = 100000;
    int64_t value = 0;
    const auto begin = Clock::now();
    for (int64_t i = 0; i < kRounds; ++i) {
#if defined(__x86_64__)
      __asm__ volatile("add $1, %0\n add $1, %0\n add $1, %0\n add $1, %0\n" : "+r"(value));
#elif defined(__aarch64__)
      __asm__ volatile("add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n add %0, %0, #1\n" : "+r"(value));
#endif
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const double clock = 4 * kRounds / seconds;
    best = clock > best ? clock : best;
  }
  return best;
}
