// Adapters: PEFT configurations and their matching rules, adapter folders, initial weights, snapshots; every way they can be wrong.
// Model configurations are in config_tests.cpp, files in general in io_tests.cpp.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "check.h"
#include "io/checkpoint.h"
#include "io/hf_config.h"
#include "temp_folder.h"

using namespace loquetier;
namespace fs = std::filesystem;
using test::put;
using test::TempFolder;
using Json = nlohmann::ordered_json;

namespace {

ModelConfig small_model(const std::string& family = "llama") {
  const Json json = {
      {"model_type", family},   {"vocab_size", 32},         {"hidden_size", 16},        {"intermediate_size", 24},
      {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 64}};
  return parse_hf_config(json.dump(), "config.json");
}

// peft_type and one more key
LoraConfig peft(const Json& changes) {
  Json json = {{"peft_type", "LORA"}};
  for (const auto& [key, value] : changes.items()) json[key] = value;
  return parse_peft_config(json.dump(), "adapter_config.json");
}

std::vector<std::string> names(const LoraConfig& config, const ModelConfig& model = small_model()) {
  std::vector<std::string> list;
  for (const LoraTarget& target : resolve_lora_config(config, model, 64)) list.push_back(target.module.name);
  return list;
}

LoraConfig targets(std::vector<std::string> modules, bool regex = false) {
  LoraConfig config;
  config.target_modules = std::move(modules);
  config.target_modules_is_regex = regex;
  return config;
}

using Names = std::vector<std::string>;

}  // namespace

TEST(lora_targets_follow_peft) {
  const std::string l0 = "model.layers.0.", l1 = "model.layers.1.";
  CHECK(names({}) == (Names{l0 + "self_attn.q_proj", l0 + "self_attn.v_proj", l1 + "self_attn.q_proj", l1 + "self_attn.v_proj"}));
  CHECK(names(targets({"1.mlp.up_proj", "lm_head"})) == (Names{l1 + "mlp.up_proj", "lm_head"}));
  CHECK_THROWS(InvalidArgument, "target_modules: no module of the model matches 'roj'",
               names(targets({"roj"})));  // whole components only
  CHECK_EQ(names(targets({"all-linear"})).size(), 14u);
  LoraConfig some = targets({"all-linear"});
  some.exclude_modules = {"mlp.down_proj", "k_proj"};
  CHECK_EQ(names(some).size(), 10u);
  some.exclude_modules = {".*layers.0.*"};
  some.exclude_modules_is_regex = true;
  CHECK_EQ(names(some).size(), 7u);
  CHECK(names(targets({R"(.*\.1\.(self_attn\.[qk]|mlp\.up)_proj)"}, true)) ==
        (Names{l1 + "self_attn.q_proj", l1 + "self_attn.k_proj", l1 + "mlp.up_proj"}));
  CHECK_THROWS(InvalidArgument, "no module of the model matches 'q_proj'", names(targets({"q_proj"}, true)));  // a full match
  CHECK_THROWS(InvalidArgument, "also matches model.embed_tokens", names(targets({"q_proj", "embed_tokens"})));
  CHECK_THROWS(InvalidArgument, "also matches model.layers.0.mlp", names(targets({".*mlp.*"}, true)));
  CHECK_THROWS(InvalidArgument, "also matches model.layers.0.self_attn.q_norm", names(targets({"q_norm"}), small_model("qwen3")));

  LoraConfig layers = targets({"q_proj", "model.layers.0.mlp.up_proj", "lm_head"});
  layers.layers_to_transform = std::vector<int>{1};
  CHECK(names(layers) == (Names{l0 + "mlp.up_proj", l1 + "self_attn.q_proj", "lm_head"}));  // full names are not filtered
  layers.layers_to_transform = std::vector<int>{};
  CHECK_EQ(names(layers).size(), 4u);
  layers.layers_to_transform = std::vector<int>{2};
  CHECK_THROWS(InvalidArgument, "layers_to_transform: expected layers 0 to 1, got 2", names(layers));
  layers = targets({".*q_proj"}, true);
  layers.layers_to_transform = std::vector<int>{1};
  CHECK_THROWS(InvalidArgument, "layers_to_transform: expected target_modules to be a list", names(layers));

  LoraConfig ranks = targets({"q_proj", "k_proj", "v_proj"});
  ranks.r = 4;
  ranks.lora_alpha = 6;
  ranks.rank_pattern = {{"^model.layers.0.self_attn.q_proj", 9}, {"q_proj", 16}, {"layers.1.*k_proj", 2}, {"_proj", 5}};
  ranks.alpha_pattern = {{"self_attn.q_proj", 3}};
  const std::vector<LoraTarget> found = resolve_lora_config(ranks, small_model(), 16);
  CHECK_EQ(found[0].rank, 9);
  CHECK_EQ(found[1].rank, 4);
  CHECK_EQ(found[3].rank, 16);
  CHECK_EQ(found[4].rank, 2);
  CHECK_EQ(found[3].scale, 3.0f / 16.0f);
  CHECK_EQ(found[1].scale, 1.5f);
  ranks.use_rslora = true;
  CHECK_EQ(resolve_lora_config(ranks, small_model(), 16)[0].scale, 1.0f);
}

