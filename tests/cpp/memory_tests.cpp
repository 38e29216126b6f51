// Memory of a device: the plan, what an engine takes at start, and that steps take no more. The device is a fake one that computes
// (hosted_ops.h), so what happens on a GPU that is too small, or that every copy goes where it should, is seen on any machine.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <sstream>

#include "check.h"
#include "engine/impl.h"
#include "engine/memory_plan.h"
#include "hosted_engine.h"
#include "io/hf_config.h"
#include "loquetier/engine.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

const char* kLlama8b = R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
  "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
  "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
  "tie_word_embeddings": false, "eos_token_id": 128001, "torch_dtype": "bfloat16"})";

int64_t sum_of_shares(const MemoryPlan& p) {
  return p.weight_bytes + p.kv_bytes + p.adapter_pool_bytes + p.saved_bytes + p.scratch_bytes + p.metadata_bytes +
         p.workspace_bytes + p.training_state_bytes;
}

constexpr int64_t kGib = int64_t{1} << 30;

}  // namespace

TEST(the_shares_of_an_8b_model_add_up_and_leave_room) {
  EngineOptions options;
  options.device = "cuda";
  const MemoryPlan plan = Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 139 * kGib});
  std::cout << plan.table();
  CHECK(plan.at_start);
  CHECK_EQ(sum_of_shares(plan), plan.budget_bytes);
  CHECK_EQ(plan.budget_bytes, static_cast<int64_t>(0.9 * 139 * kGib));
  CHECK_EQ(plan.weight_bytes, int64_t{8030261248} * 2 + 64 * 4);
  // One rank-16 adapter on the seven linears of every layer: 41,943,040 parameters.
  CHECK(plan.adapter_bytes >= 41943040 * 2 && plan.adapter_bytes < 41943040 * 2 + (1 << 20));
  CHECK(plan.adapter_training_bytes >= 41943040 * 16 && plan.adapter_training_bytes < 41943040 * 16 + (1 << 20));
  CHECK(plan.adapters >= 100);
  CHECK(plan.trained_adapters >= 8);
  CHECK(plan.kv_tokens >= 256 * 1024);
  CHECK_EQ(plan.max_train_tokens, 8192);
  CHECK(plan.saved_bytes < 27 * kGib);

  // In pieces: 1024 rows beside a chunk, and what backward keeps from slice to slice.
  options.latency = LatencyTarget{};
  const MemoryPlan pieces = Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 139 * kGib});
  CHECK_EQ(sum_of_shares(pieces), pieces.budget_bytes);
  CHECK(pieces.saved_bytes > plan.saved_bytes / 8192 * (8192 + 1024));
  CHECK(pieces.saved_bytes < plan.saved_bytes / 100 * 115);
  CHECK(pieces.metadata_bytes > plan.metadata_bytes);
  options.latency.reset();

  options.recompute = "layer";
  CHECK(Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 139 * kGib}).saved_bytes < 4 * kGib);
  options.recompute = "none";
  options.max_train_tokens = 0;
  const MemoryPlan serving = Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 139 * kGib});
  CHECK_EQ(serving.saved_bytes, 0);
  CHECK(serving.kv_tokens > plan.kv_tokens);
  CHECK_EQ(sum_of_shares(serving), serving.budget_bytes);
}

TEST(what_does_not_fit_is_listed) {
  EngineOptions options;
  options.device = "cuda";
  CHECK_THROWS(OutOfMemory, "max_train_tokens", Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 40 * kGib}));
  options.max_train_tokens = 1024;
  CHECK(Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 40 * kGib}).kv_tokens > 0);
  options.kv_cache_tokens = 1000000;
  CHECK_THROWS(OutOfMemory, "1000000 tokens", Engine::plan_memory_of_config(kLlama8b, options, {.device_bytes = 40 * kGib}));
  CHECK_THROWS(InvalidArgument, "rank", Engine::plan_memory_of_config(kLlama8b, {}, {.device_bytes = kGib, .rank = 0}));
  CHECK_THROWS(InvalidArgument, "device_bytes", Engine::plan_memory_of_config(kLlama8b, {}, {.device_bytes = 0}));
  CHECK_THROWS(InvalidArgument, "max_train_tokens",
               Engine::plan_memory_of_config(kLlama8b, {.max_batch_tokens = 64, .max_train_tokens = 65}, {}));
  CHECK_THROWS(OutOfMemory, "saved", Hosted(small_options(), size_t{1} << 20));
}

