// What the engine remembers of adapters, requests and jobs. Plain data, owned by the thread that holds the step lock except where
// said.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adapter/adapter.h"
#include "adapter/adapter_pool.h"
#include "adapter/train_state.h"
#include "loquetier/options.h"
#include "ops/ops.h"

namespace loquetier {

struct AdapterRecord {
  // Fixed at creation, readable by every thread.
  AdapterId id = kBaseAdapter;
  std::string name;
  LoraConfig config;
  std::shared_ptr<const AdapterLayout> layout;
  DType stored_dtype = DType::f32;  // of the PEFT file it came from

  // Step lock.
  std::shared_ptr<AdapterWeights> weights;  // the newest version
  std::vector<float> exact;  // [elements] the values as given, when the compute dtype cannot hold them; until trained
  std::unique_ptr<TrainState> train;
  uint64_t dropout_counter = 0;  // examples seen; lives here so that it survives without training state

  // Front lock.
  int64_t live_requests = 0;
  int64_t live_jobs = 0;
};

using AdapterPtr = std::shared_ptr<AdapterRecord>;  // null: base model
inline AdapterId id_of(const AdapterPtr& adapter) { return adapter ? adapter->id : kBaseAdapter; }
inline std::string name_of(const AdapterPtr& adapter) { return adapter ? adapter->name : std::string(); }

struct Request {
  int64_t id = 0;
  AdapterPtr adapter;
  SamplingParams sampling;
  uint64_t seed = 0;
  int priority = 0;
  bool pin_version = false;
  int64_t max_new_tokens = 0;     // max_tokens, cut to the context and the KV pool
  std::vector<int32_t> stop_ids;  // end-of-sequence ids (unless ignored) and stop_token_ids
  std::vector<int32_t> prompt;    // moved to the planner when the request is taken in
  int64_t prompt_length = 0;
  double submitted = 0;                                      // seconds, as all times here
  double deadline = -1;                                      // of the first token; < 0: by the engine's target
  double first_row = -1, first_token = -1, last_token = -1;  // < 0: not yet
  bool reject_late = false;
  std::shared_ptr<AdapterWeights> pinned;  // from the first step on, with pin_version
  InferResult result;                      // grows as tokens come
};

// An example as the step needs it. Rows after the last target are never computed.
struct PreparedExample {
  std::vector<int32_t> ids;          // [rows]
  std::vector<int32_t> target_rows;  // row whose logits predict the target; ascending
  std::vector<LossRow> targets;      // beside target_rows, weight with the reduction in it
  int32_t length = 0;                // of input_ids
};

struct Job {
  int64_t id = 0;
  AdapterPtr adapter;
  bool train = true;
  std::optional<AdamW> optimizer;
  std::vector<PreparedExample> examples;
  int64_t targets = 0;
  uint64_t dropout_base = 0;  // key number of example 0
  double loss = 0;
  double weight = 1;
  double submitted = 0, first_row = -1;  // seconds; < 0: not yet
  int64_t steps = 0;
  int64_t version = 0;                       // the rows were computed under
  bool began = false;                        // some row was computed
  std::vector<std::vector<float>> logprobs;  // evaluation: per example, aligned with input_ids
};

}  // namespace loquetier
