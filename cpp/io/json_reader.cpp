// Strict JSON on top of nlohmann/json. Duplicate keys and depth are checked while parsing, before a document exists. See
// json_reader.h.
#include "io/json_reader.h"

#include <cmath>
#include <set>

namespace loquetier {

namespace {

template <class Document>
Document parse_object(std::string_view text, const std::string& where, size_t max_keys) {
  std::vector<std::set<std::string, std::less<>>> open;  // the keys seen in every open object
  const auto check = [&](int depth, nlohmann::detail::parse_event_t event, Document& parsed) {
    using Event = nlohmann::detail::parse_event_t;
    if (depth > kMaxJsonDepth) throw FormatError(concat("[json] ", where, ": nested deeper than ", kMaxJsonDepth, " levels"));
    if (event == Event::object_start) {
      open.emplace_back();
    } else if (event == Event::object_end) {
      open.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.template get_ref<const std::string&>();
      if (!open.back().insert(key).second) throw FormatError(concat("[json] ", where, ": key '", key, "' appears twice"));
      if (open.back().size() > max_keys)
        throw FormatError(concat("[json] ", where, ": more than ", max_keys, " keys in one object"));
    }
    return true;
  };
  // The parser takes a zero byte for the end of its input: what follows one would be ignored silently.
  require<FormatError>(text.find('\0') == std::string_view::npos, "[json] ", where, ": expected JSON text, got a zero byte");
  Document document;
  try {
    document = Document::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    const std::string_view message = error.what();
    const size_t begin = message.find("] ");  // the library's own tag
    throw FormatError(
        concat("[json] ", where, ": not valid JSON: ", begin == std::string_view::npos ? message : message.substr(begin + 2)));
  }
  require<FormatError>(document.is_object(), "[json] ", where, ": expected an object, got ", document.type_name());
  return document;
}

}  // namespace

Json parse_json_object(std::string_view text, const std::string& where) { return parse_object<Json>(text, where, kMaxOrderedKeys); }

nlohmann::json parse_large_json_object(std::string_view text, const std::string& where) {
  return parse_object<nlohmann::json>(text, where, SIZE_MAX);
}

std::string brief(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

bool truthy(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return false;
    case Json::value_t::boolean:
      return value.get<bool>();
    case Json::value_t::string:
      return !value.get_ref<const std::string&>().empty();
    case Json::value_t::array:
    case Json::value_t::object:
      return !value.empty();
    default:
      return value.get<double>() != 0;
  }
}

void JsonFields::fail(const std::string& key, const std::string& expected, const Json& got) const {
  throw FormatError(concat(where_, " ", key, ": expected ", expected, ", got ", brief(got)));
}

const Json* JsonFields::find(const std::string& key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

const Json& JsonFields::required(const std::string& key) const {
  const Json* value = find(key);
  require<FormatError>(value != nullptr, where_, " ", key, ": expected a value, got nothing (the key is missing or null)");
  return *value;
}

int64_t JsonFields::integer_value(const std::string& key, const Json& value, int64_t min, int64_t max) const {
  const auto expected = [&] { return concat("an integer from ", min, " to ", max); };
  if (!value.is_number_integer()) fail(key, expected(), value);
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) fail(key, expected(), value);
  const int64_t number = value.get<int64_t>();
  if (number < min || number > max) fail(key, expected(), value);
  return number;
}

double JsonFields::number_value(const std::string& key, const Json& value) const {
  if (!value.is_number() || !std::isfinite(value.get<double>())) fail(key, "a finite number", value);
  return value.get<double>();
}

int64_t JsonFields::integer(const std::string& key, int64_t min, int64_t max) const {
  return integer_value(key, required(key), min, max);
}

int64_t JsonFields::integer(const std::string& key, int64_t min, int64_t max, int64_t fallback) const {
  const Json* value = find(key);
  return value ? integer_value(key, *value, min, max) : fallback;
}

double JsonFields::number(const std::string& key) const { return number_value(key, required(key)); }

double JsonFields::number(const std::string& key, double fallback) const {
  const Json* value = find(key);
  return value ? number_value(key, *value) : fallback;
}

bool JsonFields::boolean(const std::string& key, bool fallback) const {
  const Json* value = find(key);
  if (!value) return fallback;
  if (!value->is_boolean()) fail(key, "true or false", *value);
  return value->get<bool>();
}

std::string JsonFields::text(const std::string& key) const {
  const Json& value = required(key);
  if (!value.is_string()) fail(key, "a string", value);
  return value.get<std::string>();
}

std::string JsonFields::text(const std::string& key, const std::string& fallback) const { return find(key) ? text(key) : fallback; }

std::vector<std::string> JsonFields::texts(const std::string& key) const {
  const Json& value = required(key);
  if (value.is_string()) return {value.get<std::string>()};
  if (!value.is_array()) fail(key, "a list of strings", value);
  std::vector<std::string> list;
  for (const Json& item : value) {
    if (!item.is_string()) fail(key, "a list of strings", value);
    list.push_back(item.get<std::string>());
  }
  return list;
}

}  // namespace loquetier
