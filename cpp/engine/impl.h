// The engine's inside. Two locks and what each guards:
//   front      names, the inbox, which ids are live, published numbers. Held for moments, by any thread; submit and cancel need
//   nothing else. step_lock  everything in Core: planner, pool, requests, jobs, device memory. Held for a whole step, and by calls
//   that touch adapters' weights.
// Order when both are taken: step_lock, then front. A step is: take in the inbox, plan, pin adapters, upload, forward and heads,
// slices of training (training.cpp), optimizer, download, the next step behind it (ahead.cpp), commit, publish (step.cpp,
// observe.cpp).
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <variant>
#include <vector>

#include "engine/blob.h"
#include "engine/decode_graph.h"
#include "engine/fair_mutex.h"
#include "engine/micro_batch.h"
#include "engine/records.h"
#include "engine/step_batch.h"
#include "engine/trace.h"
#include "engine/validate.h"
#include "io/checkpoint.h"
#include "loquetier/engine.h"
#include "model/model.h"
#include "plan/planner.h"

namespace loquetier {

struct CancelCommand {
  int64_t id;
};
struct RemoveCommand {
  AdapterPtr adapter;
};
using Command = std::variant<Request, Job, CancelCommand, RemoveCommand>;

// A step of decodes that was planned and launched while the one before it ran; the planner takes it for done.
struct StepAhead {
  Plan plan;
  StepBatch batch;  // its results are in Core::ahead_results, its weights are pinned
  StepWork work;
  double serving_share = 0;
  uint64_t mark = 0;  // of the device, reached when its results are on the host
};

struct Core {
  std::shared_ptr<Ops> ops;  // first: everything below lives in its memory
  std::shared_ptr<const ModelWeights> weights;
  Model model;
  KvCache kv;
  AdapterPool pool;
  CostModel cost;
  Planner planner;
  AdapterTable adapters;  // until removed and its last request ended
  std::unordered_set<AdapterId> removed;
  RequestTable requests;
  JobTable jobs;
  Blob metadata, micro_metadata, chunk_metadata;  // of a step, of the micro-batch, of a batch apart from the step's
  Blob results, ahead_results, chunk_results;
  Buffer saved_storage, scratch_storage;  // reserved at start; where memory is the host's, grown when a step needs more
  DecodeGraphs graphs;
  std::optional<MicroBatch> micro;
  // Computed apart from the step's own batch, with results in chunk_results: a chunk that ended in this step, or the rows that a
  // chunk left behind in their pass.
  std::optional<std::pair<Plan, StepBatch>> apart;
  std::deque<uint64_t> launched;  // marks of pieces that the device may not have done yet
  uint64_t uploaded = 0;          // mark behind the last upload of `metadata`
  std::optional<StepAhead> ahead;
  bool committed = false;      // the planner was told that the current plan was computed
  StepWork work;               // that the step did
  double serving_share = 0;    // of its predicted time: rows of requests
  StepResult events;           // not yet handed out
  std::vector<int64_t> ended;  // ids of events, to be taken off the live list
  EngineStats stats;

  Core(std::shared_ptr<Ops> ops, std::shared_ptr<const ModelWeights> weights, KvCache kv, size_t pool_bytes, const CostModel& cost,
       PlannerConfig plan, bool graphs);
};

struct Engine::Impl {
  Impl(std::shared_ptr<const BaseModel> model, EngineOptions options, std::shared_ptr<Ops> ops);
  ~Impl();

  // ---- fixed
  std::shared_ptr<const BaseModel> base;
  EngineOptions options;
  std::string device_name;
  Limits limits;
  Recompute recompute = Recompute::none;
  MemoryPlan memory;
  int32_t slice_rows = 0;  // of a piece of training; 0: whole micro-batches
  int32_t slack_rows = 0;  // rows beside a chunk that Saved has room for
  std::chrono::steady_clock::time_point epoch = std::chrono::steady_clock::now();

  // ---- front
  mutable std::mutex front;
  std::map<std::string, AdapterPtr> registry;
  std::deque<Command> inbox;
  std::atomic<int64_t> arrivals{0};              // requests in the inbox; read without the lock between pieces of training
  std::unordered_map<int64_t, AdapterPtr> live;  // requests and jobs that have not ended, and their adapter
  int64_t live_requests = 0;
  int64_t live_examples = 0;
  std::unordered_map<int64_t, int64_t> job_examples;  // of live jobs
  int64_t next_id = 1;
  int64_t next_adapter = 0;
  bool closed = false;
  bool undelivered = false;  // events wait for the next step()
  std::string failure;       // the first device error
  EngineStats published;

  // ---- step lock
  mutable FairMutex step_lock;
  std::atomic<bool> stepping{false};
  double entered = 0;          // when step() was
  double waiting_seconds = 0;  // of the step under way: for the device, or computing where that is the host
  double results_there = 0;    // when the last step's were
  double ahead_seconds = 0;    // that it took to plan and launch the last step ahead
  std::unique_ptr<Core> core;
  StepBudget budget;                             // no limit; tests cut backward at random places
  std::function<void(const char* phase)> probe;  // called between phases; tests throw from it
  std::unique_ptr<Trace> trace;
  double numbers_published = -1;  // when the numbers that take a while to compute were
  double last_end = -1;           // of the last step that left work

  // memory (engine.cpp)
  void reserve(const OpsLimits& most);
  std::unique_ptr<TrainState> new_train_state(const AdapterRecord& record, const float* master) const;  // step lock held

