// The base model's weights: binding by name with every mistake refused by name, random weights, and placing them in host memory
// (without a copy where possible), converted, shared between engines, or joined and uploaded to a device.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"
#include "fake_device.h"
#include "io/hf_config.h"
#include "io/safetensors.h"
#include "model/base_weights.h"

namespace loquetier::test {
namespace {

std::string config_json(bool tied, bool bias) {
  return std::string(
             R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "torch_dtype": "float32", "attention_bias": )") +
         (bias ? "true" : "false") + ", \"tie_word_embeddings\": " + (tied ? "true" : "false") + "}";
}

using Tensors = std::map<std::string, HostTensor>;

// Values count up from the tensor's place in the model, small enough for bf16 to hold them exactly.
Tensors tensors_of(bool tied, bool bias) {
  Tensors tensors;
  float start = 0;
  const auto put = [&](const std::string& name, std::vector<int64_t> shape) {
    const int64_t n = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    auto data = std::make_shared<std::vector<float>>();
    for (int64_t i = 0; i < n; ++i) data->push_back(static_cast<float>(static_cast<int>(start + static_cast<float>(i)) % 200));
    start += 7;
    tensors[name] = {data->data(), "f32", std::move(shape), data};
  };
  put("model.embed_tokens.weight", {11, 8});
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    put(layer + "input_layernorm.weight", {8});
    put(layer + "post_attention_layernorm.weight", {8});
    for (const auto& [name, out] : std::vector<std::pair<std::string, int64_t>>{{"q", 8}, {"k", 4}, {"v", 4}, {"o", 8}}) {
      put(layer + "self_attn." + name + "_proj.weight", {out, 8});
      if (bias) put(layer + "self_attn." + name + "_proj.bias", {out});
    }
    put(layer + "mlp.gate_proj.weight", {12, 8});
    put(layer + "mlp.up_proj.weight", {12, 8});
    put(layer + "mlp.down_proj.weight", {8, 12});
  }
  put("model.norm.weight", {8});
  if (!tied) put("lm_head.weight", {11, 8});
  return tensors;
}

const void* data_of(const Tensors& tensors, const std::string& name) { return tensors.at(name).data; }

TEST(host_weights_are_not_copied) {
  const Tensors tensors = tensors_of(false, true);
  const auto base = BaseModel::from_tensors(config_json(false, true), tensors);
  const auto ops = make_cpu_ops(1, false);
  const auto placed = place_weights(base, *ops);
  CHECK_EQ(placed->bytes(), size_t{4});  // inv_freq [D/2], D = 2
  CHECK(placed->table.embedding.data == data_of(tensors, "model.embed_tokens.weight"));
  const LayerWeights& layer = placed->table.layers[1];
  const std::vector<std::string> names = {"q", "k", "v"};
  CHECK_EQ(layer.qkv.size(), size_t{3});
  for (size_t i = 0; i < 3; ++i) {
    const std::string name = "model.layers.1.self_attn." + names[i] + "_proj.";
    CHECK(layer.qkv[i].w.data == data_of(tensors, name + "weight") && layer.qkv[i].bias.data == data_of(tensors, name + "bias"));
    CHECK_EQ(layer.qkv[i].w.rows, i == 0 ? 8 : 4);
  }
  CHECK(layer.gate_up[1].w.data == data_of(tensors, "model.layers.1.mlp.up_proj.weight"));
  CHECK(placed->table.lm_head[0].w.data == data_of(tensors, "lm_head.weight"));
  CHECK_EQ(layer.o[0].bias.cols, 8);
  CHECK(layer.down[0].bias.empty());

  const auto other = make_cpu_ops(2, true);
  CHECK(place_weights(base, *other) == placed);  // engines share it
  CHECK_EQ(base->num_parameters(), 2 * 88 + 8 + 2 * (16 + 64 + 8 + 32 + 4 + 32 + 4 + 64 + 8 + 3 * 96));
}

TEST(tied_heads_are_the_embedding) {
  Tensors tensors = tensors_of(true, false);
  const auto ops = make_cpu_ops(1, false);
  const auto base = BaseModel::from_tensors(config_json(true, false), tensors);
  const auto placed = place_weights(base, *ops);
  CHECK(placed->table.lm_head[0].w.data == placed->table.embedding.data);
  CHECK_EQ(base->num_parameters(), 88 + 8 + 2 * (16 + 64 + 32 + 32 + 64 + 3 * 96));
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"];  // as a state_dict has it
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"];
  CHECK_EQ(BaseModel::from_tensors(config_json(true, false), tensors)->vocab_size(), 11);
}

TEST(wrong_tensors_are_refused_by_name) {
  const auto load = [](const Tensors& tensors) { return BaseModel::from_tensors(config_json(false, false), tensors); };
  const Tensors good = tensors_of(false, false);
  CHECK(load(good) != nullptr);
  for (const auto& [name, tensor] : good) {
    Tensors bad = good;
    bad.erase(name);
    CHECK_THROWS(InvalidArgument, name, load(bad));
    bad = good;
    bad[name].shape.back() += 1;
    CHECK_THROWS(InvalidArgument, name, load(bad));
    bad = good;
    bad[name].shape.push_back(1);
    CHECK_THROWS(InvalidArgument, name, load(bad));
    bad = good;
    bad[name].dtype = "i8";
    CHECK_THROWS(InvalidArgument, name, load(bad));
    bad = good;
    bad[name].data = nullptr;
    CHECK_THROWS(InvalidArgument, name, load(bad));
  }
  Tensors bad = good;
  bad["model.layers.2.mlp.up_proj.weight"] = good.at("model.layers.1.mlp.up_proj.weight");
  CHECK_THROWS(InvalidArgument, "model.layers.2.mlp.up_proj.weight", load(bad));
  bad = good;
  bad["model.layers.0.self_attn.q_proj.bias"] = good.at("model.norm.weight");
  CHECK_THROWS(InvalidArgument, "q_proj.bias", load(bad));
  bad = good;
  bad["model.norm.weight"].shape = {int64_t{1} << 40, int64_t{1} << 40};
  CHECK_THROWS(InvalidArgument, "overflows", load(bad));
  bad["model.norm.weight"].shape = {-8};
  CHECK_THROWS(InvalidArgument, "model.norm.weight", load(bad));
}

// A folder of the test's own, removed at the end.
struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("loquetier_weights_" + std::to_string(reinterpret_cast<uintptr_t>(this)));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

void write_model(const std::filesystem::path& folder, const Tensors& tensors, DType dtype, const std::string& config) {
  std::vector<std::vector<std::byte>> storage;
  std::vector<TensorToWrite> list;
  for (const auto& [name, tensor] : tensors) {
    const int64_t n = std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    storage.emplace_back(static_cast<size_t>(n) * size_of(dtype));
    convert_elements(tensor.data, DType::f32, storage.back().data(), dtype, n);
    list.push_back({name, dtype, tensor.shape, storage.back().data()});
  }
  write_file_atomically(folder / "model.safetensors", safetensors_bytes(list, {}));
  write_file_atomically(folder / "config.json", config);
}

bool same_values(TensorView view, const HostTensor& tensor) {
  return std::memcmp(view.data, tensor.data, static_cast<size_t>(view.size()) * sizeof(float)) == 0;
}

TEST(folders_load_mapped_or_converted_once) {
  const Tensors tensors = tensors_of(false, true);
  const auto ops = make_cpu_ops(1, false);
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Folder folder;
    write_model(folder.path, tensors, dtype, config_json(false, true));
    const auto base = BaseModel::load(folder.path);
    const auto placed = place_weights(base, *ops);
    CHECK(same_values(placed->table.layers[1].gate_up[0].w, tensors.at("model.layers.1.mlp.gate_proj.weight")));
    CHECK(same_values(placed->table.layers[0].qkv[2].bias, tensors.at("model.layers.0.self_attn.v_proj.bias")));
    CHECK(same_values(placed->table.final_norm, tensors.at("model.norm.weight")));
    CHECK_EQ(placed->bytes(), dtype == DType::f32 ? size_t{4} : static_cast<size_t>(4 * base->num_parameters() + 4));
    CHECK_EQ(base->family(), std::string("llama"));

    Tensors fewer = tensors;
    fewer.erase("model.layers.1.mlp.down_proj.weight");
    write_model(folder.path, fewer, dtype, config_json(false, true));
    CHECK_THROWS(FormatError, "model.layers.1.mlp.down_proj.weight", BaseModel::load(folder.path));
    CHECK_THROWS(FormatError, folder.path.string(), BaseModel::load(folder.path));
    write_model(folder.path, tensors, dtype, config_json(false, false));
    CHECK_THROWS(FormatError, "not expected", BaseModel::load(folder.path));
  }
  CHECK_THROWS(NotFound, "config.json", BaseModel::load("no_such_folder"));
}

