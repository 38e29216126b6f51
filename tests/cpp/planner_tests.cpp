// The planner: each rule by itself, then random queues by the hundred thousand steps (planner_driver.h).
// Options: --steps N (of the random queues), --seed S (of their first episode). Long because a test executable is one file and
// every rule of the planner has a test of its own here.
#include <cstdlib>
#include <map>

#include "check.h"
#include "plan/prefix_cache.h"
#include "planner_driver.h"

using namespace loquetier;

namespace {

PlannerConfig config() {
  return {.max_batch_tokens = 64,
          .max_sequences = 8,
          .kv_pages = 64,
          .page_size = 4,
          .adapter_pool_bytes = 100,
          .num_layers = 4,
          .starvation_steps = 4};
}

std::vector<int32_t> tokens(int64_t n, int32_t first = 0) {
  std::vector<int32_t> result;
  for (int64_t i = 0; i < n; ++i) result.push_back(first + static_cast<int32_t>(i));
  return result;
}

RequestSpec request(int64_t id, int64_t adapter, int64_t prompt, int64_t max_tokens, int priority = 0, int32_t first = 0) {
  RequestSpec spec;
  spec.id = id;
  spec.adapter = adapter;
  spec.priority = priority;
  spec.prompt = tokens(prompt, first);
  spec.max_tokens = max_tokens;
  return spec;
}

JobSpec job(int64_t id, int64_t adapter, std::vector<int32_t> rows, bool barrier = false, bool train = true) {
  return {.id = id, .adapter = adapter, .train = train, .barrier = barrier, .rows = std::move(rows)};
}

// One committed step; every sampled token is 7.
Plan step(Planner& planner, const StepBudget& budget = {}) {
  const Plan plan = planner.plan(budget);
  planner.commit(plan);
  for (const Segment& s : plan.segments) {
    if (s.samples) planner.append_token(s.id, 7);
  }
  planner.check_invariants();
  return plan;
}

const Segment* find(const Plan& plan, int64_t id) {  // null: not in the plan
  for (const Segment& s : plan.segments) {
    if (s.id == id) return &s;
  }
  return nullptr;
}

const Segment& at(const Plan& plan, int64_t id) {
  const Segment* s = find(plan, id);
  require<std::logic_error>(s != nullptr, "the plan has no segment of ", id);
  return *s;
}

std::vector<int64_t> ids(const Plan& plan) {
  std::vector<int64_t> result;
  for (const Segment& s : plan.segments) result.push_back(s.id);
  return result;
}

using Ids = std::vector<int64_t>;

}  // namespace

// ---------------------------------------------------------------- pages and prefixes

TEST(pages_are_counted) {
  KvPages pages(2);
  const int32_t a = pages.allocate(), b = pages.allocate();
  CHECK(a != b);
  CHECK_EQ(pages.free(), 0);
  CHECK_THROWS(std::logic_error, "none of 2 pages is free", pages.allocate());
  pages.retain(a);
  pages.release(a);
  CHECK_EQ(pages.references(a), 1);
  pages.release(a);
  CHECK_EQ(pages.free(), 1);
  CHECK_THROWS(std::logic_error, "is not in use", pages.release(a));
  CHECK_THROWS(std::logic_error, "is not in use", pages.retain(a));
  CHECK_THROWS(InvalidArgument, "pages: expected", KvPages(-1));
}

TEST(prefixes_are_exact_in_adapter_version_and_tokens) {
  KvPages pages(64);  // 128 buckets for 64 entries: collisions are sure
  PrefixCache cache(pages, 2);
  for (int32_t i = 0; i < 60; ++i) {
    const int32_t page = cache.allocate();
    CHECK_EQ(cache.insert(i % 3, i % 2, PrefixCache::kRoot, tokens(2, i), page), page);
    cache.release(page);
  }
  cache.check_invariants();
  for (int32_t i = 0; i < 60; ++i) {
    for (int64_t adapter = 0; adapter < 3; ++adapter) {
      for (int64_t version = 0; version < 2; ++version) {
        CHECK_EQ(cache.match(adapter, version, tokens(2, i), 1).pages.size(), size_t{adapter == i % 3 && version == i % 2});
      }
    }
  }
  cache.drop(1);
  cache.check_invariants();
  CHECK_EQ(cache.entries(), 40);
  CHECK_EQ(cache.match(1, 1, tokens(2, 1), 1).pages.size(), 0u);
  CHECK_EQ(cache.available(), 64);
}

