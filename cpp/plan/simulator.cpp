#include "plan/simulator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "core/check.h"
#include "core/random.h"
#include "plan/slices.h"

namespace loquetier {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Standard normal, a function of (seed, step): Box and Muller.
double normal(uint64_t seed, int64_t step) {
  const Philox4 bits = philox(mix_key(seed, 1), static_cast<uint64_t>(step), 0);
  return std::sqrt(-2 * std::log(uniform01(bits.v[0]))) * std::cos(2 * M_PI * static_cast<double>(uniform01(bits.v[1])));
}

void check(const SimulationOptions& o, std::span<const SimulatedRequest> requests, std::span<const SimulatedTrainer> trainers) {
  const auto adapters = static_cast<int64_t>(o.adapters.size());
  require(o.seconds > 0 && o.steps >= 0 && o.max_queue >= 1 && o.ahead >= 1 && o.noise >= 0,
          "[simulate] seconds, steps, max_queue, ahead, noise: expected > 0, >= 0, >= 1, >= 1, >= 0, got ", o.seconds, ", ",
          o.steps, ", ", o.max_queue, ", ", o.ahead, ", ", o.noise);
  double before = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const SimulatedRequest& r = requests[i];
    require(r.arrived >= before, "[simulate] request ", i, " arrived: expected ascending times from 0, got ", r.arrived, " after ",
            before);
    require(r.adapter >= -1 && r.adapter < adapters, "[simulate] request ", i, " adapter: expected -1 .. ", adapters - 1, ", got ",
            r.adapter);
    require(r.prompt >= 1 && r.output >= 1, "[simulate] request ", i, ": expected a prompt and an output, got ", r.prompt, " and ",
            r.output, " tokens");
    before = r.arrived;
  }
  std::vector<bool> taken(static_cast<size_t>(adapters));
  for (size_t i = 0; i < trainers.size(); ++i) {
    const SimulatedTrainer& t = trainers[i];
    require(t.adapter >= 0 && t.adapter < adapters && !taken[static_cast<size_t>(t.adapter)], "[simulate] trainer ", i,
            " adapter: expected one of its own below ", adapters, ", got ", t.adapter);
    taken[static_cast<size_t>(t.adapter)] = true;
    require(t.batch >= 1 && t.accumulation >= 1 && !t.lengths.empty() && *std::ranges::min_element(t.lengths) >= 1,
            "[simulate] trainer ", i, ": expected a batch, an accumulation and examples of at least one row");
    require(*std::ranges::max_element(t.lengths) <= o.planner.max_batch_tokens, "[simulate] trainer ", i,
            " lengths: expected at most max_batch_tokens (", o.planner.max_batch_tokens, ") rows an example, got ",
            *std::ranges::max_element(t.lengths));
  }
}

PlannerConfig config_of(const SimulationOptions& o, const CostModel& truth) {
  PlannerConfig config = o.planner;
  config.cost = o.believed ? o.believed : &truth;
  return config;
}

class Simulation {
 public:
  Simulation(const SimulationOptions& options, const CostModel& truth, std::span<const SimulatedRequest> requests,
             std::span<const SimulatedTrainer> trainers)
      : options_(options),
        truth_(truth),
        requests_(requests),
        trainers_(trainers),
        planner_(config_of(options, truth)),
        waited_(requests.size(), 0) {
    for (size_t i = 0; i < options.adapters.size(); ++i) planner_.add_adapter(static_cast<int64_t>(i), options.adapters[i], 0);
    versions_.resize(options.adapters.size(), 0);
    states_.resize(trainers.size());
    for (size_t i = 0; i < trainers.size(); ++i) states_[i].since = trainers[i].begins;
    result_.requests.resize(requests.size());
    result_.longest_training.resize(trainers.size());
  }