TEST(devices_get_joined_matrices) {
  const Tensors tensors = tensors_of(false, true);
  const auto base = BaseModel::from_tensors(config_json(false, true), tensors);
  for (DType dtype : {DType::f32, DType::bf16}) {
    FakeDevice device;
    {
      const auto placed = place_weights_on(base, device, dtype);
      const auto values = [&](TensorView view) {  // back on the host, f32
        std::vector<std::byte> bytes(static_cast<size_t>(view.size()) * size_of(view.dtype));
        device.copy_to_host(bytes.data(), view.data, bytes.size());
        std::vector<float> out(static_cast<size_t>(view.size()));
        convert_elements(bytes.data(), view.dtype, out.data(), DType::f32, view.size());
        return out;
      };
      const auto expected = [&](const std::vector<std::string>& names) {
        std::vector<float> all;
        for (const std::string& name : names) {
          const HostTensor& t = tensors.at("model.layers.1." + name);
          const int64_t n = std::accumulate(t.shape.begin(), t.shape.end(), int64_t{1}, std::multiplies<>());
          all.insert(all.end(), static_cast<const float*>(t.data), static_cast<const float*>(t.data) + n);
        }
        return all;
      };
      const LayerWeights& layer = placed->table.layers[1];
      CHECK_EQ(layer.qkv.size(), size_t{1});
      CHECK_EQ(layer.qkv[0].w.rows, 16);
      CHECK_EQ(layer.qkv[0].w.cols, 8);
      CHECK(layer.qkv[0].w.dtype == dtype);
      CHECK(values(layer.qkv[0].w) == expected({"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}));
      CHECK(values(layer.qkv[0].bias) == expected({"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}));
      CHECK(values(layer.gate_up[0].w) == expected({"mlp.gate_proj.weight", "mlp.up_proj.weight"}));
      CHECK(layer.gate_up[0].bias.empty());
      CHECK(values(layer.down[0].w) == expected({"mlp.down_proj.weight"}));
      CHECK(values(layer.post_norm) == expected({"post_attention_layernorm.weight"}));
      CHECK_EQ(placed->inv_freq.cols, 1);
      CHECK_EQ(values(placed->inv_freq)[0], 1.0f);
      CHECK_EQ(placed->bytes(), static_cast<size_t>(base->num_parameters()) * size_of(dtype) + 4);
    }
    CHECK_EQ(device.allocations(), size_t{0});
  }
}

TEST(large_tensors_go_through_a_bounded_staging_buffer) {
  // The embedding alone is 51 MB in bf16: more than one piece.
  const std::string config =
      R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100000, "hidden_size": 256,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": true})";
  const auto base = BaseModel::random(config, 3, "f32");
  FakeDevice device;
  const auto placed = place_weights_on(base, device, DType::bf16);
  CHECK(device.largest_host <= size_t{64} << 20);
  CHECK(device.uploads > 3);
  const TensorView host = base->weights().host.embedding, remote = placed->table.embedding;
  std::vector<uint16_t> want(static_cast<size_t>(host.size())), got(want.size());
  convert_elements(host.data, DType::f32, want.data(), DType::bf16, host.size());
  device.copy_to_host(got.data(), remote.data, got.size() * 2);
  CHECK(got == want);
}

TEST(random_weights_are_normal_and_repeatable) {
  const std::string config = config_json(false, true);
  const auto first = BaseModel::random(config, 5), again = BaseModel::random(config, 5), other = BaseModel::random(config, 6);
  const TensorView a = first->weights().host.layers[1].down[0].w, b = again->weights().host.layers[1].down[0].w,
                   c = other->weights().host.layers[1].down[0].w;
  CHECK(std::memcmp(a.data, b.data, static_cast<size_t>(a.size()) * 4) == 0);
  CHECK(std::memcmp(a.data, c.data, static_cast<size_t>(a.size()) * 4) != 0);
  CHECK_EQ(first->weights().host.final_norm.as<float>()[7], 1.0f);

  const auto large =
      BaseModel::random(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 5000, "hidden_size": 200,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": true})",
                        1, "bf16");
  const TensorView e = large->weights().host.embedding;
  CHECK(e.dtype == DType::bf16);
  std::vector<float> values(static_cast<size_t>(e.size()));
  convert_elements(e.data, e.dtype, values.data(), DType::f32, e.size());
  double sum = 0, squares = 0, fourth = 0;
  for (float v : values) {
    const double z = v / 0.02;
    sum += z;
    squares += z * z;
    fourth += z * z * z * z;
  }
  const double n = static_cast<double>(values.size());  // 1e6: the bounds are 5 standard errors
  CHECK_NEAR(sum / n, 0, 5e-3);
  CHECK_NEAR(squares / n, 1, 7.1e-3);
  CHECK_NEAR(fourth / n, 3, 5e-2);
  CHECK_THROWS(InvalidArgument, "f64", BaseModel::random(config, 0, "f64"));
}

}  // namespace
}  // namespace loquetier::test
