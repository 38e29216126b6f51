// How the sums of a tile leave the product of decode steps (linear_decode.cu), other than as y through shared memory.
#pragma once

#include "linear_decode_ring.cuh"

namespace loquetier::cuda::decode {

// ---------------------------------------------------------------- the meeting of the shares of k

// What a ticket reads once all blocks of the tile have laid down their sums. By one thread, in advance: a trip to memory less when
// it matters.
__device__ inline uint64_t full_ticket(const DecodeArgs& a, const Share& share) {
  wait_for_previous();
  return (load_relaxed(a.tickets + share.first) / kTile + 1) * kTile;
}

// Lays down the block's sums, and brings those of its part from all shares of k to shared memory: split after split, `bytes` each.
template <int kM, int kRows>
__device__ inline void exchange_sums(const DecodeArgs& a, const Share& share, const float (&sum)[kM][kRows / 2], uint64_t full,
                                     Ring& ring, int first_block, uint32_t bytes) {
  constexpr int kRowBlocks = kRows / 8, kBlockSums = kRowBlocks * kWarp, kTileSums = 8 * kM * kBlockSums;  // in fours
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  float4* tile = a.sums + int64_t{share.first} * a.splits * kTileSums;
  float4* mine = tile + share.split * kTileSums + lane;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int block = (warp / 4 * kM + m) * 4 + warp % 4;
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      const float* c = sum[m] + 4 * j;
      if (j * 8 < a.rows && block * 16 < a.height) mine[block * kBlockSums + j * kWarp] = {c[0], c[1], c[2], c[3]};
    }
  }
  named_barrier(kConsumerBarrier, kConsumers);
  if (threadIdx.x == 0) {
    raise_release(a.tickets + share.first, kTile / static_cast<uint64_t>(a.splits));
    barrier_expect(ring.sums, bytes * static_cast<uint32_t>(a.splits));
    while (load_acquire(a.tickets + share.first) < full) {
    }
    asm volatile("fence.proxy.async;" ::: "memory");  // the bulk copies see what was acquired
#pragma unroll 1
    for (int p = 0; p < a.splits; ++p)
      bulk_load(ring.stages + static_cast<uint32_t>(p) * bytes, tile + p * kTileSums + first_block * kBlockSums, bytes, ring.sums,
                kNoHint);
  }
  barrier_wait(ring.sums, 0);
}

// The meeting: y of the blocks of 16 columns that this block adds up, of those in the tile.
template <class T, int kM, int kRows>
__device__ inline void add_up_sums(const DecodeArgs& a, const Share& share, const float (&sum)[kM][kRows / 2], uint64_t full,
                                   Ring& ring) {
  constexpr int kRowBlocks = kRows / 8;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = a.blocks.begin(share.split), items = (a.blocks.begin(share.split + 1) - first) * kRowBlocks;
  const uint32_t bytes = static_cast<uint32_t>(items * kWarp) * sizeof(float4);
  exchange_sums<kM, kRows>(a, share, sum, full, ring, first, bytes);
#pragma unroll 1
  for (int item = warp; item < items; item += kConsumerWarps) {
    const int row = item % kRowBlocks * 8 + lane % 4 * 2,
              column = share.first * a.height + (first + item / kRowBlocks) * 16 + lane / 4;
    if (item % kRowBlocks * 8 >= a.rows) continue;
    float total[4] = {};
    uint32_t from = ring.stages + static_cast<uint32_t>(item * kWarp + lane) * 16;
#pragma unroll 2
    for (int p = 0; p < a.splits; ++p, from += bytes) {
      const uint4 part = load_shared16(from);
      total[0] += __uint_as_float(part.x);
      total[1] += __uint_as_float(part.y);
      total[2] += __uint_as_float(part.z);
      total[3] += __uint_as_float(part.w);
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      if (column + 8 * high >= a.n) continue;
      const float add = a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[column + 8 * high]) : 0.0f;
      T* y = static_cast<T*>(a.y) + row * a.ld_y + column + 8 * high;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        if (row + odd < a.rows) y[odd * a.ld_y] = from_float<T>(total[2 * high + odd] + add);
    }
  }
}

// ---------------------------------------------------------------- sums that leave in f32

// As they lie: eight columns of four rows at a time, whole sectors of 32 bytes.
template <class T, int kM, int kRows>
__device__ inline void store_wide(const DecodeArgs& a, const Share& share, int tile, const float (&sum)[kM][kRows / 2]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = lane % 4 * 2, end = min(a.n, (tile + 1) * a.height);
  float* y = a.wide + (int64_t{share.split} * a.rows + row) * a.ld_wide;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int column = tile * a.height + ((warp / 4 * kM + m) * 4 + warp % 4) * 16 + lane / 4;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int at = column + 8 * high;
      if (at >= end) continue;
      const float add = a.bias != nullptr && share.split == 0 ? to_float(static_cast<const T*>(a.bias)[at]) : 0.0f;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          if (8 * j + row + odd < a.rows) y[(8 * j + odd) * a.ld_wide + at] = sum[m][4 * j + 2 * high + odd] + add;
      }
    }
  }
}

}  // namespace loquetier::cuda::decode
