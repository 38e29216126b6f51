// An engine without a model: drives the planner through random queues and checks every plan against a model of its own.
//
// The model of a page is what its rows would hold: for each slot the adapter, the version and the tokens up to it. A committed
// prefill or decode row writes its slot; after every step each running request must find in its pages exactly its own tokens, under
// the versions its rows were computed with. Any broken rule throws std::runtime_error with the episode's seed and the step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/random.h"
#include "plan/planner.h"

namespace loquetier::test {

class Driver {
 public:
  // Totals over all episodes, to show that the interesting things did happen.
  struct Seen {
    int64_t steps = 0, rows[4] = {0, 0, 0, 0}, aborted = 0, preempted = 0, cached_tokens = 0, completed = 0, finished = 0,
            cut_backwards = 0, long_examples = 0, version_changes = 0, mixed_requests = 0, replanned_equal = 0;
    int64_t longest_decode_wait = 0, longest_request_wait = 0, longest_example_wait = 0, longest_backward_wait = 0;
  };

  Driver(uint64_t seed, Seen& seen) : seed_(seed), random_(seed), seen_(seen), config_(make_config()), planner_(config_) {
    slots_.resize(static_cast<size_t>(config_.kv_pages * config_.page_size));
    arrivals_ = pick(1, 60);
    jobs_wanted_ = pick(0, 40);
  }

  void run(int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
      events();
      step(true);
    }
    drain();
  }

 private:
  struct Slot {
    int64_t adapter = -2, version = -1;
    uint64_t tokens = 0;  // hash of all tokens up to this one
    bool operator==(const Slot&) const = default;
  };
  struct Adapter {
    int64_t bytes = 0, version = 0;
    bool removed = false;
    std::vector<int64_t> jobs;  // in order of arrival
    int64_t waited = 0;
  };
  struct Request {
    int64_t adapter = -1, pinned = -1, max_tokens = 1, computed = 0, waited = 0;
    size_t prompt = 0;
    int priority = 0;
    bool pin = false, use_cache = true, running = false, decoding = false;
    std::vector<uint64_t> hashes;   // per token
    std::vector<int64_t> versions;  // per computed token
    std::vector<int32_t> tokens;
    int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  };
  struct Job {
    int64_t adapter = -1;
    bool train = true, barrier = false;
    std::vector<int32_t> rows;
    int32_t next = 0, done = 0;
  };
  using Use = std::pair<int64_t, int64_t>;
  struct Micro {
    int32_t layers = 0;
    std::map<int64_t, int32_t> examples;
    std::set<Use> uses;
    int64_t waited = 0;
  };

  int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  bool chance(int64_t percent) { return pick(1, 100) <= percent; }
  template <class... Parts>
  void expect(bool ok, const Parts&... parts) const {
    if (!ok) throw std::runtime_error(concat("planner, episode seed ", seed_, ", step ", step_, ": ", parts...));
  }

  PlannerConfig make_config() {
    PlannerConfig c;
    c.max_batch_tokens = chance(30) ? pick(1, 6) : pick(4, 80);
    c.max_sequences = pick(1, 12);
    c.page_size = int32_t{1} << pick(0, 3);
    c.kv_pages = pick(2, 6) + pick(0, 1) * pick(0, 60);
    c.adapter_pool_bytes = pick(10, 40);
    c.num_layers = static_cast<int32_t>(pick(1, 5));
    c.starvation_steps = static_cast<int32_t>(pick(1, 8));
    c.prefix_caching = chance(75);
    return c;
  }

  // ---------------------------------------------------------------- events

  void append(Request& r, int32_t token) {
    r.hashes.push_back(mix_key(r.hashes.empty() ? 1 : r.hashes.back(), static_cast<uint64_t>(token)));
    r.tokens.push_back(token);
  }

  int64_t any_adapter() {
    std::vector<int64_t> open = {-1};
    for (const auto& [id, a] : adapters_) {
      if (!a.removed) open.push_back(id);
    }
    return open[static_cast<size_t>(pick(0, static_cast<int64_t>(open.size()) - 1))];
  }

