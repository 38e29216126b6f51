// The planner with time: training in pieces, steps filled to a goal by the cost model, deadlines, shares by weight. A step is
// played by predicting what was planned; nothing is computed.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <iostream>
#include <map>
#include <random>
#include <set>

#include "check.h"
#include "loquetier/error.h"
#include "plan/planner.h"

using namespace loquetier;

namespace {

CostModel gpu_8b() { return CostModel({6.98e9, 128256.0 * 4096, 4096, 32, 4096, 2048, 2}, {4.2e12, 7e14, 3e-6, 1e-4}); }

uint32_t seed_option() {
  const auto seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "3").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  return seed;
}

PlannerConfig config_with(const CostModel& cost, double ttft, double tpot) {
  PlannerConfig c;
  c.max_batch_tokens = 8192;
  c.max_sequences = 256;
  c.kv_pages = 20000;
  c.adapter_pool_bytes = int64_t{1} << 34;
  c.num_layers = 32;
  c.slice_rows = 1024;
  c.goal = LatencyGoal{ttft, tpot};
  c.cost = &cost;
  return c;
}

// Plays steps on a clock of its own: a step takes what the model says of what was planned.
class Player {
 public:
  Player(Planner& planner, const CostModel& cost) : planner_(planner), cost_(cost) {}
  double now = 0;
  std::map<int64_t, int64_t> left;                       // tokens of each request
  std::map<int64_t, double> arrived, first, last, made;  // of each request
  std::map<int64_t, int64_t> trained_rows;               // by adapter
  std::vector<int64_t> completed;
  int64_t over = 0, steps = 0;

  void request(int64_t id, int64_t adapter, int64_t prompt, int64_t tokens, int priority = 0) {
    RequestSpec r;
    r.id = id;
    r.adapter = adapter;
    r.priority = priority;
    r.prompt.assign(static_cast<size_t>(prompt), 1);
    r.max_tokens = left[id] = tokens;
    r.arrived = arrived[id] = now;
    r.use_prefix_cache = false;
    planner_.add_request(r);
  }
  void job(int64_t id, int64_t adapter, std::vector<int32_t> rows, double weight = 1) {
    JobSpec j;
    j.id = id;
    j.adapter = adapter;
    j.barrier = true;
    j.rows = std::move(rows);
    j.weight = weight;
    planner_.add_job(j);
  }

  Plan step(const StepOutcome& outcome = {}) {
    const Plan plan = planner_.plan({.now = now});
    // Within the model's own prediction, unless decodes alone, or the smallest piece of what was passed over too long, take more.
    if (plan.rows[3] > 0 && plan.seconds >= 0 && plan.predicted > plan.seconds * 1.001) ++over;
    StepOutcome end = outcome;
    const double took = cost_.predict(planner_.work_of(plan, outcome));
    end.now = now += took;
    for (const Segment& s : plan.segments) {
      if (s.kind == Kind::train) trained_rows[s.adapter] += s.rows;
    }
    for (const int64_t id : planner_.commit(plan, end)) completed.push_back(id);
    for (const Segment& s : plan.segments) {
      if (!s.samples) continue;
      if (!first.contains(s.id)) first[s.id] = now;
      last[s.id] = now;
      made[s.id] += 1;
      if (--left[s.id] == 0) planner_.finish(s.id);
      else planner_.append_token(s.id, 7);
    }
    ++steps;
    return plan;
  }
  double tpot(int64_t id) const { return (last.at(id) - first.at(id)) / std::max(1.0, made.at(id) - 1); }

 private:
  Planner& planner_;
  const CostModel& cost_;
};

}  // namespace

