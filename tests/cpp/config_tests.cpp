// Configurations and adapters: config.json of every family, rotary frequencies against transformers' numbers, the fused linears,
// PEFT configurations and their matching rules, adapter folders, initial weights, snapshots. Files in general are in io_tests.cpp.

#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"
#include "io/hf_config.h"
#include "temp_folder.h"

using namespace loquetier;
namespace fs = std::filesystem;
using test::put;
using test::TempFolder;
using Json = nlohmann::ordered_json;

namespace {

Json base_json(const std::string& family = "llama") {
  return {{"model_type", family},   {"vocab_size", 32},         {"hidden_size", 16},        {"intermediate_size", 24},
          {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 64}};
}

ModelConfig parse(const Json& json) { return parse_hf_config(json.dump(), "config.json"); }

Json with(Json json, const std::string& key, const Json& value) {
  json[key] = value;
  return json;
}

ModelConfig small_model(const std::string& family = "llama") { return parse(base_json(family)); }

}  // namespace

TEST(config_families) {
  const ModelConfig llama = parse(base_json());
  CHECK_EQ(llama.family, "llama");
  CHECK_EQ(llama.head_size, 4);
  CHECK_EQ(llama.num_kv_heads, 2);
  CHECK_EQ(llama.rope_theta, 10000.0);
  CHECK_EQ(llama.rms_norm_eps, 1e-6f);
  CHECK_EQ(llama.torch_dtype, "f32");
  CHECK(!llama.qkv_bias && !llama.o_bias && !llama.mlp_bias && !llama.qk_norm && !llama.tie_word_embeddings);
  CHECK_EQ(llama.qkv_columns(), 32);
  CHECK_NEAR(llama.attention().scale, 0.5, 0);
  CHECK_EQ(llama.attention().kv_heads, 2);
  Json json = with(with(base_json(), "num_key_value_heads", nullptr), "head_dim", 6);
  CHECK_EQ(parse(json).num_kv_heads, 4);
  CHECK_EQ(parse(json).head_size, 6);
  json.erase("num_key_value_heads");
  CHECK_EQ(parse(json).num_kv_heads, 4);

  const ModelConfig biased = parse(with(with(base_json(), "attention_bias", true), "mlp_bias", true));
  CHECK(biased.qkv_bias && biased.o_bias && biased.mlp_bias);

  const ModelConfig mistral = parse(with(base_json("mistral"), "sliding_window", nullptr));
  CHECK_EQ(mistral.family, "mistral");
  CHECK_EQ(parse(with(base_json("mistral"), "sliding_window", 64)).max_positions, 64);
  CHECK_EQ(parse(base_json("mistral")).max_positions, 64);  // the class's window of 4096 is never reached

  const ModelConfig qwen2 = parse(with(with(base_json("qwen2"), "sliding_window", 8), "use_sliding_window", false));
  CHECK(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.qk_norm);

  const ModelConfig qwen3 = parse(with(base_json("qwen3"), "tie_word_embeddings", true));
  CHECK(qwen3.qk_norm && !qwen3.qkv_bias && qwen3.tie_word_embeddings);
  CHECK_EQ(qwen3.head_size, 128);  // the class's default, not hidden / heads
  CHECK(parse(with(base_json("qwen3"), "attention_bias", true)).o_bias);

  CHECK_EQ(parse(with(base_json(), "torch_dtype", "bfloat16")).torch_dtype, "bf16");
  CHECK_EQ(parse(with(with(base_json(), "torch_dtype", "float32"), "dtype", "float16")).torch_dtype, "f16");
  CHECK(parse(with(base_json(), "eos_token_id", 2)).eos_token_ids == std::vector<int32_t>{2});
  CHECK(parse(with(base_json(), "eos_token_id", {3, 1, 3})).eos_token_ids == std::vector<int32_t>({3, 1}));
  CHECK(parse(with(base_json(), "eos_token_id", -1)).eos_token_ids.empty());
  CHECK_EQ(parse(with(base_json(), "some_new_key", {1, 2})).vocab_size, 32);  // the families' code reads its own keys only
}

