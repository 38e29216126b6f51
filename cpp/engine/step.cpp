// One step, top to bottom: take in the inbox, plan, pin the adapters, upload, forward and heads, slices of backward, optimizer,
// download, commit, publish. What a caller learns (events) is written only after the numbers are there; an exception anywhere puts
// the plan back, ends the training jobs it touched with the reason, and leaves everything else to be planned again.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "engine/impl.h"

namespace loquetier {

namespace {

// Runs `undo` when the scope ends.
template <class F>
struct Finally {
  F undo;
  explicit Finally(F f) : undo(std::move(f)) {}
  Finally(const Finally&) = delete;
  ~Finally() { undo(); }
};

void ensure(Buffer& buffer, Device& device, size_t bytes) {
  if (buffer.bytes() >= bytes) return;
  buffer = Buffer();  // give back first: the two need not fit together
  buffer = Buffer(device, bytes);
}

}  // namespace

StepResult Engine::Impl::step() {
  require(!stepping.exchange(true), "[step] expected one caller at a time, another thread is inside step()");
  Finally leave([&] { stepping = false; });
  std::lock_guard step_guard(step_lock);
  {
    std::lock_guard guard(front);
    require_usable();
  }
  const auto begin = std::chrono::steady_clock::now();
  try {
    take_in();
  } catch (const DeviceError& error) {
    fail(error);
    throw;
  }
  const Plan plan = core->planner.plan(budget);
  if (!plan.empty()) {
    try {
      run(plan);
    } catch (const DeviceError& error) {
      fail(error);
      if (!core->committed) core->planner.abort(plan);  // nothing else: the device answers no more, and no step follows
      publish();
      throw;
    } catch (const std::exception& error) {
      recover(plan, error.what());
      publish();
      throw;
    }
  } else {
    core->planner.commit(plan);
  }
  core->stats.steps += 1;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  core->stats.step_seconds += seconds;
  core->stats.host_seconds += seconds - std::exchange(waiting_seconds, 0);
  StepResult result = std::exchange(core->events, {});
  publish();
  return result;
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
  for (const PreparedExample& example : job.examples) spec.rows.push_back(static_cast<int32_t>(example.ids.size()));
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
  Device& device = c.ops->device();
  const WeightTableOfStep weights = weights_of(plan);
  std::vector<std::shared_ptr<AdapterWeights>> pinned;
  for (const auto& [use, w] : weights) pinned.push_back(w);
  c.pool.pin(pinned);
  Finally unpin([&] { c.pool.unpin(pinned); });

  const int blob = c.micro ? 1 - c.micro->blob : 0;
  const int32_t graph_rows =
      c.graphs.enabled() ? static_cast<int32_t>(std::min<int64_t>(kMostDecodeRows, options.max_batch_tokens)) : 0;
  const StepContext context{c.model.config(),      c.planner, c.adapters, c.requests, c.jobs, weights, options.page_size,
                            options.max_lora_rank, graph_rows};
  StepBatch batch = build_step(plan, context, c.metadata[blob], c.results);
  if (c.micro && plan.backward_layers > 0) refresh_micro_batch();
  mark("planned");
  const BatchView& view = batch.view;
  size_t scratch_bytes = c.model.scratch_bytes(view.rows, view.train_rows, view.head_count, view.groups.max_rank, recompute);
  if (c.micro)
    scratch_bytes = std::max(scratch_bytes, c.model.scratch_bytes(0, c.micro->saved.train_rows, 0, c.micro->saved.rank, recompute));
  ensure(c.scratch_storage, device, scratch_bytes);
  if (view.train_rows > 0)
    ensure(c.saved_storage, device, c.model.saved_bytes(view.rows, view.train_rows, view.groups.max_rank, recompute));
  c.metadata[blob].upload();
  mark("uploaded");
  using Clock = std::chrono::steady_clock;
  const bool computes = device.host_addressable();  // then the calls below return when the work is done
  auto waited = Clock::now();

  if (view.rows > 0) {
    Arena scratch(c.scratch_storage.data(), c.scratch_storage.bytes());
    Arena saved(c.saved_storage.data(), c.saved_storage.bytes());
    if (view.train_rows > 0) begin_micro_batch(plan, batch, blob, weights);
    if (batch.decode) {
      c.graphs.run(view, *batch.decode, c.kv, scratch);
      c.model.decode_heads(view, scratch);
    } else c.model.forward(view, c.kv, view.train_rows > 0 ? &c.micro->saved : nullptr, saved, scratch, recompute);
    c.stats.arena_peak = std::max(c.stats.arena_peak, static_cast<int64_t>(saved.peak() + scratch.peak()));
  }
  mark("forward");
  run_backward(plan.backward_layers);
  mark("backward");
  if (batch.updates.job_count > 0) {
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
  mark("optimizer");
  prefetch();
  if (!computes) waited = Clock::now();
  c.results.download();
  waiting_seconds = std::chrono::duration<double>(Clock::now() - waited).count();
  mark("downloaded");
  collect(plan, batch);
}

// Fetches adapters that the next steps will want while this one computes.
void Engine::Impl::prefetch() {
  constexpr size_t kAhead = 4;
  Core& c = *core;
  std::vector<std::shared_ptr<AdapterWeights>> next;
  for (const AdapterUse& use : c.planner.upcoming_adapters(kAhead)) {
    const auto& newest = c.adapters.at(use.adapter)->weights;
    if (newest->version() == use.version) next.push_back(newest);
  }
  if (!next.empty()) c.pool.prefetch(next);
}

void Engine::Impl::begin_micro_batch(const Plan& plan, const StepBatch& batch, int blob, const WeightTableOfStep& weights) {
  MicroBatch micro;
  micro.view = batch.view;
  micro.blob = blob;
  micro.layers_left = static_cast<int32_t>(core->model.config().num_layers);
  for (const Segment& s : plan.segments) {
    if (s.kind != Kind::train) continue;
    if (micro.weights.size() < static_cast<size_t>(micro.view.train_groups.count) &&
        s.row_begin == micro.view.train_groups.host_groups[micro.weights.size()].row_begin) {
      micro.weights.push_back(weights.at({s.adapter, s.version}));
    }
    if (std::ranges::find(micro.jobs, s.id) == micro.jobs.end()) micro.jobs.push_back(s.id);
    core->jobs.at(s.id).began = true;
    core->adapters.at(s.adapter)->train->has_gradients = true;
  }
  core->micro = std::move(micro);
}

// Between two slices of backward the adapters may have left the pool and come back elsewhere.
void Engine::Impl::refresh_micro_batch() {
  MicroBatch& micro = *core->micro;
  // The host copy of the groups lies in this engine's own block, which is const only for those who read the batch.
  auto* groups = const_cast<LoraGroup*>(micro.view.train_groups.host_groups);
  bool moved = false;
  for (size_t g = 0; g < micro.weights.size(); ++g) {
    moved |= groups[g].sites != micro.weights[g]->device_sites();
    groups[g].sites = micro.weights[g]->device_sites();
    groups[g].host_sites = micro.weights[g]->host_sites();
  }
  if (moved) core->metadata[micro.blob].upload();
}

void Engine::Impl::run_backward(int32_t layers) {
  for (; layers > 0 && core->micro; --layers) {
    MicroBatch& micro = *core->micro;
    const int64_t layer = --micro.layers_left;
    if (layer >= micro.view.lowest_layer) {
      Arena scratch(core->scratch_storage.data(), core->scratch_storage.bytes());
      core->model.backward_layer(micro.view, micro.saved, layer, scratch);
      core->stats.arena_peak = std::max(core->stats.arena_peak, static_cast<int64_t>(scratch.peak()));
      mark("backward layer");
    }
    if (micro.layers_left == 0) {
      end_micro_batch();
      return;
    }
  }
}

void Engine::Impl::end_micro_batch() {
  MicroBatch micro = *std::exchange(core->micro, std::nullopt);
  for (const AdapterPtr& adapter : micro.drop) {
    if (adapter->train) adapter->train->drop_gradients();
    forget_if_unused(adapter);
  }
}

// ---------------------------------------------------------------- results

void Engine::Impl::collect(const Plan& plan, const StepBatch& batch) {
  Core& c = *core;
  c.planner.commit(plan);
  c.committed = true;
  c.stats.train_tokens += plan.rows[0];
  c.stats.eval_tokens += plan.rows[1];
  c.stats.prefill_tokens += plan.rows[2];
  c.stats.decode_tokens += plan.rows[3];
  for (const Segment& s : plan.segments) {
    if (s.kind == Kind::train || s.kind == Kind::eval) c.jobs.at(s.id).version = s.version;
  }
  collect_losses(plan, batch);
  complete_jobs(plan, batch);
  collect_tokens(plan, batch);
}

void Engine::Impl::collect_losses(const Plan& plan, const StepBatch& batch) {
  for (int32_t h = 0; h < batch.sample_begin; ++h) {
    const HeadRef& ref = batch.heads[static_cast<size_t>(h)];
    const Segment& s = plan.segments[static_cast<size_t>(ref.segment)];
    const float logprob = batch.logprob.host[h];
    if (s.kind == Kind::prefill) {
      core->requests.at(s.id).result.prompt_logprobs[static_cast<size_t>(ref.index)] = logprob;
      continue;
    }
    Job& job = core->jobs.at(s.id);
    job.loss += batch.loss.host[h];
    if (job.train) continue;
    const int32_t row = job.examples[static_cast<size_t>(s.example)].target_rows[static_cast<size_t>(ref.index)];
    job.logprobs[static_cast<size_t>(s.example)][static_cast<size_t>(row + 1)] = logprob;
  }
}

void Engine::Impl::complete_jobs(const Plan& plan, const StepBatch& batch) {
  Core& c = *core;
  for (int64_t id : plan.completed_jobs) {
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
      c.events.trained.push_back(std::move(result));
    }
    c.ended.push_back(id);
    c.jobs.erase(id);
  }
}

void Engine::Impl::collect_tokens(const Plan& plan, const StepBatch& batch) {
  Core& c = *core;
  c.events.tokens.reserve(c.events.tokens.size() + batch.heads.size() - static_cast<size_t>(batch.sample_begin));
  for (size_t i = static_cast<size_t>(batch.sample_begin); i < batch.heads.size(); ++i) {
    const Segment& s = plan.segments[static_cast<size_t>(batch.heads[i].segment)];
    Request& r = c.requests.at(s.id);
    TokenEvent event;
    event.request_id = s.id;
    event.index = static_cast<int64_t>(r.result.token_ids.size());
    event.token_id = batch.sampled.host[i];
    event.logprob = batch.logprob.host[i];
    event.adapter = r.result.adapter;
    event.version = s.version;
    if (std::isnan(event.logprob)) {
      finish_request(s.id, FinishReason::error, "the model's logits are not finite");
      continue;
    }
    const size_t row = (i - static_cast<size_t>(batch.sample_begin)) * static_cast<size_t>(batch.top_columns);
    for (int n = 0; n < r.sampling.logprobs; ++n) {
      event.top_logprobs.push_back(
          {batch.top_ids.host[row + static_cast<size_t>(n)], batch.top_logprobs.host[row + static_cast<size_t>(n)]});
    }
    r.result.token_ids.push_back(event.token_id);
    r.result.logprobs.push_back(event.logprob);
    const bool stop = std::ranges::find(r.stop_ids, event.token_id) != r.stop_ids.end();
    const bool full = event.index + 1 >= r.max_new_tokens;
    event.finish_reason = stop ? FinishReason::stop : full ? FinishReason::length : FinishReason::none;
    c.stats.generated_tokens += 1;
    const FinishReason reason = event.finish_reason;
    c.events.tokens.push_back(std::move(event));
    if (reason == FinishReason::none) c.planner.append_token(s.id, r.result.token_ids.back());
    else finish_request(s.id, reason);
  }
}

// ---------------------------------------------------------------- endings

void Engine::Impl::finish_request(int64_t id, FinishReason reason, const std::string& error) {
  Core& c = *core;
  auto node = c.requests.extract(id);
  Request& r = node.mapped();
  c.planner.finish(id);
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
    c.events.trained.push_back(
        {id, name_of(job.adapter), version, job.loss, job.targets, std::numeric_limits<double>::quiet_NaN(), false, reason});
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
  s.metadata_bytes = static_cast<int64_t>(c.metadata[0].device_bytes() + c.metadata[1].device_bytes() + c.results.device_bytes() +
                                          c.pool.tables_bytes());
  s.workspace_bytes = static_cast<int64_t>(c.ops->workspace_bytes());
  s.arena_bytes = s.saved_bytes + s.scratch_bytes;
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
