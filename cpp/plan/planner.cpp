// The calls from outside, and what a committed or abandoned step changes. How a step is decided: step.cpp.
#include "plan/planner.h"

#include <algorithm>

#include "core/check.h"
#include "plan/planner_state.h"

namespace loquetier {

namespace {

PlannerConfig checked(PlannerConfig c) {
  require(c.max_batch_tokens >= 1 && c.max_batch_tokens <= INT32_MAX, "[planner] max_batch_tokens: expected 1 .. ", INT32_MAX,
          ", got ", c.max_batch_tokens);
  require(c.max_sequences >= 1, "[planner] max_sequences: expected >= 1, got ", c.max_sequences);
  require(c.page_size >= 1, "[planner] page_size: expected >= 1, got ", c.page_size);
  require(c.adapter_pool_bytes >= 0, "[planner] adapter_pool_bytes: expected >= 0, got ", c.adapter_pool_bytes);
  require(c.num_layers >= 1, "[planner] num_layers: expected >= 1, got ", c.num_layers);
  require(c.slice_rows >= 0 && c.slack_rows >= 0, "[planner] slice_rows, slack_rows: expected >= 0, got ", c.slice_rows, " and ",
          c.slack_rows);
  require(c.mlp_share >= 0 && c.mlp_share <= 1, "[planner] mlp_share: expected 0 .. 1, got ", c.mlp_share);
  if (c.goal) {
    require(c.goal->ttft > 0 && c.goal->tpot > 0, "[planner] goal: expected seconds > 0, got ", c.goal->ttft, " and ",
            c.goal->tpot);
    require(c.cost != nullptr && c.slice_rows > 0, "[planner] goal: expected a cost model and slice_rows > 0 beside it");
  }
  require(c.starvation_steps >= 1, "[planner] starvation_steps: expected >= 1, got ", c.starvation_steps);
  return c;
}

bool row_order(const PlannedRequest* a, const PlannedRequest* b) {
  return a->adapter->id != b->adapter->id ? a->adapter->id < b->adapter->id : a->arrival < b->arrival;
}

}  // namespace

Planner::State::State(PlannerConfig c)
    : config(checked(c)),
      pages(c.kv_pages),
      cache(pages, c.page_size),
      adapters(c.adapter_pool_bytes),
      training(adapters, config) {}

Planner::Planner(PlannerConfig config) : state_(std::make_unique<State>(config)) {}
Planner::~Planner() = default;

// ---------------------------------------------------------------- adapters

namespace {

void require_closed(bool open, const char* caller) {
  require<std::logic_error>(!open, "[planner] ", caller, ": a plan is open, expected commit() or abort() first");
}

}  // namespace

void Planner::add_adapter(int64_t adapter, int64_t bytes, int64_t version) {
  require_closed(state_->open, "add_adapter");
  state_->adapters.add(adapter, bytes, version);
}

void Planner::set_version(int64_t adapter, int64_t version) {
  require_closed(state_->open, "set_version");
  require(adapter >= 0, "[planner] set_version: the base model has no versions");
  state_->adapters.set_version(state_->adapters.find(adapter, "set_version"), version);
  state_->cache.drop(adapter);
}

void Planner::remove_adapter(int64_t adapter) {
  require_closed(state_->open, "remove_adapter");
  require(adapter >= 0, "[planner] remove_adapter: the base model stays");
  state_->adapters.remove(state_->adapters.find_open(adapter, "remove_adapter"));
  state_->cache.drop(adapter);
}

// ---------------------------------------------------------------- requests and jobs

void Planner::add_request(RequestSpec spec) {
  State& s = *state_;
  require_closed(s.open, "add_request");
  require(!s.requests.contains(spec.id), "[planner] request: ", spec.id, " is already there");
  PlannedAdapter& adapter = s.adapters.find_open(spec.adapter, "add_request");
  require(!spec.prompt.empty(), "[planner] request ", spec.id, " prompt: expected at least one token, got none");
  require(spec.max_tokens >= 1, "[planner] request ", spec.id, " max_tokens: expected >= 1, got ", spec.max_tokens);
  const int64_t room = s.pages.total() * s.config.page_size, prompt = static_cast<int64_t>(spec.prompt.size());
  require(prompt <= room && spec.max_tokens - 1 <= room - prompt, "[planner] request ", spec.id, ": prompt of ", prompt, " and ",
          spec.max_tokens, " more tokens do not fit the KV pool of ", room, " tokens");

  PlannedRequest& r = s.requests[spec.id];
  r.id = spec.id;
  r.adapter = &adapter;
  r.pin_version = spec.pin_version;
  r.use_prefix_cache = spec.use_prefix_cache;
  r.priority = spec.priority;
  r.arrival = s.arrivals++;
  s.arrived |= 1;
  r.prompt_tokens = prompt;
  r.token_limit = prompt + spec.max_tokens;
  r.deadline = spec.deadline >= 0 ? spec.deadline : s.config.goal ? spec.arrived + s.config.goal->ttft : -1;
  r.reject_late = spec.reject_late;
  r.tokens = std::move(spec.prompt);
  if (spec.pinned_version >= 0 && spec.adapter >= 0) {
    r.pinned_epoch = spec.pinned_version == adapter.newest->version ? adapter.epoch : 0;
    r.pinned = &s.adapters.hold(adapter, spec.pinned_version);
  }
  s.adapters.add_user(adapter);
  s.prompts.add(r);
  if (r.deadline >= 0) s.urgent.insert(&r);
  if (r.deadline >= 0 && r.reject_late) s.rejectable.insert({r.deadline, r.id});
}

void Planner::add_job(JobSpec spec) {
  require_closed(state_->open, "add_job");
  state_->training.add(std::move(spec), state_->arrivals++);
}

bool Planner::finish(int64_t request) {
  require_closed(state_->open, "finish");
  const auto found = state_->requests.find(request);
  if (found == state_->requests.end()) return false;
  state_->finish(found->second);
  return true;
}

bool Planner::remove_job(int64_t job) {
  require_closed(state_->open, "remove_job");
  return state_->training.remove(job);
}

void Planner::abandon_backward() {
  require_closed(state_->open, "abandon_backward");
  state_->training.abandon_backward();
}

void Planner::append_token(int64_t request, int32_t token) {
  require_closed(state_->open, "append_token");
  PlannedRequest& r = state_->find_request(request, "append_token");
  if (!r.awaits) {
    require<std::logic_error>(r.state == RequestState::decoding && r.computed == r.length(), "[planner] append_token: request ",
                              r.id, " did not sample in the last step");
    require(r.length() < r.token_limit, "[planner] append_token: request ", r.id, " has all its ", r.token_limit - r.prompt_tokens,
            " tokens");
    r.tokens.push_back(token);
    return;
  }
  r.tokens.back() = token;
  r.awaits = false;
  if (r.computed / state_->config.page_size > r.cached_pages) state_->cache_full_pages(r);
}

bool Planner::goes_on() const {
  return std::ranges::any_of(state_->running, [](const PlannedRequest* r) { return r->goes_on(); });
}

void Planner::expect_tokens() {
  require_closed(state_->open, "expect_tokens");
  for (PlannedRequest* r : state_->running) {
    if (!r->goes_on()) continue;
    r->tokens.push_back(0);
    r->awaits = true;
  }
}

// ---------------------------------------------------------------- steps

Plan Planner::plan(const StepBudget& budget) {
  require_closed(state_->open, "plan");
  return state_->plan(budget);
}

std::vector<int64_t> Planner::commit(const Plan& plan, const StepOutcome& outcome) {
  require<std::logic_error>(state_->open, "[planner] commit: no plan is open");
  require<std::logic_error>(plan.serial == state_->serial, "[planner] commit: expected the plan made last");
  return state_->commit(plan, outcome);
}

StepWork Planner::work_of(const Plan& plan, const StepOutcome& outcome) const {
  require<std::logic_error>(state_->open && plan.serial == state_->serial, "[planner] work_of: expected the open plan");
  return state_->work_of(plan, outcome);
}

std::vector<int64_t> Planner::late(double now) const {
  require_closed(state_->open, "late");
  return state_->late(now);
}

void Planner::abort(const Plan& plan) {
  require<std::logic_error>(state_->open, "[planner] abort: no plan is open");
  require<std::logic_error>(plan.serial == state_->serial, "[planner] abort: expected the plan made last");
  state_->abort();
}

namespace {

// It was ended before the first piece of the training that it had.
bool got_nothing_of_training(const Plan& plan, const StepOutcome& outcome) {
  const bool chunk = plan.rows[static_cast<size_t>(Kind::train)] > 0 && plan.forward_slices == 0;  // in the pass
  if (chunk && outcome.forward_done) return false;
  if (!chunk && plan.forward_slices + plan.backward_slices == 0) return false;
  const int32_t forward = outcome.forward_slices < 0 ? plan.forward_slices : outcome.forward_slices;
  const int32_t backward = outcome.backward_slices < 0 ? plan.backward_slices : outcome.backward_slices;
  return forward == 0 && (backward == 0 || !outcome.forward_done);
}

}  // namespace

std::vector<int64_t> Planner::State::commit(const Plan& plan, const StepOutcome& outcome) {
  open = false;
  const bool rows_offered = limits.rows_wanted > 0;
  cut_short = !is_alone(plan) && got_nothing_of_training(plan, outcome);
  waited = waits;
  arrived <<= 1;
  clock += rows_offered;
  if (!served_queues.empty()) {
    const PromptLevel* waiting_longest = &prompts.least_recently_served();
    const bool served =
        std::ranges::any_of(served_queues, [&](const PromptQueue* queue) { return queue->level == waiting_longest; });
    level_passes = served ? 0 : level_passes + 1;
  }
  if (missed_queue && rows_offered) ++missed_queue->passed;
  for (PromptQueue* queue : served_queues) {
    queue->deficit = queue->plan_deficit;
    prompts.mark_served(*queue);
  }
  for (PlannedRequest* r : admitted) {
    counts.cached_tokens += r->hit_tokens;
    r->admitted_now = false;
    r->last_served = clock;
  }
  for (PlannedRequest* r : decodes) {
    if (r->planned > 0) r->turn = ++turns;
  }
  for (PlannedRequest* r : running) {
    if (r->planned == 0) continue;
    if (r->pin_version && !r->pinned) {
      r->pinned = &adapters.hold(*r->adapter, r->adapter->newest->version);
      r->pinned_epoch = r->adapter->epoch;
    }
    r->computed += r->planned;
    r->planned = 0;
    r->new_pages = false;
    r->last_served = clock;
    if (!r->awaits && r->computed / config.page_size > r->cached_pages) cache_full_pages(*r);
    if (r->state == RequestState::prefilling && r->computed == r->length()) {
      prompts.remove(*r);
      r->state = RequestState::decoding;
    }
    if (r->computed == r->length()) note_token(*r, outcome.now);
  }
  skip_evaluation = plan.rows[static_cast<size_t>(Kind::eval)] > 0;
  return training.commit(plan, outcome, rows_offered, slices_offered);
}

void Planner::State::abort() {
  open = false;
  for (auto r = admitted.rbegin(); r != admitted.rend(); ++r) {
    (*r)->planned = 0;
    undo_admit(**r);
  }
  for (PlannedRequest* r : running) {
    r->planned = 0;
    release_pages(*r, r->pages_before);
  }
  training.abort();
}

// ---------------------------------------------------------------- the life of a running request

PlannedRequest& Planner::State::find_request(int64_t id, const char* caller) {
  const auto found = requests.find(id);
  require<NotFound>(found != requests.end(), "[planner] ", caller, ": no request ", id);
  return found->second;
}

void Planner::State::finish(PlannedRequest& r) {
  if (r.state != RequestState::decoding) prompts.remove(r);
  if (r.state != RequestState::waiting) leave_running(r);
  release_pages(r, 0);
  if (r.pinned) adapters.release(*r.pinned);
  urgent.erase(&r);
  rejectable.erase({r.deadline, r.id});
  PlannedAdapter& adapter = *r.adapter;
  requests.erase(r.id);
  adapters.drop_user(adapter);
}

void Planner::State::enter_running(PlannedRequest& r) {
  running.insert(std::ranges::upper_bound(running, &r, row_order), &r);
  by_standing.insert(&r);
}

void Planner::State::leave_running(PlannedRequest& r) {
  running.erase(std::ranges::lower_bound(running, &r, row_order));
  by_standing.erase(&r);
}

void Planner::State::release_pages(PlannedRequest& r, size_t keep) {
  r.new_pages |= r.pages.size() > keep;
  for (; r.pages.size() > keep; r.pages.pop_back()) cache.release(r.pages.back());
  r.cached_pages = std::min(r.cached_pages, static_cast<int64_t>(keep));
}

// Full pages whose every row was computed in the adapter's present epoch become entries. When another request was first with the
// same tokens, its page is used from here on.
void Planner::State::cache_full_pages(PlannedRequest& r) {
  if (!cacheable(r, r.kv_epoch)) return;
  const auto size = static_cast<size_t>(config.page_size);
  for (; r.cached_pages < r.computed / config.page_size; ++r.cached_pages) {
    const auto i = static_cast<size_t>(r.cached_pages);
    const int32_t parent = i == 0 ? PrefixCache::kRoot : r.pages[i - 1];
    const int32_t page = cache.insert(r.adapter->id, r.version().version, parent,
                                      std::span<const int32_t>(r.tokens).subspan(i * size, size), r.pages[i]);
    r.new_pages |= page != r.pages[i];
    r.pages[i] = page;
  }
}

// ---------------------------------------------------------------- queries

Planner::Sequence Planner::sequence(int64_t request) const {
  const PlannedRequest& r = state_->find_request(request, "sequence");
  return {r.tokens, r.pages};
}
int32_t Planner::pending_backward_slices() const { return state_->training.backward_slices_left(); }
bool Planner::has_work() const { return !state_->requests.empty() || !state_->training.empty(); }

PlannerStats Planner::stats() const {
  PlannerStats stats = state_->counts;
  stats.running = static_cast<int64_t>(state_->running.size());
  stats.waiting = static_cast<int64_t>(state_->requests.size()) - stats.running;
  stats.queued_examples = state_->training.queued_examples();
  stats.pages_free = state_->pages.free();
  stats.pages_cached = state_->cache.idle();
  return stats;
}

void Planner::check_invariants() const { state_->check_invariants(); }

}  // namespace loquetier
