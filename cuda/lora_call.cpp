// Checks and counts on the host that every LoRA op shares.
#include <algorithm>

#include "core/check.h"
#include "lora_call.h"

namespace loquetier::cuda {

LoraCall lora_call(const char* op, const LoraLinear& linear, const LoraGroups& groups, int64_t rows) {
  require(linear.parts >= 1 && linear.parts <= kMaxParts, "[", op, "] linear: expected 1 .. ", kMaxParts, " parts, got ",
          linear.parts);
  LoraCall call;
  call.groups = groups.groups;
  call.count = groups.count;
  call.site = linear.site;
  call.parts = linear.parts;
  call.in = linear.in;
  call.row_keys = groups.row_keys;
  for (int p = 0; p < linear.parts; ++p) {
    call.out[p] = linear.out[p];
    call.stream[p] = dropout_stream(linear.site, p);
  }
  int64_t end = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    require(group.row_begin >= end && group.rows >= 0 && int64_t{group.row_begin} + group.rows <= rows, "[", op, "] groups[", g,
            "]: expected rows between ", end, " and ", rows, ", got ", group.row_begin, " + ", group.rows);
    end = int64_t{group.row_begin} + group.rows;
    if (group.sites == nullptr || group.rows == 0) continue;
    int32_t rank = 0;
    for (int p = 0; p < linear.parts; ++p) rank += group.host_sites[linear.site].part[p].rank;
    require(rank <= groups.max_rank, "[", op, "] groups[", g, "]: expected ranks of at most ", groups.max_rank, " together, got ",
            rank);
    require(group.dropout >= 0 && group.dropout < 1 && (group.dropout == 0 || groups.row_keys != nullptr), "[", op, "] groups[", g,
            "]: expected dropout in [0, 1) with row keys, got ", group.dropout);
  }
  return call;
}

TileCount count_tiles(const LoraGroups& groups, int tile_rows) {
  TileCount count;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.rows == 0) continue;
    count.tiles += (group.rows + tile_rows - 1) / tile_rows;
    count.largest = std::max(count.largest, int64_t{group.rows});
    count.dropout = count.dropout || group.dropout > 0;
  }
  return count;
}

Ranks ranks_of(const LoraLinear& linear, const LoraGroups& groups) {
  Ranks ranks;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.rows == 0) continue;
    int sum = 0;
    for (int p = 0; p < linear.parts; ++p) {
      const int rank = group.host_sites[linear.site].part[p].rank;
      sum += rank;
      ranks.single = std::max(ranks.single, rank);
    }
    ranks.stacked = std::max(ranks.stacked, sum);
  }
  return ranks;
}

bool many_rows(const LoraGroups& groups) {
  constexpr int64_t kLargest = 128, kTogether = 256;  // rows of one group, of all
  int64_t largest = 0, together = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr) continue;
    largest = std::max(largest, int64_t{group.rows});
    together += group.rows;
  }
  return largest >= kLargest && together >= kTogether;
}

bool fast_layout(const LoraLinear& linear, const LoraGroups& groups, std::initializer_list<TensorView> rows) {
  uint64_t bits = static_cast<uint64_t>(linear.in);  // whatever must be a multiple of 8
  for (int p = 0; p < linear.parts; ++p) bits |= static_cast<uint64_t>(linear.out[p]);
  uint64_t pointers = 0;  // whatever must be a multiple of 16
  for (const TensorView& t : rows) {
    bits |= static_cast<uint64_t>(t.ld);
    pointers |= reinterpret_cast<uintptr_t>(t.data);
  }
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.rows == 0) continue;
    for (int p = 0; p < linear.parts; ++p) {
      const LoraPart& part = group.host_sites[linear.site].part[p];
      if (part.rank == 0) continue;
      bits |= static_cast<uint64_t>(part.rank);
      pointers |= reinterpret_cast<uintptr_t>(part.a) | reinterpret_cast<uintptr_t>(part.b);
      if (group.host_grads == nullptr) continue;
      const LoraGradPart& grad = group.host_grads[linear.site].part[p];
      pointers |= reinterpret_cast<uintptr_t>(grad.da) | reinterpret_cast<uintptr_t>(grad.db);
    }
  }
  return bits % 8 == 0 && pointers % 16 == 0;
}

}  // namespace loquetier::cuda