  SimulationResult run() {
    while (result_.steps < options_.steps && now_ < options_.seconds) {
      take_in();
      if (options_.until_served && open_ == 0 && next_ == requests_.size()) break;
      if (!planner_.has_work()) {
        const double next = next_event();
        if (next == kNever) break;
        now_ = std::min(next, options_.seconds);
        continue;
      }
      step();
    }
    for (size_t i = 0; i < trainers_.size(); ++i) note_training(i);
    result_.seconds = now_;
    result_.preemptions = planner_.stats().preemptions;
    const bool learned = options_.believed != nullptr;
    result_.error_p50 = learned ? options_.believed->error_quantile(0.5) : std::numeric_limits<double>::quiet_NaN();
    result_.error_p95 = learned ? options_.believed->error_quantile(0.95) : std::numeric_limits<double>::quiet_NaN();
    return std::move(result_);
  }

 private:
  struct Trainer {
    size_t next = 0;         // example
    int32_t mini_batch = 0;  // submitted, of the optimizer step
    int32_t queued = 0;      // mini-batches
    double since = 0;        // the last one was done, or the first came
    bool begun = false;
  };
  struct Job {
    size_t trainer = 0;
    int64_t tokens = 0;
    bool update = false;
  };

  void take_in() {
    for (; next_ < requests_.size() && requests_[next_].arrived <= now_; ++next_) {
      const SimulatedRequest& r = requests_[next_];
      if (waiting_ >= options_.max_queue) {
        result_.requests[next_].refused = true;
        continue;
      }
      RequestSpec spec;
      spec.id = static_cast<int64_t>(next_);
      spec.adapter = r.adapter;
      spec.priority = r.priority;
      spec.prompt.assign(static_cast<size_t>(r.prompt), static_cast<int32_t>(next_));
      spec.max_tokens = r.output;
      spec.arrived = r.arrived;
      spec.deadline = r.ttft < 0 ? -1 : r.arrived + r.ttft;
      spec.reject_late = r.reject_late;
      planner_.add_request(std::move(spec));
      ++waiting_;
      ++open_;
    }
    for (size_t i = 0; i < trainers_.size(); ++i) {
      if (trainers_[i].begins <= now_) top_up(i);
    }
    result_.most_waiting = std::max(result_.most_waiting, waiting_);
    result_.most_running = std::max(result_.most_running, open_ - waiting_);
    result_.most_queued_examples = std::max(result_.most_queued_examples, planner_.stats().queued_examples);
  }

  void top_up(size_t i) {
    const SimulatedTrainer& trainer = trainers_[i];
    Trainer& state = states_[i];
    state.begun = true;
    while (state.queued < options_.ahead * trainer.accumulation) {
      JobSpec spec;
      spec.id = static_cast<int64_t>(requests_.size()) + next_job_++;
      spec.adapter = trainer.adapter;
      spec.weight = trainer.weight;
      spec.barrier = ++state.mini_batch == trainer.accumulation;
      if (spec.barrier) state.mini_batch = 0;
      Job job{i, 0, spec.barrier};
      for (int32_t k = 0; k < trainer.batch; ++k, ++state.next) {
        spec.rows.push_back(trainer.lengths[state.next % trainer.lengths.size()]);
        job.tokens += spec.rows.back();
      }
      ++state.queued;
      jobs_.emplace(spec.id, job);
      planner_.add_job(std::move(spec));
    }
  }

  double next_event() const {
    double next = next_ < requests_.size() ? requests_[next_].arrived : kNever;
    for (size_t i = 0; i < trainers_.size(); ++i) {
      if (!states_[i].begun) next = std::min(next, trainers_[i].begins);
    }
    return next;
  }

