// What the planner knows of adapters: versions that somebody may still use, their bytes in the pool, and the limits of the step
// being planned.
//
// An adapter lives until it was removed and its last user (request, job, micro-batch in flight) ended. A version lives while it is
// the newest or held.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace loquetier {

struct PlannedAdapter;
struct PromptQueue;
struct TrainQueue;

struct AdapterVersion {
  PlannedAdapter* adapter = nullptr;
  int64_t version = 0;
  int64_t bytes = 0;
  int64_t holders = 0;   // requests pinned to it, micro-batch in flight
  uint64_t claimed = 0;  // serial of the last plan that has room for it
  uint64_t wanted = 0;   // serial of the last plan whose decodes want it
  uint64_t listed = 0;   // serial of the last plan that names it
};

struct PlannedAdapter {
  int64_t id = -1;
  int64_t bytes = 0;
  bool removed = false;
  uint64_t epoch = 1;  // of its weights: a cached prefix is good only in the epoch that made it
  int64_t users = 0;
  AdapterVersion* newest = nullptr;
  std::vector<std::unique_ptr<AdapterVersion>> versions;
  std::vector<PromptQueue*> prompts;  // its queues in PromptQueues, one per priority
  TrainQueue* training = nullptr;     // its queue in TrainQueues
};

// What is left of one step. The bytes are those of distinct (adapter, version); a claim holds for the whole step.
struct StepLimits {
  uint64_t serial = 0;
  int64_t rows_wanted = 0;  // the caller's budget; only a starving example that is longer goes beyond it
  int64_t rows_left = 0;
  int64_t hard_rows_left = 0;   // of max_batch_tokens
  int64_t train_rows_left = 0;  // of max_train_tokens
  int64_t bytes_left = 0;
  int64_t bytes_claimed = 0;
  std::vector<AdapterVersion*> claimed;

  bool fits(const AdapterVersion& version) const { return version.claimed == serial || version.bytes <= bytes_left; }
  void claim(AdapterVersion& version) {
    if (version.claimed == serial) return;
    version.claimed = serial;
    bytes_left -= version.bytes;
    bytes_claimed += version.bytes;
    claimed.push_back(&version);
  }
  void take_rows(int64_t rows) {
    rows_left -= rows;
    hard_rows_left -= rows;
    train_rows_left -= rows;
  }
  // From now on the step has training rows: its rows of every kind stay within max_train_tokens.
  void begin_training() {
    rows_left = std::min(rows_left, train_rows_left);
    hard_rows_left = std::min(hard_rows_left, train_rows_left);
  }
};

class AdapterTable {
 public:
  explicit AdapterTable(int64_t pool_bytes);  // knows the base model, -1, which takes nothing of the pool

  void add(int64_t id, int64_t bytes, int64_t version);
  PlannedAdapter& find(int64_t id, const char* caller);               // InvalidArgument when unknown
  PlannedAdapter& find_open(int64_t id, const char* caller);          // ... or removed
  int64_t bytes(int64_t id) const { return adapters_.at(id).bytes; }  // of one version
  void set_version(PlannedAdapter& adapter, int64_t version);
  void remove(PlannedAdapter& adapter);  // no new users

  AdapterVersion& hold(PlannedAdapter& adapter, int64_t version);
  void release(AdapterVersion& version);
  void add_user(PlannedAdapter& adapter) { ++adapter.users; }
  void drop_user(PlannedAdapter& adapter);  // may end the adapter's life
  void check_invariants() const;

 private:
  AdapterVersion& version_of(PlannedAdapter& adapter, int64_t version);
  void erase_if_unused(PlannedAdapter& adapter, const AdapterVersion& version);

  int64_t pool_bytes_;
  std::unordered_map<int64_t, PlannedAdapter> adapters_;
};

}  // namespace loquetier