TEST(prefixes_are_evicted_oldest_first_and_from_their_end) {
  KvPages pages(4);
  PrefixCache cache(pages, 1);
  const auto chain = [&](int64_t adapter, int n) {
    std::vector<int32_t> result;
    for (int32_t i = 0; i < n; ++i)
      result.push_back(cache.insert(adapter, 0, i ? result.back() : PrefixCache::kRoot, tokens(1, i), cache.allocate()));
    return result;
  };
  const auto first = chain(1, 2), second = chain(2, 2);
  for (const int32_t page : first) cache.release(page);  // the beginning becomes idle before the end
  for (const int32_t page : second) cache.release(page);
  CHECK_EQ(cache.idle(), 4);
  cache.allocate();
  CHECK_EQ(cache.match(1, 0, tokens(2), 2).pages, std::vector<int32_t>{first[0]});
  cache.allocate();
  CHECK_EQ(cache.match(1, 0, tokens(2), 2).pages.size(), 0u);
  CHECK_EQ(cache.match(2, 0, tokens(2), 2).pages, second);
  cache.check_invariants();
  cache.retain(second[0]);
  cache.retain(second[1]);
  CHECK_EQ(cache.available(), 0);
  CHECK_THROWS(std::logic_error, "is free", cache.allocate());
}

TEST(the_second_of_two_equal_pages_is_given_back) {
  KvPages pages(4);
  PrefixCache cache(pages, 2);
  const int32_t a = cache.allocate(), b = cache.allocate();
  CHECK_EQ(cache.insert(1, 0, PrefixCache::kRoot, tokens(2), a), a);
  CHECK_EQ(cache.insert(1, 0, PrefixCache::kRoot, tokens(2), b), a);
  CHECK_EQ(pages.references(a), 3);
  CHECK_EQ(pages.free(), 3);
}

// ---------------------------------------------------------------- serving

TEST(a_prompt_is_chunked_and_its_last_chunk_samples) {
  PlannerConfig c = config();
  c.max_batch_tokens = 10;
  Planner planner(c);
  planner.add_request(request(1, -1, 25, 3));
  for (const int32_t begin : {0, 10, 20}) {
    const Plan plan = step(planner);
    CHECK_EQ(plan.segments.size(), 1u);
    const Segment& s = plan.segments[0];
    CHECK(s.kind == Kind::prefill);
    CHECK_EQ(s.position, begin);
    CHECK_EQ(s.rows, begin == 20 ? 5 : 10);
    CHECK_EQ(s.samples, begin == 20);
  }
  const Plan plan = step(planner);
  CHECK(plan.segments[0].kind == Kind::decode);
  CHECK_EQ(plan.segments[0].position, 25);
  CHECK_EQ(planner.pages(1).size(), 7u);
  CHECK_EQ(planner.tokens(1).size(), 27u);
  CHECK(planner.finish(1));
  CHECK(!planner.has_work());
}

TEST(decodes_come_before_prompts_and_prompts_before_training) {
  PlannerConfig c = config();
  c.max_batch_tokens = 16;
  Planner planner(c);
  planner.add_adapter(5, 1, 0);
  planner.add_request(request(1, 5, 1, 20));
  CHECK(step(planner).segments[0].kind == Kind::prefill);  // one token, but it is a prompt
  planner.add_request(request(2, -1, 15, 2));
  planner.add_job(job(3, 5, {4}));
  Plan plan = step(planner);
  CHECK_EQ(ids(plan), (Ids{2, 1}));
  CHECK_EQ(plan.rows[2], 15);
  CHECK_EQ(plan.rows[3], 1);
  plan = step(planner);
  CHECK_EQ(ids(plan), (Ids{3, 2, 1}));
  CHECK_EQ(plan.adapters.size(), 1u);
}

