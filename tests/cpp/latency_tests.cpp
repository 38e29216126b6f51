// Training in pieces and latency targets in the engine: however a micro-batch is cut, losses and gradients are those of the whole;
// a request that comes ends the training of a step between two pieces; deadlines, records, statistics, the trace.
//   latency_tests [filter] --seed 1 --device cpu|cuda
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "check.h"
#include "engine/impl.h"
#include "engine/timing.h"
#include "engine_inputs.h"
#include "loquetier/engine.h"
#include "temp_folder.h"

using namespace loquetier;
using test::inputs::lora;
using test::inputs::tokens;

namespace {

std::string config_of(const std::string& family) {
  const std::string common = R"("vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 60)";
  if (family == "qwen3") return R"({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, )" + common + "}";
  return R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], )" + common + "}";
}

std::shared_ptr<const BaseModel> model_of(const std::string& family) { return BaseModel::random(config_of(family), 7); }

EngineOptions small_options() {
  EngineOptions options;
  options.device = test::option("--device", "cpu");
  options.num_threads = 1;
  options.max_batch_tokens = 96;
  options.max_sequences = 8;
  options.kv_cache_tokens = 512;
  options.page_size = 4;
  return options;
}

using Impl = std::remove_reference_t<decltype(EngineAccess::impl(std::declval<Engine&>()))>;

bool on_cuda() { return test::option("--device", "cpu") != "cpu"; }

// Some with a prompt that has no loss, one longer than the rest.
std::vector<Example> examples(uint32_t seed, int count, int length) {
  std::mt19937 random(seed);
  std::vector<Example> out;
  for (int i = 0; i < count; ++i) {
    Example e{.input_ids = tokens(random, i == 1 ? 3 * length : length + i % 5)};
    if (i % 2) {
      e.labels = e.input_ids;
      for (size_t t = 0; t < e.input_ids.size() / 2; ++t) (*e.labels)[t] = -100;
    }
    out.push_back(std::move(e));
  }
  return out;
}

SamplingParams greedy(int max_tokens) {
  SamplingParams sampling;
  sampling.temperature = 0;
  sampling.max_tokens = max_tokens;
  sampling.ignore_eos = true;
  return sampling;
}

std::vector<float> flat(Engine& engine, const std::string& name, const std::string& what) {
  std::vector<float> values;
  for (const NamedTensor& t : engine.adapter_state(name, what)) values.insert(values.end(), t.data.begin(), t.data.end());
  return values;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0, largest = 0;
  CHECK_EQ(a.size(), b.size());
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    worst = std::max(worst, std::abs(double(a[i]) - double(b[i])));
    largest = std::max(largest, std::abs(double(b[i])));
  }
  return largest > 0 ? worst / largest : INFINITY;
}

uint32_t seed_option() {
  const auto seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "1").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  return seed;
}

// Between two pieces of training: those launched apart, and those of a pass that a chunk shares with other rows.
bool is_piece(const char* phase) {
  const std::string name = phase;
  return name == "forward slice" || name == "backward layer" || name == "pass layer" || name == "pass heads";
}

struct Trained {
  std::map<std::string, std::vector<float>> gradients;
  std::map<int64_t, double> losses;
  std::map<int64_t, std::vector<int32_t>> generated;
  std::map<int64_t, std::vector<float>> logprobs;  // of requests, and of evaluated examples
  EngineStats stats;
  int steps = 0;
};

