// Steps of decodes alone: laid out by buckets, recorded, replayed. Engines that replay must answer as those that do not, whatever
// comes and goes between the replays. The backend is the recording one of hosted_ops.h, which also checks that every launch is
// large enough for the batch it meets.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <set>

#include "check.h"
#include "engine/decode_graph.h"
#include "hosted_engine.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

using Answers = std::map<int64_t, std::vector<int32_t>>;

void take_answers(Answers& answers, StepResult result) {
  for (const InferResult& r : result.finished) answers[r.request_id] = r.token_ids;
}

DecodeGraphs& graphs_of(Hosted& hosted) { return EngineAccess::impl(*hosted.engine).core->graphs; }

}  // namespace

TEST(buckets) {
  std::vector<int32_t> buckets;
  for (int32_t n = 1; n <= 300; ++n) {
    const int32_t bucket = decode_bucket(n);
    CHECK(bucket >= n);
    if (buckets.empty() || buckets.back() != bucket) buckets.push_back(bucket);
  }
  CHECK(buckets == (std::vector<int32_t>{1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384}));
}

TEST(a_shape_covers_every_batch_that_has_it) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(option("--seed", "5").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  std::set<DecodeShape> shapes;
  for (int i = 0; i < 20000; ++i) {
    DecodeCounts counts;
    counts.pages = 1 + static_cast<int32_t>(random() % 70);
    std::vector<int32_t> groups;
    for (uint32_t g = random() % 12; g > 0; --g) groups.push_back(1 + static_cast<int32_t>(random() % (random() % 3 ? 9 : 90)));
    while (!groups.empty() && std::accumulate(groups.begin(), groups.end(), 0) > kMostDecodeRows) groups.pop_back();
    counts.groups = static_cast<int32_t>(groups.size());
    for (int32_t rows : groups) {
      counts.rows += rows;
      counts.largest = std::max(counts.largest, rows);
    }
    counts.rows = std::min(kMostDecodeRows, counts.rows + static_cast<int32_t>(random() % 5) + groups.empty());
    counts.rank = groups.empty() ? 0 : 1 + static_cast<int32_t>(random() % 64);
    counts.vectors = counts.rank % 8 == 0;
    counts.parts = 0x249;  // q, o, gate, down
    const DecodeShape shape = decode_shape(counts, 64);
    shapes.insert(shape);
    CHECK(shape.rows >= counts.rows && shape.pages >= counts.pages && shape.rank >= counts.rank && shape.groups <= shape.rows);
    CHECK(shape.groups >= counts.groups && (counts.groups == 0 || (shape.rank % 8 == 0) == counts.vectors));
    CHECK(shape.columns >= counts.rank);
    for (int32_t t : {8, 16, 24, 32, 64, 128}) {
      int32_t tiles = 0;
      for (int32_t rows : groups) tiles += (rows + t - 1) / t;
      CHECK(tiles <= shape.groups);  // the host's table has at least one tile for each of its groups
    }
  }
  CHECK(shapes.size() < 4000);
}

