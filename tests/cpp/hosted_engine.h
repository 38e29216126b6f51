// A small engine over a device that is not the host's memory but computes (hosted_ops.h), and work for it.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/impl.h"
#include "engine_inputs.h"
#include "hosted_ops.h"
#include "loquetier/engine.h"

namespace loquetier::test {

using namespace inputs;

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
