// y = x W^T for few rows (decode steps), with the adapters' expand in the same launch. Bound by the bytes of W, so the kernel is a
// stream of W through shared memory.
//
// A block owns a tile of W's rows and one of `splits` shares of k. One warp keeps the stages of W and x on their way (TMA), two
// warpgroups multiply: W is the left operand (its rows are m), the rows of x are n, so 8 to 64 of them cost no padding. Meanwhile
// four more warps make scale * s B^T of the tile from the adapters' B, in shared memory, and the epilogue adds it. The shares of k
// meet in global memory (which the L2 holds): every block lays its sums down, waits for the others of its tile, and adds up its
// part of them in a fixed order.
//
// Launches overlap. Without adapters, W's first tiles are requested before the launch in front has ended, which keeps the memory
// busy across the small kernels between two products. With adapters that launch is the shrink, which lets this one begin only when
// x is there: then only the warps that read s wait for it, and the shrink costs no time of its own.
#include <cuda.h>

#include <algorithm>

#include "core/check.h"
#include "cuda_ops.h"
#include "linear_decode.h"
#include "lora_spread.cuh"
#include "tma.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kK = 64;  // columns of a stage: 128 bytes, one row of the swizzle
constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * 128;
constexpr int kBaseThreads = kConsumers + kWarp;  // and the warp that fetches
constexpr int kLoraHelpers = 4;                   // warps
constexpr int kAllThreads = kBaseThreads + kLoraHelpers * kWarp;
constexpr int kSharedBytes = 200 * 1024;  // leaves room for a block of the shrink on the same processor
constexpr uint64_t kTurn = 840;           // divisible by every number of splits
static_assert(kTurn % 8 == 0 && kTurn % 7 == 0 && kTurn % 5 == 0 && kTurn % 3 == 0 && kMaxDecodeSplits == 8);
enum NamedBarrier { kGroupBarrier = 1, kConsumerBarrier = 3, kHelperBarrier, kAdapterBarrier };

template <int kM, int kRows>
struct Tiling {
  static constexpr int tile = 64 * kM * kGroups;  // rows of W
  static constexpr int w_bytes = tile * kK * 2, x_bytes = kRows * kK * 2, stage = w_bytes + x_bytes;
  static constexpr int stride = 64 * kM * 2 + 16;  // bytes of a row of y of one group; 16 keep rows off each other's banks
  static constexpr int staging = kGroups * kRows * stride;
  static constexpr int stages = (kSharedBytes - staging) / stage;
  static constexpr int shared = stages * stage + staging + 1024;
  static_assert(stages >= 3);
};

struct DecodeArgs {
  void* y;
  int64_t ld_y;
  const void* bias;  // [n] or null
  int rows, n, k;
  int tiles, splits;
  float4* sums;       // [blocks][n-blocks of 16][row blocks of 8][lane]: of other shares of k
  uint64_t* tickets;  // [tiles] kTurn for every launch that ended, and kTurn / splits for every block that has laid down its sums
  // adapters; call.count is 0 without
  LoraCall call;
  const void* s;
  int64_t ld_s;
};

// Up to eight rows of one adapter.
struct Item {
  const void* b;
  int row, rows;
  int rank, s_column;
  float scale;
};

// Without adapters in the batch the warps for them are not launched.
struct Helpers {
  Item items[kMaxDecodeRows];
  int count;
};

