// The engine on a GPU against the engine on the CPU: the same model, the same adapters, the same calls. Needs a CUDA device.
//   cuda_engine_tests [filter] --model <folder of a trained Llama-family checkpoint> --adapters <folder of PEFT folders for it>
//   [--dtype bf16|f16]
// Without --model a random model is used. Bounds are those of the design for 16-bit compute: 2e-2 end to end.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <random>

#include "check.h"
#include "engine/impl.h"
#include "engine_inputs.h"
#include "loquetier/engine.h"

using namespace loquetier;
using namespace loquetier::test;
using inputs::lora;

namespace {

const char* kConfig = R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 303, "hidden_size": 256,
  "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
  "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 2})";

std::shared_ptr<const BaseModel> model() {
  const std::string folder = option("--model", "");
  static const auto shared = folder.empty() ? BaseModel::random(kConfig, 7, "bf16") : BaseModel::load(folder);
  return shared;
}

EngineOptions options_for(const std::string& device, bool deterministic = false) {
  EngineOptions options;
  options.device = device;
  options.dtype = device == "cuda" ? option("--dtype", "bf16") : "f32";
  options.deterministic = deterministic;
  options.max_batch_tokens = 1024;
  options.max_sequences = 64;
  options.kv_cache_tokens = 8192;
  options.adapter_pool_bytes = 64 << 20;
  return options;
}

std::vector<int32_t> tokens(std::mt19937& random, int n) { return inputs::tokens(random, n, 3, model()->vocab_size() - 3); }

std::vector<Example> examples(uint32_t seed, int count, int length) {
  std::mt19937 random(seed);
  std::vector<Example> out;
  for (int i = 0; i < count; ++i) {
    // A pattern to learn: a short random piece, repeated.
    const std::vector<int32_t> piece = tokens(random, 5);
    Example example;
    for (int t = 0; t < length + i % 7; ++t) example.input_ids.push_back(piece[static_cast<size_t>(t) % piece.size()]);
    out.push_back(example);
  }
  return out;
}

struct Outcome {
  std::map<int64_t, InferResult> requests;
  std::map<int64_t, TrainResult> trained;
  std::map<int64_t, EvalResult> evaluated;
};

Outcome drain(Engine& engine) {
  Outcome outcome;
  int steps = 0;
  while (engine.has_work() && ++steps < 5000) {
    StepResult result = engine.step();
    for (auto& r : result.finished) outcome.requests[r.request_id] = r;
    for (auto& r : result.trained) outcome.trained[r.job_id] = r;
    for (auto& r : result.evaluated) outcome.evaluated[r.job_id] = r;
  }
  CHECK(steps < 5000);
  return outcome;
}

// Relative Frobenius error, entries that are NaN in both left out.
double distance(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  if (got.size() != want.size()) return INFINITY;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(got[i]) && std::isnan(want[i])) continue;
    error += (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
    norm += static_cast<double>(want[i]) * want[i];
  }
  return std::sqrt(error / norm);
}

void check_distance(const char* what, const std::vector<float>& got, const std::vector<float>& want, double bound) {
  const double error = distance(got, want);
  std::printf("  %-40s %.3g\n", what, error);
  CHECK(error <= bound);
}

std::vector<float> joined(const std::vector<std::vector<float>>& parts) {
  std::vector<float> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::vector<float> flat(Engine& engine, const std::string& name, const std::string& what) {
  std::vector<float> values;
  for (const NamedTensor& t : engine.adapter_state(name, what)) values.insert(values.end(), t.data.begin(), t.data.end());
  return values;
}

void add_adapters(Engine& engine) {
  engine.add_adapter("a", lora(8, 1));
  engine.add_adapter("b", lora(16, 2, {"q_proj", "v_proj", "down_proj"}));
  engine.add_adapter("c", lora(5, 3, {"k_proj", "o_proj", "gate_proj", "up_proj"}));
  engine.add_adapter("d", lora(40, 4, {"q_proj", "up_proj", "lm_head"}));
}

}  // namespace

