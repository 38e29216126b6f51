// The engine from C++: serving and training in the same steps, backward cut over steps, exceptions in the middle of a step, a
// random soak. Parity with transformers + PEFT is tested from Python; here the engine is compared with itself.
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "engine/impl.h"
#include "engine_inputs.h"
#include "loquetier/engine.h"

using namespace loquetier;
using namespace loquetier::test::inputs;

namespace {

std::shared_ptr<const BaseModel> tiny_model() {
  static const auto model = BaseModel::random(kTinyConfig, 7);
  return model;
}

EngineOptions small_options() {
  EngineOptions options;
  options.device = test::option("--device", "cpu");  // the random soak runs on a GPU too
  options.num_threads = 1;
  options.max_batch_tokens = 64;
  options.max_sequences = 8;
  options.kv_cache_tokens = 512;
  options.page_size = 4;
  return options;
}

SamplingParams greedy(int max_tokens) {
  SamplingParams sampling;
  sampling.temperature = 0;
  sampling.max_tokens = max_tokens;
  sampling.ignore_eos = true;
  return sampling;
}

struct Outcome {
  std::map<int64_t, InferResult> requests;
  std::map<int64_t, TrainResult> trained;
  std::map<int64_t, EvalResult> evaluated;
  int64_t token_events = 0;
  void take(StepResult result) {
    token_events += static_cast<int64_t>(result.tokens.size());
    for (auto& r : result.finished) CHECK(requests.emplace(r.request_id, r).second);
    for (auto& r : result.trained) CHECK(trained.emplace(r.job_id, r).second);
    for (auto& r : result.evaluated) CHECK(evaluated.emplace(r.job_id, r).second);
  }
};

Outcome drain(Engine& engine, int limit = 2000) {
  Outcome outcome;
  while (engine.has_work() && --limit > 0) outcome.take(engine.step());
  CHECK(limit > 0);
  return outcome;
}

std::vector<float> flat(Engine& engine, const std::string& name, const std::string& what) {
  std::vector<float> values;
  for (const NamedTensor& t : engine.adapter_state(name, what)) values.insert(values.end(), t.data.begin(), t.data.end());
  return values;
}

TrainOptions with_optimizer(double lr = 1e-2) {
  TrainOptions options;
  options.optimizer = AdamW{.lr = lr, .weight_decay = 0.01, .max_grad_norm = 1.0};
  return options;
}

}  // namespace

TEST(serves_and_trains_in_the_same_steps) {
  Engine engine(tiny_model(), small_options());
  engine.add_adapter("served", lora(4, 1));
  engine.add_adapter("learner", lora(8, 2, {"q_proj", "v_proj", "up_proj", "down_proj", "lm_head"}));
  std::mt19937 random(3);
  const auto prompt = tokens(random, 9);
  const int64_t base = engine.submit_infer(prompt, {.sampling = greedy(12)});
  const int64_t served = engine.submit_infer(prompt, {.adapter = "served", .sampling = greedy(12)});
  std::vector<int64_t> jobs;
  for (int i = 0; i < 12; ++i) jobs.push_back(engine.submit_train("learner", examples(5, 3, 10), with_optimizer(5e-2)));
  int mixed = 0;
  Outcome outcome;
  while (engine.has_work()) {
    StepResult step = engine.step();
    mixed += !step.tokens.empty() && !step.trained.empty();
    outcome.take(std::move(step));
  }
  CHECK(mixed >= 5);
  CHECK_EQ(outcome.token_events, 24);
  CHECK_EQ(outcome.requests.at(base).token_ids.size(), 12u);
  CHECK(outcome.requests.at(base).token_ids != outcome.requests.at(served).token_ids);
  CHECK(outcome.requests.at(served).finish_reason == FinishReason::length);
  const double first = outcome.trained.at(jobs.front()).loss, last = outcome.trained.at(jobs.back()).loss;
  CHECK(last < 0.7 * first);
  CHECK_EQ(outcome.trained.at(jobs.back()).version, 12);
  CHECK(outcome.trained.at(jobs.back()).applied);
  CHECK_EQ(engine.adapter("learner").version, 12);

  // The served adapter is untouched, and a fresh engine gives the same tokens alone.
  Engine alone(tiny_model(), small_options());
  alone.add_adapter("served", lora(4, 1));
  const int64_t again = alone.submit_infer(prompt, {.adapter = "served", .sampling = greedy(12)});
  CHECK(drain(alone).requests.at(again).token_ids == outcome.requests.at(served).token_ids);
}

