// What the engine knows of its own times: what a step did and took, records of requests and jobs, the numbers that stats() shows.
#include <algorithm>

#include "engine/impl.h"

namespace loquetier {

namespace {

constexpr double kNumbersEvery = 0.1;  // seconds between two computations of quantiles and of the model's text

}  // namespace

// Before the plan is committed: what of it was done, and which share of the predicted time requests would have taken alone.
void Engine::Impl::note_work(const Plan& plan, const StepOutcome& outcome) {
  Core& c = *core;
  c.work = c.planner.work_of(plan, outcome);
  StepWork serving;
  serving.add_forward(plan.rows[2] + plan.rows[3]);
  serving.decode_rows = c.work.decode_rows;
  serving.decode_context = c.work.decode_context;
  serving.prefill_pairs = c.work.prefill_pairs;
  for (const Segment& s : plan.segments) serving.head_rows += s.samples;
  serving.head_passes = serving.head_rows > 0;
  const double all = c.cost.predict(c.work);
  c.serving_share = all > 0 ? std::clamp(c.cost.predict(serving) / all, 0.0, 1.0) : 0;
}

// Also of a plan that is not run: they stay pre-empted.
void Engine::Impl::note_preempted(const Plan& plan) {
  for (const int64_t id : plan.preempted) {
    if (const auto r = core->requests.find(id); r != core->requests.end()) r->second.result.preemptions += 1;
  }
}

// Who had rows in the step that began at `begin`.
void Engine::Impl::note_rows(const Plan& plan, double begin) {
  Core& c = *core;
  const auto note_job = [&](int64_t id) {
    const auto job = c.jobs.find(id);
    if (job == c.jobs.end()) return;
    if (job->second.first_row < 0) job->second.first_row = begin;
    job->second.steps += 1;
  };
  int64_t last = -1;  // segments of one job are adjacent
  for (const Segment& s : plan.segments) {
    if (s.kind == Kind::train || s.kind == Kind::eval) {
      if (s.id != last) note_job(s.id);
      last = s.id;
    } else if (s.kind == Kind::decode) {  // had rows of its prompt
      continue;
    } else if (const auto r = c.requests.find(s.id); r != c.requests.end() && r->second.first_row < 0) {
      r->second.first_row = begin;
    }
  }
  if (plan.rows[0] == 0 && plan.forward_slices + plan.backward_slices > 0 && c.micro) {
    for (const int64_t id : c.micro->jobs) note_job(id);
  }
}

void Engine::Impl::finish_record(Request& r) const {
  InferResult& result = r.result;
  const double end = now();
  result.queue_seconds = (r.first_row < 0 ? end : r.first_row) - r.submitted;
  if (r.first_token >= 0) {
    result.ttft_seconds = r.first_token - r.submitted;
    const auto tokens = static_cast<double>(result.token_ids.size());
    if (tokens > 1) result.tpot_seconds = (r.last_token - r.first_token) / (tokens - 1);
  }
  const double wanted = r.deadline >= 0 ? r.deadline : options.latency ? r.submitted + options.latency->ttft_ms * 1e-3 : -1;
  result.deadline_met = wanted < 0 || (r.first_token >= 0 ? r.first_token : end) <= wanted;
}

// The step is over: what it took teaches the cost model, when that is known.
void Engine::Impl::observe(const Plan& plan, double begin, double planned, bool timed) {
  Core& c = *core;
  const double end = now(), seconds = end - begin;
  c.stats.steps += 1;
  c.stats.step_seconds += end - entered;
  c.stats.host_seconds += end - entered - waiting_seconds;
  if (plan.empty()) return;
  const double predicted = c.cost.predict(c.work);
  c.stats.last_step_seconds = seconds;
  c.stats.last_step_predicted = predicted;
  c.stats.training_seconds += seconds * (1 - c.serving_share);
  if (timed) c.cost.observe(c.work, seconds);
  if (!trace) return;
  trace->event("plan", begin, planned, {});
  trace->event("step", begin, end,
               {{"train_rows", double(plan.rows[0])},
                {"eval_rows", double(plan.rows[1])},
                {"prefill_rows", double(plan.rows[2])},
                {"decode_rows", double(plan.rows[3])},
                {"slices", c.work.slices},
                {"predicted_ms", predicted * 1e3},
                {"measured_ms", seconds * 1e3},
                {"target_ms", plan.seconds * 1e3}});
  const PlannerStats queues = c.planner.stats();
  trace->counter(
      "queues", end,
      {{"waiting", double(queues.waiting)}, {"running", double(queues.running)}, {"examples", double(queues.queued_examples)}});
}

void Engine::Impl::publish() {
  Core& c = *core;
  const PlannerStats planner = c.planner.stats();
  EngineStats& s = c.stats;
  s.running_requests = planner.running;
  s.preemptions = planner.preemptions;
  s.cached_prompt_tokens = planner.cached_tokens;
  s.kv_pages_free = planner.pages_free;
  s.kv_pages_cached = planner.pages_cached;
  s.resident_adapters = c.pool.resident_count();
  s.adapter_evictions = c.pool.evictions();
  s.adapter_fetches = c.pool.fetches();
  s.adapter_prefetches = c.pool.prefetches();
  s.adapter_pool_used = static_cast<int64_t>(c.pool.used());
  s.graph_captures = c.graphs.counts().captures;
  s.graph_replays = c.graphs.counts().replays;
  s.graphs = c.graphs.counts().kept;
  s.graph_seconds = c.graphs.counts().capture_seconds;
  s.saved_bytes = static_cast<int64_t>(c.saved_storage.bytes());
  s.scratch_bytes = static_cast<int64_t>(c.scratch_storage.bytes());
  size_t tables = c.pool.tables_bytes();
  for (const Blob* blob : {&c.metadata, &c.micro_metadata, &c.chunk_metadata, &c.results, &c.ahead_results, &c.chunk_results})
    tables += blob->device_bytes();
  s.metadata_bytes = static_cast<int64_t>(tables);
  s.workspace_bytes = static_cast<int64_t>(c.ops->workspace_bytes());
  s.arena_bytes = s.saved_bytes + s.scratch_bytes;
  s.deadlines_met = planner.deadlines_met;
  s.deadlines_missed = planner.deadlines_missed + s.rejected_requests;
  if (now() - numbers_published >= kNumbersEvery || numbers_published < 0 || !c.planner.has_work()) {
    numbers_published = now();
    s.prediction_error_median = c.cost.error_quantile(0.5);
    s.prediction_error_p95 = c.cost.error_quantile(0.95);
    s.cost_model = c.cost.save();
  }
  std::lock_guard guard(front);
  published = s;
  const StepResult& e = c.events;
  undelivered = !(e.tokens.empty() && e.finished.empty() && e.trained.empty() && e.evaluated.empty());
  for (int64_t id : c.ended) {
    auto entry = live.extract(id);
    if (entry.empty()) continue;
    const AdapterPtr& adapter = entry.mapped();
    if (const auto job = job_examples.find(id); job != job_examples.end()) {
      live_examples -= job->second;
      if (adapter) --adapter->live_jobs;
      job_examples.erase(job);
    } else {
      --live_requests;
      if (adapter) --adapter->live_requests;
    }
  }
  c.ended.clear();
}

}  // namespace loquetier
