// The native runtime without Python: continues a sequence of token ids within a memory budget.
//
//   cmake -S . -B build/release && cmake --build build/release --target generate_tokens
//   build/release/generate_tokens MODEL_DIRECTORY BUDGET_MB COUNT TOKEN...
#include <cstdio>
#include <cstdlib>
#include <string>

#include "error.h"
#include "model.h"

int main(int count, char** words) {
  using namespace loop_singular_bit::runtime;
  if (count < 5) {
    std::fprintf(stderr, "usage: %s MODEL_DIRECTORY BUDGET_MB COUNT TOKEN...\n", words[0]);
    return 2;
  }
  try {
    ModelOptions options;
    options.directory = words[1];
    options.budget_bytes = std::atoll(words[2]) * 1'000'000;
    Model model(options);
    std::vector<int32_t> prompt;
    for (int i = 4; i < count; ++i) prompt.push_back(static_cast<int32_t>(std::atol(words[i])));
    model.start(prompt, SamplingOptions(), /*reuse_cache=*/false);
    for (int64_t i = 0; i < std::atoll(words[3]); ++i) {
      std::printf("%d\n", model.next());
      std::fflush(stdout);
    }
    std::fprintf(stderr, "back end %s, peak resident memory %.1f MB\n", back_end_name(model.plan().back_end),
                 static_cast<double>(model.statistics().peak_resident_bytes) / 1e6);
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
