// config.json of transformers, both its older and newer spellings, for the families of this library. A field is honoured, known to
// leave the maths alone (and ignored), or refused by its key. Defaults are those of the transformers configuration classes; sizes
// have none here, since a config that leaves them out is broken. See hf_config.h; the rope settings follow modeling_rope_utils.
#include "io/hf_config.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "io/json_reader.h"
#include "io/safetensors.h"

namespace loquetier {

namespace {

constexpr size_t kMaxConfigBytes = 4u << 20;
constexpr int64_t kMaxInt32 = INT32_MAX;
constexpr int64_t kMaxWidth = int64_t{1} << 22;     // hidden, intermediate, heads x head size
constexpr int64_t kMaxElements = int64_t{1} << 40;  // of one matrix

struct Family {
  std::string_view name;
  std::string_view architecture;
};
constexpr Family kFamilies[] = {
    {"llama", "LlamaForCausalLM"}, {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};

[[noreturn]] void refuse(const std::string& where, const std::string& key, const std::string& why) {
  throw InvalidArgument(concat("[config] ", where, ": ", key, ": ", why));
}

const Family& family_of(const JsonFields& fields, const std::string& where) {
  const std::string type = fields.text("model_type");
  const auto* found = std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const Family& f) { return f.name == type; });
  if (found == std::end(kFamilies))
    refuse(where, "model_type", "expected llama, mistral, qwen2 or qwen3, got '" + type.substr(0, 80) + "'");
  if (fields.find("architectures")) {
    const std::vector<std::string> names = fields.texts("architectures");
    if (!names.empty() && std::find(names.begin(), names.end(), found->architecture) == names.end())
      refuse(where, "architectures", concat("expected ", found->architecture, ", got '", names.front().substr(0, 80), "'"));
  }
  return *found;
}

// Keys that ask for other maths when they are set to anything but the neutral values named here (null always is neutral).
void refuse_other_maths(const JsonFields& fields, const std::string& where) {
  // Off means off: false, 0, empty.
  constexpr std::array kOff = {"quantization_config", "num_experts",         "num_local_experts",      "n_routed_experts",
                               "num_experts_per_tok", "per_layer_config",    "attention_dropout",      "use_sliding_window",
                               "is_encoder_decoder",  "add_cross_attention", "attn_logit_softcapping", "final_logit_softcapping",
                               "no_rope_layers"};
  for (const char* key : kOff) {
    const Json* value = fields.find(key);
    if (value && truthy(*value)) refuse(where, key, "not supported, got " + brief(*value));
  }
  // Factors: one means none.
  constexpr std::array kOne = {"partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling",
                               "logit_scale"};
  for (const char* key : kOne)
    if (fields.find(key) && fields.number(key) != 1) refuse(where, key, "expected 1, got " + brief(*fields.find(key)));
  constexpr std::array kAbsent = {"attention_multiplier", "query_pre_attn_scalar", "scale_emb", "scale_depth"};
  for (const char* key : kAbsent)
    if (fields.find(key)) refuse(where, key, "not supported, got " + brief(*fields.find(key)));
  const std::string activation = fields.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish")
    refuse(where, "hidden_act", "expected silu, got '" + activation.substr(0, 80) + "'");
  if (fields.find("layer_types")) {
    for (const std::string& type : fields.texts("layer_types"))
      if (type != "full_attention") refuse(where, "layer_types", "expected full_attention only, got '" + type.substr(0, 80) + "'");
  }
}

// Mistral attends to the last `sliding_window` tokens: the same as full attention as long as no sequence is longer. The Qwen
// families use the window only with use_sliding_window, which is refused; Llama ignores the key.
void refuse_sliding_window(const JsonFields& fields, const ModelConfig& config, const std::string& where) {
  if (config.family != "mistral") return;
  const bool given = fields.object().contains("sliding_window");
  if (given && !fields.find("sliding_window")) return;
  const int64_t window = fields.integer("sliding_window", 1, INT64_MAX, 4096);  // the class's default when the key is missing
  if (window < config.max_positions) {
    refuse(where, "sliding_window",
           concat("sliding-window attention is not supported: expected null or at least max_position_embeddings (",
                  config.max_positions, "), got ", window, given ? "" : " (the default when the key is missing)",
                  "; set it to null, or max_position_embeddings to at most the window, if that is what you mean"));
  }
}

// transformers' precedence: rope_scaling when it is there, else rope_parameters; rope_theta inside it, else beside it, else 10000.
void read_rope(const JsonFields& fields, ModelConfig& config, const std::string& where) {
  const double outer_theta = fields.number("rope_theta", 10000);
  config.rope_theta = outer_theta;
  const char* key = "rope_scaling";
  const Json* settings = fields.find(key);
  if (!settings || !truthy(*settings)) settings = fields.find(key = "rope_parameters");
  if (settings && !settings->is_object()) fields.fail(key, "an object", *settings);
  if (settings) {
    for (const auto& [name, value] : settings->items()) {
      constexpr std::array kKnown = {"rope_type",
                                     "type",
                                     "rope_theta",
                                     "factor",
                                     "low_freq_factor",
                                     "high_freq_factor",
                                     "original_max_position_embeddings",
                                     "partial_rotary_factor"};
      if (std::find(kKnown.begin(), kKnown.end(), name) == kKnown.end() && !value.is_null())
        refuse(where, concat(key, ".", name.substr(0, 80)), "not supported, got " + brief(value));
    }
    const JsonFields inner(*settings, concat("[config] ", where, ": ", key, ":"));
    if (inner.number("partial_rotary_factor", 1) != 1) refuse(where, concat(key, ".partial_rotary_factor"), "expected 1");
    config.rope_theta = inner.number("rope_theta", outer_theta);
    RopeScaling& scaling = config.rope_scaling;
    scaling.type = inner.text("rope_type", inner.text("type", "default"));
    if (scaling.type == "linear" || scaling.type == "llama3") {
      scaling.factor = inner.number("factor");
      require<FormatError>(scaling.factor >= 1e-6 && scaling.factor <= 1e6, "[config] ", where, ": ", key,
                           ".factor: expected a positive number (1e-6 to 1e6), got ", scaling.factor);
    } else if (scaling.type != "default") {
      refuse(where, concat(key, ".rope_type"), "expected default, linear or llama3, got '" + scaling.type.substr(0, 80) + "'");
    }
    if (scaling.type == "llama3") {
      scaling.low_freq_factor = inner.number("low_freq_factor");
      scaling.high_freq_factor = inner.number("high_freq_factor");
      require<FormatError>(
          scaling.low_freq_factor >= 1e-6 && scaling.high_freq_factor > scaling.low_freq_factor && scaling.high_freq_factor <= 1e6,
          "[config] ", where, ": ", key, ": expected 0 < low_freq_factor < high_freq_factor, got ", scaling.low_freq_factor,
          " and ", scaling.high_freq_factor);
      const char* original = "original_max_position_embeddings";
      scaling.original_max_positions =
          fields.integer(original, 1, kMaxInt32, inner.integer(original, 1, kMaxInt32, config.max_positions));
    }
  }
  require<FormatError>(config.rope_theta > 0 && config.rope_theta <= 1e30, "[config] ", where,
                       ": rope_theta: expected a positive number (at most 1e30), got ", config.rope_theta);
}

std::vector<int32_t> read_eos(const JsonFields& fields, int64_t vocab_size) {
  std::vector<int32_t> ids;
  const Json* value = fields.find("eos_token_id");
  if (!value) return ids;
  const auto add = [&](const Json& id) {
    const int64_t number = fields.integer_value("eos_token_id", id, INT32_MIN, vocab_size - 1);
    // Some published configs say -1 for none.
    if (number >= 0 && std::find(ids.begin(), ids.end(), number) == ids.end()) ids.push_back(static_cast<int32_t>(number));
  };
  if (value->is_array()) {
    for (const Json& id : *value) add(id);
  } else {
    add(*value);
  }
  return ids;
}

std::string read_dtype(const JsonFields& fields, const std::string& where) {
  const char* key = fields.find("dtype") ? "dtype" : "torch_dtype";
  std::string name = fields.text(key, "float32");
  if (name.starts_with("torch.")) name = name.substr(6);
  if (name == "float32") return "f32";
  if (name == "float16") return "f16";
  if (name == "bfloat16") return "bf16";
  refuse(where, key, "expected float32, float16 or bfloat16, got '" + name.substr(0, 80) + "'");
}

void read_sizes(const JsonFields& fields, ModelConfig& config, const std::string& where) {
  config.vocab_size = fields.integer("vocab_size", 1, kMaxInt32);
  config.hidden_size = fields.integer("hidden_size", 1, kMaxWidth);
  config.intermediate_size = fields.integer("intermediate_size", 1, kMaxWidth);
  config.num_layers = fields.integer("num_hidden_layers", 1, 4096);
  config.max_positions = fields.integer("max_position_embeddings", 1, kMaxInt32);
  const int64_t heads = fields.integer("num_attention_heads", 1, 65536);
  // Null means one key/value head per query head; only Llama's class says the same when the key is missing.
  const bool grouped = config.family == "llama" || fields.object().contains("num_key_value_heads");
  const int64_t kv_heads =
      grouped ? fields.integer("num_key_value_heads", 1, 65536, heads) : fields.integer("num_key_value_heads", 1, 65536);
  require<FormatError>(heads % kv_heads == 0, "[config] ", where,
                       ": num_attention_heads: expected a multiple of num_key_value_heads (", kv_heads, "), got ", heads);
  int64_t head_size = 0;
  if (fields.find("head_dim")) {
    head_size = fields.integer("head_dim", 1, 65536);
  } else if (config.family == "qwen3") {
    head_size = 128;  // the class's default
  } else {
    require<FormatError>(config.hidden_size % heads == 0, "[config] ", where,
                         ": hidden_size: expected a multiple of num_attention_heads (", heads, ") when head_dim is not given, got ",
                         config.hidden_size);
    head_size = config.hidden_size / heads;
  }
  require<FormatError>(head_size % 2 == 0, "[config] ", where, ": head_dim: expected an even number (rotary pairs), got ",
                       head_size);
  require<FormatError>((heads + 2 * kv_heads) * head_size <= kMaxWidth, "[config] ", where,
                       ": head_dim: expected (num_attention_heads + 2 num_key_value_heads) * head_dim of at most ", kMaxWidth,
                       ", got ", (heads + 2 * kv_heads) * head_size);
  const int64_t widest = std::max(config.vocab_size, config.intermediate_size);
  require<FormatError>(widest <= kMaxElements / config.hidden_size, "[config] ", where, ": hidden_size: expected a matrix [",
                       widest, ", ", config.hidden_size, "] of at most ", kMaxElements, " elements");
  config.num_heads = static_cast<int32_t>(heads);
  config.num_kv_heads = static_cast<int32_t>(kv_heads);
  config.head_size = static_cast<int32_t>(head_size);
}

void read_biases(const JsonFields& fields, ModelConfig& config, const std::string& where) {
  const bool attention_bias = fields.boolean("attention_bias", false), mlp_bias = fields.boolean("mlp_bias", false);
  const bool honoured = config.family == "llama" || config.family == "qwen3";
  if (attention_bias && config.family == "mistral") refuse(where, "attention_bias", "the mistral family has none");
  if (mlp_bias && config.family != "llama") refuse(where, "mlp_bias", "only the llama family has it");
  config.qkv_bias = config.family == "qwen2" || (honoured && attention_bias);  // Qwen2: always on q, k and v, never on o
  config.o_bias = honoured && attention_bias;
  config.mlp_bias = mlp_bias;
  config.qk_norm = config.family == "qwen3";
}

}  // namespace