// The start measures passes on a device of its own, up to the rows of a step; on the host there are no tiles to find.
TEST(passes_are_measured_at_start) {
  const auto passes_of = [](const Engine& engine) {
    std::istringstream text(engine.stats().cost_model);
    std::vector<std::string> words{std::istream_iterator<std::string>(text), {}};
    std::vector<double> seconds;
    for (size_t i = words.size() - StepWork::kPassSizes; i < words.size(); ++i) seconds.push_back(std::stod(words[i]));
    return seconds;
  };
  EngineOptions options = small_options();
  options.max_batch_tokens = 200;
  const Hosted hosted(options);
  const std::vector<double> passes = passes_of(*hosted.engine);
  CHECK(passes.front() > 0);
  CHECK(std::ranges::is_sorted(passes));
  for (const double seconds : passes_of(Engine(BaseModel::random(kTinyConfig, 7), {.device = "cpu"}))) CHECK_EQ(seconds, 0);
}

namespace {

void plan_at_start_and_no_more(const EngineOptions& options) {
  const uint32_t seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "3").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  Hosted hosted(options);
  const MemoryPlan& plan = EngineAccess::impl(*hosted.engine).memory;
  const EngineStats at_start = hosted->stats();
  CHECK_EQ(at_start.weight_bytes, plan.weight_bytes);
  CHECK_EQ(at_start.kv_bytes, plan.kv_bytes);
  CHECK_EQ(at_start.adapter_pool_bytes, plan.adapter_pool_bytes);
  CHECK_EQ(at_start.saved_bytes, plan.saved_bytes);
  CHECK_EQ(at_start.scratch_bytes, plan.scratch_bytes);
  CHECK_EQ(at_start.metadata_bytes, plan.metadata_bytes);
  CHECK_EQ(at_start.training_state_limit, plan.training_state_bytes);
  CHECK_EQ(static_cast<int64_t>(hosted.ops->fake().used()), plan.budget_bytes - plan.training_state_bytes);