TEST(lora_fields_are_checked) {
  const auto broken = [](auto change) {
    LoraConfig config;
    change(config);
    return resolve_lora_config(config, small_model(), 8).size();
  };
  CHECK_THROWS(InvalidArgument, "[lora] r: expected 1 to 8, got 0", broken([](LoraConfig& c) { c.r = 0; }));
  CHECK_THROWS(InvalidArgument, "[lora] r: expected 1 to 8, got 9", broken([](LoraConfig& c) { c.r = 9; }));
  CHECK_THROWS(InvalidArgument, "lora_alpha: expected a finite", broken([](LoraConfig& c) { c.lora_alpha = NAN; }));
  CHECK_THROWS(InvalidArgument, "lora_alpha: expected a scale in the range of f32",
               broken([](LoraConfig& c) { c.lora_alpha = 1e300; }));
  CHECK_THROWS(InvalidArgument, "lora_dropout: expected 0 <= p < 1, got 1", broken([](LoraConfig& c) { c.lora_dropout = 1; }));
  CHECK_THROWS(InvalidArgument, "lora_dropout", broken([](LoraConfig& c) { c.lora_dropout = NAN; }));
  CHECK_THROWS(InvalidArgument, "init_lora_weights: expected true, false or gaussian, got 'pissa'",
               broken([](LoraConfig& c) { c.init_lora_weights = "pissa"; }));
  CHECK_THROWS(InvalidArgument, "rank_pattern: 'q_proj': expected 1 to 8, got 9",
               broken([](LoraConfig& c) { c.rank_pattern = {{"q_proj", 9}}; }));
  CHECK_THROWS(InvalidArgument, "[lora] alpha_pattern: [regex] expression",
               broken([](LoraConfig& c) { c.alpha_pattern = {{"q_(", 9}}; }));
  CHECK_THROWS(InvalidArgument, "[lora] target_modules: [regex] expression",
               broken([](LoraConfig& c) { c.target_modules = {"("}, c.target_modules_is_regex = true; }));
  CHECK_THROWS(InvalidArgument, "expected one regular expression, got 2",
               broken([](LoraConfig& c) { c.target_modules = {"a", "b"}, c.target_modules_is_regex = true; }));
  CHECK_THROWS(InvalidArgument, "(with exclude_modules", broken([](LoraConfig& c) { c.exclude_modules = {"q_proj", "v_proj"}; }));
}