ModelConfig parse_hf_config(const std::string& json, const std::string& where) {
  require<FormatError>(json.size() <= kMaxConfigBytes, "[config] ", where, ": expected at most ", kMaxConfigBytes, " bytes, got ",
                       json.size());
  const Json document = parse_json_object(json, where);
  const JsonFields fields(document, "[config] " + where + ":");
  ModelConfig config;
  config.family = family_of(fields, where).name;
  refuse_other_maths(fields, where);
  read_sizes(fields, config, where);
  read_biases(fields, config, where);
  refuse_sliding_window(fields, config, where);
  const double eps = fields.number("rms_norm_eps", 1e-6);
  require<FormatError>(eps >= 1e-30 && eps < 1, "[config] ", where, ": rms_norm_eps: expected a number between 0 and 1, got ", eps);
  config.rms_norm_eps = static_cast<float>(eps);
  read_rope(fields, config, where);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
  config.eos_token_ids = read_eos(fields, config.vocab_size);
  config.torch_dtype = read_dtype(fields, where);
  return config;
}

ModelConfig load_hf_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json", generation = folder / "generation_config.json";
  ModelConfig config = parse_hf_config(read_text_file(path, kMaxConfigBytes), path.string());
  std::error_code ignored;
  if (std::filesystem::exists(generation, ignored)) {
    const Json document = parse_json_object(read_text_file(generation, kMaxConfigBytes), generation.string());
    const JsonFields fields(document, "[config] " + generation.string() + ":");
    if (fields.find("eos_token_id")) config.eos_token_ids = read_eos(fields, config.vocab_size);
  }
  return config;
}

}  // namespace loquetier
