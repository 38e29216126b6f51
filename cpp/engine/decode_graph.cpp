#include "engine/decode_graph.h"

#include <algorithm>
#include <bit>
#include <chrono>

namespace loquetier {

namespace {

constexpr int32_t kTileRows = 8;  // the smallest tile of a kernel over groups
constexpr int kLayerSites = 4;

int32_t power_at_least(int32_t n) { return static_cast<int32_t>(std::bit_ceil(static_cast<unsigned>(std::max(n, 1)))); }

}  // namespace

int32_t decode_bucket(int32_t rows) {
  const int32_t power = power_at_least(rows), between = power / 4 * 3;
  return power >= 16 && rows <= between ? between : power;
}

DecodeShape decode_shape(const DecodeCounts& counts, int32_t max_rank) {
  DecodeShape shape;
  shape.rows = decode_bucket(counts.rows);
  shape.pages = power_at_least(counts.pages);
  if (counts.groups == 0 || counts.rank == 0) return shape;
  const int32_t groups = std::min(power_at_least(counts.groups), shape.rows);
  for (const int32_t step : {8, 16, 64, kMostDecodeRows}) {
    shape.largest = step;
    if (counts.largest <= step) break;
  }
  // Tiles of t >= 8 rows that `groups` groups of at most `largest` rows, `rows` in all, can make: a group of r rows makes at most
  // 1 + (r - 1) / t. The table has an entry for each of them, so that bounds() can say so.
  const int32_t by_group = groups * ((shape.largest + kTileRows - 1) / kTileRows),
                by_rows = groups + (shape.rows - groups) / kTileRows;
  shape.groups = std::min({shape.rows, by_group, by_rows});
  shape.rank = std::min(power_at_least(std::max(counts.rank, 8)), std::max(max_rank / 8 * 8, counts.rank));
  if (!counts.vectors && shape.rank % 8 == 0) shape.rank += 1;  // ranks that are no multiple of 8 have kernels of their own
  shape.parts = counts.parts;
  for (int site = 0; site < kLayerSites; ++site) {
    int32_t sum = 0;
    for (int part = 0; part < kMaxParts; ++part) sum += shape.parts >> (site * kMaxParts + part) & 1u ? shape.rank : 0;
    shape.columns = std::max(shape.columns, sum);
  }
  return shape;
}

// The groups as launches are to see them on the host: as many tiles, and ranks as large, as any batch of this shape can have.
LoraGroups DecodeGraphs::bounds(const LoraGroups& groups, const DecodeShape& shape) {
  LoraGroups out = groups;
  if (shape.groups == 0) return out;
  alignas(256) static constexpr std::byte kSomewhere[256] = {};  // an address that is aligned as adapters' are; never read
  bound_sites_.assign(static_cast<size_t>(site_count(model_.config())), LoraSite{});
  for (size_t site = 0; site + 1 < bound_sites_.size(); ++site) {
    for (int part = 0; part < kMaxParts; ++part) {
      const auto bit = static_cast<int>(site % kLayerSites) * kMaxParts + part;
      if (shape.parts >> bit & 1u) bound_sites_[site].part[part] = {kSomewhere, kSomewhere, shape.rank, 1.0f};
    }
  }
  bound_groups_.assign(static_cast<size_t>(shape.groups), LoraGroup{});
  int32_t row = 0;
  for (LoraGroup& group : bound_groups_) {
    group.row_begin = row;
    group.rows = row == 0 ? std::min(shape.largest, shape.rows - shape.groups + 1) : 1;
    group.sites = bound_sites_.data();  // not null: has an adapter
    group.host_sites = bound_sites_.data();
    row += group.rows;
  }
  out.host_groups = bound_groups_.data();
  return out;
}

template <class F>
bool DecodeGraphs::replayed(Kept& kept, size_t most_kept, const Key& key, int record_at, F work) {
  const auto [found, first] = kept.entries.try_emplace(key);
  Entry& entry = found->second;
  if (first) {
    entry.place = kept.order.insert(kept.order.end(), key);
    if (kept.entries.size() > most_kept) {
      const auto oldest = kept.entries.find(kept.order.front());
      counts_.kept -= oldest->second.graph != nullptr;
      kept.entries.erase(oldest);
      kept.order.pop_front();
    }
  } else {
    kept.order.splice(kept.order.end(), kept.order, entry.place);
  }
  if (!entry.graph && replay && entry.uses + 1 >= record_at) {
    const auto begin = std::chrono::steady_clock::now();
    entry.graph = ops_.capture(work);
    if (entry.graph) {
      counts_.capture_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      ++counts_.captures;
      ++counts_.kept;
    } else {  // this backend, or this process, records nothing
      enabled_ = false;
      clear();
      work();
      return false;
    }
  }
  const bool recorded = entry.graph != nullptr;
  if (recorded) entry.graph->launch();
  else work();
  ++entry.uses;
  return recorded;
}

void DecodeGraphs::run(const BatchView& batch, const AwaitedIds& awaited, const DecodeShape& shape, KvCache& kv,
                       const Arena& scratch) {
  if (const size_t workspace = ops_.workspace_bytes(); workspace != workspace_) {
    clear();
    workspace_ = workspace;
  }
  const Key key = {.shape = shape, .tables = batch.ids, .scratch = scratch.data()};
  counts_.replays += replayed(layers_, most, key, 2, [&] {
    BatchView view = batch;
    view.groups = bounds(batch.groups, shape);
    ops_.take_tokens(awaited.from, awaited.ids, view.rows);
    model_.decode_layers(view, kv, scratch);
  });
}

void DecodeGraphs::run_heads(const BatchView& batch, const DecodeShape& shape, bool plain, Blob& results, Arena& scratch) {
  constexpr int kSteadySteps = 8;
  if (!plain) return model_.decode_heads(batch, scratch);
  const auto work = [&] {
    model_.decode_heads(batch, scratch);
    results.start_download();
  };
  const Key key = {shape, batch.head_rows, scratch.data(), batch.head_count, batch.sampled, results.host()};
  replayed(heads_, most_heads, key, kSteadySteps, work);
}

void DecodeGraphs::clear() {
  layers_ = {};
  heads_ = {};
  counts_.kept = 0;
}

}  // namespace loquetier
