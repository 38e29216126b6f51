// Construction, submission, and the public facade. The step is in step.cpp, adapters' life in adapters.cpp.
#include "loquetier/engine.h"

#include <algorithm>
#include <charconv>

#include "core/random.h"
#include "engine/impl.h"
#include "engine/memory_plan.h"
#include "engine/timing.h"
#include "io/hf_config.h"
#include "ops/workspace.h"

namespace loquetier {

namespace {

// "auto", "cpu", "cuda", "cuda:1"
std::shared_ptr<Ops> make_ops(const EngineOptions& options, const ModelConfig& config) {
  const std::string& name = options.device;
  auto cuda = [&](int index) {
    std::string dtype = options.dtype == "auto" ? config.torch_dtype : options.dtype;
    if (dtype == "f32" && options.dtype == "auto") dtype = "bf16";
    require(dtype != "f32", "[engine] dtype: expected \"bf16\" or \"f16\" on a CUDA device, got \"f32\"");
    return std::shared_ptr<Ops>(make_cuda_ops(index, dtype == "f16" ? DType::f16 : DType::bf16, options.deterministic));
  };
  auto cpu = [&] {
    require(options.dtype == "auto" || options.dtype == "f32", "[engine] dtype: expected \"auto\" or \"f32\" on the CPU, got \"",
            options.dtype, "\"");
    return std::shared_ptr<Ops>(make_cpu_ops(options.num_threads, options.deterministic));
  };
  if (name == "cpu") return cpu();
  if (name == "cuda") return cuda(0);
  if (name.starts_with("cuda:")) {
    int index = -1;
    const char* end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + 5, end, index);
    require(error == std::errc() && rest == end && index >= 0, "[engine] device: expected \"cuda:<index>\", got \"", name, "\"");
    return cuda(index);
  }
  require(name == "auto", "[engine] device: expected \"auto\", \"cpu\", \"cuda\" or \"cuda:<index>\", got \"", name, "\"");
  if (options.dtype == "f32") return cpu();
  try {
    return cuda(0);
  } catch (const Error&) {
    return cpu();
  }
}

// What plan_memory() needs to know of a device that is not there: of the kind and dtype that the options name.
MemoryFacts assumed_facts(const EngineOptions& options, const ModelConfig& config, int64_t free_bytes) {
  const bool cpu = options.device == "cpu" || options.dtype == "f32";
  std::string dtype = options.dtype == "auto" ? config.torch_dtype : options.dtype;
  MemoryFacts facts;
  facts.device = cpu ? "cpu" : options.device == "auto" || options.device == "cuda" ? "cuda:0" : options.device;
  facts.dtype = cpu ? DType::f32 : dtype == "f16" ? DType::f16 : DType::bf16;
  facts.host_addressable = cpu;
  facts.free_bytes = static_cast<size_t>(free_bytes);
  facts.workspace_bytes = cpu ? 0 : cuda_workspace(ops_limits(config, options), options.deterministic).total();
  return facts;
}

MemoryFacts facts_of(Ops& ops, const OpsLimits& limits, bool weights_placed) {
  MemoryFacts facts;
  facts.device = ops.device().name();
  facts.dtype = ops.compute_dtype();
  facts.host_addressable = ops.device().host_addressable();
  facts.free_bytes = ops.device().free_bytes() + ops.workspace_bytes();
  facts.workspace_bytes = ops.workspace_need(limits);
  facts.weights_placed = weights_placed;
  return facts;
}

MemoryPlan plan_for(const ModelConfig& config, const EngineOptions& options, const MemoryQuery& query,
                    const BaseModel* model = nullptr) {
  validate(options);
  require(!query.device_bytes || *query.device_bytes > 0, "[plan_memory] device_bytes: expected > 0, got ",
          query.device_bytes.value_or(0));
  if (query.device_bytes)
    return loquetier::plan_memory(config, options, assumed_facts(options, config, *query.device_bytes), query.rank);
  const std::shared_ptr<Ops> ops = make_ops(options, config);
  const bool placed = model != nullptr && weights_placed(*model, *ops);
  return loquetier::plan_memory(config, options, facts_of(*ops, ops_limits(config, options), placed), query.rank);
}

constexpr int kCountedRank = 16;  // adapters of this rank are what the plan at start counts

}  // namespace

Core::Core(std::shared_ptr<Ops> ops_in, std::shared_ptr<const ModelWeights> weights_in, KvCache kv_in, size_t pool_bytes,
           const CostModel& cost_in, PlannerConfig plan, bool use_graphs)
    : ops(std::move(ops_in)),
      weights(std::move(weights_in)),
      model(weights, *ops),
      kv(std::move(kv_in)),
      pool(*ops, pool_bytes),
      cost(cost_in),
      planner((plan.cost = &cost, plan)),
      metadata(ops->device()),
      micro_metadata(ops->device()),
      chunk_metadata(ops->device()),
      results(ops->device()),
      ahead_results(ops->device()),
      chunk_results(ops->device()),
      graphs(*ops, model, use_graphs) {}