TEST(decodes_keep_their_time_and_training_gets_the_rest) {
  const CostModel cost = gpu_8b();
  Planner planner(config_with(cost, 1, 0.03));
  planner.add_adapter(1, 80 << 20, 0);
  Player p(planner, cost);
  for (int64_t i = 0; i < 64; ++i) p.request(100 + i, -1, 512, 300);
  for (int64_t j = 0; j < 4; ++j) p.job(j, 1, {2048, 2048, 2048, 2048});
  int64_t jobs = 4;
  double training = 0;
  const auto decoding = [&] { return std::ranges::any_of(p.left, [](const auto& r) { return r.second > 0; }); };
  double began = -1;
  int64_t rows_before = 0;
  while (decoding() && p.steps < 5000) {
    const Plan plan = p.step();
    if (p.first.size() == 64 && began < 0) {
      began = p.now;
      rows_before = p.trained_rows[1];
    }
    if (planner.stats().queued_examples < 4) p.job(jobs++, 1, {2048, 2048, 2048, 2048});
    planner.check_invariants();
    training += plan.predicted;
  }
  CHECK(p.steps < 5000);
  double worst = 0;
  for (int64_t i = 0; i < 64; ++i) worst = std::max(worst, p.tpot(100 + i));
  const double share = static_cast<double>(p.trained_rows[1] - rows_before) / (p.now - began);
  // Alone: forward and backward of a row at the model's own rates.
  const double alone = 1 / (4 * 6.98e9 / 7e14);
  std::cout << "tpot at most " << worst * 1e3 << " ms, training " << share << " rows/s of about " << alone << " alone; " << p.over
            << " steps over\n";
  CHECK(worst <= 0.03);
  CHECK(p.over <= p.steps / 10);
  CHECK(share >= 0.6 * alone);
}

// A device whose products take rows four tiles of 256 at a time: what is behind 1024 rows costs nearly as much as 1024 more.
TEST(a_chunk_is_as_long_as_makes_its_rows_cheap) {
  DeviceRates rates{4.2e12, 7e14, 3e-6, 1e-4};
  rates.by_rows = {{256, 2.5e14}, {512, 4e14}, {768, 5e14}, {1024, 6.2e14}, {1280, 4.6e14}, {1536, 5e14}, {2048, 5.6e14}};
  const CostModel cost({6.98e9, 128256.0 * 4096, 4096, 32, 4096, 2048, 2}, rates);
  for (const double tpot : {0.03, 0.02}) {
    Planner planner(config_with(cost, 1, tpot));
    planner.add_adapter(1, 80 << 20, 0);
    Player p(planner, cost);
    for (int64_t i = 0; i < 64; ++i) p.request(100 + i, -1, 16, 300);
    for (int64_t j = 0; j < 16; ++j) p.job(j, 1, {2048, 2048, 2048, 2048});
    int full = 0, others = 0, alone = 0;
    for (int i = 0; i < 250; ++i) {
      const Plan plan = p.step();
      planner.check_invariants();
      if (plan.rows[3] < 64) continue;
      CHECK(plan.predicted <= plan.seconds * 1.001);
      CHECK(plan.seconds <= 1.25 * tpot);
      const bool works = plan.rows[0] + plan.backward_slices > 0;
      alone = works ? 0 : alone + 1;
      CHECK(alone <= 1);  // a step that saves time for the next
      if (plan.rows[0] > 0 && plan.backward_slices == 0) ++(plan.total_rows() == 1024 ? full : others);
    }
    double worst = 0;
    for (int64_t i = 0; i < 64; ++i) worst = std::max(worst, p.tpot(100 + i));
    std::cout << "target " << tpot * 1e3 << " ms: " << full << " chunks that make 1024 rows, " << others << " others; tpot at most "
              << worst * 1e3 << " ms\n";
    CHECK(worst <= tpot);
    // 1024 rows take longer than 25 ms: there they are not to be had, whatever is saved.
    CHECK(tpot > 0.025 ? full > 20 && others <= full / 3 : full == 0 && others > 20);
  }
}

TEST(training_alone_is_not_limited_and_stops_for_a_request) {
  const CostModel cost = gpu_8b();
  Planner planner(config_with(cost, 1, 0.03));
  planner.add_adapter(1, 1, 0);
  Player p(planner, cost);
  p.job(1, 1, {3000});
  Plan plan = p.step();
  CHECK_EQ(plan.micro_batch.size(), 1u);
  CHECK_EQ(plan.rows[0], 1024);
  CHECK(plan.forward_slices > 32 && !plan.resumes && plan.backward_slices == 0);
  plan = p.step({.forward_slices = 7, .forward_done = false});  // a request came
  CHECK(plan.micro_batch.empty() && plan.segments[0].position == 1024);
  p.request(2, -1, 40, 3);
  plan = p.step({.forward_slices = 0, .forward_done = false});
  CHECK(plan.rows[2] == 40 && plan.rows[0] == 0 && plan.resumes);  // the rest of the chunk may follow behind the prompt
  CHECK(p.first.contains(2));
  for (int i = 0; i < 400 && planner.has_work(); ++i) {
    plan = p.step();
    planner.check_invariants();
  }
  CHECK(p.completed == std::vector<int64_t>{1});
  CHECK_EQ(p.trained_rows[1], 3000);
}

