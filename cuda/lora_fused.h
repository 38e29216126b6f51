// Base product and LoRA as one product with a longer sum, for large groups:
//   forward    y  = [x | E] [w | B]^T      E: scale * s of each part, B [out, R] of the rows' group and the columns' part
//   backward   dx = [dy | E] [w ; A]       E: ds, A [sum R, in] of the rows' group
//   swiglu     forward of gate and up, where h = silu(gate) * up comes out too: a tile is 128 columns of either, and the E of both
//              stand side by side in one
//   swiglu_backward   backward, where dx is dh, the gradient of h = swiglu(gate_up): it stays in registers, gate_up becomes its own
//              gradient and h comes out
// A tile of 128 rows runs its steps over w, then ceil(R / 64) more for every group that stands in it, the last of them only as many
// quarters as the rank needs. E holds, for every pair of (tile, group), a block of 128 rows: zero in rows of other groups and past
// the rank, so a tile that straddles groups adds each row's own and nothing else. Rows without an adapter cost no step. Where no
// tile straddles and all groups have the same ranks, E is ds itself, or scale * s as the shrink wrote it.
//
// A cluster of two blocks computes a pair of tiles one below the other and loads w once for both. The rows that are left over
// behind the last whole pair are one or two strips of their own: of 128 rows, and of at most 64. There both blocks take the same
// rows, each a tile of its own columns; in the strip of 64 rows a tile is half the work. Either way both blocks run the same number
// of steps: slot i of a pair is the i-th group of each tile, or none, whose E is zero.
//
// An item is what a cluster computes at a time: a pair, or two tiles of a left-over strip. Where the last items would leave
// clusters idle, their sums over w are divided among several clusters (fused_schedule.h): all but the last part's are lent through
// memory to the cluster that has that part, which adds them in order, so that results do not change from run to run.
//
// fused_linear.cpp decides, fills these structures and fetches the tensor maps; fused_schedule.cpp deals out the items;
// lora_fused_pack.cu writes E; lora_fused.cuh is the kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/tensor.h"
#include "ops/ops.h"

namespace loquetier::cuda {

constexpr int kFusedRows = 128;     // of a tile
constexpr int kFusedColumns = 256;  // of a tile
constexpr int kFusedDepth = 64;     // of a step: 128 bytes, the width of the swizzle
constexpr int kFusedQuarter = 16;   // of the sum that an instruction takes
constexpr int kFusedQuarters = kFusedDepth / kFusedQuarter;
constexpr int kFusedPair = 2;  // tiles of a cluster
constexpr int kFusedBox = 64;  // rows of x, y and E that move at a time: a warpgroup's

enum class FusedKind { forward, swiglu, backward, swiglu_backward };
constexpr FusedKind kFusedKinds[] = {FusedKind::forward, FusedKind::swiglu, FusedKind::backward, FusedKind::swiglu_backward};
constexpr bool is_backward(FusedKind kind) { return kind == FusedKind::backward || kind == FusedKind::swiglu_backward; }
constexpr bool has_swiglu(FusedKind kind) { return kind == FusedKind::swiglu || kind == FusedKind::swiglu_backward; }
constexpr int tile_columns(FusedKind kind) { return kind == FusedKind::swiglu ? kFusedColumns / 2 : kFusedColumns; }  // of y or h
constexpr int block_columns(FusedKind kind) { return has_swiglu(kind) ? 32 : kFusedDepth; }  // of y, gate and up, at a time

// What a launch can describe. Everything travels as its parameters (of which there may be 32,764 bytes), so that a captured graph
// keeps it; their copy is part of every launch.
constexpr int kFusedMaps = 96;    // (group, part): 32 groups of q|k|v, 48 of gate|up
constexpr int kFusedGroups = 64;  // with an adapter
constexpr int kFusedPairs = 128;  // of tiles: 32,768 rows
constexpr int kFusedStrips = kFusedPairs + 2;
constexpr int kFusedSlots = 320;  // over all strips
constexpr int kFusedClusters = 128;
constexpr int kFusedPieces = 640;

// Which groups stand in which tiles. Strips: the pairs from the top, then what is left over.
struct FusedTable {
  int32_t pairs = 0;
  int32_t strips = 0;
  int32_t half = -1;  // the strip of at most 64 rows
  int32_t slots = 0;
  int32_t groups = 0;
  int32_t parts = 1;                                // of the extension: 1 for all but forward
  bool by_rows = false;                             // E is [T, sum R]: a tile has its own rows of it, and no blocks
  int32_t width = 0;                                // columns of a block of E for one part, a multiple of kFusedDepth
  int32_t column[kMaxParts] = {};                   // of E, where a part begins
  uint16_t slot_begin[kFusedStrips + 1] = {};       // [strips + 1]
  uint8_t slot_strip[kFusedSlots] = {};             // [slots]
  int8_t slot_group[kFusedSlots][kFusedPair] = {};  // [slots]: of either tile, -1: none; of a left-over strip [0]
  uint8_t quarters[kFusedGroups][kMaxParts] = {};   // ceil(R / kFusedQuarter); swiglu: of gate and up together
  uint8_t gate[kFusedGroups] = {};                  // swiglu: of gate

