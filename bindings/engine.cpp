// Engine and BaseModel. Every call that may wait or compute runs without the GIL; arguments are converted before it is released.
#include <pybind11/numpy.h>
#include <pybind11/stl/filesystem.h>

#include "bindings.h"

namespace loquetier::python {

namespace {

using std::filesystem::path;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// The engine and its model, so that Python can hand the model to another engine.
class PyEngine : public Engine {
 public:
  PyEngine(std::shared_ptr<const BaseModel> model, EngineOptions options)
      : Engine(model, std::move(options)), model_(std::move(model)) {}
  const std::shared_ptr<const BaseModel>& shared_model() const { return model_; }

 private:
  std::shared_ptr<const BaseModel> model_;
};

std::string adapter_name(const std::optional<std::string>& adapter) {
  if (!adapter) return "";
  if (adapter->empty()) throw InvalidArgument("adapter: expected a name, or None for the base model, got \"\"");
  return *adapter;
}

path to_path(py::handle value, const std::string& where) {
  if (!py::isinstance<py::str>(value) && !py::hasattr(value, "__fspath__")) {
    throw py::type_error(where + ", got " + type_name(value));
  }
  return path(py::module_::import("os").attr("fsdecode")(value).cast<std::string>());
}

std::map<std::string, HostTensor> to_tensors(const StateDictLike& state_dict) {
  if (!py::hasattr(state_dict, "items")) {
    throw py::type_error("state_dict: expected a mapping of names to arrays, got " + type_name(state_dict));
  }
  std::map<std::string, HostTensor> tensors;
  for (const py::handle item : state_dict.attr("items")()) {
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    const std::string name = py::str(pair[0]);
    const std::string where = "state_dict[\"" + name + "\"]";
    ForeignArray array = make_dense(import_array(pair[1], where));
    if (array.dtype != "f32" && array.dtype != "f16" && array.dtype != "bf16") {
      throw InvalidArgument(where + ": expected float32, float16 or bfloat16, got " + array.dtype);
    }
    tensors[name] = HostTensor{array.data, array.dtype, array.shape, array.owner};
  }
  return tensors;
}

std::shared_ptr<const BaseModel> model_from_state_dict(const ConfigLike& config, const StateDictLike& state_dict) {
  const std::string json = to_config_json(config, "config");
  auto tensors = to_tensors(state_dict);
  py::gil_scoped_release release;
  return BaseModel::from_tensors(json, std::move(tensors));
}

// Random weights come in the dtype asked for, else in the config's own, else in f32.
std::string random_dtype(const std::string& dtype, const std::string& config_json) {
  if (dtype != "auto") return dtype;
  const py::dict config = py::module_::import("json").attr("loads")(config_json);
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!config.contains(key) || config[key].is_none()) continue;
    const std::string name = py::str(config[key]);
    if (name.ends_with("bfloat16")) return "bf16";
    if (name.ends_with("float16")) return "f16";
  }
  return "f32";
}

std::shared_ptr<const BaseModel> to_model(const ModelLike& model, const EngineOptions& options) {
  if (py::isinstance<BaseModel>(model)) return model.cast<std::shared_ptr<BaseModel>>();
  if (py::isinstance<py::dict>(model) || py::hasattr(model, "to_dict")) {
    const std::string json = to_config_json(model, "Engine model");
    const std::string dtype = random_dtype(options.dtype, json);
    py::gil_scoped_release release;
    return BaseModel::random(json, options.seed, dtype);
  }
  const path folder =
      to_path(model, "Engine model: expected a folder path, a BaseModel, or a config (dict or object with to_dict())");
  py::gil_scoped_release release;
  return BaseModel::load(folder);
}

using LatencyLike = py::typing::Optional<LatencyTarget>;

std::optional<LatencyTarget> to_latency(const LatencyLike& latency, const char* where) {
  if (latency.is_none()) return std::nullopt;
  if (!py::isinstance<LatencyTarget>(latency)) {
    throw InvalidArgument(std::string(where) + " latency: expected None or a LatencyTarget, got " +
                          py::type::of(latency).attr("__name__").cast<std::string>());
  }
  return latency.cast<LatencyTarget>();
}