TEST(rows_are_ordered_by_kind_adapter_version_arrival) {
  PlannerConfig c = config();
  c.max_sequences = 16;
  Planner planner(c);
  for (const int64_t a : {1, 2}) planner.add_adapter(a, 1, 3);
  const int64_t order[] = {2, -1, 1, 2, 1, -1};
  for (int64_t i = 0; i < 6; ++i) {
    RequestSpec spec = request(10 + i, order[i], 3, 9);
    if (i == 0) spec.pinned_version = 7;
    if (i == 4) spec.pinned_version = 2;
    planner.add_request(spec);
  }
  const Ids expected = {11, 15, 14, 12, 13, 10};
  CHECK_EQ(ids(step(planner)), expected);
  planner.add_job(job(20, 2, {2, 2}));
  planner.add_job(job(21, 1, {2}));
  planner.add_job(job(22, -1, {2}, false, false));
  const Plan plan = step(planner);
  Ids all = {21, 20, 20, 22};
  all.insert(all.end(), expected.begin(), expected.end());
  CHECK_EQ(ids(plan), all);
  int32_t row = 0;
  for (const Segment& s : plan.segments) {
    CHECK_EQ(s.row_begin, row);
    row += s.rows;
  }
  CHECK_EQ(plan.adapters.size(), 4u);
}

TEST(a_sequence_limit_holds_prompts_back) {
  PlannerConfig c = config();
  c.max_sequences = 2;
  Planner planner(c);
  for (int64_t i = 0; i < 3; ++i) planner.add_request(request(i, -1, 4, 9, 0, static_cast<int32_t>(10 * i)));
  CHECK_EQ(ids(step(planner)), (Ids{0, 1}));
  step(planner);
  CHECK_EQ(planner.stats().waiting, 1);
  planner.finish(0);
  CHECK(find(step(planner), 2) != nullptr);
}

TEST(more_decodes_than_rows_take_turns) {
  PlannerConfig c = config();
  Planner planner(c);
  for (int64_t i = 0; i < 5; ++i) planner.add_request(request(i, -1, 1, 50));
  step(planner);
  std::map<int64_t, int> served;
  for (int i = 0; i < 10; ++i) {
    const Plan plan = step(planner, {.max_rows = 2});
    CHECK_EQ(plan.rows[3], 2);
    for (const Segment& s : plan.segments) ++served[s.id];
  }
  for (const auto& [id, count] : served) CHECK_EQ(count, 4);
}

TEST(prompts_share_the_rows_between_adapters) {
  PlannerConfig c = config();
  c.kv_pages = 1000;
  c.max_sequences = 100;
  Planner planner(c);
  for (const int64_t a : {1, 2}) planner.add_adapter(a, 1, 0);
  for (int64_t i = 0; i < 20; ++i) planner.add_request(request(i, 1, 32, 2, 0, static_cast<int32_t>(100 * i)));
  for (int64_t i = 20; i < 24; ++i) planner.add_request(request(i, 2, 16, 2, 0, static_cast<int32_t>(100 * i)));
  const Plan plan = planner.plan();
  std::map<int64_t, int32_t> rows;
  for (const Segment& s : plan.segments) rows[s.adapter] += s.rows;
  CHECK_EQ(rows[1], 32);
  CHECK_EQ(rows[2], 32);
  planner.commit(plan);
}

TEST(higher_priority_first_but_lower_gets_its_share) {
  PlannerConfig c = config();
  c.max_batch_tokens = 8;
  c.max_sequences = 1;
  Planner planner(c);
  planner.add_request(request(1000, -1, 8, 1, -1));
  int64_t before = 0;
  for (int64_t i = 0; i < 30; ++i) {
    planner.add_request(request(i, -1, 8, 1, 5, static_cast<int32_t>(20 * i)));
    const Plan plan = planner.plan();
    planner.commit(plan);
    CHECK_EQ(plan.segments.size(), 1u);
    planner.finish(plan.segments[0].id);
    if (plan.segments[0].id == 1000) break;
    ++before;
  }
  CHECK_EQ(before, c.starvation_steps);
}

// ---------------------------------------------------------------- prefix cache inside the planner