TEST(peft_configs) {
  const LoraConfig defaults = peft({});
  CHECK_EQ(defaults.r, 8);
  CHECK_EQ(defaults.lora_alpha, 8.0);
  CHECK(defaults.target_modules.empty());
  // What PEFT 0.21 writes for LoraConfig(target_modules=["q_proj"], …).
  const LoraConfig full =
      peft(Json::parse(R"({"task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": null, "peft_version": "0.21.2",
    "base_model_name_or_path": "some/model", "revision": null, "inference_mode": true, "r": 4, "target_modules": ["q_proj"], "exclude_modules": null,
    "lora_alpha": 16, "lora_dropout": 0.05, "fan_in_fan_out": false, "bias": "none", "use_rslora": true, "modules_to_save": null,
    "init_lora_weights": "Gaussian", "layers_to_transform": 1, "layers_pattern": "layers", "rank_pattern": {"b": 2, "a": 3},
    "alpha_pattern": {"a": 2.5}, "megatron_config": null, "megatron_core": "megatron.core", "trainable_token_indices": null, "loftq_config": {},
    "eva_config": null, "corda_config": null, "lora_ga_config": null, "use_dora": false, "velora_config": null, "alora_invocation_tokens": null,
    "use_qalora": false, "qalora_group_size": 16, "monteclora_config": null, "layer_replication": null, "lora_bias": false,
    "target_parameters": null, "use_bdlora": null, "arrow_config": null, "kasa_config": null, "ensure_weight_tying": false,
    "from_the_future": null, "also_off": [], "and_this": 0})"));
  CHECK_EQ(full.r, 4);
  CHECK_EQ(full.lora_alpha, 16.0);
  CHECK_EQ(full.lora_dropout, 0.05);
  CHECK(full.use_rslora);
  CHECK_EQ(full.init_lora_weights, "gaussian");
  CHECK(full.layers_to_transform == std::vector<int>{1});
  CHECK_EQ(full.rank_pattern.front().first, "b");  // the file's order
  CHECK_EQ(full.alpha_pattern.front().second, 2.5);
  CHECK(peft({{"target_modules", "ALL-linear"}}).target_modules == Names{"all-linear"});
  CHECK(!peft({{"target_modules", "all-linear"}}).target_modules_is_regex);
  CHECK(peft({{"target_modules", ".*q_proj"}}).target_modules_is_regex);
  CHECK(peft({{"exclude_modules", ".*q_proj"}}).exclude_modules_is_regex);
  CHECK_EQ(peft({{"init_lora_weights", false}}).init_lora_weights, "false");
  CHECK(peft({{"layers_to_transform", {0, 1}}, {"layers_pattern", {"h", "model.layers"}}}).layers_to_transform ==
        std::vector<int>({0, 1}));
}

TEST(peft_configs_refused_by_key) {
  const std::pair<const char*, Json> refusals[] = {{"use_dora", true},
                                                   {"bias", "lora_only"},
                                                   {"bias", "all"},
                                                   {"modules_to_save", {"lm_head"}},
                                                   {"lora_bias", true},
                                                   {"layer_replication", {{0, 1}}},
                                                   {"megatron_config", {{"a", 1}}},
                                                   {"loftq_config", {{"loftq_bits", 4}}},
                                                   {"eva_config", {{"rho", 2}}},
                                                   {"corda_config", {{"a", 1}}},
                                                   {"arrow_config", {{"a", 1}}},
                                                   {"fan_in_fan_out", true},
                                                   {"use_qalora", true},
                                                   {"trainable_token_indices", {1}},
                                                   {"target_parameters", {"w"}},
                                                   {"lora_ga_config", {{"a", 1}}},
                                                   {"velora_config", {{"a", 1}}},
                                                   {"alora_invocation_tokens", {1}},
                                                   {"monteclora_config", {{"a", 1}}},
                                                   {"use_bdlora", {{"a", 1}}},
                                                   {"kasa_config", {{"a", 1}}},
                                                   {"ensure_weight_tying", true},
                                                   {"init_lora_weights", "pissa"},
                                                   {"init_lora_weights", "olora"},
                                                   {"init_lora_weights", "eva"},
                                                   {"peft_type", "IA3"},
                                                   {"some_future_option", true},
                                                   {"another", "text"},
                                                   {"third", 0.5},
                                                   {"layers_pattern", "layers"}};
  for (const auto& [key, value] : refusals) {
    const std::string expected = concat("[lora] adapter_config.json: ", key, ": ");
    CHECK_THROWS(InvalidArgument, expected, peft({{key, value}}));
  }
  CHECK_THROWS(InvalidArgument, "path_initial_model_for_weight_conversion", peft({{"init_lora_weights", "pissa_niter_4"}}));
  CHECK_THROWS(InvalidArgument, "layers_pattern: expected \"layers\", got \"h\"",
               peft({{"layers_to_transform", 0}, {"layers_pattern", "h"}}));
  CHECK_EQ(peft({{"layers_to_transform", Json::array()}, {"layers_pattern", "h"}}).r, 8);
  CHECK_THROWS(InvalidArgument, "layers_pattern: alternatives", peft({{"layers_to_transform", 0}, {"layers_pattern", "h|layers"}}));
  const std::pair<const char*, Json> malformed[] = {{"r", 0},
                                                    {"r", "8"},
                                                    {"r", 2.5},
                                                    {"r", 1e300},
                                                    {"lora_alpha", "x"},
                                                    {"lora_dropout", {1}},
                                                    {"use_rslora", 1},
                                                    {"target_modules", Json::array()},
                                                    {"target_modules", {1}},
                                                    {"target_modules", 7},
                                                    {"layers_to_transform", -1},
                                                    {"layers_to_transform", {0.5}},
                                                    {"rank_pattern", {1}},
                                                    {"rank_pattern", {{"q", 0}}},
                                                    {"alpha_pattern", {{"q", "1"}}},
                                                    {"init_lora_weights", 1},
                                                    {"peft_type", 1},
                                                    {"bias", true}};
  for (const auto& [key, value] : malformed) {
    const std::string expected = concat("[lora] adapter_config.json: ", key, ": ");
    CHECK_THROWS(FormatError, expected, peft({{key, value}}));
  }
  CHECK_THROWS(FormatError, "peft_type: expected a value", parse_peft_config("{}", "c"));
  CHECK_THROWS(FormatError, "not valid JSON", parse_peft_config("{\"lora_alpha\": NaN}", "c"));
}

