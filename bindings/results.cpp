// Plain data that comes out: the events of a step, adapter descriptions and engine statistics. Everything is read-only.
#include <pybind11/numpy.h>

#include <map>

#include "bindings.h"

namespace loquetier::python {

namespace {

std::optional<std::string> reason_text(FinishReason reason) {
  switch (reason) {
    case FinishReason::none:
      return std::nullopt;
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::rejected:
      return "rejected";
    case FinishReason::error:
      return "error";
  }
  return std::nullopt;
}

std::optional<std::string> adapter_or_none(const std::string& name) {
  if (name.empty()) return std::nullopt;
  return name;
}

// A list of numpy arrays, each a copy of its own: results outlive the step.
py::typing::List<py::array_t<float>> array_list(const std::vector<std::vector<float>>& arrays) {
  py::typing::List<py::array_t<float>> list;
  for (const auto& values : arrays) list.append(py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data()));
  return list;
}

void add_repr(py::object cls, std::vector<std::string> fields) {
  cls.attr("__repr__") = py::cpp_function(
      [fields](const py::object& self) {
        std::string text = std::string(py::str(py::type::of(self).attr("__name__"))) + "(";
        for (const std::string& field : fields) {
          if (text.back() != '(') text += ", ";
          text += field + "=" + std::string(py::repr(self.attr(field.c_str())));
        }
        return text + ")";
      },
      py::name("__repr__"), py::is_method(cls));
}

void bind_events(py::module_& m) {
  py::class_<TokenLogprob> logprob(m, "TokenLogprob", "A token and its log-probability; unpacks as (token_id, logprob).");
  logprob.def_readonly("token_id", &TokenLogprob::token_id)
      .def_readonly("logprob", &TokenLogprob::logprob)
      .def("__iter__", [](const TokenLogprob& t) -> py::typing::Iterator<py::object> {
        return py::iter(py::make_tuple(t.token_id, t.logprob));
      });
  add_repr(logprob, {"token_id", "logprob"});

  py::class_<TokenEvent> token(m, "TokenEvent", R"(One generated token.

request_id; index: 0 for the first generated token; token_id; logprob: natural log, of the model's own distribution;
top_logprobs: the most probable tokens, most probable first, when asked for; finish_reason: None, or "stop", "length" on the
request's last token; adapter: None is the base model; version: of the adapter that made this token.)");
  token.def_readonly("request_id", &TokenEvent::request_id)
      .def_readonly("index", &TokenEvent::index)
      .def_readonly("token_id", &TokenEvent::token_id)
      .def_readonly("logprob", &TokenEvent::logprob)
      .def_readonly("top_logprobs", &TokenEvent::top_logprobs)
      .def_property_readonly("finish_reason", [](const TokenEvent& e) { return reason_text(e.finish_reason); })
      .def_property_readonly("adapter", [](const TokenEvent& e) { return adapter_or_none(e.adapter); })
      .def_readonly("version", &TokenEvent::version);
  add_repr(token, {"request_id", "index", "token_id", "logprob", "finish_reason", "adapter", "version"});

  py::class_<InferResult> infer(m, "InferResult", R"(A request that ended.

token_ids, logprobs: one per generated token. prompt_logprobs: one per prompt token when asked for (the first is NaN), else
empty. finish_reason: "stop", "length", "cancelled", "error" or "rejected" (late, and asked not to be served); error: the message of the
last two. adapter: None is the base. queue_seconds: from submission to the step that computed its first row; ttft_seconds: to the first
token; tpot_seconds: mean time per token after it (0 with fewer than two); preemptions: times its rows had to be computed again;
deadline_met: False when its first token came after its deadline.)");
  infer.def_readonly("request_id", &InferResult::request_id)
      .def_readonly("token_ids", &InferResult::token_ids)
      .def_property_readonly("logprobs", [](const InferResult& r) { return float_list(r.logprobs); })
      .def_property_readonly("prompt_logprobs", [](const InferResult& r) { return float_list(r.prompt_logprobs); })
      .def_property_readonly("finish_reason", [](const InferResult& r) { return reason_text(r.finish_reason); })
      .def_property_readonly("adapter", [](const InferResult& r) { return adapter_or_none(r.adapter); })
      .def_readonly("error", &InferResult::error)
      .def_readonly("queue_seconds", &InferResult::queue_seconds)
      .def_readonly("ttft_seconds", &InferResult::ttft_seconds)
      .def_readonly("tpot_seconds", &InferResult::tpot_seconds)
      .def_readonly("preemptions", &InferResult::preemptions)
      .def_readonly("deadline_met", &InferResult::deadline_met);
  add_repr(infer, {"request_id", "token_ids", "finish_reason", "adapter", "error"});

  py::class_<TrainResult> train(m, "TrainResult", R"(A training job that ended.

version: of the adapter after this job. loss: reduced as asked. num_targets. grad_norm: before clipping, NaN when the job
had no optimizer. applied: an optimizer step happened; reason: why not ("accumulated", "non-finite gradient", "cancelled",
"error: ..."), else empty.)");
  train.def_readonly("job_id", &TrainResult::job_id)
      .def_readonly("queue_seconds", &TrainResult::queue_seconds)
      .def_readonly("seconds", &TrainResult::seconds)
      .def_readonly("steps", &TrainResult::steps)
      .def_readonly("adapter", &TrainResult::adapter)
      .def_readonly("version", &TrainResult::version)
      .def_readonly("loss", &TrainResult::loss)
      .def_readonly("num_targets", &TrainResult::num_targets)
      .def_readonly("grad_norm", &TrainResult::grad_norm)
      .def_readonly("applied", &TrainResult::applied)
      .def_readonly("reason", &TrainResult::reason);
  add_repr(train, {"job_id", "adapter", "version", "loss", "num_targets", "grad_norm", "applied", "reason"});

  py::class_<EvalResult> eval(m, "EvalResult", R"(An evaluation that ended.

loss: mean over the unmasked targets. num_targets. logprobs: one float32 array per example, aligned with its input_ids, NaN
where there is no target. adapter: None is the base. reason: empty, or why there is no result ("cancelled", "error: ...").)");
  eval.def_readonly("job_id", &EvalResult::job_id)
      .def_property_readonly("adapter", [](const EvalResult& r) { return adapter_or_none(r.adapter); })
      .def_readonly("version", &EvalResult::version)
      .def_readonly("loss", &EvalResult::loss)
      .def_readonly("num_targets", &EvalResult::num_targets)
      .def_property_readonly("logprobs", [](const EvalResult& r) { return array_list(r.logprobs); })
      .def_readonly("reason", &EvalResult::reason);
  add_repr(eval, {"job_id", "adapter", "version", "loss", "num_targets", "reason"});

  py::class_<StepResult> step(m, "StepResult", "What one step made: tokens, and the requests and jobs that ended.");
  step.def_property_readonly("tokens",
                             [](const StepResult& r) {  // copies: views into the result would each have to keep it alive
                               py::typing::List<TokenEvent> list;
                               for (const TokenEvent& e : r.tokens) list.append(py::cast(e, py::return_value_policy::copy));
                               return list;
                             })
      .def_readonly("finished", &StepResult::finished)
      .def_readonly("trained", &StepResult::trained)
      .def_readonly("evaluated", &StepResult::evaluated)
      .def("__repr__", [](const StepResult& r) {
        return "StepResult(tokens=" + std::to_string(r.tokens.size()) + ", finished=" + std::to_string(r.finished.size()) +
               ", trained=" + std::to_string(r.trained.size()) + ", evaluated=" + std::to_string(r.evaluated.size()) + ")";
      });
}

void bind_adapter_info(py::module_& m) {
  py::class_<AdapterInfo> info(m, "AdapterInfo", R"(A registered adapter.

version: optimizer steps so far. parameters, bytes: of one version, in the pool. resident: in device memory now. training:
has training state (master weights, gradients, moments). requests: waiting and running.)");
  info.def_readonly("name", &AdapterInfo::name)
      .def_readonly("version", &AdapterInfo::version)
      .def_readonly("config", &AdapterInfo::config)
      .def_readonly("parameters", &AdapterInfo::parameters)
      .def_readonly("bytes", &AdapterInfo::bytes)
      .def_readonly("resident", &AdapterInfo::resident)
      .def_readonly("training", &AdapterInfo::training)
      .def_readonly("requests", &AdapterInfo::requests);
  add_repr(info, {"name", "version", "parameters", "bytes", "resident", "training", "requests"});
}

// A field table serves both faces of the statistics: attributes (typed in the stub) and mapping.
class StatsBinder {
 public:
  explicit StatsBinder(py::module_& m)
      : cls_(m, "EngineStats",
             "Counters and gauges of an engine: attributes, or a mapping (dict(stats), stats[\"steps\"]). Bytes and seconds.") {}

  template <class T>
  StatsBinder& field(const char* name, T EngineStats::* member) {
    cls_.def_readonly(name, member);
    names_.emplace_back(name);
    return *this;
  }

  void finish() {
    const auto names = names_;
    cls_.def("keys", [names](const EngineStats&) { return names; });
    cls_.def("__len__", [names](const EngineStats&) { return names.size(); });
    cls_.def("__iter__", [names](const EngineStats&) -> py::typing::Iterator<py::str> { return py::iter(py::cast(names)); });
    cls_.def("__contains__", [names](const EngineStats&, const std::string& key) {
      return std::find(names.begin(), names.end(), key) != names.end();
    });
    cls_.def("__getitem__", [names](const py::object& self, const std::string& key) -> std::variant<int64_t, double, std::string> {
      if (std::find(names.begin(), names.end(), key) == names.end()) throw py::key_error(key);
      const py::object value = self.attr(key.c_str());
      if (py::isinstance<py::float_>(value)) return value.cast<double>();
      if (py::isinstance<py::str>(value)) return value.cast<std::string>();
      return value.cast<int64_t>();
    });
    cls_.def("__repr__", [](const py::object& self) { return "EngineStats(" + std::string(py::repr(py::dict(self))) + ")"; });
  }

 private:
  py::class_<EngineStats> cls_;
  std::vector<std::string> names_;
};

void bind_memory_plan(py::module_& m) {
  py::class_<MemoryPlan> plan(m, "MemoryPlan",
                              R"(How an engine divides its device's memory (Engine.plan_memory). Bytes; str() is a table.

device_bytes: free before the engine. budget_bytes: memory_fraction of it, the sum of the shares: weight_bytes, kv_bytes,
adapter_pool_bytes, saved_bytes (activations of training rows), scratch_bytes, metadata_bytes, workspace_bytes, training_state_bytes
(what is left). at_start: taken at start (False on the CPU, where memory is taken as steps need it). kv_tokens, max_train_tokens:
what they hold. adapters: of `rank` on all linears that fit the pool, adapter_bytes each; trained_adapters: whose training state
fits, adapter_training_bytes each. pinned_bytes: of host memory.)");
  plan.def_readonly("device", &MemoryPlan::device)
      .def_readonly("at_start", &MemoryPlan::at_start)
      .def_readonly("device_bytes", &MemoryPlan::device_bytes)
      .def_readonly("budget_bytes", &MemoryPlan::budget_bytes)
      .def_readonly("weight_bytes", &MemoryPlan::weight_bytes)
      .def_readonly("kv_bytes", &MemoryPlan::kv_bytes)
      .def_readonly("adapter_pool_bytes", &MemoryPlan::adapter_pool_bytes)
      .def_readonly("saved_bytes", &MemoryPlan::saved_bytes)
      .def_readonly("scratch_bytes", &MemoryPlan::scratch_bytes)
      .def_readonly("metadata_bytes", &MemoryPlan::metadata_bytes)
      .def_readonly("workspace_bytes", &MemoryPlan::workspace_bytes)
      .def_readonly("training_state_bytes", &MemoryPlan::training_state_bytes)
      .def_readonly("kv_tokens", &MemoryPlan::kv_tokens)
      .def_readonly("max_train_tokens", &MemoryPlan::max_train_tokens)
      .def_readonly("rank", &MemoryPlan::rank)
      .def_readonly("adapter_bytes", &MemoryPlan::adapter_bytes)
      .def_readonly("adapters", &MemoryPlan::adapters)
      .def_readonly("adapter_training_bytes", &MemoryPlan::adapter_training_bytes)
      .def_readonly("trained_adapters", &MemoryPlan::trained_adapters)
      .def_readonly("pinned_bytes", &MemoryPlan::pinned_bytes)
      .def("__str__", &MemoryPlan::table);
  add_repr(plan, {"device", "budget_bytes", "weight_bytes", "kv_bytes", "adapter_pool_bytes", "saved_bytes", "scratch_bytes",
                  "metadata_bytes", "workspace_bytes", "training_state_bytes"});
}

void bind_stats(py::module_& m) {
  using S = EngineStats;
  StatsBinder stats(m);
  stats.field("steps", &S::steps)
      .field("waiting_requests", &S::waiting_requests)
      .field("running_requests", &S::running_requests)
      .field("queued_examples", &S::queued_examples)
      .field("prefill_tokens", &S::prefill_tokens)
      .field("decode_tokens", &S::decode_tokens)
      .field("train_tokens", &S::train_tokens)
      .field("eval_tokens", &S::eval_tokens)
      .field("cached_prompt_tokens", &S::cached_prompt_tokens)
      .field("generated_tokens", &S::generated_tokens)
      .field("optimizer_steps", &S::optimizer_steps)
      .field("skipped_updates", &S::skipped_updates)
      .field("preemptions", &S::preemptions)
      .field("adapters", &S::adapters)
      .field("resident_adapters", &S::resident_adapters)
      .field("adapter_evictions", &S::adapter_evictions)
      .field("adapter_fetches", &S::adapter_fetches)
      .field("adapter_prefetches", &S::adapter_prefetches)
      .field("kv_pages", &S::kv_pages)
      .field("kv_pages_free", &S::kv_pages_free)
      .field("kv_pages_cached", &S::kv_pages_cached)
      .field("weight_bytes", &S::weight_bytes)
      .field("kv_bytes", &S::kv_bytes)
      .field("adapter_pool_bytes", &S::adapter_pool_bytes)
      .field("adapter_pool_used", &S::adapter_pool_used)
      .field("saved_bytes", &S::saved_bytes)
      .field("scratch_bytes", &S::scratch_bytes)
      .field("metadata_bytes", &S::metadata_bytes)
      .field("workspace_bytes", &S::workspace_bytes)
      .field("training_state_limit", &S::training_state_limit)
      .field("arena_bytes", &S::arena_bytes)
      .field("arena_peak", &S::arena_peak)
      .field("training_state_bytes", &S::training_state_bytes)
      .field("graph_captures", &S::graph_captures)
      .field("graph_replays", &S::graph_replays)
      .field("graphs", &S::graphs)
      .field("graph_seconds", &S::graph_seconds)
      .field("step_seconds", &S::step_seconds)
      .field("host_seconds", &S::host_seconds)
      .field("steps_ahead", &S::steps_ahead)
      .field("training_seconds", &S::training_seconds)
      .field("last_step_seconds", &S::last_step_seconds)
      .field("last_step_predicted", &S::last_step_predicted)
      .field("prediction_error_median", &S::prediction_error_median)
      .field("prediction_error_p95", &S::prediction_error_p95)
      .field("slices", &S::slices)
      .field("interrupted_steps", &S::interrupted_steps)
      .field("deadlines_met", &S::deadlines_met)
      .field("deadlines_missed", &S::deadlines_missed)
      .field("rejected_requests", &S::rejected_requests)
      .field("cost_model", &S::cost_model)
      .finish();
}

}  // namespace

void bind_results(py::module_& m) {
  bind_events(m);
  bind_adapter_info(m);
  bind_memory_plan(m);
  bind_stats(m);
}

}  // namespace loquetier::python
