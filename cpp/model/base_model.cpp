// BaseModel: binds named tensors (a checkpoint's, the caller's, random ones) to the weight table. One list of expected tensors,
// visit_tensors(), serves all three, so that what is loaded, checked and generated cannot differ. Names are those of Hugging Face
// checkpoints.
#include "loquetier/base_model.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>

#include "core/parallel.h"
#include "core/random.h"
#include "io/hf_config.h"
#include "io/safetensors.h"
#include "model/base_weights.h"

namespace loquetier {

namespace {

constexpr float kRandomDeviation = 0.02f;

enum class Role { matrix, norm, bias };

// Calls visit(name, shape, role, slot) for every tensor of the model; slot is where the table wants its view.
template <class Visit>
void visit_tensors(const ModelConfig& config, WeightTable& table, const Visit& visit) {
  const int64_t h = config.hidden_size, f = config.intermediate_size, d = config.head_size;
  const int64_t q = config.num_heads * d, k = config.num_kv_heads * d;
  const auto block = [&](LinearWeights& linear, size_t i, const std::string& module, int64_t out, int64_t in, bool bias) {
    if (linear.size() <= i) linear.resize(i + 1);
    visit(module + ".weight", std::vector<int64_t>{out, in}, Role::matrix, linear[i].w);
    if (bias) visit(module + ".bias", std::vector<int64_t>{out}, Role::bias, linear[i].bias);
  };

  visit("model.embed_tokens.weight", std::vector<int64_t>{config.vocab_size, h}, Role::matrix, table.embedding);
  table.layers.resize(static_cast<size_t>(config.num_layers));
  for (size_t l = 0; l < table.layers.size(); ++l) {
    LayerWeights& layer = table.layers[l];
    const std::string name = "model.layers." + std::to_string(l), attn = name + ".self_attn", mlp = name + ".mlp";
    visit(name + ".input_layernorm.weight", std::vector<int64_t>{h}, Role::norm, layer.input_norm);
    block(layer.qkv, 0, attn + ".q_proj", q, h, config.qkv_bias);
    block(layer.qkv, 1, attn + ".k_proj", k, h, config.qkv_bias);
    block(layer.qkv, 2, attn + ".v_proj", k, h, config.qkv_bias);
    if (config.qk_norm) {
      visit(attn + ".q_norm.weight", std::vector<int64_t>{d}, Role::norm, layer.q_norm);
      visit(attn + ".k_norm.weight", std::vector<int64_t>{d}, Role::norm, layer.k_norm);
    }
    block(layer.o, 0, attn + ".o_proj", h, q, config.o_bias);
    visit(name + ".post_attention_layernorm.weight", std::vector<int64_t>{h}, Role::norm, layer.post_norm);
    block(layer.gate_up, 0, mlp + ".gate_proj", f, h, config.mlp_bias);
    block(layer.gate_up, 1, mlp + ".up_proj", f, h, config.mlp_bias);
    block(layer.down, 0, mlp + ".down_proj", h, f, config.mlp_bias);
  }
  visit("model.norm.weight", std::vector<int64_t>{h}, Role::norm, table.final_norm);
  if (config.tie_word_embeddings) table.lm_head = {{table.embedding, {}}};
  else block(table.lm_head, 0, "lm_head", config.vocab_size, h, false);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

TensorView view_of(void* data, DType dtype, const std::vector<int64_t>& shape) {
  return shape.size() == 1 ? vector(data, dtype, shape[0]) : matrix(data, dtype, shape[0], shape[1]);
}

// Fills the host table from named tensors. E is the class of errors about their content.
template <class E>
void bind_tensors(BaseWeights& weights, const std::map<std::string, TensorEntry>& tensors, const std::string& where) {
  std::set<std::string> unused;
  for (const auto& [name, entry] : tensors) unused.insert(name);
  const auto check = [&](const TensorEntry& entry, const std::vector<int64_t>& shape) {
    require<E>(entry.shape == shape, where, " tensor '", entry.name, "': expected shape ", shape_text(shape), ", got ",
               shape_text(entry.shape));
    require<E>(entry.dtype == DType::f32 || entry.dtype == DType::f16 || entry.dtype == DType::bf16, where, " tensor '", entry.name,
               "': expected dtype f32, f16 or bf16, got ", name_of(entry.dtype));
  };
  visit_tensors(weights.config, weights.host,
                [&](const std::string& name, const std::vector<int64_t>& shape, Role, TensorView& slot) {
                  const auto found = tensors.find(name);
                  require<E>(found != tensors.end(), where, " tensor '", name, "': expected shape ", shape_text(shape),
                             " by the config, but it is missing");
                  check(found->second, shape);
                  unused.erase(name);
                  slot = view_of(const_cast<void*>(found->second.data), found->second.dtype, shape);
                });
  // A tied head may be stored beside the embedding it is a copy of; old Llama files carry a rope table.
  if (const auto head = tensors.find("lm_head.weight"); weights.config.tie_word_embeddings && head != tensors.end()) {
    check(head->second, {weights.config.vocab_size, weights.config.hidden_size});
    unused.erase(head->first);
  }
  std::erase_if(unused, [](const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); });
  require<E>(unused.empty(), where, " tensor '", unused.empty() ? "" : *unused.begin(), "': not expected in a ",
             weights.config.family, " model with this config (", unused.size(), " such tensors)");
}

DType parse_dtype(const std::string& name, const std::string& where) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument(concat(where, ": expected dtype 'f32', 'f16' or 'bf16', got '", name, "'"));
}

// out[i] = deviation * normal(key, begin + i), by the Box-Muller transform of Philox uniforms; begin is a multiple of 4.
void fill_normal(uint64_t key, int64_t begin, int64_t n, float deviation, float* out) {
  for (int64_t i = 0; i < n; i += 4) {
    const Philox4 bits = philox(key, static_cast<uint64_t>(begin + i) / 4, 0);
    float value[4];
    for (int pair = 0; pair < 2; ++pair) {
      const float radius = deviation * std::sqrt(-2.0f * std::log(uniform01(bits.v[2 * pair])));
      const float angle = 2.0f * std::numbers::pi_v<float> * uniform01(bits.v[2 * pair + 1]);
      value[2 * pair] = radius * std::cos(angle);
      value[2 * pair + 1] = radius * std::sin(angle);
    }
    std::copy_n(value, std::min<int64_t>(4, n - i), out + i);
  }
}

}  // namespace