TEST(shares_follow_weights) {
  const CostModel cost = gpu_8b();
  Planner planner(config_with(cost, 1, 0.05));
  Player p(planner, cost);
  const std::map<int64_t, double> weights = {{1, 1}, {2, 2}, {3, 5}};
  for (const auto& [id, weight] : weights) planner.add_adapter(id, 80 << 20, 0);
  int64_t next = 1;
  std::map<int64_t, int64_t> queued;
  std::map<int64_t, int64_t> adapter_of;
  std::mt19937 random(seed_option());
  while (p.steps < 3000) {
    for (const auto& [id, weight] : weights) {
      for (; queued[id] < 8; ++queued[id]) {
        std::vector<int32_t> rows;
        for (int i = 0; i < 4; ++i) rows.push_back(static_cast<int32_t>(50 + random() % 900));
        adapter_of[next] = id;
        p.job(next++, id, rows, weight);
      }
    }
    const size_t before = p.completed.size();
    p.step();
    for (size_t i = before; i < p.completed.size(); ++i) {
      const int64_t adapter = adapter_of.at(p.completed[i]);
      --queued[adapter];
      planner.set_version(adapter, p.completed[i]);
    }
  }
  // A barrier ends each job here, so an adapter has at most one job in a micro-batch; shares are what weights ask for while there
  // is a choice: over many micro-batches the heavier never gets less than the lighter.
  std::cout << "rows " << p.trained_rows[1] << " " << p.trained_rows[2] << " " << p.trained_rows[3] << "\n";
  CHECK(p.trained_rows[1] > 0);
  CHECK(p.trained_rows[2] >= p.trained_rows[1] * 9 / 10);
  CHECK(p.trained_rows[3] >= p.trained_rows[2] * 9 / 10);
}

TEST(shares_are_the_weights_when_examples_are_many) {
  const CostModel cost = gpu_8b();
  Planner planner(config_with(cost, 1, 0.05));
  Player p(planner, cost);
  const std::map<int64_t, double> weights = {{1, 1}, {2, 2}, {3, 5}};
  for (const auto& [id, weight] : weights) {
    planner.add_adapter(id, 80 << 20, 0);
    p.job(id, id, std::vector<int32_t>(3000, 256), weight);
  }
  while (p.trained_rows[3] < 200000) p.step();
  const double one = static_cast<double>(p.trained_rows[1]);
  std::cout << "rows " << p.trained_rows[1] << " " << p.trained_rows[2] << " " << p.trained_rows[3] << "\n";
  CHECK_NEAR(static_cast<double>(p.trained_rows[2]) / one, 2, 0.3);
  CHECK_NEAR(static_cast<double>(p.trained_rows[3]) / one, 5, 0.75);
}

TEST(prompts_with_a_near_deadline_come_first) {
  const CostModel cost = gpu_8b();
  PlannerConfig config = config_with(cost, 1, 0.05);
  config.max_batch_tokens = 1024;
  Planner planner(config);
  for (int64_t a = 1; a <= 3; ++a) planner.add_adapter(a, 1, 0);
  const auto request = [&](int64_t id, int64_t adapter, double deadline, bool reject = false) {
    RequestSpec r;
    r.id = id;
    r.adapter = adapter;
    r.prompt.assign(1000, 1);
    r.deadline = deadline;
    r.reject_late = reject;
    r.use_prefix_cache = false;
    planner.add_request(r);
  };
  request(1, 1, 50);
  request(2, 2, 50);
  request(3, 3, 0.2);
  request(4, 3, 0.01, true);
  CHECK(planner.late(0) == std::vector<int64_t>{4});  // a thousand rows take longer
  CHECK(planner.finish(4));
  CHECK(planner.late(0).empty());
  const Plan plan = planner.plan({.now = 0});
  CHECK_EQ(plan.segments.back().id, 3);
  CHECK_EQ(plan.segments.back().rows, 1000);
  planner.commit(plan, {.now = 0.1});
  CHECK_EQ(planner.stats().deadlines_met, 1);
}