TEST(peft_config_round_trip) {
  LoraConfig config = targets({"up_proj", "lm_head"});
  config.r = 3;
  config.lora_alpha = 0.1;
  config.lora_dropout = 0.3;
  config.use_rslora = true;
  config.exclude_modules = {"layers.0.*"};
  config.exclude_modules_is_regex = true;
  config.layers_to_transform = std::vector<int>{1};
  config.rank_pattern = {{"up_proj", 2}, {"a", 1}, {"up_proj", 7}};
  config.alpha_pattern = {{R"(\w+_proj)", 1e-3}};
  config.init_lora_weights = "false";
  const LoraConfig back = parse_peft_config(peft_config_json(config, resolve_lora_config(config, small_model(), 8), "base"), "c");
  CHECK(back.target_modules == config.target_modules && !back.target_modules_is_regex);
  CHECK(back.exclude_modules == config.exclude_modules && back.exclude_modules_is_regex);
  CHECK(back.layers_to_transform == config.layers_to_transform);
  CHECK(back.rank_pattern == (std::vector<std::pair<std::string, int>>{{"up_proj", 2}, {"a", 1}}));
  CHECK(back.alpha_pattern == config.alpha_pattern);
  CHECK(back.r == 3 && back.lora_alpha == 0.1 && back.lora_dropout == 0.3 && back.use_rslora && back.init_lora_weights == "false");
  const Json written = Json::parse(peft_config_json({}, resolve_lora_config({}, small_model(), 8), ""));
  CHECK(written["target_modules"] == Json({"q_proj", "v_proj"}));
  CHECK(written["base_model_name_or_path"].is_null());
  CHECK(written["lora_alpha"].is_number_integer());
  CHECK(!written.contains("exclude_modules"));
}

