// The host side of the fused product (lora_fused.h).
#include "fused_linear.h"

#include <algorithm>

#include "core/check.h"
#include "cuda_check.h"
#include "fused_schedule.h"
#include "lora_call.h"

namespace loquetier::cuda {

namespace {

constexpr int32_t kLargeGroup = 64;  // rows from which on a group is worth steps of its own in two tiles
// What the unfused way costs, in steps of a tile: y [128, 256] written and read once more is the traffic of 6 steps' arithmetic on
// an H100 (2.4 TB/s of copies beside 700 TFLOP/s). Beyond that on the average, ranks or boundaries make fusing the slower way.
constexpr int64_t kExtraSteps = 6;
static_assert(kFusedBlockRows == kFusedPair * kFusedRows && kFusedBlockColumns == kFusedDepth && kMostFusedPairs == kFusedPairs &&
              kMostFusedGroups == kFusedGroups && kMostFusedBlocks == kFusedSlots);

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

const LoraSite* site_of(const LoraGroup& group, const LoraLinear& linear) {
  return group.sites == nullptr || group.rows == 0 ? nullptr : group.host_sites + linear.site;
}
int32_t rank_of(const LoraSite& site, const LoraLinear& linear) {
  int32_t rank = 0;
  for (int p = 0; p < linear.parts; ++p) rank += site.part[p].rank;
  return rank;
}

// Without the small groups at the end, which cost less apart.
LoraGroups large_groups(const LoraLinear& linear, LoraGroups groups) {
  const auto small = [&](const LoraGroup& group) { return site_of(group, linear) == nullptr || group.rows < kLargeGroup; };
  while (groups.count > 0 && small(groups.host_groups[groups.count - 1])) --groups.count;
  return groups;
}

// Columns of s or ds where they can be E as they are: in every tile rows of one group or none, the same ranks for all, in whole
// quarters. 0: they cannot.
int32_t columns_of_e(const LoraLinear& linear, const LoraGroups& groups, int64_t rows) {
  const LoraSite* first = nullptr;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    const LoraSite* site = site_of(group, linear);
    if (site == nullptr || rank_of(*site, linear) == 0) continue;
    if (first == nullptr) first = site;
    const int64_t end = int64_t{group.row_begin} + group.rows;
    if (group.row_begin % kFusedRows != 0 || (end % kFusedRows != 0 && end != rows)) return 0;
    for (int p = 0; p < linear.parts; ++p) {
      const int32_t rank = site->part[p].rank;
      if (rank != first->part[p].rank || rank % kFusedQuarter != 0) return 0;
    }
  }
  return first == nullptr ? 0 : rank_of(*first, linear);
}

// Groups and tiles of a launch, into args.table, args.part_tile and pack. False: more than a launch can describe, or not worth it.
bool lay_out(FusedKind kind, const LoraLinear& linear, const LoraGroups& groups, int64_t rows, FusedArgs& args,
             FusedPackArgs& pack) {
  const bool backward = is_backward(kind), swiglu = kind == FusedKind::swiglu;
  FusedTable& table = args.table;
  table.parts = backward || swiglu ? 1 : linear.parts;
  args.maps = backward ? 1 : linear.parts;
  for (int p = 0; p < table.parts; ++p) {
    const int64_t columns = backward ? linear.in : linear.out[p];
    if (p + 1 < table.parts && columns % kFusedColumns != 0) return false;  // a tile would stand in two parts
    args.part_tile[p + 1] = args.part_tile[p] + static_cast<int32_t>(ceil_of(columns, tile_columns(kind)));
  }
  args.column_tiles = args.part_tile[table.parts];

  int32_t most = 1;  // steps of one part
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    const LoraSite* site = site_of(group, linear);
    if (site == nullptr || rank_of(*site, linear) == 0) continue;
    if (backward && group.dropout > 0) return false;  // the mask comes after A
    const int32_t n = table.groups;
    if (n == kFusedGroups || (n + 1) * args.maps > kFusedMaps) return false;
    ++table.groups;
    pack.row_begin[n] = group.row_begin;
    pack.row_end[n] = group.row_begin + group.rows;
    int64_t quarters = 0;
    for (int p = 0; p < args.maps; ++p) {
      pack.rank[n][p] = backward ? rank_of(*site, linear) : site->part[p].rank;
      pack.scale[n][p] = backward ? 1.0f : site->part[p].scale;
      if (swiglu && p == 1) {
        table.gate[n] = static_cast<uint8_t>(quarters);
        pack.column[n][p] = static_cast<int32_t>(quarters) * kFusedQuarter;
      } else {
        quarters = 0;
      }
      quarters += ceil_of(pack.rank[n][p], kFusedQuarter);
      if (quarters > 255) return false;
      table.quarters[n][swiglu ? 0 : p] = static_cast<uint8_t>(quarters);
      most = std::max(most, static_cast<int32_t>(ceil_of(quarters, kFusedQuarters)));
    }
  }
  table.width = most * kFusedDepth;
  for (int p = 1; p < table.parts; ++p) {
    table.column[p] = table.by_rows ? table.column[p - 1] + pack.rank[0][p - 1] : p * table.width;
    for (int32_t n = 0; n < table.groups; ++n) pack.column[n][p] = table.column[p];
  }

