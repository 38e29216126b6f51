// The next step behind this one. While a step of decodes alone runs, the next one is planned, uploaded and launched, so that the
// device goes from one to the other without waiting for the host, or for what the caller does with the tokens.
//
// Its rows are the tokens that are being sampled: their ids are taken on the device, and the planner has a place for them
// (expect_tokens). A request that turns out to have ended has a row too many, whose result is dropped; its pages may go to another
// one, whose rows come later in the order of the device. What cannot be known yet is not run ahead: requests with penalties (they
// read all tokens before), steps with prompts or training. A step is launched ahead as late as the host's share of it allows, so
// that a request which arrives before then is in the next step as ever.
#include <algorithm>
#include <chrono>
#include <thread>

#include "engine/impl.h"

namespace loquetier {

namespace {

constexpr double kNap = 50e-6;          // seconds between two looks at the device
constexpr double kEarlyShare = 0.1;     // a step may end so much before its predicted time
constexpr double kEarlySeconds = 3e-4;  // and so much more

}  // namespace

// `plan` was launched at `begin`, and `done` is reached when its results are on the host.
void Engine::Impl::launch_ahead(const Plan& plan, const StepBatch& batch, double begin, uint64_t done) {
  Core& c = *core;
  if (!goes_ahead || !batch.decode || batch.reads_history || !c.jobs.empty() || c.micro || !plan.completed_jobs.empty()) return;
  if (!c.planner.goes_on() || !waits_to_go_ahead(plan, begin, done)) return;

  const double planning = now();
  const double end = std::max(planning, begin + plan.predicted);
  if (!c.committed) commit(plan, {.now = end});
  c.planner.expect_tokens();
  budget.now = end;
  Plan next = c.planner.plan(budget);
  note_preempted(next);
  bool launched = false;
  const Finally close([&] {
    if (!launched) c.planner.abort(next);
  });
  try {
    mark("planned ahead");
    launched = launch_behind(plan, batch, next);
  } catch (const DeviceError&) {
    throw;
  } catch (const std::exception&) {  // whatever it was, the next step meets it and says so
  }
  if (!launched) return;
  ahead_seconds = now() - planning;
  if (trace) trace->event("ahead", planning, now(), {{"rows", double(c.ahead->plan.total_rows())}});
}

// Sleeps until the step is nearly over; false when something came in meanwhile, which the next plan is to know of.
bool Engine::Impl::waits_to_go_ahead(const Plan& plan, double begin, uint64_t done) {
  const double napping = now();
  const double until = begin + (1 - kEarlyShare) * plan.predicted - kEarlySeconds - 2 * ahead_seconds;
  while (now() < until && !core->ops->device().reached(done)) std::this_thread::sleep_for(std::chrono::duration<double>(kNap));
  waiting_seconds += now() - napping;
  std::lock_guard guard(front);
  return inbox.empty();
}

// For each segment of `next` where the step under way leaves its last token on the device, or null. Both are in the order of rows,
// so each search goes on where the one before it ended.
std::vector<const int32_t*> Engine::Impl::awaited_tokens(const Plan& plan, const StepBatch& batch, const Plan& next) {
  std::vector<const int32_t*> tokens(next.segments.size(), nullptr);
  const size_t count = batch.heads.size();
  size_t at = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    for (size_t looks = 0; looks < count; ++looks, at = at + 1 == count ? 0 : at + 1) {
      if (plan.segments[static_cast<size_t>(batch.heads[at].segment)].id != next.segments[i].id) continue;
      tokens[i] = batch.sampled.device + at;
      break;
    }
  }
  return tokens;
}

// Takes `next` when it is launched behind `plan`. False, and nothing was launched: the step has other rows than decodes, or needs
// an adapter that is not in the pool.
bool Engine::Impl::launch_behind(const Plan& plan, const StepBatch& batch, Plan& next) {
  Core& c = *core;
  Device& device = c.ops->device();
  const bool decodes = next.rows[3] > 0 && next.rows[3] == next.total_rows();
  if (!decodes || next.forward_slices > 0 || next.backward_slices > 0 || !next.completed_jobs.empty()) return false;
  StepAhead step;
  WeightTableOfStep weights;
  std::vector<const int32_t*> awaited;
  StepContext context = context_of(weights);
  device.wait(c.uploaded);  // the tables on the host may be written again
  if (!advance_step(plan, batch, next, c.planner, options.page_size, c.metadata, c.ahead_results, step.batch)) {
    weights = weights_of(next);
    if (!std::ranges::all_of(weights, [](const auto& entry) { return entry.second->resident(); })) return false;
    context.awaited = awaited = awaited_tokens(plan, batch, next);
    step.batch = build_step(next, context, c.metadata, c.ahead_results);
    if (!step.batch.decode) return false;
    reserve_step(next, step.batch);
  }
  c.pool.pin(step.batch.weights);
  Finally unpin([&] { c.pool.unpin(step.batch.weights); });
  note_rows(next, now());
  c.metadata.upload();
  c.uploaded = device.record();
  StepOutcome all;
  run_forward(next, step.batch, context, c.ahead_results, all);
  prefetch();
  if (!step.batch.plain) c.ahead_results.start_download();
  step.mark = device.record();
  const StepWork work = c.work;
  const double share = c.serving_share;
  commit(next, {.now = now() + next.predicted});
  step.work = std::exchange(c.work, work);
  step.serving_share = std::exchange(c.serving_share, share);
  c.stats.steps_ahead += 1;
  step.plan = std::move(next);
  unpin.dismiss();
  c.ahead = std::move(step);
  return true;
}

// The step that was launched ahead: its results, and the one behind it.
void Engine::Impl::finish_ahead() {
  Core& c = *core;
  const StepAhead step = *std::exchange(c.ahead, std::nullopt);
  const Finally unpin([&] { c.pool.unpin(step.batch.weights); });
  std::swap(c.results, c.ahead_results);
  c.committed = true;
  c.apart.reset();
  c.launched.clear();
  c.work = step.work;
  c.serving_share = step.serving_share;
  const bool idle = c.ops->device().reached(step.mark);  // it is not known since when
  const double begin = idle ? entered : results_there;
  finish(step.plan, step.batch, {}, begin, step.mark);
  observe(step.plan, begin, begin, !idle);
}

// Nobody wants its results.
void Engine::Impl::drop_ahead() {
  if (!core || !core->ahead) return;
  core->ops->device().wait(core->ahead->mark);
  core->pool.unpin(core->ahead->batch.weights);
  core->ahead.reset();
}

}  // namespace loquetier
