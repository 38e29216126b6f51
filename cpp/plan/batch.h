// What one step will do, as plain data: the planner makes it, the engine uploads it, ops only read it.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/cost_model.h"

namespace loquetier {

enum class Kind : uint8_t { train, eval, prefill, decode };  // also the order of rows in a batch

// A run of consecutive rows that belong to one sequence and one kind.
struct Segment {
  Kind kind = Kind::decode;
  int64_t id = 0;        // request (prefill, decode) or job (train, eval)
  int32_t example = -1;  // of the job
  int64_t adapter = -1;  // AdapterId; -1: base model
  int64_t version = 0;   // of the adapter, for this step
  int32_t row_begin = 0;
  int32_t rows = 0;
  int32_t position = 0;   // of the first row; > 0 in a later chunk of a prompt or of a training example
  bool samples = false;   // the last row's logits make a token (decode, and the chunk that ends a prompt)
  bool new_pages = true;  // of a request: its page table is not that of its last step
};

struct AdapterUse {
  int64_t adapter = -1;
  int64_t version = 0;
  bool operator==(const AdapterUse&) const = default;
};

// A training example of a micro-batch: all its rows, of which a step's segments may be a part.
struct MicroExample {
  int64_t job = 0;
  int32_t example = -1;
  int64_t adapter = -1;
  int64_t version = 0;
  int32_t row_begin = 0;  // in the micro-batch
  int32_t rows = 0;
};

struct Plan {
  std::vector<Segment> segments;     // in row order: by kind, inside a kind by (adapter, version), then in order of arrival
  int32_t rows[4] = {0, 0, 0, 0};    // by kind
  std::vector<AdapterUse> adapters;  // distinct, base left out: to be resident for this step
  // A micro-batch begins: its examples in the order of its rows, by adapter. This step's training segments are the first of these
  // rows.
  std::vector<MicroExample> micro_batch;
  int32_t micro_row = 0;  // of this step's first training row in its micro-batch
  // Without rows of other kinds a chunk may stop between layers (with slice_rows): its layers, then its heads, are forward slices.
  // The rest of a stopped chunk is run in later plans, beside segments of other kinds, after their forward. The most to run; 0: a
  // chunk runs in one pass with the other segments, and no chunk is stopped.
  int32_t forward_slices = 0;
  // An arriving request may end the step before the next slice. Beside rows of requests not behind a step that ended before any of
  // its training ran: with an arrival in every step none ever would.
  bool interruptible = true;
  // It may also make a chunk leave the pass that it shares with other rows (StepOutcome). Beside rows of requests only while at
  // most half of the last 32 steps had an arrival: each pass that is left makes one more pass of the requests' rows, which with an
  // arrival in every step takes more than a quarter of training, for waits that are hardly shorter.
  bool chunk_leaves = true;
  bool resumes = false;                 // the slices belong to a chunk that stopped in an earlier step
  int32_t backward_slices = 0;          // at most, of the micro-batch whose forward is complete (with this step), from the top
  std::vector<int64_t> completed_jobs;  // whose last gradient or loss is in after this step (all slices run), in order of arrival
  std::vector<int64_t> preempted;       // requests whose pages were taken; they wait again and lose nothing
  uint64_t serial = 0;                  // which plan this is: commit() and abort() take the last one only
  StepWork work;                        // of all of it, every slice included
  double predicted = 0;                 // seconds, with a cost model
  double seconds = -1;                  // the step was filled to so many; < 0: no limit
  bool empty() const { return segments.empty() && forward_slices == 0 && backward_slices == 0 && completed_jobs.empty(); }
  int32_t total_rows() const { return rows[0] + rows[1] + rows[2] + rows[3]; }
};

}  // namespace loquetier