  // submission (engine.cpp)
  void require_usable() const;                                              // front held
  AdapterPtr find(const std::string& name) const;                           // front held; null for ""
  AdapterPtr find_named(const std::string& name, const char* where) const;  // front held; refuses the base model
  int64_t submit(Request request);
  int64_t submit(Job job);
  bool cancel(int64_t id);

  // adapters (adapters.cpp)
  void require_new_name(const std::string& name) const;  // front held
  AdapterPtr new_record(const std::string& name, LoraConfig config, std::shared_ptr<const AdapterLayout> layout,
                        DType stored) const;
  void register_adapter(const AdapterPtr& record);  // step lock held, weights set
  void add_adapter(const std::string& name, LoraConfig config, std::vector<LoraTarget> targets, const LoraWeights& weights,
                   DType stored);
  std::vector<float> master_values(const AdapterRecord& record) const;
  AdapterSnapshot snapshot(const std::string& name) const;
  AdapterPtr restored_record(const std::string& name, const AdapterSnapshot& snapshot);

  // the step (step.cpp)
  StepResult step();
  void plan_and_run();
  void fail(const DeviceError& error);
  void take_in();
  void take_in(Request&& request);
  void take_in(Job&& job);
  void take_in(const CancelCommand& cancel);
  void take_in(const RemoveCommand& remove);
  void forget_if_unused(const AdapterPtr& adapter);
  void run(const Plan& plan);
  WeightTableOfStep weights_of(const Plan& plan);
  StepContext context_of(const WeightTableOfStep& weights) const;
  void reserve_step(const Plan& plan, const StepBatch& batch);
  void run_forward(const Plan& plan, StepBatch& batch, const StepContext& context, Blob& results, StepOutcome& outcome);
  void update(const StepBatch& batch);
  void prefetch();
  void reject_late();
  void finish(const Plan& plan, const StepBatch& batch, StepOutcome outcome, double launching, uint64_t done);
  std::vector<int64_t> commit(const Plan& plan, const StepOutcome& outcome);
  void collect(const Plan& plan, const StepBatch& batch, const std::vector<int64_t>& completed);
  void collect_losses(const Plan& plan, const StepBatch& batch);
  void collect_tokens(const Plan& plan, const StepBatch& batch);
  void complete_jobs(const std::vector<int64_t>& completed, const StepBatch& batch);
  void recover(const Plan& plan, const std::string& what);
  void finish_request(int64_t id, FinishReason reason, const std::string& error = {});
  void finish_job(int64_t id, const std::string& reason);

  // the next step behind this one (ahead.cpp)
  bool goes_ahead = false;  // the device works while the host does something else
  void launch_ahead(const Plan& plan, const StepBatch& batch, double begin, uint64_t done);
  bool waits_to_go_ahead(const Plan& plan, double begin, uint64_t done);
  static std::vector<const int32_t*> awaited_tokens(const Plan& plan, const StepBatch& batch, const Plan& next);
  bool launch_behind(const Plan& plan, const StepBatch& batch, Plan& next);
  void finish_ahead();
  void drop_ahead();

  // training in pieces (training.cpp)
  static constexpr size_t kAhead = 2;
  bool interrupted() const;
  bool stop_before_piece(const Plan& plan);
  void launched_piece(const char* name, double begin);
  void begin_micro_batch(const Plan& plan, const WeightTableOfStep& weights);
  void end_micro_batch();
  SliceShape slice_shape() const;
  void run_chunk(const Plan& plan, StepBatch& batch, const StepContext& context, Arena& scratch, StepOutcome& outcome);
  void leave_pass(const Plan& plan, StepBatch& batch, const StepContext& context, MicroBatch::Stopped at, Arena& scratch,
                  StepOutcome& outcome);
  void run_forward_slices(const Plan& plan, const StepContext& context, StepOutcome& outcome);
  bool run_backward(const Plan& plan, StepOutcome& outcome);

  // times and numbers (observe.cpp)
  double now() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - epoch).count(); }
  void note_work(const Plan& plan, const StepOutcome& outcome);
  void note_preempted(const Plan& plan);
  void note_rows(const Plan& plan, double begin);
  void finish_record(Request& request) const;
  void observe(const Plan& plan, double begin, double planned, bool timed = true);
  void publish();
  void mark(const char* phase) const {
    if (probe) probe(phase);
  }
};

// Runs `undo` when the scope ends, unless dismissed.
template <class F>
class Finally {
 public:
  explicit Finally(F undo) : undo_(std::move(undo)) {}
  Finally(const Finally&) = delete;
  ~Finally() {
    if (wanted_) undo_();
  }
  void dismiss() { wanted_ = false; }

 private:
  F undo_;
  bool wanted_ = true;
};

// Grows a block when a step needs more than any before it.
void ensure(Buffer& buffer, Device& device, size_t bytes);

// For tests: the inside of an engine.
struct EngineAccess {
  static Engine::Impl& impl(Engine& engine) { return *engine.impl_; }
  // An engine over a backend of the test's own.
  static std::unique_ptr<Engine> make(std::shared_ptr<const BaseModel> model, EngineOptions options, std::shared_ptr<Ops> ops) {
    return std::unique_ptr<Engine>(
        new Engine(std::make_unique<Engine::Impl>(std::move(model), std::move(options), std::move(ops))));
  }
};

}  // namespace loquetier