// Gradients of three adapters that train beside requests; `cut` may change the engine before each step.
Trained train(const std::string& family, const EngineOptions& options, const std::function<void(Impl&)>& cut) {
  Engine engine(model_of(family), options);
  engine.add_adapter("a", lora(4, 1));
  engine.add_adapter("b", lora(6, 2, {"q_proj", "down_proj", "lm_head"}, 0.2));
  engine.add_adapter("head", lora(3, 5, {"lm_head"}));
  engine.add_adapter("wide", lora(16, 3));  // only serves, with a larger rank than any that trains
  for (int i = 0; i < 3; ++i) {
    engine.submit_train("a", examples(20u + static_cast<uint32_t>(i), 5, 13));
    engine.submit_train("b", examples(30u + static_cast<uint32_t>(i), 3, 21));
    engine.submit_train("head", examples(40u, 1, 7));
    engine.submit_eval("a", examples(50u, 2, 9));
  }
  std::mt19937 prompts(4);
  for (int i = 0; i < 5; ++i) {
    SamplingParams sampling = greedy(9);
    sampling.prompt_logprobs = i == 3;
    engine.submit_infer(tokens(prompts, 7), {.adapter = i % 2 ? "wide" : "", .sampling = sampling});
  }
  Trained out;
  const auto note = [&](int64_t id, const std::vector<float>& logprobs) {
    std::ranges::copy_if(logprobs, std::back_inserter(out.logprobs[id]), [](float l) { return !std::isnan(l); });
  };
  while (engine.has_work() && ++out.steps < 5000) {
    cut(EngineAccess::impl(engine));
    const StepResult r = engine.step();
    for (const TrainResult& t : r.trained) {
      CHECK(t.reason == "accumulated");
      out.losses[t.job_id] = t.loss;
    }
    for (const EvalResult& e : r.evaluated) {
      out.losses[e.job_id] = e.loss;
      for (const auto& l : e.logprobs) note(e.job_id, l);
    }
    for (const InferResult& f : r.finished) {
      out.generated[f.request_id] = f.token_ids;
      note(f.request_id, f.logprobs);
      note(f.request_id, f.prompt_logprobs);
    }
  }
  CHECK(out.steps < 5000);
  for (const char* name : {"a", "b", "head"}) out.gradients[name] = flat(engine, name, "gradients");
  out.stats = engine.stats();
  return out;
}

void check_same(const Trained& got, const Trained& want, const std::string& what) {
  const double bound = on_cuda() ? 3e-2 : 2e-5;  // 16-bit against f32 rounding
  double worst = 0;
  for (const auto& [name, gradients] : want.gradients) worst = std::max(worst, distance(got.gradients.at(name), gradients));
  double loss = 0;
  CHECK_EQ(got.losses.size(), want.losses.size());
  for (const auto& [id, value] : want.losses) loss = std::max(loss, std::abs(got.losses.at(id) - value) / std::abs(value));
  std::cout << "  " << what << ": gradients " << worst << ", losses " << loss << ", " << got.stats.slices << " slices, "
            << got.stats.interrupted_steps << " interrupted of " << got.steps << " steps\n";
  CHECK(worst <= bound);
  CHECK(loss <= bound);
  if (on_cuda()) return;
  CHECK(got.generated == want.generated);
  CHECK_EQ(got.logprobs.size(), want.logprobs.size());
  for (const auto& [id, values] : want.logprobs) CHECK(distance(got.logprobs.at(id), values) <= bound);
}

}  // namespace

TEST(losses_and_gradients_do_not_depend_on_how_training_is_cut) {
  std::mt19937 random(seed_option());
  int64_t left = 0;
  for (const std::string family : {"llama", "qwen3"}) {
    for (const std::string recompute : {"none", "layer"}) {
      EngineOptions options = small_options();
      options.recompute = recompute;
      const Trained whole = train(family, options, [](Impl&) {});
      CHECK_EQ(whole.stats.interrupted_steps, 0);
      for (int round = 0; round < 4; ++round) {
        options.slice_rows = static_cast<int>(3 + random() % 30);
        int64_t interrupted = 0;
        const Trained cut = train(family, options, [&](Impl& impl) {
          impl.budget.max_rows = random() % 3 ? -1 : static_cast<int64_t>(random() % 40);
          impl.budget.max_backward_slices = random() % 3 ? -1 : static_cast<int32_t>(random() % 12);
          if (impl.probe) return;
          impl.probe = [&](const char* phase) {  // as if a request had come
            left += std::string(phase) == "training left";
            if (is_piece(phase) && random() % 5 == 0) impl.arrivals = 1;
          };
        });
        interrupted += cut.stats.interrupted_steps;
        CHECK(interrupted > 0);
        CHECK(cut.stats.slices > whole.stats.slices);
        check_same(cut, whole, family + ", recompute " + recompute + ", slices of " + std::to_string(options.slice_rows));
      }
    }
  }
  std::cout << "  " << left << " chunks left their pass\n";
  CHECK(left > 20);
}

