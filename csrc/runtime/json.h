// JSON as configurations and safetensors headers need it. Own parser: the build of a bare machine stays free of
// downloads, and headers from elsewhere meet limits (depth, duplicate keys, exact integers) that general libraries do
// not set.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace loop_singular_bit::runtime {

// One value and where it came from, so that errors can say it.
class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // sorted by key

  // Throws Error(kCheckpoint): no valid JSON, nested deeper than 64, or an object with the same key twice.
  static Json parse(std::string_view text, const std::string& where);

  // The member, or nullptr where it is absent or null. Throws unless this is an object.
  const Json* find(std::string_view key) const;
  const Json& at(std::string_view key) const;

  // Each throws Error(kCheckpoint) naming the place, what was expected and what came.
  int64_t integer(int64_t low, int64_t high) const;
  double number() const;
  bool boolean() const;
  const std::string& string() const;
  const Array& array() const;
  const Object& object() const;

  bool is_array() const { return std::holds_alternative<Array>(value_); }
  const std::string& where() const { return where_; }

 private:
  friend class JsonParser;
  [[noreturn]] void wrong(const char* expected) const;

  std::variant<std::monostate, bool, int64_t, double, std::string, Array, Object> value_;
  std::string where_;
};

// `text` between quotes, with whatever JSON wants escaped.
std::string json_quoted(std::string_view text);

}  // namespace loop_singular_bit::runtime
