// A live adapter as the bytes of one safetensors file: its configuration as PEFT's JSON plus the seed, counters as decimal text in
// the metadata, tensors under "master.", "exp_avg.", "exp_avg_sq." and "gradients.", all f32. What is read is checked as strictly
// as a PEFT folder. See checkpoint.h.
#include "io/checkpoint.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <set>

#include "io/safetensors.h"

namespace loquetier {

namespace {

constexpr const char* kFormat = "loquetier-adapter-1";

struct Section {
  const char* prefix;
  LoraWeights AdapterSnapshot::* weights;
  bool finite;  // gradients under way may hold an overflow: the optimizer will skip that update
  bool non_negative;
};
constexpr std::array<Section, 4> kSections = {{{"master.", &AdapterSnapshot::weights, true, false},
                                               {"exp_avg.", &AdapterSnapshot::exp_avg, true, false},
                                               {"exp_avg_sq.", &AdapterSnapshot::exp_avg_sq, true, true},
                                               {"gradients.", &AdapterSnapshot::gradients, false, false}}};

size_t section_count(const AdapterSnapshot& snapshot) { return snapshot.has_training_state ? kSections.size() : 1; }

class Metadata {
 public:
  Metadata(const std::map<std::string, std::string>& entries, const std::string& where) : entries_(entries), where_(where) {}

  const std::string& text(const std::string& key) const {
    const auto found = entries_.find(key);
    require<FormatError>(found != entries_.end(), "[snapshot] ", where_, ": ", key,
                         ": missing from the metadata; not a snapshot of an adapter");
    return found->second;
  }

  template <class Integer>
  Integer number(const std::string& key) const {
    const std::string& value = text(key);
    Integer result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    const bool whole = error == std::errc() && end == value.data() + value.size() && !value.empty() && value.front() != '-';
    require<FormatError>(whole, "[snapshot] ", where_, ": ", key, ": expected a number of at least 0, got '", value.substr(0, 40),
                         "'");
    return result;
  }

 private:
  const std::map<std::string, std::string>& entries_;
  const std::string& where_;
};

DType parse_stored_dtype(const std::string& name, const std::string& where) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    if (name == name_of(dtype)) return dtype;
  throw FormatError(concat("[snapshot] ", where, ": stored_dtype: expected f32, f16 or bf16, got '", name.substr(0, 40), "'"));
}

std::vector<float> read_tensor(const SafetensorsFile& file, const std::string& name, int64_t rows, int64_t cols,
                               const Section& section, const std::string& where) {
  const TensorEntry& tensor = file.at(name);
  require<FormatError>(tensor.dtype == DType::f32 && tensor.shape == std::vector<int64_t>{rows, cols}, "[snapshot] ", where, ": '",
                       name, "': expected F32 [", rows, ", ", cols,
                       "], got another dtype or shape; the adapter may belong to another model");
  std::vector<float> values(tensor.bytes / sizeof(float));
  convert_elements(tensor.data, DType::f32, values.data(), DType::f32, static_cast<int64_t>(values.size()));
  const bool ok = std::all_of(values.begin(), values.end(),
                              [&](float v) { return (!section.finite || std::isfinite(v)) && (!section.non_negative || v >= 0); });
  require<FormatError>(ok, "[snapshot] ", where, ": '", name, "': expected ",
                       section.non_negative ? "finite values of at least 0" : "finite values");
  return values;
}

}  // namespace

std::string snapshot_bytes(const AdapterSnapshot& snapshot) {
  std::vector<TensorToWrite> tensors;
  for (size_t s = 0; s < section_count(snapshot); ++s) {
    const LoraWeights& weights = snapshot.*kSections[s].weights;
    require(weights.a.size() == snapshot.targets.size() && weights.b.size() == snapshot.targets.size(), "[snapshot] ",
            kSections[s].prefix, ": expected A and B of ", snapshot.targets.size(), " targets, got ", weights.a.size(), " and ",
            weights.b.size());
    for (size_t i = 0; i < snapshot.targets.size(); ++i) {
      const LoraTarget& target = snapshot.targets[i];
      const auto add = [&](char ab, const std::vector<float>& values, int64_t rows, int64_t cols) {
        const std::string name = kSections[s].prefix + peft_key(target.module, ab);
        require(values.size() == static_cast<size_t>(rows * cols), "[snapshot] ", name, ": expected ", rows * cols, " values, got ",
                values.size());
        tensors.push_back({name, DType::f32, {rows, cols}, values.data()});
      };
      add('A', weights.a[i], target.rank, target.module.in);
      add('B', weights.b[i], target.module.out, target.rank);
    }
  }
  return safetensors_bytes(tensors, {{"format", kFormat},
                                     {"config", peft_config_json(snapshot.config, snapshot.targets, "")},
                                     {"seed", std::to_string(snapshot.config.seed)},
                                     {"version", std::to_string(snapshot.version)},
                                     {"stored_dtype", std::string(name_of(snapshot.stored_dtype))},
                                     {"has_training_state", snapshot.has_training_state ? "1" : "0"},
                                     {"optimizer_steps", std::to_string(snapshot.optimizer_steps)},
                                     {"dropout_counter", std::to_string(snapshot.dropout_counter)}});
}

AdapterSnapshot parse_snapshot(std::string_view bytes, const std::string& where, const ModelConfig& model, int max_rank) {
  const SafetensorsFile file = SafetensorsFile::parse(bytes, where);
  const Metadata metadata(file.metadata(), where);
  require<FormatError>(metadata.text("format") == kFormat, "[snapshot] ", where, ": format: expected '", kFormat, "', got '",
                       metadata.text("format").substr(0, 40), "'");
  AdapterSnapshot snapshot;
  snapshot.config = parse_peft_config(metadata.text("config"), where);
  snapshot.config.seed = metadata.number<uint64_t>("seed");
  snapshot.version = metadata.number<int64_t>("version");
  snapshot.stored_dtype = parse_stored_dtype(metadata.text("stored_dtype"), where);
  const int64_t training = metadata.number<int64_t>("has_training_state");
  require<FormatError>(training <= 1, "[snapshot] ", where, ": has_training_state: expected 0 or 1, got ", training);
  snapshot.has_training_state = training == 1;
  snapshot.optimizer_steps = metadata.number<int64_t>("optimizer_steps");
  snapshot.dropout_counter = metadata.number<uint64_t>("dropout_counter");
  snapshot.targets = resolve_lora_config(snapshot.config, model, max_rank);

  std::set<std::string> expected;
  for (size_t s = 0; s < section_count(snapshot); ++s) {
    const Section& section = kSections[s];
    LoraWeights& weights = snapshot.*section.weights;
    for (const LoraTarget& target : snapshot.targets) {
      const std::string a = section.prefix + peft_key(target.module, 'A'), b = section.prefix + peft_key(target.module, 'B');
      weights.a.push_back(read_tensor(file, a, target.rank, target.module.in, section, where));
      weights.b.push_back(read_tensor(file, b, target.module.out, target.rank, section, where));
      expected.insert({a, b});
    }
  }
  for (const auto& [name, tensor] : file.tensors())
    require<FormatError>(expected.count(name) > 0, "[snapshot] ", where, ": '", name, "': an unexpected tensor");
  require<FormatError>(file.unsupported().empty(), "[snapshot] ", where, ": '",
                       file.unsupported().empty() ? "" : file.unsupported().begin()->first, "': an unexpected tensor");
  return snapshot;
}

}  // namespace loquetier
