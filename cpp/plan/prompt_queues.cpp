#include "plan/prompt_queues.h"

#include <algorithm>

#include "core/check.h"

namespace loquetier {

PromptQueue* PromptQueues::find(const PlannedAdapter& adapter, const PromptLevel& level) const {
  for (PromptQueue* queue : adapter.prompts) {
    if (queue->level == &level) return queue;
  }
  return nullptr;
}

PromptQueue& PromptQueues::queue_of(const PlannedRequest& request) const {
  const auto level = levels_.find(request.priority);
  PromptQueue* queue = level == levels_.end() ? nullptr : find(*request.adapter, level->second);
  require<std::logic_error>(queue != nullptr, "[planner] request ", request.id, " is in no queue");
  return *queue;
}

PromptQueue& PromptQueues::open(PlannedRequest& request) {
  const auto [found, first] = levels_.try_emplace(request.priority);
  PromptLevel& level = found->second;
  if (first) {
    level.priority = request.priority;
    level.place = by_service_.insert(by_service_.end(), &level);
  }
  if (PromptQueue* queue = find(*request.adapter, level)) return *queue;
  PromptQueue& queue = level.ring.emplace_back();
  queue.place = std::prev(level.ring.end());
  queue.adapter = request.adapter;
  queue.level = &level;
  request.adapter->prompts.push_back(&queue);
  return queue;
}

void PromptQueues::add(PlannedRequest& request) {
  PromptQueue& queue = open(request);
  request.place = queue.waiting.insert(queue.waiting.end(), &request);
}

void PromptQueues::preempt(PlannedRequest& request) {
  PromptQueue& queue = open(request);
  if (request.state == RequestState::prefilling) queue.waiting.splice(queue.waiting.begin(), queue.prefilling, request.place);
  else request.place = queue.waiting.insert(queue.waiting.begin(), &request);
}

void PromptQueues::admit(PlannedRequest& request) {
  PromptQueue& queue = queue_of(request);
  queue.prefilling.splice(queue.prefilling.end(), queue.waiting, request.place);
}

void PromptQueues::undo_admit(PlannedRequest& request) {
  PromptQueue& queue = queue_of(request);
  queue.waiting.splice(queue.waiting.begin(), queue.prefilling, request.place);
}

void PromptQueues::remove(PlannedRequest& request) {
  PromptQueue& queue = queue_of(request);
  (request.state == RequestState::waiting ? queue.waiting : queue.prefilling).erase(request.place);
  if (!queue.empty()) return;
  PromptLevel& level = *queue.level;
  std::erase(queue.adapter->prompts, &queue);
  level.ring.erase(queue.place);
  if (!level.ring.empty()) return;
  by_service_.erase(level.place);
  levels_.erase(level.priority);
}

void PromptQueues::mark_served(PromptQueue& queue) {
  PromptLevel& level = *queue.level;
  queue.passed = 0;
  level.ring.splice(level.ring.end(), level.ring, queue.place);
  by_service_.splice(by_service_.end(), by_service_, level.place);
}

void PromptQueues::check_invariants() const {
  require<std::logic_error>(levels_.size() == by_service_.size(), "[planner] ", levels_.size(), " prompt levels, ",
                            by_service_.size(), " in the aging order");
  for (const auto& [priority, level] : levels_) {
    require<std::logic_error>(*level.place == &level && level.priority == priority && !level.ring.empty(),
                              "[planner] prompt level ", priority, " is empty or misplaced");

    for (const PromptQueue& queue : level.ring) {
      require<std::logic_error>(&*queue.place == &queue && queue.level == &level && !queue.empty(),
                                "[planner] a prompt queue of adapter ", queue.adapter->id, " is empty or misplaced");
      require<std::logic_error>(std::ranges::count(queue.adapter->prompts, &queue) == 1, "[planner] adapter ", queue.adapter->id,
                                " does not know its prompt queue");
      for (const auto* list : {&queue.prefilling, &queue.waiting}) {
        const RequestState state = list == &queue.waiting ? RequestState::waiting : RequestState::prefilling;
        for (auto it = list->begin(); it != list->end(); ++it) {
          const PlannedRequest& r = **it;
          require<std::logic_error>(r.place == it && r.state == state && r.adapter == queue.adapter && r.priority == priority,
                                    "[planner] request ", r.id, " is in the wrong queue");
        }
      }
    }
  }
}

}  // namespace loquetier