TEST(a_prefix_is_computed_once_and_one_row_is_always_left) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_request(request(1, 1, 12, 3));
  step(planner);
  planner.add_request(request(2, 1, 12, 3));
  planner.add_request(request(3, -1, 12, 3));
  RequestSpec whole = request(4, 1, 12, 3);
  whole.use_prefix_cache = false;
  planner.add_request(whole);
  const Plan plan = step(planner);
  CHECK_EQ(at(plan, 2).position, 8);  // not 12: the last page would leave no row
  CHECK_EQ(at(plan, 2).rows, 4);
  CHECK_EQ(at(plan, 3).position, 0);  // another adapter
  CHECK_EQ(at(plan, 4).position, 0);  // wants every row
  CHECK_EQ(planner.stats().cached_tokens, 8);
  CHECK_EQ(planner.pages(1)[0], planner.pages(2)[0]);
  CHECK_EQ(planner.pages(1)[0], planner.pages(4)[0]);  // equal pages become one
  CHECK(planner.pages(1)[0] != planner.pages(3)[0]);
}

TEST(an_update_drops_the_adapters_prefixes) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_request(request(1, 1, 12, 30));
  step(planner);
  planner.set_version(1, 1);
  planner.add_request(request(2, 1, 12, 30));
  CHECK_EQ(at(step(planner), 2).position, 0);
  planner.finish(2);
  for (int i = 0; i < 12; ++i) step(planner);  // request 1 fills pages with rows of both versions: none is cached
  std::vector<int32_t> mixed(planner.tokens(1).begin(), planner.tokens(1).end());
  planner.finish(1);
  RequestSpec again = request(3, 1, 1, 3);
  again.prompt = mixed;
  planner.add_request(again);
  CHECK_EQ(at(step(planner), 3).position, 12);  // as far as request 2 computed them under version 1
}

TEST(a_pinned_request_keeps_its_version) {
  Planner planner(config());
  planner.add_adapter(1, 40, 0);
  RequestSpec pinned = request(1, 1, 4, 30);
  pinned.pin_version = true;
  planner.add_request(pinned);
  planner.add_request(request(2, 1, 4, 30));
  planner.set_version(1, 5);
  CHECK_EQ(at(step(planner), 1).version, 5);  // not pinned before it was first scheduled
  planner.set_version(1, 6);
  const Plan plan = step(planner);
  CHECK_EQ(at(plan, 1).version, 5);
  CHECK_EQ(at(plan, 2).version, 6);
  CHECK_EQ(plan.adapters.size(), 2u);
}

// ---------------------------------------------------------------- memory pressure

TEST(the_lowest_and_latest_is_pre_empted_and_loses_nothing) {
  PlannerConfig c = config();
  c.kv_pages = 6;
  c.prefix_caching = false;
  Planner planner(c);
  planner.add_request(request(1, -1, 4, 20, 0));
  planner.add_request(request(2, -1, 4, 20, 1));
  step(planner);
  planner.add_request(request(3, -1, 4, 20, 0));
  Ids preempted;
  for (int i = 0; i < 12 && preempted.empty(); ++i) preempted = step(planner).preempted;
  CHECK_EQ(preempted, Ids{3});
  const size_t had = planner.tokens(3).size();
  CHECK(had > 5);
  CHECK_EQ(planner.pages(3).size(), 0u);
  preempted.clear();
  for (int i = 0; i < 12 && preempted.empty(); ++i) preempted = step(planner).preempted;
  CHECK_EQ(preempted, Ids{1});
  planner.finish(2);
  const Plan plan = step(planner);
  CHECK_EQ(at(plan, 1).position, 0);  // the earlier one comes back first, with all it had generated
  CHECK(at(plan, 1).samples);
  CHECK_EQ(planner.stats().preemptions, 2);
  planner.finish(1);
  const Plan last = step(planner);
  CHECK_EQ(at(last, 3).rows, static_cast<int32_t>(had));
}

TEST(a_pre_empted_request_uses_its_cached_pages_again) {
  PlannerConfig c = config();
  c.kv_pages = 5;
  Planner planner(c);
  planner.add_request(request(1, -1, 6, 8, 0, 50));
  planner.add_request(request(2, -1, 8, 8));
  Ids preempted;
  for (int i = 0; i < 8 && preempted.empty(); ++i) preempted = step(planner).preempted;
  CHECK_EQ(preempted, Ids{2});
  planner.finish(1);
  CHECK_EQ(at(step(planner), 2).position, 8);
}