// Of every pass, behind every number of its pieces.
TEST(a_chunk_that_leaves_its_pass_anywhere_changes_nothing) {
  for (const bool deterministic : {false, true}) {
    EngineOptions options = small_options();
    options.slice_rows = 24;
    options.deterministic = deterministic;
    const Trained whole = train("qwen3", options, [](Impl&) {});
    CHECK_EQ(whole.stats.interrupted_steps, 0);
    for (int behind = 0; behind <= 4; ++behind) {
      int pieces = 0, steps = 0;
      std::map<std::string, int> phases;
      const Trained cut = train("qwen3", options, [&](Impl& impl) {
        impl.budget.max_rows = 40;  // chunks end inside examples
        impl.probe = [&](const char* phase) {
          phases[phase] += 1;
          if (std::string(phase) == "uploaded") pieces = 0;
          const bool shared = std::string(phase) == "pass layer" || std::string(phase) == "pass heads";
          if (std::string(phase) == "uploaded" && ++steps % 2 && behind == 0) impl.arrivals = 1;
          if (shared && ++pieces == behind) impl.arrivals = 1;
        };
      });
      check_same(cut, whole, (deterministic ? "deterministic, behind " : "behind ") + std::to_string(behind));
      std::cout << "  " << phases["training left"] << " chunks left " << phases["uploaded"] << " passes\n";
      CHECK(phases["training left"] > 0 || behind == 4);  // three layers and a head chunk: nothing is left then
      if (!deterministic) continue;
      CHECK(cut.generated == whole.generated);
      CHECK(cut.logprobs == whole.logprobs);  // who is beside a row, and how long, is not seen in its results
    }
  }
}

// A chunk with two head chunks beside a decode and an evaluation; a request comes behind piece `at` of the pass, 0: none.
Trained leave_beside_a_decode(int at) {
  EngineOptions options = small_options();
  options.max_batch_tokens = 700;
  options.kv_cache_tokens = 1024;
  options.latency = LatencyTarget{.ttft_ms = 60000, .tpot_ms = 10000};
  options.slice_rows = 600;
  Engine engine(model_of("llama"), options);
  engine.add_adapter("a", lora(4, 1, {"all-linear"}, 0.1));
  std::mt19937 random(3);
  const auto late_prompt = tokens(random, 5);
  const int64_t running = engine.submit_infer(tokens(random, 6), {.adapter = "a", .sampling = greedy(20)});
  engine.step();
  std::vector<Example> batch;
  for (int i = 0; i < 4; ++i) batch.push_back({.input_ids = tokens(random, 110)});
  const int64_t job = engine.submit_train("a", batch), evaluation = engine.submit_eval("", examples(5, 1, 9));
  Impl& impl = EngineAccess::impl(engine);
  int pieces = 0;
  int64_t id = 0;
  std::vector<std::string> after;
  impl.probe = [&](const char* phase) {
    if (id) after.push_back(phase);
    const bool shared = std::string(phase) == "pass layer" || std::string(phase) == "pass heads";
    if (shared && ++pieces == at) id = engine.submit_infer(late_prompt, {.sampling = greedy(3)});
  };
  Trained out;
  const auto take = [&](const StepResult& r) {
    for (const TrainResult& t : r.trained) out.losses[t.job_id] = t.loss;
    for (const EvalResult& e : r.evaluated) out.losses[e.job_id] = e.loss;
    for (const InferResult& f : r.finished) out.generated[f.request_id] = f.token_ids;
  };
  const auto tokens_of = [](const StepResult& r, int64_t request) {
    return std::ranges::count(r.tokens, request, &TokenEvent::request_id);
  };
  const StepResult shared = engine.step(), next = engine.step();
  if (at > 0) {
    CHECK(after.front() == "training left");
    after.erase(after.begin() + 5, after.end());  // of the step that it ended
    CHECK(after == std::vector<std::string>({"training left", "forward", "backward", "optimizer", "downloaded"}));
    CHECK_EQ(shared.trained.size(), 0u);
    CHECK_EQ(next.tokens.size(), 2u);
    CHECK_EQ(tokens_of(next, id), 1);  // the prompt was computed in the very next step
  }
  CHECK_EQ(tokens_of(shared, running), 1);
  CHECK_EQ(tokens_of(next, running), 1);
  CHECK_EQ(shared.evaluated.size(), 1u);
  CHECK_EQ(engine.stats().interrupted_steps, at > 0 ? 1 : 0);
  take(shared);
  take(next);
  while (engine.has_work() && ++out.steps < 500) take(engine.step());
  CHECK_EQ(engine.stats().train_tokens, 4 * 109);
  CHECK_EQ(out.losses.size(), 2u);
  CHECK(std::isfinite(out.losses[job]) && std::isfinite(out.losses[evaluation]));
  out.generated.erase(id);
  out.gradients["a"] = flat(engine, "a", "gradients");
  out.stats = engine.stats();
  return out;
}

