// adapter_config.json of PEFT -> LoraConfig and back. Every key is one of: honoured; without effect on the maths (ignored); refused
// by name when it is set; unknown, which is refused by name too unless its value says "off" (null, false, 0, empty). See
// peft_folder.h.
#include <algorithm>
#include <array>
#include <cmath>

#include "io/json_reader.h"
#include "io/pattern.h"
#include "io/peft_folder.h"

namespace loquetier {

namespace {

constexpr size_t kMaxConfigBytes = 4u << 20;

constexpr std::array kHonoured = {"peft_type",
                                  "r",
                                  "lora_alpha",
                                  "lora_dropout",
                                  "use_rslora",
                                  "target_modules",
                                  "exclude_modules",
                                  "layers_to_transform",
                                  "layers_pattern",
                                  "rank_pattern",
                                  "alpha_pattern",
                                  "init_lora_weights",
                                  "bias"};
// Where the adapter came from, and settings that act only through a key that is refused.
constexpr std::array kWithoutEffect = {"task_type",     "auto_mapping",   "peft_version",  "base_model_name_or_path",
                                       "revision",      "inference_mode", "megatron_core", "qalora_group_size",
                                       "runtime_config"};

[[noreturn]] void refuse(const JsonFields& fields, const std::string& key, const std::string& why) {
  throw InvalidArgument(concat(fields.where(), " ", key.substr(0, 80), ": ", why));
}

bool contains(const auto& keys, const std::string& key) { return std::find(keys.begin(), keys.end(), key) != keys.end(); }

void refuse_unsupported(const JsonFields& fields) {
  for (const auto& [key, value] : fields.object().items()) {
    if (contains(kHonoured, key) || contains(kWithoutEffect, key) || !truthy(value)) continue;
    refuse(fields, key, "not supported, got " + brief(value));
  }
  const std::string type = fields.text("peft_type");
  if (type != "LORA") refuse(fields, "peft_type", "expected LORA, got '" + type.substr(0, 80) + "'");
  const std::string bias = fields.text("bias", "none");
  if (bias != "none") refuse(fields, "bias", "not supported: expected none, got '" + bias.substr(0, 80) + "'");
}

std::string read_init(const JsonFields& fields) {
  const Json* value = fields.find("init_lora_weights");
  if (!value) return "true";
  if (value->is_boolean()) return value->get<bool>() ? "true" : "false";
  if (!value->is_string()) fields.fail("init_lora_weights", "true, false or \"gaussian\"", *value);
  std::string name = value->get<std::string>();
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  if (name != "gaussian") {
    refuse(fields, "init_lora_weights",
           "expected true, false or \"gaussian\", got " + brief(*value) +
               ": such an adapter may belong to base weights that its initialisation changed; save it with PEFT's "
               "path_initial_model_for_weight_conversion, or set the key to true if the base weights are the original ones");
  }
  return name;
}

// A string is a regular expression, a list is names; nothing for null.
bool read_modules(const JsonFields& fields, const std::string& key, std::vector<std::string>& names) {
  const Json* value = fields.find(key);
  if (!value) return false;
  names = fields.texts(key);
  return value->is_string();
}

std::optional<std::vector<int>> read_layers(const JsonFields& fields) {
  const char* key = "layers_to_transform";
  const Json* value = fields.find(key);
  if (!value) return std::nullopt;
  std::vector<int> layers;
  if (value->is_array()) {
    for (const Json& item : *value) layers.push_back(static_cast<int>(fields.integer_value(key, item, 0, INT32_MAX)));
  } else {
    layers.push_back(static_cast<int>(fields.integer_value(key, *value, 0, INT32_MAX)));
  }
  return layers;
}

// PEFT looks for "{pattern}.{index}." in a module's name. In these models the only such index stands behind "model.layers", so a
// pattern either finds it, which is what happens without one, or nothing.
void check_layers_pattern(const JsonFields& fields, const LoraConfig& config) {
  const char* key = "layers_pattern";
  const Json* value = fields.find(key);
  if (!value || !truthy(*value)) return;
  if (!config.layers_to_transform) refuse(fields, key, "expected layers_to_transform with it, got none");
  if (config.layers_to_transform->empty()) return;  // every layer: the pattern is not looked at
  const std::vector<std::string> patterns = fields.texts(key);
  const bool found = std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    if (pattern.find('|') != std::string::npos) refuse(fields, key, "alternatives are not supported, got " + brief(*value));
    return Pattern("(?:^|.*?\\.)" + pattern + "\\.\\d+\\.", "lora] layers_pattern: [regex").prefix_match("model.layers.0.mlp");
  });
  if (!found) refuse(fields, key, "expected \"layers\", got " + brief(*value) + ", which matches no layer of the model");
}

