// What one step will do, as plain data: the planner makes it, the engine uploads it, ops only read it.
#pragma once

#include <cstdint>
#include <vector>

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
  int32_t position = 0;  // of the first row
  bool samples = false;  // the last row's logits make a token (decode, and the chunk that ends a prompt)
};

struct AdapterUse {
  int64_t adapter = -1;
  int64_t version = 0;
  bool operator==(const AdapterUse&) const = default;
};

struct Plan {
  std::vector<Segment> segments;        // in row order: by kind, inside a kind by (adapter, version), then in order of arrival
  int32_t rows[4] = {0, 0, 0, 0};       // by kind
  std::vector<AdapterUse> adapters;     // distinct, base left out: to be resident for this step
  int32_t backward_layers = 0;          // of the pending micro-batch (this step's forward included), from the top; all: num_layers
  std::vector<int64_t> completed_jobs;  // whose last gradient or loss is in after this step, in order of arrival
  std::vector<int64_t> preempted;       // requests whose pages were taken; they wait again and lose nothing
  uint64_t serial = 0;                  // which plan this is: commit() and abort() take the last one only
  bool empty() const { return segments.empty() && backward_layers == 0 && completed_jobs.empty(); }
  int32_t total_rows() const { return rows[0] + rows[1] + rows[2] + rows[3]; }
};

}  // namespace loquetier