  // First row of a strip's upper tile; a left-over strip has no other.
  __host__ __device__ int row(int strip) const {
    return strip <= pairs ? strip * kFusedPair * kFusedRows : pairs * kFusedPair * kFusedRows + kFusedRows;
  }
};
static_assert(kFusedStrips <= 256 && kFusedGroups <= 128);

// Of an item's steps over w those in [begin, end). With the last of them the steps of its groups, and the sums of the parts before.
struct FusedPiece {
  uint16_t item = 0;  // counted from FusedSchedule::dealt
  uint16_t begin = 0, end = 0;
  uint16_t part = 0;
};
struct FusedSchedule {
  int32_t dealt = 0;  // items that the clusters take in turn, whole: a multiple of the clusters. The others are in pieces
  // Of the items that are divided, the first and the parts of each. Part p < parts - 1 of the i-th lends its sums in place
  // i * (parts - 1) + p.
  int32_t divided = 0, parts = 1;
  uint16_t piece_begin[kFusedClusters + 1] = {};  // [clusters + 1]
  uint16_t before[kFusedClusters] = {};  // [clusters]: dealt items in front of the cluster's pieces; all but whole ones come last
  FusedPiece pieces[kFusedPieces] = {};
};

struct FusedArgs {
  CUtensorMap x;              // [T, K]: x, or dy
  CUtensorMap w;              // [sum out, in]
  CUtensorMap y;              // [T, N]: y, dx, or h
  CUtensorMap gate, up;       // [T, N] each: swiglu, swiglu_backward
  CUtensorMap e;              // [slots * 256, parts * width]; by_rows [T, sum R]
  CUtensorMap q[kFusedMaps];  // [groups, maps]: B [out, R] of each part, or A [sum R, in]
  FusedTable table;
  FusedSchedule schedule;
  float* sums = nullptr;       // [places, 2 blocks, 2 warpgroups, kFusedSums], as the registers lie; as many places as clusters
  uint32_t* ready = nullptr;   // [places, 2, 2]: 1 when the sums are there; 0 before and after the launch
  const void* bias = nullptr;  // [N] or null
  int32_t columns = 0;         // N: of y, dx or h
  int32_t maps = 1;            // of a group
  bool wait_first = false;     // x may come from the launch in front
  int32_t column_tiles = 0;
  int32_t steps = 0;                      // over w: ceil(K / kFusedDepth)
  int32_t part_tile[kMaxParts + 1] = {};  // first column tile of each part
};
static_assert(sizeof(FusedArgs) <= 32764);

// Where an item lies, seen by one block of the cluster.
struct FusedWork {
  int strip = 0;
  int row = 0, column = 0;        // of the block's tile; the column is that of a tile
  int part[kFusedPair] = {0, 0};  // of either block's columns
  bool wide = false;              // a left-over strip: both blocks have the same rows
  bool half = false;              // of 64 rows
};
constexpr int kFusedSums = 64 * kFusedColumns;  // of a warpgroup

// Pairs of tiles run side by side in bands along the longer side of y: about 8 x 8 are under way, so each operand is read from
// memory once for eight.
constexpr int kFusedBand = 8;

__host__ __device__ inline int fused_items(const FusedArgs& a) {
  return a.table.pairs * a.column_tiles + (a.table.strips - a.table.pairs) * ((a.column_tiles + 1) / 2);
}
__host__ __device__ inline FusedWork fused_work(const FusedArgs& a, int item, int rank) {
  const FusedTable& t = a.table;
  const auto part_of = [&](int column) {
    int part = 0;
    while (part + 1 < t.parts && column >= a.part_tile[part + 1]) ++part;
    return part;
  };
  FusedWork work;
  const int left_over = item - t.pairs * a.column_tiles;
  if (left_over < 0) {
    const bool upright = a.column_tiles < t.pairs;  // bands of columns
    const int length = upright ? t.pairs : a.column_tiles, width = upright ? a.column_tiles : t.pairs;
    const int first = item / (kFusedBand * length) * kFusedBand, inside = item - first * length;
    const int height = width - first < kFusedBand ? width - first : kFusedBand, along = inside / height;
    const int across = first + inside - along * height;
    work.column = upright ? across : along;
    work.strip = upright ? along : across;
    work.row = t.row(work.strip) + rank * kFusedRows;
    work.part[0] = work.part[1] = part_of(work.column);
  } else {
    const int twos = (a.column_tiles + 1) / 2, below = left_over / twos, column = (left_over - below * twos) * 2;
    work.strip = t.pairs + below;
    work.row = t.row(work.strip);
    work.column = column + rank;  // the last one may lie past the edge
    for (int block = 0; block < kFusedPair; ++block) work.part[block] = part_of(column + block);
    work.wide = true;
    work.half = work.strip == t.half;
  }
  return work;
}
// Quarters of a slot's steps: of the largest rank in either block; the others' operands are zero from their own rank on.
__host__ __device__ inline int fused_slot_quarters(const FusedTable& t, int slot, const FusedWork& work) {
  int quarters = 0;
  for (int block = 0; block < kFusedPair; ++block) {
    const int group = t.slot_group[slot][work.wide ? 0 : block];
    const int own = group < 0 ? 0 : t.quarters[group][work.part[block]];
    quarters = own > quarters ? own : quarters;
  }
  return quarters;
}

struct FusedPackArgs {
  FusedTable table;
  const void* s = nullptr;  // [T, >= sum R]: s, or ds
  int64_t ld_s = 0;
  void* e = nullptr;
  int32_t row_begin[kFusedGroups] = {}, row_end[kFusedGroups] = {};
  int32_t rank[kFusedGroups][kMaxParts] = {};
  int32_t column[kFusedGroups][kMaxParts] = {};  // of E, where a part begins
  float scale[kFusedGroups][kMaxParts] = {};
};

// lora_fused_pack.cu
void fused_pack(DType dtype, const FusedPackArgs& args, cudaStream_t stream);
// lora_fused_bf16.cu, lora_fused_f16.cu. `clusters`: how many run at a time, as fused_clusters_*() says. `overlap`: begins beside
// the launch in front. Unless wait_first, that is the one that writes E, which is not needed before an item's last steps.
void fused_product_bf16(const FusedArgs& args, FusedKind kind, int clusters, bool overlap, cudaStream_t stream);
void fused_product_f16(const FusedArgs& args, FusedKind kind, int clusters, bool overlap, cudaStream_t stream);
int fused_clusters_bf16(FusedKind kind);
int fused_clusters_f16(FusedKind kind);

}  // namespace loquetier::cuda
