// Plain data that goes in: LoraConfig, SamplingParams, AdamW, Example. Keyword constructors with the defaults of options.h.
#include <pybind11/numpy.h>

#include "bindings.h"

namespace loquetier::python {

namespace {

using StringOrList = std::optional<std::variant<std::string, std::vector<std::string>>>;

// PEFT's convention: "all-linear" or one regex as a string, suffixes as a list, None for the default.
void set_modules(const StringOrList& value, std::vector<std::string>& modules, bool& is_regex) {
  modules.clear();
  is_regex = false;
  if (!value) return;
  if (const auto* text = std::get_if<std::string>(&*value)) {
    is_regex = *text != "all-linear";
    modules = {*text};
  } else {
    modules = std::get<std::vector<std::string>>(*value);
  }
}

StringOrList get_modules(const std::vector<std::string>& modules, bool is_regex) {
  if (modules.empty()) return std::nullopt;
  if (is_regex || (modules.size() == 1 && modules[0] == "all-linear")) return modules[0];
  return modules;
}

using BoolOrString = std::variant<bool, std::string>;

std::string set_init(const BoolOrString& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  return std::get<std::string>(value);
}

BoolOrString get_init(const std::string& value) {
  if (value == "true" || value == "false") return value == "true";
  return value;
}

using IntOrList = std::optional<std::variant<int, std::vector<int>>>;

std::optional<std::vector<int>> set_layers(const IntOrList& value) {
  if (!value) return std::nullopt;
  if (const auto* one = std::get_if<int>(&*value)) return std::vector<int>{*one};
  return std::get<std::vector<int>>(*value);
}

template <class T>
using PatternDict = py::typing::Dict<py::str, T>;

template <class Value, class PyValue>
std::vector<std::pair<std::string, Value>> set_pattern(const std::optional<PatternDict<PyValue>>& value) {
  std::vector<std::pair<std::string, Value>> pairs;  // in the dict's order: the first match wins
  if (value) {
    for (const auto& [key, item] : *value) pairs.emplace_back(key.template cast<std::string>(), item.template cast<Value>());
  }
  return pairs;
}

template <class Value, class PyValue>
PatternDict<PyValue> get_pattern(const std::vector<std::pair<std::string, Value>>& pairs) {
  PatternDict<PyValue> dict;
  for (const auto& [key, value] : pairs) dict[key.c_str()] = value;
  return dict;
}

void bind_lora_config(py::module_& m) {
  py::class_<LoraConfig> cls(m, "LoraConfig", R"(A LoRA configuration with PEFT's field names.

r: rank, 1 .. max_lora_rank of the engine. lora_alpha: scale = lora_alpha / r, or / sqrt(r) with use_rslora.
target_modules: list of module names or suffixes ("q_proj"), one regex over full module names, or "all-linear"
(every linear but lm_head); None: q_proj and v_proj. exclude_modules: likewise, wins over target_modules.
layers_to_transform: only these layer indices. lora_dropout: in [0, 1), on training rows only.
rank_pattern, alpha_pattern: module suffix or regex -> value, the first match wins.
init_lora_weights: True (Kaiming-uniform A, zero B), "gaussian", or False (B is random too).
seed: of the initial values and of the dropout masks.
Values are checked by Engine.add_adapter, which raises InvalidArgument naming the field.)");
  cls.def(py::init([](int r, double lora_alpha, const StringOrList& target_modules, const StringOrList& exclude_modules,
                      const IntOrList& layers_to_transform, double lora_dropout, bool use_rslora,
                      const std::optional<PatternDict<py::int_>>& rank_pattern,
                      const std::optional<PatternDict<py::float_>>& alpha_pattern, const BoolOrString& init_lora_weights,
                      uint64_t seed) {
            LoraConfig c;
            c.r = r;
            c.lora_alpha = lora_alpha;
            set_modules(target_modules, c.target_modules, c.target_modules_is_regex);
            set_modules(exclude_modules, c.exclude_modules, c.exclude_modules_is_regex);
            c.layers_to_transform = set_layers(layers_to_transform);
            c.lora_dropout = lora_dropout;
            c.use_rslora = use_rslora;
            c.rank_pattern = set_pattern<int>(rank_pattern);
            c.alpha_pattern = set_pattern<double>(alpha_pattern);
            c.init_lora_weights = set_init(init_lora_weights);
            c.seed = seed;
            return c;
          }),
          py::kw_only(), py::arg("r") = 8, py::arg("lora_alpha") = 8.0, py::arg("target_modules") = py::none(),
          py::arg("exclude_modules") = py::none(), py::arg("layers_to_transform") = py::none(), py::arg("lora_dropout") = 0.0,
          py::arg("use_rslora") = false, py::arg("rank_pattern") = py::none(), py::arg("alpha_pattern") = py::none(),
          py::arg("init_lora_weights") = true, py::arg("seed") = 0);
  cls.def_readwrite("r", &LoraConfig::r)
      .def_readwrite("lora_alpha", &LoraConfig::lora_alpha)
      .def_property(
          "target_modules", [](const LoraConfig& c) { return get_modules(c.target_modules, c.target_modules_is_regex); },
          [](LoraConfig& c, const StringOrList& value) { set_modules(value, c.target_modules, c.target_modules_is_regex); })
      .def_property(
          "exclude_modules", [](const LoraConfig& c) { return get_modules(c.exclude_modules, c.exclude_modules_is_regex); },
          [](LoraConfig& c, const StringOrList& value) { set_modules(value, c.exclude_modules, c.exclude_modules_is_regex); })
      .def_property(
          "layers_to_transform", [](const LoraConfig& c) { return c.layers_to_transform; },
          [](LoraConfig& c, const IntOrList& value) { c.layers_to_transform = set_layers(value); })
      .def_readwrite("lora_dropout", &LoraConfig::lora_dropout)
      .def_readwrite("use_rslora", &LoraConfig::use_rslora)
      .def_property(
          "rank_pattern", [](const LoraConfig& c) { return get_pattern<int, py::int_>(c.rank_pattern); },
          [](LoraConfig& c, const PatternDict<py::int_>& value) { c.rank_pattern = set_pattern<int, py::int_>(value); })
      .def_property(
          "alpha_pattern", [](const LoraConfig& c) { return get_pattern<double, py::float_>(c.alpha_pattern); },
          [](LoraConfig& c, const PatternDict<py::float_>& value) { c.alpha_pattern = set_pattern<double, py::float_>(value); })
      .def_property(
          "init_lora_weights", [](const LoraConfig& c) { return get_init(c.init_lora_weights); },
          [](LoraConfig& c, const BoolOrString& value) { c.init_lora_weights = set_init(value); })
      .def_readwrite("seed", &LoraConfig::seed);
  add_value_methods(cls, {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "lora_dropout",
                          "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "seed"});
}

void bind_sampling_params(py::module_& m) {
  py::class_<SamplingParams> cls(m, "SamplingParams", R"(How to sample one request, with vLLM's field names.

temperature: >= 0, greedy below 1e-5. top_p: (0, 1]. top_k: 0 or -1 is off. min_p: [0, 1], relative to the most probable token.
seed: None draws one from the engine's seed and the request id; random numbers depend on the seed and the position only.
max_tokens: >= 1. min_tokens: stop tokens are forbidden before. stop_token_ids: beside the model's own end-of-sequence ids.
ignore_eos: the model's ids do not stop, stop_token_ids still do. presence_penalty, frequency_penalty: [-2, 2], over the
output. repetition_penalty: > 0, over prompt and output. logit_bias: token id -> added to its logit.
logprobs: how many of the most probable tokens to report per position, 0 .. 20. prompt_logprobs: report the
log-probability of every prompt token but the first. Values are checked by Engine.submit_infer.)");
  const SamplingParams d;
  cls.def(py::init([](double temperature, double top_p, int top_k, double min_p, std::optional<uint64_t> seed, int max_tokens,
                      int min_tokens, std::optional<std::vector<int32_t>> stop_token_ids, bool ignore_eos, double presence_penalty,
                      double frequency_penalty, double repetition_penalty, std::optional<std::map<int32_t, double>> logit_bias,
                      std::optional<int> logprobs, bool prompt_logprobs) {
            SamplingParams p;
            p.temperature = temperature;
            p.top_p = top_p;
            p.top_k = top_k;
            p.min_p = min_p;
            p.seed = seed;
            p.max_tokens = max_tokens;
            p.min_tokens = min_tokens;
            p.stop_token_ids = std::move(stop_token_ids).value_or(std::vector<int32_t>{});
            p.ignore_eos = ignore_eos;
            p.presence_penalty = presence_penalty;
            p.frequency_penalty = frequency_penalty;
            p.repetition_penalty = repetition_penalty;
            p.logit_bias = std::move(logit_bias).value_or(std::map<int32_t, double>{});
            p.logprobs = logprobs.value_or(0);
            p.prompt_logprobs = prompt_logprobs;
            return p;
          }),
          py::kw_only(), py::arg("temperature") = d.temperature, py::arg("top_p") = d.top_p, py::arg("top_k") = d.top_k,
          py::arg("min_p") = d.min_p, py::arg("seed") = py::none(), py::arg("max_tokens") = d.max_tokens,
          py::arg("min_tokens") = d.min_tokens, py::arg("stop_token_ids") = py::none(), py::arg("ignore_eos") = d.ignore_eos,
          py::arg("presence_penalty") = d.presence_penalty, py::arg("frequency_penalty") = d.frequency_penalty,
          py::arg("repetition_penalty") = d.repetition_penalty, py::arg("logit_bias") = py::none(),
          py::arg("logprobs") = d.logprobs, py::arg("prompt_logprobs") = d.prompt_logprobs);
  cls.def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs);
  add_value_methods(cls,
                    {"temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos",
                     "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "prompt_logprobs"});
}

void bind_adamw(py::module_& m) {
  py::class_<AdamW> cls(m, "AdamW",
                        R"(One AdamW update, as torch.optim.AdamW. A schedule is the caller's: pass another lr with each call.

max_grad_norm: clip the global L2 norm over all gradients of the adapter; None: no clipping.
loraplus_lr_ratio: the learning rate of B is this times lr (LoRA+).)");
  const AdamW d;
  cls.def(py::init([](double lr, std::array<double, 2> betas, double eps, double weight_decay, std::optional<double> max_grad_norm,
                      double loraplus_lr_ratio) { return AdamW{lr, betas, eps, weight_decay, max_grad_norm, loraplus_lr_ratio}; }),
          py::arg("lr") = d.lr, py::kw_only(), py::arg("betas") = py::make_tuple(d.betas[0], d.betas[1]), py::arg("eps") = d.eps,
          py::arg("weight_decay") = d.weight_decay, py::arg("max_grad_norm") = py::none(),
          py::arg("loraplus_lr_ratio") = d.loraplus_lr_ratio);
  cls.def_readwrite("lr", &AdamW::lr)
      .def_readwrite("betas", &AdamW::betas)
      .def_readwrite("eps", &AdamW::eps)
      .def_readwrite("weight_decay", &AdamW::weight_decay)
      .def_readwrite("max_grad_norm", &AdamW::max_grad_norm)
      .def_readwrite("loraplus_lr_ratio", &AdamW::loraplus_lr_ratio);
  add_value_methods(cls, {"lr", "betas", "eps", "weight_decay", "max_grad_norm", "loraplus_lr_ratio"});
}

void bind_latency_target(py::module_& m) {
  py::class_<LatencyTarget> cls(m, "LatencyTarget", R"(What serving is to keep while training takes the rest, in milliseconds.

ttft_ms: from submission to the first token (a request may have a deadline_ms of its own). tpot_ms: mean time per output token after
the first; one gap may be planned a quarter longer, with time that gaps before it left. Values are checked by Engine.)");
  const LatencyTarget d;
  cls.def(py::init([](double ttft_ms, double tpot_ms) { return LatencyTarget{ttft_ms, tpot_ms}; }), py::kw_only(),
          py::arg("ttft_ms") = d.ttft_ms, py::arg("tpot_ms") = d.tpot_ms);
  cls.def_readwrite("ttft_ms", &LatencyTarget::ttft_ms).def_readwrite("tpot_ms", &LatencyTarget::tpot_ms);
  add_value_methods(cls, {"ttft_ms", "tpot_ms"});
}

template <class T>
std::optional<py::array_t<T>> optional_array(const std::optional<std::vector<T>>& values) {
  if (!values) return std::nullopt;
  return py::array_t<T>(static_cast<py::ssize_t>(values->size()), values->data());
}

void bind_example(py::module_& m) {
  py::class_<Example> cls(m, "Example", R"(One training or evaluation example of n tokens. Immutable.

input_ids [n]. labels [n]: aligned with input_ids and shifted inside, as in transformers; -100 is no loss; None: input_ids.
weights [n] float: per target, default 1. logprobs [n], advantages [n] float: for the losses importance_sampling and ppo.
Entry t of every array belongs to token t as a target, predicted from the tokens before it; entry 0 is never a target.
Each is a list, a numpy array, or any host tensor with __dlpack__.)");
  cls.def(py::init([](const ArrayLike& input_ids, const std::optional<ArrayLike>& labels, const std::optional<ArrayLike>& weights,
                      const std::optional<ArrayLike>& logprobs, const std::optional<ArrayLike>& advantages) {
            Example e;
            e.input_ids = to_ids(input_ids, "Example input_ids");
            if (labels) e.labels = to_ids(*labels, "Example labels");
            if (weights) e.weights = to_floats(*weights, "Example weights");
            if (logprobs) e.logprobs = to_floats(*logprobs, "Example logprobs");
            if (advantages) e.advantages = to_floats(*advantages, "Example advantages");
            return e;
          }),
          py::arg("input_ids"), py::arg("labels") = py::none(), py::arg("weights") = py::none(), py::arg("logprobs") = py::none(),
          py::arg("advantages") = py::none());
  cls.def_property_readonly(
         "input_ids",
         [](const Example& e) { return py::array_t<int32_t>(static_cast<py::ssize_t>(e.input_ids.size()), e.input_ids.data()); })
      .def_property_readonly("labels", [](const Example& e) { return optional_array(e.labels); })
      .def_property_readonly("weights", [](const Example& e) { return optional_array(e.weights); })
      .def_property_readonly("logprobs", [](const Example& e) { return optional_array(e.logprobs); })
      .def_property_readonly("advantages", [](const Example& e) { return optional_array(e.advantages); })
      .def("__len__", [](const Example& e) { return e.input_ids.size(); })
      .def("__repr__", [](const Example& e) { return "Example(" + std::to_string(e.input_ids.size()) + " tokens)"; })
      .def("__reduce__", [](const py::object& self) -> py::tuple {
        return py::make_tuple(py::type::of(self), py::make_tuple(self.attr("input_ids"), self.attr("labels"), self.attr("weights"),
                                                                 self.attr("logprobs"), self.attr("advantages")));
      });
}

}  // namespace

void bind_options(py::module_& m) {
  bind_lora_config(m);
  bind_sampling_params(m);
  bind_adamw(m);
  bind_latency_target(m);
  bind_example(m);
  m.def(
      "_from_fields", [](const py::object& cls, const py::dict& fields) { return cls(**fields); }, py::arg("cls"),
      py::arg("fields"), "Makes an option object from its fields: what pickle calls.");
}

}  // namespace loquetier::python