  void step() {
    for (const int64_t id : planner_.late(now_)) {
      result_.requests[static_cast<size_t>(id)].rejected = true;
      end(id);
    }
    if (!planner_.has_work()) return;
    StepBudget budget;
    budget.now = now_;
    const Plan plan = planner_.plan(budget);
    require<std::logic_error>(!plan.empty(), "[simulate] step ", result_.steps, ": the planner has work and plans none");
    const double factor = options_.noise > 0 ? std::exp(options_.noise * normal(options_.seed, result_.steps)) : 1;
    const int32_t all = begin_slices(plan);
    StepOutcome outcome = after(plan, all);
    const auto seconds_of = [&](const StepOutcome& o) { return truth_.predict(planner_.work_of(plan, o)) * factor; };
    double seconds = seconds_of(outcome);
    if (plan.interruptible && next_ < requests_.size() && requests_[next_].arrived < now_ + seconds) {
      const double until = requests_[next_].arrived - now_;
      int32_t low = 0, high = all;  // the fewest slices with which the step lasts until the arrival
      while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (seconds_of(after(plan, middle)) >= until) high = middle;
        else low = middle + 1;
      }
      if (plan.chunk_leaves && leaves_pass(plan, until / seconds_of(after(plan, 0)), outcome)) {
        ++result_.interrupted;
        seconds = seconds_of(outcome);
      } else if (low < all) {
        if (seconds_of(after(plan, low)) <= 0) ++low;  // a step does something
        ++result_.interrupted;
        outcome = after(plan, low);
        seconds = seconds_of(outcome);
      }
    }
    require<std::logic_error>(seconds > 0, "[simulate] step ", result_.steps, ": expected that it takes time, got ", seconds, " s");
    const double began = now_;
    now_ += seconds;
    outcome.now = now_;
    result_.busy += seconds;
    result_.longest_step = std::max(result_.longest_step, seconds);
    if (plan.rows[static_cast<size_t>(Kind::decode)] > 0) {
      result_.longest_serving_step = std::max(result_.longest_serving_step, seconds);
    }
    if (options_.believed) options_.believed->observe(planner_.work_of(plan, outcome), seconds);
    const bool trains =
        plan.rows[static_cast<size_t>(Kind::train)] > 0 || outcome.forward_slices > 0 || outcome.backward_slices > 0;
    training_wait_ = trains || jobs_.empty() ? 0 : training_wait_ + 1;
    result_.longest_training_wait_steps = std::max(result_.longest_training_wait_steps, training_wait_);
    if (plan.forward_slices > 0) chunk_done_ = outcome.forward_done ? 0 : chunk_done_ + outcome.forward_slices;
    const std::vector<int64_t> completed = planner_.commit(plan, outcome);
    ++result_.steps;
    note_rows(plan, began);
    for (const int64_t id : completed) complete(id);
    if (options_.check_every > 0 && result_.steps % options_.check_every == 0) planner_.check_invariants();
  }

  // Notes the chunk that the plan's forward slices belong to; returns how many slices there are to run, backward's included.
  int32_t begin_slices(const Plan& plan) {
    if (plan.forward_slices > 0 && !plan.resumes) {
      chunk_slices_ = slices_of_chunk(plan);
      chunk_done_ = 0;
    }
    return forward_left(plan) + plan.backward_slices;
  }

  int32_t slices_of_chunk(const Plan& plan) const {
    const int32_t rows = plan.rows[static_cast<size_t>(Kind::train)];  // each with a loss
    return options_.planner.num_layers + (rows + kHeadSlice - 1) / kHeadSlice;
  }

  // A chunk that shares its pass with other rows leaves it behind the layer that is under way when a request comes, which is after
  // `share` of the pass. False: there is none, it is done by then, or training is not in pieces.
  bool leaves_pass(const Plan& plan, double share, StepOutcome& outcome) {
    const bool shares = plan.rows[static_cast<size_t>(Kind::train)] > 0 && plan.forward_slices == 0;
    if (!shares || options_.planner.slice_rows == 0) return false;
    const int32_t slices = slices_of_chunk(plan);
    const double done = std::ceil(share * slices);
    if (!(done < slices)) return false;
    chunk_slices_ = slices;
    chunk_done_ = outcome.forward_slices = static_cast<int32_t>(done);
    outcome.forward_done = false;
    outcome.backward_slices = 0;
    return true;
  }

  // Of the plan's forward slices, a bound, those that the chunk has left.
  int32_t forward_left(const Plan& plan) const { return std::min(plan.forward_slices, chunk_slices_ - chunk_done_); }

  // The outcome when the step ends behind so many slices.
  StepOutcome after(const Plan& plan, int32_t slices) const {
    StepOutcome outcome;
    outcome.forward_slices = std::min(slices, forward_left(plan));
    outcome.forward_done = plan.forward_slices == 0 || chunk_done_ + outcome.forward_slices == chunk_slices_;
    outcome.backward_slices = outcome.forward_done ? slices - outcome.forward_slices : 0;
    return outcome;
  }

  void note_rows(const Plan& plan, double began) {
    for (size_t kind = 0; kind < 4; ++kind) result_.rows[kind] += plan.rows[kind];
    for (const int64_t id : plan.preempted) {
      ++result_.requests[static_cast<size_t>(id)].preemptions;
      waited_[static_cast<size_t>(id)] = 0;  // it waits in the queue, not as a running request
      running_.erase(std::ranges::find(running_, id));
      ++waiting_;
    }
    for (const Segment& s : plan.segments) {
      if (s.kind != Kind::prefill && s.kind != Kind::decode) continue;
      const auto i = static_cast<size_t>(s.id);
      SimulatedRequestResult& r = result_.requests[i];
      if (r.scheduled < 0) r.scheduled = began;
      if (waited_[i] == 0) {
        running_.push_back(s.id);
        --waiting_;
      }
      waited_[i] = result_.steps;
      if (s.samples) token(s.id);
    }
    for (const int64_t id : running_) {
      result_.longest_wait_steps = std::max(result_.longest_wait_steps, result_.steps - waited_[static_cast<size_t>(id)]);
    }
  }

  void token(int64_t id) {
    SimulatedRequestResult& r = result_.requests[static_cast<size_t>(id)];
    if (r.tokens == 0) r.first = now_;
    else r.longest_gap = std::max(r.longest_gap, now_ - r.last);
    r.last = now_;
    if (++r.tokens == requests_[static_cast<size_t>(id)].output) end(id);
    else planner_.append_token(id, static_cast<int32_t>(id));
  }

  void end(int64_t id) {
    planner_.finish(id);
    --open_;
    if (const auto at = std::ranges::find(running_, id); at != running_.end()) {
      *at = running_.back();
      running_.pop_back();
    } else {
      --waiting_;
    }
  }

  void complete(int64_t id) {
    const auto at = jobs_.find(id);
    require<std::logic_error>(at != jobs_.end(), "[simulate] job ", id, " was completed and is not queued");
    const Job job = at->second;
    jobs_.erase(at);
    Trainer& state = states_[job.trainer];
    --state.queued;
    note_training(job.trainer);
    state.since = now_;
    result_.trained.push_back({now_, static_cast<int32_t>(job.trainer), job.tokens, job.update});
    if (job.update) {
      const int64_t adapter = trainers_[job.trainer].adapter;
      planner_.set_version(adapter, ++versions_[static_cast<size_t>(adapter)]);
    }
  }

  void note_training(size_t trainer) {
    if (!states_[trainer].begun) return;
    double& longest = result_.longest_training[trainer];
    longest = std::max(longest, now_ - states_[trainer].since);
  }

  const SimulationOptions& options_;
  const CostModel& truth_;
  std::span<const SimulatedRequest> requests_;
  std::span<const SimulatedTrainer> trainers_;
  Planner planner_;
  double now_ = 0;
  size_t next_ = 0;                 // request to come
  int64_t waiting_ = 0, open_ = 0;  // requests that have no pages; that are not at their end
  std::vector<int64_t> running_;    // have had rows and not ended
  std::vector<int64_t> waited_;     // per request: the step with its latest rows, from 1; 0: none, or pre-empted
  std::vector<int64_t> versions_;   // per adapter
  std::vector<Trainer> states_;
  std::unordered_map<int64_t, Job> jobs_;
  int64_t next_job_ = 0;
  int64_t training_wait_ = 0;                  // steps
  int32_t chunk_slices_ = 0, chunk_done_ = 0;  // of the chunk in forward slices: all, and run so far
  SimulationResult result_;
};

}  // namespace

SimulationResult simulate(const SimulationOptions& options, const CostModel& truth, std::span<const SimulatedRequest> requests,
                          std::span<const SimulatedTrainer> trainers) {
  check(options, requests, trainers);
  return Simulation(options, truth, requests, trainers).run();
}

}  // namespace loquetier
