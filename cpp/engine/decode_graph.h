// Steps of decodes alone replay a recorded graph of their layers: one launch in place of some hundred.
//
// What is in a graph is fixed when it is recorded: addresses, grids, counts. So such a step is laid out by buckets (DecodeShape):
// rows, pages and groups are padded with entries that do nothing (a row without a slot, a sequence of no rows, a group without an
// adapter), and the tables lie at the same places for the same shape. What launches are sized by is not the batch but the largest
// one of its shape (bounds of DecodeGraphs), so adapters, ranks and their mix may change between replays. The heads, and the way of
// their results to the host, are a graph of their own, for the very number of rows, where every row is sampled from its logits
// alone; else they are launched as ever.
#pragma once

#include <compare>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "engine/blob.h"
#include "model/model.h"
#include "ops/ops.h"

namespace loquetier {

struct DecodeShape {
  int32_t rows = 0;     // N
  int32_t pages = 0;    // columns of the page table
  int32_t groups = 0;   // entries of the group table; 0: no adapter in the batch
  int32_t largest = 0;  // rows of the largest group are at most this
  int32_t rank = 0;     // ranks of single projections are at most this
  uint32_t parts = 0;   // projections with an adapter: bit site * kMaxParts + part, of the sites of a layer
  int32_t columns = 0;  // of S: the largest sum of ranks of a site
  auto operator<=>(const DecodeShape&) const = default;
};

// The most rows of a shape; with more, launches are long beside their cost, and kernels for many rows look at the batch itself.
constexpr int32_t kMostDecodeRows = 384;

int32_t decode_bucket(int32_t rows);  // 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, … as attention's plans
// What a batch has, to be put into buckets.
struct DecodeCounts {
  int32_t rows = 0, pages = 0;
  int32_t groups = 0, largest = 0;
  int32_t rank = 0;     // largest of one projection
  bool vectors = true;  // all ranks are multiples of 8
  uint32_t parts = 0;
};
DecodeShape decode_shape(const DecodeCounts& counts, int32_t max_rank);

// Ids that the step under way samples: those of rows whose `from` is not null. [rows] device, as Ops::take_tokens.
struct AwaitedIds {
  const int32_t* const* from = nullptr;
  int32_t* ids = nullptr;
};

class DecodeGraphs {
 public:
  struct Counts {
    int64_t captures = 0, replays = 0, kept = 0;
    double capture_seconds = 0;
  };

  DecodeGraphs(Ops& ops, const Model& model, bool enabled) : ops_(ops), model_(model), enabled_(enabled) {}

  bool enabled() const { return enabled_; }
  // All layers of a batch laid out by `shape`; its tables are uploaded. The same shape with tables and scratch at the same place is
  // recorded at its second occurrence: by then everything that is made at first use is there.
  void run(const BatchView& batch, const AwaitedIds& awaited, const DecodeShape& shape, KvCache& kv, const Arena& scratch);
  // Then the heads. plain: what is launched depends on nothing but the number of rows and where tables and results lie, and the
  // results go to the host with it. Recorded when that was so in some steps: with requests that come and go it changes often, and a
  // recording costs as much as it saves in a few.
  void run_heads(const BatchView& batch, const DecodeShape& shape, bool plain, Blob& results, Arena& scratch);
  void clear();
  const Counts& counts() const { return counts_; }
  bool replay = true;  // false: the same launches without a graph (tests)
  size_t most = 64;    // graphs of layers kept, the least recently used goes first; each takes some hundred KiB of device memory
  size_t most_heads = 32;

 private:
  struct Key {
    DecodeShape shape;
    const void* tables = nullptr;
    const void* scratch = nullptr;
    int32_t heads = 0;                                        // of heads: how many rows
    const void *results = nullptr, *results_there = nullptr;  // and where their results go, on the device and then the host
    auto operator<=>(const Key&) const = default;
  };
  struct Entry {
    std::unique_ptr<StepGraph> graph;
    int uses = 0;
    std::list<Key>::iterator place;  // in order of use
  };
  struct Kept {
    std::map<Key, Entry> entries;
    std::list<Key> order;  // least recently used first
  };
  LoraGroups bounds(const LoraGroups& groups, const DecodeShape& shape);
  // Launches `work`, by a graph of it from use number record_at on: then true.
  template <class F>
  bool replayed(Kept& kept, size_t most_kept, const Key& key, int record_at, F work);

  Ops& ops_;
  const Model& model_;
  bool enabled_;
  size_t workspace_ = 0;  // when it grows, its addresses have changed
  Kept layers_, heads_;
  Counts counts_;
  std::vector<LoraGroup> bound_groups_;
  std::vector<LoraSite> bound_sites_;
};

}  // namespace loquetier
