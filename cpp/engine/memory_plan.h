// Dividing a device's memory (Engine::plan_memory and Engine's start call the same function). What one step must have comes first:
// scratch of max_batch_tokens rows, what max_train_tokens training rows keep, its tables, the workspaces. Adapter pool, training
// state and KV pages share the rest.
//
// A device whose memory is the host's (CPU) keeps growing as steps need it, since memory that is not touched costs nothing there:
// its plan sizes pool and pages and limits nothing else.
#pragma once

#include <cstddef>
#include <string>

#include "loquetier/memory_plan.h"
#include "loquetier/options.h"
#include "model/model_config.h"
#include "model/saved.h"
#include "ops/ops.h"

namespace loquetier {

// What is known of the device, or assumed of one that is not there.
struct MemoryFacts {
  std::string device;
  DType dtype = DType::f32;
  bool host_addressable = true;
  size_t free_bytes = 0;
  size_t workspace_bytes = 0;  // that the backend will hold (Ops::workspace_need); counted into free_bytes where it is held already
  bool weights_placed = false;  // another engine's placement is shared
};

int64_t train_tokens(const EngineOptions& options);  // rows of a step with training rows
int64_t stacked_rank(const EngineOptions& options);  // columns of S that a step may need
int64_t slack_of(const EngineOptions& options);      // rows of other kinds beside a chunk of a micro-batch
size_t table_slots(const EngineOptions& options);    // adapters whose site tables have room from the start
OpsLimits ops_limits(const ModelConfig& config, const EngineOptions& options);
size_t weight_bytes(const ModelConfig& config, DType dtype);  // as a device backend places them
Recompute recompute_of(const EngineOptions& options);

// OutOfMemory lists every share and what to lower.
MemoryPlan plan_memory(const ModelConfig& config, const EngineOptions& options, const MemoryFacts& facts, int rank);

}  // namespace loquetier