TEST(evaluation_and_prompt_logprobs_agree) {
  Engine cpu(model(), options_for("cpu")), cuda(model(), options_for("cuda"));
  for (Engine* e : {&cpu, &cuda}) add_adapters(*e);
  std::vector<std::vector<float>> evaluated[2], prompts[2];
  int side = 0;
  for (Engine* e : {&cpu, &cuda}) {
    std::vector<int64_t> jobs, requests;
    for (const char* name : {"", "a", "b", "c", "d"}) {
      jobs.push_back(e->submit_eval(name, examples(11, 4, 90)));
      std::mt19937 random(5);
      for (int n : {1, 15, 16, 17, 130}) {
        InferOptions infer;
        infer.adapter = name;
        infer.sampling.temperature = 0;
        infer.sampling.max_tokens = 6;
        infer.sampling.ignore_eos = true;
        infer.sampling.prompt_logprobs = true;
        requests.push_back(e->submit_infer(tokens(random, n), infer));
      }
    }
    Outcome outcome = drain(*e);
    for (const int64_t id : jobs) evaluated[side].push_back(joined(outcome.evaluated[id].logprobs));
    for (const int64_t id : requests) {
      CHECK_EQ(outcome.requests[id].token_ids.size(), 6u);
      prompts[side].push_back(outcome.requests[id].prompt_logprobs);
    }
    ++side;
  }
  check_distance("evaluation", joined(evaluated[1]), joined(evaluated[0]), 2e-2);
  check_distance("prompt logprobs", joined(prompts[1]), joined(prompts[0]), 2e-2);
}

TEST(generated_tokens_and_their_logprobs_agree) {
  // Tokens of the GPU, judged by the CPU: what the GPU chose greedily has, on the CPU, nearly the best log-probability, and the
  // same one.
  Engine cpu(model(), options_for("cpu")), cuda(model(), options_for("cuda"));
  for (Engine* e : {&cpu, &cuda}) add_adapters(*e);
  std::mt19937 random(9);
  struct Request {
    std::string adapter;
    std::vector<int32_t> prompt;
    int64_t id = 0;
  };
  std::vector<Request> requests;
  for (int i = 0; i < 20; ++i)
    requests.push_back({i % 5 == 4 ? "" : std::string(1, static_cast<char>('a' + i % 4)), tokens(random, 3 + i * 4)});
  for (Request& r : requests) {
    InferOptions infer;
    infer.adapter = r.adapter;
    infer.sampling.temperature = 0;
    infer.sampling.max_tokens = 40;
    infer.sampling.ignore_eos = true;
    r.id = cuda.submit_infer(r.prompt, infer);
  }
  Outcome outcome = drain(cuda);
  std::vector<float> got, want;
  for (Request& r : requests) {
    const InferResult& result = outcome.requests[r.id];
    CHECK_EQ(result.token_ids.size(), 40u);
    Example whole;
    whole.input_ids = r.prompt;
    whole.input_ids.insert(whole.input_ids.end(), result.token_ids.begin(), result.token_ids.end());
    const int64_t job = cpu.submit_eval(r.adapter, {whole});
    const auto logprobs = drain(cpu).evaluated[job].logprobs.at(0);
    got.insert(got.end(), result.logprobs.begin(), result.logprobs.end());
    want.insert(want.end(), logprobs.begin() + static_cast<std::ptrdiff_t>(r.prompt.size()), logprobs.end());
  }
  check_distance("log-probabilities of generated tokens", got, want, 2e-2);
}

TEST(training_beside_serving_agrees) {
  std::vector<float> losses[2], masters[2], gradients[2];
  int side = 0;
  for (const char* device : {"cpu", "cuda"}) {
    Engine engine(model(), options_for(device));
    add_adapters(engine);
    std::mt19937 random(3);
    TrainOptions train;
    const int64_t first = engine.submit_train("a", examples(21, 6, 50), train);  // accumulates: its gradients are looked at
    drain(engine);
    gradients[side] = flat(engine, "a", "gradients");
    train.optimizer = AdamW{.lr = 1e-3, .weight_decay = 0.01, .max_grad_norm = 1.0};
    std::vector<int64_t> jobs = {first};
    for (int step = 0; step < 30; ++step) {
      for (const char* name : {"a", "b", "c"})
        jobs.push_back(engine.submit_train(name, examples(static_cast<uint32_t>(100 + step), 4, 60), train));
      InferOptions infer;
      infer.adapter = "d";
      infer.sampling.max_tokens = 5;
      engine.submit_infer(tokens(random, 20), infer);
    }
    Outcome outcome = drain(engine);
    for (const int64_t id : jobs) {
      CHECK(id == first || outcome.trained[id].applied);
      if (id != first) losses[side].push_back(static_cast<float>(outcome.trained[id].loss));
    }
    masters[side] = flat(engine, "b", "master");
    ++side;
  }
  std::printf("  loss of b: %.4f -> %.4f on the GPU\n", static_cast<double>(losses[1][1]),
              static_cast<double>(losses[1][losses[1].size() - 2]));
  check_distance("gradients", gradients[1], gradients[0], 3e-2);
  check_distance("losses", losses[1], losses[0], 2e-2);
  check_distance("master weights after 30 updates", masters[1], masters[0], 2e-2);
}

