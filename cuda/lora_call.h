// One LoRA call as the kernels get it, and the host's checks and counts before a launch (lora_call.cpp).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "ops/ops.h"

namespace loquetier::cuda {

struct LoraCall {
  const LoraGroup* groups = nullptr;
  int32_t count = 0;
  int32_t site = 0;
  int32_t parts = 0;
  int64_t in = 0;
  int64_t out[kMaxParts] = {};
  const uint64_t* row_keys = nullptr;
  uint32_t stream[kMaxParts] = {};  // of the dropout mask
};

// Checks groups against the rows they index, and ranks against max_rank.
LoraCall lora_call(const char* op, const LoraLinear& linear, const LoraGroups& groups, int64_t rows);

// All groups with an adapter, cut into tiles of `tile_rows`.
struct TileCount {
  int64_t tiles = 0;
  int64_t largest = 0;   // rows of the largest group
  bool dropout = false;  // any group has one
};
TileCount count_tiles(const LoraGroups& groups, int tile_rows);

// Whether all columns, ranks and pointers of this linear and these rows allow 16-byte loads.
bool fast_layout(const LoraLinear& linear, const LoraGroups& groups, std::initializer_list<TensorView> rows);

// Ranks of one linear over the groups with rows: the largest sum over the parts of a group, the largest of one part.
struct Ranks {
  int stacked = 0;
  int single = 0;
};
Ranks ranks_of(const LoraLinear& linear, const LoraGroups& groups);

// Whether the passes over many rows pay (lora_tall.cu, lora_wide.cu): measured against the kernels for any size (lora_reduce.cu,
// lora_grad.cu), which a layout that is not fast needs anyway.
bool many_rows(const LoraGroups& groups);

inline int64_t columns_of(const LoraLinear& linear) {
  int64_t columns = 0;
  for (int p = 0; p < linear.parts; ++p) columns += linear.out[p];
  return columns;
}

}  // namespace loquetier::cuda