TEST(backward_cut_at_random_places_gives_the_same_weights) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "11").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  auto run = [&](bool cut) {
    Engine engine(tiny_model(), small_options());
    engine.add_adapter("a", lora(4, 1));
    engine.add_adapter("b", lora(6, 2, {"q_proj", "down_proj", "lm_head"}));
    engine.add_adapter("served", lora(3, 3));
    for (int i = 0; i < 4; ++i) {
      engine.submit_train("a", examples(20, 5, 14), with_optimizer());
      engine.submit_train("b", examples(21, 2, 20), with_optimizer());
    }
    std::mt19937 prompts(4);
    for (int i = 0; i < 6; ++i) engine.submit_infer(tokens(prompts, 7), {.adapter = i % 2 ? "served" : "a", .sampling = greedy(9)});
    int steps = 0;
    while (engine.has_work() && ++steps < 1000) {
      EngineAccess::impl(engine).budget.max_backward_slices = cut ? static_cast<int32_t>(random() % 3) + (steps % 4 == 0) : -1;
      engine.step();
    }
    CHECK(steps < 1000);
    return std::pair(flat(engine, "a", "master"), flat(engine, "b", "master"));
  };
  const auto whole = run(false), cut = run(true);
  double worst = 0, largest = 0;
  for (auto [w, c] : {std::pair(&whole.first, &cut.first), std::pair(&whole.second, &cut.second)}) {
    CHECK_EQ(w->size(), c->size());
    for (size_t i = 0; i < w->size(); ++i) {
      worst = std::max(worst, std::abs(double((*w)[i]) - double((*c)[i])));
      largest = std::max(largest, std::abs(double((*w)[i])));
    }
  }
  // Rows beside the training rows differ, so products may round differently; Adam's first steps divide by |g| and widen that.
  CHECK(worst <= 1e-4 * largest);
}

TEST(an_exception_in_any_phase_leaves_a_working_engine) {
  std::mt19937 random(5);
  const auto prompt = tokens(random, 11);
  Engine reference(tiny_model(), small_options());
  reference.add_adapter("served", lora(4, 1));
  const int64_t id = reference.submit_infer(prompt, {.adapter = "served", .sampling = greedy(10)});
  const auto expected = drain(reference).requests.at(id).token_ids;

  for (const char* phase : {"planned", "uploaded", "forward", "backward layer", "backward", "optimizer", "downloaded"}) {
    Engine engine(tiny_model(), small_options());
    engine.add_adapter("served", lora(4, 1));
    engine.add_adapter("learner", lora(8, 2));
    const auto before = flat(engine, "learner", "weights");
    const int64_t request = engine.submit_infer(prompt, {.adapter = "served", .sampling = greedy(10)});
    const int64_t lost = engine.submit_train("learner", examples(6, 2, 12));
    auto* inside = &EngineAccess::impl(engine);
    inside->probe = [&](const char* now) {
      if (std::string(now) == phase) throw std::runtime_error("planted");
    };
    CHECK_THROWS(std::runtime_error, "planted", engine.step());
    inside->probe = nullptr;
    CHECK(engine.has_work());
    Outcome outcome = drain(engine);
    CHECK(outcome.requests.at(request).token_ids == expected);
    CHECK(outcome.trained.at(lost).reason == "error: planted");
    CHECK(!outcome.trained.at(lost).applied);
    CHECK(flat(engine, "learner", "weights") == before);
    const int64_t retry = engine.submit_train("learner", examples(6, 2, 12), with_optimizer());
    CHECK(drain(engine).trained.at(retry).applied);

    // The same training where nothing went wrong: no gradient of the lost job is left.
    Engine fresh(tiny_model(), small_options());
    fresh.add_adapter("learner", lora(8, 2));
    fresh.submit_train("learner", examples(6, 2, 12), with_optimizer());
    drain(fresh);
    CHECK(flat(fresh, "learner", "weights") == flat(engine, "learner", "weights"));
  }
}

TEST(an_exception_while_a_backward_is_cut_over_steps) {
  Engine engine(tiny_model(), small_options());
  engine.add_adapter("learner", lora(8, 2));
  auto& inside = EngineAccess::impl(engine);
  inside.budget.max_backward_slices = 1;
  const int64_t lost = engine.submit_train("learner", examples(6, 2, 12), with_optimizer());
  engine.step();
  inside.probe = [](const char* now) {
    if (std::string(now) == "backward layer") throw std::runtime_error("planted");
  };
  CHECK_THROWS(std::runtime_error, "planted", engine.step());
  inside.probe = nullptr;
  Outcome outcome = drain(engine);
  CHECK(outcome.trained.at(lost).reason == "error: planted");
  const int64_t again = engine.submit_train("learner", examples(6, 2, 12), with_optimizer());
  CHECK(drain(engine).trained.at(again).applied);
}