Engine::Impl::Impl(std::shared_ptr<const BaseModel> model, EngineOptions options_in, std::shared_ptr<Ops> ops)
    : base(std::move(model)), options(std::move(options_in)) {
  require(base != nullptr, "[engine] model: expected a base model, got none");
  validate(options);
  const ModelConfig& config = base->weights().config;
  if (!ops) ops = make_ops(options, config);
  device_name = ops->device().name();
  recompute = recompute_of(options);
  const OpsLimits most = ops_limits(config, options);
  const int rank = std::min(kCountedRank, options.max_lora_rank);
  std::shared_ptr<const ModelWeights> weights;
  const bool lazy = ops->device().host_addressable();
  if (lazy) weights = place_weights(base, *ops, ops);  // its plan is of what is free beside them
  memory = loquetier::plan_memory(config, options, facts_of(*ops, most, lazy || weights_placed(*base, *ops)), rank);
  const int64_t kv_pages = memory.kv_tokens / options.page_size;

  PlannerConfig plan;
  plan.max_batch_tokens = options.max_batch_tokens;
  plan.max_train_tokens = memory.max_train_tokens;
  plan.max_sequences = options.max_sequences;
  plan.kv_pages = kv_pages;
  plan.page_size = options.page_size;
  plan.adapter_pool_bytes = memory.adapter_pool_bytes;
  plan.num_layers = static_cast<int32_t>(config.num_layers);
  plan.prefix_caching = options.prefix_caching;
  plan.slack_rows = slack_rows = slack_rows_for(options.max_batch_tokens, options.max_sequences);
  plan.rerun = recompute == Recompute::layer;
  plan.mlp_share = mlp_share(config);
  if (options.latency) plan.goal = LatencyGoal{options.latency->ttft_ms * 1e-3, options.latency->tpot_ms * 1e-3};
  limits = {config.vocab_size, config.max_positions, memory.kv_tokens, options.max_batch_tokens, memory.max_train_tokens};
  try {
    if (!weights) weights = place_weights(base, *ops, ops);
    const ModelShape shape = shape_of(config, ops->compute_dtype());
    const DeviceRates rates = measure_rates(*ops, *weights, options.max_batch_tokens);
    if (options.slice_rows > 0) {
      slice_rows = static_cast<int32_t>(std::min<int64_t>(options.slice_rows, options.max_batch_tokens));
    } else if (options.latency) {
      const double seconds = slice_seconds(ops->device().host_addressable(), options.latency->tpot_ms * 1e-3);
      slice_rows = slice_rows_for(shape, rates, seconds, options.max_batch_tokens);
    }
    plan.slice_rows = slice_rows;
    KvCache kv = KvCache::make(*ops, config, kv_pages, options.page_size);
    core = std::make_unique<Core>(std::move(ops), std::move(weights), std::move(kv), static_cast<size_t>(memory.adapter_pool_bytes),
                                  CostModel(shape, rates), plan, options.cuda_graphs && !lazy);
    if (!lazy) reserve(most);
  } catch (const OutOfMemory& error) {
    core.reset();
    throw OutOfMemory(concat(error.what(),
                             "; at the start of an engine that divides its device's memory like this (lower "
                             "memory_fraction when something else takes of it):\n",
                             memory.table()));
  }
  goes_ahead = !lazy;
  core->stats.weight_bytes = static_cast<int64_t>(core->weights->bytes());
  core->stats.kv_bytes = static_cast<int64_t>(core->kv.storage.bytes());
  core->stats.kv_pages = kv_pages;
  core->stats.adapter_pool_bytes = memory.adapter_pool_bytes;
  core->stats.training_state_limit = lazy ? -1 : memory.training_state_bytes;
  if (!options.trace_path.empty()) trace = std::make_unique<Trace>(options.trace_path);
  publish();
}

// Everything that steps need, by its maxima: from here on a step allocates nothing.
void Engine::Impl::reserve(const OpsLimits& most) {
  Core& c = *core;
  Device& device = c.ops->device();
  c.ops->reserve(most);
  c.scratch_storage = Buffer(device, static_cast<size_t>(memory.scratch_bytes));
  c.saved_storage = Buffer(device, static_cast<size_t>(memory.saved_bytes));
  const TableBytes tables = table_bytes(c.model.config(), options, c.kv.shape.pages);
  c.metadata.reserve(tables.metadata);
  c.micro_metadata.reserve(tables.micro);
  c.chunk_metadata.reserve(tables.chunk);
  c.results.reserve(tables.results);
  c.ahead_results.reserve(tables.results);
  c.chunk_results.reserve(tables.chunk_results);
  if (options.latency) c.ops->warm_up(c.model.config().attention(), c.kv.shape);  // else the steps that are first take the time
  c.pool.reserve_tables(table_slots(options), static_cast<size_t>(site_count(c.model.config())) * sizeof(LoraSite));
}

