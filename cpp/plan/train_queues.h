// Training and evaluation: jobs of each adapter in order of arrival, and the micro-batch under way.
//
// A micro-batch is composed at once. Without slice_rows its forward is in the step that begins it; with, its rows are computed in
// chunks over several steps, a chunk may stop between layers, and backward begins when all chunks are complete.
//
// Adapters take turns by deficit round-robin in rows. A queue stands in one of three lists by its next example: training,
// evaluation, or blocked (behind a barrier, or everything is planned); inside a list least recently served first. What a plan takes
// is only noted until commit(), so abandoning a plan is forgetting the notes.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <list>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan/adapter_table.h"
#include "plan/micro_rows.h"
#include "plan/planner.h"

namespace loquetier {

struct PlannedJob {
  int64_t id = 0;
  TrainQueue* queue = nullptr;
  bool train = true;
  bool barrier = false;
  uint64_t arrival = 0;
  std::vector<int32_t> rows;  // per example
  std::vector<int32_t> targets;
  int32_t lowest_layer = 0;
  int32_t next = 0;   // first example that no committed step computed
  int32_t done = 0;   // examples whose loss (evaluation) or gradient is in
  int32_t taken = 0;  // examples the open plan has
  int32_t size() const { return static_cast<int32_t>(rows.size()); }
};

struct TrainQueue {
  PlannedAdapter* adapter = nullptr;
  std::deque<PlannedJob*> jobs;  // in order of arrival; those before `cursor` are all in the micro-batch
  size_t cursor = 0;             // first job with an example to compute
  double weight = 1;
  int64_t turn = 0;     // of the open plan: number of its last turn
  int64_t deficit = 0;  // rows it may take before its turn ends
  int64_t passed = 0;   // steps in which it was next in turn or looked at, and got nothing
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
  void begin(uint64_t serial, int32_t max_slices);
  int64_t micro_age() const;    // steps that the micro-batch under way was passed over; -1: none
  int64_t example_age() const;  // steps that the longest passed-over example was; -1: none could run
  bool oldest_trains() const { return next_of(*oldest(), oldest()->cursor)->train; }
  int32_t oldest_rows() const;            // of that example
  bool serve_oldest(StepLimits& limits);  // that example
  bool claim_micro(StepLimits& limits);   // room in the pool for the micro-batch under way
  void run_backward(StepLimits& limits);  // notes how many slices of the backward under way; again in the same plan: nothing
  void serve(StepLimits& limits);         // the rest: training (unless a micro-batch is under way), then evaluation
  void emit(Plan& plan);                  // segments (train, then eval), rows, adapters, micro-batch, slices, completed_jobs
  std::vector<int64_t> commit(const Plan& plan, const StepOutcome& outcome, bool rows_offered, bool slices_offered);
  void abort();

  // ---- with slice_rows, instead of run_backward() and serve()
  void serve_evaluation(StepLimits& limits);
  MicroRows::Piece evaluation() const;  // what of it the open plan has; `rows` in it too
  void compose(StepLimits& limits, int64_t rows,
               bool oldest_first);  // examples of a new micro-batch; takes none of the step's rows
  const PlannedJob& job(int64_t id) const { return jobs_.at(id); }
  bool composed() const { return begins_; }
  void drop_composition();                              // none of its rows fits this step
  void take_chunk(int32_t rows) { chunk_now_ = rows; }  // of micro_rows(), from forward_begin()
  void take_forward_slices(int32_t slices) { forward_slices_now_ = slices; }
  void take_backward_slices(int32_t slices) { slices_now_ = slices; }
  const MicroRows& micro_rows() const { return begins_ ? fresh_ : micro_.rows; }
  int32_t forward_begin() const { return begins_ ? 0 : micro_.forwarded; }
  int32_t stopped_chunk() const { return micro_.stopped; }  // rows of the chunk that stopped between layers; 0: none
  int32_t stopped_slices_left(int32_t all) const { return std::max(1, all - micro_.stopped_slices); }
  int32_t max_slices() const { return max_slices_; }
  int32_t stopped_slices() const { return micro_.stopped_slices; }
  bool waits_for_chunk() const { return micro_.under_way() && micro_.stopped == 0 && micro_.forwarded < micro_.rows.rows; }
  bool has_chunk() const { return chunk_now_ > 0; }
  bool evaluates() const { return !evaluation_.empty(); }
  void serve_oldest_evaluation(StepLimits& limits) { take(evaluation_.front(), limits, true); }
  bool may_train() const { return !micro_.under_way(); }
  bool could_train() const { return !may_train() || !training_.empty(); }

  // The adapters next in turn, training before evaluation, of at most `count` queues.
  template <class F>
  void visit_next(size_t count, F visit) const {
    for (const auto* list : {&training_, &evaluation_}) {
      for (auto queue = list->begin(); queue != list->end() && count > 0; ++queue, --count) visit(*queue->adapter);
    }
  }
  int64_t queued_examples() const { return queued_; }
  int32_t backward_slices_left() const { return micro_.slices_left; }
  bool empty() const { return jobs_.empty() && !micro_.under_way(); }
  void check_invariants() const;

 private:
  struct MicroBatch {
    MicroRows rows;
    int32_t forwarded = 0;                                  // rows of complete chunks
    int32_t stopped = 0;                                    // rows of the chunk behind them that stopped between layers
    int32_t stopped_slices = 0;                             // of it, run so far
    int32_t slices_left = 0;                                // of backward, once all rows are forwarded
    int64_t passed = 0;                                     // steps without progress
    std::vector<std::pair<PlannedJob*, int32_t>> examples;  // how many of which job
    std::vector<AdapterVersion*> versions;                  // held
    bool under_way() const { return rows.rows > 0; }
  };
  struct Taken {
    PlannedJob* job;
    int32_t example;
  };
  enum class Take { taken, no_room, no_credit, nothing };

  PlannedJob* next_of(const TrainQueue& queue, size_t cursor) const;  // with what the open plan took counted; null: blocked or none
  void touch(TrainQueue& queue);
  Take take(TrainQueue& queue, StepLimits& limits, bool on_credit);
  void serve_lists(StepLimits& limits, std::initializer_list<std::list<TrainQueue>*> lists);
  void sort_taken();
  void fill_fresh();
  void weigh(TrainQueue& queue, double weight);
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
  std::multiset<double> weights_;  // of all queues
  int64_t queued_ = 0;
  int64_t turns_ = 0;
  // Of the open plan.
  uint64_t serial_ = 0;
  std::vector<Taken> taken_;
  std::vector<TrainQueue*> touched_;
  MicroRows fresh_;  // that begins
  int32_t chunk_now_ = 0;
  int32_t forward_slices_now_ = 0;
  int32_t slices_now_ = 0;
  int32_t max_slices_ = 0;
  bool begins_ = false;     // a micro-batch
  bool composing_ = false;  // with slice_rows training and evaluation are taken apart
  std::vector<int64_t> completed_;
};

}  // namespace loquetier