TEST(a_request_is_served_before_the_training_beside_decodes_goes_on) {
  const Trained whole = leave_beside_a_decode(0);
  for (int at = 1; at <= 4; ++at) check_same(leave_beside_a_decode(at), whole, "behind " + std::to_string(at));
}

// The first ones make a chunk leave its pass, then none does.
TEST(training_goes_on_though_a_request_comes_in_every_step) {
  for (const bool target : {false, true}) {
    EngineOptions options = small_options();
    options.slice_rows = 8;
    if (target) options.latency = LatencyTarget{.ttft_ms = 1000, .tpot_ms = 50};
    Engine engine(model_of("llama"), options);
    engine.add_adapter("a", lora(4, 1));
    std::mt19937 random(3);
    Impl& impl = EngineAccess::impl(engine);
    int64_t left = 0;
    int steps = 0, last_left = 0;
    impl.probe = [&](const char* phase) {
      if (std::string(phase) == "training left") ++left, last_left = steps;
      if (std::string(phase) == "uploaded") engine.submit_infer(tokens(random, 3), {.sampling = greedy(3)});
    };
    for (int i = 0; i < 16; ++i) engine.submit_train("a", examples(7, 3, 20));
    int64_t trained = 0;
    for (; trained < 16 && steps < 1500; ++steps) trained += std::ssize(engine.step().trained);
    std::cout << "  " << steps << " steps, " << left << " chunks left their pass, the last in step " << last_left << "\n";
    CHECK_EQ(trained, 16);
    CHECK(left > 0);
    CHECK(last_left <= 16 && steps > 40);
  }
}

TEST(with_a_target_the_results_are_the_same) {
  EngineOptions options = small_options();
  const Trained whole = train("llama", options, [](Impl&) {});
  options.latency = LatencyTarget{.ttft_ms = 1000, .tpot_ms = 0.5};
  options.slice_rows = 8;
  check_same(train("llama", options, [](Impl&) {}), whole, "target");
}

TEST(a_request_is_served_before_the_training_under_way_goes_on) {
  EngineOptions options = small_options();
  options.latency = LatencyTarget{.ttft_ms = 1000, .tpot_ms = 50};
  options.slice_rows = 8;
  Engine engine(model_of("llama"), options);
  engine.add_adapter("a", lora(4, 1));
  for (int i = 0; i < 4; ++i) engine.submit_train("a", examples(7, 4, 20));
  std::mt19937 random(3);
  Impl& impl = EngineAccess::impl(engine);
  int64_t pieces = 0, after = 0, id = 0;
  impl.probe = [&](const char* phase) {
    if (std::string(phase) != "forward slice" && std::string(phase) != "backward layer") return;
    if (id) ++after;
    if (++pieces == 5) id = engine.submit_infer(tokens(random, 6), {.sampling = greedy(3)});  // in the middle of a step
  };
  int steps = 0;
  while (id == 0 && ++steps < 50) engine.step();
  CHECK(id != 0);
  CHECK_EQ(after, 0);  // the step ended with the piece during which the request came
  CHECK_EQ(engine.stats().interrupted_steps, 1);
  const StepResult next = engine.step();
  CHECK_EQ(next.tokens.size(), 1u);  // its prompt was computed in the very next step
  CHECK_EQ(next.tokens[0].request_id, id);
  steps = 0;
  int64_t trained = 0;
  while (engine.has_work() && ++steps < 500) trained += std::ssize(engine.step().trained);
  CHECK_EQ(trained, 4);
}