// Master weights, gradients and moments of an adapter, within what the plan left for them. OutOfMemory names the bytes.
std::unique_ptr<TrainState> Engine::Impl::new_train_state(const AdapterRecord& record, const float* master) const {
  const Core& c = *core;
  const auto bytes = static_cast<int64_t>(TrainState::bytes_for(*record.layout));
  const int64_t limit = c.stats.training_state_limit, used = c.stats.training_state_bytes;
  require<OutOfMemory>(limit < 0 || used + bytes <= limit, "[engine] training state of adapter \"", record.name,
                       "\": expected at most ", limit - used, " bytes (", limit, " of device memory are for training state, ", used,
                       " are in use), got ", bytes,
                       "; remove an adapter in training, or make the engine with less for kv_cache_tokens or adapter_pool_bytes");
  return std::make_unique<TrainState>(*c.ops, record.layout, master);
}

Engine::Impl::~Impl() = default;

void Engine::Impl::require_usable() const {
  require(!closed, "[engine] expected an open engine, it was closed");
  require<DeviceError>(failure.empty(), "[engine] refuses further work after a device error: ", failure);
}

AdapterPtr Engine::Impl::find(const std::string& name) const {
  if (name.empty()) return nullptr;
  const auto it = registry.find(name);
  require<NotFound>(it != registry.end(), "[engine] adapter \"", name,
                    "\": expected the name of an adapter of this engine, there is none");
  return it->second;
}

AdapterPtr Engine::Impl::find_named(const std::string& name, const char* where) const {
  require_usable();
  require(!name.empty(), where, ": expected a name, got the base model");
  return find(name);
}

int64_t Engine::Impl::submit(Request request) {
  std::lock_guard guard(front);
  require_usable();
  request.adapter = find(request.result.adapter);
  require<QueueFull>(live_requests + live_examples < options.max_queue + published.running_requests,
                     "[submit_infer] the queue is full: ", options.max_queue,
                     " requests and examples wait (max_queue); step, then submit again");
  const int64_t id = next_id++;
  request.id = request.result.request_id = id;
  request.submitted = now();
  if (request.deadline >= 0) request.deadline += request.submitted;
  request.seed = request.sampling.seed.value_or(mix_key(options.seed, static_cast<uint64_t>(id)));
  live.emplace(id, request.adapter);
  ++live_requests;
  if (request.adapter) ++request.adapter->live_requests;
  inbox.push_back(std::move(request));
  ++arrivals;
  return id;
}

int64_t Engine::Impl::submit(Job job) {
  std::lock_guard guard(front);
  require_usable();
  // The adapter was looked up before the examples were prepared; it may have been removed since.
  if (job.adapter)
    require<NotFound>(find(job.adapter->name) == job.adapter, "[engine] adapter \"", job.adapter->name, "\" was removed");
  const auto examples = static_cast<int64_t>(job.examples.size());
  require<QueueFull>(live_requests + live_examples + examples <= options.max_queue + published.running_requests, "[",
                     job.train ? "submit_train" : "submit_eval", "] the queue is full: with these ", examples,
                     " examples more than ", options.max_queue,
                     " requests and examples would wait (max_queue); step, then submit again");
  const int64_t id = next_id++;
  job.id = id;
  job.submitted = now();
  live.emplace(id, job.adapter);
  live_examples += examples;
  job_examples.emplace(id, examples);
  if (job.adapter) ++job.adapter->live_jobs;
  inbox.push_back(std::move(job));
  return id;
}

bool Engine::Impl::cancel(int64_t id) {
  std::lock_guard guard(front);
  require_usable();
  require<NotFound>(id >= 1 && id < next_id, "[cancel] id: expected one that a submit call returned, got ", id);
  if (!live.contains(id)) return false;
  inbox.push_back(CancelCommand{id});
  return true;
}

// ---------------------------------------------------------------- facade

Engine::Engine(std::shared_ptr<const BaseModel> model, EngineOptions options)
    : impl_(std::make_unique<Impl>(std::move(model), std::move(options), nullptr)) {}

Engine::Engine(const std::filesystem::path& model_folder, EngineOptions options)
    : Engine((validate(options), BaseModel::load(model_folder)), options) {}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::~Engine() { close(); }