// Decodes alone, replayed: the same launches as without a graph, so the same tokens bit for bit, whatever comes and goes between
// replays; and near those of an engine that lays its steps out for no graph, whose products may choose other algorithms.
TEST(replayed_decodes_are_those_launched_one_by_one) {
  struct Run {
    std::vector<std::vector<int32_t>> tokens;
    std::vector<float> logprobs;
    EngineStats stats;
  };
  auto run = [](bool use_graphs, bool replay) {
    EngineOptions options = options_for("cuda");
    options.cuda_graphs = use_graphs;
    options.adapter_pool_bytes = 12 << 20;  // evictions and moves between replays
    Engine engine(model(), options);
    EngineAccess::impl(engine).core->graphs.replay = replay;
    std::mt19937 random(23);
    Run out;
    add_adapters(engine);
    for (int round = 0; round < 2; ++round) {
      for (int n : {1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33}) {
        const std::string extra = "extra-" + std::to_string(n);
        engine.add_adapter(extra, lora(1 << (n % 6), static_cast<uint64_t>(n), {n % 2 ? "q_proj" : "all-linear"}));
        const std::string names[] = {"a", "", "b", extra, "c", "d", "a", "a"};
        std::vector<int64_t> ids;
        for (int i = 0; i < n; ++i) {
          InferOptions infer;
          infer.adapter = names[static_cast<size_t>(i + round) % 8];
          infer.sampling.temperature = 0;
          infer.sampling.max_tokens = 12;
          infer.sampling.ignore_eos = true;
          ids.push_back(engine.submit_infer(tokens(random, 3 + i), infer));
        }
        Outcome outcome = drain(engine);
        for (const int64_t id : ids) {
          out.tokens.push_back(outcome.requests[id].token_ids);
          const auto& logprobs = outcome.requests[id].logprobs;
          out.logprobs.insert(out.logprobs.end(), logprobs.begin(), logprobs.end());
        }
        engine.remove_adapter(extra);
      }
    }
    out.stats = engine.stats();
    return out;
  };
  const Run eager = run(false, false), launched = run(true, false), replayed = run(true, true);
  CHECK_EQ(launched.stats.graph_replays, 0);
  CHECK(replayed.stats.graph_replays > 100);
  CHECK(launched.tokens == replayed.tokens);
  CHECK(launched.logprobs == replayed.logprobs);
  size_t same = 0, first = 0;
  for (size_t i = 0; i < eager.tokens.size(); ++i) {
    same += eager.tokens[i] == replayed.tokens[i];
    first += eager.tokens[i][1] == replayed.tokens[i][1];  // the first token of a decode step
  }
  std::printf("  %lld replays of %lld recordings (%.1f ms each); %zu of %zu answers as without graphs, %zu in the first decode\n",
              static_cast<long long>(replayed.stats.graph_replays), static_cast<long long>(replayed.stats.graph_captures),
              1e3 * replayed.stats.graph_seconds / static_cast<double>(replayed.stats.graph_captures), same, eager.tokens.size(),
              first);
  CHECK(first * 10 >= eager.tokens.size() * 9);
}