std::shared_ptr<const BaseModel> BaseModel::load(const std::filesystem::path& folder) {
  auto weights = std::make_unique<BaseWeights>();
  weights->config = load_hf_config(folder);
  CheckpointTensors checkpoint = open_checkpoint(folder);
  bind_tensors<FormatError>(*weights, checkpoint.tensors, "[load] " + folder.string());
  weights->owners.assign(checkpoint.mappings.begin(), checkpoint.mappings.end());
  return std::make_shared<BaseModel>(std::move(weights));
}

std::shared_ptr<const BaseModel> BaseModel::from_tensors(const std::string& config_json,
                                                         std::map<std::string, HostTensor> tensors) {
  auto weights = std::make_unique<BaseWeights>();
  weights->config = parse_hf_config(config_json, "config");
  std::map<std::string, TensorEntry> entries;
  for (auto& [name, tensor] : tensors) {
    const DType dtype = parse_dtype(tensor.dtype, "[from_tensors] tensor '" + name + "'");
    require(tensor.data != nullptr, "[from_tensors] tensor '", name, "': expected data, got a null pointer");
    int64_t size = 1;
    for (int64_t extent : tensor.shape) {
      require(extent >= 0, "[from_tensors] tensor '", name, "': expected extents >= 0, got ", shape_text(tensor.shape));
      require(!__builtin_mul_overflow(size, extent, &size), "[from_tensors] tensor '", name, "': shape ", shape_text(tensor.shape),
              " overflows");
    }
    entries[name] = {name, dtype, tensor.shape, tensor.data, static_cast<size_t>(size) * size_of(dtype)};
    if (tensor.owner) weights->owners.push_back(std::move(tensor.owner));
  }
  bind_tensors<InvalidArgument>(*weights, entries, "[from_tensors]");
  return std::make_shared<BaseModel>(std::move(weights));
}

std::shared_ptr<const BaseModel> BaseModel::random(const std::string& config_json, uint64_t seed, const std::string& dtype_name) {
  constexpr int64_t kPiece = 1 << 16;
  const DType dtype = parse_dtype(dtype_name, "[random] dtype");
  auto weights = std::make_unique<BaseWeights>();
  weights->config = parse_hf_config(config_json, "config");
  ThreadPool threads(0);
  uint64_t index = 0;
  visit_tensors(weights->config, weights->host,
                [&](const std::string&, const std::vector<int64_t>& shape, Role role, TensorView& slot) {
                  int64_t size = 1;
                  for (int64_t extent : shape) size *= extent;
                  std::shared_ptr<void> data = allocate_weights(static_cast<size_t>(size) * size_of(dtype));
                  const uint64_t key = mix_key(seed, index++);
                  threads.parallel_for((size + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
                    std::vector<float> values(static_cast<size_t>(std::min(size, kPiece)), 1.0f);
                    for (int64_t piece = first; piece < last; ++piece) {
                      const int64_t begin = piece * kPiece, n = std::min(kPiece, size - begin);
                      if (role != Role::norm) fill_normal(key, begin, n, kRandomDeviation, values.data());
                      convert_elements(values.data(), DType::f32,
                                       static_cast<std::byte*>(data.get()) + static_cast<size_t>(begin) * size_of(dtype), dtype, n);
                    }
                  });
                  slot = view_of(data.get(), dtype, shape);
                  weights->owners.push_back(std::move(data));
                });
  return std::make_shared<BaseModel>(std::move(weights));
}

BaseModel::BaseModel(std::unique_ptr<BaseWeights> weights) : weights_(std::move(weights)) {
  require(weights_ != nullptr, "[base model] weights: expected weights, got none");
}
BaseModel::~BaseModel() = default;

int64_t BaseModel::vocab_size() const { return weights_->config.vocab_size; }
int64_t BaseModel::max_positions() const { return weights_->config.max_positions; }
int64_t BaseModel::num_layers() const { return weights_->config.num_layers; }
std::string BaseModel::family() const { return weights_->config.family; }
const std::vector<int32_t>& BaseModel::eos_token_ids() const { return weights_->config.eos_token_ids; }

int64_t BaseModel::num_parameters() const {
  const ModelConfig& config = weights_->config;
  int64_t total = 0;
  WeightTable shape_only;
  visit_tensors(config, shape_only, [&](const std::string&, const std::vector<int64_t>& shape, Role, TensorView&) {
    int64_t size = 1;
    for (int64_t extent : shape) size *= extent;
    total += size;
  });
  return total;
}

}  // namespace loquetier
