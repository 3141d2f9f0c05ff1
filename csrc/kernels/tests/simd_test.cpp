// Vector primitives: the portable ones against plain arithmetic, all others against the portable ones, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "reference.h"
#include "tests/simd_probe.h"

namespace loop_singular_bit {
namespace {

constexpr int kLaneCount = 16;

std::vector<const SimdProbe*> supported_probes() {
  std::vector<const SimdProbe*> probes;
  for (const KernelTable* table : supported_kernels()) {
#if defined(__x86_64__)
    for (const SimdProbe* probe : {&kAvx2Probe, &kAvx512Probe}) {
      if (std::string(probe->isa) == table->name) probes.push_back(probe);
    }
#elif defined(__aarch64__)
    if (std::string(kNeonProbe.isa) == table->name) probes.push_back(&kNeonProbe);
#endif
    if (std::string(kScalarProbe.isa) == table->name) probes.push_back(&kScalarProbe);
  }
  return probes;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// NaNs may carry different payloads.
uint32_t comparable(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits; }

struct Lanes {
  explicit Lanes(std::mt19937_64& random) {
    const float special[] = {0.0f,     -0.0f,   1.0f,   -1.0f, 0.5f,   65504.0f, 65519.0f,  65520.0f,
                             5.96e-8f, 2.9e-8f, 1e-30f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
    std::normal_distribution<float> normal;
    for (std::vector<float>* lanes : {&a, &b, &c}) {
      for (int i = 0; i < kLaneCount; ++i) {
        lanes->push_back(random() % 3 == 0 ? special[random() % kLaneCount] : normal(random));
      }
    }
    for (int i = 0; i < kLaneCount; ++i) halves.push_back(static_cast<uint16_t>(random()));
    bits = static_cast<uint32_t>(random());
  }
  std::vector<float> a, b, c;
  std::vector<uint16_t> halves;
  uint32_t bits;
};

std::vector<uint32_t> run(const SimdProbe& probe, const Lanes& lanes) {
  std::vector<uint32_t> out(kProbeWords);
  out.resize(probe.run(lanes.a.data(), lanes.b.data(), lanes.c.data(), lanes.halves.data(), lanes.bits, out.data()));
  for (uint32_t& word : out) word = comparable(word);
  return out;
}

TEST(Simd, InstructionSetsAgreeBitForBit) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 2000; ++round) {
    const Lanes lanes(random);
    const std::vector<uint32_t> expected = run(kScalarProbe, lanes);
    for (const SimdProbe* probe : supported_probes()) {
      const std::vector<uint32_t> actual = run(*probe, lanes);
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t i = 0; i < actual.size(); ++i) {
        ASSERT_EQ(actual[i], expected[i])
            << probe->isa << ", primitive " << i / kLaneCount << " of run_probe, lane " << i % kLaneCount;
      }
    }
  }
}

TEST(Simd, PortablePrimitivesDoWhatTheirNamesSay) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 200; ++round) {
    const Lanes lanes(random);
    const std::vector<uint32_t> out = run(kScalarProbe, lanes);
    for (int i = 0; i < kLaneCount; ++i) {
      const float a = lanes.a[i];
      const float b = lanes.b[i];
      const bool chosen = (lanes.bits >> i & 1) != 0;
      int next = 0;
      const auto expect = [&](uint32_t bits, const char* name) {
        ASSERT_EQ(out[next * kLaneCount + i], comparable(bits)) << name << " of " << a << ", " << b;
        ++next;
      };
      expect(bits_of(a), "load");
      expect(static_cast<uint32_t>(lanes.halves[i]) << 16, "load_bfloat16");
      expect(bits_of(static_cast<float>(float16_value(lanes.halves[i]))), "load_float16");
      ++next;  // store_bfloat16: dequantize_test.cpp
      if (std::isnan(a)) {
        ++next;
      } else {
        expect(float16_bits(a), "store_float16");
      }
      expect(bits_of(lanes.a[3]), "splat");
      expect(lanes.bits, "splat_bits");
      expect(bits_of(a + b), "add");
      expect(bits_of(a - b), "sub");
      expect(bits_of(a * b), "mul");
      expect(bits_of(a / b), "div");
      expect(bits_of(std::fma(a, b, lanes.c[i])), "fused_multiply_add");
      expect(bits_of(a < b ? a : b), "min");
      expect(bits_of(a > b ? a : b), "max");
      expect(bits_of(a) & bits_of(b), "bits_and");
      expect(bits_of(a) | bits_of(b), "bits_or");
      expect(bits_of(a) ^ bits_of(b), "bits_xor");
      const float small = std::isnan(a) ? 2e9f : std::fmax(std::fmin(a, 2e9f), -2e9f);
      expect(static_cast<uint32_t>(static_cast<int32_t>(small)), "truncate_to_int");
      expect(bits_of(static_cast<float>(static_cast<int32_t>(small))), "float_from_int");
      expect(chosen, "mask_from_bits");
      expect(a > b, "greater");
      expect(a >= b, "greater_equal");
      expect((bits_of(a) & lanes.bits) != 0, "has_bits");
      expect(bits_of(chosen ? a : b), "select");
      expect(chosen ? bits_of(a) : 0, "keep");
      expect(bits_of(chosen ? 2.5f + b : 2.5f), "add_where");
      expect(bits_of(a) | (chosen ? bits_of(b) : 0), "bits_or_where");
      for (int row = 0; row < kLaneCount; ++row) {
        expect(bits_of(lanes.a[row] * static_cast<float>(i + 1)), "transpose");
      }
      EXPECT_EQ(out.size(), static_cast<size_t>(next * kLaneCount));
    }
  }
}

}  // namespace
}  // namespace loop_singular_bit