// c += W x^T of one 16-wide step, m 64 by n kN; both from shared memory, k contiguous, 128-byte swizzle.
template <class T, int kN>
__device__ inline void multiply_async(float (&c)[kN / 2], uint64_t w, uint64_t x) {
#define LOQUETIER_WGMMA(type, n, regs, wd, xd) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " regs ", %" #wd ", %" #xd ", 1, 1, 1, 0, 0;\n"
#define LOQUETIER_C8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 16 && kBf16) {
    LOQUETIER_WGMMA("bf16", 16, "{%0,%1,%2,%3,%4,%5,%6,%7}", 8, 9) : LOQUETIER_C8(0) : "l"(w), "l"(x));
  } else if constexpr (kN == 16) {
    LOQUETIER_WGMMA("f16", 16, "{%0,%1,%2,%3,%4,%5,%6,%7}", 8, 9) : LOQUETIER_C8(0) : "l"(w), "l"(x));
  } else if constexpr (kN == 32 && kBf16) {
    LOQUETIER_WGMMA("bf16", 32, "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}", 16, 17)
        : LOQUETIER_C8(0), LOQUETIER_C8(8) : "l"(w), "l"(x));
  } else if constexpr (kN == 32) {
    LOQUETIER_WGMMA("f16", 32, "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}", 16, 17)
        : LOQUETIER_C8(0), LOQUETIER_C8(8) : "l"(w), "l"(x));
  } else if constexpr (kBf16) {
    static_assert(kN == 64);
    LOQUETIER_WGMMA("bf16", 64,
                    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                    "%29,%30,%31}", 32, 33)
        : LOQUETIER_C8(0), LOQUETIER_C8(8), LOQUETIER_C8(16), LOQUETIER_C8(24) : "l"(w), "l"(x));
  } else {
    static_assert(kN == 64);
    LOQUETIER_WGMMA("f16", 64,
                    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                    "%29,%30,%31}", 32, 33)
        : LOQUETIER_C8(0), LOQUETIER_C8(8), LOQUETIER_C8(16), LOQUETIER_C8(24) : "l"(w), "l"(x));
  }
#undef LOQUETIER_WGMMA
#undef LOQUETIER_C8
}