  std::mt19937 random(seed);
  hosted->add_adapter("a", lora(4, 1));
  hosted->add_adapter("b", lora(16, 2));
  hosted->add_adapter("c", lora(3, 3, {"q_proj", "lm_head"}));
  const char* names[] = {"", "a", "b", "c"};
  for (const char* name : {"a", "b", "c"}) hosted->submit_train(name, examples(1, 1, 5), with_optimizer());
  drain(*hosted.engine);  // training state and host copies are made at an adapter's first use
  const int64_t allocated = hosted.ops->fake().allocated;
  int64_t most_uploads = 0, most_downloads = 0, left = 0;
  auto& inside = EngineAccess::impl(*hosted.engine);
  inside.probe = [&](const char* phase) {  // requests come in the middle of steps
    left += std::string(phase) == "training left";
    if (random() % (std::string(phase) == "pass layer" ? 2 : 32) == 0) inside.arrivals = 1;
  };
  for (int i = 0; i < 200; ++i) {
    const bool rarely = i / 50 % 2 == 1;  // five requests in every fifth step or so
    for (int k = static_cast<int>(rarely ? 5 * (random() % 5 == 0) : random() % 3); k > 0; --k)
      hosted->submit_infer(tokens(random, 1 + static_cast<int>(random() % 60)), infer(names[random() % 4], 1 + random() % 20));
    if (random() % 2)
      hosted->submit_train(names[1 + random() % 3], examples(random(), 1 + static_cast<int>(random() % 4), 2 + random() % 30),
                           random() % 2 ? with_optimizer() : TrainOptions{});
    EngineAccess::impl(*hosted.engine).budget.max_backward_slices = random() % 2 ? -1 : 1;
    const int64_t uploads = hosted.ops->fake().uploads, downloads = hosted.ops->fake().downloads;
    hosted->step();
    most_uploads = std::max(most_uploads, hosted.ops->fake().uploads - uploads);
    most_downloads = std::max(most_downloads, hosted.ops->fake().downloads - downloads);
  }
  const bool pieces = inside.slice_rows > 0;
  CHECK(options.slice_rows == 0 || left > 0);  // under a target the machine's speed decides whether training is beside requests
  CHECK(most_uploads <= (pieces ? 3 : 2));     // of the step, of a micro-batch whose backward begins, of a batch apart
  CHECK(most_downloads <= (pieces ? 2 : 1));
  inside.probe = nullptr;
  inside.budget.max_backward_slices = -1;
  drain(*hosted.engine);
  for (uint32_t i = 0; i < 6; ++i) hosted->submit_train(names[1 + i % 3], examples(i, 3, 30), with_optimizer());
  drain(*hosted.engine);  // training alone: chunks layer by layer, when in pieces
  CHECK_EQ(hosted.ops->fake().allocated, allocated);
  const EngineStats stats = hosted->stats();
  CHECK_EQ(stats.metadata_bytes, plan.metadata_bytes);
  CHECK(stats.train_tokens > 500);
  CHECK(stats.optimizer_steps > 20);
  CHECK(!pieces || stats.slices > stats.steps);
}

}  // namespace

TEST(an_engine_takes_its_plan_at_start_and_steps_take_nothing) { plan_at_start_and_no_more(small_options()); }

TEST(nor_do_steps_that_train_in_pieces) {
  for (const std::string recompute : {"none", "layer"}) {
    for (const int slice_rows : {1, 8, 64}) {
      EngineOptions options = small_options();
      options.recompute = recompute;
      options.slice_rows = slice_rows;
      options.max_sequences = 4;
      options.max_batch_tokens = 160;  // a chunk has 68 rows beside it
      options.max_train_tokens = slice_rows == 8 ? 40 : 160;
      plan_at_start_and_no_more(options);
    }
    EngineOptions options = small_options();
    options.recompute = recompute;
    options.latency = LatencyTarget{.ttft_ms = 50, .tpot_ms = 5};
    plan_at_start_and_no_more(options);
  }
}

TEST(a_device_gives_the_tokens_and_losses_of_the_host) {
  auto run = [](Engine& engine) {
    std::mt19937 random(5);
    engine.add_adapter("a", lora(4, 1));
    engine.add_adapter("b", lora(7, 2, {"q_proj", "up_proj", "lm_head"}));
    std::vector<std::vector<int32_t>> answers;
    std::vector<double> losses;
    for (int i = 0; i < 9; ++i) engine.submit_infer(tokens(random, 2 + 5 * i), infer(i % 3 == 0 ? "" : i % 3 == 1 ? "a" : "b", 12));
    for (int i = 0; i < 6; ++i) engine.submit_train(i % 2 ? "a" : "b", examples(40 + i, 3, 12), with_optimizer());
    const Outcome outcome = drain(engine);
    for (const auto& [id, r] : outcome.requests) answers.push_back(r.token_ids);
    for (const auto& [id, r] : outcome.trained) losses.push_back(r.loss);
    return std::pair(answers, losses);
  };
  Hosted hosted(small_options());
  EngineOptions options = small_options();
  options.device = "cpu";
  Engine host(BaseModel::random(kTinyConfig, 7), options);
  const auto got = run(*hosted.engine), want = run(host);
  CHECK_EQ(got.first.size(), 9u);
  CHECK_EQ(got.second.size(), 6u);
  CHECK(got.first == want.first);
  for (size_t i = 0; i < got.second.size(); ++i) CHECK_NEAR(got.second[i], want.second[i], 1e-4);
}

