// clang-format off: generic headers come after the primitives they are written in.
#include "simd/neon.h"
#include "tests/simd_probe_run.h"
// clang-format on

namespace loop_singular_bit {

const SimdProbe kNeonProbe = {"neon", run_probe};

}  // namespace loop_singular_bit
