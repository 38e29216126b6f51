// Adapters, prompts and examples for the engine's tests, and the smallest model that they run on.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "loquetier/options.h"

namespace loquetier::test::inputs {

inline const char* kTinyConfig =
    R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32,
  "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 60})";

// Values of B are not zero: the adapter changes answers from the start.
inline LoraConfig lora(int rank, uint64_t seed, std::vector<std::string> targets = {"all-linear"}, double dropout = 0) {
  LoraConfig config;
  config.r = rank;
  config.lora_alpha = 2.0 * rank;
  config.target_modules = std::move(targets);
  config.init_lora_weights = "false";
  config.lora_dropout = dropout;
  config.seed = seed;
  return config;
}

// Of [first, first + count); by default of the tiny model, without its end of sequence.
inline std::vector<int32_t> tokens(std::mt19937& random, int n, int64_t first = 0, int64_t count = 60) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(first + static_cast<int64_t>(random() % static_cast<uint64_t>(count)));
  return ids;
}

inline std::vector<Example> examples(uint32_t seed, int count, int length) {
  std::mt19937 random(seed);
  std::vector<Example> out;
  for (int i = 0; i < count; ++i) out.push_back({.input_ids = tokens(random, length + i % 3)});
  return out;
}

}  // namespace loquetier::test::inputs