TEST(config_rope_spellings) {
  const ModelConfig old_linear =
      parse(with(with(base_json(), "rope_theta", 5e5), "rope_scaling", {{"type", "linear"}, {"factor", 2}}));
  CHECK_EQ(old_linear.rope_scaling.type, "linear");
  CHECK_EQ(old_linear.rope_scaling.factor, 2.0);
  CHECK_EQ(old_linear.rope_theta, 5e5);
  const Json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 32}};
  const ModelConfig scaled = parse(with(base_json(), "rope_scaling", llama3));
  CHECK_EQ(scaled.rope_scaling.type, "llama3");
  CHECK_EQ(scaled.rope_scaling.original_max_positions, 32);
  CHECK_EQ(scaled.rope_scaling.high_freq_factor, 4.0);
  Json without = llama3;
  without.erase("original_max_position_embeddings");
  CHECK_EQ(parse(with(base_json(), "rope_scaling", without)).rope_scaling.original_max_positions, 64);
  CHECK_EQ(parse(with(with(base_json(), "rope_scaling", llama3), "original_max_position_embeddings", 16))
               .rope_scaling.original_max_positions,
           16);
  const ModelConfig fresh =
      parse(with(with(base_json(), "rope_theta", 7), "rope_parameters", {{"rope_theta", 1e6}, {"rope_type", "default"}}));
  CHECK_EQ(fresh.rope_theta, 1e6);  // inside before beside
  CHECK_EQ(fresh.rope_scaling.type, "default");
  CHECK_EQ(parse(with(base_json(), "rope_parameters", nullptr)).rope_theta, 10000.0);
  // rope_scaling wins over rope_parameters when it says something
  const Json both = with(base_json(), "rope_parameters", {{"rope_theta", 1e6}});
  CHECK_EQ(parse(with(both, "rope_scaling", {{"rope_type", "linear"}, {"factor", 4}})).rope_theta, 10000.0);
  CHECK_EQ(parse(with(both, "rope_scaling", nullptr)).rope_theta, 1e6);
}

TEST(config_refused_by_key) {
  const std::pair<const char*, Json> refusals[] = {{"model_type", "gemma"},
                                                   {"hidden_act", "gelu"},
                                                   {"architectures", {"LlamaForSequenceClassification"}},
                                                   {"quantization_config", {{"bits", 4}}},
                                                   {"num_local_experts", 8},
                                                   {"partial_rotary_factor", 0.5},
                                                   {"attention_dropout", 0.1},
                                                   {"torch_dtype", "float8_e4m3fn"},
                                                   {"use_sliding_window", true},
                                                   {"layer_types", {"full_attention", "sliding_attention"}},
                                                   {"attn_logit_softcapping", 50.0},
                                                   {"logits_scaling", 8.0},
                                                   {"attention_multiplier", 0.1},
                                                   {"per_layer_config", {{"0", 1}}}};
  for (const auto& [key, value] : refusals) {
    const std::string expected = concat("[config] config.json: ", key, ": ");
    const Json json = with(base_json(), key, value);
    CHECK_THROWS(InvalidArgument, expected, parse(json));
  }
  const Json types[] = {{{"rope_type", "yarn"}, {"factor", 2}}, {{"type", "dynamic"}, {"factor", 2}}, {{"rope_type", "longrope"}}};
  for (const Json& rope : types)
    CHECK_THROWS(InvalidArgument, "rope_scaling.rope_type: expected default, linear or llama3",
                 parse(with(base_json(), "rope_scaling", rope)));
  CHECK_THROWS(InvalidArgument, "rope_parameters.full_attention: not supported",
               parse(with(base_json(), "rope_parameters", {{"full_attention", {{"rope_theta", 1e6}}}})));
  CHECK_THROWS(InvalidArgument, "rope_scaling.mrope_section",
               parse(with(base_json(), "rope_scaling", {{"type", "default"}, {"mrope_section", {1, 1}}})));
  CHECK_THROWS(InvalidArgument, "rope_scaling.partial_rotary_factor",
               parse(with(base_json(), "rope_scaling", {{"type", "default"}, {"partial_rotary_factor", 0.5}})));
  CHECK_THROWS(InvalidArgument, "sliding_window: sliding-window attention",
               parse(with(base_json("mistral"), "sliding_window", 63)));
  CHECK_THROWS(InvalidArgument, "got 4096 (the default when the key is missing)",
               parse(with(base_json("mistral"), "max_position_embeddings", 8192)));
  CHECK_THROWS(InvalidArgument, "attention_bias", parse(with(base_json("mistral"), "attention_bias", true)));
  CHECK_THROWS(InvalidArgument, "mlp_bias", parse(with(base_json("qwen2"), "mlp_bias", true)));
}

