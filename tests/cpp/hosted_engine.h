// A small engine over a device that is not the host's memory but computes (hosted_ops.h), and work for it.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/impl.h"
#include "hosted_ops.h"
#include "loquetier/engine.h"

namespace loquetier::test {

inline const char* kTinyConfig =
    R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32,
  "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 60})";
inline EngineOptions small_options() {
  EngineOptions options;
  options.num_threads = 1;
  options.max_batch_tokens = 64;
  options.max_sequences = 8;
  options.kv_cache_tokens = 512;
  options.adapter_pool_bytes = 300000;
  options.max_lora_rank = 16;
  options.page_size = 4;
  return options;
}

struct Hosted {
  std::shared_ptr<HostedOps> ops;
  std::unique_ptr<Engine> engine;
  explicit Hosted(const EngineOptions& options, size_t capacity = size_t{64} << 20)
      : ops(std::make_shared<HostedOps>(capacity)), engine(EngineAccess::make(BaseModel::random(kTinyConfig, 7), options, ops)) {}
  Engine* operator->() { return engine.get(); }
};

inline LoraConfig lora(int rank, uint64_t seed, std::vector<std::string> targets = {"all-linear"}) {
  LoraConfig config;
  config.r = rank;
  config.lora_alpha = 2.0 * rank;
  config.target_modules = std::move(targets);
  config.init_lora_weights = "false";
  config.seed = seed;
  return config;
}

inline std::vector<int32_t> tokens(std::mt19937& random, int n) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 60);
  return ids;
}

inline std::vector<Example> examples(uint32_t seed, int count, int length) {
  std::mt19937 random(seed);
  std::vector<Example> out;
  for (int i = 0; i < count; ++i) out.push_back({.input_ids = tokens(random, length + i % 3)});
  return out;
}

inline InferOptions infer(const std::string& adapter, int max_tokens) {
  InferOptions options{.adapter = adapter};
  options.sampling.temperature = 0;
  options.sampling.max_tokens = max_tokens;
  options.sampling.ignore_eos = true;
  return options;
}

inline TrainOptions with_optimizer() {
  TrainOptions options;
  options.optimizer = AdamW{.lr = 1e-2, .max_grad_norm = 1.0};
  return options;
}

struct Outcome {
  std::map<int64_t, InferResult> requests;
  std::map<int64_t, TrainResult> trained;
};

inline void take(Outcome& outcome, StepResult result) {
  for (auto& r : result.finished) outcome.requests[r.request_id] = r;
  for (auto& r : result.trained) outcome.trained[r.job_id] = r;
}

inline Outcome drain(Engine& engine) {
  Outcome outcome;
  int steps = 0;
  while (engine.has_work() && ++steps < 2000) take(outcome, engine.step());
  CHECK(steps < 2000);
  return outcome;
}

}  // namespace loquetier::test
