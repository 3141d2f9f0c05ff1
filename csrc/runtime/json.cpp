#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "error.h"

namespace loop_singular_bit::runtime {

class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json value = parse_value(where_, 0);
    skip_space();
    if (position_ != text_.size()) damaged("the end");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 64;

  [[noreturn]] void damaged(const char* expected) const {
    fail(ErrorKind::kCheckpoint, where_, ": not valid JSON: expected ", expected, " at byte ", position_);
  }

  void skip_space() {
    while (position_ < text_.size() && std::string_view(" \t\r\n").find(text_[position_]) != std::string_view::npos) {
      ++position_;
    }
  }

  bool take(std::string_view token) {
    if (text_.substr(position_, token.size()) != token) return false;
    position_ += token.size();
    return true;
  }

  Json parse_value(std::string where, int depth) {
    if (depth > kMaxDepth) damaged("at most 64 levels");
    skip_space();
    Json json;
    if (take("{")) {
      json.value_ = parse_object(where, depth);
    } else if (take("[")) {
      json.value_ = parse_array(where, depth);
    } else if (position_ < text_.size() && text_[position_] == '"') {
      json.value_ = parse_string();
    } else if (take("true")) {
      json.value_ = true;
    } else if (take("false")) {
      json.value_ = false;
    } else if (!take("null")) {
      parse_number(json);
    }
    json.where_ = std::move(where);
    return json;
  }

  Json::Object parse_object(const std::string& where, int depth) {
    Json::Object members;
    skip_space();
    if (take("}")) return members;
    do {
      skip_space();
      if (position_ >= text_.size() || text_[position_] != '"') damaged("a key");
      std::string key = parse_string();
      skip_space();
      if (!take(":")) damaged("':'");
      Json value = parse_value(where + (depth == 0 ? ": " : ".") + key, depth + 1);
      members.emplace_back(std::move(key), std::move(value));
      skip_space();
    } while (take(","));
    if (!take("}")) damaged("',' or '}'");
    std::sort(members.begin(), members.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 1; i < members.size(); ++i) {
      if (members[i].first == members[i - 1].first) {
        fail(ErrorKind::kCheckpoint, where, ": the key '", members[i].first, "' is there twice");
      }
    }
    return members;
  }

  Json::Array parse_array(const std::string& where, int depth) {
    Json::Array elements;
    skip_space();
    if (take("]")) return elements;
    do {
      elements.push_back(parse_value(where + "[" + std::to_string(elements.size()) + "]", depth + 1));
      skip_space();
    } while (take(","));
    if (!take("]")) damaged("',' or ']'");
    return elements;
  }

  uint32_t parse_hex() {
    uint32_t unit = 0;
    if (position_ + 4 > text_.size()) damaged("four hexadecimal digits");
    const char* begin = text_.data() + position_;
    const auto [end, error] = std::from_chars(begin, begin + 4, unit, 16);
    if (error != std::errc() || end != begin + 4) damaged("four hexadecimal digits");
    position_ += 4;
    return unit;
  }

  static void append_utf8(uint32_t code, std::string& target) {
    if (code < 0x80) {
      target += static_cast<char>(code);
      return;
    }
    const int followers = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr uint32_t kLead[] = {0, 0xc0, 0xe0, 0xf0};
    target += static_cast<char>(kLead[followers] | code >> (6 * followers));
    for (int i = followers - 1; i >= 0; --i) target += static_cast<char>(0x80 | (code >> (6 * i) & 0x3f));
  }

