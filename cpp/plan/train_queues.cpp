#include "plan/train_queues.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "core/check.h"

namespace loquetier {

namespace {

constexpr int kMisses =
    64;  // queues of a list that may get nothing before a step looks no further: bounds the work when thousands wait

}  // namespace

TrainQueues::TrainQueues(AdapterTable& adapters, const PlannerConfig& config) : adapters_(adapters), config_(config) {}

void TrainQueues::add(JobSpec&& spec, uint64_t arrival) {
  require(!jobs_.contains(spec.id), "[planner] job: ", spec.id, " is already there");
  PlannedAdapter& adapter = adapters_.find_open(spec.adapter, "add_job");
  require(!spec.train || spec.adapter >= 0, "[planner] job ", spec.id, ": the base model is not trained");
  require(!spec.rows.empty(), "[planner] job ", spec.id, " rows: expected at least one example, got none");
  for (size_t i = 0; i < spec.rows.size(); ++i) {
    require(spec.rows[i] >= 1 && spec.rows[i] <= config_.max_batch_tokens, "[planner] job ", spec.id, " rows of example ", i,
            ": expected 1 .. ", config_.max_batch_tokens, " (max_batch_tokens), got ", spec.rows[i]);
  }
  require(spec.targets.empty() || spec.targets.size() == spec.rows.size(), "[planner] job ", spec.id, " targets: expected ",
          spec.rows.size(), " or none, got ", spec.targets.size());
  require(spec.weight > 0 && std::isfinite(spec.weight), "[planner] job ", spec.id, " weight: expected > 0, got ", spec.weight);
  if (!adapter.training) {
    TrainQueue& queue = blocked_.emplace_back();
    queue.adapter = &adapter;
    queue.list = &blocked_;
    queue.place = std::prev(blocked_.end());
    adapter.training = &queue;
    weights_.insert(queue.weight);
  }
  weigh(*adapter.training, spec.weight);
  PlannedJob& job = jobs_[spec.id];
  job.id = spec.id;
  job.queue = adapter.training;
  job.train = spec.train;
  job.barrier = spec.barrier;
  job.arrival = arrival;
  job.targets = spec.targets.empty() ? spec.rows : std::move(spec.targets);
  job.lowest_layer = spec.lowest_layer;
  job.rows = std::move(spec.rows);
  queued_ += job.size();
  job.queue->jobs.push_back(&job);
  adapters_.add_user(adapter);
  refresh(*job.queue, false);
}

void TrainQueues::weigh(TrainQueue& queue, double weight) {
  weights_.erase(weights_.find(queue.weight));
  weights_.insert(weight);
  queue.weight = weight;
}

// ---------------------------------------------------------------- which example comes next

PlannedJob* TrainQueues::next_of(const TrainQueue& queue, size_t cursor) const {
  for (; cursor < queue.jobs.size(); ++cursor) {
    if (cursor > 0 && queue.jobs[cursor - 1]->barrier) return nullptr;
    PlannedJob* job = queue.jobs[cursor];
    if (job->next + job->taken < job->size()) return job;
  }
  return nullptr;
}

// Puts the queue into the list where its next example belongs, at the end when it comes there or was served.
void TrainQueues::refresh(TrainQueue& queue, bool served) {
  while (queue.cursor < queue.jobs.size() && queue.jobs[queue.cursor]->next == queue.jobs[queue.cursor]->size()) ++queue.cursor;
  const PlannedJob* job = next_of(queue, queue.cursor);
  std::list<TrainQueue>& list = !job ? blocked_ : job->train ? training_ : evaluation_;
  if (queue.jobs.empty()) queue.deficit = 0;  // behind a barrier it keeps its credit, or short accumulations lose their share
  if (queue.list == &list && !served) return;
  list.splice(list.end(), *queue.list, queue.place);
  queue.list = &list;
  queue.passed = 0;
}

TrainQueue* TrainQueues::oldest() const {
  const TrainQueue* train = may_train() && !training_.empty() ? &training_.front() : nullptr;
  const TrainQueue* eval = evaluation_.empty() ? nullptr : &evaluation_.front();
  return const_cast<TrainQueue*>(!train ? eval : !eval || train->passed >= eval->passed ? train : eval);
}

int64_t TrainQueues::example_age() const {
  const TrainQueue* queue = oldest();
  return queue ? queue->passed : -1;
}

int32_t TrainQueues::oldest_rows() const {
  const PlannedJob* job = next_of(*oldest(), oldest()->cursor);
  return job->rows[static_cast<size_t>(job->next + job->taken)];
}

int64_t TrainQueues::micro_age() const {
  const bool forward = micro_.forwarded < micro_.rows.rows;
  return may_train() || (!forward && max_slices_ == 0) ? -1 : micro_.passed;
}

// ---------------------------------------------------------------- one plan

void TrainQueues::begin(uint64_t serial, int32_t max_slices) {
  serial_ = serial;
  max_slices_ = max_slices < 0 ? INT32_MAX : max_slices;
  chunk_now_ = forward_slices_now_ = slices_now_ = 0;
  begins_ = false;
  fresh_ = {};
  taken_.clear();
  touched_.clear();
  completed_.clear();
}

void TrainQueues::touch(TrainQueue& queue) {
  if (queue.serial == serial_) return;
  queue.serial = serial_;
  queue.plan_cursor = queue.cursor;
  queue.plan_deficit = queue.deficit;
  queue.served = queue.missed = false;
  queue.turn = 0;
  touched_.push_back(&queue);
}

TrainQueues::Take TrainQueues::take(TrainQueue& queue, StepLimits& limits, bool on_credit) {
  touch(queue);
  PlannedJob* job = next_of(queue, queue.plan_cursor);
  if (!job || (job->train && !may_train())) return Take::nothing;
  if (config_.slice_rows > 0 && job->train != composing_) return Take::nothing;
  const int32_t example = job->next + job->taken;
  const int32_t rows = job->rows[static_cast<size_t>(example)];
  if (rows > limits.rows_left || (job->train && rows > limits.train_rows_left) || !limits.fits(*queue.adapter->newest)) {
    queue.missed = true;
    return Take::no_room;
  }
  if (!on_credit && rows > queue.plan_deficit) return Take::no_credit;
  limits.claim(*queue.adapter->newest);
  if (job->train) limits.begin_training();
  limits.take_rows(rows);
  taken_.push_back({job, example});
  ++job->taken;
  while (queue.plan_cursor < queue.jobs.size() &&
         queue.jobs[queue.plan_cursor]->next + queue.jobs[queue.plan_cursor]->taken == queue.jobs[queue.plan_cursor]->size()) {
    ++queue.plan_cursor;
  }
  queue.plan_deficit -= rows;
  queue.served = true;
  begins_ |= job->train;
  return Take::taken;
}

bool TrainQueues::serve_oldest(StepLimits& limits) { return take(*oldest(), limits, true) == Take::taken; }

bool TrainQueues::claim_micro(StepLimits& limits) {
  int64_t bytes = 0;
  for (const AdapterVersion* version : micro_.versions) bytes += version->claimed == limits.serial ? 0 : version->bytes;
  if (bytes > limits.bytes_left) return false;
  for (AdapterVersion* version : micro_.versions) limits.claim(*version);
  return true;
}

void TrainQueues::run_backward(StepLimits& limits) {
  if (may_train() || slices_now_ > 0 || max_slices_ == 0 || !claim_micro(limits)) return;
  slices_now_ = std::min(max_slices_, micro_.slices_left);
}

void TrainQueues::serve(StepLimits& limits) {
  if (may_train()) serve_lists(limits, {&training_, &evaluation_});
  else serve_lists(limits, {&evaluation_});
}

void TrainQueues::serve_evaluation(StepLimits& limits) { serve_lists(limits, {&evaluation_}); }

MicroRows::Piece TrainQueues::evaluation() const {
  MicroRows::Piece sum;
  for (const Taken& t : taken_) {
    if (t.job->train) continue;
    const double rows = t.job->rows[static_cast<size_t>(t.example)];
    sum.rows += static_cast<int32_t>(rows);
    sum.pairs += rows * (rows + 1) / 2;
    sum.heads += t.job->targets[static_cast<size_t>(t.example)];
  }
  return sum;
}

void TrainQueues::serve_lists(StepLimits& limits, std::initializer_list<std::list<TrainQueue>*> lists) {
  const double heaviest = weights_.empty() ? 1 : *weights_.rbegin();
  const auto quantum_of = [&](const TrainQueue& queue) {
    const double share = static_cast<double>(config_.max_batch_tokens) / 8 * queue.weight / heaviest;
    return std::max<int64_t>(1, static_cast<int64_t>(share));
  };
  const auto earn = [&](TrainQueue& queue) {
    touch(queue);
    queue.turn = ++turns_;
    queue.plan_deficit = std::min(queue.plan_deficit + quantum_of(queue), config_.max_batch_tokens);
  };
  bool full = false;                          // somebody's next example does not fit the rows that are left
  std::vector<TrainQueue*> held;              // behind a barrier, with more to come
  const auto turn = [&](TrainQueue& queue) {  // true: only its credit ended
    earn(queue);
    Take result = Take::taken;
    while (result == Take::taken && limits.rows_left > 0) result = take(queue, limits, false);
    full |= result == Take::no_room && limits.fits(*queue.adapter->newest);
    if (result == Take::nothing && queue.plan_cursor < queue.jobs.size()) held.push_back(&queue);
    return result == Take::no_credit;
  };
  std::vector<TrainQueue*> again;
  bool cut = false;
  for (auto* list : lists) {
    int misses = 0;
    for (TrainQueue& queue : *list) {
      if (limits.rows_left <= 0 || misses == kMisses) break;
      if (turn(queue)) again.push_back(&queue);
      else misses += queue.served ? 0 : 1;
    }
    cut |= misses == kMisses;
  }
  if (cut) {  // those that have a place in the pool are served though far behind
    for (size_t i = 0; i < limits.claimed.size() && limits.rows_left > 0; ++i) {
      TrainQueue* queue = limits.claimed[i]->adapter->training;
      const bool listed = queue && std::ranges::find(lists, queue->list) != lists.end();
      if (listed && queue->serial != serial_ && turn(*queue)) again.push_back(queue);
    }
  }
  // Rounds end for all alike, and there is none after somebody did not fit: credit that some earn and others do not would shift the
  // shares.
  while (!again.empty() && limits.rows_left > 0 && !full) {
    for (TrainQueue* queue : held) earn(*queue);
    std::erase_if(again, [&](TrainQueue* queue) {
      if (limits.rows_left > 0) return !turn(*queue);
      earn(*queue);
      return false;
    });
  }
}

// ---------------------------------------------------------------- a micro-batch that comes in pieces

void TrainQueues::compose(StepLimits& limits, int64_t rows, bool oldest_first) {
  if (!may_train() || begins_ || training_.empty()) return;
  const int64_t step_rows = limits.rows_left, hard_rows = limits.hard_rows_left, train_rows = limits.train_rows_left;
  TrainQueue& first = training_.front();
  const PlannedJob* job = next_of(first, first.cursor);
  // One example alone may be longer than what composition aims at.
  const int64_t most = config_.max_train_tokens < 0 ? config_.max_batch_tokens : config_.max_train_tokens;
  limits.rows_left = limits.hard_rows_left = std::max<int64_t>(std::min(rows, most), job->rows[static_cast<size_t>(job->next)]);
  limits.train_rows_left = limits.rows_left;
  composing_ = true;
  if (oldest_first) take(first, limits, true);
  serve_lists(limits, {&training_});
  composing_ = false;
  limits.rows_left = step_rows;
  limits.hard_rows_left = hard_rows;
  limits.train_rows_left = train_rows;
  if (begins_) fill_fresh();
}

void TrainQueues::fill_fresh() {
  sort_taken();
  for (const Taken& t : taken_) {
    if (!t.job->train) continue;
    const AdapterVersion& version = *t.job->queue->adapter->newest;
    const auto i = static_cast<size_t>(t.example);
    fresh_.add({t.job->id, t.example, version.adapter->id, version.version, 0, t.job->rows[i]}, t.job->targets[i],
               t.job->lowest_layer);
  }
  fresh_.cut(config_.slice_rows, config_.rerun);
}

void TrainQueues::drop_composition() {
  std::erase_if(taken_, [](const Taken& t) {
    if (t.job->train) t.job->taken = 0;
    return t.job->train;
  });
  for (TrainQueue* queue : touched_) {
    if (queue->list != &training_) continue;
    queue->plan_cursor = queue->cursor;
    queue->plan_deficit = queue->deficit;
    queue->missed |= queue->served;
    queue->served = false;
  }
  begins_ = false;
  fresh_ = {};
}

void TrainQueues::sort_taken() {
  std::sort(taken_.begin(), taken_.end(), [](const Taken& a, const Taken& b) {
    const auto key = [](const Taken& t) {
      const PlannedAdapter& adapter = *t.job->queue->adapter;
      return std::make_tuple(!t.job->train, adapter.id, adapter.newest->version, t.job->arrival, t.example);
    };
    return key(a) < key(b);
  });
}

// ---------------------------------------------------------------- the result

void TrainQueues::emit(Plan& plan) {
  sort_taken();
  if (config_.slice_rows == 0 && begins_) {
    fill_fresh();
    chunk_now_ = fresh_.rows;
    slices_now_ = std::min(max_slices_, fresh_.slices(config_.num_layers));
  }
  const auto list_version = [&](AdapterVersion& version) {
    if (version.adapter->id < 0 || version.listed == serial_) return;
    version.listed = serial_;
    plan.adapters.push_back({version.adapter->id, version.version});
  };
  // All of a micro-batch's adapters are named with any piece of it.
  if (begins_) {
    for (const Taken& t : taken_) {
      if (t.job->train) list_version(*t.job->queue->adapter->newest);
    }
  } else if (chunk_now_ + forward_slices_now_ + slices_now_ > 0) {
    for (AdapterVersion* version : micro_.versions) list_version(*version);
  }
  const MicroRows& micro = micro_rows();
  const int32_t begin = forward_begin(), end = begin + chunk_now_;
  plan.micro_row = chunk_now_ > 0 ? begin : 0;
  if (begins_) plan.micro_batch = micro.examples;
  for (const MicroExample& e : micro.examples) {
    const int32_t first = std::max(begin - e.row_begin, 0), rows = std::min(end - e.row_begin, e.rows) - first;
    if (rows <= 0) continue;
    plan.segments.push_back({.kind = Kind::train,
                             .id = e.job,
                             .example = e.example,
                             .adapter = e.adapter,
                             .version = e.version,
                             .row_begin = plan.total_rows(),
                             .rows = rows,
                             .position = first,
                             .samples = false});
    plan.rows[static_cast<size_t>(Kind::train)] += rows;
  }
  for (const Taken& t : taken_) {
    if (t.job->train) continue;
    AdapterVersion& version = *t.job->queue->adapter->newest;
    const int32_t rows = t.job->rows[static_cast<size_t>(t.example)];
    plan.segments.push_back({.kind = Kind::eval,
                             .id = t.job->id,
                             .example = t.example,
                             .adapter = version.adapter->id,
                             .version = version.version,
                             .row_begin = plan.total_rows(),
                             .rows = rows,
                             .position = 0,
                             .samples = false});
    plan.rows[static_cast<size_t>(Kind::eval)] += rows;
    list_version(version);
  }
  plan.forward_slices = forward_slices_now_;
  plan.resumes = forward_slices_now_ > 0 && chunk_now_ == 0;
  plan.backward_slices = slices_now_;

  std::vector<PlannedJob*> completed;
  const int32_t left = micro_.slices_left > 0 ? micro_.slices_left : micro.slices(config_.num_layers);
  const bool ends = slices_now_ > 0 && slices_now_ == left;  // the micro-batch
  for (const Taken& t : taken_) {                            // a job's examples are adjacent and counted at its last one
    if (t.job->train && !ends) continue;
    if (t.example == t.job->size() - 1) completed.push_back(t.job);
  }
  if (!begins_ && ends) {
    for (const auto& [job, count] : micro_.examples) {
      if (job->done + count == job->size()) completed.push_back(job);
    }
  }
  std::ranges::sort(completed, {}, &PlannedJob::arrival);
  for (const PlannedJob* job : completed) completed_.push_back(job->id);
  plan.completed_jobs = completed_;
}

// ---------------------------------------------------------------- what a plan leaves behind

std::vector<int64_t> TrainQueues::commit(const Plan& plan, const StepOutcome& outcome, bool rows_offered, bool slices_offered) {
  const bool could_train = may_train();
  if (rows_offered) note_passed();
  for (const Taken& t : taken_) {
    PlannedJob& job = *t.job;
    ++job.next;
    job.taken = 0;
    --queued_;
    if (!job.train) {
      ++job.done;
      continue;
    }
    AdapterVersion* version = job.queue->adapter->newest;
    if (std::ranges::find(micro_.versions, version) == micro_.versions.end()) {
      micro_.versions.push_back(&adapters_.hold(*version->adapter, version->version));
      adapters_.add_user(*version->adapter);
    }
    if (micro_.examples.empty() || micro_.examples.back().first != &job) micro_.examples.push_back({&job, 0});
    ++micro_.examples.back().second;
  }
  if (begins_) {
    micro_.rows = std::move(fresh_);
    micro_.passed = 0;
  }
  // How far it came: rows, slices of a stopped chunk, slices of backward.
  const bool left_pass = chunk_now_ > 0 && forward_slices_now_ == 0 && !outcome.forward_done;
  const int32_t most = left_pass ? INT32_MAX : forward_slices_now_;
  const int32_t forward_ran = outcome.forward_slices < 0 ? forward_slices_now_ : std::min(outcome.forward_slices, most);
  if (left_pass || (forward_slices_now_ > 0 && !outcome.forward_done)) {
    if (chunk_now_ > 0) micro_.stopped = chunk_now_;
    micro_.stopped_slices += forward_ran;
  } else if (chunk_now_ > 0 || forward_slices_now_ > 0) {
    micro_.forwarded += chunk_now_ > 0 ? chunk_now_ : micro_.stopped;
    micro_.stopped = micro_.stopped_slices = 0;
    if (micro_.forwarded == micro_.rows.rows) micro_.slices_left = micro_.rows.slices(config_.num_layers);
  }
  int32_t backward_ran = outcome.backward_slices < 0 ? slices_now_ : std::min(outcome.backward_slices, slices_now_);
  if (micro_.forwarded < micro_.rows.rows) backward_ran = 0;
  const bool progress = chunk_now_ > 0 || forward_ran > 0 || backward_ran > 0;
  micro_.passed = progress ? 0 : micro_.passed + (slices_offered && !could_train);
  micro_.slices_left -= backward_ran;
  const bool ends = backward_ran > 0 && micro_.slices_left == 0;
  std::vector<int64_t> completed;
  for (const int64_t id : plan.completed_jobs) {
    if (!jobs_.at(id).train || ends) completed.push_back(id);
  }
  if (ends) finish_micro_batch();
  // Where the last round of turns was cut off, the next one goes on: else who comes first in a round would have more of them.
  std::ranges::stable_sort(touched_, {}, &TrainQueue::turn);
  for (TrainQueue* queue : touched_) {
    queue->deficit = queue->plan_deficit;  // also of who found no room: it comes first next time
    refresh(*queue, queue->served);
  }
  for (const int64_t id : completed) forget(jobs_.at(id));
  begin(0, 0);
  return completed;
}

// Who is next in turn and got nothing was passed over, and so was who was looked at and found no room.
void TrainQueues::note_passed() {
  for (TrainQueue* queue : touched_) queue->passed = queue->served ? 0 : queue->passed + queue->missed;
  for (auto* list : {&training_, &evaluation_}) {
    if (list->empty() || (list == &training_ && !may_train())) continue;
    TrainQueue& next = list->front();
    if (next.serial != serial_ || (!next.served && !next.missed)) ++next.passed;
  }
}

void TrainQueues::abort() {
  for (const Taken& t : taken_) t.job->taken = 0;
  begin(0, 0);
}

void TrainQueues::finish_micro_batch() {
  for (const auto& [job, count] : micro_.examples) job->done += count;
  for (AdapterVersion* version : micro_.versions) {
    PlannedAdapter& adapter = *version->adapter;
    adapters_.release(*version);
    adapters_.drop_user(adapter);
  }
  micro_ = {};
}

void TrainQueues::forget(PlannedJob& job) {
  TrainQueue& queue = *job.queue;
  PlannedAdapter& adapter = *queue.adapter;
  const auto place = std::ranges::find(queue.jobs, &job);
  if (static_cast<size_t>(place - queue.jobs.begin()) < queue.cursor) --queue.cursor;
  queue.jobs.erase(place);
  queued_ -= job.size() - job.next;
  std::erase_if(micro_.examples, [&](const auto& entry) { return entry.first == &job; });
  jobs_.erase(job.id);
  if (queue.jobs.empty()) {
    adapter.training = nullptr;
    weights_.erase(weights_.find(queue.weight));
    queue.list->erase(queue.place);
  } else {
    refresh(queue, false);
  }
  adapters_.drop_user(adapter);
}

bool TrainQueues::remove(int64_t job) {
  const auto found = jobs_.find(job);
  if (found == jobs_.end()) return false;
  forget(found->second);
  return true;
}

void TrainQueues::abandon_backward() {
  std::vector<PlannedJob*> lost;
  for (const auto& [job, count] : micro_.examples) lost.push_back(job);
  for (PlannedJob* job : lost) forget(*job);
  finish_micro_batch();
}

void TrainQueues::check_invariants() const {
  int64_t queued = 0;
  size_t jobs = 0;
  for (const auto* list : {&training_, &evaluation_, &blocked_}) {
    for (const TrainQueue& queue : *list) {
      const int64_t id = queue.adapter->id;
      require<std::logic_error>(queue.list == list && &*queue.place == &queue && queue.adapter->training == &queue,
                                "[planner] the training queue of adapter ", id, " is misplaced");
      const PlannedJob* next = next_of(queue, queue.cursor);
      require<std::logic_error>(list == (!next         ? &blocked_
                                         : next->train ? &training_
                                                       : &evaluation_),
                                "[planner] the training queue of adapter ", id, " is in the wrong list");
      require<std::logic_error>(!queue.jobs.empty() && queue.cursor <= queue.jobs.size(),
                                "[planner] the training queue of adapter ", id, " is empty");
      for (size_t i = 0; i < queue.jobs.size(); ++i) {
        const PlannedJob& job = *queue.jobs[i];
        int32_t in_flight = 0;
        for (const auto& [other, count] : micro_.examples) in_flight += other == &job ? count : 0;
        require<std::logic_error>(job.queue == &queue && job.taken == 0 && job.done < job.size() && job.next <= job.size(),
                                  "[planner] job ", job.id, " is misplaced or complete");
        require<std::logic_error>(job.done + in_flight == job.next, "[planner] job ", job.id, ": ", job.next, " examples planned, ",
                                  job.done, " done and ", in_flight, " in the micro-batch");
        require<std::logic_error>((i < queue.cursor) == (job.next == job.size()), "[planner] job ", job.id,
                                  " is on the wrong side of its queue's cursor");
        require<std::logic_error>(i == 0 || !queue.jobs[i - 1]->barrier || job.next == 0, "[planner] job ", job.id,
                                  " has passed a barrier");
        queued += job.size() - job.next;
        ++jobs;
      }
    }
  }
  require<std::logic_error>(queued == queued_ && jobs == jobs_.size(), "[planner] expected ", queued, " queued examples of ", jobs,
                            " jobs, got ", queued_, " of ", jobs_.size());
  require<std::logic_error>(micro_.under_way() || (micro_.examples.empty() && micro_.versions.empty() && micro_.slices_left == 0),
                            "[planner] a finished micro-batch is kept");
  require<std::logic_error>(micro_.forwarded + micro_.stopped <= micro_.rows.rows &&
                                (micro_.stopped > 0 || micro_.stopped_slices == 0) &&
                                (micro_.forwarded == micro_.rows.rows) == (micro_.slices_left > 0 || !micro_.under_way()),
                            "[planner] the micro-batch has ", micro_.rows.rows, " rows, ", micro_.forwarded, " forwarded, ",
                            micro_.stopped, " stopped and ", micro_.slices_left, " slices left");
  require<std::logic_error>(weights_.size() == training_.size() + evaluation_.size() + blocked_.size(),
                            "[planner] the weights of other queues are kept");
}

}  // namespace loquetier