TEST(replays_answer_as_launches_do_while_adapters_come_and_go) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(option("--seed", "5").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  EngineStats replayed;
  auto run = [&](bool use_graphs, bool replay) {
    EngineOptions options = small_options();
    options.cuda_graphs = use_graphs;
    options.max_sequences = 12;
    options.adapter_pool_bytes = 130000;  // some evictions, so blocks move between replays
    Hosted hosted(options);
    graphs_of(hosted).replay = replay;
    graphs_of(hosted).most = 12;
    std::mt19937 random(seed);
    std::vector<std::string> names = {""};
    Answers answers;
    for (int i = 0; i < 400; ++i) {
      if (names.size() < 7 && random() % 8 == 0) {
        names.push_back("adapter-" + std::to_string(i));
        const std::vector<std::string> targets[] = {{"all-linear"}, {"q_proj", "v_proj"}, {"lm_head"}, {"down_proj", "lm_head"}};
        const int ranks[] = {1, 3, 8, 16};
        hosted->add_adapter(names.back(), lora(ranks[random() % 4], random(), targets[random() % 4]));
      }
      if (names.size() > 3 && random() % 30 == 0) {
        const auto gone = names.begin() + 1 + static_cast<long>(random() % (names.size() - 1));
        hosted->remove_adapter(*gone);
        names.erase(gone);
      }
      // Waves, so that steps of decodes alone come in every size.
      if (random() % 6 == 0) {
        for (uint32_t k = 1 + random() % 9; k > 0; --k) {
          InferOptions request = infer(names[random() % names.size()], 4 + static_cast<int>(random() % 14));
          request.sampling.logprobs = random() % 4 == 0 ? 3 : 0;
          request.sampling.repetition_penalty = random() % 5 == 0 ? 1.2 : 1.0;
          hosted->submit_infer(tokens(random, 1 + static_cast<int>(random() % 30)), request);
        }
      }
      take_answers(answers, hosted->step());
    }
    while (hosted->has_work()) take_answers(answers, hosted->step());
    if (replay && use_graphs) replayed = hosted->stats();
    CHECK(hosted->stats().graphs <= 12);
    return answers;
  };
  const Answers eager = run(false, false), padded = run(true, false), replays = run(true, true);
  CHECK(eager.size() > 100);
  CHECK(padded == replays);
  CHECK(eager == replays);
  CHECK(replayed.graph_replays > 100);
  CHECK(replayed.graph_captures >= 10);
  CHECK(replayed.adapter_evictions > 0);
  std::cout << replayed.graph_replays << " replays of " << replayed.graph_captures << " recordings in " << replayed.steps
            << " steps\n";
}

TEST(every_number_of_sequences_around_a_bucket) {
  for (int n : {1, 2, 3, 4, 5, 8, 9}) {
    std::vector<std::vector<int32_t>> answers[2];
    for (bool use_graphs : {false, true}) {
      EngineOptions options = small_options();
      options.cuda_graphs = use_graphs;
      options.max_sequences = 9;
      Hosted hosted(options);
      hosted->add_adapter("a", lora(8, 1));
      hosted->add_adapter("b", lora(5, 2, {"k_proj", "gate_proj"}));
      std::mt19937 random(static_cast<uint32_t>(n));
      const char* names[] = {"a", "", "b"};
      for (int i = 0; i < n; ++i) hosted->submit_infer(tokens(random, 3), infer(names[i % 3], 12));
      for (const auto& [id, r] : drain(*hosted.engine).requests) answers[use_graphs].push_back(r.token_ids);
      CHECK_EQ(hosted->stats().graph_replays > 0, use_graphs);
      if (!use_graphs) continue;
      // A replayed step launches its heads only: a gather, the vocabulary product and the sampling.
      for (int i = 0; i < n; ++i) hosted->submit_infer(tokens(random, 3), infer("", 12));
      int64_t fewest = 1000;
      while (hosted->has_work()) {
        const int64_t calls = hosted.ops->calls, ahead = hosted->stats().steps_ahead;
        hosted->step();
        if (hosted->stats().steps_ahead > ahead) fewest = std::min(fewest, hosted.ops->calls - calls);
      }
      CHECK_EQ(fewest, 3);
    }
    CHECK(answers[0] == answers[1]);
  }
}

TEST(heads_of_steady_decodes_are_replayed_too) {
  std::vector<std::vector<int32_t>> answers[2];
  for (bool replay : {false, true}) {
    EngineOptions options = small_options();
    Hosted hosted(options);
    hosted->add_adapter("a", lora(8, 1));
    graphs_of(hosted).replay = replay;
    std::mt19937 random(2);
    for (int i = 0; i < 5; ++i) {
      InferOptions request = infer(i % 2 ? "a" : "", 40 + 5 * i);
      request.sampling.temperature = i % 3;
      request.sampling.top_k = 7;
      request.sampling.seed = 3;
      hosted->submit_infer(tokens(random, 3 + i), request);
    }
    Outcome outcome;
    int64_t fewest = 1000;
    while (hosted->has_work()) {
      const int64_t calls = hosted.ops->calls, ahead = hosted->stats().steps_ahead;
      take(outcome, hosted->step());
      if (hosted->stats().steps_ahead > ahead) fewest = std::min(fewest, hosted.ops->calls - calls);
    }
    for (const auto& [id, r] : outcome.requests) answers[replay].push_back(r.token_ids);
    if (!replay) continue;
    CHECK_EQ(fewest, 0);
    // An adapter of the head, log-probabilities of others or words: launched, for what is launched depends on them.
    hosted->add_adapter("head", lora(4, 2, {"lm_head"}));
    for (int kind = 0; kind < 3; ++kind) {
      InferOptions request = infer(kind == 0 ? "head" : "", 40);
      if (kind == 1) request.sampling.logprobs = 2;
      if (kind == 2) request.sampling.logit_bias = {{5, 1.0}};
      hosted->submit_infer({1, 2, 3}, request);
      fewest = 1000;
      while (hosted->has_work()) {
        const int64_t calls = hosted.ops->calls, ahead = hosted->stats().steps_ahead;
        hosted->step();
        if (hosted->stats().steps_ahead > ahead) fewest = std::min(fewest, hosted.ops->calls - calls);
      }
      CHECK(fewest >= 3);
    }
  }
  CHECK_EQ(answers[0].size(), 5u);
  CHECK(answers[0] == answers[1]);
}

