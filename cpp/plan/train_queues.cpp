#include "plan/train_queues.h"

#include <algorithm>
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
  if (!adapter.training) {
    TrainQueue& queue = blocked_.emplace_back();
    queue.adapter = &adapter;
    queue.list = &blocked_;
    queue.place = std::prev(blocked_.end());
    adapter.training = &queue;
  }
  PlannedJob& job = jobs_[spec.id];
  job.id = spec.id;
  job.queue = adapter.training;
  job.train = spec.train;
  job.barrier = spec.barrier;
  job.arrival = arrival;
  job.rows = std::move(spec.rows);
  queued_ += job.size();
  job.queue->jobs.push_back(&job);
  adapters_.add_user(adapter);
  refresh(*job.queue, false);
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
  if (!job) queue.deficit = 0;
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

int64_t TrainQueues::backward_age() const { return may_train() || max_layers_ == 0 ? -1 : micro_.passed; }

// ---------------------------------------------------------------- one plan

void TrainQueues::begin(uint64_t serial, int32_t max_layers) {
  serial_ = serial;
  max_layers_ = max_layers < 0 ? config_.num_layers : std::min(max_layers, config_.num_layers);
  layers_now_ = 0;
  begins_ = false;
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
  touched_.push_back(&queue);
}

TrainQueues::Take TrainQueues::take(TrainQueue& queue, StepLimits& limits, bool on_credit) {
  touch(queue);
  PlannedJob* job = next_of(queue, queue.plan_cursor);
  if (!job || (job->train && !may_train())) return Take::nothing;
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

void TrainQueues::run_backward(StepLimits& limits) {
  if (may_train() || layers_now_ > 0) return;
  int64_t bytes = 0;
  for (const AdapterVersion* version : micro_.versions) bytes += version->claimed == limits.serial ? 0 : version->bytes;
  if (bytes > limits.bytes_left) return;
  layers_now_ = std::min(max_layers_, micro_.layers_left);
  if (layers_now_ == 0) return;
  for (AdapterVersion* version : micro_.versions) limits.claim(*version);
}

void TrainQueues::serve(StepLimits& limits) {
  const int64_t quantum = std::max<int64_t>(1, config_.max_batch_tokens / 8);
  const auto turn = [&](TrainQueue& queue) {  // true: only its credit ended
    touch(queue);
    queue.plan_deficit = std::min(queue.plan_deficit + quantum, config_.max_batch_tokens);
    Take result = Take::taken;
    while (result == Take::taken && limits.rows_left > 0) result = take(queue, limits, false);
    return result == Take::no_credit;
  };
  std::vector<TrainQueue*> again;
  bool cut = false;
  for (auto* list : {&training_, &evaluation_}) {
    if (list == &training_ && !may_train()) continue;
    int misses = 0;
    for (TrainQueue& queue : *list) {
      if (limits.rows_left == 0 || misses == kMisses) break;
      if (turn(queue)) again.push_back(&queue);
      else misses += queue.served ? 0 : 1;
    }
    cut |= misses == kMisses;
  }
  if (cut) {  // those that have a place in the pool are served though far behind
    for (size_t i = 0; i < limits.claimed.size() && limits.rows_left > 0; ++i) {
      TrainQueue* queue = limits.claimed[i]->adapter->training;
      if (queue && queue->serial != serial_ && turn(*queue)) again.push_back(queue);
    }
  }
  while (!again.empty() && limits.rows_left > 0) {
    std::erase_if(again, [&](TrainQueue* queue) { return limits.rows_left > 0 && !turn(*queue); });
  }
}

void TrainQueues::emit(Plan& plan) {
  if (begins_) layers_now_ = std::min(max_layers_, config_.num_layers);
  std::sort(taken_.begin(), taken_.end(), [](const Taken& a, const Taken& b) {
    const auto key = [](const Taken& t) {
      const PlannedAdapter& adapter = *t.job->queue->adapter;
      return std::make_tuple(!t.job->train, adapter.id, adapter.newest->version, t.job->arrival, t.example);
    };
    return key(a) < key(b);
  });
  for (const Taken& t : taken_) {
    AdapterVersion& version = *t.job->queue->adapter->newest;
    const Kind kind = t.job->train ? Kind::train : Kind::eval;
    const int32_t rows = t.job->rows[static_cast<size_t>(t.example)];
    plan.segments.push_back({.kind = kind,
                             .id = t.job->id,
                             .example = t.example,
                             .adapter = version.adapter->id,
                             .version = version.version,
                             .row_begin = plan.total_rows(),
                             .rows = rows,
                             .position = 0,
                             .samples = false});
    plan.rows[static_cast<size_t>(kind)] += rows;
    if (version.adapter->id >= 0 && version.listed != serial_) {
      version.listed = serial_;
      plan.adapters.push_back({version.adapter->id, version.version});
    }
  }
  plan.backward_layers = layers_now_;

  std::vector<PlannedJob*> completed;
  for (const Taken& t : taken_) {  // a job's examples are adjacent and counted at its last one
    if (t.job->train && layers_now_ < config_.num_layers) continue;
    if (t.example == t.job->size() - 1) completed.push_back(t.job);
  }
  if (!begins_ && layers_now_ > 0) {
    for (AdapterVersion* version : micro_.versions) {
      if (version->listed == serial_) continue;
      version->listed = serial_;
      plan.adapters.push_back({version->adapter->id, version->version});
    }
    if (layers_now_ == micro_.layers_left) {
      for (const auto& [job, count] : micro_.examples) {
        if (job->done + count == job->size()) completed.push_back(job);
      }
    }
  }
  std::ranges::sort(completed, {}, &PlannedJob::arrival);
  for (const PlannedJob* job : completed) completed_.push_back(job->id);
  plan.completed_jobs = completed_;
}

// ---------------------------------------------------------------- what a plan leaves behind

void TrainQueues::commit(bool rows_offered, bool layers_offered) {
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
    micro_.layers_left = config_.num_layers;
    micro_.passed = 0;
  }
  micro_.passed = layers_now_ > 0 ? 0 : micro_.passed + (layers_offered && !could_train);
  micro_.layers_left -= layers_now_;
  if (layers_now_ > 0 && micro_.layers_left == 0) finish_micro_batch();
  for (TrainQueue* queue : touched_) {
    queue->deficit = queue->plan_deficit;  // also of who found no room: it comes first next time
    refresh(*queue, queue->served);
  }
  for (const int64_t id : completed_) forget(jobs_.at(id));
  begin(0, 0);
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
  require<std::logic_error>(micro_.layers_left > 0 || (micro_.examples.empty() && micro_.versions.empty()),
                            "[planner] a finished micro-batch is kept");
}

}  // namespace loquetier