TEST(cancelled_and_removed_while_chunks_are_under_way) {
  std::mt19937 random(seed_option());
  int64_t left = 0;
  for (int round = 0; round < 36; ++round) {
    EngineOptions options = small_options();
    options.slice_rows = 6;
    Engine engine(model_of("llama"), options);
    engine.add_adapter("a", lora(4, 1));
    engine.add_adapter("b", lora(5, 2));
    const int64_t a = engine.submit_train("a", examples(7, 3, 14)), b = engine.submit_train("b", examples(8, 3, 14));
    Impl& impl = EngineAccess::impl(engine);
    impl.probe = [&](const char* phase) {
      left += std::string(phase) == "training left";
      if (random() % 4 == 0) impl.arrivals = 1;
    };
    if (round >= 12) {  // chunks share their passes with decodes
      for (const char* name : {"a", "b", ""}) engine.submit_infer(tokens(random, 5), {.adapter = name, .sampling = greedy(40)});
    }
    std::map<int64_t, std::string> reasons;
    const auto take = [&](StepResult r) {
      for (const TrainResult& t : r.trained) CHECK(reasons.emplace(t.job_id, t.reason).second);
    };
    for (int i = 0; i <= round % 12; ++i) take(engine.step());
    const bool live = reasons.empty();
    if (round % 2) engine.cancel(a);
    else engine.remove_adapter("a");
    int steps = 0;
    while (engine.has_work() && ++steps < 2000) take(engine.step());
    CHECK(steps < 2000);
    if (live) CHECK(reasons.at(a) == "cancelled");
    CHECK(reasons.at(b) == "accumulated");
    if (live && round % 2) {
      for (const float g : flat(engine, "a", "gradients")) CHECK(g == 0);
    }
  }
  CHECK(left > 10);
}

TEST(an_exception_between_pieces_ends_the_jobs_and_leaves_a_working_engine) {
  EngineOptions options = small_options();
  options.slice_rows = 6;
  for (const char* phase : {"planned", "uploaded", "forward slice", "forward", "backward layer", "downloaded"}) {
    for (int at = 1; at <= 9; at += 4) {
      Engine engine(model_of("llama"), options);
      engine.add_adapter("a", lora(4, 1));
      const int64_t lost = engine.submit_train("a", examples(7, 3, 14));
      Impl& impl = EngineAccess::impl(engine);
      int seen = 0;
      impl.probe = [&](const char* now) {
        if (std::string(now) == phase && ++seen == at) throw std::runtime_error("planted");
      };
      std::map<int64_t, std::string> reasons;
      bool thrown = false;
      int steps = 0;
      while (engine.has_work() && ++steps < 500) {
        try {
          for (const TrainResult& t : engine.step().trained) reasons[t.job_id] = t.reason;
        } catch (const std::runtime_error&) {
          thrown = true;
        }
      }
      CHECK(steps < 500);
      CHECK(reasons.at(lost) == (thrown ? "error: planted" : "accumulated"));
      impl.probe = nullptr;
      const int64_t again = engine.submit_train("a", examples(7, 3, 14));
      steps = 0;
      while (engine.has_work() && ++steps < 500) {
        for (const TrainResult& t : engine.step().trained) reasons[t.job_id] = t.reason;
      }
      CHECK(reasons.at(again) == "accumulated");
    }
  }
}

