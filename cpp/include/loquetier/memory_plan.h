// What an engine takes of its device's memory, and what fits in that: computed before start, and the same at start.
//
//   loquetier::MemoryPlan plan = loquetier::Engine::plan_memory("path/to/hf-model", {.device = "cuda"}, {.device_bytes = 80LL <<
//   30}); std::cout << plan.table();
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace loquetier {

struct MemoryQuery {
  std::optional<int64_t> device_bytes = {};  // free memory to plan for; none: what the device has free now
  int rank = 16;                             // of the adapters that `adapters` and `trained_adapters` count
};

struct MemoryPlan {
  std::string device;        // "cuda:0", "cpu"
  bool at_start = true;      // false (CPU): memory is taken as steps need it, the shares below are the most of it
  int64_t device_bytes = 0;  // free before the engine is made
  int64_t budget_bytes = 0;  // memory_fraction of it; the shares add up to it

  // ---- the shares
  int64_t weight_bytes = 0;          // 0 when another engine of the process has placed them
  int64_t kv_bytes = 0;              // keys and values in pages
  int64_t adapter_pool_bytes = 0;    // adapters' weights as served
  int64_t saved_bytes = 0;           // what training rows keep between forward and backward
  int64_t scratch_bytes = 0;         // activations of one step
  int64_t metadata_bytes = 0;        // tables of a step and its results
  int64_t workspace_bytes = 0;       // of the libraries and kernels
  int64_t training_state_bytes = 0;  // what is left: master weights, gradients and moments of adapters in training

  // ---- what they hold
  int64_t kv_tokens = 0;
  int64_t max_train_tokens = 0;        // rows of one step with training rows; 0: training is off
  int rank = 0;                        // of the adapters counted here, on every linear of every layer
  int64_t adapter_bytes = 0;           // one of them in the pool
  int64_t adapters = 0;                // that fit the pool at once; more live in host memory
  int64_t adapter_training_bytes = 0;  // its training state
  int64_t trained_adapters = 0;        // whose training state fits
  int64_t pinned_bytes = 0;            // host memory for copies, beside the adapters'

  std::string table() const;  // a line per share
};

}  // namespace loquetier
