// Steps that are launched while the one before them runs (engine/ahead.cpp): engines that do must answer as those that do not,
// whatever comes, ends or fails in between. The device is the lazy one of fake_device.h: nothing is done before somebody waits for
// it, so tables or results that were written too early, or read too early, show.
#include <cstdlib>
#include <iostream>

#include "check.h"
#include "hosted_engine.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

// A lazy device, and an engine that goes ahead or not.
struct Lazy : Hosted {
  explicit Lazy(const EngineOptions& options, bool ahead = true) : Hosted(options) {
    ops->fake().lazy = true;
    EngineAccess::impl(*engine).goes_ahead = ahead;
  }
  ~Lazy() {
    engine.reset();
    ops->fake().lazy = false;
  }
  auto& impl() { return EngineAccess::impl(*engine); }
  Planner& planner() { return impl().core->planner; }
  int64_t steps_ahead() { return engine->stats().steps_ahead; }
};

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  FinishReason reason = FinishReason::none;
  bool operator==(const Answer&) const = default;
};
using Answers = std::map<int64_t, Answer>;

struct Seen {
  Answers answers;
  int64_t preemptions = 0;  // by the requests' records
  std::map<int64_t, std::vector<int32_t>> streamed;
};

void take(Seen& seen, const StepResult& result) {
  for (const TokenEvent& e : result.tokens) seen.streamed[e.request_id].push_back(e.token_id);
  for (const InferResult& r : result.finished) {
    seen.answers[r.request_id] = {r.token_ids, r.logprobs, r.finish_reason};
    seen.preemptions += r.preemptions;
  }
}

Seen drain_all(Lazy& lazy) {
  Seen seen;
  for (int steps = 0; lazy->has_work(); ++steps) {
    CHECK(steps < 2000);
    take(seen, lazy->step());
    lazy.planner().check_invariants();
  }
  return seen;
}

}  // namespace

TEST(a_stream_of_decodes_is_launched_ahead) {
  Answers answers[2];
  for (const bool ahead : {false, true}) {
    Lazy lazy(small_options(), ahead);
    lazy->add_adapter("a", lora(8, 1));
    std::mt19937 random(1);
    for (int i = 0; i < 5; ++i) lazy->submit_infer(tokens(random, 3 + i), infer(i % 2 ? "a" : "", 20 + i));
    answers[ahead] = drain_all(lazy).answers;
    if (!ahead) CHECK_EQ(lazy.steps_ahead(), 0);
    else CHECK(lazy.steps_ahead() >= 18);
    CHECK_EQ(lazy->stats().generated_tokens, 20 + 21 + 22 + 23 + 24);
  }
  CHECK_EQ(answers[0].size(), 5u);
  CHECK(answers[0] == answers[1]);
}

// Steps of the same decodes write on in the tables of the one before: beside engines that build them anew each time, with equal
// prompts, so that full pages are exchanged for those of the prefix cache, and ends in between.
TEST(steady_decodes_write_on_in_their_tables) {
  Answers answers[2];
  for (const bool ahead : {false, true}) {
    Lazy lazy(small_options(), ahead);
    lazy->add_adapter("a", lora(8, 1));
    lazy->add_adapter("b", lora(4, 2));
    std::mt19937 random(3);
    const std::vector<int32_t> prompt = tokens(random, 6);
    for (int i = 0; i < 8; ++i) {
      InferOptions request = infer(i < 3 ? "a" : i < 6 ? "b" : "", i == 4 ? 12 : 40 + i);
      request.sampling.temperature = i == 7 ? 1 : 0;
      request.sampling.min_tokens = i == 2 ? 5 : 0;
      request.sampling.stop_token_ids = {static_cast<int32_t>(i)};
      lazy->submit_infer(i == 5 ? tokens(random, 9) : prompt, request);
    }
    Seen seen;
    uint64_t filling = 0;
    int written_on = 0;
    while (lazy->has_work()) {
      take(seen, lazy->step());
      lazy.planner().check_invariants();
      const uint64_t now = lazy.impl().core->metadata.filling();
      written_on += now == filling;
      filling = now;
    }
    answers[ahead] = seen.answers;
    if (ahead) CHECK(written_on > 20);
    else CHECK_EQ(written_on, 0);
  }
  CHECK_EQ(answers[0].size(), 8u);
  CHECK(answers[0] == answers[1]);
}