TEST(an_exception_while_a_chunk_leaves_its_pass_loses_no_token) {
  EngineOptions options = small_options();
  options.slice_rows = 6;
  std::mt19937 random(9);
  const auto prompt = tokens(random, 6);
  const auto run = [&](const char* thrown_in, int left_at, int thrown_at) {
    Engine engine(model_of("llama"), options);
    engine.add_adapter("a", lora(4, 1));
    engine.submit_infer(prompt, {.adapter = "a", .sampling = greedy(30)});
    const int64_t job = engine.submit_train("a", examples(7, 3, 14));
    Impl& impl = EngineAccess::impl(engine);
    int pieces = 0, seen = 0;
    impl.probe = [&](const char* now) {
      if (std::string(now) == "pass layer" && ++pieces == left_at) impl.arrivals = 1;
      if (thrown_in && std::string(now) == thrown_in && ++seen == thrown_at) throw std::runtime_error("planted");
    };
    std::vector<int32_t> generated;
    std::map<int64_t, std::string> reasons;
    bool thrown = false;
    int steps = 0;
    while (engine.has_work() && ++steps < 500) {
      try {
        const StepResult r = engine.step();
        for (const TrainResult& t : r.trained) reasons[t.job_id] = t.reason;
        for (const InferResult& f : r.finished) generated = f.token_ids;
      } catch (const std::runtime_error&) {
        thrown = true;
      }
    }
    CHECK(steps < 500);
    CHECK_EQ(thrown, thrown_in != nullptr);
    CHECK(reasons.at(job) == (thrown ? "error: planted" : "accumulated"));
    impl.probe = nullptr;
    const int64_t again = engine.submit_train("a", examples(7, 3, 14));
    while (engine.has_work()) {
      for (const TrainResult& t : engine.step().trained) reasons[t.job_id] = t.reason;
    }
    CHECK(reasons.at(again) == "accumulated");
    CHECK_EQ(engine.stats().kv_pages_free + engine.stats().kv_pages_cached, engine.stats().kv_pages);
    return generated;
  };
  const auto expected = run(nullptr, 0, 0);
  CHECK_EQ(expected.size(), 30u);
  CHECK(run(nullptr, 2, 0) == expected);
  for (int left_at = 1; left_at <= 3; ++left_at) {
    CHECK(run("pass layer", left_at, left_at) == expected);
    for (const char* phase : {"training left", "forward", "downloaded"}) CHECK(run(phase, left_at, 1) == expected);
    CHECK(run("forward slice", left_at, 1) == expected);  // the chunk goes on in a later step, and fails there
  }
}

TEST(records_statistics_and_the_trace) {
  const test::TempFolder folder;
  const auto path = folder.path() / "trace.json";
  EngineOptions options = small_options();
  options.latency = LatencyTarget{.ttft_ms = 60000, .tpot_ms = 1000};
  options.trace_path = path.string();
  Engine engine(model_of("llama"), options);
  engine.add_adapter("a", lora(4, 1));
  std::mt19937 random(3);
  for (int i = 0; i < 4; ++i) engine.submit_infer(tokens(random, 6), {.sampling = greedy(20)});
  for (int i = 0; i < 30; ++i) {
    engine.submit_train("a", examples(7, 3, 14), {.optimizer = AdamW{}});
    while (engine.has_work()) {
      const StepResult r = engine.step();
      for (const InferResult& f : r.finished) {
        CHECK(f.queue_seconds >= 0 && f.queue_seconds <= f.ttft_seconds);
        CHECK(f.ttft_seconds > 0 && f.tpot_seconds > 0);
        CHECK(f.deadline_met);
      }
      for (const TrainResult& t : r.trained) {
        CHECK(t.queue_seconds >= 0 && t.queue_seconds <= t.seconds);
        CHECK(t.steps >= 1);
      }
    }
  }
  const EngineStats s = engine.stats();
  CHECK_EQ(s.deadlines_met, 4);
  CHECK_EQ(s.deadlines_missed, 0);
  CHECK(s.training_seconds > 0 && s.training_seconds <= s.step_seconds);
  CHECK(s.last_step_seconds > 0 && s.last_step_predicted > 0);
  CHECK(s.slices > 0);
  CHECK(s.cost_model.starts_with("loquetier-cost-model"));
  std::cout << "prediction error: median " << s.prediction_error_median << ", p95 " << s.prediction_error_p95 << "\n";
  engine.close();
  std::ifstream in(path);
  const auto trace = nlohmann::json::parse(in);
  std::map<std::string, int64_t> events;
  for (const auto& e : trace.at("traceEvents")) events[e.at("name").get<std::string>()] += 1;
  CHECK_EQ(events["step"], s.steps);
  CHECK(events["forward layer"] > 0);
  CHECK(events["backward"] > 0);
}

