// The planner: pure host logic. No device pointer, no clock, no randomness: the same calls give the same plans, so it is tested by
// the million steps and runs in a simulator.
//
// Order of a step: running decodes; then prompt chunks, by priority and fair between adapters (deficit round-robin, Shreedhar &
// Varghese 1995); then training and evaluation rows with what is left of the row budget. Limits: rows, running sequences, KV pages,
// bytes of the distinct adapters in one step.
//
// With slice_rows training comes in pieces: a micro-batch is composed at once (its examples by weight between adapters), its
// forward is in chunks of rows over several steps, its backward in slices. With a goal, a step is filled to the time its decodes
// have, by the cost model and time that is handed in (fill.cpp).
//
// Nothing starves. Of each sort (decode, prompt, backward, example) the one that is next in turn and was passed over
// `starvation_steps` times goes before everything else of a step, the longest passed-over first; so an adapter that does not fit
// beside those in use gets its turn in the pool. An example longer than a step's row budget then gets a longer step (never above
// max_batch_tokens). A priority that was passed over in `starvation_steps` steps with prompt rows has the first turn, and what
// comes in by it is pre-empted after all others.
//
// Life of a request: add_request -> (waiting -> chunks -> decodes, maybe pre-empted back to waiting)* -> finish or remove. Of a
// job: add_job -> micro-batches -> completed (in Plan::completed_jobs) -> forgotten at commit. Per adapter, jobs run in order of
// arrival; a job with a barrier (an optimizer step) ends before the next one's rows begin, jobs without may share a step.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "plan/batch.h"
#include "plan/cost_model.h"
#include "plan/kv_pages.h"

namespace loquetier {

// What serving is to keep, in seconds.
struct LatencyGoal {
  double ttft = 1;     // from arrival to the first token, unless the request has a deadline of its own
  double tpot = 0.05;  // mean time per output token after the first
};

struct PlannerConfig {
  int64_t max_batch_tokens = 8192;
  int64_t max_train_tokens = -1;  // rows of a step with training rows, or with slice_rows of a micro-batch; < 0: max_batch_tokens
  int64_t max_sequences = 256;
  int64_t kv_pages = 0;
  int32_t page_size = 16;
  int64_t adapter_pool_bytes = 0;  // of distinct (adapter, version) in one step
  int32_t num_layers = 0;
  int32_t starvation_steps = 8;
  bool prefix_caching = true;
  // > 0: training work comes in pieces of about so many rows: the forward of a micro-batch in chunks over several steps, backward
  // in slices (a part of a layer over a block of rows). 0: a micro-batch's forward is in one step, a slice of backward is a layer.
  int32_t slice_rows = 0;
  // With slice_rows: rows of other kinds that may share a step with a chunk (what Saved has room for behind the micro-batch).
  int32_t slack_rows = 1024;
  bool rerun = false;       // each layer's forward is computed again in its backward
  double mlp_share = 0.85;  // of a layer's products: those of the slices that hold the MLP and o
  // With a goal, steps are filled to it and not beyond, by this model, which outlives the planner. Needs slice_rows > 0.
  std::optional<LatencyGoal> goal = {};
  const CostModel* cost = nullptr;  // may be given without a goal: plans then say what they are predicted to take
};

struct RequestSpec {
  int64_t id = 0;
  int64_t adapter = -1;
  int64_t pinned_version = -1;  // >= 0: keep this version
  bool pin_version = false;     // take the adapter's version when first scheduled, then keep it
  int priority = 0;
  std::vector<int32_t> prompt;   // not empty
  int64_t max_tokens = 1;        // prompt + max_tokens fit the pool (checked by the caller)
  bool use_prefix_cache = true;  // false: compute every prompt row (prompt log-probabilities)
  double arrived = 0;            // on the clock of StepBudget::now
  double deadline = -1;          // of the first token, on the same clock; < 0: arrived + goal's ttft, or none without a goal
  bool reject_late = false;      // named by late() once the deadline cannot be met, instead of being served late
};

struct JobSpec {
  int64_t id = 0;
  int64_t adapter = -1;
  bool train = true;                  // else evaluation
  bool barrier = false;               // ends with an optimizer step
  std::vector<int32_t> rows;          // per example, 1 .. max_batch_tokens
  std::vector<int32_t> targets = {};  // per example: rows with a loss, taken to be its last ones (for the cost); empty: all rows
  int32_t lowest_layer = 0;           // of the model that the adapter trains (for the cost)
  double weight = 1;                  // > 0: the adapter's share of training rows beside other adapters' (of its newest job)
};

// Limits of one step beside the config's; time is handed in.
struct StepBudget {
  int64_t max_rows = -1;             // < 0: max_batch_tokens
  int32_t max_backward_slices = -1;  // < 0: all of them
  double now = 0;                    // seconds on any steady clock; only read with deadlines or a goal
  double max_seconds = -1;           // >= 0: fill the step to this many predicted seconds, whatever the goal says
};

// How much of a plan was run. Rows of requests and of evaluation always are. A chunk that shares a pass with them may leave it
// between two layers, or between two head chunks, and be a stopped one from then on (Plan::chunk_leaves); of the slices behind the
// pass the engine may stop early.
struct StepOutcome {
  int32_t forward_slices = -1;   // of Plan::forward_slices, or of a chunk that left its pass (layers, then head chunks); < 0: all
  bool forward_done = true;      // the chunk that these belong to is complete (its losses are in)
  int32_t backward_slices = -1;  // of Plan::backward_slices; < 0: all
  double now = 0;                // when the step ended, on the clock of StepBudget::now
};

struct PlannerStats {
  int64_t waiting = 0, running = 0;
  int64_t queued_examples = 0;  // not yet in a plan that was committed
  int64_t preemptions = 0;
  int64_t cached_tokens = 0;                        // prompt rows not computed thanks to the prefix cache
  int64_t pages_free = 0, pages_cached = 0;         // cached: kept only for prefixes, taken back when needed
  int64_t deadlines_met = 0, deadlines_missed = 0;  // requests with a deadline, at their first token
};

class Planner {
 public:
  explicit Planner(PlannerConfig config);
  ~Planner();