  void add_request() {
    Request r;
    RequestSpec spec;
    spec.id = next_id_++;
    spec.adapter = r.adapter = any_adapter();
    spec.priority = r.priority = chance(70) ? 0 : static_cast<int>(pick(-1, 2));
    const int64_t room = std::min<int64_t>(config_.kv_pages * config_.page_size, 60);
    const int64_t prompt = pick(1, std::max<int64_t>(1, chance(20) ? room : room / 2));
    r.max_tokens = spec.max_tokens = pick(1, std::max<int64_t>(1, room - prompt + 1));
    const int64_t family = pick(0, 2), same = pick(0, prompt);  // a few long common prefixes
    for (int64_t i = 0; i < prompt; ++i) append(r, static_cast<int32_t>(i < same ? family : pick(0, 1)));
    r.prompt = r.tokens.size();
    spec.prompt = r.tokens;
    spec.use_prefix_cache = r.use_cache = chance(85);
    if (r.adapter >= 0 && chance(20)) spec.pin_version = r.pin = true;
    if (r.adapter >= 0 && chance(10)) spec.pinned_version = r.pinned = pick(0, adapters_.at(r.adapter).version);
    planner_.add_request(spec);
    requests_[spec.id] = std::move(r);
  }

  void add_job() {
    JobSpec spec;
    spec.id = next_id_++;
    spec.adapter = any_adapter();
    spec.train = spec.adapter >= 0 && chance(65);
    spec.barrier = spec.train && chance(50);
    const int64_t examples = pick(1, 5);
    for (int64_t i = 0; i < examples; ++i) {
      spec.rows.push_back(static_cast<int32_t>(
          pick(1, chance(10) ? config_.max_batch_tokens : std::max<int64_t>(1, config_.max_batch_tokens / 3))));
    }
    jobs_[spec.id] = {spec.adapter, spec.train, spec.barrier, spec.rows, 0, 0};
    (spec.adapter < 0 ? base_ : adapters_.at(spec.adapter)).jobs.push_back(spec.id);
    planner_.add_job(spec);
  }

  void events() {
    if (requests_.size() < 16 && chance(arrivals_)) add_request();
    if (jobs_.size() < 12 && chance(jobs_wanted_)) add_job();
    if (adapters_.size() < 8 && chance(4)) {
      const int64_t id = next_id_++;
      adapters_[id] = {pick(0, 10), pick(0, 3), false, {}, 0};
      planner_.add_adapter(id, adapters_.at(id).bytes, adapters_.at(id).version);
    }
    if (chance(1) && chance(50)) {
      if (const int64_t id = any_adapter(); id >= 0) remove_adapter(id);
    }
    if (chance(1)) {
      if (const int64_t id = any_adapter(); id >= 0) bump(id);
    }
    if (chance(2) && !requests_.empty())
      finish(std::next(requests_.begin(), pick(0, static_cast<int64_t>(requests_.size()) - 1))->first);
    if (chance(1) && !jobs_.empty()) remove_job(std::next(jobs_.begin(), pick(0, static_cast<int64_t>(jobs_.size()) - 1))->first);
    if (chance(1) && chance(20) && micro_.layers > 0) {
      planner_.abandon_backward();
      const auto lost = micro_.examples;
      for (const auto& [id, count] : lost) forget_job(id);
      micro_ = {};
    }
    expect(!planner_.finish(-5) && !planner_.remove_job(-5), "an unknown id was found");
  }

  void bump(int64_t adapter) {
    planner_.set_version(adapter, ++adapters_.at(adapter).version);
    ++seen_.version_changes;
    for (const auto& [id, r] : requests_) seen_.mixed_requests += r.adapter == adapter && r.running && r.pinned < 0;
  }

  void remove_adapter(int64_t id) {
    Adapter& a = adapters_.at(id);
    const auto jobs = a.jobs;
    planner_.remove_adapter(id);
    a.removed = true;
    for (const int64_t job : jobs) remove_job(job);
    forget_adapters();
  }

  void forget_adapters() {
    std::erase_if(adapters_, [&](const auto& entry) {
      const auto& [id, a] = entry;
      const bool used = std::ranges::any_of(requests_, [&](const auto& r) { return r.second.adapter == id; });
      const bool in_flight = std::ranges::any_of(micro_.uses, [&](const Use& use) { return use.first == id; });
      return a.removed && !used && !in_flight;
    });
  }

  void finish(int64_t id) {
    expect(planner_.finish(id), "request ", id, " is unknown");
    requests_.erase(id);
    ++seen_.finished;
    forget_adapters();
  }