TEST(a_chunk_that_left_its_pass_goes_on_before_another_begins) {
  const CostModel cost = gpu_8b();
  const PlannerConfig config = config_with(cost, 1, 0.03);
  Planner planner(config);
  planner.add_adapter(1, 1, 0);
  Player player(planner, cost);
  player.request(1, 1, 64, 1000);
  player.step();
  player.job(2, 1, {2048, 2048, 2048, 2048});
  player.step();  // of the decode alone: the time is saved for a longer chunk
  const Plan plan = planner.plan({.now = player.now});
  const int32_t rows = plan.rows[0], layers = config.num_layers, all = layers + (rows + 255) / 256;
  CHECK(rows > 256 && plan.rows[3] == 1 && plan.forward_slices == 0 && plan.chunk_leaves);
  const auto seconds = [&](const StepOutcome& outcome) { return cost.predict(planner.work_of(plan, outcome)); };
  const double whole = seconds({});
  double before = 0;
  for (int32_t ran = 0; ran < all; ++ran) {  // what was done is between the decode alone and all of it
    const StepOutcome left = {.forward_slices = ran, .forward_done = false, .backward_slices = 0};
    CHECK(seconds(left) > before && seconds(left) <= whole);
    CHECK_EQ(planner.work_of(plan, left).train_head_rows, 256.0 * std::max(0, ran - layers));
    before = seconds(left);
  }
  CHECK(seconds({.forward_slices = 0, .forward_done = false}) < 0.5 * whole);
  planner.abort(plan);

  CHECK_EQ(player.step({.forward_slices = 3, .forward_done = false, .backward_slices = 0}).rows[0], rows);
  planner.check_invariants();
  Plan next = planner.plan({.now = player.now});
  planner.abort(next);
  CHECK(next.rows[0] == 0 && next.rows[3] == 1);
  CHECK(next.resumes && next.forward_slices >= all - 3);
  CHECK(next.interruptible);
  next = player.step({.forward_slices = 0, .forward_done = false, .backward_slices = 0});
  next = player.step({.forward_slices = all - 3, .forward_done = true});
  CHECK(!next.interruptible);  // not twice running before anything ran
  for (int steps = 0; next.rows[0] == 0 && steps < 20; ++steps) next = player.step();
  CHECK_EQ(next.micro_row, rows);
}

TEST(a_chunk_leaves_its_pass_only_while_few_steps_have_arrivals) {
  const CostModel cost = gpu_8b();
  Planner planner(config_with(cost, 1, 0.03));
  planner.add_adapter(1, 1, 0);
  Player player(planner, cost);
  player.request(0, 1, 64, 1000);
  for (int64_t j = 1; j <= 60; ++j) player.job(j, 1, {2048, 2048, 2048, 2048});
  int64_t id = 100;
  std::deque<bool> came = {true};                 // before each of the last 32 steps, the next one's last
  const auto steps = [&](int count, int every) {  // how many had a chunk that may leave their pass
    int leaves = 0;
    for (int i = 0; i < count; ++i) {
      if (every > 0 && i % every == 0) {
        player.request(id++, 1, 16, 1);
        came.back() = true;
      }
      const Plan plan = player.step();
      CHECK(plan.rows[3] == 1 && plan.interruptible);
      CHECK_EQ(plan.chunk_leaves, std::ranges::count(came, true) <= 16);
      leaves += plan.chunk_leaves && plan.rows[0] > 0;
      came.push_back(false);
      if (came.size() > 32) came.pop_front();
    }
    return leaves;
  };
  player.step();  // the first request's prompt
  came.push_back(false);
  for (int turn = 0; turn < 2; ++turn) {
    CHECK(steps(60, 2) > 0);  // in half of the steps
    steps(40, 1);
    CHECK(steps(12, 0) == 0);
    steps(20, 0);
    CHECK(steps(10, 0) > 0);
    CHECK(steps(10, 1) > 0);
  }
  steps(40, 1);
  for (const auto& [request, left] : player.left) planner.finish(request);
  CHECK(player.step().chunk_leaves);  // no rows of requests beside it
}