TEST(an_engine_takes_its_plan_at_start) {
  EngineOptions options = options_for("cuda");
  options.max_train_tokens = 512;
  const MemoryPlan plan = Engine::plan_memory(*model(), options);
  Engine engine(model(), options);
  const EngineStats stats = engine.stats();
  CHECK_EQ(stats.kv_bytes, plan.kv_bytes);
  CHECK_EQ(stats.saved_bytes, plan.saved_bytes);
  CHECK_EQ(stats.scratch_bytes, plan.scratch_bytes);
  CHECK_EQ(stats.metadata_bytes, plan.metadata_bytes);
  CHECK_EQ(stats.workspace_bytes, plan.workspace_bytes);
  engine.add_adapter("a", lora(8, 1));
  TrainOptions train;
  train.optimizer = AdamW{};
  engine.submit_train("a", examples(3, 4, 100), train);
  std::mt19937 random(1);
  InferOptions infer;
  infer.adapter = "a";
  for (int i = 0; i < 8; ++i) engine.submit_infer(tokens(random, 40), infer);
  drain(engine);
  std::printf("  workspace planned %lld, held %lld bytes\n", static_cast<long long>(plan.workspace_bytes),
              static_cast<long long>(engine.stats().workspace_bytes));
  CHECK_EQ(engine.stats().workspace_bytes, plan.workspace_bytes);
  EngineOptions huge = options_for("cuda");
  huge.kv_cache_tokens = int64_t{1} << 40;
  CHECK_THROWS(OutOfMemory, "kv_cache_tokens", Engine(model(), huge));
}

// With a latency target the plans are built and their scratch is taken at start; without one, by the first steps.
TEST(with_a_latency_target_steps_find_their_plans) {
  for (const bool target : {true, false}) {
    EngineOptions options = options_for("cuda");
    options.max_train_tokens = 512;
    options.slice_rows = 512;
    if (target) options.latency = LatencyTarget{};
    const auto seconds_since = [](std::chrono::steady_clock::time_point begin) {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto begin = std::chrono::steady_clock::now();
    Engine engine(model(), options);
    const double start = seconds_since(begin);
    const int64_t held = engine.stats().workspace_bytes;
    engine.add_adapter("a", lora(8, 1));
    TrainOptions train;
    train.optimizer = AdamW{};
    std::mt19937 random(1);
    InferOptions infer;
    infer.adapter = "a";
    double longest = 0;
    for (const int n : {1, 3, 20}) {  // of more than one size: the same plans
      engine.submit_train("a", examples(3, n, 20), train);
      for (int i = 0; i < n; ++i) engine.submit_infer(tokens(random, 5 + i), infer);
      while (engine.has_work()) {
        const auto step = std::chrono::steady_clock::now();
        engine.step();
        longest = std::max(longest, seconds_since(step));
      }
    }
    if (target) CHECK_EQ(engine.stats().workspace_bytes, held);
    std::printf("  %s a target: start %.2f s, longest step %.0f ms, workspace %lld at start, %lld at the end\n",
                target ? "with" : "without", start, longest * 1e3, static_cast<long long>(held),
                static_cast<long long>(engine.stats().workspace_bytes));
  }
}

TEST(deterministic_sampled_logprob_equals_evaluated_bit_for_bit) {
  Engine engine(model(), options_for("cuda", true));
  add_adapters(engine);
  std::mt19937 random(17);
  std::map<int64_t, std::pair<std::string, std::vector<int32_t>>> requests;
  for (int i = 0; i < 12; ++i) {
    const std::string adapter = i % 5 == 4 ? "" : std::string(1, static_cast<char>('a' + i % 4));
    InferOptions infer;
    infer.adapter = adapter;
    infer.sampling.temperature = 1;
    infer.sampling.max_tokens = 24;
    infer.sampling.ignore_eos = true;
    infer.sampling.seed = static_cast<uint64_t>(i);
    const auto prompt = tokens(random, 2 + i * 7);
    requests[engine.submit_infer(prompt, infer)] = {adapter, prompt};
  }
  Outcome outcome = drain(engine);
  for (auto& [id, request] : requests) {
    const InferResult& result = outcome.requests[id];
    Example whole;
    whole.input_ids = request.second;
    whole.input_ids.insert(whole.input_ids.end(), result.token_ids.begin(), result.token_ids.end());
    const int64_t job = engine.submit_eval(request.first, {whole});
    const auto logprobs = drain(engine).evaluated[job].logprobs.at(0);
    const std::vector<float> evaluated(logprobs.begin() + static_cast<std::ptrdiff_t>(request.second.size()), logprobs.end());
    CHECK(evaluated == result.logprobs);
  }
}