  void forget_job(int64_t id) {
    auto& jobs = (jobs_.at(id).adapter < 0 ? base_ : adapters_.at(jobs_.at(id).adapter)).jobs;
    std::erase(jobs, id);
    micro_.examples.erase(id);
    jobs_.erase(id);
  }

  void remove_job(int64_t id) {
    expect(planner_.remove_job(id), "job ", id, " is unknown");
    forget_job(id);
  }

  // ---------------------------------------------------------------- one step

  void step(bool random_budget) {
    ++step_;
    ++seen_.steps;
    StepBudget budget;
    if (random_budget && chance(30)) budget.max_rows = chance(15) ? 0 : pick(1, config_.max_batch_tokens);
    if (random_budget && chance(40))
      budget.max_backward_slices = static_cast<int32_t>(chance(15) ? 0 : pick(1, config_.num_layers));
    const PlannerStats before = planner_.stats();
    const int32_t pending_before = planner_.pending_backward_slices();
    std::map<int64_t, size_t> pages_before;
    for (const auto& [id, r] : requests_) pages_before[id] = planner_.pages(id).size();
    const Plan plan = planner_.plan(budget);
    check(plan, budget);
    for (const int64_t id : plan.preempted) {
      Request& r = requests_.at(id);
      expect(r.running, "request ", id, " was pre-empted and did not run");
      r.running = r.decoding = false;
      r.computed = 0;
      r.versions.clear();
    }
    seen_.preempted += static_cast<int64_t>(plan.preempted.size());
    if (random_budget && chance(5)) {
      ++seen_.aborted;
      planner_.abort(plan);
      planner_.check_invariants();
      const PlannerStats after = planner_.stats();
      const auto preempted = static_cast<int64_t>(plan.preempted.size());
      expect(after.queued_examples == before.queued_examples && planner_.pending_backward_slices() == pending_before,
             "abort lost training work");
      expect(after.waiting == before.waiting + preempted && after.running == before.running - preempted, "abort lost a request");
      expect(after.cached_tokens == before.cached_tokens, "abort counted cached tokens");
      for (const auto& [id, r] : requests_) {
        const bool taken = std::ranges::find(plan.preempted, id) != plan.preempted.end();
        expect(planner_.pages(id).size() == (taken ? 0 : pages_before.at(id)), "abort left request ", id, " with other pages");
      }
      if (preempted == 0 && !config_.prefix_caching) {
        const Plan again = planner_.plan(budget);
        expect(again.segments.size() == plan.segments.size() && again.backward_slices == plan.backward_slices,
               "another plan after abort");
        for (size_t i = 0; i < plan.segments.size(); ++i) {
          const Segment &a = plan.segments[i], &b = again.segments[i];
          expect(std::tie(a.kind, a.id, a.example, a.rows, a.position) == std::tie(b.kind, b.id, b.example, b.rows, b.position),
                 "another segment after abort");
        }
        ++seen_.replanned_equal;
        planner_.abort(again);
      }
      return;
    }
    apply(plan, budget);
  }

  int64_t bytes_of(const Use& use) const { return adapters_.at(use.first).bytes; }