  // bytes: in the pool, of one version.
  void add_adapter(int64_t adapter, int64_t bytes, int64_t version);
  void set_version(int64_t adapter, int64_t version);  // an optimizer step: its cached prefixes are dropped
  // No more new work comes for it. Forgotten when its last request ended. Its jobs are removed by the caller with remove_job.
  void remove_adapter(int64_t adapter);

  void add_request(RequestSpec spec);
  void add_job(JobSpec spec);
  // Ends a request at once, whatever its state; its pages are free (full ones stay in the prefix cache). False: unknown id.
  bool finish(int64_t request);
  // Drops a job's rows that are not yet planned and those in the pending micro-batch's completion list. False: unknown id.
  // The micro-batch itself goes on: its rows were computed together.
  bool remove_job(int64_t job);
  // The micro-batch in flight is lost (a step failed in its middle): no more backward is planned for it, its jobs are removed.
  void abandon_backward();

  // Requests that asked to be rejected when late, and whose first token cannot come in time any more. The caller finishes them.
  std::vector<int64_t> late(double now) const;
  // Decides the next step. Must be followed by commit() or abort() of the same plan before anything else but queries.
  Plan plan(const StepBudget& budget = {});
  // The step was computed, or will be before anything else of this device is: positions advance, full pages become cacheable,
  // completed jobs are forgotten. Returns the jobs whose last gradient or loss is in: Plan::completed_jobs, less those whose slices
  // did not all run.
  std::vector<int64_t> commit(const Plan& plan, const StepOutcome& outcome = {});
  // What of an open plan was done, for CostModel::observe().
  StepWork work_of(const Plan& plan, const StepOutcome& outcome) const;
  // The step was not computed: the same work is planned again. Rows, jobs and the pending backward are as before plan(); only the
  // pre-empted stay so (the step may have written to their pages).
  void abort(const Plan& plan);
  // A token was sampled for a running request (after commit of the step that made it), or the one that was expected is there.
  void append_token(int64_t request, int32_t token);
  // Whether some request that samples in the last plan, open or committed, goes on after that token.
  bool goes_on() const;
  // After commit: the tokens that the last step samples are on their way, and the next plan may have the rows of the requests that
  // do not end with them by their limit. Until append_token() a request's last token stands for it, and a page that it fills is not
  // an entry of the prefix cache.
  void expect_tokens();

  struct Sequence {
    std::span<const int32_t> tokens;  // prompt and generated
    std::span<const int32_t> pages;   // page table, in order of position
  };
  Sequence sequence(int64_t request) const;
  std::span<const int32_t> tokens(int64_t request) const { return sequence(request).tokens; }
  std::span<const int32_t> pages(int64_t request) const { return sequence(request).pages; }
  int32_t pending_backward_slices() const;  // of the micro-batch in flight, its forward complete; 0: none
  // Adapters that the next steps will want and this plan does not use, most urgent first, at most `count`: decodes that were passed
  // over, prompts next in turn, training and evaluation next in turn. May be asked of an open plan.
  std::vector<AdapterUse> upcoming_adapters(size_t count) const;
  bool has_work() const;
  PlannerStats stats() const;
  void check_invariants() const;  // throws std::logic_error; for tests

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace loquetier