// The options that decide how memory is divided: all of plan_memory's, and those that an engine begins with.
EngineOptions memory_options(const char* where, std::string device, std::string dtype, int64_t max_batch_tokens,
                             int64_t max_sequences, std::optional<int64_t> kv_cache_tokens,
                             std::optional<int64_t> adapter_pool_bytes, double memory_fraction,
                             std::optional<int64_t> max_train_tokens, int max_lora_rank, std::string recompute, bool deterministic,
                             const LatencyLike& latency, int page_size, int slice_rows) {
  EngineOptions options;
  options.device = std::move(device);
  options.dtype = std::move(dtype);
  options.max_batch_tokens = max_batch_tokens;
  options.max_sequences = max_sequences;
  options.kv_cache_tokens = kv_cache_tokens;
  options.adapter_pool_bytes = adapter_pool_bytes;
  options.memory_fraction = memory_fraction;
  options.max_train_tokens = max_train_tokens;
  options.max_lora_rank = max_lora_rank;
  options.recompute = std::move(recompute);
  options.deterministic = deterministic;
  options.latency = to_latency(latency, where);
  options.page_size = page_size;
  options.slice_rows = slice_rows;
  return options;
}

std::unique_ptr<PyEngine> make_engine(const ModelLike& model, std::string device, std::string dtype, int64_t max_batch_tokens,
                                      int64_t max_sequences, std::optional<int64_t> kv_cache_tokens,
                                      std::optional<int64_t> adapter_pool_bytes, double memory_fraction,
                                      std::optional<int64_t> max_train_tokens, int max_lora_rank, int64_t max_queue,
                                      std::string recompute, bool deterministic, const LatencyLike& latency, uint64_t seed,
                                      int num_threads, bool prefix_caching, int page_size, bool cuda_graphs, int slice_rows,
                                      const py::object& trace_path) {
  EngineOptions options = memory_options("Engine", std::move(device), std::move(dtype), max_batch_tokens, max_sequences,
                                         kv_cache_tokens, adapter_pool_bytes, memory_fraction, max_train_tokens, max_lora_rank,
                                         std::move(recompute), deterministic, latency, page_size, slice_rows);
  options.max_queue = max_queue;
  options.seed = seed;
  options.num_threads = num_threads;
  options.prefix_caching = prefix_caching;
  options.cuda_graphs = cuda_graphs;
  if (!trace_path.is_none()) options.trace_path = to_path(trace_path, "Engine trace_path: expected a path").string();
  auto base = to_model(model, options);
  py::gil_scoped_release release;
  return std::make_unique<PyEngine>(std::move(base), std::move(options));
}

py::typing::Dict<py::str, py::array_t<float>> to_array_dict(std::vector<NamedTensor> tensors) {
  py::typing::Dict<py::str, py::array_t<float>> dict;
  for (NamedTensor& tensor : tensors) {
    auto data = std::make_unique<std::vector<float>>(std::move(tensor.data));
    const float* values = data->data();
    const py::capsule owner(data.release(), [](void* p) { delete static_cast<std::vector<float>*>(p); });
    dict[tensor.name.c_str()] =
        py::array_t<float>(std::vector<py::ssize_t>(tensor.shape.begin(), tensor.shape.end()), values, owner);
  }
  return dict;
}

