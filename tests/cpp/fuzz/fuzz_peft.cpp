// A first byte that picks the model, an adapter_config.json, and after a zero byte the bytes of an adapter_model.safetensors:
// refused with a loquetier::Error, or an adapter that fits the model; a configuration that is accepted reads back the same after it
// was written.
#include <cstdlib>

#include "io/peft_folder.h"
#include "models.h"

using namespace loquetier;

namespace {

bool same(const LoraConfig& a, const LoraConfig& b) {
  return a.r == b.r && a.lora_alpha == b.lora_alpha && a.lora_dropout == b.lora_dropout && a.use_rslora == b.use_rslora &&
         a.exclude_modules == b.exclude_modules && a.exclude_modules_is_regex == b.exclude_modules_is_regex &&
         a.layers_to_transform == b.layers_to_transform && a.rank_pattern == b.rank_pattern && a.alpha_pattern == b.alpha_pattern &&
         a.init_lora_weights == b.init_lora_weights && a.target_modules_is_regex == b.target_modules_is_regex;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  const size_t split = std::min(text.find('\0'), text.size());
  const ModelConfig model = fuzz_model(data[0] % 2 == 1);
  try {
    const LoraConfig config = parse_peft_config(std::string(text.substr(0, split)), "config");
    const std::vector<LoraTarget> targets = resolve_lora_config(config, model, 64);
    if (targets.empty()) std::abort();
    for (const LoraTarget& target : targets)
      if (target.rank < 1 || target.rank > 64 || target.module.in < 1 || target.module.out < 1) std::abort();
    const std::string written = peft_config_json(config, targets, "base");
    const LoraConfig again = parse_peft_config(written, "written");
    if (!same(config, again) || resolve_lora_config(again, model, 64).size() != targets.size()) std::abort();
    if (split == text.size()) return 0;
    const SafetensorsFile file = SafetensorsFile::parse(text.substr(split + 1), "weights");
    const PeftAdapter adapter = parse_peft_adapter(config, file, "weights", model, 64);
    for (size_t i = 0; i < targets.size(); ++i) {
      if (adapter.weights.a.at(i).size() != static_cast<size_t>(targets[i].rank * targets[i].module.in)) std::abort();
      if (adapter.weights.b.at(i).size() != static_cast<size_t>(targets[i].rank * targets[i].module.out)) std::abort();
    }
  } catch (const Error&) {
  }
  return 0;
}