int64_t Engine::submit_infer(std::vector<int32_t> prompt_ids, InferOptions options) {
  validate_prompt(prompt_ids, impl_->limits);
  validate(options.sampling, impl_->limits.vocab_size);
  validate(options, impl_->options);
  Request request;
  request.prompt_length = static_cast<int64_t>(prompt_ids.size());
  const Limits& limits = impl_->limits;
  request.max_new_tokens =
      std::min<int64_t>(options.sampling.max_tokens, std::min(limits.max_positions, limits.kv_tokens) - request.prompt_length);
  if (!options.sampling.ignore_eos) request.stop_ids = impl_->base->eos_token_ids();
  request.stop_ids.insert(request.stop_ids.end(), options.sampling.stop_token_ids.begin(), options.sampling.stop_token_ids.end());
  request.prompt = std::move(prompt_ids);
  request.priority = options.priority;
  request.pin_version = options.pin_version;
  request.reject_late = options.reject_late;
  if (options.deadline_ms) request.deadline = *options.deadline_ms * 1e-3;  // from submission
  request.result.adapter = std::move(options.adapter);
  request.sampling = std::move(options.sampling);
  return impl_->submit(std::move(request));
}

int64_t Engine::submit_train(const std::string& adapter, std::vector<Example> examples, TrainOptions options) {
  require(impl_->limits.max_train_tokens > 0,
          "[submit_train] expected an engine made with max_train_tokens > 0, got 0: training is off");
  Job job;
  job.train = true;
  {
    std::lock_guard guard(impl_->front);
    impl_->require_usable();
    require(!adapter.empty(), "[submit_train] adapter: expected a name; the base model is frozen");
    job.adapter = impl_->find(adapter);
  }
  job.examples = prepare_training(examples, options, impl_->limits, job.targets);
  job.optimizer = options.optimizer;
  job.weight = options.weight;
  return impl_->submit(std::move(job));
}

int64_t Engine::submit_eval(const std::string& adapter, std::vector<Example> examples) {
  Job job;
  job.train = false;
  {
    std::lock_guard guard(impl_->front);
    impl_->require_usable();
    job.adapter = impl_->find(adapter);
  }
  job.examples = prepare_evaluation(examples, impl_->limits, job.targets);
  return impl_->submit(std::move(job));
}

MemoryPlan Engine::plan_memory(const BaseModel& model, const EngineOptions& options, const MemoryQuery& query) {
  return plan_for(model.weights().config, options, query, &model);
}

MemoryPlan Engine::plan_memory(const std::filesystem::path& model_folder, const EngineOptions& options, const MemoryQuery& query) {
  return plan_for(load_hf_config(model_folder), options, query);
}

MemoryPlan Engine::plan_memory_of_config(const std::string& config_json, const EngineOptions& options, const MemoryQuery& query) {
  return plan_for(parse_hf_config(config_json, "[plan_memory] config"), options, query);
}

bool Engine::cancel(int64_t id) { return impl_->cancel(id); }

bool Engine::has_work() const {
  std::lock_guard guard(impl_->front);
  return !impl_->closed && (!impl_->live.empty() || !impl_->inbox.empty() || impl_->undelivered);
}

StepResult Engine::step() { return impl_->step(); }

EngineStats Engine::stats() const {
  std::lock_guard guard(impl_->front);
  impl_->require_usable();
  EngineStats stats = impl_->published;
  stats.waiting_requests = impl_->live_requests - stats.running_requests;
  stats.queued_examples = impl_->live_examples;
  stats.adapters = static_cast<int64_t>(impl_->registry.size());
  return stats;
}

void Engine::start_trace(const std::filesystem::path& path) {
  std::lock_guard guard(impl_->step_lock);
  {
    std::lock_guard front(impl_->front);
    impl_->require_usable();
  }
  impl_->trace = std::make_unique<Trace>(path.string());
}

void Engine::stop_trace() {
  std::lock_guard guard(impl_->step_lock);
  impl_->trace.reset();
}

void Engine::close() {
  std::lock_guard step_guard(impl_->step_lock);
  impl_->trace.reset();
  std::lock_guard guard(impl_->front);
  impl_->closed = true;
  impl_->registry.clear();
  impl_->inbox.clear();
  impl_->live.clear();
  try {
    impl_->drop_ahead();
  } catch (const DeviceError&) {  // it answers no more: there is nothing to wait for
  }
  impl_->core.reset();
}

const BaseModel& Engine::base_model() const { return *impl_->base; }
const EngineOptions& Engine::options() const { return impl_->options; }
std::string Engine::device() const { return impl_->device_name; }

}  // namespace loquetier
