// One step, top to bottom: take in the inbox, plan, pin the adapters, upload, forward and heads, pieces of training (training.cpp),
// optimizer, download, commit, publish (observe.cpp). What a caller learns (events) is written only after the numbers are there; an
// exception anywhere puts the plan back, ends the training jobs it touched with the reason, and leaves everything else to be
// planned again.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/impl.h"
#include "engine/memory_plan.h"

namespace loquetier {

void ensure(Buffer& buffer, Device& device, size_t bytes) {
  if (buffer.bytes() >= bytes) return;
  buffer = Buffer();  // give back first: the two need not fit together
  buffer = Buffer(device, bytes);
}

StepResult Engine::Impl::step() {
  require(!stepping.exchange(true), "[step] expected one caller at a time, another thread is inside step()");
  Finally leave([&] { stepping = false; });
  std::lock_guard step_guard(step_lock);
  {
    std::lock_guard guard(front);
    require_usable();
  }
  entered = now();
  waiting_seconds = 0;
  try {
    take_in();
    if (core->ahead &&
        std::ranges::none_of(core->ahead->plan.segments, [&](const Segment& s) { return core->requests.contains(s.id); })) {
      drop_ahead();
    }
  } catch (const DeviceError& error) {
    fail(error);
    throw;
  }
  reject_late();
  try {
    if (core->ahead) finish_ahead();
    else plan_and_run();
  } catch (const DeviceError& error) {
    fail(error);
    publish();
    throw;
  }
  StepResult result = std::exchange(core->events, {});
  publish();
  return result;
}

void Engine::Impl::plan_and_run() {
  budget.now = now();
  const Plan plan = core->planner.plan(budget);
  const double planned = now();
  if (!plan.empty()) {
    try {
      run(plan);
    } catch (const DeviceError&) {
      if (!core->committed) core->planner.abort(plan);  // nothing else: the device answers no more, and no step follows
      throw;
    } catch (const std::exception& error) {
      recover(plan, error.what());
      publish();
      throw;
    }
  } else {
    core->planner.commit(plan, {.now = planned});
  }
  observe(plan, entered, planned);
}

void Engine::Impl::fail(const DeviceError& error) {
  std::lock_guard guard(front);
  failure = error.what();
}

// ---------------------------------------------------------------- the inbox

void Engine::Impl::take_in() {
  std::deque<Command> commands;
  {
    std::lock_guard guard(front);
    commands.swap(inbox);
    arrivals = 0;
  }
  for (Command& command : commands) {
    std::visit([&](auto& c) { take_in(std::move(c)); }, command);
  }
}

void Engine::Impl::take_in(Request&& request) {
  RequestSpec spec;
  spec.id = request.id;
  spec.adapter = id_of(request.adapter);
  spec.pin_version = request.pin_version;
  spec.priority = request.priority;
  spec.prompt = std::move(request.prompt);
  spec.max_tokens = request.max_new_tokens;
  spec.use_prefix_cache = !request.sampling.prompt_logprobs;
  spec.arrived = request.submitted;
  spec.deadline = request.deadline;
  spec.reject_late = request.reject_late;
  if (request.sampling.prompt_logprobs) {
    request.result.prompt_logprobs.assign(static_cast<size_t>(request.prompt_length), std::numeric_limits<float>::quiet_NaN());
  }
  core->requests.emplace(request.id, std::move(request));
  core->planner.add_request(std::move(spec));
}

void Engine::Impl::take_in(Job&& job) {
  if (job.adapter && core->removed.contains(job.adapter->id)) {  // removed between its submission and now
    const int64_t id = job.id;
    core->jobs.emplace(id, std::move(job));
    finish_job(id, "cancelled");
    return;
  }
  if (job.train && !job.adapter->train) {
    AdapterRecord& a = *job.adapter;
    try {
      a.train = new_train_state(a, master_values(a).data());
    } catch (const OutOfMemory& error) {
      const int64_t id = job.id;
      core->jobs.emplace(id, std::move(job));
      finish_job(id, concat("error: ", error.what()));
      return;
    }
    a.exact = {};
    core->stats.training_state_bytes += static_cast<int64_t>(a.train->bytes());
  }
  JobSpec spec;
  spec.id = job.id;
  spec.adapter = id_of(job.adapter);
  spec.train = job.train;
  spec.barrier = job.optimizer.has_value();
  spec.weight = job.weight;
  if (job.adapter) spec.lowest_layer = static_cast<int32_t>(job.adapter->layout->lowest_layer);
  for (const PreparedExample& example : job.examples) {
    spec.rows.push_back(static_cast<int32_t>(example.ids.size()));
    spec.targets.push_back(static_cast<int32_t>(example.targets.size()));
  }
  if (job.train) {
    AdapterRecord& a = *job.adapter;
    job.dropout_base = a.dropout_counter;
    a.dropout_counter += job.examples.size();
  } else {
    for (const PreparedExample& example : job.examples) {
      job.logprobs.emplace_back(static_cast<size_t>(example.length), std::numeric_limits<float>::quiet_NaN());
    }
  }
  core->jobs.emplace(job.id, std::move(job));
  core->planner.add_job(std::move(spec));
}

void Engine::Impl::take_in(const CancelCommand& cancel) {
  if (core->requests.contains(cancel.id)) finish_request(cancel.id, FinishReason::cancelled);
  else if (core->jobs.contains(cancel.id)) finish_job(cancel.id, "cancelled");
}

void Engine::Impl::take_in(const RemoveCommand& remove) {
  const AdapterId id = remove.adapter->id;
  std::vector<int64_t> jobs;
  for (const auto& [job_id, job] : core->jobs) {
    if (job.adapter == remove.adapter) jobs.push_back(job_id);
  }
  std::sort(jobs.begin(), jobs.end());
  for (int64_t job : jobs) finish_job(job, "cancelled");
  core->removed.insert(id);
  core->planner.remove_adapter(id);
  forget_if_unused(remove.adapter);
}

// A removed adapter stays as long as a micro-batch or a request uses it; its training state only as long as the micro-batch.
void Engine::Impl::forget_if_unused(const AdapterPtr& adapter) {
  Core& c = *core;
  if (!adapter || !c.removed.contains(adapter->id)) return;
  if (c.micro && std::ranges::find(c.micro->drop, adapter) != c.micro->drop.end()) return;
  if (adapter->train) c.stats.training_state_bytes -= static_cast<int64_t>(adapter->train->bytes());
  adapter->train.reset();
  const bool used = std::ranges::any_of(c.requests, [&](const auto& entry) { return entry.second.adapter == adapter; });
  if (!used) c.adapters.erase(adapter->id);
}

// ---------------------------------------------------------------- running a plan

WeightTableOfStep Engine::Impl::weights_of(const Plan& plan) {
  WeightTableOfStep weights;
  for (const AdapterUse& use : plan.adapters) {
    const auto& newest = core->adapters.at(use.adapter)->weights;
    if (newest->version() == use.version) weights[{use.adapter, use.version}] = newest;
  }
  for (const Segment& s : plan.segments) {
    if (s.adapter == kBaseAdapter || s.kind == Kind::train || s.kind == Kind::eval) continue;
    Request& r = core->requests.at(s.id);
    if (!r.pin_version) continue;
    if (!r.pinned) r.pinned = weights.at({s.adapter, s.version});
    weights.emplace(std::pair(s.adapter, s.version), r.pinned);
  }
  return weights;
}

void Engine::Impl::run(const Plan& plan) {
  Core& c = *core;
  c.committed = false;
  c.apart.reset();
  c.launched.clear();
  const WeightTableOfStep weights = weights_of(plan);
  std::vector<std::shared_ptr<AdapterWeights>> pinned;
  for (const auto& [use, w] : weights) pinned.push_back(w);
  c.pool.pin(pinned);
  Finally unpin([&] { c.pool.unpin(pinned); });

  if (!plan.micro_batch.empty()) begin_micro_batch(plan, weights);
  note_preempted(plan);
  note_rows(plan, budget.now);
  const StepContext context = context_of(weights);
  // A chunk that runs layer by layer has a batch of its own.
  Plan beside;
  const bool apart = plan.forward_slices > 0 && !plan.resumes;
  if (apart) beside.completed_jobs = plan.completed_jobs;
  const Plan& batch_plan = apart ? beside : plan;
  StepBatch batch = build_step(batch_plan, context, c.metadata, c.results);
  mark("planned");
  reserve_step(plan, batch);
  if (c.micro && plan.backward_slices > 0) refresh_micro_batch(*c.micro, c.micro_metadata);
  c.metadata.upload();
  c.uploaded = c.ops->device().record();
  mark("uploaded");
  const double launching = now();

  StepOutcome outcome;
  if (batch.view.rows > 0) run_forward(plan, batch, context, c.results, outcome);
  if (trace && batch.view.rows > 0) trace->event("forward", launching, now(), {{"rows", double(batch.view.rows)}});
  if (plan.forward_slices > 0) run_forward_slices(plan, context, outcome);
  mark("forward");
  const bool ended = run_backward(plan, outcome);
  mark("backward");
  if (ended && batch.updates.job_count > 0) update(batch);
  mark("optimizer");
  prefetch();
  if (!batch.plain) c.results.start_download();
  if (c.apart) c.chunk_results.start_download();
  finish(plan, batch, outcome, launching, c.ops->device().record());
}

StepContext Engine::Impl::context_of(const WeightTableOfStep& weights) const {
  const Core& c = *core;
  const int32_t graph_rows =
      c.graphs.enabled() ? static_cast<int32_t>(std::min<int64_t>(kMostDecodeRows, options.max_batch_tokens)) : 0;
  const auto head_rows = static_cast<int32_t>(head_chunk(options, c.ops->device().host_addressable()));
  return {
      c.model.config(),      c.planner, c.adapters, c.requests, c.jobs, weights, options.page_size, c.micro ? &*c.micro : nullptr,
      options.max_lora_rank, head_rows, graph_rows};
}

// What was launched from `launching` on, and is done with its results on the host at the mark `done`: launches the next step behind
// it where that can be, and takes its results.
void Engine::Impl::finish(const Plan& plan, const StepBatch& batch, StepOutcome outcome, double launching, uint64_t done) {
  Core& c = *core;
  Device& device = c.ops->device();
  launch_ahead(plan, batch, launching, done);
  const double waiting = device.host_addressable() ? launching : now();  // there the calls returned when the work was done
  device.wait(done);
  results_there = now();
  waiting_seconds += results_there - waiting;
  std::vector<int64_t> completed;
  if (!c.committed) {
    mark("downloaded");
    outcome.now = now();
    completed = commit(plan, outcome);
  }
  collect(plan, batch, completed);
}

// Memory of the step: what its batch, the slices behind it, and a micro-batch that begins need.
void Engine::Impl::reserve_step(const Plan& plan, const StepBatch& batch) {
  Core& c = *core;
  const BatchView& view = batch.view;
  Device& device = c.ops->device();
  const SliceShape shape = slice_shape();
  size_t scratch = c.model.scratch_bytes(view.rows, view.train_rows, batch.largest_chunk, view.groups.max_rank, recompute, shape);
  if (c.micro) {
    const int64_t rank = plan.micro_batch.empty() ? c.micro->saved.rank : std::max(c.micro->rank, view.groups.max_rank);
    scratch = std::max(scratch, c.model.scratch_bytes(0, c.micro->view.train_rows, 0, rank, recompute, shape));
  }
  ensure(c.scratch_storage, device, scratch);
  if (plan.micro_batch.empty()) return;
  MicroBatch& micro = *c.micro;
  const int64_t rows = shape.chunked ? micro.view.train_rows + slack_rows : view.rows;
  const int64_t rank = shape.chunked ? micro.rank : view.groups.max_rank;
  ensure(c.saved_storage, device, c.model.saved_bytes(rows, micro.view.train_rows, rank, recompute, shape.chunked));
  if (!shape.chunked) return;
  Arena saved(c.saved_storage.data(), c.saved_storage.bytes());
  micro.saved = c.model.reserve(saved, rows, micro.view.train_rows, rank, recompute);
  c.stats.arena_peak = std::max(c.stats.arena_peak, static_cast<int64_t>(saved.peak()));
}

void Engine::Impl::run_forward(const Plan& plan, StepBatch& batch, const StepContext& context, Blob& results,
                               StepOutcome& outcome) {
  Core& c = *core;
  const BatchView& view = batch.view;
  Arena scratch(c.scratch_storage.data(), c.scratch_storage.bytes());
  Arena saved(c.saved_storage.data(), c.saved_storage.bytes());
  if (batch.decode) {
    c.graphs.run(view, batch.awaited, *batch.decode, c.kv, scratch);
    c.graphs.run_heads(view, *batch.decode, batch.plain, results, scratch);
  } else if (view.train_rows > 0 && slice_rows > 0) {
    run_chunk(plan, batch, context, scratch, outcome);
  } else {
    c.model.forward(view, c.kv, view.train_rows > 0 ? &c.micro->saved : nullptr, saved, scratch, recompute);
  }
  if (view.train_rows > 0 && outcome.forward_done) c.micro->forwarded += plan.rows[0];
  c.stats.arena_peak = std::max(c.stats.arena_peak, static_cast<int64_t>(saved.peak() + scratch.peak()));
}

void Engine::Impl::update(const StepBatch& batch) {
  Core& c = *core;
  c.ops->grad_norm(batch.updates, batch.norms.device);
  for (int64_t id : batch.update_jobs) {
    // Requests that pinned the version about to be overwritten keep a copy of it.
    AdapterRecord& a = *c.jobs.at(id).adapter;
    std::shared_ptr<AdapterWeights> old;
    for (auto& [request_id, request] : c.requests) {
      if (request.pinned != a.weights) continue;
      if (!old) old = c.pool.copy(a.weights, a.weights->version());
      request.pinned = old;
    }
  }
  c.ops->adamw(batch.updates, batch.norms.device);
}

// Fetches adapters that the next steps will want while this one computes.
void Engine::Impl::prefetch() {
  constexpr size_t kFetchedAhead = 4;
  Core& c = *core;
  std::vector<std::shared_ptr<AdapterWeights>> next;
  for (const AdapterUse& use : c.planner.upcoming_adapters(kFetchedAhead)) {
    const auto& newest = c.adapters.at(use.adapter)->weights;
    if (newest->version() == use.version) next.push_back(newest);
  }
  if (!next.empty()) c.pool.prefetch(next, c.uploaded);
}

// ---------------------------------------------------------------- results

std::vector<int64_t> Engine::Impl::commit(const Plan& plan, const StepOutcome& outcome) {
  note_work(plan, outcome);
  std::vector<int64_t> completed = core->planner.commit(plan, outcome);
  core->committed = true;
  return completed;
}

void Engine::Impl::collect(const Plan& plan, const StepBatch& batch, const std::vector<int64_t>& completed) {
  Core& c = *core;
  c.stats.train_tokens += plan.rows[0];
  c.stats.eval_tokens += plan.rows[1];
  c.stats.prefill_tokens += plan.rows[2];
  c.stats.decode_tokens += plan.rows[3];
  for (const Segment& s : plan.segments) {
    if (s.kind != Kind::train && s.kind != Kind::eval) continue;
    if (const auto job = c.jobs.find(s.id); job != c.jobs.end()) job->second.version = s.version;
  }
  collect_losses(plan, batch);
  if (c.apart) collect_losses(c.apart->first, c.apart->second);
  complete_jobs(completed, batch);
  collect_tokens(plan, batch);
  if (c.apart) collect_tokens(c.apart->first, c.apart->second);
}

void Engine::Impl::collect_losses(const Plan& plan, const StepBatch& batch) {
  for (int32_t h = batch.first_loss; h < batch.sample_begin; ++h) {
    const HeadRef& ref = batch.heads[static_cast<size_t>(h)];
    const Segment& s = plan.segments[static_cast<size_t>(ref.segment)];
    const float logprob = batch.logprob.host[h];
    if (s.kind == Kind::prefill) {
      core->requests.at(s.id).result.prompt_logprobs[static_cast<size_t>(ref.index)] = logprob;
      continue;
    }
    const auto found = core->jobs.find(s.id);
    if (found == core->jobs.end()) continue;  // cancelled while its micro-batch was under way
    Job& job = found->second;
    job.loss += batch.loss.host[h];
    if (job.train) continue;
    const int32_t row = job.examples[static_cast<size_t>(s.example)].target_rows[static_cast<size_t>(ref.index)];
    job.logprobs[static_cast<size_t>(s.example)][static_cast<size_t>(row + 1)] = logprob;
  }
}

void Engine::Impl::complete_jobs(const std::vector<int64_t>& completed, const StepBatch& batch) {
  Core& c = *core;
  for (int64_t id : completed) {
    Job& job = c.jobs.at(id);
    if (!job.train) {
      c.events.evaluated.push_back({id, name_of(job.adapter), job.version, job.loss, job.targets, std::move(job.logprobs), {}});
    } else {
      AdapterRecord& a = *job.adapter;
      TrainResult result{id,    a.name,       a.weights->version(), job.loss, job.targets, std::numeric_limits<double>::quiet_NaN(),
                         false, "accumulated"};
      if (job.optimizer) {
        const auto index = std::ranges::find(batch.update_jobs, id) - batch.update_jobs.begin();
        const float norm = batch.norms.host[index];
        result.grad_norm = norm;
        result.applied = std::isfinite(norm);
        if (result.applied) {
          result.reason.clear();
          a.train->applied();
          c.pool.mark_updated(*a.weights, ++result.version);
          c.planner.set_version(a.id, result.version);
          c.stats.optimizer_steps += 1;
        } else {
          result.reason = std::isfinite(job.loss) ? "non-finite gradient" : "non-finite loss";
          a.train->has_gradients = false;
          c.stats.skipped_updates += 1;
        }
      }
      result.queue_seconds = job.first_row - job.submitted;
      result.seconds = now() - job.submitted;
      result.steps = job.steps;
      c.events.trained.push_back(std::move(result));
    }
    c.ended.push_back(id);
    c.jobs.erase(id);
  }
}

void Engine::Impl::collect_tokens(const Plan& plan, const StepBatch& batch) {
  Core& c = *core;
  c.events.tokens.reserve(c.events.tokens.size() + batch.heads.size() - static_cast<size_t>(batch.sample_begin));
  const double when = now();
  for (size_t i = static_cast<size_t>(batch.sample_begin); i < batch.heads.size(); ++i) {
    const Segment& s = plan.segments[static_cast<size_t>(batch.heads[i].segment)];
    const auto found = c.requests.find(s.id);
    if (found == c.requests.end()) continue;  // ended while this step was under way
    Request& r = found->second;
    if (std::isnan(batch.logprob.host[i])) {
      finish_request(s.id, FinishReason::error, "the model's logits are not finite");
      continue;
    }
    TokenEvent& event = c.events.tokens.emplace_back();
    event.request_id = s.id;
    event.index = static_cast<int64_t>(r.result.token_ids.size());
    event.token_id = batch.sampled.host[i];
    event.logprob = batch.logprob.host[i];
    event.adapter = r.result.adapter;
    event.version = s.version;
    const size_t row = (i - static_cast<size_t>(batch.sample_begin)) * static_cast<size_t>(batch.top_columns);
    for (int n = 0; batch.top_columns > 0 && n < r.sampling.logprobs; ++n) {
      event.top_logprobs.push_back(
          {batch.top_ids.host[row + static_cast<size_t>(n)], batch.top_logprobs.host[row + static_cast<size_t>(n)]});
    }
    r.last_token = when;
    if (r.first_token < 0) r.first_token = when;
    r.result.token_ids.push_back(event.token_id);
    r.result.logprobs.push_back(event.logprob);
    const bool stop = std::ranges::find(r.stop_ids, event.token_id) != r.stop_ids.end();
    const bool full = event.index + 1 >= r.max_new_tokens;
    event.finish_reason = stop ? FinishReason::stop : full ? FinishReason::length : FinishReason::none;
    c.stats.generated_tokens += 1;
    if (event.finish_reason == FinishReason::none) c.planner.append_token(s.id, event.token_id);
    else finish_request(s.id, event.finish_reason);
  }
}

// ---------------------------------------------------------------- endings

void Engine::Impl::reject_late() {
  const double when = now();
  for (const int64_t id : core->planner.late(when)) {
    const Request& r = core->requests.at(id);
    const double wanted = r.deadline >= 0 ? r.deadline : r.submitted + options.latency->ttft_ms * 1e-3;
    core->stats.rejected_requests += 1;
    finish_request(id, FinishReason::rejected,
                   concat("the first token was wanted within ", (wanted - r.submitted) * 1e3, " ms of submission; after ",
                          (when - r.submitted) * 1e3, " ms it could not come in time"));
  }
}

void Engine::Impl::finish_request(int64_t id, FinishReason reason, const std::string& error) {
  Core& c = *core;
  auto node = c.requests.extract(id);
  Request& r = node.mapped();
  c.planner.finish(id);
  finish_record(r);
  r.result.finish_reason = reason;
  r.result.error = error;
  c.events.finished.push_back(std::move(r.result));
  c.ended.push_back(id);
  forget_if_unused(r.adapter);
}

// Ends a job without a result. A training job that began takes the gradients since the last update with it.
void Engine::Impl::finish_job(int64_t id, const std::string& reason) {
  Core& c = *core;
  auto node = c.jobs.extract(id);
  Job& job = node.mapped();
  c.planner.remove_job(id);
  const int64_t version = job.adapter ? job.adapter->weights->version() : 0;
  if (job.train) {
    if (job.began && job.adapter->train) {
      const bool in_flight = c.micro && std::ranges::find(c.micro->jobs, id) != c.micro->jobs.end();
      if (in_flight) c.micro->drop.push_back(job.adapter);
      else job.adapter->train->drop_gradients();
    }
    TrainResult result{id,    name_of(job.adapter), version, job.loss, job.targets, std::numeric_limits<double>::quiet_NaN(), false,
                       reason};
    result.seconds = now() - job.submitted;
    result.queue_seconds = job.first_row < 0 ? result.seconds : job.first_row - job.submitted;
    result.steps = job.steps;
    c.events.trained.push_back(std::move(result));
  } else {
    c.events.evaluated.push_back(
        {id, name_of(job.adapter), version, std::numeric_limits<double>::quiet_NaN(), job.targets, {}, reason});
  }
  c.ended.push_back(id);
}

// After an exception in the middle of a step. Inference rows are planned again (their KV writes are repeated); of jobs that had
// rows in the step or a backward under way it is not known what was added to the gradients, so they end, and those gradients are
// dropped.
void Engine::Impl::recover(const Plan& plan, const std::string& what) {
  Core& c = *core;
  if (!c.committed) c.planner.abort(plan);
  std::vector<int64_t> jobs = plan.completed_jobs;
  for (const Segment& s : plan.segments) {
    if (s.kind == Kind::train || s.kind == Kind::eval) jobs.push_back(s.id);
  }
  c.apart.reset();
  if (c.micro) jobs.insert(jobs.end(), c.micro->jobs.begin(), c.micro->jobs.end());
  std::ranges::sort(jobs);
  jobs.erase(std::unique(jobs.begin(), jobs.end()), jobs.end());
  if (c.micro) {
    c.planner.abandon_backward();
    end_micro_batch();
  }
  for (int64_t id : jobs) {
    if (c.jobs.contains(id)) finish_job(id, "error: " + what);
  }
}

}  // namespace loquetier
