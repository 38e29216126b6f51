// A LoraConfig against a model: which modules it adapts, with which rank and scale, by PEFT's matching rules
// (tuners_utils.check_target_module_exists and get_pattern_key), and the initial values of its weights. Declared in
// io/peft_folder.h; regular expressions are in io/pattern.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

#include "core/random.h"
#include "io/pattern.h"
#include "io/peft_folder.h"

namespace loquetier {

namespace {

constexpr const char* kAllLinear = "all-linear";

bool has_suffix(std::string_view name, std::string_view suffix) {
  return name == suffix || (name.size() > suffix.size() && name.ends_with(suffix) && name[name.size() - suffix.size() - 1] == '.');
}

// target_modules or exclude_modules: a list of names and suffixes, or one regular expression.
class Selector {
 public:
  Selector(const std::vector<std::string>& names, bool is_regex, const std::string& field) : names_(names) {
    if (!is_regex) return;
    require(names.size() == 1, "[lora] ", field, ": expected one regular expression, got ", names.size());
    pattern_.emplace(names.front(), "lora] " + field + ": [regex");
  }
  bool exact(std::string_view name) const { return !pattern_ && std::find(names_.begin(), names_.end(), name) != names_.end(); }
  bool matches(std::string_view name) const {
    if (pattern_) return pattern_->full_match(name);
    return std::any_of(names_.begin(), names_.end(), [&](const std::string& suffix) { return has_suffix(name, suffix); });
  }

 private:
  const std::vector<std::string>& names_;
  std::optional<Pattern> pattern_;
};

// rank_pattern or alpha_pattern. A key matches the end of a name: re.match("(.*\.)?(key)$"). Most keys are plain names, where that
// is a comparison.
class KeyPattern {
 public:
  KeyPattern(const std::string& key, const std::string& field) : key_(key) {
    const bool plain = std::all_of(key.begin(), key.end(), [](unsigned char c) {
      return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '.';
    });
    if (!plain) pattern_.emplace("(.*\\.)?(" + key + ")$", "lora] " + field + ": [regex");
  }
  bool matches(std::string_view name) const {
    if (pattern_) return pattern_->prefix_match(name);
    if (key_.size() > name.size()) return false;
    const size_t begin = name.size() - key_.size();
    if (begin > 0 && name[begin - 1] != '.') return false;
    return std::equal(key_.begin(), key_.end(), name.begin() + static_cast<int64_t>(begin),
                      [](char k, char n) { return k == n || k == '.'; });
  }

 private:
  std::string key_;
  std::optional<Pattern> pattern_;
};

template <class Value>
class KeyTable {
 public:
  KeyTable(const std::vector<std::pair<std::string, Value>>& entries, const std::string& field) {
    for (const auto& [key, value] : entries) entries_.emplace_back(KeyPattern(key, field), value);
  }
  Value find(std::string_view name, Value fallback) const {
    for (const auto& [pattern, value] : entries_)
      if (pattern.matches(name)) return value;
    return fallback;
  }

 private:
  std::vector<std::pair<KeyPattern, Value>> entries_;
};

void check_fields(const LoraConfig& config, const ModelConfig& model, int max_rank) {
  require(config.r >= 1 && config.r <= max_rank, "[lora] r: expected 1 to ", max_rank, ", got ", config.r);
  require(std::isfinite(config.lora_alpha), "[lora] lora_alpha: expected a finite number, got ", config.lora_alpha);
  require(config.lora_dropout >= 0 && config.lora_dropout < 1, "[lora] lora_dropout: expected 0 <= p < 1, got ",
          config.lora_dropout);
  const std::string& init = config.init_lora_weights;
  require(init == "true" || init == "false" || init == "gaussian",
          "[lora] init_lora_weights: expected true, false or gaussian, got '", init, "'");
  for (const auto& [key, rank] : config.rank_pattern)
    require(rank >= 1 && rank <= max_rank, "[lora] rank_pattern: '", key, "': expected 1 to ", max_rank, ", got ", rank);
  for (const auto& [key, alpha] : config.alpha_pattern)
    require(std::isfinite(alpha), "[lora] alpha_pattern: '", key, "': expected a finite number, got ", alpha);
  if (config.layers_to_transform) {
    const bool list =
        !config.target_modules_is_regex && (config.target_modules.empty() || config.target_modules.front() != kAllLinear);
    require(list,
            "[lora] layers_to_transform: expected target_modules to be a list of names with it, got a regular expression or "
            "all-linear");
    for (int layer : *config.layers_to_transform)
      require(layer >= 0 && layer < model.num_layers, "[lora] layers_to_transform: expected layers 0 to ", model.num_layers - 1,
              ", got ", layer);
  }
}

// Modules of the model that are no linears: PEFT refuses a configuration that matches one of them, as they cannot be adapted (here:
// the embedding too).
std::vector<ModuleInfo> other_modules(const ModelConfig& model) {
  std::vector<ModuleInfo> modules;
  const auto add = [&](std::string name, int64_t layer) { modules.push_back({std::move(name), 0, 0, layer, 0, 0}); };
  for (const char* name : {"model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"}) add(name, -1);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer);
    add(prefix, -1);  // without a dot behind it the number is no layer index to layers_to_transform
    for (const char* name : {".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm"})
      add(prefix + name, layer);
    if (model.qk_norm)
      for (const char* name : {".self_attn.q_norm", ".self_attn.k_norm"}) add(prefix + name, layer);
  }
  return modules;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) {
    if (text.size() > 200) return text + ", …";
    text += (text.empty() ? "'" : ", '") + name.substr(0, 100) + "'";
  }
  return text;
}

}  // namespace