TEST(a_device_takes_head_rows_in_larger_chunks_to_the_same_gradients) {
  auto run = [](Engine& engine) {
    engine.add_adapter("a", lora(4, 1, {"q_proj", "lm_head"}));
    const int64_t job = engine.submit_train("a", examples(9, 20, 80), TrainOptions{});
    const TrainResult result = drain(engine).trained.at(job);
    CHECK(result.num_targets > kHeadChunk && result.num_targets % kHeadSlice != 0);
    std::vector<double> values = {result.loss};
    for (const NamedTensor& t : engine.adapter_state("a", "gradients")) values.insert(values.end(), t.data.begin(), t.data.end());
    return values;
  };
  EngineOptions options = small_options();
  options.max_batch_tokens = 2000;
  CHECK_EQ(head_chunk(options, false), kHeadChunk);
  CHECK_EQ(head_chunk(options, true), kHeadSlice);
  Hosted hosted(options);
  options.device = "cpu";
  Engine host(BaseModel::random(kTinyConfig, 7), options);
  const auto got = run(*hosted.engine), want = run(host);
  CHECK_EQ(got.size(), want.size());
  double largest = 0, difference = 0;
  for (size_t i = 1; i < got.size(); ++i) {
    largest = std::max(largest, std::fabs(want[i]));
    difference = std::max(difference, std::fabs(got[i] - want[i]));
  }
  CHECK_NEAR(got[0], want[0], 1e-5);
  CHECK(largest > 0 && difference < 1e-7 * largest);
  std::printf("largest difference of a gradient %.1e\n", difference / largest);
}

TEST(adapters_come_ahead_of_need_and_answers_stay_the_same) {
  auto run = [](const EngineOptions& options, EngineStats* stats) {
    Hosted hosted(options);
    std::mt19937 random(8);
    for (int i = 0; i < 12; ++i) hosted->add_adapter(std::to_string(i), lora(4 + i % 5, static_cast<uint64_t>(i)));
    for (int i = 0; i < 48; ++i) hosted->submit_infer(tokens(random, 3 + i % 20), infer(std::to_string(random() % 12), 6));
    for (int i = 0; i < 3; ++i) hosted->add_adapter("learner-" + std::to_string(i), lora(4, static_cast<uint64_t>(i)));
    for (int i = 0; i < 9; ++i)
      hosted->submit_train("learner-" + std::to_string(i % 3), examples(static_cast<uint32_t>(i), 2, 12), with_optimizer());
    std::map<int64_t, std::vector<int32_t>> answers;
    for (const auto& [id, r] : drain(*hosted.engine).requests) answers[id] = r.token_ids;
    *stats = hosted->stats();
    CHECK_EQ(hosted.ops->fake().side_copies, stats->adapter_fetches);
    return answers;
  };
  EngineOptions options = small_options();
  options.max_sequences = 3;
  EngineStats wide, narrow;
  options.adapter_pool_bytes = 4 << 20;
  const auto want = run(options, &wide);
  options.adapter_pool_bytes = 320000;  // a few more than a step uses
  const auto got = run(options, &narrow);
  CHECK_EQ(want.size(), 48u);
  CHECK(got == want);
  CHECK_EQ(wide.adapter_evictions, 0);
  CHECK(narrow.adapter_evictions > 10);
  CHECK(narrow.adapter_prefetches > 5);
  std::printf("%lld fetches, %lld of them ahead, %lld evictions\n", static_cast<long long>(narrow.adapter_fetches),
              static_cast<long long>(narrow.adapter_prefetches), static_cast<long long>(narrow.adapter_evictions));
}

