#include "plan/kv_pages.h"

#include "core/check.h"

namespace loquetier {

KvPages::KvPages(int64_t pages) {
  require(pages >= 0 && pages <= INT32_MAX, "[kv_pages] pages: expected 0 .. ", INT32_MAX, ", got ", pages);
  references_.assign(static_cast<size_t>(pages), 0);
  free_.resize(static_cast<size_t>(pages));
  for (int64_t i = 0; i < pages; ++i) free_[static_cast<size_t>(i)] = static_cast<int32_t>(pages - 1 - i);  // page 0 is lent first
}

int32_t KvPages::allocate() {
  require<std::logic_error>(!free_.empty(), "[kv_pages] allocate: none of ", total(), " pages is free");
  const int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

void KvPages::retain(int32_t page) {
  require<std::logic_error>(page >= 0 && page < total() && references(page) > 0, "[kv_pages] retain: page ", page,
                            " is not in use");
  ++references_[static_cast<size_t>(page)];
}

void KvPages::release(int32_t page) {
  require<std::logic_error>(page >= 0 && page < total() && references(page) > 0, "[kv_pages] release: page ", page,
                            " is not in use");
  if (--references_[static_cast<size_t>(page)] == 0) free_.push_back(page);
}

}  // namespace loquetier
