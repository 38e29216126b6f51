// Which adapters the next steps will want: a look at the queues for whoever fetches ahead. Decides nothing.
#include <algorithm>

#include "plan/planner_state.h"

namespace loquetier {

std::vector<AdapterUse> Planner::upcoming_adapters(size_t count) const {
  constexpr size_t kLooks = 8;  // queues looked at for each adapter asked for
  State& s = *state_;
  std::vector<AdapterUse> list;
  const auto add = [&](const AdapterVersion& version) {
    const AdapterUse use = {version.adapter->id, version.version};
    if (use.adapter < 0 || version.claimed == s.serial || list.size() == count) return;
    if (std::ranges::find(list, use) == list.end()) list.push_back(use);
  };
  std::vector<const PlannedRequest*> passed;
  for (const PlannedRequest* r : s.running) {
    if (r->state == RequestState::decoding && r->planned == 0 && r->version().claimed != s.serial) passed.push_back(r);
  }
  std::ranges::sort(passed, {}, &PlannedRequest::turn);
  for (const PlannedRequest* r : passed) add(r->version());
  size_t looks = kLooks * count;
  for (const auto& [priority, level] : s.prompts.levels()) {
    for (const PromptQueue& queue : level.ring) {
      if (looks == 0 || list.size() == count) break;
      --looks;
      const auto& requests = queue.prefilling.empty() ? queue.waiting : queue.prefilling;
      if (!requests.empty()) add(requests.front()->version());
    }
  }
  s.training.visit_next(kLooks * count, [&](const PlannedAdapter& adapter) { add(*adapter.newest); });
  return list;
}

}  // namespace loquetier