TEST(cached_pages_go_before_anybody_is_pre_empted) {
  PlannerConfig c = config();
  c.kv_pages = 6;
  Planner planner(c);
  planner.add_request(request(1, -1, 16, 1));
  planner.commit(planner.plan());
  planner.finish(1);
  CHECK_EQ(planner.stats().pages_cached, 4);
  planner.add_request(request(2, -1, 4, 20, 0, 90));
  for (int i = 0; i < 20; ++i) CHECK_EQ(step(planner).preempted.size(), 0u);
  CHECK_EQ(planner.stats().pages_free, 0);
}

TEST(a_token_on_its_way_has_its_row_in_the_next_plan) {
  Planner planner(config());
  planner.add_request(request(1, -1, 7, 4));  // its first token is the last of the second page
  const Plan prompt = planner.plan();
  CHECK(planner.goes_on());
  planner.commit(prompt);
  CHECK(planner.goes_on());
  planner.expect_tokens();
  planner.check_invariants();
  const Plan next = planner.plan();
  CHECK_EQ(next.rows[3], 1);
  CHECK_EQ(find(next, 1)->position, 7);
  CHECK(!find(next, 1)->new_pages);
  planner.commit(next);
  planner.check_invariants();  // the page is full, and no entry as long as its last token is not known
  planner.add_request(request(2, -1, 9, 1));
  planner.append_token(1, 7);  // as the other's prompt goes on
  planner.check_invariants();
  CHECK_EQ(planner.tokens(1).back(), 7);
  CHECK_EQ(find(step(planner), 2)->position, 8);

  planner.finish(2);
  planner.append_token(1, 7);
  step(planner);
  const size_t length = planner.tokens(1).size();
  CHECK(!planner.goes_on());
  planner.expect_tokens();  // its last step's token is there
  CHECK_EQ(planner.tokens(1).size(), length);
  planner.commit(planner.plan());
  planner.expect_tokens();
  CHECK_EQ(planner.tokens(1).size(), length);  // it ends with the token that is on its way
  planner.finish(1);                           // before it is there
  planner.check_invariants();
  CHECK(!planner.has_work());
}

TEST(a_prompt_waits_until_all_of_it_fits) {
  PlannerConfig c = config();
  c.kv_pages = 8;
  c.max_batch_tokens = 8;
  Planner planner(c);
  planner.add_request(request(1, -1, 8, 8, 0, 50));
  step(planner);
  planner.add_request(request(2, -1, 24, 8));  // 6 pages; 6 are free, one is for request 1 to grow
  CHECK_EQ(ids(step(planner)), Ids{1});
  CHECK_EQ(planner.stats().waiting, 1);
  planner.finish(1);
  CHECK_EQ(ids(step(planner)), Ids{2});
}

// ---------------------------------------------------------------- the pool

TEST(decodes_over_more_adapters_than_fit_take_turns) {
  PlannerConfig c = config();
  c.max_sequences = 16;
  Planner planner(c);
  for (int64_t a = 0; a < 6; ++a) {
    planner.add_adapter(a, a == 5 ? 100 : 40, 0);
    planner.add_request(request(100 + a, a, 2, 60));
  }
  std::map<int64_t, int> served;
  for (int i = 0; i < 120; ++i) {
    const Plan plan = step(planner);
    int64_t bytes = 0;
    for (const AdapterUse& use : plan.adapters) bytes += use.adapter == 5 ? 100 : 40;
    CHECK(bytes <= 100);
    for (const Segment& s : plan.segments) ++served[s.id];
  }
  CHECK_EQ(served.size(), 6u);
  for (const auto& [id, count] : served) CHECK(count >= 20);
}

TEST(training_gets_its_turn_in_a_full_pool) {
  Planner planner(config());
  for (int64_t a = 0; a < 2; ++a) planner.add_adapter(a, 60, 0);
  planner.add_request(request(1, 0, 2, 200));
  step(planner);
  planner.add_job(job(2, 1, {4}));
  int waited = 0;
  while (planner.stats().queued_examples > 0) {
    const Plan plan = step(planner, {.max_backward_slices = 1});
    CHECK_EQ(plan.adapters.size(), 1u);
    CHECK(++waited < 20);
  }
  CHECK_EQ(waited, config().starvation_steps + 1);
  while (planner.pending_backward_slices() > 0) {
    step(planner, {.max_backward_slices = 1});
    CHECK(++waited < 60);
  }
}

