#include "dispatch.h"

#include <gtest/gtest.h>

#include <cstdio>

namespace loop_singular_bit {
namespace {

TEST(Dispatch, ScalarIsAlwaysSupportedAndLast) {
  ASSERT_FALSE(supported_kernels().empty());
  EXPECT_STREQ(supported_kernels().back()->name, "scalar");
  for (const KernelTable* table : supported_kernels()) std::printf("instruction set: %s\n", table->name);
}

TEST(Dispatch, SelectsByNameAndRefusesOthers) {
  const KernelTable* before = active_kernels();
  ASSERT_NE(before, nullptr);
  for (const KernelTable* table : supported_kernels()) {
    EXPECT_TRUE(set_active_kernels(table->name));
    EXPECT_EQ(active_kernels(), table);
  }
  EXPECT_FALSE(set_active_kernels("avx9"));
  EXPECT_EQ(active_kernels(), supported_kernels().back());
  EXPECT_TRUE(set_active_kernels(before->name));
}

TEST(Dispatch, ErrorListsTheChoices) {
  const std::string message = kernel_selection_error("avx9");
  EXPECT_NE(message.find("'avx9' is unknown"), std::string::npos) << message;
  for (const KernelTable* table : supported_kernels()) {
    EXPECT_NE(message.find(table->name), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace loop_singular_bit
