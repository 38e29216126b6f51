// Simulates a deployment: the real planner, a cost model as the clock, no tensors. Requests come at their times, trainers keep
// mini-batches queued, and a step takes what the cost model says of the work it did. So a planner is tuned, and a deployment sized,
// by the million steps.
//
// Like the engine it lets an arriving request cut a step short: no slice begins once one is in (Plan::interruptible), and a chunk
// leaves the pass that it shares with other rows (Plan::chunk_leaves). A run is a function of its arguments: the noise on the clock
// comes from a seed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/planner.h"

namespace loquetier {

struct SimulatedRequest {
  double arrived = 0;  // seconds from the start; ascending
  int64_t adapter = -1;
  int32_t prompt = 1;  // tokens
  int32_t output = 1;  // tokens
  int priority = 0;
  double ttft = -1;  // seconds from arrival to its deadline; < 0: the goal's
  bool reject_late = false;
};

struct SimulatedTrainer {
  int64_t adapter = 0;  // its own
  double weight = 1;
  double begins = 0;             // seconds from the start
  std::vector<int32_t> lengths;  // rows of its examples, each >= 1; they come round again
  int32_t batch = 1;             // examples of a mini-batch
  int32_t accumulation = 1;      // mini-batches of an optimizer step
};

struct SimulationOptions {
  PlannerConfig planner;          // `cost` is the simulation's
  std::vector<int64_t> adapters;  // bytes of each in the pool; ids are 0 ..
  double seconds = 1e18;          // ends then at the latest
  int64_t steps = INT64_MAX;      // or after so many
  bool until_served = false;      // ends when the last request did, whatever is left to train
  int64_t max_queue = 100000;     // waiting requests; one that comes beyond is refused
  int32_t ahead = 2;              // optimizer steps that each trainer keeps queued
  double noise = 0;               // relative standard deviation of a step's time around the model's
  uint64_t seed = 0;              // of the noise
  CostModel* believed = nullptr;  // what the planner goes by, learning from every step; null: the truth
  int64_t check_every = 0;        // steps between two checks of the planner's invariants; 0: none
};

// Seconds from the start; < 0: it did not happen.
struct SimulatedRequestResult {
  double scheduled = -1;   // the step with its first row began
  double first = -1;       // token
  double last = -1;        // token
  double longest_gap = 0;  // between two tokens
  int32_t tokens = 0;
  int32_t preemptions = 0;
  bool rejected = false;  // late, and asked not to be served
  bool refused = false;   // the queue was full
};

struct SimulatedTraining {
  double at = 0;  // end of the step in which the mini-batch was complete
  int32_t trainer = 0;
  int64_t tokens = 0;
  bool update = false;
};

struct SimulationResult {
  std::vector<SimulatedRequestResult> requests;
  std::vector<SimulatedTraining> trained;
  double seconds = 0;  // of the whole run
  double busy = 0;     // in steps
  int64_t steps = 0;
  int64_t rows[4] = {0, 0, 0, 0};           // computed, by kind
  int64_t interrupted = 0;                  // steps that an arrival cut short
  double longest_step = 0;                  // of any
  double longest_serving_step = 0;          // with decodes in it
  int64_t longest_wait_steps = 0;           // that a running request stood by while steps were computed
  int64_t longest_training_wait_steps = 0;  // without rows or slices of training, while some was queued
  std::vector<double> longest_training;     // per trainer: seconds without a mini-batch done while it had some queued
  int64_t most_waiting = 0, most_running = 0, most_queued_examples = 0;
  int64_t preemptions = 0;
  double error_p50 = 0, error_p95 = 0;  // of the step times the planner believed in; NaN when it was not learning
};

// Throws InvalidArgument when an argument makes no sense; std::logic_error when the planner stops while work is left.
SimulationResult simulate(const SimulationOptions& options, const CostModel& truth, std::span<const SimulatedRequest> requests,
                          std::span<const SimulatedTrainer> trainers);

}  // namespace loquetier
