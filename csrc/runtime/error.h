// What can go wrong in the runtime. Every message says what was expected, what came, and where.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace loop_singular_bit::runtime {

enum class ErrorKind {
  kUsage,         // an argument is out of range
  kCheckpoint,    // a checkpoint is damaged
  kUnsupported,   // a checkpoint is of a kind that this runtime does not run
  kDisk,          // a read failed, or a file changed while it was in use
  kMemoryBudget,  // the declared budget cannot be met, or was not
  kInterrupted,   // the caller asked to stop
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, int64_t needed_bytes = 0)
      : std::runtime_error(message), kind(kind), needed_bytes(needed_bytes) {}

  ErrorKind kind;
  int64_t needed_bytes;  // kMemoryBudget: a budget that would do
};

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return message.str();
}

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, join(parts...));
}

}  // namespace loop_singular_bit::runtime
