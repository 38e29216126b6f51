// The frozen base model: loaded once, shared by every adapter and by several engines in one process. Knows nothing of adapters.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace loquetier {

struct BaseWeights;  // internal

// A tensor of host memory handed in by the caller. `dtype`: "f32", "f16", "bf16". Row-major and dense.
struct HostTensor {
  const void* data = nullptr;
  std::string dtype = "f32";
  std::vector<int64_t> shape;
  std::shared_ptr<const void> owner;  // kept alive as long as the weights are in use (no copy where dtype and layout allow)
};

class BaseModel {
 public:
  // A Hugging Face folder: config.json and model.safetensors, or shards with model.safetensors.index.json. Families: Llama,
  // Mistral, Qwen2, Qwen3 (dense). The files are memory-mapped and must not be changed while the model lives. Throws FormatError
  // (content), InvalidArgument (unsupported model, named), NotFound (no such file).
  static std::shared_ptr<const BaseModel> load(const std::filesystem::path& folder);
  // Weights by their Hugging Face names, with the text of a config.json.
  static std::shared_ptr<const BaseModel> from_tensors(const std::string& config_json, std::map<std::string, HostTensor> tensors);
  // Random normal weights (standard deviation 0.02; norms 1) of a config's shape, for benchmarks. dtype "f32", "bf16" or "f16".
  static std::shared_ptr<const BaseModel> random(const std::string& config_json, uint64_t seed = 0,
                                                 const std::string& dtype = "f32");

  int64_t vocab_size() const;
  int64_t max_positions() const;
  int64_t num_layers() const;
  int64_t num_parameters() const;
  std::string family() const;                               // "llama", "mistral", "qwen2", "qwen3"
  const std::vector<int32_t>& eos_token_ids() const;        // from generation_config.json, else config.json
  const BaseWeights& weights() const { return *weights_; }  // internal

  explicit BaseModel(std::unique_ptr<BaseWeights> weights);
  ~BaseModel();

 private:
  std::unique_ptr<BaseWeights> weights_;
};

}  // namespace loquetier