  void check(const Plan& plan, const StepBudget& budget) {
    const int64_t offered = budget.max_rows < 0 ? config_.max_batch_tokens : budget.max_rows;
    std::set<Use> uses;
    std::set<std::pair<int64_t, int32_t>> sequences;
    std::map<int64_t, std::vector<std::pair<int64_t, int32_t>>> examples;  // by adapter
    int32_t row = 0, rows[4] = {0, 0, 0, 0};
    int64_t longest_example = 0;
    const Segment* last = nullptr;
    for (const Segment& s : plan.segments) {
      expect(s.row_begin == row && s.rows >= 1, "rows of ", s.id, " begin at ", s.row_begin, ", expected ", row);
      row += s.rows;
      rows[static_cast<size_t>(s.kind)] += s.rows;
      if (s.adapter >= 0) uses.insert({s.adapter, s.version});
      expect(sequences.insert({s.id, s.example}).second, "sequence ", s.id, " example ", s.example, " is planned twice");
      if (last) {
        const auto key = [](const Segment& x) {
          return std::tie(x.kind, x.adapter, x.version, x.id, x.example);
        };  // ids rise with arrival
        expect(key(*last) < key(s), "segments of ", last->id, " and ", s.id, " are out of order");
      }
      last = &s;
      if (s.kind == Kind::train || s.kind == Kind::eval) {
        const Job& job = jobs_.at(s.id);
        expect(job.train == (s.kind == Kind::train) && job.adapter == s.adapter && s.example >= 0, "job ", s.id,
               " has a wrong segment");
        expect(s.rows == job.rows.at(static_cast<size_t>(s.example)) && s.position == 0 && !s.samples, "job ", s.id,
               " has wrong rows");
        expect(s.version == (s.adapter < 0 ? 0 : adapters_.at(s.adapter).version), "job ", s.id, " runs under version ", s.version);
        examples[s.adapter].push_back({s.id, s.example});
        longest_example = std::max<int64_t>(longest_example, s.rows);
      } else {
        check_request(s, plan);
      }
    }
    for (int k = 0; k < 4; ++k)
      expect(rows[k] == plan.rows[k], "rows of kind ", k, ": ", rows[k], " in segments, ", plan.rows[k], " said");
    expect(row <= config_.max_batch_tokens, row, " rows, limit ", config_.max_batch_tokens);
    expect(row <= offered || (offered > 0 && longest_example > offered), row, " rows, budget ", offered);
    seen_.long_examples += row > offered;
    expect(planner_.stats().running <= config_.max_sequences, "too many sequences run");
    check_training(plan, budget, examples);
    if (plan.backward_slices > 0 && micro_.layers > 0) uses.insert(micro_.uses.begin(), micro_.uses.end());
    int64_t bytes = 0;
    for (const Use& use : uses) bytes += bytes_of(use);
    expect(bytes <= config_.adapter_pool_bytes, bytes, " bytes of adapters, pool ", config_.adapter_pool_bytes);
    std::set<Use> said;
    for (const AdapterUse& use : plan.adapters) expect(said.insert({use.adapter, use.version}).second, "an adapter is named twice");
    expect(said == uses, "the plan names other adapters than it uses");
  }

  void check_request(const Segment& s, const Plan& plan) {
    const Request& r = requests_.at(s.id);
    const bool fresh = !r.running || std::ranges::find(plan.preempted, s.id) != plan.preempted.end();
    expect(s.example == -1 && s.adapter == r.adapter, "request ", s.id, " has a wrong segment");
    expect(s.version == (r.pinned >= 0   ? r.pinned
                         : r.adapter < 0 ? 0
                                         : adapters_.at(r.adapter).version),
           "request ", s.id, " runs under version ", s.version);
    if (fresh) {
      expect(s.kind == Kind::prefill && s.position % config_.page_size == 0, "request ", s.id, " begins at ", s.position);
      expect(s.position == 0 || (r.use_cache && config_.prefix_caching), "request ", s.id, " used the prefix cache");
    } else {
      expect(s.position == r.computed, "request ", s.id, ": position ", s.position, ", expected ", r.computed);
      expect((s.kind == Kind::decode) == r.decoding, "request ", s.id, " has the wrong kind");
    }
    expect(s.kind != Kind::decode || (s.rows == 1 && s.position == r.length() - 1), "request ", s.id, " decodes ", s.rows,
           " rows at ", s.position);
    expect(s.position + s.rows <= r.length() && s.samples == (s.position + s.rows == r.length()), "request ", s.id,
           " rows and samples disagree");
    const auto pages = planner_.pages(s.id);
    expect(static_cast<int64_t>(pages.size()) * config_.page_size >= s.position + s.rows, "request ", s.id, " has too few pages");
    for (size_t i = static_cast<size_t>(s.position / config_.page_size); i < pages.size();
         ++i) {  // written: nobody else may have them
      for (const auto& [id, other] : requests_) {
        if (id == s.id) continue;
        expect(std::ranges::find(planner_.pages(id), pages[i]) == planner_.pages(id).end(), "requests ", s.id, " and ", id,
               " both have page ", pages[i]);
      }
    }
  }