TEST(step_refuses_a_second_caller) {
  Engine engine(tiny_model(), small_options());
  engine.submit_infer({1, 2, 3}, {.sampling = greedy(2)});
  bool refused = false;
  EngineAccess::impl(engine).probe = [&](const char* now) {
    if (std::string(now) != "forward" || refused) return;
    std::thread other([&] {
      try {
        engine.step();
      } catch (const InvalidArgument&) {
        refused = true;
      }
    });
    other.join();
  };
  CHECK_EQ(drain(engine).token_events, 2);
  CHECK(refused);
}

TEST(a_pinned_request_keeps_its_version_while_the_adapter_is_trained) {
  std::mt19937 random(9);
  const auto prompt = tokens(random, 8);
  auto answer = [&](bool train, bool pin) {
    Engine engine(tiny_model(), small_options());
    engine.add_adapter("a", lora(8, 4));
    const int64_t id = engine.submit_infer(prompt, {.adapter = "a", .sampling = greedy(24), .pin_version = pin});
    std::set<int64_t> versions;
    Outcome outcome;
    for (int i = 0; engine.has_work(); ++i) {
      if (train && i < 10) engine.submit_train("a", examples(30, 4, 12), with_optimizer(5e-2));
      StepResult step = engine.step();
      for (const TokenEvent& t : step.tokens) versions.insert(t.version);
      outcome.take(std::move(step));
    }
    return std::pair(outcome.requests.at(id).token_ids, versions.size());
  };
  const auto still = answer(false, false), pinned = answer(true, true), following = answer(true, false);
  CHECK(pinned.first == still.first);
  CHECK_EQ(pinned.second, 1u);
  CHECK(following.second > 3u);
  CHECK(following.first != still.first);
}

TEST(non_finite_gradients_skip_the_update) {
  Engine engine(tiny_model(), small_options());
  engine.add_adapter("a", lora(4, 4));
  engine.submit_train("a", examples(1, 2, 8), with_optimizer());
  drain(engine);
  const auto weights = flat(engine, "a", "master"), moments = flat(engine, "a", "exp_avg");
  std::vector<Example> bad = examples(1, 2, 8);
  bad[0].weights = std::vector<float>(bad[0].input_ids.size(), std::numeric_limits<float>::infinity());
  const int64_t id = engine.submit_train("a", bad, with_optimizer());
  const TrainResult result = drain(engine).trained.at(id);
  CHECK(!result.applied);
  CHECK(result.reason.starts_with("non-finite"));
  CHECK_EQ(result.version, 1);
  CHECK(flat(engine, "a", "master") == weights);
  CHECK(flat(engine, "a", "exp_avg") == moments);
  for (float g : flat(engine, "a", "gradients")) CHECK_EQ(g, 0.0f);
  const int64_t good = engine.submit_train("a", examples(1, 2, 8), with_optimizer());
  CHECK(drain(engine).trained.at(good).applied);
}

TEST(threads_submit_cancel_and_change_adapters_while_one_steps) {
  Engine engine(tiny_model(), small_options());
  engine.add_adapter("shared", lora(4, 1));
  constexpr int kThreads = 3, kRounds = 40;
  std::atomic<int> running{kThreads};
  std::atomic<int64_t> submitted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<uint32_t>(t));
      const std::string own = "own-" + std::to_string(t);
      for (int i = 0; i < kRounds; ++i) {
        if (i % 10 == 0) engine.add_adapter(own, lora(2 + t, random()));
        const int64_t id =
            engine.submit_infer(tokens(random, 3 + i % 9), {.adapter = i % 2 ? own : "shared", .sampling = greedy(1 + i % 6)});
        engine.submit_train(own, examples(random(), 1, 6), i % 2 ? with_optimizer() : TrainOptions{});
        engine.submit_eval("shared", examples(random(), 1, 5));
        submitted += 3;
        if (i % 4 == 0) engine.cancel(id);
        (void)engine.stats();
        (void)engine.has_work();
        if (i % 10 == 9) engine.remove_adapter(own);
      }
      --running;
    });
  }
  Outcome outcome;
  while (running > 0 || engine.has_work()) outcome.take(engine.step());
  for (std::thread& thread : threads) thread.join();
  while (engine.has_work()) outcome.take(engine.step());
  CHECK_EQ(static_cast<int64_t>(outcome.requests.size() + outcome.trained.size() + outcome.evaluated.size()), submitted.load());
  CHECK_EQ(engine.adapters().size(), 1u);
}