TEST(random_traffic_answers_as_without) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(option("--seed", "1").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  EngineStats stats[2];
  auto run = [&](bool ahead) {
    EngineOptions options = small_options();
    options.max_sequences = 12;
    options.kv_cache_tokens = 160;        // pre-emptions
    options.adapter_pool_bytes = 130000;  // evictions
    Lazy lazy(options, ahead);
    std::mt19937 random(seed);
    std::vector<std::string> names = {""};
    std::vector<int32_t> shared = tokens(random, 24);
    Seen seen;
    for (int i = 0; i < 500; ++i) {
      if (names.size() < 6 && random() % 8 == 0) {
        names.push_back("adapter-" + std::to_string(i));
        lazy->add_adapter(names.back(), lora(1 + static_cast<int>(random() % 16), random()));
      }
      if (random() % 12 == 0) {
        for (uint32_t k = 1 + random() % 6; k > 0; --k) {
          InferOptions request = infer(names[random() % names.size()], 3 + static_cast<int>(random() % 24));
          request.sampling.ignore_eos = random() % 3 == 0;
          request.sampling.temperature = random() % 2 ? 1.0 : 0.0;
          request.sampling.seed = random();
          request.sampling.logprobs = random() % 4 == 0 ? 3 : 0;
          request.sampling.min_tokens = random() % 4 == 0 ? 2 : 0;
          request.sampling.repetition_penalty = random() % 20 == 0 ? 1.2 : 1.0;
          for (uint32_t stop = random() % 6; stop > 0; --stop)
            request.sampling.stop_token_ids.push_back(static_cast<int32_t>(random() % 60));
          std::vector<int32_t> prompt = random() % 2 ? shared : std::vector<int32_t>{};
          for (const int32_t id : tokens(random, 1 + static_cast<int>(random() % 20))) prompt.push_back(id);
          lazy->submit_infer(prompt, request);
        }
      }
      take(seen, lazy->step());
      lazy.planner().check_invariants();
    }
    const Seen rest = drain_all(lazy);
    seen.answers.insert(rest.answers.begin(), rest.answers.end());
    for (const auto& [id, streamed] : rest.streamed) {
      auto& all = seen.streamed[id];
      all.insert(all.end(), streamed.begin(), streamed.end());
    }
    for (const auto& [id, answer] : seen.answers) CHECK(seen.streamed[id] == answer.tokens);
    stats[ahead] = lazy->stats();
    CHECK_EQ(seen.preemptions + rest.preemptions, stats[ahead].preemptions);
    return seen.answers;
  };
  const Answers with = run(true), without = run(false);
  CHECK(with.size() > 60);
  CHECK_EQ(with.size(), without.size());
  int64_t other = 0;
  for (const auto& [id, answer] : with) {
    const Answer& want = without.at(id);
    other += answer.tokens != want.tokens || answer.reason != want.reason;
    CHECK_EQ(answer.logprobs.size(), want.logprobs.size());
    for (size_t i = 0; i < answer.logprobs.size(); ++i) CHECK_NEAR(answer.logprobs[i], want.logprobs[i], 1e-4);
  }
  CHECK_EQ(other, 0);
  const EngineStats& s = stats[true];
  CHECK_EQ(s.kv_pages_free + s.kv_pages_cached, s.kv_pages);
  CHECK_EQ(s.generated_tokens, stats[false].generated_tokens);
  CHECK(s.steps_ahead > 50);
  CHECK(s.cached_prompt_tokens > 0 && s.preemptions > 0 && s.adapter_evictions > 0);
  std::cout << with.size() << " requests, " << s.steps_ahead << " of " << s.steps << " steps ahead, "
            << s.decode_tokens - stats[false].decode_tokens << " more rows of decodes, " << s.cached_prompt_tokens
            << " cached tokens, " << s.preemptions << " pre-emptions\n";
}

TEST(a_request_that_comes_in_time_is_in_the_next_step) {
  Lazy lazy(small_options());
  const int64_t first = lazy->submit_infer({1, 2, 3}, infer("", 40));
  for (int i = 0; i < 6; ++i) lazy->step();
  const int64_t ahead = lazy.steps_ahead();
  CHECK(ahead > 0);
  // One step is under way already; the one after it is not launched before the prompt is planned.
  const int64_t second = lazy->submit_infer({4, 5, 6}, infer("", 4));
  lazy->step();
  CHECK_EQ(lazy.steps_ahead(), ahead);
  const StepResult result = lazy->step();
  CHECK_EQ(result.tokens.size(), 2u);
  CHECK(std::ranges::any_of(result.tokens, [&](const TokenEvent& e) { return e.request_id == second && e.index == 0; }));
  const Seen seen = drain_all(lazy);
  CHECK_EQ(seen.answers.at(first).tokens.size(), 40u);
  CHECK_EQ(seen.answers.at(second).tokens.size(), 4u);
}

