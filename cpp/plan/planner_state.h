// The planner's state and the phases of a plan (step.cpp). planner.cpp has the calls from outside, invariants.cpp the check of all
// of it.
//
// Between plan() and commit() or abort() nothing of what the plan decided is final but pre-emption and eviction of cached prefixes:
// requests carry `planned` rows and new pages at the end of their page table, admitted ones say so, TrainQueues keeps notes.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan/adapter_table.h"
#include "plan/kv_pages.h"
#include "plan/planner.h"
#include "plan/prefix_cache.h"
#include "plan/prompt_queues.h"
#include "plan/train_queues.h"

namespace loquetier {

struct Planner::State {
  explicit State(PlannerConfig c);

  PlannerConfig config;
  KvPages pages;
  PrefixCache cache;
  AdapterTable adapters;
  std::unordered_map<int64_t, PlannedRequest> requests;
  std::vector<PlannedRequest*> running;                 // have pages; by adapter, then arrival: the order of rows
  std::set<PlannedRequest*, StandsHigher> by_standing;  // the same requests
  PromptQueues prompts;
  TrainQueues training;
  std::set<PlannedRequest*, MoreUrgent> urgent;     // with a deadline that is not yet found to be missed, without a first token
  std::set<std::pair<double, int64_t>> rejectable;  // (deadline, id) of those that asked for it, without a first token
  uint64_t arrivals = 0;
  uint64_t serial = 0;       // of the last plan
  uint64_t clock = 0;        // committed steps that had a row budget
  uint64_t turns = 0;        // decodes committed
  int64_t level_passes = 0;  // committed steps with prompt rows since the least recently served priority was passed over
  uint32_t arrived = 0;      // a bit per step, whether a request came just before it: the next one's is bit 0, then back in time
  PlannerStats counts;       // preemptions and cached_tokens; the rest is derived

  // ---- the open plan
  bool open = false;
  StepLimits limits;
  std::vector<PlannedRequest*> decodes;     // ready to decode
  std::vector<PlannedRequest*> admitted;    // in order
  std::vector<PromptQueue*> served_queues;  // in order
  PromptQueue* missed_queue = nullptr;      // the next in turn, which got nothing
  std::vector<int64_t> preempted;
  int64_t decode_pages = 0;       // that ready decodes need and have not got
  int64_t prompt_pages = 0;       // that admitted prompts need to their end and have not got
  bool wants_more_bytes = false;  // decodes over more adapters than fit
  bool door_closed = false;       // no more admissions in this step
  bool lacks_place = false;       // a prompt waits for a slot or pages that running requests hold
  bool slices_offered = false;
  // Time (fill.cpp). What is planned so far, but for the pass over all rows and the heads, which depend on all of it.
  StepWork work_rest;
  double work_rows = 0, sample_heads = 0, loss_heads = 0, train_heads = 0;
  double now = 0;
  double train_seconds = -1;   // a step with rows of requests is filled to; < 0: no limit
  double chunk_seconds = -1;   // the same, when time was saved for a chunk of training
  double prompt_seconds = -1;  // prompt rows may come up to
  double alone_seconds = -1;   // a step of training alone
  bool prompt_time_over = false;
  bool prompt_overdue = false;    // one is being served before all else
  bool must_train = false;        // training was passed over too long: its smallest piece is in the step whatever it costs
  bool overdue_training = false;  // that was so when the plan began
  bool cut_short = false;         // the last step had rows of requests and ended before any of its training
  bool waits = false;             // the open plan leaves a chunk out to save time for it
  bool waited = false;            // the last committed one did
  bool skip_evaluation = false;   // the last step had evaluation rows: training has the next

  Plan plan(const StepBudget& budget);
  std::vector<int64_t> commit(const Plan& plan, const StepOutcome& outcome);
  StepWork work_of(const Plan& plan, const StepOutcome& outcome) const;
  std::vector<int64_t> late(double when) const;
  void abort();
  void finish(PlannedRequest& request);
  void check_invariants() const;
  PlannedRequest& find_request(int64_t id, const char* caller);
  void cache_full_pages(PlannedRequest& request);

 private:
  enum class Serve { served, no_room, no_pages, no_slot };

  // ---- phases of a plan
  void survey();
  void serve_overdue();
  void serve_decodes();
  void serve_prompts();
  void unblock_prompt();
  Plan emit();

  // ---- time
  void set_time(const StepBudget& budget);
  StepWork work_with(double rows, double pairs, double heads, double with_gradient) const;  // what is planned, and training rows
  int64_t prompt_rows_in_time(const PlannedRequest& request, int64_t most);
  void count_prompt_rows(const PlannedRequest& request, int64_t begin, int64_t rows);
  void serve_urgent(PromptLevel& level);
  double prefill_seconds(double begin, double rows) const;  // of a prompt's rows alone
  void note_token(PlannedRequest& request, double when);

  // ---- training in pieces
  bool interruptible(const Plan& plan) const;
  bool chunk_leaves(const Plan& plan) const;
  static bool is_alone(const Plan& plan) { return plan.rows[2] + plan.rows[3] == 0; }  // no rows of requests
  void train_in_pieces();
  void plan_pieces();
  int64_t rows_held() const;
  void evaluate();
  int64_t chunk_in_time(int64_t most, double limit, double longest);
  bool plan_forward(bool alone, double limit, double longest);  // true: with this step all rows of the micro-batch are forwarded
  void plan_backward(double limit, bool forward_planned);
  int32_t slices_in_time(int32_t most, double limit, const std::function<StepWork(int32_t)>& slice);

  // ---- decodes
  bool serve_decode(PlannedRequest& request);
  bool make_page(PlannedRequest& request);  // pre-empts lower ones until a page is available
  void preempt(PlannedRequest& request);

  // ---- prompts
  bool serve_overdue_prompt();
  void serve_level(PromptLevel& level, int64_t max_rows, bool aged);
  Serve serve_queue(PromptQueue& queue, int64_t max_rows, bool aged);  // at most one chunk of one request
  Serve extend_chunk(PlannedRequest& request, int64_t max_rows);
  Serve admit(PlannedRequest& request, bool aged);
  void undo_admit(PlannedRequest& request);
  void touch(PromptQueue& queue);
  int64_t composition_rows() const { return config.max_batch_tokens; }
  int64_t prompt_quantum() const { return std::max<int64_t>(config.page_size, config.max_batch_tokens / 8); }  // rows of a turn
  bool level_aged() { return prompts.levels().size() > 1 && level_passes >= config.starvation_steps; }
  PromptLevel& next_level() { return level_aged() ? prompts.least_recently_served() : prompts.levels().begin()->second; }

  void enter_running(PlannedRequest& request);
  void leave_running(PlannedRequest& request);
  void release_pages(PlannedRequest& request, size_t keep);
  int64_t pages_for(int64_t tokens) const { return (tokens + config.page_size - 1) / config.page_size; }
  int64_t missing_prompt_pages(const PlannedRequest& r) const {
    return pages_for(r.length()) - static_cast<int64_t>(r.pages.size());
  }
  bool cacheable(const PlannedRequest& r, uint64_t epoch) const {
    return config.prefix_caching && !r.adapter->removed && epoch == r.adapter->epoch;
  }
};

}  // namespace loquetier