  void check_training(const Plan& plan, const StepBudget& budget,
                      std::map<int64_t, std::vector<std::pair<int64_t, int32_t>>>& examples) {
    for (auto& [adapter, planned] : examples) {
      std::sort(planned.begin(), planned.end());
      size_t i = 0;
      for (const int64_t id : (adapter < 0 ? base_ : adapters_.at(adapter)).jobs) {
        const Job& job = jobs_.at(id);
        int32_t next = job.next;
        for (; i < planned.size() && planned[i] == std::pair{id, next}; ++i) ++next;
        if (next < static_cast<int32_t>(job.rows.size()) || job.barrier) break;
      }
      expect(i == planned.size(), "adapter ", adapter, ": an example is out of turn or passes a barrier");
    }
    const int32_t cap = budget.max_backward_slices < 0 ? config_.num_layers : budget.max_backward_slices;
    const bool begins = plan.rows[0] > 0;
    expect(!begins || micro_.layers == 0, "a micro-batch begins while another is under way");
    const int32_t layers = begins ? config_.num_layers : micro_.layers;
    expect(plan.backward_slices <= std::min(cap, layers), "too many backward layers");
    expect(!begins || plan.backward_slices == std::min(cap, layers), "a new micro-batch does not use its layers");
    seen_.cut_backwards += plan.backward_slices > 0 && plan.backward_slices < layers;
    std::vector<int64_t> completed;
    for (const auto& [id, job] : jobs_) {
      int32_t planned = 0;
      for (const auto& example : examples[job.adapter]) planned += example.first == id;
      const auto in_flight = micro_.examples.find(id);
      const bool backward_ends = plan.backward_slices == layers;
      int32_t done = job.done + (!job.train || (begins && backward_ends) ? planned : 0);
      if (!begins && backward_ends && in_flight != micro_.examples.end()) done += in_flight->second;
      if (done == static_cast<int32_t>(job.rows.size())) completed.push_back(id);
    }
    expect(completed == plan.completed_jobs, "other jobs are completed than expected");
  }

  void apply(const Plan& plan, const StepBudget& budget) {
    std::set<int64_t> served;
    std::set<int64_t> trained;
    for (const Segment& s : plan.segments) {
      seen_.rows[static_cast<size_t>(s.kind)] += s.rows;
      if (s.kind == Kind::train || s.kind == Kind::eval) {
        Job& job = jobs_.at(s.id);
        ++job.next;
        trained.insert(s.adapter);
        if (!job.train) ++job.done;
        else ++micro_.examples[s.id], micro_.uses.insert({s.adapter, s.version});
        continue;
      }
      served.insert(s.id);
      Request& r = requests_.at(s.id);
      if (!r.running) {
        r.running = true;
        r.versions.assign(static_cast<size_t>(s.position), s.version);  // a cached prefix is good under its own version only
        seen_.cached_tokens += s.position;
        if (r.pin && r.pinned < 0) r.pinned = s.version;
      }
      const auto pages = planner_.pages(s.id);
      for (int32_t p = s.position; p < s.position + s.rows; ++p) {
        r.versions.push_back(s.version);
        slots_[slot(pages, p)] = {s.adapter, s.version, r.hashes[static_cast<size_t>(p)]};
      }
      r.computed = s.position + s.rows;
      r.decoding = s.samples;
    }
    if (plan.rows[0] > 0) micro_.layers = config_.num_layers;
    const bool fair = budget.max_rows != 0 && budget.max_backward_slices != 0;
    wait(plan, served, trained, fair);
    planner_.commit(plan);
    micro_.layers -= plan.backward_slices;
    expect(planner_.pending_backward_slices() == micro_.layers, "backward layers left: ", planner_.pending_backward_slices(),
           ", expected ", micro_.layers);
    if (plan.backward_slices > 0 && micro_.layers == 0) {
      for (const auto& [id, count] : micro_.examples) jobs_.at(id).done += count;
      micro_ = {};
    }
    for (const int64_t id : plan.completed_jobs) {
      const Job job = jobs_.at(id);
      forget_job(id);
      ++seen_.completed;
      if (job.barrier && chance(90)) bump(job.adapter);
      expect(!planner_.remove_job(id), "a completed job is still known");
    }
    forget_adapters();
    for (const Segment& s : plan.segments) {
      if (!s.samples) continue;
      Request& r = requests_.at(s.id);
      const auto generated = r.length() - static_cast<int64_t>(r.prompt) + 1;
      const auto token = static_cast<int32_t>(pick(0, 1));
      if (generated >= r.max_tokens || chance(2)) {
        finish(s.id);
      } else {
        planner_.append_token(s.id, token);
        append(r, token);
      }
    }
    planner_.check_invariants();
    check_pages();
  }

