// The simulator for Python: arrays in, a dict of arrays and numbers out. loquetier_core/sizing/cli.py is its user; it is no part of
// the documented API.
#include "plan/simulator.h"

#include <pybind11/numpy.h>

#include "bindings.h"
#include "engine/timing.h"
#include "io/hf_config.h"
#include "model/model_config.h"

namespace loquetier::python {

namespace {

using Floats = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

DType to_dtype(const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "f16") return DType::f16;
  if (name == "bf16") return DType::bf16;
  throw InvalidArgument("[simulate] dtype: expected \"f32\", \"f16\" or \"bf16\", got \"" + name + "\"");
}

// Of LoRA on every linear but lm_head.
int64_t adapter_parameters(const ModelConfig& config, int64_t rank) {
  int64_t parameters = 0;
  for (const ModuleInfo& module : modules_of(config)) parameters += module.layer >= 0 ? rank * (module.in + module.out) : 0;
  return parameters;
}

py::dict model_sizes(const ConfigLike& config, const std::string& dtype, int64_t rank) {
  const ModelConfig model = parse_hf_config(to_config_json(config, "config"), "config");
  const ModelShape shape = shape_of(model, to_dtype(dtype));
  const double heads = shape.vocabulary_parameters * (model.tie_word_embeddings ? 1 : 2);
  // What a training row keeps of a layer: its input, q, k, v, attention's output, the residual behind it, gate and up.
  const auto saved = static_cast<double>(2 * model.hidden_size + model.qkv_columns() + int64_t{model.num_heads} * model.head_size +
                                         2 * model.intermediate_size);
  py::dict sizes;
  sizes["parameters"] = shape.layer_parameters + heads;
  sizes["weight_bytes"] = (shape.layer_parameters + heads) * shape.bytes_per_value;
  sizes["kv_token_bytes"] = shape.layers * shape.kv_columns * shape.bytes_per_value;
  sizes["adapter_parameters"] = adapter_parameters(model, rank);
  sizes["adapter_bytes"] = static_cast<double>(adapter_parameters(model, rank)) * shape.bytes_per_value;
  sizes["training_row_bytes"] = shape.layers * saved * shape.bytes_per_value;
  sizes["max_positions"] = model.max_positions;
  return sizes;
}

template <class T, class F>
py::array_t<T> column(size_t n, F value) {
  py::array_t<T> out(static_cast<py::ssize_t>(n));
  T* data = out.mutable_data();
  for (size_t i = 0; i < n; ++i) data[i] = static_cast<T>(value(i));
  return out;
}

py::dict to_dict(const SimulationResult& r) {
  py::dict d;
  const auto requests = [&]<class T>(const char* name, T SimulatedRequestResult::* field) {
    d[name] = column<T>(r.requests.size(), [&](size_t i) { return r.requests[i].*field; });
  };
  requests("scheduled", &SimulatedRequestResult::scheduled);
  requests("first", &SimulatedRequestResult::first);
  requests("last", &SimulatedRequestResult::last);
  requests("longest_gap", &SimulatedRequestResult::longest_gap);
  requests("tokens", &SimulatedRequestResult::tokens);
  requests("rejected", &SimulatedRequestResult::rejected);
  requests("refused", &SimulatedRequestResult::refused);
  const size_t n = r.trained.size();
  d["trained_at"] = column<double>(n, [&](size_t i) { return r.trained[i].at; });
  d["trained_by"] = column<int32_t>(n, [&](size_t i) { return r.trained[i].trainer; });
  d["trained_tokens"] = column<int64_t>(n, [&](size_t i) { return r.trained[i].tokens; });
  d["trained_update"] = column<bool>(n, [&](size_t i) { return r.trained[i].update; });
  d["seconds"] = r.seconds;
  d["busy"] = r.busy;
  d["steps"] = r.steps;
  d["interrupted"] = r.interrupted;
  d["longest_step"] = r.longest_step;
  d["longest_serving_step"] = r.longest_serving_step;
  d["longest_wait_steps"] = r.longest_wait_steps;
  d["longest_training_wait_steps"] = r.longest_training_wait_steps;
  d["most_waiting"] = r.most_waiting;
  d["most_running"] = r.most_running;
  d["preemptions"] = r.preemptions;
  return d;
}

std::vector<SimulatedRequest> to_requests(const Floats& arrivals, const Ints& adapters, const Ints& prompts, const Ints& outputs,
                                          bool reject_late) {
  const py::ssize_t n = arrivals.size();
  for (const Ints* column : {&adapters, &prompts, &outputs}) {
    if (column->size() != n) {
      throw InvalidArgument("[simulate] adapters, prompts, outputs: expected " + std::to_string(n) +
                            " entries, one for each arrival, got " + std::to_string(column->size()));
    }
  }
  std::vector<SimulatedRequest> requests(static_cast<size_t>(n));
  for (py::ssize_t i = 0; i < n; ++i) {
    SimulatedRequest& r = requests[static_cast<size_t>(i)];
    r.arrived = arrivals.data()[i];
    r.adapter = adapters.data()[i];
    r.prompt = static_cast<int32_t>(prompts.data()[i]);
    r.output = static_cast<int32_t>(outputs.data()[i]);
    r.reject_late = reject_late;
  }
  return requests;
}

// Adapters 0 .. serving - 1 serve, those behind them train.
py::dict run(const ConfigLike& config, const std::string& dtype, double bytes_per_second, double flops_per_second,
             double launch_seconds, double step_seconds, const std::string& cost_model, const Floats& arrivals,
             const Ints& adapters, const Ints& prompts, const Ints& outputs, int64_t serving,
             const std::vector<std::vector<int32_t>>& examples, int32_t batch, int32_t accumulation, int64_t rank,
             std::optional<std::pair<double, double>> goal, int64_t max_batch_tokens, int64_t max_sequences, int64_t kv_tokens,
             int64_t adapter_pool_bytes, int64_t max_queue, bool reject_late, double seconds, bool until_served, double noise,
             uint64_t seed) {
  const ModelConfig model = parse_hf_config(to_config_json(config, "config"), "config");
  const ModelShape shape = shape_of(model, to_dtype(dtype));
  const DeviceRates rates{bytes_per_second, flops_per_second, launch_seconds, step_seconds};
  CostModel truth(shape, rates);
  if (!cost_model.empty()) truth.load(cost_model);

  SimulationOptions o;
  PlannerConfig& p = o.planner;
  p.max_batch_tokens = max_batch_tokens;
  p.max_sequences = max_sequences;
  p.kv_pages = kv_tokens / p.page_size;
  p.adapter_pool_bytes = adapter_pool_bytes;
  p.num_layers = static_cast<int32_t>(model.num_layers);
  p.prefix_caching = false;
  p.mlp_share = mlp_share(model);
  if (goal) {
    p.goal = LatencyGoal{goal->first, goal->second};
    const bool host = to_dtype(dtype) == DType::f32;  // which is what the CPU backend computes in
    p.slice_rows = slice_rows_for(shape, rates, slice_seconds(host, goal->second), max_batch_tokens);
    p.slack_rows = slack_rows_for(max_batch_tokens, max_sequences);
  }
  const auto bytes = static_cast<int64_t>(static_cast<double>(adapter_parameters(model, rank)) * shape.bytes_per_value);
  o.adapters.assign(static_cast<size_t>(serving) + examples.size(), bytes);
  o.seconds = seconds;
  o.until_served = until_served;
  o.max_queue = max_queue;
  o.noise = noise;
  o.seed = seed;
  const std::vector<SimulatedRequest> requests = to_requests(arrivals, adapters, prompts, outputs, reject_late);
  std::vector<SimulatedTrainer> trainers(examples.size());
  for (size_t i = 0; i < examples.size(); ++i) {
    trainers[i].adapter = serving + static_cast<int64_t>(i);
    trainers[i].lengths = examples[i];
    trainers[i].batch = batch;
    trainers[i].accumulation = accumulation;
  }
  SimulationResult result;
  {
    py::gil_scoped_release release;
    result = simulate(o, truth, requests, trainers);
  }
  return to_dict(result);
}

}  // namespace