TEST(initial_weights_have_pefts_distribution) {
  LoraConfig config = targets({"q_proj"});
  config.r = 4;
  config.seed = 7;
  ModelConfig model = small_model();
  model.hidden_size = 4096;
  const std::vector<LoraTarget> targets_of = resolve_lora_config(config, model, 8);
  const auto moments = [](const std::vector<float>& values) {
    double sum = 0, square = 0, most = 0;
    for (float v : values) sum += v, square += static_cast<double>(v) * v, most = std::max(most, std::fabs(static_cast<double>(v)));
    const double n = static_cast<double>(values.size());
    return std::array<double, 3>{sum / n, std::sqrt(square / n), most};
  };
  const LoraWeights uniform = initial_lora_weights(config, targets_of);
  CHECK_EQ(uniform.a[0].size(), 4u * 4096u);
  CHECK_EQ(uniform.b[0].size(), 4u * 16u);
  const double bound = 1.0 / 64, spread = bound / std::sqrt(3.0);  // of 16384 values: standard error of the mean spread / 128
  const auto [mean, deviation, most] = moments(uniform.a[0]);
  CHECK_NEAR(mean, 0, 4 * spread / 128);
  CHECK_NEAR(deviation, spread, 0.02 * spread);
  CHECK(most <= bound && most > 0.999 * bound);
  CHECK(std::all_of(uniform.b[0].begin(), uniform.b[0].end(), [](float v) { return v == 0; }));
  CHECK(uniform.a[0] != uniform.a[1]);
  CHECK(initial_lora_weights(config, {targets_of[1]}).a[0] == uniform.a[1]);  // whatever else is adapted

  config.init_lora_weights = "gaussian";
  const LoraWeights normal = initial_lora_weights(config, targets_of);
  const auto [normal_mean, normal_deviation, normal_most] = moments(normal.a[0]);
  CHECK_NEAR(normal_mean, 0, 4 * 0.25 / 128);
  CHECK_NEAR(normal_deviation, 0.25, 0.02 * 0.25);
  CHECK(normal_most > 3 * 0.25 && normal_most < 6 * 0.25);
  CHECK(std::all_of(normal.b[0].begin(), normal.b[0].end(), [](float v) { return v == 0; }));

  config.init_lora_weights = "false";
  const LoraWeights both = initial_lora_weights(config, targets_of);
  CHECK(both.a[0] == uniform.a[0]);
  CHECK_NEAR(moments(both.b[0])[2], 0.5, 0.06);  // +-1 / sqrt(r), 64 values
  config.seed = 8;
  CHECK(initial_lora_weights(config, targets_of).a[0] != uniform.a[0]);
  // The values of a seed do not change from one version or platform to another: the first eight of this one, from another
  // implementation (in Python).
  constexpr float kUniform[] = {0x1.d247aep-7f, 0x1.411d26p-8f,  -0x1.6805b6p-7f, -0x1.8196f8p-7f,
                                0x1.0b237ap-7f, -0x1.a73e34p-9f, -0x1.b14eb2p-7f, -0x1.4b9aaap-7f};
  constexpr float kNormal[] = {-0x1.5622aep-5f, -0x1.01ecb6p-4f, 0x1.65058cp-2f, 0x1.5e1fa8p-2f,
                               -0x1.2d81fcp-3f, 0x1.c9b2d8p-4f,  0x1.037c20p-2f, 0x1.035204p-1f};
  for (size_t i = 0; i < 8; ++i) {
    CHECK_EQ(uniform.a[0][i], kUniform[i]);
    CHECK_EQ(normal.a[0][i], kNormal[i]);
  }
}

namespace {

PeftAdapter example_adapter(DType dtype, const std::vector<std::string>& modules = {"q_proj", "down_proj"}) {
  PeftAdapter adapter;
  adapter.config = targets(modules);
  adapter.config.r = 3;
  adapter.config.init_lora_weights = "false";
  adapter.targets = resolve_lora_config(adapter.config, small_model(), 8);
  adapter.weights = initial_lora_weights(adapter.config, adapter.targets);
  adapter.stored_dtype = dtype;
  for (auto* side : {&adapter.weights.a, &adapter.weights.b}) {
    for (std::vector<float>& values : *side) {  // representable in the stored dtype
      std::vector<std::byte> stored(values.size() * size_of(dtype));
      convert_elements(values.data(), DType::f32, stored.data(), dtype, static_cast<int64_t>(values.size()));
      convert_elements(stored.data(), dtype, values.data(), DType::f32, static_cast<int64_t>(values.size()));
    }
  }
  return adapter;
}

}  // namespace

TEST(peft_folder_round_trip_is_bit_exact) {
  TempFolder folder;
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const PeftAdapter adapter = example_adapter(dtype);
    save_peft_folder(folder / "a", adapter, "base");
    const SafetensorsFile file = SafetensorsFile::open(folder / "a" / "adapter_model.safetensors");
    CHECK_EQ(file.tensors().size(), 8u);
    CHECK(file.at("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight").shape == std::vector<int64_t>({16, 3}));
    CHECK(file.at("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").dtype == dtype);
    const PeftAdapter back = load_peft_folder(folder / "a", small_model(), 8);
    CHECK(back.stored_dtype == dtype);
    CHECK(back.weights.a == adapter.weights.a && back.weights.b == adapter.weights.b);
    CHECK_EQ(back.targets.size(), 4u);
    const std::string first = read_text_file(folder / "a" / "adapter_model.safetensors");
    save_peft_folder(folder / "a", back, "base");
    CHECK(read_text_file(folder / "a" / "adapter_model.safetensors") == first);
  }
  put(folder / "a" / "README.md", "mine");
  save_peft_folder(folder / "a", example_adapter(DType::f32), "");
  CHECK_EQ(read_text_file(folder / "a" / "README.md"), "mine");
}