TEST(late_requests_are_rejected_when_asked_and_served_otherwise) {
  EngineOptions options = small_options();
  options.latency = LatencyTarget{.ttft_ms = 1000, .tpot_ms = 50};
  Engine engine(model_of("llama"), options);
  std::mt19937 random(3);
  const auto prompt = tokens(random, 6);
  const int64_t rejected = engine.submit_infer(prompt, {.sampling = greedy(3), .deadline_ms = 1, .reject_late = true});
  const int64_t late = engine.submit_infer(prompt, {.sampling = greedy(3), .deadline_ms = 1});
  const int64_t good = engine.submit_infer(prompt, {.sampling = greedy(3), .deadline_ms = 60000, .reject_late = true});
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  std::map<int64_t, InferResult> results;
  while (engine.has_work()) {
    for (InferResult& r : engine.step().finished) results[r.request_id] = std::move(r);
  }
  CHECK(results.at(rejected).finish_reason == FinishReason::rejected);
  CHECK(results.at(rejected).error.find("within 1 ms") != std::string::npos);
  CHECK(results.at(rejected).token_ids.empty() && !results.at(rejected).deadline_met);
  CHECK(results.at(late).finish_reason == FinishReason::length && !results.at(late).deadline_met);
  CHECK(results.at(good).finish_reason == FinishReason::length && results.at(good).deadline_met);
  const EngineStats s = engine.stats();
  CHECK_EQ(s.rejected_requests, 1);
  CHECK_EQ(s.deadlines_missed, 2);
  CHECK_EQ(s.deadlines_met, 1);
}

TEST(a_piece_is_as_long_as_an_arrival_may_wait) {
  const ModelShape large{.layer_parameters = 7e9, .layers = 32}, small{.layer_parameters = 85e6, .layers = 12};
  const DeviceRates gpu{.flops_per_second = 7e14}, host{.flops_per_second = 2e11};
  for (const double tpot : {0.03, 0.15}) {
    CHECK(slice_seconds(false, tpot) < 1e-3);
    CHECK_EQ(slice_rows_for(large, gpu, slice_seconds(false, tpot), 8192), 1024);
  }
  CHECK_EQ(slice_rows_for(large, gpu, slice_seconds(false, 0.03), 300), 300);
  // 71 us a row of a layer: a tenth of the target per token.
  CHECK_EQ(slice_rows_for(small, host, slice_seconds(true, 0.15), 512), 128);
  CHECK_EQ(slice_rows_for(small, host, slice_seconds(true, 0.05), 512), 64);
  CHECK_EQ(slice_rows_for(small, host, slice_seconds(true, 0.001), 512), kSmallestSlice);
}

TEST(bad_targets_are_refused) {
  EngineOptions options = small_options();
  options.latency = LatencyTarget{.ttft_ms = 0, .tpot_ms = 50};
  CHECK_THROWS(InvalidArgument, "ttft_ms", Engine(model_of("llama"), options));
  options.latency = LatencyTarget{.ttft_ms = 10, .tpot_ms = std::nan("")};
  CHECK_THROWS(InvalidArgument, "tpot_ms", Engine(model_of("llama"), options));
  options.latency.reset();
  options.slice_rows = -1;
  CHECK_THROWS(InvalidArgument, "slice_rows", Engine(model_of("llama"), options));
  options.slice_rows = 0;
  Engine engine(model_of("llama"), options);
  engine.add_adapter("a", lora(4, 1));
  CHECK_THROWS(InvalidArgument, "reject_late", engine.submit_infer({1, 2}, {.reject_late = true}));
  CHECK_THROWS(InvalidArgument, "deadline_ms", engine.submit_infer({1, 2}, {.deadline_ms = -3}));
  CHECK_THROWS(InvalidArgument, "weight", engine.submit_train("a", examples(1, 1, 5), {.weight = 0}));
  CHECK_THROWS(InvalidArgument, "[trace] path", engine.start_trace("/nonexistent/folder/trace.json"));
  CHECK(!engine.has_work());
}