TEST(config_absurd_values) {
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "max_position_embeddings"}) {
    Json json = base_json();
    json.erase(key);
    const std::string missing = concat(key, ": expected a value, got nothing");
    CHECK_THROWS(FormatError, missing, parse(json));
    if (std::string(key) == "model_type") continue;
    for (const Json& bad :
         {Json(0), Json(-1), Json(1e18), Json(UINT64_MAX), Json("16"), Json(16.0), Json(true), Json(Json::array({16}))}) {
      const std::string expected = concat("[config] config.json: ", key, ": expected an integer from 1 to ");
      CHECK_THROWS(FormatError, expected, parse(with(base_json(), key, bad)));
    }
  }
  CHECK_THROWS(FormatError, "num_attention_heads: expected a multiple of num_key_value_heads (3), got 4",
               parse(with(base_json(), "num_key_value_heads", 3)));
  CHECK_THROWS(FormatError, "hidden_size: expected a multiple of num_attention_heads (4)",
               parse(with(base_json(), "hidden_size", 18)));
  CHECK_THROWS(FormatError, "head_dim: expected an even number", parse(with(base_json(), "head_dim", 3)));
  CHECK_THROWS(FormatError, "head_dim: expected an even number", parse(with(base_json(), "hidden_size", 4)));
  CHECK_THROWS(FormatError, "head_dim: expected (num_attention_heads + 2",
               parse(with(with(base_json(), "num_attention_heads", 65536), "head_dim", 65536)));
  CHECK_THROWS(FormatError, "elements", parse(with(with(base_json(), "vocab_size", INT32_MAX), "hidden_size", 1 << 20)));
  CHECK_THROWS(FormatError, "rms_norm_eps: expected a number between 0 and 1, got 0", parse(with(base_json(), "rms_norm_eps", 0)));
  CHECK_THROWS(FormatError, "rope_theta: expected a positive number", parse(with(base_json(), "rope_theta", -1)));
  CHECK_THROWS(FormatError, "rope_theta: expected a finite number, got \"1\"", parse(with(base_json(), "rope_theta", "1")));
  CHECK_THROWS(FormatError, "rope_scaling: factor: expected a value",
               parse(with(base_json(), "rope_scaling", {{"type", "linear"}})));
  CHECK_THROWS(FormatError, "rope_scaling.factor: expected a positive number",
               parse(with(base_json(), "rope_scaling", {{"type", "linear"}, {"factor", 0}})));
  CHECK_THROWS(FormatError, "0 < low_freq_factor < high_freq_factor",
               parse(with(base_json(), "rope_scaling",
                          {{"type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}})));
  CHECK_THROWS(FormatError, "rope_scaling: expected an object", parse(with(base_json(), "rope_scaling", {1})));
  CHECK_THROWS(FormatError, "eos_token_id: expected an integer", parse(with(base_json(), "eos_token_id", 32)));
  CHECK_THROWS(FormatError, "eos_token_id", parse(with(base_json(), "eos_token_id", "</s>")));
  Json qwen = base_json("qwen2");
  qwen.erase("num_key_value_heads");
  CHECK_THROWS(FormatError, "num_key_value_heads: expected a value", parse(qwen));
  CHECK_THROWS(FormatError, "not valid JSON", parse_hf_config("{", "c"));
  CHECK_THROWS(FormatError, "expected an object, got array", parse_hf_config("[]", "c"));
  CHECK_THROWS(FormatError, "key 'a' appears twice", parse_hf_config("{\"a\":1,\"a\":2}", "c"));
  CHECK_THROWS(FormatError, "zero byte", parse_hf_config(std::string("{}\0", 3), "c"));
  std::string deep = "{\"a\":";
  for (int i = 0; i < 1000; ++i) deep += "[";
  CHECK_THROWS(FormatError, "nested deeper than 64", parse_hf_config(deep, "c"));
}

TEST(config_folder) {
  TempFolder folder;
  CHECK_THROWS(NotFound, "config.json: no such file", load_hf_config(folder.path()));
  put(folder / "config.json", with(base_json(), "eos_token_id", 2).dump());
  CHECK(load_hf_config(folder.path()).eos_token_ids == std::vector<int32_t>{2});
  put(folder / "generation_config.json", "{\"eos_token_id\":[5,6]}");
  CHECK(load_hf_config(folder.path()).eos_token_ids == std::vector<int32_t>({5, 6}));
  put(folder / "generation_config.json", "{\"eos_token_id\":[5,99]}");
  CHECK_THROWS(FormatError, "generation_config.json: eos_token_id", load_hf_config(folder.path()));
}

// Numbers of LlamaRotaryEmbedding(config).inv_freq, transformers 5.24 on torch 2.13 (CPU), head size 64: elements 0, 1, 5, 9, 16,
// 20, 24, 28, 31. One unit in the last place is left to pow() of other platforms.
TEST(rope_frequencies_are_those_of_transformers) {
  constexpr size_t kPlaces[] = {0, 1, 5, 9, 16, 20, 24, 28, 31};
  struct Case {
    double theta;
    RopeScaling scaling;
    float expected[9];
  };
  const Case cases[] = {{10000,
                         {},
                         {0x1p+0f, 0x1.7ff222p-1f, 0x1.e5a846p-3f, 0x1.33281ap-4f, 0x1.47ae14p-7f, 0x1.9e7c70p-9f, 0x1.0624dep-10f,
                          0x1.4b96c0p-12f, 0x1.17a8e4p-13f}},
                        {500000,
                         {},
                         {0x1p+0f, 0x1.53c38cp-1f, 0x1.078d40p-3f, 0x1.98de92p-6f, 0x1.72ba42p-10f, 0x1.1f91f0p-12f,
                          0x1.be2188p-15f, 0x1.5a0f4ep-17f, 0x1.948360p-19f}},
                        {10000,
                         {"linear", 3, 1, 4, 0},
                         {0x1.555556p-2f, 0x1.ffed82p-3f, 0x1.43c584p-4f, 0x1.998acep-6f, 0x1.b4e81ap-9f, 0x1.1452f6p-10f,
                          0x1.5d867ep-12f, 0x1.ba1e56p-14f, 0x1.74e130p-15f}},
                        {500000,
                         {"llama3", 8, 1, 4, 8192},
                         {0x1p+0f, 0x1.53c38cp-1f, 0x1.078d40p-3f, 0x1.98de92p-6f, 0x1.132ba4p-11f, 0x1.1f91f0p-15f,
                          0x1.be2188p-18f, 0x1.5a0f4ep-20f, 0x1.948360p-22f}}};
  for (const Case& c : cases) {
    ModelConfig config = small_model();
    config.head_size = 64;
    config.rope_theta = c.theta;
    config.rope_scaling = c.scaling;
    const std::vector<float> got = rope_inv_freq(config);
    CHECK_EQ(got.size(), 32u);
    for (size_t i = 0; i < 9; ++i) CHECK_NEAR(got[kPlaces[i]], c.expected[i], std::nextafter(c.expected[i], 2.0f) - c.expected[i]);
  }
}

TEST(fused_linears_and_modules) {
  ModelConfig config = small_model();
  config.head_size = 6;
  const std::vector<ModuleInfo> modules = modules_of(config);
  CHECK_EQ(modules.size(), 15u);
  CHECK_EQ(modules[1].name, "model.layers.0.self_attn.k_proj");
  CHECK_EQ(modules[1].out, 12);
  CHECK_EQ(modules[3].name, "model.layers.0.self_attn.o_proj");
  CHECK_EQ(modules[3].in, 24);
  CHECK_EQ(modules[12].name, "model.layers.1.mlp.up_proj");
  CHECK_EQ(modules[12].site, site_of(1, Site::gate_up));
  CHECK_EQ(modules[12].part, 1);
  CHECK_EQ(modules[13].in, 24);
  CHECK_EQ(modules[14].name, "lm_head");
  CHECK_EQ(modules[14].layer, -1);
  CHECK_EQ(modules[14].out, 32);
  for (const ModuleInfo& module : modules) {
    const LoraLinear linear = lora_linear(config, module.site);
    CHECK_EQ(linear.site, module.site);
    CHECK_EQ(linear.in, module.in);
    CHECK_EQ(linear.out[module.part], module.out);
  }
  CHECK_EQ(lora_linear(config, 0).parts, 3);
  CHECK_THROWS(InvalidArgument, "[model] site: expected 0 to 8, got 9", lora_linear(config, 9));
}