// Four 8 x 8 blocks of pairs along the columns, stored transposed: lane 8 b + i gives the address of column i of block b.
__device__ inline void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// The same blocks read back as they were given.
__device__ inline void load_transposed(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// ---------------------------------------------------------------- the adapters' part, by four warps

// What this tile needs of every group: its part's B. One thread a group, so that the trips to memory are made at the same time.
template <int kTile>
__device__ inline void list_items(const DecodeArgs& a, int tile, Helpers& helpers, int thread, int& part_column,
                                  int& part_columns) {
  int part = 0, begin = 0;
  while (part + 1 < a.call.parts && tile * kTile >= begin + a.call.out[part]) begin += static_cast<int>(a.call.out[part++]);
  part_column = tile * kTile - begin;
  part_columns = static_cast<int>(a.call.out[part]);
  if (thread == 0) helpers.count = 0;
  named_barrier(kHelperBarrier, kLoraHelpers * kWarp);
  for (int g = thread; g < a.call.count; g += kLoraHelpers * kWarp) {
    const LoraGroup& group = a.call.groups[g];
    const LoraSite* sites = group.sites;
    const int rows = group.rows;
    if (sites == nullptr || rows == 0) continue;
    const LoraSite& site = sites[a.call.site];
    Item item = {site.part[part].b, group.row_begin, rows, site.part[part].rank, 0, site.part[part].scale};
    for (int p = 0; p < part; ++p) item.s_column += site.part[p].rank;
    if (item.rank == 0) continue;
    const int pieces = (rows + 7) / 8, at = atomicAdd(&helpers.count, pieces);
    for (int i = 0; i < pieces; ++i, item.row += 8) {
      item.rows = min(8, rows - 8 * i);
      helpers.items[at + i] = item;
    }
  }
  named_barrier(kHelperBarrier, kLoraHelpers * kWarp);
}

// scale * s B^T of columns [from, to) of the tile into `staging`, zero for rows without an adapter. A warp takes 64 columns of one
// item at a time; the fragments of the next ones are on their way.
template <class T, int kM, int kRows>
__device__ inline void expand_tile(const DecodeArgs& a, int tile, int from, int to, uint32_t staging, Helpers& helpers) {
  using S = Tiling<kM, kRows>;
  constexpr int kDepth = kM * kRows > 64 ? 2 : 3;  // as registers allow
  const int thread = static_cast<int>(threadIdx.x) - kBaseThreads, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4,
            q = lane % 4;
  int part_column, part_columns;
  list_items<S::tile>(a, tile, helpers, thread, part_column, part_columns);
  for (int i = thread; i < S::staging / 16; i += kLoraHelpers * kWarp)
    store_shared16(staging + static_cast<uint32_t>(i) * 16, {0, 0, 0, 0});
  const int first = from / kSpreadColumns, units = (to + kSpreadColumns - 1) / kSpreadColumns - first,
            total = units * helpers.count;
  SpreadFragments ahead[kDepth];
  const auto fetch = [&](int at, SpreadFragments& f) {
    if (at >= total) return;
    const Item& item = helpers.items[at / units];
    load_spread<false, true>(item.b, part_columns, item.rank, part_column + (first + at % units) * kSpreadColumns, 0, f);
  };
  int next = warp;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, next += kLoraHelpers) fetch(next, ahead[i]);
  wait_for_previous();                                  // s
  named_barrier(kHelperBarrier, kLoraHelpers * kWarp);  // the zeros are there
#pragma unroll 1
  for (int at = warp; at < total; at += kLoraHelpers, next += kLoraHelpers) {
    SpreadFragments f = ahead[0];
#pragma unroll
    for (int i = 0; i + 1 < kDepth; ++i) ahead[i] = ahead[i + 1];
    fetch(next, ahead[kDepth - 1]);
    const Item item = helpers.items[at / units];
    const int column = (first + at % units) * kSpreadColumns;
    float sum[4][4] = {};
#pragma unroll 1
    for (int r = 0; r < item.rank; r += 16) {
      if (r > 0) load_spread<false, true>(item.b, part_columns, item.rank, part_column + column, r, f);
      const T* s = static_cast<const T*>(a.s) + (item.row + g) * a.ld_s + item.s_column;
      const bool real = g < item.rows && r + 4 * q < item.rank;
      const uint2 b = real ? *reinterpret_cast<const uint2*>(s + r + 4 * q) : uint2{0, 0};
#pragma unroll
      for (int t = 0; t < 4; ++t) multiply<T>(sum[t], f.a[t][0], f.a[t][1], f.a[t][2], f.a[t][3], b.x, b.y);
    }
    const int own = column + 8 * g, group = own / (64 * kM);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      if (2 * q + odd >= item.rows) continue;
      uint4 v;
      v.x = pack2<T>(sum[0][odd] * item.scale, sum[0][2 + odd] * item.scale);
      v.y = pack2<T>(sum[1][odd] * item.scale, sum[1][2 + odd] * item.scale);
      v.z = pack2<T>(sum[2][odd] * item.scale, sum[2][2 + odd] * item.scale);
      v.w = pack2<T>(sum[3][odd] * item.scale, sum[3][2 + odd] * item.scale);
      store_shared16(
          staging + static_cast<uint32_t>((group * kRows + item.row + 2 * q + odd) * S::stride + (own - group * 64 * kM) * 2), v);
    }
  }
}

// ---------------------------------------------------------------- the kernel