TEST(replays_beside_a_backward_in_slices) {
  std::vector<std::vector<int32_t>> answers[2];
  std::vector<double> losses[2];
  for (bool use_graphs : {false, true}) {
    EngineOptions options = small_options();
    options.cuda_graphs = use_graphs;
    Hosted hosted(options);
    hosted->add_adapter("served", lora(8, 1));
    hosted->add_adapter("learner", lora(4, 2));
    EngineAccess::impl(*hosted.engine).budget.max_backward_slices = 1;  // so most steps have decodes and a slice
    std::mt19937 random(4);
    for (int i = 0; i < 5; ++i) hosted->submit_infer(tokens(random, 4), infer(i % 2 ? "served" : "", 30));
    for (int i = 0; i < 6; ++i) hosted->submit_train("learner", examples(static_cast<uint32_t>(i), 2, 9), with_optimizer());
    const Outcome outcome = drain(*hosted.engine);
    for (const auto& [id, r] : outcome.requests) answers[use_graphs].push_back(r.token_ids);
    for (const auto& [id, r] : outcome.trained) losses[use_graphs].push_back(r.loss);
    if (use_graphs) CHECK(hosted->stats().graph_replays > 10);
  }
  CHECK_EQ(answers[0].size(), 5u);
  CHECK(answers[0] == answers[1]);
  for (size_t i = 0; i < losses[0].size(); ++i) CHECK_NEAR(losses[0][i], losses[1][i], 1e-4);
}

TEST(a_backend_that_records_nothing_is_left_alone) {
  Hosted hosted(small_options());
  hosted.ops->records = false;
  hosted->submit_infer({1, 2, 3}, infer("", 12));
  CHECK_EQ(drain(*hosted.engine).requests.begin()->second.token_ids.size(), 12u);
  CHECK_EQ(hosted->stats().graph_captures, 0);
  CHECK(!graphs_of(hosted).enabled());
}

// The host's part of a step of 256 decodes over 8 adapters: planning, tables, results. On the CPU, where computing is not in it.
TEST(host_time_of_a_step_at_256_sequences) {
  EngineOptions options = small_options();
  options.device = "cpu";
  options.max_sequences = 256;
  options.max_batch_tokens = 2048;
  options.kv_cache_tokens = 256 * 128;
  options.page_size = 16;
  options.adapter_pool_bytes = 8 << 20;
  Engine engine(BaseModel::random(kTinyConfig, 7), options);
  for (int i = 0; i < 8; ++i) engine.add_adapter(std::to_string(i), lora(8, static_cast<uint64_t>(i)));
  std::mt19937 random(1);
  for (int i = 0; i < 256; ++i) engine.submit_infer(tokens(random, 6), infer(std::to_string(i % 8), 60));
  for (int i = 0; i < 5; ++i) engine.step();
  const EngineStats before = engine.stats();
  for (int i = 0; i < 40; ++i) engine.step();
  const EngineStats after = engine.stats();
  CHECK_EQ(after.decode_tokens - before.decode_tokens, 40 * 256);
  CHECK(after.host_seconds < after.step_seconds);
  std::cout << (after.host_seconds - before.host_seconds) / 40 * 1e6 << " us of the host a step, "
            << (after.step_seconds - before.step_seconds) / 40 * 1e6 << " in all\n";
}
