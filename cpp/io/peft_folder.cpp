// PEFT adapter folders: adapter_config.json and adapter_model.safetensors, checked against each other and against the model. See
// peft_folder.h.
#include "io/peft_folder.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

namespace loquetier {

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr const char* kBaseCopySuffix = ".base_layer.weight";

std::string peft_prefix(const std::string& module) { return "base_model.model." + module; }

// What a tensor that belongs to no target says about the adapter.
std::string explain_stranger(const std::string& name, const ModelConfig& model) {
  constexpr std::pair<const char*, const char*> kHints[] = {{"lora_magnitude_vector", "DoRA is not supported"},
                                                            {"lora_embedding_", "adapters of embeddings are not supported"},
                                                            {"modules_to_save", "modules_to_save is not supported"},
                                                            {".bias", "bias terms are not supported"},
                                                            {"token_adapter", "trainable_token_indices is not supported"}};
  for (const auto& [part, hint] : kHints)
    if (name.find(part) != std::string::npos) return hint;
  for (const ModuleInfo& module : modules_of(model))
    if (name == peft_key(module, 'A') || name == peft_key(module, 'B')) return "the configuration does not target " + module.name;
  return "the model has no such module; the adapter may belong to another model";
}

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

void check_shape(const TensorEntry& tensor, int64_t rows, int64_t cols, const std::string& where) {
  require<FormatError>(tensor.shape == std::vector<int64_t>{rows, cols}, "[lora] ", where, ": '", tensor.name,
                       "': shape: expected [", rows, ", ", cols, "], got ", show_shape(tensor.shape),
                       "; the adapter may belong to another model or have another rank");
  require<FormatError>(tensor.dtype == DType::f32 || tensor.dtype == DType::f16 || tensor.dtype == DType::bf16, "[lora] ", where,
                       ": '", tensor.name, "': dtype: expected F32, F16 or BF16, got ", name_of(tensor.dtype));
}

std::vector<float> read_values(const TensorEntry& tensor, const std::string& where) {
  std::vector<float> values(tensor.bytes / size_of(tensor.dtype));
  convert_elements(tensor.data, tensor.dtype, values.data(), DType::f32, static_cast<int64_t>(values.size()));
  const auto bad =
      std::find_if(values.begin(), values.end(), [](float v) { return (std::bit_cast<uint32_t>(v) & 0x7f800000u) == 0x7f800000u; });
  require<FormatError>(bad == values.end(), "[lora] ", where, ": '", tensor.name, "': expected finite values, got ",
                       bad == values.end() ? 0 : *bad, " at element ", bad - values.begin());
  return values;
}

}  // namespace

std::string peft_key(const ModuleInfo& module, char ab) { return peft_prefix(module.name) + ".lora_" + ab + ".weight"; }

PeftAdapter parse_peft_adapter(LoraConfig config, const SafetensorsFile& file, const std::string& where, const ModelConfig& model,
                               int max_rank) {
  PeftAdapter adapter;
  adapter.config = std::move(config);
  adapter.targets = resolve_lora_config(adapter.config, model, max_rank);

  // Every tensor that belongs there, then nothing else; the values last.
  std::set<std::string> expected;
  for (const LoraTarget& target : adapter.targets) {
    const std::string a = peft_key(target.module, 'A'), b = peft_key(target.module, 'B');
    check_shape(file.at(a), target.rank, target.module.in, where);
    check_shape(file.at(b), target.module.out, target.rank, where);
    expected.insert({a, b});
    const std::string copy = peft_prefix(target.module.name) + kBaseCopySuffix;
    if (target.module.layer >= 0 || !file.tensors().count(copy)) continue;
    check_shape(file.at(copy), target.module.out, target.module.in, where);
    expected.insert(copy);
    adapter.base_copies.push_back({file.at(copy), target.module, file.mapping()});
  }
  const auto check_expected = [&](const std::string& name) {
    if (expected.count(name)) return;
    throw FormatError(concat("[lora] ", where, ": '", name, "': an unexpected tensor: ", explain_stranger(name, model)));
  };
  for (const auto& [name, tensor] : file.tensors()) check_expected(name);
  for (const auto& [name, dtype] : file.unsupported()) check_expected(name);

  adapter.stored_dtype = file.at(peft_key(adapter.targets.front().module, 'A')).dtype;
  for (const LoraTarget& target : adapter.targets) {
    const TensorEntry &a = file.at(peft_key(target.module, 'A')), &b = file.at(peft_key(target.module, 'B'));
    if (a.dtype != adapter.stored_dtype || b.dtype != adapter.stored_dtype) adapter.stored_dtype = DType::f32;
    adapter.weights.a.push_back(read_values(a, where));
    adapter.weights.b.push_back(read_values(b, where));
  }
  return adapter;
}

