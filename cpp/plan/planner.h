// The planner: pure host logic. No device pointer, no clock, no randomness: the same calls give the same plans, so it is tested by
// the million steps and runs in a simulator.
//
// Order of a step: running decodes; then prompt chunks, by priority and fair between adapters (deficit round-robin, Shreedhar &
// Varghese 1995); then training and evaluation rows with what is left of the row budget. Limits: rows, running sequences, KV pages,
// bytes of the distinct adapters in one step.
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
#include <span>
#include <vector>

#include "plan/batch.h"
#include "plan/kv_pages.h"

namespace loquetier {

struct PlannerConfig {
  int64_t max_batch_tokens = 8192;
  int64_t max_train_tokens = -1;  // rows of a step that has training rows; < 0: max_batch_tokens
  int64_t max_sequences = 256;
  int64_t kv_pages = 0;
  int32_t page_size = 16;
  int64_t adapter_pool_bytes = 0;  // of distinct (adapter, version) in one step
  int32_t num_layers = 0;
  int32_t starvation_steps = 8;
  bool prefix_caching = true;
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
};

struct JobSpec {
  int64_t id = 0;
  int64_t adapter = -1;
  bool train = true;          // else evaluation
  bool barrier = false;       // ends with an optimizer step
  std::vector<int32_t> rows;  // per example, 1 .. max_batch_tokens
};

struct StepBudget {
  int64_t max_rows = -1;             // < 0: max_batch_tokens
  int32_t max_backward_layers = -1;  // < 0: all of them
};

struct PlannerStats {
  int64_t waiting = 0, running = 0;
  int64_t queued_examples = 0;  // not yet in a plan that was committed
  int64_t preemptions = 0;
  int64_t cached_tokens = 0;                 // prompt rows not computed thanks to the prefix cache
  int64_t pages_free = 0, pages_cached = 0;  // cached: kept only for prefixes, taken back when needed
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

  // Decides the next step. Must be followed by commit() or abort() of the same plan before anything else but queries.
  Plan plan(const StepBudget& budget = {});
  // The step was computed: positions advance, full pages become cacheable, completed jobs are forgotten.
  void commit(const Plan& plan);
  // The step was not computed: the same work is planned again. Rows, jobs and the pending backward are as before plan(); only the
  // pre-empted stay so (the step may have written to their pages).
  void abort(const Plan& plan);
  // A token was sampled for a running request (after commit of the step that made it).
  void append_token(int64_t request, int32_t token);

  std::span<const int32_t> tokens(int64_t request) const;  // prompt and generated
  std::span<const int32_t> pages(int64_t request) const;   // page table, in order of position
  // Adapters that the next steps will want and this plan does not use, most urgent first, at most `count`: decodes that were passed
  // over, prompts next in turn, training and evaluation next in turn. May be asked of an open plan.
  std::vector<AdapterUse> upcoming_adapters(size_t count) const;
  int32_t pending_backward_layers() const;  // of the micro-batch in flight, 0: none
  bool has_work() const;
  PlannerStats stats() const;
  void check_invariants() const;  // throws std::logic_error; for tests

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace loquetier
