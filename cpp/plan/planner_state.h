// The planner's state and the phases of a plan (step.cpp). planner.cpp has the calls from outside, invariants.cpp the check of all
// of it.
//
// Between plan() and commit() or abort() nothing of what the plan decided is final but pre-emption and eviction of cached prefixes:
// requests carry `planned` rows and new pages at the end of their page table, admitted ones say so, TrainQueues keeps notes.
#pragma once

#include <algorithm>
#include <memory>
#include <set>
#include <unordered_map>
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
  uint64_t arrivals = 0;
  uint64_t serial = 0;       // of the last plan
  uint64_t clock = 0;        // committed steps that had a row budget
  uint64_t turns = 0;        // decodes committed
  int64_t level_passes = 0;  // committed steps with prompt rows since the least recently served priority was passed over
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
  bool layers_offered = false;

  Plan plan(const StepBudget& budget);
  void commit();
  void abort();
  void finish(PlannedRequest& request);
  void check_invariants() const;
  PlannedRequest& find_request(int64_t id, const char* caller);

 private:
  enum class Serve { served, no_room, no_pages, no_slot };

  // ---- phases of a plan
  void survey();
  void serve_overdue();
  void serve_decodes();
  void serve_prompts();
  void unblock_prompt();
  Plan emit();

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
  int64_t prompt_quantum() const { return std::max<int64_t>(config.page_size, config.max_batch_tokens / 8); }  // rows of a turn
  bool level_aged() { return prompts.levels().size() > 1 && level_passes >= config.starvation_steps; }
  PromptLevel& next_level() { return level_aged() ? prompts.least_recently_served() : prompts.levels().begin()->second; }

  void enter_running(PlannedRequest& request);
  void leave_running(PlannedRequest& request);
  void release_pages(PlannedRequest& request, size_t keep);
  void cache_full_pages(PlannedRequest& request);
  int64_t pages_for(int64_t tokens) const { return (tokens + config.page_size - 1) / config.page_size; }
  int64_t missing_prompt_pages(const PlannedRequest& r) const {
    return pages_for(r.length()) - static_cast<int64_t>(r.pages.size());
  }
  bool cacheable(const PlannedRequest& r, uint64_t epoch) const {
    return config.prefix_caching && !r.adapter->removed && epoch == r.adapter->epoch;
  }
};

}  // namespace loquetier