PeftAdapter load_peft_folder(const fs::path& folder, const ModelConfig& model, int max_rank) {
  const fs::path config_path = folder / kConfigFile, weights_path = folder / kWeightsFile;
  LoraConfig config = parse_peft_config(read_text_file(config_path, 4u << 20), config_path.string());
  std::error_code ignored;
  if (!fs::exists(weights_path, ignored) && fs::exists(folder / "adapter_model.bin", ignored)) {
    throw InvalidArgument(concat("[lora] ", folder.string(),
                                 ": adapter_model.bin: pickled weights are not read; save the adapter again with "
                                 "safe_serialization=True, which gives ",
                                 kWeightsFile));
  }
  return parse_peft_adapter(std::move(config), SafetensorsFile::open(weights_path), weights_path.string(), model, max_rank);
}

void check_base_copy(const BaseCopy& copy, TensorView weight) {
  const TensorEntry& tensor = copy.tensor;
  require(weight.rows == copy.module.out && weight.cols == copy.module.in && weight.data != nullptr, "[lora] ", copy.module.name,
          ": expected a base weight [", copy.module.out, ", ", copy.module.in, "], got [", weight.rows, ", ", weight.cols, "]");
  const size_t row_bytes = static_cast<size_t>(weight.cols) * size_of(tensor.dtype);
  std::vector<std::byte> row(row_bytes);
  for (int64_t i = 0; i < weight.rows; ++i) {
    convert_elements(weight.at(i), weight.dtype, row.data(), tensor.dtype, weight.cols);
    const bool equal =
        std::memcmp(row.data(), static_cast<const std::byte*>(tensor.data) + static_cast<size_t>(i) * row_bytes, row_bytes) == 0;
    require<FormatError>(equal, "[lora] '", tensor.name, "': expected the model's own weight of ", copy.module.name,
                         ", got another one (row ", i, " differs); the adapter replaces base weights, which is not supported");
  }
}

void save_peft_folder(const fs::path& folder, const PeftAdapter& adapter, const std::string& base_model_name) {
  require(adapter.weights.a.size() == adapter.targets.size() && adapter.weights.b.size() == adapter.targets.size(),
          "[lora] weights: expected A and B of ", adapter.targets.size(), " targets, got ", adapter.weights.a.size(), " and ",
          adapter.weights.b.size());
  require(adapter.stored_dtype == DType::f32 || adapter.stored_dtype == DType::f16 || adapter.stored_dtype == DType::bf16,
          "[lora] stored_dtype: expected f32, f16 or bf16, got ", name_of(adapter.stored_dtype));
  std::vector<std::vector<std::byte>> storage;
  std::vector<TensorToWrite> tensors;
  const auto add = [&](const LoraTarget& target, char ab, const std::vector<float>& values, int64_t rows, int64_t cols) {
    require(values.size() == static_cast<size_t>(rows * cols), "[lora] ", peft_key(target.module, ab), ": expected ", rows * cols,
            " values, got ", values.size());
    storage.emplace_back(values.size() * size_of(adapter.stored_dtype));
    convert_elements(values.data(), DType::f32, storage.back().data(), adapter.stored_dtype, static_cast<int64_t>(values.size()));
    tensors.push_back({peft_key(target.module, ab), adapter.stored_dtype, {rows, cols}, storage.back().data()});
  };
  for (size_t i = 0; i < adapter.targets.size(); ++i) {
    const LoraTarget& target = adapter.targets[i];
    add(target, 'A', adapter.weights.a[i], target.rank, target.module.in);
    add(target, 'B', adapter.weights.b[i], target.module.out, target.rank);
  }
  write_folder_atomically(folder,
                          {{kConfigFile, peft_config_json(adapter.config, adapter.targets, base_model_name)},
                           {kWeightsFile, safetensors_bytes(tensors, {{"format", "pt"}})}},
                          OtherFiles::keep);
}

}  // namespace loquetier