void bind_base_model(py::module_& m) {
  py::class_<BaseModel, std::shared_ptr<BaseModel>> cls(
      m, "BaseModel", R"(The frozen base weights: loaded once, shared by every adapter and by several engines of one process.)");
  const auto shared = [](std::shared_ptr<const BaseModel> model) { return std::const_pointer_cast<BaseModel>(std::move(model)); };
  cls.def_static(
         "load",
         [shared](const py::typing::Union<py::str, py::object>& folder) {
           const path where = to_path(folder, "BaseModel folder: expected a path");
           py::gil_scoped_release release;
           return shared(BaseModel::load(where));
         },
         py::arg("folder"),
         R"(Loads a Hugging Face folder: config.json and model.safetensors (or shards with their index). The files are memory-mapped.

Raises NotFound (no such file), FormatError (content), InvalidArgument (an unsupported model, by the config's key).)")
      .def_static(
          "from_state_dict",
          [shared](const ConfigLike& config, const StateDictLike& state_dict) {
            return shared(model_from_state_dict(config, state_dict));
          },
          py::arg("config"), py::arg("state_dict"),
          R"(Weights of a live model by their Hugging Face names: numpy arrays or host tensors with __dlpack__ (float32,
float16, bfloat16), used in place where dtype and layout allow, and kept alive. config: a dict or an object with to_dict().)")
      .def_static(
          "random",
          [shared](const ConfigLike& config, uint64_t seed, const std::string& dtype) {
            const std::string json = to_config_json(config, "config");
            const std::string resolved = random_dtype(dtype, json);
            py::gil_scoped_release release;
            return shared(BaseModel::random(json, seed, resolved));
          },
          py::arg("config"), py::kw_only(), py::arg("seed") = 0, py::arg("dtype") = "auto",
          R"(Random normal weights of a config's shape (standard deviation 0.02, norms 1). dtype: "f32", "bf16", "f16", "auto" (the config's).)")
      .def_property_readonly("vocab_size", &BaseModel::vocab_size)
      .def_property_readonly("max_positions", &BaseModel::max_positions)
      .def_property_readonly("num_layers", &BaseModel::num_layers)
      .def_property_readonly("num_parameters", &BaseModel::num_parameters)
      .def_property_readonly("family", &BaseModel::family)
      .def_property_readonly("eos_token_ids", [](const BaseModel& b) { return b.eos_token_ids(); })
      .def("__repr__", [](const BaseModel& b) {
        return "BaseModel(family='" + b.family() + "', num_layers=" + std::to_string(b.num_layers()) +
               ", num_parameters=" + std::to_string(b.num_parameters()) + ")";
      });
}

void bind_adapters(py::class_<PyEngine>& cls) {
  cls.def(
         "add_adapter",
         [](PyEngine& e, const std::string& name, const LoraConfig& config) {
           py::gil_scoped_release release;
           e.add_adapter(name, config);
         },
         py::arg("name"), py::arg("config"), R"(Registers a fresh adapter with the initial values of its configuration.

Raises InvalidArgument (name taken or empty, a field of the configuration, by name), OutOfMemory (larger than the adapter pool).)")
      .def(
          "add_adapter",
          [](PyEngine& e, const std::string& name, const py::typing::Union<py::str, py::object>& folder) {
            const path where = to_path(folder, "add_adapter: expected a LoraConfig or the path of a PEFT folder");
            py::gil_scoped_release release;
            e.add_adapter(name, where);
          },
          py::arg("name"), py::arg("folder"),
          R"(Registers the adapter of a PEFT folder (adapter_config.json, adapter_model.safetensors).

Raises NotFound (no such file), FormatError (content), InvalidArgument (an option that is not supported, by its key), OutOfMemory.)")
      .def("clone_adapter", &PyEngine::clone_adapter, py::arg("src"), py::arg("dst"), ReleaseGil(),
           "Registers a frozen copy of the newest version of `src` under the name `dst`, without training state.")
      .def("remove_adapter", &PyEngine::remove_adapter, py::arg("name"), ReleaseGil(),
           "Removes an adapter. Its requests finish on the version they have, its jobs end as cancelled, the name is free at once.")
      .def(
          "save_adapter",
          [](const PyEngine& e, const std::string& name, const py::typing::Union<py::str, py::object>& folder) {
            const path where = to_path(folder, "save_adapter folder: expected a path");
            py::gil_scoped_release release;
            e.save_adapter(name, where);
          },
          py::arg("name"), py::arg("folder"), "Writes a PEFT folder: to a temporary name, synced, renamed.")
      .def(
          "export_adapter",
          [](const PyEngine& e, const std::string& name) {
            std::string bytes;
            {
              py::gil_scoped_release release;
              bytes = e.export_adapter(name);
            }
            return py::bytes(bytes);
          },
          py::arg("name"),
          R"(A live adapter as bytes: weights, optimizer state, version. Imported elsewhere, training goes on with the same losses.

Raises InvalidArgument while jobs of the adapter are queued.)")
      .def(
          "import_adapter",
          [](PyEngine& e, const std::string& name, const py::bytes& data) {
            const std::string bytes = data;
            py::gil_scoped_release release;
            e.import_adapter(name, bytes);
          },
          py::arg("name"), py::arg("data"),
          "Registers an adapter exported by export_adapter. Raises FormatError, InvalidArgument (another model's).")
      .def("adapters", &PyEngine::adapters, ReleaseGil(), "Every registered adapter.")
      .def("adapter", &PyEngine::adapter, py::arg("name"), ReleaseGil(), "One adapter. Raises NotFound.")
      .def(
          "adapter_state",
          [](const PyEngine& e, const std::string& name, const std::string& what) {
            std::vector<NamedTensor> tensors;
            {
              py::gil_scoped_release release;
              tensors = e.adapter_state(name, what);
            }
            return to_array_dict(std::move(tensors));
          },
          py::arg("name"), py::arg("what") = "weights",
          R"(Copies of an adapter's tensors by PEFT key, float32: lora_A [r, in], lora_B [out, r].

what: "weights" (as served), "master", "gradients", "exp_avg", "exp_avg_sq".)");
}

void bind_work(py::class_<PyEngine>& cls) {
  cls.def(
         "submit_infer",
         [](PyEngine& e, const ArrayLike& prompt_ids, const std::optional<std::string>& adapter,
            std::optional<SamplingParams> sampling, int priority, bool pin_version, std::optional<double> deadline_ms,
            bool reject_late) {
           std::vector<int32_t> ids = to_ids(prompt_ids, "prompt_ids");
           InferOptions options{adapter_name(adapter),
                                std::move(sampling).value_or(SamplingParams{}),
                                priority,
                                pin_version,
                                deadline_ms,
                                reject_late};
           py::gil_scoped_release release;
           return e.submit_infer(std::move(ids), std::move(options));
         },
         py::arg("prompt_ids"), py::arg("adapter") = py::none(), py::arg("sampling") = py::none(), py::arg("priority") = 0,
         py::arg("pin_version") = false, py::arg("deadline_ms") = py::none(), py::arg("reject_late") = false,
         R"(Queues a request and returns its id. Any thread may call this.

prompt_ids [n]: list or integer array. adapter: None is the base model. sampling: None is SamplingParams(). priority: higher is
served first. pin_version: keep the adapter version the request begins with instead of following the newest.
deadline_ms: of the first token, from now; None: the engine's ttft_ms. reject_late: end with finish_reason "rejected" once the
deadline cannot be met; else the request is served late and counted as missed.
Raises InvalidArgument (naming the argument), NotFound (adapter), QueueFull.)")
      .def(
          "submit_train",
          [](PyEngine& e, const std::string& adapter, const ExamplesLike& examples, std::string loss, std::string reduction,
             std::optional<AdamW> optimizer, double clip_low, double clip_high, double weight) {
            std::vector<Example> batch = to_examples(examples, "examples");
            TrainOptions options{std::move(loss), std::move(reduction), optimizer, clip_low, clip_high, weight};
            py::gil_scoped_release release;
            return e.submit_train(adapter, std::move(batch), std::move(options));
          },
          py::arg("adapter"), py::arg("examples"), py::arg("loss") = "cross_entropy", py::arg("reduction") = "mean",
          py::arg("optimizer") = py::none(), py::arg("clip_low") = 0.2, py::arg("clip_high") = 0.2, py::arg("weight") = 1.0,
          R"(Queues one mini-batch of an adapter and returns the job's id. Any thread may call this.

Its gradients are added to the adapter's; with an optimizer (AdamW) the update happens when the last of them is in.
examples: a list of Example, dict (Example's fields) or token ids. loss: "cross_entropy", "importance_sampling", "ppo",
"weighted_logprob". reduction: "mean" over the mini-batch's unmasked targets, or "sum". clip_low, clip_high: of ppo.
weight: > 0, the adapter's share of training rows beside other adapters in training.
Raises InvalidArgument (naming example and field), NotFound (adapter), QueueFull.)")
      .def(
          "submit_eval",
          [](PyEngine& e, const std::optional<std::string>& adapter, const ExamplesLike& examples) {
            const std::string name = adapter_name(adapter);
            std::vector<Example> batch = to_examples(examples, "examples");
            py::gil_scoped_release release;
            return e.submit_eval(name, std::move(batch));
          },
          py::arg("adapter").none(true), py::arg("examples"),
          "Queues an evaluation (loss and per-token log-probabilities, no gradients) and returns the job's id. adapter None: the "
          "base model.")
      .def("cancel", &PyEngine::cancel, py::arg("id"), ReleaseGil(),
           R"(Ends a request or job at the next step, with the reason "cancelled". True when it was waiting or running.

A training job whose first micro-batch has begun is dropped as a whole, with the gradients accumulated since the last update.)")
      .def("has_work", &PyEngine::has_work, ReleaseGil(), "True while requests or jobs are waiting or running.")
      .def("step", &PyEngine::step, ReleaseGil(),
           R"(Computes one step and returns what it made. One thread at a time, without the GIL.

On a GPU the step after it, when both are of decodes alone, may be under way when this returns: what is submitted now is in the one
behind that.

Raises InvalidArgument when another thread is in step(), DeviceError, OutOfMemory.)");
}

void bind_state(py::class_<PyEngine>& cls) {
  cls.def("stats", &PyEngine::stats, ReleaseGil(), "Counters and gauges: attributes, or a mapping.")
      .def(
          "start_trace",
          [](PyEngine& e, const py::typing::Union<py::str, py::object>& path) {
            const auto where = to_path(path, "start_trace path: expected a path");
            py::gil_scoped_release release;
            e.start_trace(where);
          },
          py::arg("path"),
          "Writes every step from now on as Chrome trace events (JSON, opens in Perfetto), until stop_trace() or close().")
      .def("stop_trace", &PyEngine::stop_trace, ReleaseGil(), "Ends the trace and completes its file; without one: nothing.")
      .def(
          "save_checkpoint",
          [](const PyEngine& e, const py::typing::Union<py::str, py::object>& folder) {
            const path where = to_path(folder, "save_checkpoint folder: expected a path");
            py::gil_scoped_release release;
            e.save_checkpoint(where);
          },
          py::arg("folder"),
          "Writes every adapter with its training state to one folder: temporary name, synced, renamed. Queued work is not in it.")
      .def(
          "load_checkpoint",
          [](PyEngine& e, const py::typing::Union<py::str, py::object>& folder) {
            const path where = to_path(folder, "load_checkpoint folder: expected a path");
            py::gil_scoped_release release;
            e.load_checkpoint(where);
          },
          py::arg("folder"), "Registers every adapter of a checkpoint, training state included. Their names must be free.")
      .def("close", &PyEngine::close, ReleaseGil(),
           "Frees everything; later calls raise InvalidArgument. Closing twice does nothing.")
      .def_property_readonly("device", &PyEngine::device, R"("cpu" or "cuda:0".)")
      .def_property_readonly(
          "base_model", [](const PyEngine& e) { return std::const_pointer_cast<BaseModel>(e.shared_model()); },
          "The shared base model; hand it to another Engine to share the weights.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](PyEngine& e, const py::args&) {
        py::gil_scoped_release release;
        e.close();
      });
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_base_model(m);
  py::class_<PyEngine> cls(m, "Engine",
                           R"(Serves many LoRA adapters over one base model and fine-tunes LoRA adapters in the same batch.

model: a Hugging Face folder, a BaseModel, or a config (dict, or object with to_dict()) for random weights from `seed`.
device: "auto", "cpu", "cuda", "cuda:1". dtype: compute dtype, "f32" (CPU), "bf16", "f16" (CUDA).
max_batch_tokens: rows of one step, and the longest training example. max_sequences: running requests.
kv_cache_tokens, adapter_pool_bytes: None takes them from memory_fraction of the device's free memory (plan_memory tells).
max_train_tokens: rows of a step that has training rows, or in pieces of a micro-batch; None: max_batch_tokens; 0 switches training
off and saves its memory.
max_queue: waiting requests and examples; beyond it submit raises QueueFull. recompute: "none", or "layer" to keep only each
layer's input for backward. deterministic: results do not depend on who else is in the batch, bit for bit.
latency: a LatencyTarget(ttft_ms, tpot_ms) that serving keeps, training takes the rest; None: throughput, whole micro-batches.
slice_rows: rows of a piece of training work that a request may come between; 0: from the device's speed with a target, else whole.
trace_path: a trace of every step in the Chrome / Perfetto format is written there (start_trace() begins one later).
num_threads: CPU backend, 0: the processors this process may use. page_size: tokens per KV page.
cuda_graphs: steps of decodes alone replay recorded launches (CUDA).

submit_*, cancel and the queries may be called from any thread, step() by one thread at a time. A refused call changes nothing.)");
  const EngineOptions d;
  cls.def(py::init(&make_engine), py::arg("model"), py::kw_only(), py::arg("device") = d.device, py::arg("dtype") = d.dtype,
          py::arg("max_batch_tokens") = d.max_batch_tokens, py::arg("max_sequences") = d.max_sequences,
          py::arg("kv_cache_tokens") = py::none(), py::arg("adapter_pool_bytes") = py::none(),
          py::arg("memory_fraction") = d.memory_fraction, py::arg("max_train_tokens") = py::none(),
          py::arg("max_lora_rank") = d.max_lora_rank, py::arg("max_queue") = d.max_queue, py::arg("recompute") = d.recompute,
          py::arg("deterministic") = d.deterministic, py::arg("latency") = py::none(), py::arg("seed") = d.seed,
          py::arg("num_threads") = d.num_threads, py::arg("prefix_caching") = d.prefix_caching, py::arg("page_size") = d.page_size,
          py::arg("cuda_graphs") = d.cuda_graphs, py::arg("slice_rows") = d.slice_rows, py::arg("trace_path") = py::none());
  cls.def_static(
      "from_state_dict",
      [](const ConfigLike& config, const StateDictLike& state_dict, const py::kwargs& options) -> py::typing::Union<PyEngine> {
        auto model = std::const_pointer_cast<BaseModel>(model_from_state_dict(config, state_dict));
        return py::type::of<PyEngine>()(std::move(model), **options);
      },
      py::arg("config"), py::arg("state_dict"),
      R"(An engine over the weights of a live model, as BaseModel.from_state_dict; options as those of Engine.)");
  cls.def_static(
      "plan_memory",
      [](const ModelLike& model, const std::optional<int64_t>& device_bytes, int rank, std::string device, std::string dtype,
         int64_t max_batch_tokens, int64_t max_sequences, std::optional<int64_t> kv_cache_tokens,
         std::optional<int64_t> adapter_pool_bytes, double memory_fraction, std::optional<int64_t> max_train_tokens,
         int max_lora_rank, std::string recompute, bool deterministic, const LatencyLike& latency, int page_size, int slice_rows) {
        const EngineOptions options =
            memory_options("plan_memory", std::move(device), std::move(dtype), max_batch_tokens, max_sequences, kv_cache_tokens,
                           adapter_pool_bytes, memory_fraction, max_train_tokens, max_lora_rank, std::move(recompute),
                           deterministic, latency, page_size, slice_rows);
        const MemoryQuery query{device_bytes, rank};
        if (py::isinstance<BaseModel>(model)) return Engine::plan_memory(*model.cast<std::shared_ptr<BaseModel>>(), options, query);
        if (py::isinstance<py::dict>(model) || py::hasattr(model, "to_dict")) {
          return Engine::plan_memory_of_config(to_config_json(model, "plan_memory model"), options, query);
        }
        return Engine::plan_memory(
            to_path(model, "plan_memory model: expected a folder path, a BaseModel, or a config (dict or object with to_dict())"),
            options, query);
      },
      py::arg("model"), py::kw_only(), py::arg("device_bytes") = py::none(), py::arg("rank") = MemoryQuery{}.rank,
      py::arg("device") = d.device, py::arg("dtype") = d.dtype, py::arg("max_batch_tokens") = d.max_batch_tokens,
      py::arg("max_sequences") = d.max_sequences, py::arg("kv_cache_tokens") = py::none(),
      py::arg("adapter_pool_bytes") = py::none(), py::arg("memory_fraction") = d.memory_fraction,
      py::arg("max_train_tokens") = py::none(), py::arg("max_lora_rank") = d.max_lora_rank, py::arg("recompute") = d.recompute,
      py::arg("deterministic") = d.deterministic, py::arg("latency") = py::none(), py::arg("page_size") = d.page_size,
      py::arg("slice_rows") = d.slice_rows,
      R"(How an engine with these options would divide its device's memory, before it is made; the engine's start uses the same.

model: a folder (config.json is read, no weights), a BaseModel, or a config. device_bytes: free memory to plan for, then no device
is needed; None asks the device. rank: of the adapters to count. Raises OutOfMemory when it does not fit, listing every share.)");
  bind_adapters(cls);
  bind_work(cls);
  bind_state(cls);
}

}  // namespace loquetier::python