TEST(training_state_beyond_its_share_ends_the_job_and_leaves_a_working_engine) {
  EngineOptions options = small_options();
  Hosted probe(options);
  const MemoryPlan& at = EngineAccess::impl(*probe.engine).memory;
  options.memory_fraction = 1;
  // Room for the training state of one rank-16 adapter, not of two.
  const int64_t capacity = at.budget_bytes - at.training_state_bytes + at.adapter_training_bytes * 3 / 2;
  Hosted hosted(options, static_cast<size_t>(capacity));
  hosted->add_adapter("first", lora(16, 1));
  hosted->add_adapter("second", lora(16, 2));
  const int64_t one = hosted->submit_train("first", examples(1, 2, 9), with_optimizer());
  const int64_t two = hosted->submit_train("second", examples(1, 2, 9), with_optimizer());
  Outcome outcome = drain(*hosted.engine);
  CHECK(outcome.trained.at(one).applied);
  CHECK(!outcome.trained.at(two).applied);
  CHECK(outcome.trained.at(two).reason.starts_with("error: [engine] training state of adapter \"second\""));
  CHECK(!hosted->adapter("second").training);
  CHECK(hosted->stats().training_state_bytes > 0);

  // Served all the same; and trained once the other is gone.
  const int64_t request = hosted->submit_infer({1, 2, 3}, infer("second", 4));
  CHECK_EQ(drain(*hosted.engine).requests.at(request).token_ids.size(), 4u);
  const std::string moved = hosted->export_adapter("first");
  hosted->remove_adapter("first");
  const int64_t again = hosted->submit_train("second", examples(1, 2, 9), with_optimizer());
  CHECK(drain(*hosted.engine).trained.at(again).applied);
  CHECK_THROWS(OutOfMemory, "training state of adapter \"back\"", hosted->import_adapter("back", moved));
  CHECK_THROWS(NotFound, "back", hosted->adapter("back"));
}

TEST(without_training_rows_there_is_no_training) {
  EngineOptions options = small_options();
  options.max_train_tokens = 0;
  Hosted hosted(options);
  hosted->add_adapter("a", lora(4, 1));
  CHECK_THROWS(InvalidArgument, "training is off", hosted->submit_train("a", examples(1, 1, 5), with_optimizer()));
  CHECK_EQ(hosted->stats().saved_bytes, 0);
  const int64_t job = hosted->submit_eval("a", examples(1, 3, 20));
  int evaluated = 0;
  while (hosted->has_work()) {
    for (const EvalResult& r : hosted->step().evaluated) evaluated += r.job_id == job;
  }
  CHECK_EQ(evaluated, 1);
}

TEST(steps_with_training_rows_stay_within_max_train_tokens) {
  EngineOptions options = small_options();
  options.max_train_tokens = 20;
  Hosted hosted(options);
  hosted->add_adapter("a", lora(4, 1));
  hosted->add_adapter("b", lora(4, 2));
  CHECK_THROWS(InvalidArgument, "max_train_tokens", hosted->submit_train("a", examples(1, 1, 22), with_optimizer()));
  std::mt19937 random(2);
  for (int i = 0; i < 40; ++i)
    hosted->submit_infer(tokens(random, 1 + static_cast<int>(random() % 60)), infer(i % 2 ? "a" : "", 10));
  std::vector<int64_t> jobs;
  for (int i = 0; i < 10; ++i) jobs.push_back(hosted->submit_train(i % 2 ? "a" : "b", examples(i, 3, 14), with_optimizer()));
  Outcome outcome;
  int training_steps = 0;
  while (hosted->has_work()) {
    const EngineStats before = hosted->stats();
    take(outcome, hosted->step());
    const EngineStats after = hosted->stats();
    const int64_t train = after.train_tokens - before.train_tokens, others = after.prefill_tokens + after.decode_tokens +
                                                                             after.eval_tokens - before.prefill_tokens -
                                                                             before.decode_tokens - before.eval_tokens;
    if (train > 0) CHECK(train + others <= 20);
    training_steps += train > 0;
  }
  CHECK(training_steps >= 15);
  CHECK_EQ(outcome.requests.size(), 40u);
  for (int64_t job : jobs) CHECK(outcome.trained.at(job).applied);
}
