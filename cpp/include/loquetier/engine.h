// The engine: serves many LoRA adapters over one base model and fine-tunes LoRA adapters in the same batch.
//
//   loquetier::Engine engine(loquetier::BaseModel::load("path/to/hf-model"));
//   engine.add_adapter("support", "path/to/peft-folder");
//   int64_t id = engine.submit_infer({1, 2, 3}, {.adapter = "support"});
//   while (engine.has_work()) for (auto& t : engine.step().tokens) …
//
// Threads: every method may be called from any thread; step() by one thread at a time (a second caller gets InvalidArgument).
// Errors: see error.h. A refused call changes nothing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "loquetier/base_model.h"
#include "loquetier/error.h"
#include "loquetier/memory_plan.h"
#include "loquetier/options.h"

namespace loquetier {

struct AdapterInfo {
  std::string name;
  int64_t version = 0;  // optimizer steps so far (kept by clone, export and import)
  LoraConfig config;
  int64_t parameters = 0;
  int64_t bytes = 0;      // in the pool
  bool resident = false;  // in device memory now
  bool training = false;  // has training state (master weights, gradients, moments)
  int64_t requests = 0;   // waiting and running
};

struct EngineStats {
  int64_t steps = 0;
  int64_t waiting_requests = 0, running_requests = 0, queued_examples = 0;
  int64_t prefill_tokens = 0, decode_tokens = 0, train_tokens = 0, eval_tokens = 0;  // rows computed so far
  int64_t cached_prompt_tokens = 0;                                                  // rows not computed thanks to the prefix cache
  int64_t generated_tokens = 0, optimizer_steps = 0, skipped_updates = 0, preemptions = 0;
  int64_t adapters = 0, resident_adapters = 0, adapter_evictions = 0, adapter_fetches = 0;
  int64_t adapter_prefetches = 0;  // of the fetches: started in an earlier step than the first use
  int64_t kv_pages = 0, kv_pages_free = 0, kv_pages_cached = 0;
  // Device memory by share, as allocated; training_state_limit: what adapters in training may take (-1: no limit).
  int64_t weight_bytes = 0, kv_bytes = 0, adapter_pool_bytes = 0, adapter_pool_used = 0, saved_bytes = 0, scratch_bytes = 0,
          metadata_bytes = 0, workspace_bytes = 0, training_state_bytes = 0, training_state_limit = -1;
  int64_t arena_bytes = 0, arena_peak = 0;  // saved_bytes + scratch_bytes, and the most of it that a step has used
  // Recorded decode steps: recordings made, steps that replayed one, how many are kept, time spent recording.
  int64_t graph_captures = 0, graph_replays = 0, graphs = 0;
  double graph_seconds = 0;
  double step_seconds = 0;  // spent inside step(), in all
  int64_t steps_ahead = 0;  // steps of decodes that were launched while the one before them ran
  double host_seconds =
      0;  // of step_seconds, on planning, tables, launches and results: not computing (CPU) or waiting for the device
  double training_seconds =
      0;  // of step_seconds, that training took beyond what the requests' rows would have taken alone (by the cost model)
  double last_step_seconds = 0, last_step_predicted = 0;
  double prediction_error_median = 0,
         prediction_error_p95 = 0;                  // |predicted - measured| / measured of the last 512 steps; NaN: none
  int64_t slices = 0;                               // pieces of training launched apart from a step's batch
  int64_t interrupted_steps = 0;                    // that ended their training early because a request came
  int64_t deadlines_met = 0, deadlines_missed = 0;  // of first tokens; rejected requests are missed
  int64_t rejected_requests = 0;
  std::string cost_model = {};  // the fitted cost model as text
};

// A copy of one adapter tensor by its PEFT key.
struct NamedTensor {
  std::string name;  // "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  std::vector<int64_t> shape;
  std::vector<float> data;
};

class Engine {
 public:
  explicit Engine(std::shared_ptr<const BaseModel> model, EngineOptions options = {});
  explicit Engine(const std::filesystem::path& model_folder, EngineOptions options = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // How an engine with these options would divide the device's memory, before it is made. With query.device_bytes no device is
  // needed. OutOfMemory when it does not fit, as at start: the message lists every share and what to lower.
  static MemoryPlan plan_memory(const BaseModel& model, const EngineOptions& options = {}, const MemoryQuery& query = {});
  static MemoryPlan plan_memory(const std::filesystem::path& model_folder, const EngineOptions& options = {},
                                const MemoryQuery& query = {});  // reads config.json only
  static MemoryPlan plan_memory_of_config(const std::string& config_json, const EngineOptions& options = {},
                                          const MemoryQuery& query = {});

  // ---- adapters
  void add_adapter(const std::string& name, const std::filesystem::path& peft_folder);
  void add_adapter(const std::string& name, const LoraConfig& config);
  void clone_adapter(const std::string& src, const std::string& dst);  // frozen copy of the newest version, without training state
  // Requests under way finish on the version they have; jobs of the adapter end as "cancelled"; the name is free at once.
  void remove_adapter(const std::string& name);
  // Writes a PEFT folder (adapter_config.json, adapter_model.safetensors): temporary name, synced, renamed.
  void save_adapter(const std::string& name, const std::filesystem::path& folder) const;
  // A live adapter, training state and version included, as one file's bytes; import it under a name in another engine and training
  // goes on with the same losses. Throws InvalidArgument while jobs of the adapter are queued.
  std::string export_adapter(const std::string& name) const;
  void import_adapter(const std::string& name, const std::string& bytes);
  std::vector<AdapterInfo> adapters() const;
  AdapterInfo adapter(const std::string& name) const;
  // what: "weights" (as served, widened to f32), "master", "gradients", "exp_avg", "exp_avg_sq".
  std::vector<NamedTensor> adapter_state(const std::string& name, const std::string& what) const;

  // ---- work
  int64_t submit_infer(std::vector<int32_t> prompt_ids, InferOptions options = {});
  int64_t submit_train(const std::string& adapter, std::vector<Example> examples, TrainOptions options = {});
  int64_t submit_eval(const std::string& adapter, std::vector<Example> examples);  // adapter "": base model
  // True when the request or job was waiting or running. It ends with reason "cancelled" at the next step. A training job whose
  // first micro-batch has begun is cancelled as a whole: its gradients are dropped with those accumulated since the last update.
  bool cancel(int64_t id);
  bool has_work() const;
  // On a GPU the step after it, when both are of decodes alone, may be under way when this returns: what is submitted now is in the
  // one behind that.
  StepResult step();

  // ---- state
  EngineStats stats() const;
  // Writes a trace of every step from now on (Chrome trace events, JSON; opens in Perfetto) until stop_trace() or close().
  void start_trace(const std::filesystem::path& path);
  void stop_trace();
  // Every adapter with its training state, in one folder (temporary name, synced, renamed). Requests and queued jobs are not in it.
  void save_checkpoint(const std::filesystem::path& folder) const;
  void load_checkpoint(const std::filesystem::path& folder);  // into an engine without adapters of those names
  void close();  // frees everything; later calls throw InvalidArgument. Called by the destructor.

  const BaseModel& base_model() const;
  const EngineOptions& options() const;
  std::string device() const;

 private:
  struct Impl;
  friend struct EngineAccess;  // tests
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What this build can do: version, CPU features and BLAS, whether a CUDA library is built, found and usable.
std::string build_report();

}  // namespace loquetier