template <class T, int kM, int kRows>
__global__ void __launch_bounds__(kAllThreads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ DecodeArgs a) {
  using S = Tiling<kM, kRows>;
  constexpr int kRowBlocks = kRows / 8;
  extern __shared__ std::byte raw[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  __shared__ Helpers helpers;
  const uint32_t stages = (shared_address(raw) + 1023) / 1024 * 1024, staging = stages + S::stages * S::stage;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int split = static_cast<int>(blockIdx.x) % a.splits, first_tile = static_cast<int>(blockIdx.x) / a.splits,
            step = static_cast<int>(gridDim.x) / a.splits;
  const int pieces = (a.k + kK - 1) / kK, begin = pieces * split / a.splits, end = pieces * (split + 1) / a.splits;
  const bool adapters = a.call.count > 0;
  // The n-blocks of 16 columns whose sums this block adds up, of 8 kM in the tile.
  const int block_begin = 8 * kM * split / a.splits, block_end = 8 * kM * (split + 1) / a.splits;

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(full[i], 1);
      barrier_init(empty[i], kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_start();

  if (warp >= kBaseThreads / kWarp) {
    for (int tile = first_tile; tile < a.tiles; tile += step) {
      expand_tile<T, kM, kRows>(a, tile, block_begin * 16, block_end * 16, staging, helpers);
      named_barrier(kAdapterBarrier, kConsumers + kLoraHelpers * kWarp);                             // it is there
      if (tile + step < a.tiles) named_barrier(kAdapterBarrier, kConsumers + kLoraHelpers * kWarp);  // and has been read
    }
    return;
  }
  if (warp == kConsumers / kWarp) {  // the warp that fetches
    if (lane != 0) return;
    const int share = end - begin, total = (a.tiles - first_tile + step - 1) / step * share, ahead = min(total, S::stages);
    const auto fetch_w = [&](int i, int stage) {
      barrier_expect(full[stage], S::stage);
      tma_load(stages + stage * S::stage, w_map, full[stage], (begin + i % share) * kK, (first_tile + i / share * step) * S::tile,
               kStreamOnce);
    };
    const auto fetch_x = [&](int i, int stage) {
      tma_load(stages + stage * S::stage + S::w_bytes, x_map, full[stage], (begin + i % share) * kK, 0, kKeep);
    };
    for (int i = 0; i < ahead; ++i) fetch_w(i, i);
    if (!adapters) wait_for_previous();
    for (int i = 0; i < ahead; ++i) fetch_x(i, i);
    for (int i = ahead; i < total; ++i) {
      const int stage = i % S::stages;
      barrier_wait(empty[stage], static_cast<uint32_t>(i / S::stages + 1) & 1);
      fetch_w(i, stage);
      fetch_x(i, stage);
    }
    return;
  }

  const int group = warp / 4, quarter = warp % 4;
  const uint32_t own = staging + static_cast<uint32_t>(group * kRows * S::stride);
  float sum[kM][kRows / 2];
  int at = 0;  // stages used so far
  for (int tile = first_tile; tile < a.tiles; tile += step) {
    for (auto& part : sum)
      for (float& v : part) v = 0;
    for (int piece = begin; piece < end; ++piece, ++at) {
      const int stage = at % S::stages;
      barrier_wait(full[stage], static_cast<uint32_t>(at / S::stages) & 1);
      const uint32_t w = stages + stage * S::stage + static_cast<uint32_t>(group * kM) * 64 * kK * 2,
                     x = stages + stage * S::stage + S::w_bytes;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
          multiply_async<T, kRows>(sum[m], swizzled_operand(w + m * 64 * kK * 2 + k * 32), swizzled_operand(x + k * 32));
      }
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been read: its place may be filled
      if (piece > begin && threadIdx.x % 128 == 0) barrier_arrive(empty[(at - 1) % S::stages]);
    }
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) barrier_arrive(empty[(at - 1) % S::stages]);

    if (a.splits > 1) {  // one tile a block
      float4* mine = a.sums + int64_t{blockIdx.x} * 8 * kM * kRowBlocks * kWarp;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int block = (group * kM + m) * 4 + quarter;
#pragma unroll
        for (int j = 0; j < kRowBlocks; ++j) {
          const float* c = sum[m] + 4 * j;
          if (j * 8 < a.rows) mine[(block * kRowBlocks + j) * kWarp + lane] = {c[0], c[1], c[2], c[3]};
        }
      }
      __threadfence();
      named_barrier(kConsumerBarrier, kConsumers);
      if (threadIdx.x == 0) {
        const uint64_t before = atomicAdd(reinterpret_cast<unsigned long long*>(a.tickets + tile), kTurn / a.splits);
        while (load_acquire(a.tickets + tile) < (before / kTurn + 1) * kTurn) {
        }
      }
      named_barrier(kConsumerBarrier, kConsumers);
      if (adapters) named_barrier(kAdapterBarrier, kConsumers + kLoraHelpers * kWarp);
      const int row_blocks = (a.rows + 7) / 8;
      for (int i = warp; i < (block_end - block_begin) * row_blocks; i += kConsumers / kWarp) {
        const int block = block_begin + i / row_blocks, j = i % row_blocks;
        const float4* from = a.sums + ((int64_t{tile} * a.splits * 8 * kM + block) * kRowBlocks + j) * kWarp + lane;
        float total[4] = {0, 0, 0, 0};
#pragma unroll 4
        for (int p = 0; p < a.splits; ++p) {
          const float4 part = __ldcg(from + int64_t{p} * 8 * kM * kRowBlocks * kWarp);
          total[0] += part.x;
          total[1] += part.y;
          total[2] += part.z;
          total[3] += part.w;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = j * 8 + lane % 4 * 2 + e % 2, in_tile = block * 16 + lane / 4 + e / 2 * 8,
                    column = tile * S::tile + in_tile;
          if (row >= a.rows || column >= a.n) continue;
          float value = total[e];
          if (a.bias != nullptr) value += to_float(static_cast<const T*>(a.bias)[column]);
          if (adapters) {
            const int half = in_tile / (64 * kM);
            value += load_shared_half<T>(staging +
                                         static_cast<uint32_t>((half * kRows + row) * S::stride + (in_tile - half * 64 * kM) * 2));
          }
          static_cast<T*>(a.y)[row * a.ld_y + column] = from_float<T>(value);
        }
      }
      return;
    }

    // y [rows, tile] through shared memory, each group its own columns.
    if (adapters) named_barrier(kAdapterBarrier, kConsumers + kLoraHelpers * kWarp);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int n0 = tile * S::tile + (group * kM + m) * 64 + quarter * 16 + lane / 4;
      float add0 = 0, add8 = 0;
      if (a.bias != nullptr) {
        if (n0 < a.n) add0 = to_float(static_cast<const T*>(a.bias)[n0]);
        if (n0 + 8 < a.n) add8 = to_float(static_cast<const T*>(a.bias)[n0 + 8]);
      }
#pragma unroll
      for (int j = 0; j < kRows / 16; ++j) {  // 16 rows of x: registers 8 j .. 8 j + 7
        float* c = sum[m] + 8 * j;
        const uint32_t address = own + static_cast<uint32_t>((j * 16 + lane / 16 * 8 + lane % 8) * S::stride) +
                                 static_cast<uint32_t>(m * 64 + quarter * 16 + lane / 8 % 2 * 8) * 2;
        if (adapters) {
          uint32_t more[4];
          load_transposed(address, more);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[2 * i] += low_float<T>(more[i]);
            c[2 * i + 1] += high_float<T>(more[i]);
          }
        }
        store_transposed(address, pack2<T>(c[0] + add0, c[1] + add0), pack2<T>(c[2] + add8, c[3] + add8),
                         pack2<T>(c[4] + add0, c[5] + add0), pack2<T>(c[6] + add8, c[7] + add8));
      }
    }
    named_barrier(kGroupBarrier + group, 128);
    constexpr int kVectors = 64 * kM / 8;  // of a row
    const int column = tile * S::tile + group * kM * 64;
    for (int i = static_cast<int>(threadIdx.x) % 128; i < a.rows * kVectors; i += 128) {
      const int row = i / kVectors, vector = i % kVectors;
      if (column + vector * 8 >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<T*>(a.y) + row * a.ld_y + column + vector * 8) =
          load_shared16(own + static_cast<uint32_t>(row * S::stride + vector * 16));
    }
    if (tile + step >= a.tiles) return;
    named_barrier(kGroupBarrier + group, 128);
    if (adapters) named_barrier(kAdapterBarrier, kConsumers + kLoraHelpers * kWarp);
  }
}