template <class Value, class Read>
std::vector<std::pair<std::string, Value>> read_pattern(const JsonFields& fields, const std::string& key, Read read) {
  std::vector<std::pair<std::string, Value>> entries;
  const Json* value = fields.find(key);
  if (!value) return entries;
  if (!value->is_object()) fields.fail(key, "an object", *value);
  for (const auto& [name, item] : value->items())
    entries.emplace_back(name, read(concat(key, ": '", name.substr(0, 100), "'"), item));
  return entries;
}

// An integer where the value is one, as PEFT's annotation has it.
Json number_json(double value) {
  if (value == std::floor(value) && std::fabs(value) < 0x1p53) return static_cast<int64_t>(value);
  return value;
}

}  // namespace

LoraConfig parse_peft_config(const std::string& json, const std::string& where) {
  require<FormatError>(json.size() <= kMaxConfigBytes, "[lora] ", where, ": expected at most ", kMaxConfigBytes, " bytes, got ",
                       json.size());
  const Json document = parse_json_object(json, where);
  const JsonFields fields(document, "[lora] " + where + ":");
  refuse_unsupported(fields);
  LoraConfig config;
  config.r = static_cast<int>(fields.integer("r", 1, INT32_MAX, config.r));
  config.lora_alpha = fields.number("lora_alpha", config.lora_alpha);
  config.lora_dropout = fields.number("lora_dropout", 0);
  config.use_rslora = fields.boolean("use_rslora", false);
  config.init_lora_weights = read_init(fields);
  config.target_modules_is_regex = read_modules(fields, "target_modules", config.target_modules);
  if (fields.find("target_modules") && config.target_modules.empty())
    fields.fail("target_modules", "module names, a regular expression or null", *fields.find("target_modules"));
  if (config.target_modules_is_regex) {
    std::string name = config.target_modules.front();
    for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    if (name == "all-linear") {
      config.target_modules = {name};
      config.target_modules_is_regex = false;
    }
  }
  config.exclude_modules_is_regex = read_modules(fields, "exclude_modules", config.exclude_modules);
  if (config.exclude_modules_is_regex && config.exclude_modules.front().empty()) {  // falsy: off
    config.exclude_modules.clear();
    config.exclude_modules_is_regex = false;
  }
  config.layers_to_transform = read_layers(fields);
  check_layers_pattern(fields, config);
  config.rank_pattern = read_pattern<int>(fields, "rank_pattern", [&](const std::string& key, const Json& item) {
    return static_cast<int>(fields.integer_value(key, item, 1, INT32_MAX));
  });
  config.alpha_pattern = read_pattern<double>(
      fields, "alpha_pattern", [&](const std::string& key, const Json& item) { return fields.number_value(key, item); });
  return config;
}

// The keys that every PEFT version knows, and the newer ones only when they say something: an older PEFT fails on keys it does not
// know.
std::string peft_config_json(const LoraConfig& config, const std::vector<LoraTarget>& targets, const std::string& base_model_name) {
  require(!targets.empty(), "[lora] targets: expected at least one, got none");
  const auto modules = [](const std::vector<std::string>& names, bool is_regex) {
    return is_regex || (names.size() == 1 && names.front() == "all-linear") ? Json(names.front()) : Json(names);
  };
  Json document;
  document["peft_type"] = "LORA";
  document["task_type"] = "CAUSAL_LM";
  document["base_model_name_or_path"] = base_model_name.empty() ? Json() : Json(base_model_name);
  document["inference_mode"] = true;
  document["r"] = config.r;
  document["lora_alpha"] = number_json(config.lora_alpha);
  document["lora_dropout"] = config.lora_dropout;
  document["target_modules"] =
      config.target_modules.empty() ? Json({"q_proj", "v_proj"}) : modules(config.target_modules, config.target_modules_is_regex);
  if (!config.exclude_modules.empty())
    document["exclude_modules"] = modules(config.exclude_modules, config.exclude_modules_is_regex);
  document["layers_to_transform"] = config.layers_to_transform ? Json(*config.layers_to_transform) : Json();
  document["layers_pattern"] = Json();
  document["bias"] = "none";
  document["fan_in_fan_out"] = false;
  document["modules_to_save"] = Json();
  document["init_lora_weights"] =
      config.init_lora_weights == "gaussian" ? Json("gaussian") : Json(config.init_lora_weights != "false");
  if (config.use_rslora) document["use_rslora"] = true;
  document["rank_pattern"] = Json::object();
  for (const auto& [key, rank] : config.rank_pattern)
    document["rank_pattern"].emplace(key, rank);  // the first of equal keys is the one that counts
  document["alpha_pattern"] = Json::object();
  for (const auto& [key, alpha] : config.alpha_pattern) document["alpha_pattern"].emplace(key, number_json(alpha));
  try {
    return document.dump(2) + "\n";
  } catch (const Json::exception&) {
    throw InvalidArgument("[lora] adapter_config.json: expected names in UTF-8");
  }
}

}  // namespace loquetier