TEST(peft_folder_wrong_in_every_way) {
  TempFolder folder;
  const PeftAdapter adapter = example_adapter(DType::f32, {"q_proj"});
  save_peft_folder(folder / "a", adapter, "");
  const fs::path weights = folder / "a" / "adapter_model.safetensors";
  const std::string bytes = read_text_file(weights);
  const SafetensorsFile good = SafetensorsFile::parse(bytes, "good");
  // The file again with one change: f(list of tensors).
  const auto rewritten = [&](auto change) {
    std::vector<TensorToWrite> tensors;
    for (const auto& [name, tensor] : good.tensors()) tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
    change(tensors);
    put(weights, safetensors_bytes(tensors, {}));
  };
  const auto load = [&] { return load_peft_folder(folder / "a", small_model(), 8).targets.size(); };
  CHECK_EQ(load(), 2u);
  const std::string a0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

  rewritten([](auto& tensors) { tensors.erase(tensors.begin()); });
  CHECK_THROWS(FormatError, "'" + a0 + "': no such tensor", load());
  static const float zeros[512] = {};
  const auto extra = [&](const std::string& name) {
    rewritten([&](auto& tensors) { tensors.push_back({name, DType::f32, {4}, zeros}); });
  };
  extra("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight");
  CHECK_THROWS(FormatError,
               "k_proj.lora_A.weight': an unexpected tensor: the configuration does not target model.layers.0.self_attn.k_proj",
               load());
  extra("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight");
  CHECK_THROWS(FormatError, "the adapter may belong to another model", load());
  extra("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight");
  CHECK_THROWS(FormatError, "DoRA", load());
  extra("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight");
  CHECK_THROWS(FormatError, "an unexpected tensor", load());
  rewritten([&](auto& tensors) { tensors[0].shape = {2, 16}; });
  CHECK_THROWS(FormatError, "'" + a0 + "': shape: expected [3, 16], got [2, 16]", load());
  rewritten([&](auto& tensors) { tensors[0].shape = {48}; });
  CHECK_THROWS(FormatError, "expected [3, 16], got [48]", load());
  rewritten([&](auto& tensors) { tensors[0] = {tensors[0].name, DType::i32, {3, 16}, zeros}; });
  CHECK_THROWS(FormatError, "dtype: expected F32, F16 or BF16, got i32", load());
  std::vector<float> values(48, 1.0f);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    values[7] = bad;
    rewritten([&](auto& tensors) { tensors[0].data = values.data(); });
    CHECK_THROWS(FormatError, "'" + a0 + "': expected finite values, got", load());
    CHECK_THROWS(FormatError, "at element 7", load());
  }
  put(weights, bytes.substr(0, bytes.size() - 1));
  CHECK_THROWS(FormatError, "adapter_model.safetensors", load());
  const uint16_t halves[48] = {};
  rewritten([&](auto& tensors) { tensors[0] = {tensors[0].name, DType::f16, {3, 16}, halves}; });
  CHECK(load_peft_folder(folder / "a", small_model(), 8).stored_dtype == DType::f32);  // mixed dtypes: what holds them all

  put(weights, bytes);
  CHECK_THROWS(InvalidArgument, "[lora] r: expected 1 to 2, got 3", load_peft_folder(folder / "a", small_model(), 2));
  ModelConfig other = small_model();
  other.hidden_size = 32;
  CHECK_THROWS(FormatError, "shape: expected [3, 32], got [3, 16]; the adapter may belong to another model",
               load_peft_folder(folder / "a", other, 8));
  fs::rename(weights, folder / "a" / "adapter_model.bin");
  CHECK_THROWS(InvalidArgument, "adapter_model.bin: pickled weights are not read", load());
  fs::remove(folder / "a" / "adapter_model.bin");
  CHECK_THROWS(NotFound, "adapter_model.safetensors: no such file", load());
  CHECK_THROWS(NotFound, "adapter_config.json: no such file", load_peft_folder(folder / "b", small_model(), 8));

  PeftAdapter broken = adapter;
  broken.weights.a[0].pop_back();
  CHECK_THROWS(InvalidArgument, a0 + ": expected 48 values, got 47", save_peft_folder(folder / "c", broken, ""));
  broken.stored_dtype = DType::i64;
  CHECK_THROWS(InvalidArgument, "stored_dtype", save_peft_folder(folder / "c", broken, ""));
  CHECK(!fs::exists(folder / "c"));
}