// ---------------------------------------------------------------- training

TEST(backward_is_cut_over_steps_and_blocks_the_next_micro_batch) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_job(job(10, 1, {20, 20, 40}));
  Plan plan = step(planner, {.max_backward_slices = 3});
  CHECK_EQ(plan.rows[0], 40);
  CHECK_EQ(plan.backward_slices, 3);
  CHECK_EQ(planner.pending_backward_slices(), 1);
  CHECK_EQ(planner.stats().queued_examples, 1);
  planner.add_job(job(11, -1, {5}, false, false));
  plan = step(planner, {.max_backward_slices = 3});
  CHECK_EQ(plan.rows[0], 0);
  CHECK_EQ(plan.rows[1], 5);  // evaluation needs no backward and does not wait for one
  CHECK_EQ(plan.backward_slices, 1);
  CHECK_EQ(plan.adapters.size(), 1u);
  CHECK_EQ(plan.completed_jobs, Ids{11});
  plan = step(planner, {.max_backward_slices = 0});
  CHECK_EQ(plan.rows[0], 40);
  CHECK_EQ(plan.backward_slices, 0);
  CHECK(plan.completed_jobs.empty());
  plan = step(planner);
  CHECK_EQ(plan.backward_slices, 4);
  CHECK_EQ(plan.completed_jobs, Ids{10});
  CHECK(!planner.has_work());
}

TEST(a_barrier_ends_before_the_next_job_begins) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_job(job(1, 1, {4}));
  planner.add_job(job(2, 1, {4}, true));
  planner.add_job(job(3, 1, {4}, false, false));
  planner.add_job(job(4, 1, {4}));
  Plan plan = step(planner, {.max_backward_slices = 2});
  CHECK_EQ(ids(plan), (Ids{1, 2}));  // without a barrier between them they share a step
  plan = step(planner, {.max_backward_slices = 2});
  CHECK_EQ(ids(plan), Ids{});
  CHECK_EQ(plan.completed_jobs, (Ids{1, 2}));
  planner.set_version(1, 1);
  plan = step(planner);
  CHECK_EQ(ids(plan), (Ids{4, 3}));
  CHECK_EQ(at(plan, 3).version, 1);
  CHECK_EQ(plan.completed_jobs, (Ids{3, 4}));
}

TEST(rows_that_one_adapter_cannot_use_go_to_another) {
  Planner planner(config());
  for (int64_t a = 0; a < 3; ++a) planner.add_adapter(a, 1, 0);
  planner.add_job(job(1, 0, {40, 40}));
  planner.add_job(job(2, 1, {30}));
  planner.add_job(job(3, 2, {10, 10, 10}));
  Plan plan = step(planner);
  CHECK_EQ(ids(plan), (Ids{2, 3, 3, 3}));
  CHECK_EQ(plan.rows[0], 60);
  planner.add_job(job(4, 1, {30}));
  plan = step(planner);  // and what found no room is next, though another came meanwhile
  CHECK_EQ(at(plan, 1).rows, 40);
}

TEST(training_shares_rows_not_examples) {
  PlannerConfig c = config();
  Planner planner(c);
  for (int64_t a = 0; a < 2; ++a) planner.add_adapter(a, 1, 0);
  planner.add_job(job(1, 0, std::vector<int32_t>(100, 32)));
  planner.add_job(job(2, 1, std::vector<int32_t>(1000, 4)));
  std::map<int64_t, int64_t> rows;
  for (int i = 0; i < 40; ++i) {
    const Plan plan = step(planner);
    CHECK_EQ(plan.rows[0], 64);
    for (const Segment& s : plan.segments) rows[s.adapter] += s.rows;
  }
  CHECK(rows[0] >= 40 * 64 * 45 / 100);
  CHECK(rows[1] >= 40 * 64 * 45 / 100);
}