template <class T, int kM, int kRows>
void launch_decode(TensorMaps& maps, TensorView x, TensorView w, DecodeArgs args, int splits, int processors, cudaStream_t stream,
                   std::source_location where = std::source_location::current()) {
  using S = Tiling<kM, kRows>;
  args.tiles = static_cast<int>(ceil_div(w.rows, S::tile));
  args.splits = splits;
  const int blocks = splits > 1 ? args.tiles * splits : std::min(args.tiles, processors);
  const int threads = args.call.count > 0 ? kAllThreads : kBaseThreads;
  Launch launch{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), S::shared, stream, 1, where, true};
  launch(decode_kernel<T, kM, kRows>, maps.get(w, kK, S::tile), maps.get(x, kK, kRows), args);
}

struct Way {
  int m = 2;
  int splits = 1;
};

// Tile and shares of k, as measured on an H200: one wave of blocks, shares of at least eight stages. The sums of many rows cost
// their way through memory, so those take the smaller tile, which needs fewer shares; without shares the larger one reads x less
// often.
Way way_of(int64_t rows, int64_t n, int64_t k, int processors) {
  const auto with = [&](int m) {
    const int64_t tiles = ceil_div(n, 128 * m);
    return Way{m, static_cast<int>(std::clamp<int64_t>(std::min(processors / tiles, k / (8 * kK)), 1, kMaxDecodeSplits))};
  };
  const auto blocks = [&](const Way& way) {  // of a wave, on average
    const int64_t all = ceil_div(n, 128 * way.m) * way.splits;
    return all / ceil_div(all, processors);
  };
  const Way large = with(2), small = with(1);
  if (large.splits == 1 || rows <= 32) return blocks(small) > blocks(large) + blocks(large) / 8 ? small : large;
  return blocks(large) > blocks(small) + blocks(small) / 4 ? large : small;
}

}  // namespace

