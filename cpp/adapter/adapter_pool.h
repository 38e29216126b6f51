// Residency: a fixed budget of device memory for adapter weights, more adapters than fit. Idle ones are evicted least-recently-used
// to the host tier and fetched back; one in use is never evicted. When free space is scattered, resident blocks are moved together
// (between steps nothing reads them, and device copies are ordered after the kernels that did), so a set fits whenever its bytes
// add up to no more than the pool, whatever else is pinned.
//
// Fetches go by the device's side queue from pinned host memory, so they run beside the step's work; the stream waits for one only
// where it first uses the block.
//
// One thread calls the pool; the last holder of an AdapterWeights may let go on any thread, also after the pool is gone.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "adapter/adapter.h"

namespace loquetier {

class AdapterPool {
 public:
  AdapterPool(Ops& ops, size_t bytes);
  ~AdapterPool();
  AdapterPool(const AdapterPool&) = delete;
  AdapterPool& operator=(const AdapterPool&) = delete;

  // Makes room for the site tables of so many resident adapters; more come when needed.
  void reserve_tables(size_t count, size_t table_bytes);
  static size_t tables_bytes(size_t count, size_t table_bytes);
  size_t tables_bytes() const;  // held now

  // New weights in the host tier, rounded to the compute dtype. `flat` as AdapterLayout::flatten. OutOfMemory when one version
  // alone exceeds the pool.
  std::shared_ptr<AdapterWeights> add(std::shared_ptr<const AdapterLayout> layout, const float* flat, int64_t version);
  // A copy of `source` as a version of its own (copy on write for the optimizer; clone). Resident when the source is and idle ones
  // can make room for it, else in the host tier. Moves no block: in the middle of a step tables of the optimizer point at them.
  std::shared_ptr<AdapterWeights> copy(const std::shared_ptr<AdapterWeights>& source, int64_t version);

  // Makes every one of `set` resident and pins it until unpin(); evicts idle ones as needed. All or nothing: OutOfMemory names the
  // bytes.
  void pin(std::span<const std::shared_ptr<AdapterWeights>> set);
  void unpin(std::span<const std::shared_ptr<AdapterWeights>> set);
  // Starts to fetch, in this order, as many of `next` as find room beside what is pinned, without waiting for anything and without
  // making the stream wait: it does in the pin() that first uses them. Evicts idle ones that need no copy back. Returns how many
  // were started. Called after pin() of the same step; behind: a mark of the device, between that call and the step's work.
  int64_t prefetch(std::span<const std::shared_ptr<AdapterWeights>> next, uint64_t behind);

  // The optimizer wrote the device block in place: the host tier is stale, the version is `version`.
  void mark_updated(AdapterWeights& weights, int64_t version);
  std::vector<float> read(const AdapterWeights& weights) const;  // [elements] f32, from wherever it is

  size_t capacity() const;
  size_t used() const;  // sum of pool_bytes of what is resident
  int64_t resident_count() const;
  int64_t evictions() const;
  int64_t fetches() const;
  int64_t prefetches() const;  // of the fetches

 private:
  struct State;
  std::shared_ptr<State> state_;  // weights give their space back through it when the last holder lets go
};

}  // namespace loquetier