  size_t slot(std::span<const int32_t> pages, int64_t position) const {
    return static_cast<size_t>(pages[static_cast<size_t>(position / config_.page_size)]) * static_cast<size_t>(config_.page_size) +
           static_cast<size_t>(position % config_.page_size);
  }

  void check_pages() {
    int64_t running = 0;
    for (const auto& [id, r] : requests_) {
      running += r.running;
      const auto pages = planner_.pages(id);
      expect(std::ranges::equal(planner_.tokens(id), r.tokens), "request ", id, " has other tokens");
      for (int64_t p = 0; p < r.computed; ++p) {
        const auto i = static_cast<size_t>(p);
        expect(slots_[slot(pages, p)] == Slot{r.adapter, r.versions[i], r.hashes[i]}, "request ", id,
               " reads another's row at position ", p);
      }
    }
    const PlannerStats stats = planner_.stats();
    expect(stats.running == running && stats.waiting + running == static_cast<int64_t>(requests_.size()),
           "requests are miscounted: ", stats.running, " run, ", stats.waiting, " wait, expected ", running, " of ",
           requests_.size());
    int64_t queued = 0;
    for (const auto& [id, job] : jobs_) queued += static_cast<int64_t>(job.rows.size()) - job.next;
    expect(stats.queued_examples == queued, "examples are miscounted: ", stats.queued_examples, ", expected ", queued);
  }

  // Nothing waits for ever: steps with a budget that passed since a thing that could go on did go on.
  void wait(const Plan& plan, const std::set<int64_t>& served, const std::set<int64_t>& trained, bool fair) {
    for (auto& [id, r] : requests_) {
      r.waited = served.contains(id) ? 0 : r.waited + fair;
      auto& longest = r.decoding ? seen_.longest_decode_wait : seen_.longest_request_wait;
      longest = std::max(longest, r.waited);
      expect(r.waited < 4000, "request ", id, " has waited ", r.waited, " steps");
    }
    const auto queue = [&](int64_t id, Adapter& a) {
      a.waited = a.jobs.empty() || trained.contains(id) || micro_.examples.contains(a.jobs.front())
                     ? 0
                     : a.waited + (fair && micro_.layers == 0);
      seen_.longest_example_wait = std::max(seen_.longest_example_wait, a.waited);
      expect(a.waited < 200, "the examples of adapter ", id, " have waited ", a.waited, " steps");
    };
    queue(-1, base_);
    for (auto& [id, a] : adapters_) queue(id, a);
    micro_.waited = plan.backward_slices > 0 || micro_.layers == 0 ? 0 : micro_.waited + fair;
    seen_.longest_backward_wait = std::max(seen_.longest_backward_wait, micro_.waited);
    expect(micro_.waited < 100, "the backward has waited ", micro_.waited, " steps");
  }

  void drain() {
    for (int64_t i = 0; planner_.has_work(); ++i) {
      expect(i < 20000, "work does not end");
      step(false);
    }
    expect(requests_.empty() && jobs_.empty() && micro_.layers == 0, "no work is said, some is left");
    const PlannerStats stats = planner_.stats();
    expect(stats.pages_free + stats.pages_cached == config_.kv_pages, "pages leaked: ", stats.pages_free, " free, ",
           stats.pages_cached, " cached of ", config_.kv_pages);
    expect(stats.waiting == 0 && stats.running == 0 && stats.queued_examples == 0, "counters are not zero at the end");
    for (const auto& [id, a] : adapters_) planner_.remove_adapter(id);
    const Plan nothing = planner_.plan();
    expect(nothing.empty(), "an empty planner plans work");
    planner_.commit(nothing);
    planner_.check_invariants();
  }

  uint64_t seed_;
  std::mt19937_64 random_;
  Seen& seen_;
  PlannerConfig config_;
  Planner planner_;
  std::map<int64_t, Adapter> adapters_;
  Adapter base_;
  std::map<int64_t, Request> requests_;
  std::map<int64_t, Job> jobs_;
  Micro micro_;
  std::vector<Slot> slots_;
  int64_t next_id_ = 0;
  int64_t step_ = 0;
  int64_t arrivals_ = 0, jobs_wanted_ = 0;  // percent a step
};

}  // namespace loquetier::test
