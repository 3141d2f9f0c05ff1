#include "json.h"

#include <gtest/gtest.h>

#include "error.h"

namespace loop_singular_bit::runtime {
namespace {

std::string failure(const std::string& text) {
  try {
    Json::parse(text, "file");
  } catch (const Error& error) {
    EXPECT_EQ(error.kind, ErrorKind::kCheckpoint);
    return error.what();
  }
  return "";
}

TEST(Json, ReadsEveryKindOfValue) {
  const Json json =
      Json::parse(R"( {"a": [1, -2.5e3, true, false, null, "x"], "b": {"c": 9007199254740993}} )", "file");
  const Json::Array& a = json.at("a").array();
  EXPECT_EQ(a[0].integer(0, 9), 1);
  EXPECT_EQ(a[1].number(), -2500.0);
  EXPECT_TRUE(a[2].boolean());
  EXPECT_FALSE(a[3].boolean());
  EXPECT_EQ(a[5].string(), "x");
  // Beyond what a double holds.
  EXPECT_EQ(json.at("b").at("c").integer(0, INT64_MAX), 9007199254740993);
  EXPECT_EQ(Json::parse("{\"n\": null}", "file").find("n"), nullptr);
  EXPECT_TRUE(Json::parse("[]", "file").array().empty());
}

TEST(Json, ReadsEscapes) {
  EXPECT_EQ(Json::parse(R"("\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac\ud83d\ude00")", "file").string(),
            "\"\\/\b\f\n\r\tA\u00e9\u20ac\U0001f600");
  const std::string text = "quote \" backslash \\ line \n end";
  EXPECT_EQ(Json::parse(json_quoted(text), "file").string(), text);
}

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* text :
       {"",    "{",  "[1",      "[1,]",        "{\"a\"}",     "{\"a\":1,}", "{a:1}", "01",    "1.",  "+1",
        "tru", "\"", "\"\\x\"", "\"\\ud800\"", "\"\\udc00\"", "\"\n\"",     "1 2",   "1e999", "nan", "\"\\u12\""}) {
    EXPECT_NE(failure(text).find("file: not valid JSON"), std::string::npos) << text;
  }
  EXPECT_NE(failure("{\"a\": 1, \"b\": 2, \"a\": 3}").find("'a' is there twice"), std::string::npos);
  EXPECT_NE(failure(std::string(1000, '[')).find("at most 64 levels"), std::string::npos);
}

TEST(Json, ErrorsSayWhereAndWhat) {
  const Json json = Json::parse(R"({"a": {"b": [1, "two"]}})", "config.json");
  const auto message = [](const auto& body) {
    try {
      body();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message([&] { json.at("a").at("b").array()[1].integer(1, 5); }),
            "config.json: a.b[1]: expected an integer from 1 to 5, got \"two\"");
  EXPECT_EQ(message([&] { json.at("a").at("b").array()[0].integer(2, 5); }),
            "config.json: a.b[0]: expected an integer from 2 to 5, got 1");
  EXPECT_EQ(message([&] { json.at("a").at("c"); }), "config.json: a: 'c' is missing");
  EXPECT_EQ(message([&] { json.at("a").string(); }), "config.json: a: expected a string, got an object");
}

}  // namespace
}  // namespace loop_singular_bit::runtime