// PEFT stores the base weight of lm_head beside its adapter.
TEST(peft_base_copies) {
  TempFolder folder;
  save_peft_folder(folder / "a", example_adapter(DType::f32, {"lm_head"}), "");
  const fs::path weights = folder / "a" / "adapter_model.safetensors";
  const SafetensorsFile file = SafetensorsFile::open(weights);
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, tensor] : file.tensors()) tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
  std::vector<uint16_t> head(32 * 16, 0x3f80);
  head[40] = 0x4000;
  std::vector<float> wide(head.size());
  convert_elements(head.data(), DType::bf16, wide.data(), DType::f32, static_cast<int64_t>(wide.size()));
  tensors.push_back({"base_model.model.lm_head.base_layer.weight", DType::f32, {32, 16}, wide.data()});
  const std::string bytes = safetensors_bytes(tensors, {});
  write_file_atomically(weights, bytes);
  const PeftAdapter adapter = load_peft_folder(folder / "a", small_model(), 8);
  CHECK_EQ(adapter.base_copies.size(), 1u);
  CHECK_EQ(adapter.base_copies.front().module.name, "lm_head");
  check_base_copy(adapter.base_copies.front(), matrix(wide.data(), DType::f32, 32, 16));
  check_base_copy(adapter.base_copies.front(), matrix(head.data(), DType::bf16, 32, 16));  // the checkpoint's own dtype
  wide[40] += 1;
  CHECK_THROWS(FormatError, "row 2 differs", check_base_copy(adapter.base_copies.front(), matrix(wide.data(), DType::f32, 32, 16)));
  CHECK_THROWS(InvalidArgument, "expected a base weight [32, 16]",
               check_base_copy(adapter.base_copies.front(), matrix(wide.data(), DType::f32, 16, 32)));

  save_peft_folder(folder / "b", example_adapter(DType::f32, {"q_proj"}), "");
  const SafetensorsFile plain = SafetensorsFile::open(folder / "b" / "adapter_model.safetensors");
  tensors.erase(tensors.begin(), tensors.end() - 1);
  for (const auto& [name, tensor] : plain.tensors()) tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
  write_file_atomically(folder / "b" / "adapter_model.safetensors", safetensors_bytes(tensors, {}));
  CHECK_THROWS(FormatError, "lm_head.base_layer.weight': an unexpected tensor", load_peft_folder(folder / "b", small_model(), 8));
}

namespace {

AdapterSnapshot example_snapshot(bool training) {
  const PeftAdapter adapter = example_adapter(DType::bf16);
  AdapterSnapshot snapshot;
  snapshot.config = adapter.config;
  snapshot.config.seed = UINT64_MAX;
  snapshot.targets = adapter.targets;
  snapshot.weights = adapter.weights;
  snapshot.stored_dtype = DType::bf16;
  snapshot.version = 12;
  snapshot.has_training_state = training;
  if (!training) return snapshot;
  snapshot.optimizer_steps = 11;
  snapshot.dropout_counter = uint64_t{1} << 63;
  snapshot.exp_avg = snapshot.exp_avg_sq = snapshot.gradients = snapshot.weights;
  for (auto* side : {&snapshot.exp_avg_sq.a, &snapshot.exp_avg_sq.b})
    for (std::vector<float>& values : *side)
      for (float& v : values) v *= v;
  snapshot.gradients.b[1][3] = std::numeric_limits<float>::infinity();
  return snapshot;
}

}  // namespace

TEST(snapshots) {
  for (bool training : {false, true}) {
    const AdapterSnapshot snapshot = example_snapshot(training);
    const std::string bytes = snapshot_bytes(snapshot);
    const AdapterSnapshot back = parse_snapshot(bytes, "s", small_model(), 8);
    CHECK_EQ(back.config.seed, UINT64_MAX);
    CHECK_EQ(back.version, 12);
    CHECK(back.stored_dtype == DType::bf16);
    CHECK_EQ(back.has_training_state, training);
    CHECK_EQ(back.optimizer_steps, training ? 11 : 0);
    CHECK_EQ(back.dropout_counter, training ? uint64_t{1} << 63 : 0);
    CHECK(back.weights.a == snapshot.weights.a && back.weights.b == snapshot.weights.b);
    CHECK(back.exp_avg.a == snapshot.exp_avg.a && back.exp_avg_sq.b == snapshot.exp_avg_sq.b &&
          back.gradients.b == snapshot.gradients.b);
    CHECK(snapshot_bytes(back) == bytes);
  }
}