TEST(what_ends_while_its_next_row_is_under_way) {
  Lazy lazy(small_options());
  lazy->add_adapter("a", lora(4, 1));
  const int64_t cancelled = lazy->submit_infer({1, 2, 3}, infer("a", 40)), stays = lazy->submit_infer({1, 2, 3}, infer("", 12));
  for (int i = 0; i < 4; ++i) lazy->step();
  CHECK(lazy.impl().core->ahead.has_value());
  CHECK(lazy->cancel(cancelled));
  lazy->remove_adapter("a");
  Seen seen;
  take(seen, lazy->step());
  CHECK(seen.answers.at(cancelled).reason == FinishReason::cancelled);
  CHECK_EQ(seen.answers.at(cancelled).tokens.size(), 4u);
  CHECK(!seen.streamed.contains(cancelled));
  CHECK_EQ(drain_all(lazy).answers.at(stays).tokens.size(), 12u);
}

TEST(nothing_wants_the_step_under_way) {
  Lazy lazy(small_options());
  const int64_t only = lazy->submit_infer({1, 2, 3}, infer("", 40));
  for (int i = 0; i < 4; ++i) lazy->step();
  CHECK(lazy.impl().core->ahead.has_value());
  CHECK(lazy->cancel(only));
  CHECK_EQ(lazy->step().finished.size(), 1u);  // the step under way is dropped, and nothing is left to plan
  CHECK(!lazy.impl().core->ahead.has_value());
  CHECK(!lazy->has_work());
  CHECK_EQ(lazy->stats().kv_pages_free + lazy->stats().kv_pages_cached, lazy->stats().kv_pages);

  const int64_t next = lazy->submit_infer({5, 6}, infer("", 6));
  CHECK_EQ(drain_all(lazy).answers.at(next).tokens.size(), 6u);
}

TEST(adapters_are_worked_on_while_a_step_is_under_way) {
  std::vector<Answers> answers;
  for (const bool ahead : {false, true}) {
    Lazy lazy(small_options(), ahead);
    lazy->add_adapter("a", lora(4, 1));
    lazy->submit_infer({1, 2, 3}, infer("a", 30));
    for (int i = 0; i < 5; ++i) lazy->step();
    CHECK_EQ(lazy.impl().core->ahead.has_value(), ahead);
    lazy->clone_adapter("a", "b");
    const auto before = lazy->adapter_state("a", "weights"), copy = lazy->adapter_state("b", "weights");
    CHECK_EQ(before.size(), copy.size());
    for (size_t i = 0; i < before.size(); ++i) CHECK(before[i].data == copy[i].data);
    lazy->import_adapter("c", lazy->export_adapter("b"));
    for (const char* name : {"b", "c"}) lazy->submit_infer({1, 2, 3}, infer(name, 30));
    // Training updates the adapter that serves: no step is ahead of it.
    lazy->submit_train("a", examples(1, 2, 9), with_optimizer());
    answers.push_back(drain_all(lazy).answers);
    CHECK_EQ(lazy->adapter("a").version, 1);
  }
  CHECK_EQ(answers[0].size(), 3u);
  CHECK(answers[0].at(2).tokens == answers[0].at(3).tokens);
  CHECK(answers[1].at(2).tokens == answers[0].at(2).tokens && answers[1].at(3).tokens == answers[0].at(3).tokens);
}

TEST(what_fails_ahead_is_met_again) {
  Answers answers[2];
  for (const bool fails : {false, true}) {
    Lazy lazy(small_options());
    for (int i = 0; i < 3; ++i) lazy->submit_infer({1, 2, 3 + i}, infer("", 16));
    int failures = 0;
    if (fails) {
      lazy.impl().probe = [&](const char* phase) {
        if (std::string_view(phase) == "planned ahead" && failures < 9 && ++failures % 3 != 0) throw std::runtime_error("a test");
      };
    }
    answers[fails] = drain_all(lazy).answers;
    CHECK_EQ(failures, fails ? 9 : 0);
    CHECK(lazy.steps_ahead() > 0);
  }
  CHECK(answers[0] == answers[1]);
}

TEST(requests_with_penalties_are_not_ahead) {
  Lazy lazy(small_options());
  InferOptions options = infer("", 12);
  options.sampling.presence_penalty = 0.5;
  lazy->submit_infer({1, 2, 3}, options);
  lazy->submit_infer({1, 2, 3}, infer("", 24));
  int steps = 0;
  while (lazy->has_work()) {
    lazy->step();
    if (++steps <= 11) CHECK_EQ(lazy.steps_ahead(), 0);
  }
  CHECK(lazy.steps_ahead() > 5);  // when it has ended
}

TEST(closing_while_a_step_is_under_way) {
  Lazy lazy(small_options());
  lazy->submit_infer({1, 2, 3}, infer("", 40));
  for (int i = 0; i < 4; ++i) lazy->step();
  CHECK(lazy.impl().core->ahead.has_value());
  lazy->close();
  CHECK(!lazy->has_work());
  CHECK_THROWS(InvalidArgument, "closed", lazy->step());
}
