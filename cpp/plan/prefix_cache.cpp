#include "plan/prefix_cache.h"

#include <algorithm>
#include <bit>

#include "core/check.h"
#include "core/random.h"

namespace loquetier {

PrefixCache::PrefixCache(KvPages& pages, int32_t page_size)
    : pages_(pages),
      page_size_(static_cast<size_t>(page_size)),
      entries_by_page_(static_cast<size_t>(pages.total())),
      tokens_(static_cast<size_t>(pages.total()) * page_size_),
      buckets_(std::bit_ceil(static_cast<size_t>(pages.total()) + 1), -1) {}

std::span<const int32_t> PrefixCache::tokens_of(int32_t page) const {
  return std::span<const int32_t>(tokens_).subspan(static_cast<size_t>(page) * page_size_, page_size_);
}

uint32_t PrefixCache::bucket_of(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens) const {
  uint64_t key = parent == kRoot
                     ? mix_key(mix_key(0x517cc1b727220a95u, static_cast<uint64_t>(adapter)), static_cast<uint64_t>(version))
                     : mix_key(0x9e3779b97f4a7c15u, static_cast<uint64_t>(parent));
  for (const int32_t token : tokens) key = mix_key(key, static_cast<uint64_t>(token));
  return static_cast<uint32_t>(key & (buckets_.size() - 1));
}

int32_t PrefixCache::find(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens) const {
  if (entries_ == 0) return -1;
  for (int32_t page = buckets_[bucket_of(adapter, version, parent, tokens)]; page >= 0; page = entry(page).next) {
    const Entry& e = entry(page);
    if (e.parent == parent && e.adapter == adapter && e.version == version && std::ranges::equal(tokens_of(page), tokens))
      return page;
  }
  return -1;
}

PrefixCache::Match PrefixCache::match(int64_t adapter, int64_t version, std::span<const int32_t> tokens, int64_t max_pages) const {
  Match result;
  int32_t parent = kRoot;
  for (int64_t i = 0; i < max_pages; ++i) {
    const int32_t page = find(adapter, version, parent, tokens.subspan(static_cast<size_t>(i) * page_size_, page_size_));
    if (page < 0) break;
    result.pages.push_back(page);
    result.idle += pages_.references(page) == 1;
    parent = page;
  }
  return result;
}

int32_t PrefixCache::insert(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens, int32_t page) {
  require<std::logic_error>(tokens.size() == page_size_, "[prefix_cache] tokens: expected ", page_size_, ", got ", tokens.size());
  require<std::logic_error>(!cached(page) && (parent == kRoot || cached(parent)), "[prefix_cache] insert: page ", page,
                            " is cached already or the page before it, ", parent, ", is not");
  if (const int32_t same = find(adapter, version, parent, tokens); same >= 0) {
    retain(same);
    release(page);
    return same;
  }
  Entry& e = entry(page);
  const uint32_t bucket = bucket_of(adapter, version, parent, tokens);
  const auto [newest, first] = newest_.try_emplace(adapter, page);
  e = {.cached = true, .adapter = adapter, .version = version, .parent = parent, .bucket = bucket, .next = buckets_[bucket]};
  if (!first) {
    e.older = newest->second;
    entry(e.older).newer = page;
    newest->second = page;
  }
  buckets_[bucket] = page;
  if (parent != kRoot) ++entry(parent).children;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(page) * page_size_));
  pages_.retain(page);
  ++entries_;
  return page;
}

void PrefixCache::unlink(int32_t page) {
  Entry& e = entry(page);
  int32_t* link = &buckets_[e.bucket];
  while (*link != page) link = &entry(*link).next;
  *link = e.next;
  if (e.older >= 0) entry(e.older).newer = e.newer;
  if (e.newer >= 0) {
    entry(e.newer).older = e.older;
  } else if (e.older >= 0) {
    newest_[e.adapter] = e.older;
  } else {
    newest_.erase(e.adapter);
  }
  e.cached = false;
  --entries_;
}

void PrefixCache::drop(int64_t adapter) {
  const auto newest = newest_.find(adapter);
  if (newest == newest_.end()) return;
  for (int32_t page = newest->second; page >= 0;) {
    const int32_t older = entry(page).older;
    if (pages_.references(page) == 1) {
      --idle_;
      if (entry(page).children == 0) idle_ends_.erase({entry(page).last_used, page});
    }
    unlink(page);
    pages_.release(page);
    page = older;
  }
}

void PrefixCache::evict_one() {
  const int32_t page = idle_ends_.begin()->second;
  idle_ends_.erase(idle_ends_.begin());
  --idle_;
  unlink(page);
  pages_.release(page);
  const int32_t parent = entry(page).parent;
  if (parent == kRoot) return;
  if (--entry(parent).children == 0 && pages_.references(parent) == 1) idle_ends_.insert({entry(parent).last_used, parent});
}

int32_t PrefixCache::allocate() {
  if (pages_.free() == 0 && !idle_ends_.empty()) evict_one();
  return pages_.allocate();
}

void PrefixCache::retain(int32_t page) {
  if (cached(page) && pages_.references(page) == 1) {
    --idle_;
    if (entry(page).children == 0) idle_ends_.erase({entry(page).last_used, page});
  }
  pages_.retain(page);
}

void PrefixCache::release(int32_t page) {
  pages_.release(page);
  Entry& e = entry(page);
  if (!e.cached || pages_.references(page) != 1) return;
  ++idle_;
  e.last_used = ++clock_;
  if (e.children == 0) idle_ends_.insert({e.last_used, page});
}

void PrefixCache::check_invariants() const {
  int64_t idle = 0, ends = 0, entries = 0;
  std::vector<int32_t> children(entries_by_page_.size(), 0);
  for (int32_t page = 0; page < pages_.total(); ++page) {
    const Entry& e = entry(page);
    if (!e.cached) continue;
    ++entries;
    require<std::logic_error>(pages_.references(page) >= 1, "[prefix_cache] page ", page, " is cached without a reference");
    const bool is_idle = pages_.references(page) == 1;
    idle += is_idle;
    ends += is_idle && e.children == 0;
    require<std::logic_error>(find(e.adapter, e.version, e.parent, tokens_of(page)) == page, "[prefix_cache] page ", page,
                              " is not found by its key");
    if (is_idle && e.children == 0) {
      require<std::logic_error>(idle_ends_.contains({e.last_used, page}), "[prefix_cache] idle page ", page,
                                " cannot be taken back");
    }
    if (e.parent == kRoot) continue;
    const Entry& p = entry(e.parent);
    ++children[static_cast<size_t>(e.parent)];
    require<std::logic_error>(p.cached && p.adapter == e.adapter && p.version == e.version, "[prefix_cache] page ", page,
                              " hangs on page ", e.parent, " of another key");
    require<std::logic_error>(is_idle || pages_.references(e.parent) > 1, "[prefix_cache] page ", page, " is in use, page ",
                              e.parent, " before it is idle");
  }
  for (int32_t page = 0; page < pages_.total(); ++page) {
    require<std::logic_error>(!cached(page) || children[static_cast<size_t>(page)] == entry(page).children, "[prefix_cache] page ",
                              page, ": expected ", children[static_cast<size_t>(page)], " children, got ", entry(page).children);
  }
  require<std::logic_error>(idle == idle_ && entries == entries_ && ends == static_cast<int64_t>(idle_ends_.size()),
                            "[prefix_cache] counters: expected ", idle, " idle, ", entries, " entries, ", ends, " ends, got ",
                            idle_, ", ", entries_, ", ", idle_ends_.size());
}

}  // namespace loquetier
