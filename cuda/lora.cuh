// What the LoRA kernels share: finding the tile of a block, fragments of the tensor-core product m16n8k16, and loads that keep to
// the true rank.
//
// Fragments of m16n8k16 (g = lane / 4, q = lane % 4), 16-bit operands, f32 sums:
//   a[0] (m g, k 2q..2q+1)   a[1] (m g+8, k 2q..)   a[2] (m g, k 2q+8..)   a[3] (m g+8, k 2q+8..)
//   b[0] (k 2q..2q+1, n g)   b[1] (k 2q+8.., n g)
//   c[0] (m g, n 2q)  c[1] (m g, n 2q+1)  c[2] (m g+8, n 2q)  c[3] (m g+8, n 2q+1)
// The order of k inside a product is free as long as both operands agree, and so is which row or column a slot of m or n stands
// for. The kernels use that to read and write 16 bytes a lane straight from global memory: no shared-memory staging. Where an
// operand lies with the wrong side contiguous, 8 x 8 blocks are transposed in registers (movmatrix).
#pragma once

#include <cstddef>

#include "common.cuh"
#include "core/random.h"
#include "lora_call.h"
#include "ops/ops.h"

namespace loquetier::cuda {

constexpr int kLoraThreads = 256;
constexpr int kLoraWarps = kLoraThreads / kWarp;
constexpr int kMaxCluster = 8;

// The tables of groups and sites are small and read by every launch, with all of the base weights streaming through the L2 in
// between: they ask to be evicted last, or each launch would begin with two trips to memory in a row.
__device__ inline uint64_t keep_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t load_kept(const void* p, uint64_t policy) {
  uint64_t value;
  asm("ld.global.nc.L2::cache_hint.b64 %0, [%1], %2;" : "=l"(value) : "l"(p), "l"(policy));
  return value;
}

struct Tile {
  int group = -1;
  int64_t row = 0;  // first row
  int rows = 0;
  const LoraSite* sites = nullptr;
};

// Tile `index` when every group with an adapter is cut into tiles of `tile_rows`. All lanes of a warp call it together.
__device__ inline Tile find_tile(const LoraCall& call, int tile_rows, int index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint64_t policy = keep_policy();
#pragma unroll 1
  for (int base = 0; base < call.count; base += kWarp) {
    const int g = base + lane;
    int tiles = 0;
    uint64_t place = 0, sites = 0;  // row_begin and rows; sites
    if (g < call.count) {
      static_assert(offsetof(LoraGroup, row_begin) == 0 && offsetof(LoraGroup, rows) == 4 && offsetof(LoraGroup, sites) == 8);
      place = load_kept(call.groups + g, policy);
      sites = load_kept(&call.groups[g].sites, policy);
      if (sites != 0) tiles = (static_cast<int>(place >> 32) + tile_rows - 1) / tile_rows;
    }
    const int sum = warp_prefix_sum(tiles);
    const unsigned hit = __ballot_sync(0xffffffffu, index < sum);
    if (hit != 0) {
      const int winner = __ffs(static_cast<int>(hit)) - 1;
      const int first = __shfl_sync(0xffffffffu, sum - tiles, winner);
      place = __shfl_sync(0xffffffffu, place, winner);
      sites = __shfl_sync(0xffffffffu, sites, winner);
      const int begin = (index - first) * tile_rows;
      return {base + winner, static_cast<int64_t>(static_cast<uint32_t>(place)) + begin,
              min(tile_rows, static_cast<int>(place >> 32) - begin), reinterpret_cast<const LoraSite*>(sites)};
    }
    index -= __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
  return {};
}

// An adapter's entry in shared memory: one trip to memory for all its fields, which are then indexed freely. The whole block calls
// it; `to` may be read after the next __syncthreads().
__device__ inline void fetch_site(const LoraSite* from, LoraSite& to) {
  constexpr int kWords = sizeof(LoraSite) / sizeof(uint64_t);
  if (threadIdx.x < kWords)
    reinterpret_cast<uint64_t*>(&to)[threadIdx.x] = load_kept(reinterpret_cast<const uint64_t*>(from) + threadIdx.x, keep_policy());
}

// ---------------------------------------------------------------- products

template <class T>
__device__ inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The transposed 8 x 8 block: lane (g, q) gives row g, columns 2q and 2q + 1, and gets row g of the transposed one.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---------------------------------------------------------------- loads of 16-bit elements, zero outside [0, n)

// kFast: every row begins on 16 bytes and n is a multiple of 8 (the host has looked: fast_layout()). Otherwise element by element.
// The slow code is large, so it lives in kernels of its own: a decode step runs each kernel from a cold instruction cache.
__device__ inline uint32_t element(const void* p, int64_t i) { return static_cast<const uint16_t*>(p)[i]; }

// Two neighbours, i and i + 1.
template <bool kFast>
__device__ inline uint32_t load2(const void* p, int64_t i, int64_t n) {
  if (i >= n) return 0;
  if constexpr (kFast) return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p) + i));
  else return element(p, i) | (i + 1 < n ? element(p, i + 1) << 16 : 0u);
}
// Four neighbours.
template <bool kFast>
__device__ inline uint2 load4(const void* p, int64_t i, int64_t n) {
  if (i >= n) return {0, 0};
  if constexpr (kFast) return __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i));
  else return {load2<false>(p, i, n), load2<false>(p, i + 2, n)};
}
// Eight neighbours.
template <bool kFast>
__device__ inline uint4 load8(const void* p, int64_t i, int64_t n) {
  if (i >= n) return {0, 0, 0, 0};
  if constexpr (kFast) return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i));
  else return {load2<false>(p, i, n), load2<false>(p, i + 2, n), load2<false>(p, i + 4, n), load2<false>(p, i + 6, n)};
}

template <class T>
__device__ inline float low_float(uint32_t x) {
  const uint16_t bits = static_cast<uint16_t>(x);
  return to_float(*reinterpret_cast<const T*>(&bits));
}
template <class T>
__device__ inline float high_float(uint32_t x) {
  return low_float<T>(x >> 16);
}

// ---------------------------------------------------------------- swiglu in a product's last steps

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// ---------------------------------------------------------------- dropout

// Keep-bits of columns [column, column + 8) of a row, column a multiple of 4; the same bits as dropout_keep().
__device__ inline uint32_t keep8(uint64_t key, uint32_t stream, int64_t column, float p) {
  uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const Philox4 random = philox(key, static_cast<uint64_t>(column) / 4 + static_cast<uint64_t>(half), stream);
    for (int i = 0; i < 4; ++i) bits |= uniform01(random.v[i]) >= p ? 1u << (half * 4 + i) : 0u;
  }
  return bits;
}
// Zeroes the dropped ones of eight elements.
__device__ inline uint4 masked(uint4 x, uint32_t keep) {
  const auto word = [&](uint32_t w, int i) {
    return w & ((keep >> (2 * i) & 1u ? 0x0000ffffu : 0u) | (keep >> (2 * i + 1) & 1u ? 0xffff0000u : 0u));
  };
  return {word(x.x, 0), word(x.y, 1), word(x.z, 2), word(x.w, 3)};
}

}  // namespace loquetier::cuda