  void parse_escape(std::string& target) {
    if (position_ >= text_.size()) damaged("an escaped character");
    const char escaped = text_[position_++];
    if (escaped == 'u') {
      uint32_t code = parse_hex();
      if (code >= 0xd800 && code < 0xdc00) {
        if (!take("\\u")) damaged("the second half of a surrogate pair");
        const uint32_t low = parse_hex();
        if (low < 0xdc00 || low > 0xdfff) damaged("the second half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xdc00 && code <= 0xdfff) {
        damaged("the first half of a surrogate pair");
      }
      append_utf8(code, target);
      return;
    }
    static constexpr std::string_view kEscaped = "\"\\/bfnrt";
    static constexpr std::string_view kMeaning = "\"\\/\b\f\n\r\t";
    const size_t index = kEscaped.find(escaped);
    if (index == std::string_view::npos) damaged("a known escape");
    target += kMeaning[index];
  }

  std::string parse_string() {
    std::string result;
    for (++position_; position_ < text_.size();) {
      const char character = text_[position_++];
      if (character == '"') return result;
      if (static_cast<unsigned char>(character) < 0x20) damaged("no control character in a string");
      if (character == '\\') {
        parse_escape(result);
      } else {
        result += character;
      }
    }
    damaged("the end of a string");
  }

  bool at_digit() const { return position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9'; }

  void skip_digits() {
    if (!at_digit()) damaged("a value");
    while (at_digit()) ++position_;
  }

  void parse_number(Json& json) {
    const size_t start = position_;
    bool is_integer = true;
    take("-");
    if (!take("0")) skip_digits();
    if (take(".")) {
      is_integer = false;
      skip_digits();
    }
    if (take("e") || take("E")) {
      is_integer = false;
      if (!take("+")) take("-");
      skip_digits();
    }
    const char* begin = text_.data() + start;
    const char* end = text_.data() + position_;
    int64_t integer = 0;
    if (is_integer && std::from_chars(begin, end, integer).ec == std::errc()) {
      json.value_ = integer;
      return;
    }
    double number = 0.0;
    if (std::from_chars(begin, end, number).ec != std::errc()) damaged("a number within range");
    json.value_ = number;
  }

  std::string_view text_;
  const std::string& where_;
  size_t position_ = 0;
};

Json Json::parse(std::string_view text, const std::string& where) { return JsonParser(text, where).document(); }

void Json::wrong(const char* expected) const {
  static constexpr const char* kKinds[] = {"null",     "a boolean", "an integer", "a number",
                                           "a string", "a list",    "an object"};
  const auto* integer = std::get_if<int64_t>(&value_);
  const auto* text = std::get_if<std::string>(&value_);
  fail(ErrorKind::kCheckpoint, where_, ": expected ", expected, ", got ",
       integer != nullptr ? std::to_string(*integer)
       : text != nullptr  ? json_quoted(*text)
                          : std::string(kKinds[value_.index()]));
}

const Json* Json::find(std::string_view key) const {
  const Object& members = object();
  const auto found =
      std::lower_bound(members.begin(), members.end(), key,
                       [](const auto& member, std::string_view wanted) { return member.first < wanted; });
  if (found == members.end() || found->first != key) return nullptr;
  return std::holds_alternative<std::monostate>(found->second.value_) ? nullptr : &found->second;
}

const Json& Json::at(std::string_view key) const {
  const Json* member = find(key);
  if (member == nullptr) fail(ErrorKind::kCheckpoint, where_, ": '", key, "' is missing");
  return *member;
}

int64_t Json::integer(int64_t low, int64_t high) const {
  const auto* value = std::get_if<int64_t>(&value_);
  if (value == nullptr || *value < low || *value > high) {
    wrong(join("an integer from ", low, " to ", high).c_str());
  }
  return *value;
}

double Json::number() const {
  if (const auto* integer = std::get_if<int64_t>(&value_)) return static_cast<double>(*integer);
  const auto* value = std::get_if<double>(&value_);
  if (value == nullptr) wrong("a number");
  return *value;
}

bool Json::boolean() const {
  const auto* value = std::get_if<bool>(&value_);
  if (value == nullptr) wrong("true or false");
  return *value;
}

const std::string& Json::string() const {
  const auto* value = std::get_if<std::string>(&value_);
  if (value == nullptr) wrong("a string");
  return *value;
}

const Json::Array& Json::array() const {
  const auto* value = std::get_if<Array>(&value_);
  if (value == nullptr) wrong("a list");
  return *value;
}

const Json::Object& Json::object() const {
  const auto* value = std::get_if<Object>(&value_);
  if (value == nullptr) wrong("an object");
  return *value;
}

std::string json_quoted(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string quoted = "\"";
  for (const char character : text) {
    const auto byte = static_cast<unsigned char>(character);
    if (character == '"' || character == '\\') {
      quoted += '\\';
      quoted += character;
    } else if (byte < 0x20) {
      quoted += "\\u00";
      quoted += kHex[byte >> 4];
      quoted += kHex[byte & 15];
    } else {
      quoted += character;
    }
  }
  return quoted + "\"";
}

}  // namespace loop_singular_bit::runtime
