// The shape and constants of a decoder-only transformer of the Llama line. Families differ by these fields, not by code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace loquetier {

struct RopeScaling {
  std::string type = "default";  // "default", "linear", "llama3"
  double factor = 1;
  double low_freq_factor = 1;          // llama3
  double high_freq_factor = 4;         // llama3
  int64_t original_max_positions = 0;  // llama3
};

struct ModelConfig {
  std::string family;             // "llama", "mistral", "qwen2", "qwen3"
  int64_t vocab_size = 0;         // V
  int64_t hidden_size = 0;        // H
  int64_t intermediate_size = 0;  // F
  int64_t num_layers = 0;         // L
  int32_t num_heads = 0;          // Q
  int32_t num_kv_heads = 0;       // K
  int32_t head_size = 0;          // D, explicit or H / Q
  int64_t max_positions = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;  // Qwen2, or attention_bias of Llama
  bool o_bias = false;    // attention_bias of Llama
  bool mlp_bias = false;
  bool qk_norm = false;  // Qwen3
  std::vector<int32_t> eos_token_ids;
  std::string torch_dtype = "f32";  // of the checkpoint: "f32", "f16", "bf16"

  AttentionShape attention() const;  // scale = 1 / sqrt(D)
  int64_t qkv_columns() const { return int64_t{num_heads + 2 * num_kv_heads} * head_size; }
};

// The adapted linears of one layer, in the order of an adapter's site table: site = layer * 4 + index; lm_head is the last one.
enum class Site : int32_t { qkv = 0, o = 1, gate_up = 2, down = 3 };
inline int32_t site_of(int64_t layer, Site site) { return static_cast<int32_t>(layer) * 4 + static_cast<int32_t>(site); }
inline int32_t lm_head_site(const ModelConfig& config) { return static_cast<int32_t>(config.num_layers) * 4; }
inline int32_t site_count(const ModelConfig& config) { return lm_head_site(config) + 1; }
LoraLinear lora_linear(const ModelConfig& config, int32_t site);  // shape of a fused linear: parts and their columns

// A projection that an adapter may target.
struct ModuleInfo {
  std::string name;  // "model.layers.3.self_attn.q_proj", "lm_head"
  int32_t site = 0;
  int32_t part = 0;
  int64_t layer = -1;  // -1: lm_head
  int64_t in = 0;
  int64_t out = 0;
};
std::vector<ModuleInfo> modules_of(const ModelConfig& config);  // in site, part order

// inv_freq [D/2] f32 as transformers computes it, scaling included.
std::vector<float> rope_inv_freq(const ModelConfig& config);

}  // namespace loquetier