namespace {

void random_work(int slice_rows) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "17").c_str(), nullptr, 10));
  const int steps = std::atoi(test::option("--steps", "600").c_str());
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  EngineOptions options = small_options();
  options.kv_cache_tokens = 160;
  options.adapter_pool_bytes = 90000;  // a few adapters at a time
  options.slice_rows = slice_rows;
  Engine engine(tiny_model(), options);
  auto& inside = EngineAccess::impl(engine);
  int64_t left = 0;
  inside.probe = [&](const char* phase) {  // requests come in the middle of steps
    left += std::string(phase) == "training left";
    if (slice_rows > 0 && random() % 16 == 0) inside.arrivals = 1;
  };
  std::vector<std::string> names;
  std::set<int64_t> open;
  Outcome outcome;
  int64_t submitted = 0;
  auto pick = [&](size_t n) { return n == 0 ? 0 : random() % n; };
  for (int i = 0; i < steps; ++i) {
    if (names.size() < 8 && random() % 4 == 0) {
      names.push_back("adapter-" + std::to_string(i));
      LoraConfig config =
          lora(1 + static_cast<int>(random() % 9), random(),
               random() % 3 ? std::vector<std::string>{"all-linear"} : std::vector<std::string>{"v_proj", "lm_head"});
      config.lora_dropout = random() % 2 ? 0.1 : 0;
      engine.add_adapter(names.back(), config);
    }
    if (names.size() > 2 && random() % 25 == 0) {
      const size_t n = pick(names.size());
      engine.remove_adapter(names[n]);
      names.erase(names.begin() + static_cast<long>(n));
    }
    const bool rarely = i / 50 % 2 == 1;  // five requests in every fifth step or so
    for (int k = static_cast<int>(rarely ? 5 * (random() % 5 == 0) : random() % 3); k > 0; --k) {
      InferOptions o{.adapter = names.empty() || random() % 4 == 0 ? "" : names[pick(names.size())],
                     .sampling = greedy(1 + random() % 30)};
      o.sampling.temperature = random() % 2;
      o.sampling.logprobs = random() % 3;
      o.sampling.prompt_logprobs = random() % 5 == 0;
      o.sampling.repetition_penalty = random() % 4 == 0 ? 1.2 : 1.0;
      o.priority = static_cast<int>(random() % 3);
      o.pin_version = random() % 3 == 0;
      open.insert(engine.submit_infer(tokens(random, 1 + static_cast<int>(random() % 40)), o));
      ++submitted;
    }
    if (!names.empty() && random() % 3 == 0) {
      const std::string& name = names[pick(names.size())];
      const auto batch = examples(random(), 1 + static_cast<int>(random() % 4), 2 + static_cast<int>(random() % 30));
      open.insert(random() % 4 == 0 ? engine.submit_eval(name, batch)
                                    : engine.submit_train(name, batch, random() % 3 ? with_optimizer(1e-3) : TrainOptions{}));
      ++submitted;
    }
    if (!open.empty() && random() % 10 == 0) {
      auto it = open.begin();
      std::advance(it, static_cast<long>(pick(open.size())));
      engine.cancel(*it);
    }
    inside.budget.max_backward_slices = random() % 2 ? -1 : static_cast<int32_t>(random() % 3);
    StepResult result = engine.step();
    for (const auto& r : result.finished) open.erase(r.request_id);
    for (const auto& r : result.trained) open.erase(r.job_id);
    for (const auto& r : result.evaluated) open.erase(r.job_id);
    outcome.take(std::move(result));
    inside.core->planner.check_invariants();
  }
  inside.budget.max_backward_slices = -1;
  for (int i = 0; engine.has_work() && i < 100000; ++i) outcome.take(engine.step());
  CHECK(!engine.has_work());
  CHECK_EQ(static_cast<int64_t>(outcome.requests.size() + outcome.trained.size() + outcome.evaluated.size()), submitted);
  const EngineStats stats = engine.stats();
  CHECK_EQ(stats.kv_pages_free + stats.kv_pages_cached, stats.kv_pages);
  CHECK_EQ(stats.waiting_requests + stats.running_requests + stats.queued_examples, 0);
  CHECK(stats.preemptions > 0);
  CHECK(stats.adapter_evictions > 0);
  for (const std::string& name : names) engine.remove_adapter(name);
  engine.step();
  CHECK_EQ(engine.stats().adapter_pool_used, 0);
  CHECK_EQ(engine.stats().training_state_bytes, 0);
  std::cout << left << " chunks left their pass\n";
  CHECK(slice_rows == 0 || left > 0);
}

}  // namespace

TEST(random_work_ends_every_id_once_and_gives_everything_back) { random_work(0); }

TEST(random_work_in_pieces_ends_every_id_once_and_gives_everything_back) { random_work(9); }
