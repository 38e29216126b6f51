// Attention of decodes (attention_decode.cu): its sizes and arguments, who does which units of keys, and the ring of stages that
// keys and values pass through.
#pragma once

#include "lora.cuh"
#include "ops/workspace.h"
#include "shares.cuh"
#include "tma.cuh"

namespace loquetier::cuda::attention {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kTileKeys = 16, kUnitKeys = kWarps * kTileKeys;
constexpr int kRingBytes = 24 * 1024;  // of a warp
constexpr int kHeads = 8;              // of a tile of n

template <int kD>
struct Tiling {
  static constexpr int row = kD * 2, matrix = kTileKeys * row, stage = 2 * matrix;  // K and V
  static constexpr int stages = kRingBytes / stage;
  static constexpr int meeting = kWarps * kHeads * kD * static_cast<int>(sizeof(float));  // the warps' sums of eight heads
  static constexpr int shared = kWarps * kRingBytes + meeting;
};

// What rope in front takes beside qkv.
struct RopeArgs {
  KShares shares;  // of qkv: in its place, unless their count is 0
  const float* cos_sin;
  int64_t ld_cos;
  const void* q_norm;  // [D] or null
  const void* k_norm;
  float eps;
  const int32_t* kv_slots;
};

struct DecodeAttentionArgs {
  const void* q;  // with rope: qkv
  int64_t ld_q;
  void* out;
  int64_t ld_out;
  void* k;  // written with rope alone
  void* v;
  const int32_t* row_begin;
  const int32_t* rows;
  const int32_t* kv_len;
  const int32_t* page_table;
  int sequences, max_pages, page_bits;  // a page holds 2^page_bits keys
  int kv_heads, group;
  float scale;        // of the scores, to base 2
  unsigned* tickets;  // [blocks] 0 between launches
  float2* marks;      // [blocks, 2, kMostHeads] largest score and sum of exponentials
  float* sums;        // [blocks, 2, kMostHeads, kD]
  RopeArgs rope;
};
constexpr int kMostHeads = kMostDecodeGroup;
static_assert(kMostHeads % kHeads == 0);

// 16 bytes that nothing else will read, zeros unless `real`.
__device__ inline void copy_async(uint32_t to, const std::byte* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(real ? 16 : 0),
               "l"(kStreamOnce)
               : "memory");
}
struct Fragment {
  uint32_t v[4];
};
__device__ inline Fragment load_blocks(uint32_t address) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.v[0]), "=r"(f.v[1]), "=r"(f.v[2]), "=r"(f.v[3])
               : "r"(address)
               : "memory");
  return f;
}
__device__ inline Fragment load_blocks_transposed(uint32_t address) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.v[0]), "=r"(f.v[1]), "=r"(f.v[2]), "=r"(f.v[3])
               : "r"(address)
               : "memory");
  return f;
}

// ---------------------------------------------------------------- who does what

// The tables of a step are read by every layer, with all of the weights in between: they are to stay in the L2.
__device__ inline int table_entry(const int32_t* p) {
  int32_t value;
  asm("ld.global.nc.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(value) : "l"(p), "l"(kKeep));
  return value;
}

__device__ inline int keys_of(const DecodeAttentionArgs& a, int sequence) {
  if (sequence >= a.sequences) return 0;
  const int rows = table_entry(a.rows + sequence), keys = table_entry(a.kv_len + sequence);
  return rows > 0 ? keys : 0;
}
__device__ inline int units_of(int keys) { return (keys + kUnitKeys - 1) / kUnitKeys; }

// `total` units over `blocks` blocks, the first ones one more than the others where it does not come out even.
struct Shares {
  int total, blocks;
  __device__ int begin(int block) const { return block * (total / blocks) + min(block, total % blocks); }
  __device__ int owner(int unit) const {
    const int each = total / blocks, more = total % blocks;
    return unit < more * (each + 1) ? unit / (each + 1) : more + (unit - more * (each + 1)) / each;
  }
};

// A unit: keys [unit * kUnitKeys, …) of one kv head of a sequence.
struct Place {
  int sequence, head, unit;
  int units, keys;  // of the sequence
  __device__ void advance(const DecodeAttentionArgs& a) {
    if (++unit < units) return;
    unit = 0;
    if (++head < a.kv_heads) return;
    head = 0;
    do keys = keys_of(a, ++sequence);
    while (keys == 0 && sequence < a.sequences);
    units = units_of(keys);
  }
};

// The place of unit `index` of all. Every warp looks for itself.
__device__ inline Place find_unit(const DecodeAttentionArgs& a, int index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int base = 0;; base += kWarp) {
    const int keys = keys_of(a, base + lane), units = units_of(keys) * a.kv_heads;
    const int sum = warp_prefix_sum(units);
    const unsigned hit = __ballot_sync(0xffffffffu, index < sum);
    if (hit != 0) {
      const int winner = __ffs(static_cast<int>(hit)) - 1;
      index -= __shfl_sync(0xffffffffu, sum - units, winner);
      const int all = __shfl_sync(0xffffffffu, keys, winner);
      return {base + winner, index / units_of(all), index % units_of(all), units_of(all), all};
    }
    index -= __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

// ---------------------------------------------------------------- the ring

// The page of this lane's key in the warp's tile of the unit at `place`; it is asked for a turn before the tile is.
__device__ inline int first_key(const Place& place) {
  return place.unit * kUnitKeys + static_cast<int>(threadIdx.x) / kWarp * kTileKeys;
}
__device__ inline int page_of(const DecodeAttentionArgs& a, const Place& place) {
  const int key = first_key(place) + static_cast<int>(threadIdx.x) % kTileKeys;
  return key < place.keys ? table_entry(a.page_table + int64_t{place.sequence} * a.max_pages + (key >> a.page_bits)) : 0;
}

// Where 16 bytes of a row lie in a matrix of a stage, so that neither rows nor columns of them meet in a bank.
template <int kD>
__device__ inline uint32_t chunk_of(uint32_t matrix, int row, int chunk) {
  return matrix + static_cast<uint32_t>(row * Tiling<kD>::row + (chunk ^ (row % 8)) * 16);
}

// Copies this warp's 16 keys and values of the unit at `place`.
template <int kD>
__device__ inline void fetch(const DecodeAttentionArgs& a, const Place& place, int page, uint32_t stage) {
  using S = Tiling<kD>;
  constexpr int kChunks = kD / 8, kRows = kWarp / kChunks;  // of 16 bytes in a row; rows at once
  const int lane = static_cast<int>(threadIdx.x) % kWarp, chunk = lane % kChunks, key0 = first_key(place);
  const int slot = (page << a.page_bits) + ((key0 + lane % kTileKeys) & ((1 << a.page_bits) - 1));
  const int64_t stride = int64_t{a.kv_heads} * S::row, column = place.head * S::row + chunk * 16;
#pragma unroll
  for (int i = 0; i < kTileKeys / kRows; ++i) {
    const int row = i * kRows + lane / kChunks;
    const int64_t from = __shfl_sync(0xffffffffu, slot, row) * stride + column;
    const bool real = key0 + row < place.keys;
    const uint32_t to = chunk_of<kD>(stage, row, chunk);
    copy_async(to, static_cast<const std::byte*>(a.k) + from, real);
    copy_async(to + S::matrix, static_cast<const std::byte*>(a.v) + from, real);
  }
}

}  // namespace loquetier::cuda::attention
