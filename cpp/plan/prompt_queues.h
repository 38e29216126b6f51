// Requests whose prompt is not computed yet: by priority, inside a priority by adapter, inside an adapter in order of arrival.
//
// The adapters of one priority stand in a ring, least recently served first; so do the priorities among themselves (for aging). A
// queue lives while it has requests, a level while it has queues. A pre-empted request comes back to the head of its queue.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <vector>

#include "plan/adapter_table.h"

namespace loquetier {

enum class RequestState : uint8_t {
  waiting,     // has no pages
  prefilling,  // has pages; the last chunk is not computed
  decoding,    // has the keys and values of every token but perhaps the last
};

struct PlannedRequest {
  // What every step of a running request reads or writes, close together.
  int64_t id = 0;
  PlannedAdapter* adapter = nullptr;
  AdapterVersion* pinned = nullptr;  // held
  RequestState state = RequestState::waiting;
  bool pin_version = false;     // pin at the first commit
  bool awaits = false;          // the last of the tokens is not known yet: a place for it
  bool new_pages = true;        // the pages are not those of its last step
  bool page_due = false;        // of the open plan: a decode that needs one more page and has not got it
  bool admitted_now = false;    // of the open plan
  int64_t planned = 0;          // of the open plan: rows
  int64_t computed = 0;         // tokens whose keys and values are in the pages
  std::vector<int32_t> tokens;  // prompt and generated
  std::vector<int32_t> pages;   // in order of position
  size_t pages_before = 0;      // of the open plan
  int64_t cached_pages = 0;     // the first pages, which are entries of the prefix cache
  int64_t token_limit = 0;      // prompt and generated
  uint64_t last_served = 0;     // clock
  uint64_t turn = 0;            // number of its last decode, over all requests: lowest is next when not all fit
  double first_token = -1;      // when it came, seconds; < 0: not yet
  double last_token = -1;
  double due = 0;  // when the next one is, with a goal; valid from the first token on

  bool use_prefix_cache = true;
  bool aged = false;  // got in because its priority was passed over: pre-empted after all others, so that it ends
  bool reject_late = false;
  int priority = 0;
  uint64_t arrival = 0;
  int64_t prompt_tokens = 0;
  double deadline = -1;                        // of the first token, seconds; < 0: none
  uint64_t pinned_epoch = 0;                   // of the adapter when `pinned` was its newest version; 0: never known
  uint64_t kv_epoch = 0;                       // of the adapter when the first of these pages were computed
  std::list<PlannedRequest*>::iterator place;  // in its queue, while waiting or prefilling
  int64_t hit_tokens = 0;                      // of the prefix cache, when admitted in the open plan

  AdapterVersion& version() const { return pinned ? *pinned : *adapter->newest; }
  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  int64_t remaining() const { return length() - computed - planned; }
  bool goes_on() const { return remaining() == 0 && length() + 1 < token_limit; }  // it samples, and has a row behind that token
};

// Who must have its first token first: higher priority, then the earlier deadline.
struct MoreUrgent {
  bool operator()(const PlannedRequest* a, const PlannedRequest* b) const {
    if (a->priority != b->priority) return a->priority > b->priority;
    return a->deadline != b->deadline ? a->deadline < b->deadline : a->arrival < b->arrival;
  }
};

// Who keeps its pages when they are short: true when a stands higher than b.
struct StandsHigher {
  bool operator()(const PlannedRequest* a, const PlannedRequest* b) const {
    if (a->aged != b->aged) return a->aged;
    if (a->priority != b->priority && !a->aged) return a->priority > b->priority;
    return a->arrival < b->arrival;
  }
};

struct PromptLevel;

struct PromptQueue {
  PlannedAdapter* adapter = nullptr;
  PromptLevel* level = nullptr;
  std::list<PlannedRequest*> prefilling, waiting;
  int64_t deficit = 0;  // rows it may take before its turn ends
  int64_t passed = 0;   // steps in which it was the next of its ring and got nothing
  // Of the open plan, valid when `serial` is its.
  uint64_t serial = 0;
  int64_t plan_deficit = 0;
  bool served = false;

  std::list<PromptQueue>::iterator place;
  bool empty() const { return prefilling.empty() && waiting.empty(); }
};

struct PromptLevel {
  int priority = 0;
  std::list<PromptQueue> ring;  // least recently served first
  std::list<PromptLevel*>::iterator place;
};

class PromptQueues {
 public:
  void add(PlannedRequest& request);         // at the end
  void preempt(PlannedRequest& request);     // prefilling or decoding -> waiting, at the head
  void admit(PlannedRequest& request);       // waiting -> prefilling; states are the caller's
  void undo_admit(PlannedRequest& request);  // back to the head of those waiting
  void remove(PlannedRequest& request);      // ended, or its prompt is computed
  void mark_served(PromptQueue& queue);      // goes to the end of its ring, its level to the end of the levels

  PromptQueue& queue_of(const PlannedRequest& request) const;
  PromptQueue* find(const PlannedAdapter& adapter, const PromptLevel& level) const;
  bool empty() const { return levels_.empty(); }
  std::map<int, PromptLevel, std::greater<int>>& levels() { return levels_; }  // highest priority first
  PromptLevel& least_recently_served() { return *by_service_.front(); }
  void check_invariants() const;

 private:
  PromptQueue& open(PlannedRequest& request);

  std::map<int, PromptLevel, std::greater<int>> levels_;
  std::list<PromptLevel*> by_service_;
};

}  // namespace loquetier