std::vector<LoraTarget> resolve_lora_config(const LoraConfig& config, const ModelConfig& model, int max_rank) {
  check_fields(config, model, max_rank);
  const std::vector<std::string> wanted =
      config.target_modules.empty() ? std::vector<std::string>{"q_proj", "v_proj"} : config.target_modules;
  const bool all_linear = !config.target_modules_is_regex && wanted.size() == 1 && wanted.front() == kAllLinear;
  const Selector target(wanted, config.target_modules_is_regex, "target_modules");
  const Selector exclude(config.exclude_modules, config.exclude_modules_is_regex, "exclude_modules");
  const KeyTable<int> ranks(config.rank_pattern, "rank_pattern");
  const KeyTable<double> alphas(config.alpha_pattern, "alpha_pattern");
  const bool some_layers = config.layers_to_transform && !config.layers_to_transform->empty();

  const auto selected = [&](const ModuleInfo& module) {
    if (exclude.matches(module.name)) return false;
    if (all_linear) return module.layer >= 0;
    if (target.exact(module.name)) return true;  // a full name is not filtered by layers_to_transform
    if (!target.matches(module.name)) return false;
    if (!some_layers) return true;
    const std::vector<int>& layers = *config.layers_to_transform;
    return module.layer >= 0 && std::find(layers.begin(), layers.end(), module.layer) != layers.end();
  };
  if (!all_linear) {
    for (const ModuleInfo& module : other_modules(model))
      require(!selected(module), "[lora] target_modules: expected linear layers only, but ", joined(wanted), " also matches ",
              module.name, ", which cannot be adapted");
  }

  std::vector<LoraTarget> targets;
  for (ModuleInfo& module : modules_of(model)) {
    if (!selected(module)) continue;
    LoraTarget found;
    found.rank = ranks.find(module.name, config.r);
    found.alpha = alphas.find(module.name, config.lora_alpha);
    const double divisor = config.use_rslora ? std::sqrt(static_cast<double>(found.rank)) : static_cast<double>(found.rank);
    require(std::fabs(found.alpha / divisor) <= std::numeric_limits<float>::max(),
            "[lora] lora_alpha: expected a scale in the range of f32, got ", found.alpha, " for ", module.name);
    found.scale = static_cast<float>(found.alpha / divisor);
    found.module = std::move(module);
    targets.push_back(std::move(found));
  }
  require(!targets.empty(), "[lora] target_modules: no module of the model matches ", joined(wanted),
          config.exclude_modules.empty() && !some_layers ? "" : " (with exclude_modules and layers_to_transform)",
          "; modules are named like model.layers.0.self_attn.q_proj");
  return targets;
}

namespace {

// Values of one tensor from Philox(key, counter), four a call. Doubles inside, so that the last bit of the platform's log and cos
// does not matter.
class Draws {
 public:
  explicit Draws(uint64_t key) : key_(key) {}

  void uniform(std::vector<float>& out, double bound) {
    fill(out, [bound](const double (&u)[4], double (&x)[4]) {
      for (int i = 0; i < 4; ++i) x[i] = (2 * u[i] - 1) * bound;
    });
  }

  void normal(std::vector<float>& out, double deviation) {  // Box-Muller
    fill(out, [deviation](const double (&u)[4], double (&x)[4]) {
      for (int i = 0; i < 4; i += 2) {
        const double radius = deviation * std::sqrt(-2 * std::log(u[i])), angle = 2 * std::numbers::pi * u[i + 1];
        x[i] = radius * std::cos(angle);
        x[i + 1] = radius * std::sin(angle);
      }
    });
  }

 private:
  template <class Transform>
  void fill(std::vector<float>& out, Transform transform) {
    for (size_t begin = 0; begin < out.size(); begin += 4) {
      const Philox4 bits = philox(key_, begin / 4, 0);
      double u[4], x[4];
      for (int i = 0; i < 4; ++i) u[i] = (bits.v[i] + 0.5) * 0x1p-32;  // in (0, 1)
      transform(u, x);
      for (size_t i = begin; i < std::min(begin + 4, out.size()); ++i) out[i] = static_cast<float>(x[i - begin]);
    }
  }

  uint64_t key_;
};

}  // namespace

// The key of a tensor is made of the seed and its place in the model, so the values of a module do not depend on which others are
// adapted.
LoraWeights initial_lora_weights(const LoraConfig& config, const std::vector<LoraTarget>& targets) {
  LoraWeights weights;
  for (const LoraTarget& target : targets) {
    const uint64_t place = static_cast<uint64_t>(target.module.site) * kMaxParts + static_cast<uint64_t>(target.module.part);
    std::vector<float> a(static_cast<size_t>(target.rank) * static_cast<size_t>(target.module.in));
    std::vector<float> b(static_cast<size_t>(target.module.out) * static_cast<size_t>(target.rank));
    Draws draws_a(mix_key(mix_key(config.seed, 2 * place), 0x6c6f7261)),
        draws_b(mix_key(mix_key(config.seed, 2 * place + 1), 0x6c6f7261));
    // Kaiming-uniform with a = sqrt 5 is uniform in +-1 / sqrt(fan in), which also is what torch gives a fresh linear ("false":
    // both stay so).
    if (config.init_lora_weights == "gaussian") draws_a.normal(a, 1.0 / target.rank);
    else draws_a.uniform(a, 1.0 / std::sqrt(static_cast<double>(target.module.in)));
    if (config.init_lora_weights == "false") draws_b.uniform(b, 1.0 / std::sqrt(static_cast<double>(target.rank)));
    weights.a.push_back(std::move(a));
    weights.b.push_back(std::move(b));
  }
  return weights;
}

}  // namespace loquetier