TEST(a_starving_example_goes_before_prompts) {
  PlannerConfig c = config();
  c.max_batch_tokens = 16;
  c.kv_pages = 1000;
  c.max_sequences = 1000;
  Planner planner(c);
  planner.add_adapter(1, 1, 0);
  planner.add_job(job(1, 1, {16}));
  int waited = 0;
  for (int64_t i = 0; planner.stats().queued_examples > 0; ++i) {
    planner.add_request(request(10 + i, -1, 16, 1, 0, static_cast<int32_t>(20 * i)));
    const Plan plan = planner.plan();
    planner.commit(plan);
    CHECK_EQ(plan.segments.size(), 1u);
    if (plan.rows[2] > 0) planner.finish(plan.segments[0].id);
    CHECK(++waited < 20);
  }
  CHECK_EQ(waited, c.starvation_steps + 1);
}

TEST(an_example_longer_than_every_budget_gets_a_longer_step) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_request(request(1, -1, 4, 50));
  step(planner);
  planner.add_job(job(2, 1, {60}));
  int64_t waited = 0;
  Plan plan;
  do {
    plan = step(planner, {.max_rows = 8});
    CHECK_EQ(plan.rows[3], 1);  // decodes ride along
    CHECK(++waited < 20);
  } while (plan.rows[0] == 0);
  CHECK_EQ(waited, config().starvation_steps + 1);
  CHECK_EQ(plan.total_rows(), 61);
}

TEST(a_removed_job_leaves_the_micro_batch_to_end) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_job(job(1, 1, {4, 4}, true));
  planner.add_job(job(2, 1, {4}));
  step(planner, {.max_backward_slices = 1});
  CHECK(planner.remove_job(1));
  CHECK(!planner.remove_job(1));
  Plan plan = step(planner, {.max_backward_slices = 1});
  CHECK_EQ(plan.rows[0], 0);
  CHECK_EQ(plan.backward_slices, 1);
  plan = step(planner);
  CHECK_EQ(plan.backward_slices, 2);
  CHECK_EQ(plan.completed_jobs.size(), 0u);
  CHECK_EQ(step(planner).completed_jobs, Ids{2});
  planner.add_job(job(3, 1, {4}));
  step(planner, {.max_backward_slices = 1});
  planner.abandon_backward();
  CHECK_EQ(planner.pending_backward_slices(), 0);
  CHECK(!planner.has_work());
}

// ---------------------------------------------------------------- abort, removal, bad input

TEST(abort_puts_everything_back) {
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  planner.add_request(request(1, 1, 8, 9));
  step(planner);
  planner.add_request(request(2, 1, 9, 9));
  planner.add_job(job(3, 1, {4, 5}, true));
  const Plan first = planner.plan({.max_backward_slices = 1});
  CHECK_EQ(first.segments.size(), 4u);
  CHECK_THROWS(std::logic_error, "a plan is open", planner.plan());
  CHECK_THROWS(std::logic_error, "a plan is open", planner.finish(1));
  CHECK_THROWS(std::logic_error, "expected the plan made last", planner.commit(Plan{}));
  planner.abort(first);
  CHECK_THROWS(std::logic_error, "no plan is open", planner.abort(first));
  planner.check_invariants();
  CHECK_EQ(planner.stats().queued_examples, 2);
  CHECK_EQ(planner.pending_backward_slices(), 0);
  CHECK_EQ(planner.stats().waiting, 1);
  CHECK_EQ(planner.pages(1).size(), 2u);
  const Plan second = planner.plan({.max_backward_slices = 1});
  CHECK_EQ(ids(second), ids(first));
  CHECK_EQ(at(second, 2).position, 8);
  planner.commit(second);
  CHECK_EQ(planner.stats().cached_tokens, 8);
}

TEST(a_removed_adapter_ends_with_its_last_request) {
  Planner planner(config());
  planner.add_adapter(1, 1, 4);
  planner.add_request(request(1, 1, 8, 9));
  step(planner);
  planner.remove_adapter(1);
  CHECK_THROWS(InvalidArgument, "adapter 1 was removed", planner.add_request(request(2, 1, 4, 4)));
  CHECK_THROWS(InvalidArgument, "adapter 1 was removed", planner.add_job(job(2, 1, {4})));
  CHECK_EQ(at(step(planner), 1).version, 4);
  planner.finish(1);
  CHECK_EQ(planner.stats().pages_free, config().kv_pages);  // nothing of it stays cached
  CHECK_THROWS(InvalidArgument, "expected a known adapter", planner.set_version(1, 5));
}

