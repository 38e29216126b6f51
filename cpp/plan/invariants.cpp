// The check of the planner's whole state, for tests: every page is counted, every request is where its state says.
#include <algorithm>

#include "core/check.h"
#include "plan/planner_state.h"

namespace loquetier {

void Planner::State::check_invariants() const {
  require<std::logic_error>(!open, "[planner] check_invariants: a plan is open");
  cache.check_invariants();
  adapters.check_invariants();
  prompts.check_invariants();
  training.check_invariants();

  std::vector<int32_t> references(static_cast<size_t>(pages.total()), 0);
  size_t inside = 0;
  for (const auto& [id, r] : requests) {
    require<std::logic_error>(r.id == id && r.planned == 0 && !r.admitted_now && r.length() <= r.token_limit, "[planner] request ",
                              id, " still carries a plan");
    if (r.state == RequestState::waiting) {
      require<std::logic_error>(r.pages.empty() && r.computed == 0, "[planner] request ", id, " waits and has pages");
      continue;
    }
    ++inside;
    require<std::logic_error>(
        std::ranges::find(running, &r) != running.end() && by_standing.contains(const_cast<PlannedRequest*>(&r)),
        "[planner] request ", id, " runs and is not among those running");
    require<std::logic_error>(static_cast<int64_t>(r.pages.size()) == pages_for(r.computed), "[planner] request ", id,
                              ": expected ", pages_for(r.computed), " pages for ", r.computed, " tokens, got ", r.pages.size());
    require<std::logic_error>(r.state == RequestState::decoding ? r.remaining() <= 1 : r.remaining() > 0, "[planner] request ", id,
                              " has ", r.remaining(), " tokens to compute, which is not its state");
    const bool exact = cacheable(r, r.kv_epoch);
    const int64_t full = std::min(r.computed, r.length() - r.awaits) / config.page_size;
    require<std::logic_error>(!exact || r.cached_pages == full, "[planner] request ", id, ": expected ", full,
                              " pages in the prefix cache, got ", r.cached_pages);
    for (size_t i = 0; i < r.pages.size(); ++i) {
      ++references[static_cast<size_t>(r.pages[i])];
      const bool cached = exact && static_cast<int64_t>(i) < r.cached_pages;
      require<std::logic_error>(cache.cached(r.pages[i]) == cached, "[planner] request ", id, " page ", i,
                                ": cached is expected to be ", cached);
    }
  }
  require<std::logic_error>(inside == running.size() && inside == by_standing.size(), "[planner] ", inside, " requests run, ",
                            running.size(), " are listed, ", by_standing.size(), " have a standing");
  require<std::logic_error>(std::ranges::is_sorted(running,
                                                   [](const auto* a, const auto* b) {
                                                     return a->adapter->id != b->adapter->id ? a->adapter->id < b->adapter->id
                                                                                             : a->arrival < b->arrival;
                                                   }),
                            "[planner] running requests are not in row order");
  int64_t free = 0;
  for (int32_t page = 0; page < pages.total(); ++page) {
    const int32_t expected = references[static_cast<size_t>(page)] + cache.cached(page);
    require<std::logic_error>(pages.references(page) == expected, "[planner] page ", page, ": expected ", expected,
                              " references, got ", pages.references(page));
    free += expected == 0;
  }
  require<std::logic_error>(free == pages.free(), "[planner] expected ", free, " free pages, got ", pages.free());
}

}  // namespace loquetier