void bind_simulator(py::module_& m) {
  m.def("model_sizes", &model_sizes, py::arg("config"), py::kw_only(), py::arg("dtype"), py::arg("rank"),
        "Bytes of a model's parts: weights, a token of KV, an adapter on all linears, what a training row keeps.");
  m.def("simulate", &run, py::arg("config"), py::kw_only(), py::arg("dtype"), py::arg("bytes_per_second"),
        py::arg("flops_per_second"), py::arg("launch_seconds"), py::arg("step_seconds"), py::arg("cost_model") = "",
        py::arg("arrivals"), py::arg("adapters"), py::arg("prompts"), py::arg("outputs"), py::arg("serving"), py::arg("examples"),
        py::arg("batch") = 1, py::arg("accumulation") = 1, py::arg("rank") = 16, py::arg("goal") = py::none(),
        py::arg("max_batch_tokens") = 8192, py::arg("max_sequences") = 256, py::arg("kv_tokens"), py::arg("adapter_pool_bytes"),
        py::arg("max_queue") = 100000, py::arg("reject_late") = false, py::arg("seconds") = 1e18, py::arg("until_served") = false,
        py::arg("noise") = 0.0, py::arg("seed") = 0,
        R"(Runs the planner on the cost model's clock and returns what happened, as arrays by request and by mini-batch.

arrivals [n] seconds ascending; adapters, prompts, outputs [n]; adapters below `serving` serve, -1 is the base model; examples:
per trainer the rows of its examples. goal: (first token, time per token) seconds, None for throughput. Times are seconds from
the start, negative where it did not happen. Raises InvalidArgument naming the argument.)");
}

}  // namespace loquetier::python
