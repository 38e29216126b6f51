// Checking what callers hand in, and preparing it for the step. Everything is refused here, before anything has changed.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/records.h"
#include "loquetier/options.h"
#include "model/model_config.h"

namespace loquetier {

struct Limits {
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  int64_t kv_tokens = 0;
  int64_t max_batch_tokens = 0;
  int64_t max_train_tokens = 0;
};

void validate(const EngineOptions& options);
void validate(const InferOptions& infer, const EngineOptions& options);  // all but sampling
void validate(const SamplingParams& sampling, int64_t vocab_size);
void validate(const AdamW& optimizer);
void validate_prompt(const std::vector<int32_t>& prompt, const Limits& limits);

// Throws InvalidArgument naming the example, the field and the entry.
std::vector<PreparedExample> prepare_training(const std::vector<Example>& examples, const TrainOptions& options,
                                              const Limits& limits, int64_t& targets);
std::vector<PreparedExample> prepare_evaluation(const std::vector<Example>& examples, const Limits& limits, int64_t& targets);

}  // namespace loquetier