size_t decode_workspace_bytes(int processors) {
  return static_cast<size_t>(processors) * (256 * kMaxDecodeRows * sizeof(float) + sizeof(uint64_t));
}

bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream) {
  const auto aligned = [](const TensorView& t) { return aligned16(t.data) && t.ld % 8 == 0; };
  if (x.rows > kMaxDecodeRows || x.cols % 8 != 0 || w.rows % 8 != 0 || !aligned(x) || !aligned(w) || !aligned(y)) return false;
  const Way way = way_of(x.rows, w.rows, x.cols, processors);
  if (lora.call.count > 0) {
    for (int p = 0; p < lora.call.parts; ++p)
      if (p + 1 < lora.call.parts && lora.call.out[p] % (128 * way.m) != 0) return false;  // a tile lies in one part
  }
  DecodeArgs args = {y.data,
                     y.ld,
                     bias,
                     static_cast<int>(x.rows),
                     static_cast<int>(w.rows),
                     static_cast<int>(x.cols),
                     0,
                     0,
                     static_cast<float4*>(workspace),
                     nullptr,
                     lora.call,
                     lora.s.data,
                     lora.s.ld};
  args.tickets = reinterpret_cast<uint64_t*>(static_cast<std::byte*>(workspace) +
                                             static_cast<size_t>(processors) * 256 * kMaxDecodeRows * sizeof(float));
  const auto launch = [&]<class T, int kRows>() {
    if (way.m == 2) launch_decode<T, 2, kRows>(maps, x, w, args, way.splits, processors, stream);
    else launch_decode<T, 1, kRows>(maps, x, w, args, way.splits, processors, stream);
  };
  dispatch_half(x.dtype, [&]<class T>() {
    if (x.rows <= 16) launch.template operator()<T, 16>();
    else if (x.rows <= 32) launch.template operator()<T, 32>();
    else launch.template operator()<T, 64>();
  });
  return true;
}

}  // namespace loquetier::cuda
