// What a configuration implies: the shapes of the fused linears, the projections that adapters may target, rotary frequencies. See
// model_config.h.
#include "model/model_config.h"

#include <cmath>
#include <numbers>

namespace loquetier {

namespace {

// Parts of each fused linear of a layer: their names under model.layers.N, in the order of the columns.
struct SiteParts {
  Site site;
  int parts;
  const char* names[kMaxParts];
};
constexpr SiteParts kSites[] = {{Site::qkv, 3, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
                                {Site::o, 1, {"self_attn.o_proj"}},
                                {Site::gate_up, 2, {"mlp.gate_proj", "mlp.up_proj"}},
                                {Site::down, 1, {"mlp.down_proj"}}};

}  // namespace

AttentionShape ModelConfig::attention() const {
  return {num_heads, num_kv_heads, head_size, static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size)))};
}

LoraLinear lora_linear(const ModelConfig& config, int32_t site) {
  require(site >= 0 && site < site_count(config), "[model] site: expected 0 to ", site_count(config) - 1, ", got ", site);
  const int64_t h = config.hidden_size, f = config.intermediate_size, d = config.head_size;
  const int64_t q = config.num_heads * d, kv = config.num_kv_heads * d;
  if (site == lm_head_site(config)) return {site, 1, h, {config.vocab_size, 0, 0}};
  switch (static_cast<Site>(site % 4)) {
    case Site::qkv:
      return {site, 3, h, {q, kv, kv}};
    case Site::o:
      return {site, 1, q, {h, 0, 0}};
    case Site::gate_up:
      return {site, 2, h, {f, f, 0}};
    case Site::down:
      break;
  }
  return {site, 1, f, {h, 0, 0}};
}

std::vector<ModuleInfo> modules_of(const ModelConfig& config) {
  std::vector<ModuleInfo> modules;
  modules.reserve(static_cast<size_t>(config.num_layers) * 7 + 1);
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (const SiteParts& fused : kSites) {
      const LoraLinear linear = lora_linear(config, site_of(layer, fused.site));
      for (int32_t part = 0; part < fused.parts; ++part) {
        modules.push_back({"model.layers." + std::to_string(layer) + "." + fused.names[part], linear.site, part, layer, linear.in,
                           linear.out[part]});
      }
    }
  }
  modules.push_back({"lm_head", lm_head_site(config), 0, -1, config.hidden_size, config.vocab_size});
  return modules;
}

// Every step in f32 and in transformers' order of operations (a scalar divided by a tensor is the tensor's reciprocal times the
// scalar), so that the numbers are the same but for the last bit of pow().
std::vector<float> rope_inv_freq(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  require(scaling.type == "default" || scaling.type == "linear" || scaling.type == "llama3",
          "[rope] type: expected default, linear or llama3, got '", scaling.type, "'");
  const auto theta = static_cast<float>(config.rope_theta), size = static_cast<float>(config.head_size);
  const auto factor = static_cast<float>(scaling.factor);
  const auto low = static_cast<float>(scaling.low_freq_factor);
  const auto band = static_cast<float>(scaling.high_freq_factor - scaling.low_freq_factor);
  const auto old_length = static_cast<float>(scaling.original_max_positions);
  const auto longest = static_cast<float>(static_cast<double>(scaling.original_max_positions) / scaling.low_freq_factor);
  const auto shortest = static_cast<float>(static_cast<double>(scaling.original_max_positions) / scaling.high_freq_factor);

  std::vector<float> frequencies(static_cast<size_t>(config.head_size / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float frequency = 1.0f / std::pow(theta, static_cast<float>(2 * i) / size);
    float& result = frequencies[i];
    result = frequency;
    if (scaling.type == "linear") {
      result = frequency / factor;
    } else if (scaling.type == "llama3") {
      // Wavelengths up to `shortest` stay, from `longest` on they are stretched by the factor, between the two mixes linearly.
      const float wavelength = (1.0f / frequency) * static_cast<float>(2 * std::numbers::pi);
      if (wavelength > longest) result = frequency / factor;
      if (!(wavelength < shortest) && !(wavelength > longest)) {
        const float smooth = ((1.0f / wavelength) * old_length - low) / band;
        result = (1.0f - smooth) * frequency / factor + smooth * frequency;
      }
    }
  }
  return frequencies;
}

}  // namespace loquetier