TEST(snapshots_refused) {
  const AdapterSnapshot snapshot = example_snapshot(true);
  const std::string bytes = snapshot_bytes(snapshot);
  const SafetensorsFile file = SafetensorsFile::parse(bytes, "good");
  const auto parse_changed = [&](auto change) {
    std::vector<TensorToWrite> tensors;
    for (const auto& [name, tensor] : file.tensors()) tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
    std::map<std::string, std::string> metadata = file.metadata();
    change(tensors, metadata);
    return parse_snapshot(safetensors_bytes(tensors, metadata), "s", small_model(), 8).version;
  };
  CHECK_EQ(parse_changed([](auto&, auto&) {}), 12);
  for (const char* key :
       {"format", "config", "seed", "version", "stored_dtype", "has_training_state", "optimizer_steps", "dropout_counter"}) {
    const std::string missing = concat("[snapshot] s: ", key, ": missing");
    CHECK_THROWS(FormatError, missing, parse_changed([&](auto&, auto& metadata) { metadata.erase(key); }));
  }
  const std::pair<const char*, const char*> bad[] = {
      {"format", "loquetier-adapter-2"},  {"seed", "-1"},          {"version", "1.5"},
      {"version", "9223372036854775808"}, {"optimizer_steps", ""}, {"dropout_counter", "7x"},
      {"has_training_state", "2"},        {"stored_dtype", "f64"}};
  for (const auto& [key, value] : bad) {
    const std::string expected = concat("[snapshot] s: ", key, ": expected");
    const std::string text = value;
    CHECK_THROWS(FormatError, expected, parse_changed([&](auto&, auto& metadata) { metadata[key] = text; }));
  }
  CHECK_THROWS(FormatError, "not valid JSON", parse_changed([](auto&, auto& metadata) { metadata["config"] = "{"; }));
  CHECK_THROWS(FormatError, "no such tensor", parse_changed([](auto& tensors, auto&) { tensors.pop_back(); }));
  CHECK_THROWS(FormatError, "an unexpected tensor",
               parse_changed([](auto& tensors, auto&) { tensors.push_back({"x", DType::f32, {0}, nullptr}); }));
  CHECK_THROWS(FormatError, "an unexpected tensor",
               parse_changed([](auto&, auto& metadata) { metadata["has_training_state"] = "0"; }));
  CHECK_THROWS(FormatError, "another dtype or shape",
               parse_changed([](auto& tensors, auto&) { std::swap(tensors[0].shape[0], tensors[0].shape[1]); }));
  const std::vector<float> negative(512, -1), infinite(512, std::numeric_limits<float>::infinity());
  const auto place = [](std::vector<TensorToWrite>& tensors, const std::string& prefix, const float* data) {
    for (TensorToWrite& tensor : tensors)
      if (tensor.name.rfind(prefix, 0) == 0) tensor.data = data;
  };
  CHECK_THROWS(FormatError, "exp_avg_sq.base_model",
               parse_changed([&](auto& tensors, auto&) { place(tensors, "exp_avg_sq.", negative.data()); }));
  CHECK_THROWS(FormatError, "expected finite values",
               parse_changed([&](auto& tensors, auto&) { place(tensors, "master.", infinite.data()); }));
  CHECK_EQ(parse_changed([&](auto& tensors, auto&) { place(tensors, "gradients.", infinite.data()); }), 12);
  for (size_t n = 0; n < bytes.size(); n += 13) {
    const std::string cut = bytes.substr(0, n);
    CHECK_THROWS(FormatError, "s", parse_snapshot(cut, "s", small_model(), 8));
  }
  CHECK_THROWS(InvalidArgument, "[lora] r: expected 1 to 2", parse_snapshot(bytes, "s", small_model(), 2));
  ModelConfig other = small_model();
  other.intermediate_size = 25;
  CHECK_THROWS(FormatError, "may belong to another model", parse_snapshot(bytes, "s", other, 8));
  AdapterSnapshot broken = snapshot;
  broken.exp_avg.a.clear();
  CHECK_THROWS(InvalidArgument, "exp_avg.: expected A and B of 4 targets", snapshot_bytes(broken));
}