  if (!fused_strips(rows, args)) return false;
  int64_t extra = 0;  // steps of all tiles
  int32_t first = 0;  // the first group that does not end above the tile
  for (int32_t strip = 0; strip < table.strips; ++strip) {
    table.slot_begin[strip] = static_cast<uint16_t>(table.slots);
    const int32_t tiles = strip < table.pairs ? kFusedPair : 1;
    int32_t begin[kFusedPair] = {}, count[kFusedPair] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t top = table.row(strip) + tile * kFusedRows;
      while (first < table.groups && pack.row_end[first] <= top) ++first;
      int32_t last = first;
      while (last < table.groups && pack.row_begin[last] < top + kFusedRows) ++last;
      begin[tile] = first;
      count[tile] = last - first;
    }
    for (int32_t i = 0; i < std::max(count[0], count[1]); ++i) {
      if (table.slots == kFusedSlots) return false;
      table.slot_strip[table.slots] = static_cast<uint8_t>(strip);
      int32_t quarters[kMaxParts] = {};
      for (int tile = 0; tile < kFusedPair; ++tile) {
        const int32_t group = i < count[tile] ? begin[tile] + i : -1;
        table.slot_group[table.slots][tile] = static_cast<int8_t>(group);
        for (int p = 0; p < table.parts && group >= 0; ++p) quarters[p] = std::max<int32_t>(quarters[p], table.quarters[group][p]);
      }
      for (int p = 0; p < table.parts; ++p)
        extra += ceil_of(quarters[p], kFusedQuarters) * (args.part_tile[p + 1] - args.part_tile[p]);
      ++table.slots;
    }
  }
  table.slot_begin[table.strips] = static_cast<uint16_t>(table.slots);
  return extra <= kExtraSteps * table.strips * args.column_tiles;
}

}  // namespace

FusedLinear::FusedLinear(CudaDevice& device, DType dtype, TensorMaps& maps, bool deterministic)
    : device_(device), dtype_(dtype), maps_(maps), e_(device) {
  device_.use();
  if (deterministic) return;  // then never asked
  for (const FusedKind kind : kFusedKinds) {
    const int clusters = dtype_ == DType::bf16 ? fused_clusters_bf16(kind) : fused_clusters_f16(kind);
    clusters_[static_cast<int>(kind)] = std::min(clusters, kFusedClusters);
  }
  sums_ = Buffer(device_, static_cast<size_t>(device_.processors()) * kFusedSumsOfProcessor);
  device_.zero(sums_.data(), sums_.bytes());  // the flags
}

int32_t FusedLinear::forward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView w, TensorView bias,
                             TensorView s, TensorView e, TensorView y) {
  return run(FusedKind::forward, linear, groups, x, w, bias.data, s, e, y);
}

int32_t FusedLinear::swiglu(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView w, TensorView s,
                            TensorView e, TensorView gate_up, TensorView h) {
  return run(FusedKind::swiglu, linear, groups, x, w, nullptr, s, e, h, gate_up);
}

int32_t FusedLinear::backward(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView w, TensorView ds,
                              TensorView dx) {
  return run(FusedKind::backward, linear, groups, dy, w, nullptr, ds, {}, dx);
}

bool FusedLinear::swiglu_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView w, TensorView ds,
                                  TensorView gate_up, TensorView h) {
  return run(FusedKind::swiglu_backward, linear, groups, dy, w, nullptr, ds, {}, h, gate_up) >= 0;
}

TensorView FusedLinear::place_of_e(const LoraLinear& linear, LoraGroups groups, int64_t rows) {
  const int32_t columns = columns_of_e(linear, large_groups(linear, groups), rows);
  if (columns == 0) return {};
  return matrix(e_.get(static_cast<size_t>(rows * columns) * size_of(dtype_)), dtype_, rows, columns);
}

