// Training and evaluation: jobs of each adapter in order of arrival, and the micro-batch whose backward is under way.
//
// Adapters take turns by deficit round-robin in rows. A queue stands in one of three lists by its next example: training,
// evaluation, or blocked (behind a barrier, or everything is planned); inside a list least recently served first. What a plan takes
// is only noted until commit(), so abandoning a plan is forgetting the notes.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan/adapter_table.h"
#include "plan/planner.h"

namespace loquetier {

struct PlannedJob {
  int64_t id = 0;
  TrainQueue* queue = nullptr;
  bool train = true;
  bool barrier = false;
  uint64_t arrival = 0;
  std::vector<int32_t> rows;  // per example
  int32_t next = 0;           // first example that no committed step computed
  int32_t done = 0;           // examples whose loss (evaluation) or gradient is in
  int32_t taken = 0;          // examples the open plan has
  int32_t size() const { return static_cast<int32_t>(rows.size()); }
};

struct TrainQueue {
  PlannedAdapter* adapter = nullptr;
  std::deque<PlannedJob*> jobs;  // in order of arrival; those before `cursor` are all in the micro-batch
  size_t cursor = 0;             // first job with an example to compute
  int64_t deficit = 0;           // rows it may take before its turn ends
  int64_t passed = 0;            // steps in which it was next in turn or looked at, and got nothing
  std::list<TrainQueue>* list = nullptr;
  std::list<TrainQueue>::iterator place;
  // Of the open plan, valid when `serial` is its.
  uint64_t serial = 0;
  size_t plan_cursor = 0;
  int64_t plan_deficit = 0;
  bool served = false;
  bool missed = false;  // found no room
};

class TrainQueues {
 public:
  TrainQueues(AdapterTable& adapters, const PlannerConfig& config);

  void add(JobSpec&& spec, uint64_t arrival);
  bool remove(int64_t job);
  void abandon_backward();

  // ---- one plan, in the order of these calls
  void begin(uint64_t serial, int32_t max_layers);
  int64_t backward_age() const;           // steps that the backward under way was passed over; -1: none
  int64_t example_age() const;            // steps that the longest passed-over example was; -1: none could run
  int32_t oldest_rows() const;            // of that example
  bool serve_oldest(StepLimits& limits);  // that example
  void run_backward(StepLimits& limits);  // notes how many layers of the backward under way; again in the same plan: nothing
  void serve(StepLimits& limits);         // the rest
  void emit(Plan& plan);                  // segments (train, then eval), rows, adapters, backward_layers, completed_jobs
  void commit(bool rows_offered, bool layers_offered);
  void abort();

  // The adapters next in turn, training before evaluation, of at most `count` queues.
  template <class F>
  void visit_next(size_t count, F visit) const {
    for (const auto* list : {&training_, &evaluation_}) {
      for (auto queue = list->begin(); queue != list->end() && count > 0; ++queue, --count) visit(*queue->adapter);
    }
  }
  int64_t queued_examples() const { return queued_; }
  int32_t backward_layers_left() const { return micro_.layers_left; }
  bool empty() const { return jobs_.empty() && micro_.layers_left == 0; }
  void check_invariants() const;

 private:
  struct MicroBatch {
    int32_t layers_left = 0;
    int64_t passed = 0;                                     // steps without progress
    std::vector<std::pair<PlannedJob*, int32_t>> examples;  // how many of which job
    std::vector<AdapterVersion*> versions;                  // held
  };
  struct Taken {
    PlannedJob* job;
    int32_t example;
  };
  enum class Take { taken, no_room, no_credit, nothing };

  bool may_train() const { return micro_.layers_left == 0; }
  PlannedJob* next_of(const TrainQueue& queue, size_t cursor) const;  // with what the open plan took counted; null: blocked or none
  void touch(TrainQueue& queue);
  Take take(TrainQueue& queue, StepLimits& limits, bool on_credit);
  void refresh(TrainQueue& queue, bool served);
  void note_passed();
  void finish_micro_batch();
  void forget(PlannedJob& job);
  TrainQueue* oldest() const;

  AdapterTable& adapters_;
  const PlannerConfig& config_;
  std::unordered_map<int64_t, PlannedJob> jobs_;
  std::list<TrainQueue> training_, evaluation_, blocked_;
  MicroBatch micro_;
  int64_t queued_ = 0;
  // Of the open plan.
  uint64_t serial_ = 0;
  std::vector<Taken> taken_;
  std::vector<TrainQueue*> touched_;
  int32_t layers_now_ = 0;
  int32_t max_layers_ = 0;
  bool begins_ = false;  // a micro-batch
  std::vector<int64_t> completed_;
};

}  // namespace loquetier
