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

int64_t train_tokens(const EngineOptions& options);   // rows of a step with training rows, or in pieces of a micro-batch
bool trains_in_pieces(const EngineOptions& options);  // slice_rows > 0: as asked, or from the device's speed
// Head rows of one vocabulary product with a loss: a slice's where training comes in pieces, and on the host, whose products are
// no faster with more.
int64_t head_chunk(const EngineOptions& options, bool host_addressable);
int64_t stacked_rank(const EngineOptions& options);  // columns of S that a step may need
size_t table_slots(const EngineOptions& options);    // adapters whose site tables have room from the start
OpsLimits ops_limits(const ModelConfig& config, const EngineOptions& options);
size_t weight_bytes(const ModelConfig& config, DType dtype);  // as a device backend places them
Recompute recompute_of(const EngineOptions& options);

// What a step's tables and results take at most, and those of training in pieces.
struct TableBytes {
  size_t metadata = 0, micro = 0, chunk = 0;
  size_t results = 0, chunk_results = 0;  // results: of a step, and again of the one launched behind it
  size_t total() const { return metadata + micro + chunk + 2 * results + chunk_results; }
};
TableBytes table_bytes(const ModelConfig& config, const EngineOptions& options, int64_t kv_pages);

// OutOfMemory lists every share and what to lower.
MemoryPlan plan_memory(const ModelConfig& config, const EngineOptions& options, const MemoryFacts& facts, int rank);

}  // namespace loquetier