int32_t FusedLinear::run(FusedKind kind, const LoraLinear& linear, LoraGroups groups, TensorView x, TensorView w, const void* bias,
                         TensorView s, TensorView e, TensorView y, TensorView gate_up) {
  const bool backward = is_backward(kind);
  const int most = clusters_[static_cast<int>(kind)];
  const int32_t all = groups.count;
  groups = large_groups(linear, groups);
  if (kind == FusedKind::swiglu_backward && groups.count < all) return -1;
  FusedArgs args = {};
  FusedPackArgs pack = {};
  if (const int32_t columns = backward ? columns_of_e(linear, groups, x.rows) : 0; columns > 0) e = s.slice_cols(0, columns);
  args.table.by_rows = !e.empty();
  if (most == 0 || reinterpret_cast<uintptr_t>(bias) % 4 != 0 || !fast_layout(linear, groups, {x, w, y, gate_up}) ||
      ceil_of(x.cols, kFusedDepth) > UINT16_MAX || !lay_out(kind, linear, groups, x.rows, args, pack))
    return -1;
  FusedTable& table = args.table;
  if (table.slots > 0 && !fast_layout(linear, groups, {s})) return -1;

  device_.use();
  args.x = maps_.get(x, kFusedDepth, kFusedBox);
  args.w = maps_.get(w, kFusedDepth, backward ? kFusedDepth : kFusedColumns / kFusedPair);
  const int64_t block = block_columns(kind);
  args.y = maps_.get(y, block, kFusedBox);
  if (!gate_up.empty()) {
    args.gate = maps_.get(gate_up.slice_cols(0, y.cols), block, kFusedBox);
    args.up = maps_.get(gate_up.slice_cols(y.cols, y.cols), block, kFusedBox);
  }
  args.bias = bias;
  args.columns = static_cast<int32_t>(y.cols);
  args.steps = static_cast<int32_t>(ceil_of(x.cols, kFusedDepth));
  args.e = args.x;  // never read without slots, but fetched ahead
  if (table.slots > 0) {
    if (!table.by_rows) {
      const int64_t e_rows = int64_t{table.slots} * kFusedPair * kFusedRows, e_columns = int64_t{table.parts} * table.width;
      e = matrix(e_.get(static_cast<size_t>(e_rows * e_columns) * size_of(dtype_)), dtype_, e_rows, e_columns);
      pack.table = table;
      pack.s = s.data;
      pack.ld_s = s.ld;
      pack.e = e.data;
      fused_pack(dtype_, pack, device_.stream());
    }
    args.wait_first = table.by_rows && backward;
    args.e = maps_.get(e, kFusedDepth, kFusedBox);
    encode_maps(kind, linear, groups, pack, args);
  }
  const int32_t clusters = fused_schedule(args, most);
  args.sums = static_cast<float*>(sums_.data());
  args.ready = reinterpret_cast<uint32_t*>(args.sums + int64_t{device_.processors()} * 2 * kFusedSums);
  (dtype_ == DType::bf16 ? fused_product_bf16 : fused_product_f16)(args, kind, clusters, table.slots > 0, device_.stream());
  return groups.count;
}

// Maps of every (group, part). The kernel reads the entry of a part that a group leaves alone too, outside of the matrix: it gets
// another group's map.
void FusedLinear::encode_maps(FusedKind kind, const LoraLinear& linear, const LoraGroups& groups, const FusedPackArgs& pack,
                              FusedArgs& args) {
  const auto map = [&](const void* data, int64_t rows, int64_t columns, int64_t box_rows) {
    return maps_.get(matrix(const_cast<void*>(data), dtype_, rows, columns), kFusedDepth, box_rows);
  };
  const CUtensorMap* some = nullptr;
  int32_t n = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraSite* site = site_of(groups.host_groups[g], linear);
    if (site == nullptr || rank_of(*site, linear) == 0) continue;
    for (int p = 0; p < args.maps; ++p) {
      if (pack.rank[n][p] == 0) continue;
      CUtensorMap& to = args.q[n * args.maps + p];
      if (is_backward(kind)) {
        const void* a = nullptr;  // the parts' A are one matrix
        for (int i = linear.parts - 1; i >= 0; --i) a = site->part[i].rank > 0 ? site->part[i].a : a;
        to = map(a, pack.rank[n][p], linear.in, kFusedDepth);
      } else {
        to = map(site->part[p].b, linear.out[p], pack.rank[n][p], tile_columns(kind));
      }
      if (some == nullptr) some = &to;
    }
    ++n;
  }
  for (int32_t i = 0; i < n * args.maps; ++i)
    if (pack.rank[i / args.maps][i % args.maps] == 0) args.q[i] = *some;
}

}  // namespace loquetier::cuda
