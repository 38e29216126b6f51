// Prefixes whose keys and values are still in their pages, by (adapter, version, tokens).
//
// A cached prefix is a chain of full pages: an entry is one page, its P tokens and the entry before it (or the root of its
// adapter's version). Every lookup compares tokens and parent, so a hash collision costs time only. An entry is known by its page:
// they are one to one.
//
// The cache holds one reference to each of its pages. A page that only the cache holds is idle and is taken back when pages are
// needed, least recently used first and a chain's end before its beginning. Who uses an entry uses all entries before it (insert()
// returns the page to use), so an idle entry has idle entries behind it only, and every idle page can be taken back.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan/kv_pages.h"

namespace loquetier {

class PrefixCache {
 public:
  static constexpr int32_t kRoot = -1;

  struct Match {
    std::vector<int32_t> pages;  // in order of position; no reference is taken
    int64_t idle = 0;            // of them, that only the cache holds
  };

  PrefixCache(KvPages& pages, int32_t page_size);

  // The longest cached chain that `tokens` begin with, of at most max_pages.
  Match match(int64_t adapter, int64_t version, std::span<const int32_t> tokens, int64_t max_pages) const;
  // Makes `page`, which the caller holds and has filled with `tokens` [P], the entry behind `parent` (a page of the cache that the
  // caller holds, or kRoot). Returns the page to use from now on: `page`, or the one that already has these tokens there: the
  // caller's reference has moved to it.
  int32_t insert(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens, int32_t page);
  void drop(int64_t adapter);  // every entry of the adapter; pages in use stay with their users

  // References of sequences; these go through the cache because it must know which pages are idle.
  int32_t allocate();  // takes an idle page back when none is free; the caller checked available() > 0
  void retain(int32_t page);
  void release(int32_t page);
  int64_t available() const { return pages_.free() + idle_; }

  int64_t idle() const { return idle_; }
  int64_t entries() const { return entries_; }
  bool cached(int32_t page) const { return entry(page).cached; }
  void check_invariants() const;  // throws std::logic_error

 private:
  struct Entry {
    bool cached = false;
    int64_t adapter = 0;
    int64_t version = 0;
    int32_t parent = kRoot;
    int32_t children = 0;
    uint64_t last_used = 0;  // when it became idle
    uint32_t bucket = 0;
    int32_t next = -1;               // in the bucket
    int32_t newer = -1, older = -1;  // entries of the same adapter
  };
  Entry& entry(int32_t page) { return entries_by_page_[static_cast<size_t>(page)]; }
  const Entry& entry(int32_t page) const { return entries_by_page_[static_cast<size_t>(page)]; }
  std::span<const int32_t> tokens_of(int32_t page) const;
  uint32_t bucket_of(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens) const;
  int32_t find(int64_t adapter, int64_t version, int32_t parent, std::span<const int32_t> tokens) const;  // -1: none
  void unlink(int32_t page);  // out of the bucket and the adapter's list
  void evict_one();

  KvPages& pages_;
  size_t page_size_;
  std::vector<Entry> entries_by_page_;
  std::vector<int32_t> tokens_;                       // [pages, P]
  std::vector<int32_t> buckets_;                      // first entry of each
  std::unordered_map<int64_t, int32_t> newest_;       // of each adapter
  std::set<std::pair<uint64_t, int32_t>> idle_ends_;  // idle entries without children, least recently used first
  int64_t idle_ = 0;
  int64_t entries_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace loquetier