TEST(random_work_in_pieces_keeps_every_rule) {
  std::mt19937 random(seed_option());
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  int64_t steps = 0, stopped = 0, left = 0, forced = 0, aborted = 0;
  for (int episode = 0; episode < 150; ++episode) {
    const CostModel cost = gpu_8b();
    PlannerConfig c = config_with(cost, 0.5, pick(0, 1) ? 0.02 : 0.004);
    c.max_batch_tokens = pick(20, 400);
    c.max_sequences = pick(1, 12);
    c.kv_pages = pick(8, 60);
    c.adapter_pool_bytes = pick(10, 40);
    c.num_layers = pick(1, 5);
    c.slice_rows = pick(1, 60);
    c.slack_rows = pick(4, 80);
    c.rerun = pick(0, 1);
    if (pick(0, 3) == 0) c.goal.reset();
    Planner planner(c);
    std::map<int64_t, int64_t> rows_of_job, seen_rows, waited;  // by job
    std::map<std::pair<int64_t, int32_t>, int32_t> next_row;    // of each example: its next
    std::map<int64_t, std::vector<int32_t>> jobs;
    std::set<int64_t> train_jobs;
    int64_t id = 0, stopped_rows = 0, micro_rows = 0, forwarded = 0, idle = 0;
    double now = 0;
    for (int64_t a = 1; a <= 4; ++a) planner.add_adapter(a, pick(0, 10), 0);
    const auto step = [&](bool last) {
      StepBudget budget{.now = now};
      if (!last && pick(0, 3) == 0) budget.max_rows = pick(0, static_cast<int>(c.max_batch_tokens));
      if (!last && pick(0, 3) == 0) budget.max_backward_slices = pick(0, 6);
      if (!last && pick(0, 5) == 0) budget.max_seconds = 1e-3 * pick(0, 20);
      const Plan plan = planner.plan(budget);
      if (!last && pick(0, 19) == 0) {
        planner.abort(plan);
        planner.check_invariants();
        ++aborted;
        return;
      }
      ++steps;
      const int32_t others = plan.rows[1] + plan.rows[2] + plan.rows[3];
      CHECK(plan.total_rows() <= c.max_batch_tokens);
      if (plan.rows[0] > 0) {
        CHECK(stopped_rows == 0);
        CHECK(others <= c.slack_rows);
        if (!plan.micro_batch.empty()) {
          CHECK(micro_rows == 0);
          micro_rows = forwarded = 0;
          for (const MicroExample& e : plan.micro_batch) {
            CHECK(e.row_begin == micro_rows && e.rows == jobs.at(e.job).at(static_cast<size_t>(e.example)));
            micro_rows += e.rows;
          }
        }
        CHECK_EQ(plan.micro_row, forwarded);
      }
      if (plan.forward_slices > 0 && !plan.resumes) CHECK(others == 0 && plan.rows[0] > 0 && plan.rows[0] <= c.slice_rows);
      CHECK(!plan.resumes || (stopped_rows > 0 && plan.rows[0] == 0));
      for (const Segment& s : plan.segments) {
        if (s.kind != Kind::train) continue;
        CHECK_EQ(s.position, (next_row[{s.id, s.example}]));
        next_row[{s.id, s.example}] += s.rows;
        CHECK(next_row[{s.id, s.example}] <= jobs.at(s.id).at(static_cast<size_t>(s.example)));
        seen_rows[s.id] += s.rows;
      }
      // Time: what is beyond the limit is decodes, or one smallest piece.
      if (c.cost && plan.seconds >= 0 && others > 0 && plan.predicted > plan.seconds * 1.001 + 1e-9) {
        const bool training = plan.rows[0] + plan.forward_slices + plan.backward_slices > 0;
        const int64_t pieces = (plan.rows[0] > 0) + plan.forward_slices + plan.backward_slices;
        if (training && plan.rows[2] == 0 && plan.rows[1] == 0) {
          CHECK(plan.rows[0] <= 16 && pieces <= 1);
          ++forced;
        }
      }
      StepOutcome outcome{.now = now += plan.predicted};
      if (plan.forward_slices > 0) {
        const int32_t all = c.num_layers + (plan.resumes ? static_cast<int32_t>(stopped_rows) : plan.rows[0]) / 256 + 2;
        const bool stop = !last && pick(0, 2) == 0;
        outcome.forward_done = !stop && (plan.resumes || plan.forward_slices >= all - 1);
        if (!outcome.forward_done) outcome.forward_slices = stop ? pick(0, plan.forward_slices) : plan.forward_slices;
        if (!outcome.forward_done && !plan.resumes) stopped_rows = plan.rows[0];
        if (outcome.forward_done) forwarded += plan.resumes ? stopped_rows : plan.rows[0], stopped_rows = 0;
        stopped += !outcome.forward_done;
      } else if (!last && plan.rows[0] > 0 && plan.chunk_leaves && pick(0, 2) == 0) {
        outcome.forward_done = false;
        outcome.forward_slices = pick(0, c.num_layers + plan.rows[0] / 256);
        stopped_rows = plan.rows[0];
        ++left;
      } else {
        forwarded += plan.rows[0];
      }
      if (plan.backward_slices > 0 && !last && pick(0, 2) == 0) outcome.backward_slices = pick(0, plan.backward_slices);
      const StepWork work = planner.work_of(plan, outcome);
      CHECK(cost.predict(work) <= plan.predicted * (1 + 1e-9) + 1e-12);
      const auto completed = planner.commit(plan, outcome);
      planner.check_invariants();
      for (const int64_t job : completed) {
        if (train_jobs.contains(job)) CHECK_EQ(seen_rows[job], rows_of_job[job]);  // every row of it, once
        jobs.erase(job);
      }
      if (micro_rows > 0 && planner.pending_backward_slices() == 0 && forwarded == micro_rows) micro_rows = 0;
      for (const Segment& s : plan.segments) {
        if (!s.samples) continue;
        if (pick(0, 3) == 0) planner.finish(s.id);
        else try {
            planner.append_token(s.id, 1);
          } catch (const InvalidArgument&) {
            planner.finish(s.id);
          }
      }
      idle = plan.empty() ? idle + 1 : 0;
      CHECK(idle < 60);
    };
    for (int i = 0; i < 150; ++i) {
      if (pick(0, 3) == 0 && planner.stats().waiting < 20) {
        RequestSpec r;
        r.id = id++;
        r.adapter = pick(-1, 4) < 1 ? -1 : pick(1, 4);
        r.prompt.assign(static_cast<size_t>(pick(1, static_cast<int>(c.kv_pages * c.page_size / 4))), 1);
        r.max_tokens = pick(1, 20);
        r.arrived = now;
        r.use_prefix_cache = false;
        planner.add_request(r);
      }
      if (pick(0, 4) == 0 && jobs.size() < 10) {
        JobSpec j;
        j.id = id++;
        j.adapter = pick(1, 4);
        j.train = pick(0, 3) > 0;
        j.weight = pick(1, 4);
        for (int e = pick(1, 4); e > 0; --e) j.rows.push_back(pick(1, static_cast<int>(c.max_batch_tokens)));
        for (const int32_t rows : j.rows) rows_of_job[j.id] += rows;
        jobs[j.id] = j.rows;
        if (j.train) train_jobs.insert(j.id);
        planner.add_job(j);
      }
      step(false);
    }
    int64_t more = 0;
    while (planner.has_work() && ++more < 20000) step(true);
    CHECK(more < 20000);
    CHECK(jobs.empty());
  }
  std::cout << steps << " steps, " << stopped << " stopped chunks, " << left << " that left their pass, " << forced
            << " forced pieces, " << aborted << " aborted\n";
  CHECK(stopped > 100 && left > 100 && forced > 0 && aborted > 100);
}

