// KV pages: a free list with reference counts. A page may be shared by sequences with the same prefix under the same (adapter,
// version), read-only and full; a page being written has one owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace loquetier {

class KvPages {
 public:
  explicit KvPages(int64_t pages);
  int64_t total() const { return static_cast<int64_t>(references_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int32_t allocate();  // one reference; the caller checked free() > 0 (else std::logic_error)
  void retain(int32_t page);
  void release(int32_t page);  // back to the free list with the last reference
  int32_t references(int32_t page) const { return references_[static_cast<size_t>(page)]; }

 private:
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;
};

}  // namespace loquetier
