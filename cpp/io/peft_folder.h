// PEFT adapter folders (adapter_config.json + adapter_model.safetensors) in and out, exactly, and the resolution of a LoraConfig
// against a model's modules with PEFT's own matching rules (suffix match for lists, re.fullmatch for strings, layers_to_transform,
// exclude_modules, rank_pattern and alpha_pattern by suffix regex, first match). Every key that changes the maths is honoured or
// refused by its name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "loquetier/options.h"
#include "model/model_config.h"

namespace loquetier {

// One adapted projection of a resolved configuration.
struct LoraTarget {
  ModuleInfo module;
  int rank = 0;
  double alpha = 0;
  float scale = 0;  // alpha / rank, or alpha / sqrt(rank)
};

// Targets in modules_of() order. Throws InvalidArgument by field name (no module matches, rank out of 1..max_rank, unknown
// initialisation, …).
std::vector<LoraTarget> resolve_lora_config(const LoraConfig& config, const ModelConfig& model, int max_rank);

// Host weights of one adapter: for target i, a[i] [rank, in] and b[i] [out, rank], f32.
struct LoraWeights {
  std::vector<std::vector<float>> a;
  std::vector<std::vector<float>> b;
};

// Initial values as PEFT draws them in distribution (Kaiming-uniform A, zero B, …), from config.seed, independent of the platform.
LoraWeights initial_lora_weights(const LoraConfig& config, const std::vector<LoraTarget>& targets);

std::string peft_key(const ModuleInfo& module, char ab);  // "base_model.model.<module>.lora_A.weight"

// A base weight that PEFT stores beside an adapter of lm_head (`lm_head.base_layer.weight`) and puts in place of the model's own
// when it loads the folder. It is accepted only when it is what the model has: whoever holds the model's weights calls
// check_base_copy().
struct BaseCopy {
  TensorEntry tensor;                         // its name is the key in the file; [out, in]
  ModuleInfo module;                          // whose base weight it is
  std::shared_ptr<const MappedFile> mapping;  // keeps its data alive
};

struct PeftAdapter {
  LoraConfig config;
  std::vector<LoraTarget> targets;
  LoraWeights weights;
  DType stored_dtype = DType::f32;    // of the file (f32 when it mixes dtypes), so that a round trip is bit-exact
  std::vector<BaseCopy> base_copies;  // not written by save_peft_folder: PEFT then keeps the model's own
};

// FormatError when the copy differs from the model's weight [out, in] (host memory; f32, f16 or bf16), rounded to the copy's dtype.
void check_base_copy(const BaseCopy& copy, TensorView weight);

// FormatError / InvalidArgument / NotFound, naming file and key or tensor. Non-finite values are refused.
PeftAdapter parse_peft_adapter(LoraConfig config, const SafetensorsFile& file, const std::string& where, const ModelConfig& model,
                               int max_rank);
PeftAdapter load_peft_folder(const std::filesystem::path& folder, const ModelConfig& model, int max_rank);
// Text of an adapter_config.json; nothing is checked against a model.
LoraConfig parse_peft_config(const std::string& json, const std::string& where);
std::string peft_config_json(const LoraConfig& config, const std::vector<LoraTarget>& targets, const std::string& base_model_name);
// Writes the folder atomically; tensors in stored_dtype. Other files of an existing folder (README.md, a tokenizer) stay.
void save_peft_folder(const std::filesystem::path& folder, const PeftAdapter& adapter, const std::string& base_model_name);

}  // namespace loquetier
