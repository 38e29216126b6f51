// Strict reading of small JSON documents: one object per document, no duplicate keys, bounded nesting and size, typed fields whose
// errors name document and key. A key whose value is null counts as absent, as in the configurations of transformers and PEFT.
// Internal to io.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/check.h"

namespace loquetier {

using Json = nlohmann::ordered_json;  // keeps the order of keys: the first matching rank_pattern wins

constexpr int kMaxJsonDepth = 64;
constexpr size_t kMaxOrderedKeys = 8192;  // per object: an ordered object searches its keys one by one

// FormatError: not JSON, not an object, a key twice, nested too deeply.
Json parse_json_object(std::string_view text, const std::string& where);
nlohmann::json parse_large_json_object(std::string_view text, const std::string& where);  // sorted keys, any number of them

// At most 80 characters of a value, for messages.
std::string brief(const Json& value);

// The fields of one JSON object. Every getter throws FormatError "where key: expected …, got …": `where` is the message's
// beginning, as in "[config] config.json:".
class JsonFields {
 public:
  JsonFields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const Json* find(const std::string& key) const;  // null when absent or JSON null
  const Json& required(const std::string& key) const;
  int64_t integer(const std::string& key, int64_t min, int64_t max) const;
  int64_t integer(const std::string& key, int64_t min, int64_t max, int64_t fallback) const;
  double number(const std::string& key) const;  // finite
  double number(const std::string& key, double fallback) const;
  bool boolean(const std::string& key, bool fallback) const;
  std::string text(const std::string& key) const;
  std::string text(const std::string& key, const std::string& fallback) const;
  std::vector<std::string> texts(const std::string& key) const;  // a list of strings, or one string

  int64_t integer_value(const std::string& key, const Json& value, int64_t min, int64_t max) const;
  double number_value(const std::string& key, const Json& value) const;
  [[noreturn]] void fail(const std::string& key, const std::string& expected, const Json& got) const;

  const Json& object() const { return object_; }
  const std::string& where() const { return where_; }

 private:
  const Json& object_;
  std::string where_;
};

// False for null, false, 0, "", [] and {}: the values by which a configuration says that an option is off.
bool truthy(const Json& value);

}  // namespace loquetier