TEST(a_plan_of_a_thousand_sequences_and_ten_thousand_adapters_takes_little_time) {
  const CostModel cost = gpu_8b();
  PlannerConfig config = config_with(cost, 1, 0.05);
  config.max_sequences = 1000;
  config.kv_pages = 60000;
  Planner planner(config);
  for (int64_t a = 1; a <= 10000; ++a) planner.add_adapter(a, 8 << 20, 0);
  Player p(planner, cost);
  for (int64_t i = 0; i < 1000; ++i) p.request(i, 1 + i % 10000, 64, 400);
  for (int64_t a = 1; a <= 64; ++a) p.job(100000 + a, a, {512, 512, 512, 512});
  for (int i = 0; i < 40; ++i) p.step();
  for (int64_t i = 0; i < 5000; ++i) p.request(2000 + i, 1 + (i * 7) % 10000, 200, 4);
  std::vector<double> times;
  for (int i = 0; i < 200; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const Plan plan = planner.plan({.now = p.now});
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    planner.abort(plan);
    const double before = took;
    times.push_back(before);
    p.step();
  }
  std::ranges::sort(times);
  std::cout << "a plan takes " << times[100] * 1e6 << " us in the middle, " << times[190] * 1e6 << " us at p95, "
            << planner.stats().running << " running\n";
  CHECK(planner.stats().running > 800);
  CHECK(times[100] < 5e-3);  // far above the 200 us it should take: sanitizers and busy machines
}
