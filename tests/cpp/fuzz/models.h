// The small models that adapter readers are fuzzed against. Not real ones: only their shapes matter here.
#pragma once

#include "model/model_config.h"

namespace loquetier {

inline ModelConfig fuzz_model(bool qwen3) {
  ModelConfig config;
  config.family = qwen3 ? "qwen3" : "llama";
  config.vocab_size = 5;
  config.hidden_size = 4;
  config.intermediate_size = 6;
  config.num_layers = 2;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_size = 2;
  config.max_positions = 16;
  config.qk_norm = qwen3;
  return config;
}

}  // namespace loquetier
