// Base product and LoRA as one product with a longer sum, for large groups:
//   forward    y  = [x | E] [w | B]^T      E: scale * s of each part, B [out, R] of the rows' group and the columns' part
//   backward   dx = [dy | E] [w ; A]       E: ds, A [sum R, in] of the rows' group
// A tile of 128 rows runs its steps over w, then ceil(R / 64) more for every group that stands in it. E holds, for every pair of
// (tile, group), a block of 128 rows: zero in rows of other groups and past the rank, so a tile that straddles groups adds each
// row's own and nothing else. Rows without an adapter cost no step.
//
// Two tiles one below the other are computed by a cluster, which loads w once for both; so both run the same number of steps: slot
// i of a pair is the i-th group of each tile, or none, whose E is zero.
//
// fused_linear.cpp decides, fills these structures and encodes the tensor maps; lora_fused_pack.cu writes E; lora_fused.cuh is the
// kernel.
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
constexpr int kFusedPair = 2;       // tiles of a cluster, along rows

// What a launch can describe. Everything travels as its parameters (of which there may be 32,764 bytes), so that a captured graph
// keeps it; their copy is part of every launch.
constexpr int kFusedMaps = 96;    // (group, part): 32 groups of q|k|v, 48 of gate|up
constexpr int kFusedGroups = 64;  // with an adapter
constexpr int kFusedPairs = 128;  // of tiles: 32,768 rows
constexpr int kFusedSlots = 320;  // over all pairs

// Which groups stand in which tiles.
struct FusedTable {
  int32_t pairs = 0;
  int32_t slots = 0;
  int32_t groups = 0;
  int32_t parts = 1;                                // of the extension: 1 for backward
  int32_t width = 0;                                // columns of E for one part, a multiple of kFusedDepth
  uint16_t slot_begin[kFusedPairs + 1] = {};        // [pairs + 1]
  uint8_t slot_pair[kFusedSlots] = {};              // [slots]
  int8_t slot_group[kFusedSlots][kFusedPair] = {};  // [slots]: of either tile; -1: none
  uint8_t steps[kFusedGroups][kMaxParts] = {};      // ceil(R / kFusedDepth)
};
static_assert(kFusedPairs <= 256 && kFusedGroups <= 128);

struct FusedArgs {
  CUtensorMap x;              // [T, K]: x, or dy
  CUtensorMap w;              // [sum out, in]
  CUtensorMap y;              // [T, N]: y, or dx
  CUtensorMap e;              // [slots * 256, parts * width]
  CUtensorMap q[kFusedMaps];  // [groups * parts]: B [out, R], or A [sum R, in]
  FusedTable table;
  const void* bias = nullptr;  // [N] or null
  int32_t columns = 0;         // N
  int32_t column_tiles = 0;
  int32_t steps = 0;                      // over w: ceil(K / kFusedDepth)
  int32_t part_tile[kMaxParts + 1] = {};  // first column tile of each part
};
static_assert(sizeof(FusedArgs) <= 32764);

struct FusedPackArgs {
  FusedTable table;
  const void* s = nullptr;  // [T, >= sum R]: s, or ds
  int64_t ld_s = 0;
  void* e = nullptr;
  int32_t row_begin[kFusedGroups] = {}, row_end[kFusedGroups] = {};
  int32_t rank[kFusedGroups][kMaxParts] = {};
  float scale[kFusedGroups][kMaxParts] = {};
};

// lora_fused_pack.cu
void fused_pack(DType dtype, const FusedPackArgs& args, cudaStream_t stream);
// lora_fused_bf16.cu, lora_fused_f16.cu. `clusters`: how many run at a time, as fused_clusters_*() says.
void fused_product_bf16(const FusedArgs& args, bool backward, int clusters, cudaStream_t stream);
void fused_product_f16(const FusedArgs& args, bool backward, int clusters, cudaStream_t stream);
int fused_clusters_bf16(bool backward);
int fused_clusters_f16(bool backward);

}  // namespace loquetier::cuda