TEST(bad_input_is_refused_and_changes_nothing) {
  PlannerConfig bad = config();
  bad.num_layers = 0;
  CHECK_THROWS(InvalidArgument, "num_layers: expected >= 1, got 0", Planner(bad));
  bad = config();
  bad.max_batch_tokens = 0;
  CHECK_THROWS(InvalidArgument, "max_batch_tokens", Planner(bad));
  Planner planner(config());
  planner.add_adapter(1, 1, 0);
  CHECK_THROWS(InvalidArgument, "1 is already there", planner.add_adapter(1, 1, 0));
  CHECK_THROWS(InvalidArgument, "expected 0 .. 100 (the pool), got 101", planner.add_adapter(2, 101, 0));
  CHECK_THROWS(InvalidArgument, "expected a known adapter", planner.add_request(request(1, 9, 4, 4)));
  CHECK_THROWS(InvalidArgument, "at least one token", planner.add_request(request(1, 1, 0, 4)));
  CHECK_THROWS(InvalidArgument, "max_tokens", planner.add_request(request(1, 1, 4, 0)));
  CHECK_THROWS(InvalidArgument, "do not fit the KV pool of 256 tokens", planner.add_request(request(1, 1, 200, 100)));
  CHECK_THROWS(InvalidArgument, "the base model is not trained", planner.add_job(job(1, -1, {4})));
  CHECK_THROWS(InvalidArgument, "at least one example", planner.add_job(job(1, 1, {})));
  CHECK_THROWS(InvalidArgument, "example 1: expected 1 .. 64", planner.add_job(job(1, 1, {4, 65})));
  CHECK_THROWS(NotFound, "no request 1", planner.tokens(1));
  CHECK(!planner.has_work());
  planner.add_request(request(1, 1, 4, 4));
  CHECK_THROWS(InvalidArgument, "1 is already there", planner.add_request(request(1, 1, 4, 4)));
  CHECK_THROWS(std::logic_error, "did not sample", planner.append_token(1, 0));
  planner.check_invariants();
}

// ---------------------------------------------------------------- random queues

TEST(random_queues_keep_every_rule) {
  const int64_t steps = std::atoll(test::option("--steps", "100000").c_str());
  const uint64_t first = std::strtoull(test::option("--seed", "1").c_str(), nullptr, 10);
  test::Driver::Seen seen;
  uint64_t seed = first;
  while (seen.steps < steps) test::Driver(seed++, seen).run(800);
  std::printf("planner: seeds %llu .. %llu, %lld steps, %lld aborted; rows: %lld train, %lld eval, %lld prefill, %lld decode\n",
              static_cast<unsigned long long>(first), static_cast<unsigned long long>(seed - 1), static_cast<long long>(seen.steps),
              static_cast<long long>(seen.aborted), static_cast<long long>(seen.rows[0]), static_cast<long long>(seen.rows[1]),
              static_cast<long long>(seen.rows[2]), static_cast<long long>(seen.rows[3]));
  std::printf(
      "planner: %lld pre-emptions, %lld cached tokens, %lld jobs, %lld requests, %lld cut backwards, %lld version changes\n",
      static_cast<long long>(seen.preempted), static_cast<long long>(seen.cached_tokens), static_cast<long long>(seen.completed),
      static_cast<long long>(seen.finished), static_cast<long long>(seen.cut_backwards),
      static_cast<long long>(seen.version_changes));
  std::printf("planner: longest waits in steps: decode %lld, request %lld, example %lld, backward %lld\n",
              static_cast<long long>(seen.longest_decode_wait), static_cast<long long>(seen.longest_request_wait),
              static_cast<long long>(seen.longest_example_wait), static_cast<long long>(seen.longest_backward_wait));
  CHECK(seen.steps >= steps);
  if (steps < 20000) return;  // too short to have seen everything
  for (const int64_t rows : seen.rows) CHECK(rows > steps / 2);
  CHECK(seen.preempted > steps / 1000);
  CHECK(seen.cached_tokens > steps / 100);
  CHECK(seen.mixed_requests > 0);
  CHECK(seen.long_examples > 0);
  CHECK(seen.replanned_equal > 0);
  CHECK(seen.cut_backwards > steps / 100);
}
