// lora_backward over many rows: ds and dB in one pass over dy, dA in one pass over x, at the speed of reading them. lora_grad.cu
// and lora_reduce.cu have the same products for few rows, any alignment and dropout.
//
// A block takes 256 columns of the wide rows and walks down a range of one group's rows, 64 at a time; a warpgroup has 128 of the
// columns. Its gradient [256, R] stays in registers over the whole range. With kSum it also has that part of B in shared memory and
// multiplies every 64 rows into a share of ds [64, R], half of the ranks to a warpgroup; the four blocks of a cluster (1024
// columns) send them to each other, 16 rows to each, which adds them up while the next products run. All sums have a fixed order:
// what a range or a cluster cannot finish goes to scratch as f32 and a second kernel adds it up.
//
// Each launch begins while the one in front ends, and waits for it behind its tables. A block's code for its start and end is kept
// short: it runs once a block, from a cold instruction cache.
//
// Traffic beside the wide rows themselves, R = 16: shares of ds 2 R / 1024 of it, gradients of a range 2 R / rows of the range,
// each written and read once, mostly in the L2.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda_ops.h"
#include "lora.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kColumns = 256;  // of a block: four panels, two to a warpgroup
constexpr int kPanel = 64;     // columns: 128 bytes
constexpr int kRows = 64;      // of a step
constexpr int kCluster = 4;    // blocks side by side that add their shares of ds: a warp's rows go to the block of its number
constexpr int kWideBytes = kRows * kColumns * 2;
constexpr int kSumRanks = 64;        // up to here ds and dB take one pass: shares of ds and B must fit in shared memory
constexpr int kGradRanks = 128;      // of a gradient in one pass; larger ones read the wide rows again
constexpr int64_t kLeastRows = 256;  // of a range: the gradient of a shorter one would cost more than its rows
constexpr size_t kMostScratch = kMostLoraShares;  // of shares, and of unfinished gradients

struct WideArgs {
  CUtensorMap map;  // of p
  LoraCall call;
  bool for_a;     // p is x, l is ds, the gradient dA; otherwise dy, s, dB
  const void* p;  // [T, wide]
  int64_t ld_p;
  const void* l;  // [T, ranks]
  int64_t ld_l;
  void* ds;  // kSum
  int64_t ld_ds;
  int64_t rows;              // T
  bool p_there = false;      // p was written before the launch in front of this one began
  float* shares = nullptr;   // [clusters, T, NR] of ds, where a part has more than one cluster
  float* partial = nullptr;  // [ranges, slot] gradients, of groups with more than one range
  int64_t slot = 0;          // floats of the largest gradient of a group
  int range = 0;             // rows
};

template <int NR, bool kSum>
struct Shape {
  static constexpr int kBlocks = kSum ? (NR <= 32 ? 2 : 1) : (NR <= 64 ? 2 : 1);  // of a processor
  static constexpr int kStages = kSum ? (NR <= 32 ? 2 : 4) : NR <= 32 ? 3 : NR <= 64 ? 2 : 4;
  static constexpr int kThinBytes = kRows * NR * 2;
  static constexpr int kStageBytes = kWideBytes + kThinBytes;
  static constexpr int kMatrixBytes = kSum ? kColumns * NR * 2 : 0;  // B
  static constexpr int kSources = kSum ? kCluster : 0;               // of shares: the blocks of the cluster
  static constexpr int kShareVectors = NR / 8 * kWarp;  // of one source: 16 rows as float4, in the order of a warp's sums
  static constexpr int kSharesBytes = kSources * kShareVectors * 16;  // of one step; two steps, and a barrier for each
  static constexpr size_t kShared = size_t{kStages} * kStageBytes + kMatrixBytes + 2 * kSharesBytes + 16 + 1024;
  static_assert(kShared <= (kBlocks == 2 ? 112 : 226) * 1024);
  // The gradient on its way out, in the place of the stages, with a few floats between rows against bank conflicts.
  static constexpr int kLdRanks = NR + 8, kLdColumns = kColumns + 4;  // dB [256, NR], dA [NR, 256]
  static_assert(std::max(kColumns* kLdRanks, kSum ? 0 : NR * kLdColumns) * 4 <= kStages * kStageBytes);
};

// Column blocks of a part: whole clusters where ds is summed.
__host__ __device__ constexpr int blocks_of(int64_t columns, int cluster) {
  return static_cast<int>(ceil_div(columns, kColumns * cluster) * cluster);
}

// A block's gradient from shared memory [rows, ld] to its rows in memory, of which row_of(row) is the first float, or null: `add`ed
// to what is there, or put there.
template <class F>
__device__ inline void write_gradient(const float* sums, int ld, int rows, int row_floats, bool add, float scale, F&& row_of) {
  constexpr int kTogether = 4;  // old values that a thread waits for at a time
  const int thread = static_cast<int>(threadIdx.x), vectors = row_floats / 4, apart = kLoraThreads / vectors;
  const int first = thread / vectors, i = (thread - first * vectors) * 4;
#pragma unroll 1
  for (int row = first < apart ? first : rows; row < rows; row += kTogether * apart) {
    float4* to[kTogether];
    float4 old[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      float* begin = row + k * apart < rows ? row_of(row + k * apart) : nullptr;
      to[k] = begin == nullptr ? nullptr : reinterpret_cast<float4*>(begin + i);
      old[k] = add && to[k] != nullptr ? *to[k] : float4{};
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (to[k] == nullptr) continue;
      const float4 sum = *reinterpret_cast<const float4*>(sums + (row + k * apart) * ld + i);
      *to[k] = {old[k].x + scale * sum.x, old[k].y + scale * sum.y, old[k].z + scale * sum.z, old[k].w + scale * sum.w};
    }
  }
}

template <class T, int NR, bool kSum>
__global__ void __launch_bounds__(kLoraThreads, Shape<NR, kSum>::kBlocks) wide_kernel(const __grid_constant__ WideArgs a) {
  using S = Shape<NR, kSum>;
  constexpr int N = NR < 64 ? NR : 64, kTiles = NR / N;  // ranks of one product; products side by side
  static_assert(!kSum || (kTiles == 1 && S::kShareVectors <= kLoraThreads));
  extern __shared__ uint8_t raw[];
  __shared__ LoraSite site;
  __shared__ uint64_t arrived[S::kStages];  // whole steps of p, by the copy engine
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int half = __shfl_sync(0xffffffffu, thread / kWarpgroup, 0);
  const int cluster_rank = kSum ? static_cast<int>(cooperative_groups::this_cluster().block_rank()) : 0;
  if (thread == 0) {
    for (uint64_t& barrier : arrived) barrier_init(barrier, 1);
    barrier_init_fence();
  }
  const Tile range = find_tile(a.call, a.range, static_cast<int>(blockIdx.y));
  if (range.group < 0) return start_after_previous();
  fetch_site(range.sites + a.call.site, site);
  const LoraGroup& group = a.call.groups[range.group];
  const bool for_a = !kSum && a.for_a;
  const bool trained = group.grads != nullptr;
  if (!kSum && (!trained || (for_a && group.dropout > 0))) return start_after_previous();
  if (!a.p_there) start_after_previous();

  // This block's columns: of one part (dy), or of x.
  int part = 0, block = static_cast<int>(blockIdx.x);
  int64_t columns_of_part = for_a ? a.call.in : a.call.out[0], p_column = 0;
  if (!for_a) {
    for (int blocks; block >= (blocks = blocks_of(columns_of_part, kSum ? kCluster : 1));) {
      block -= blocks;
      p_column += columns_of_part;
      columns_of_part = a.call.out[++part];
    }
  }
  const int column_begin = block * kColumns;
  const int columns = static_cast<int>(min(max(columns_of_part - column_begin, int64_t{0}), int64_t{kColumns}));

  uint8_t* shared = raw + (1024 - shared_address(raw) % 1024) % 1024;  // the same place in every block of the cluster
  const uint32_t base = shared_address(shared), matrix = base + S::kStages * S::kStageBytes;
  const uint32_t shares = matrix + S::kMatrixBytes, arrivals = shares + 2 * S::kSharesBytes;
  const uint16_t* p = static_cast<const uint16_t*>(a.p) + range.row * a.ld_p + p_column + column_begin;
  const int steps = (range.rows + kRows - 1) / kRows;
  const auto stage_of = [&](int t) { return base + static_cast<uint32_t>(t % S::kStages * S::kStageBytes); };
  // With kSum the wide rows leave the L2 first: shares and gradients come back from it soon (8,192 x 28,672: 142 to 134 us).
  constexpr uint64_t kHint = kSum ? kStreamOnce : kNoHint;
  // The rows behind a range are another adapter's and may be anything: zeros in their place. Columns behind a part are the next
  // one's of the same rows: they meet zeros of B, and sums that are not stored.
  const auto load_rows = [&](int t) {
    if (t >= steps) return;
    uint64_t& barrier = arrived[t % S::kStages];
    if (range.rows - t * kRows < kRows) {
      load_wide<kRows, kColumns / kPanel, kLoraThreads>(stage_of(t), p + int64_t{t} * kRows * a.ld_p, a.ld_p,
                                                        range.rows - t * kRows, columns);
      if (thread == 0) barrier_arrive(barrier);
    } else if (thread == 0) {
      barrier_expect(barrier, kWideBytes);
#pragma unroll
      for (int panel = 0; panel < kColumns / kPanel; ++panel)
        tma_load(stage_of(t) + static_cast<uint32_t>(panel * kRows * 128), a.map, barrier,
                 static_cast<int>(p_column) + column_begin + panel * kPanel, static_cast<int>(range.row) + t * kRows, kHint);
    }
  };

#pragma unroll 1
  for (int t = 0; t < S::kStages - 1; ++t) load_rows(t);  // on their way while the tables come
  if (a.p_there) start_after_previous();

  __syncthreads();
  int l_column = 0, rank = 0;
  int64_t place = 0;  // of the part's gradient in a slot
  if (for_a) {
    for (int i = 0; i < a.call.parts; ++i) rank += site.part[i].rank;
  } else {
    for (int i = 0; i < part; ++i) {
      l_column += site.part[i].rank;
      place += a.call.out[i] * site.part[i].rank;
    }
    rank = site.part[part].rank;
  }
  const int rank_begin = static_cast<int>(blockIdx.z) * NR;
  if (rank_begin >= rank) {  // of the whole cluster, as are the returns before
    commit_copies();
    wait_copies<0>();
    for (int t = 0; t < min(S::kStages - 1, steps); ++t) barrier_wait(arrived[t], 0);
    return;
  }
  const int ranks = min(NR, rank - rank_begin);
  const uint16_t* l = static_cast<const uint16_t*>(a.l) + range.row * a.ld_l + l_column + rank_begin;
  // As load_thin() lays them out. Two neighbours take 32 bytes of a row.
  const int l_row = thread / 2 % kRows, l_unit = thread % 2 + thread / (2 * kRows) * 2;
  constexpr int kUnitsAtOnce = kLoraThreads / kRows;
  const uint16_t* l_from = l + l_row * a.ld_l + l_unit * 8;
  const uint32_t l_to = kWideBytes + static_cast<uint32_t>((l_unit * kRows + l_row) * 16);
  const auto load_ranks = [&](int t) {
    if (t < steps) {
      const bool row_real = trained && l_row < range.rows - t * kRows;
#pragma unroll
      for (int u = 0; u < NR / 8; u += kUnitsAtOnce) {
        const bool real = row_real && l_unit + u < ranks / 8;
        if (l_unit + u < NR / 8)
          copy16(stage_of(t) + l_to + static_cast<uint32_t>(u * kRows * 16), real ? l_from + t * kRows * a.ld_l + u * 8 : l, real);
      }
    }
    commit_copies();  // also without copies: groups are counted
  };
  if constexpr (kSum) {
    load_thin<kColumns, NR / 8, kLoraThreads>(
        matrix, static_cast<const uint16_t*>(site.part[part].b) + int64_t{column_begin} * rank, rank, columns, ranks / 8);
  }
#pragma unroll 1
  for (int t = 0; t < S::kStages - 1; ++t) load_ranks(t);
  if constexpr (kSum) {
    if (threadIdx.x == 0) {
      barrier_init(arrivals, 1);
      barrier_init(arrivals + 8, 1);
      barrier_init_fence();
    }
    cluster_arrive();
  }

  const int fragment_row = thread % kWarpgroup / kWarp * 16 + lane / 4, fragment_column = lane % 4 * 2;

  // This block's 16 rows of ds of step t: the shares that came, in the order of blocks.
  const int clusters = blocks_of(columns_of_part, kCluster) / kCluster;  // of the part
  const auto add_shares = [&](int t) {
    wait_arrival(arrivals + static_cast<uint32_t>(t % 2 * 8), static_cast<uint32_t>(t / 2 % 2));
    if (thread >= S::kShareVectors) return;
    const float4* from = reinterpret_cast<const float4*>(shared + (shares - base) + t % 2 * S::kSharesBytes) + thread;
    float4 total = {};
#pragma unroll
    for (int i = 0; i < S::kSources; ++i) {
      const float4 add = from[i * S::kShareVectors];
      total = {total.x + add.x, total.y + add.y, total.z + add.z, total.w + add.w};
    }
    const int r = thread / kWarp * 8 + fragment_column;
    if (r >= ranks) return;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int row = t * kRows + cluster_rank * 16 + lane / 4 + high * 8;
      if (row >= range.rows) return;
      const int64_t at = range.row + row;
      const float2 value = {high ? total.z : total.x, high ? total.w : total.y};
      if (clusters == 1) {
        const float scale = site.part[part].scale;
        *reinterpret_cast<uint32_t*>(static_cast<T*>(a.ds) + at * a.ld_ds + l_column + r) =
            pack2<T>(value.x * scale, value.y * scale);
      } else {
        const int64_t index = static_cast<int>(blockIdx.x) / kCluster;
        *reinterpret_cast<float2*>(a.shares + (index * a.rows + at) * NR + r) = value;
      }
    }
  };

  // A warpgroup's share of ds: of half the ranks, over all columns of the block.
  constexpr int kShareN = NR / 2, kShareSums = kSum ? kShareN / 2 : 1;
  float share[kShareSums];
  // Gives the shares of step t away, and adds up those of step t - 1, which have had a step's time to come.
  const auto exchange = [&](int t, const float (&sent)[kShareSums]) {
    // The cluster's barrier says that all blocks have added the shares of step t - 2, whose place these take (and, before the
    // first step, that their arrival barriers are there).
    cluster_wait();
    const uint32_t arrival = arrivals + static_cast<uint32_t>(t % 2 * 8);
    if (thread == 0) barrier_expect(arrival, S::kSharesBytes);
    const uint32_t to = shares + static_cast<uint32_t>(t % 2 * S::kSharesBytes +
                                                       (cluster_rank * S::kShareVectors + half * S::kShareVectors / 2 + lane) * 16);
#pragma unroll
    for (int n = 0; n < kShareN / 8; ++n) {
      send16(to + static_cast<uint32_t>(n * kWarp * 16), arrival, static_cast<uint32_t>(thread % kWarpgroup / kWarp),
             {sent[4 * n], sent[4 * n + 1], sent[4 * n + 2], sent[4 * n + 3]});
    }
    if (t > 0) add_shares(t - 1);
    cluster_arrive();
  };

  float grad[2][kTiles][N / 2] = {};  // of this warpgroup's two panels
#pragma unroll 1
  for (int t = 0; t < steps; ++t) {
    barrier_wait(arrived[t % S::kStages], static_cast<uint32_t>(t / S::kStages % 2));
    wait_copies<S::kStages - 2>();
    async_fence();
    __syncthreads();  // the step's operands are there, and nobody multiplies those of the step before any more
    load_rows(t + S::kStages - 1);
    load_ranks(t + S::kStages - 1);
    const uint32_t stage = stage_of(t);
    const uint32_t panels = stage + static_cast<uint32_t>(half * 2 * (kRows * 128));
    float sent[kShareSums];  // of the step before
#pragma unroll
    for (int i = 0; i < kShareSums; ++i) sent[i] = kSum ? share[i] : 0, share[i] = 0;
    pin(share);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) pin(grad[i / kTiles][i % kTiles]);
    begin_products();
    if constexpr (kSum) {
#pragma unroll
      for (int c = 0; c < kColumns / 16; ++c) {  // 16 columns each
        multiply_async<T, kShareN, Along::sum, Along::across>(
            share, wide_operand(stage + static_cast<uint32_t>(c / 4 * (kRows * 128) + c % 4 * 32)),
            thin_operand<kColumns, Along::across>(matrix +
                                                  static_cast<uint32_t>(half * (kShareN / 8) * kColumns * 16 + c * 16 * 16)),
            1);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        const uint64_t wide = wide_operand(panels + static_cast<uint32_t>(panel * (kRows * 128) + k * 16 * 128));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          multiply_async<T, N, Along::across, Along::across>(
              grad[panel][j], wide,
              thin_operand<kRows, Along::across>(stage + kWideBytes + static_cast<uint32_t>(j * 8 * kRows * 16 + k * 16 * 16)), 1);
        }
      }
    }
    commit_products();
    if constexpr (kSum) {
      if (t > 0) exchange(t - 1, sent);
    }
    wait_products();
    pin(share);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) pin(grad[i / kTiles][i % kTiles]);
  }
  if constexpr (kSum) {
    exchange(steps - 1, share);
    add_shares(steps - 1);
  }

  if (trained) {
    const bool whole = group.rows <= a.range;
    __syncthreads();  // nobody multiplies any more
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int column = half * 128 + panel * 64 + fragment_row + i % 4 / 2 * 8,
                    r = j * 64 + i / 4 * 8 + fragment_column + i % 2;
          sums[for_a ? r * S::kLdColumns + column : column * S::kLdRanks + r] = grad[panel][j][i];
        }
      }
    }
    __syncthreads();
    const LoraGradSite& grads = group.grads[a.call.site];
    const auto row_of = [&](int row) -> float* {  // of dB: a column of dy
      float* to = a.partial + blockIdx.y * a.slot + place;
      if (!for_a) {
        if (whole) to = grads.part[part].db;
        return to == nullptr ? nullptr : to + int64_t{column_begin + row} * rank + rank_begin;
      }
      row += rank_begin;
      if (whole) {
        int owner = 0;
#pragma unroll 1
        while (row >= site.part[owner].rank) row -= site.part[owner++].rank;
        to = grads.part[owner].da;
      }
      return to == nullptr ? nullptr : to + row * columns_of_part + column_begin;
    };
    write_gradient(sums, for_a ? S::kLdColumns : S::kLdRanks, for_a ? ranks : columns, for_a ? columns : ranks, whole,
                   for_a || !whole ? 1.0f : site.part[part].scale, row_of);
  }
  if constexpr (kSum) cluster_wait();
}

// ds = scale times the sum of the shares, for parts with more than one cluster. A block takes 16 rows.
constexpr int kSumRows = 16;

template <class T>
__device__ void finish_sum(const WideArgs& a, int ld_share, int block, LoraSite& site) {
  const Tile tile = find_tile(a.call, kSumRows, block);
  if (tile.group >= 0) fetch_site(tile.sites + a.call.site, site);
  start_after_previous();
  if (tile.group < 0) return;
  __syncthreads();
  int index = 0, s_column = 0;
  for (int part = 0; part < a.call.parts; ++part) {
    const int rank = site.part[part].rank, vectors = rank / 4, clusters = blocks_of(a.call.out[part], kCluster) / kCluster;
    for (int u = static_cast<int>(threadIdx.x); clusters > 1 && u < tile.rows * vectors; u += kLoraThreads) {
      const int row = u / vectors, r = u % vectors * 4;
      const int64_t at = tile.row + row;
      float4 total = {};
#pragma unroll 8
      for (int c = 0; c < clusters; ++c) {
        const float4 add = *reinterpret_cast<const float4*>(a.shares + ((index + c) * a.rows + at) * ld_share + r);
        total = {total.x + add.x, total.y + add.y, total.z + add.z, total.w + add.w};
      }
      const float scale = site.part[part].scale;
      *reinterpret_cast<uint2*>(static_cast<T*>(a.ds) + at * a.ld_ds + s_column + r) = {pack2<T>(total.x * scale, total.y * scale),
                                                                                        pack2<T>(total.z * scale, total.w * scale)};
    }
    index += clusters;
    s_column += rank;
  }
}

// Gradient += scale times the sum of the ranges' gradients, of groups with more than one range. A block takes 1024 floats of one.
constexpr int kGradFloats = kLoraThreads * 4;

__device__ inline void finish_grad(const WideArgs& a, int index, int block, LoraSite& site) {
  const LoraGroup& group = a.call.groups[index];
  const bool some = group.sites != nullptr && group.grads != nullptr && group.rows > a.range && !(a.for_a && group.dropout > 0);
  if (some) fetch_site(group.sites + a.call.site, site);
  int first = 0;  // range of this group, as find_tile() counts them
  for (int g = static_cast<int>(threadIdx.x) % kWarp; g < index; g += kWarp) {
    const LoraGroup& before = a.call.groups[g];
    if (before.sites != nullptr) first += (before.rows + a.range - 1) / a.range;
  }
  first = warp_sum(first);
  start_after_previous();
  if (!some) return;
  __syncthreads();
  const int ranges = (group.rows + a.range - 1) / a.range;
  const LoraGradSite& grads = group.grads[a.call.site];
  const int64_t begin = block * int64_t{kGradFloats} + threadIdx.x * 4;  // of four elements, all of one part
  int64_t e = begin;
  for (int part = 0; part < a.call.parts; ++part) {
    const int64_t size = (a.for_a ? a.call.in : a.call.out[part]) * site.part[part].rank;
    if (e >= size) {
      e -= size;
      continue;
    }
    float* to = a.for_a ? grads.part[part].da : grads.part[part].db;
    if (to == nullptr) return;
    const float4 old = *reinterpret_cast<const float4*>(to + e);
    float4 total = {};
#pragma unroll 8
    for (int i = 0; i < ranges; ++i) {
      const float4 add = *reinterpret_cast<const float4*>(a.partial + (first + i) * a.slot + begin);
      total = {total.x + add.x, total.y + add.y, total.z + add.z, total.w + add.w};
    }
    const float scale = a.for_a ? 1.0f : site.part[part].scale;
    *reinterpret_cast<float4*>(to + e) = {old.x + scale * total.x, old.y + scale * total.y, old.z + scale * total.z,
                                          old.w + scale * total.w};
    return;
  }
}

// What a pass over many rows leaves to be added up, in one launch: `sums` blocks for ds, then `blocks` for each group's gradients.
template <class T>
__global__ void __launch_bounds__(kLoraThreads)
    finish_kernel(const __grid_constant__ WideArgs a, int ld_share, int sums, int blocks) {
  __shared__ LoraSite site;
  const int block = static_cast<int>(blockIdx.x) - sums;
  if (block < 0) finish_sum<T>(a, ld_share, static_cast<int>(blockIdx.x), site);
  else finish_grad(a, block / blocks, block % blocks, site);
}

// How a pass goes over the rows of all groups.
struct Ranges {
  int rows = 0;
  int64_t count = 0;
  size_t bytes = 0;  // of the gradients that are not finished at once
};

// The ranges for which the device, with `room` blocks at a time, is done first, with at most `bytes` of unfinished gradients.
Ranges ranges_of(const LoraGroups& groups, int64_t blocks, int64_t room, int64_t slot, size_t bytes) {
  constexpr int64_t kStart = 5;  // a block's start and end, in steps: about 10 us on an H200, where a step takes 1.7
  const int64_t largest = count_tiles(groups, kRows).largest,
                most = std::min(ceil_div(largest, kLeastRows), ceil_div(room, blocks));
  Ranges best;
  int64_t least = INT64_MAX;
  for (int64_t pieces = 1; pieces <= std::max<int64_t>(1, most); ++pieces) {  // of the largest group
    const int64_t steps = ceil_div(ceil_div(largest, pieces), kRows);
    Ranges ranges{static_cast<int>(steps * kRows), count_tiles(groups, static_cast<int>(steps * kRows)).tiles, 0};
    if (largest > ranges.rows) ranges.bytes = static_cast<size_t>(ranges.count * slot) * sizeof(float);
    const int64_t time = ceil_div(ranges.count * blocks, room) * (steps + kStart);
    if (ranges.bytes > bytes || time >= least) continue;
    least = time;
    best = ranges;
  }
  return best;
}

// Floats of the largest gradient of one group; a multiple of 8 in a fast layout.
int64_t slot_of(const LoraLinear& linear, const LoraGroups& groups, bool for_a) {
  int64_t slot = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.grads == nullptr || group.rows == 0) continue;
    int64_t floats = 0;
    for (int p = 0; p < linear.parts; ++p)
      floats += (for_a ? linear.in : linear.out[p]) * group.host_sites[linear.site].part[p].rank;
    slot = std::max(slot, floats);
  }
  return slot;
}

template <class T, int NR, bool kSum>
void launch_wide(const WideArgs& args, int64_t blocks, int64_t ranges, int rank, cudaStream_t stream, std::source_location where) {
  Launch{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ranges), static_cast<unsigned>(ceil_div(rank, NR))),
         dim3(kLoraThreads),
         Shape<NR, kSum>::kShared,
         stream,
         kSum ? kCluster : 1,
         where,
         true}(wide_kernel<T, NR, kSum>, args);
}

// Of ds and dB.
template <class T, int NR>
int clusters_of_sums() {
  return std::max(1, clusters_at_once(wide_kernel<T, NR, true>, kCluster, kLoraThreads, Shape<NR, true>::kShared));
}

template <class T>
void finish(const WideArgs& args, const Ranges& ranges, int64_t sums, int ld_share, cudaStream_t stream) {
  const int64_t blocks = ranges.bytes > 0 ? ceil_div(args.slot, kGradFloats) : 0;
  Launch launch{dim3(static_cast<unsigned>(sums + blocks * args.call.count)), dim3(kLoraThreads), 0, stream};
  launch.overlap = true;
  launch(finish_kernel<T>, args, ld_share, static_cast<int>(sums), static_cast<int>(blocks));
}

int ranks_at_once(int rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : rank <= 48 ? 48 : rank <= 64 ? 64 : kGradRanks; }

}  // namespace

bool CudaOps::wide_sum(const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, TensorView s, TensorView dy,
                       TensorView ds) {
  const int single = ranks_of(linear, groups).single;
  if (single > kSumRanks) return false;
  const int width = ranks_at_once(single);
  int64_t blocks = 0;
  bool shared_parts = false;
  for (int p = 0; p < linear.parts; ++p) {
    const int own = blocks_of(linear.out[p], kCluster);
    blocks += own;
    shared_parts = shared_parts || own > kCluster;
  }
  const size_t share_bytes = shared_parts ? static_cast<size_t>(blocks / kCluster * dy.rows * width) * sizeof(float) : 0;
  if (share_bytes > kMostScratch) return false;
  WideArgs args = {tensor_maps_.get(dy, kPanel, kRows), call, false, dy.data, dy.ld, s.data, s.ld, ds.data, ds.ld, dy.rows};
  args.slot = slot_of(linear, groups, false);
  const std::source_location where = std::source_location::current();
  dispatch_half(dtype_, [&]<class T>() {
    const auto go = [&]<int NR>() {
      int& clusters = wide_clusters_[NR / 16 - 1];
      if (clusters == 0) clusters = clusters_of_sums<T, NR>();
      const Ranges ranges = ranges_of(groups, blocks, int64_t{clusters} * kCluster, args.slot, kMostScratch);
      std::byte* scratch = static_cast<std::byte*>(lora_scratch_.get(share_bytes + ranges.bytes));
      args.shares = reinterpret_cast<float*>(scratch);
      args.partial = reinterpret_cast<float*>(scratch + share_bytes);
      args.range = ranges.rows;
      launch_wide<T, NR, true>(args, blocks, ranges.count, NR, stream(), where);
      finish<T>(args, ranges, shared_parts ? count_tiles(groups, kSumRows).tiles : 0, NR, stream());
    };
    if (width == 16) go.template operator()<16>();
    else if (width == 32) go.template operator()<32>();
    else if (width == 48) go.template operator()<48>();
    else go.template operator()<64>();
  });
  return true;
}

void CudaOps::wide_gradient(Gradient of, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, TensorView l,
                            TensorView p, bool p_there) {
  const bool for_a = of == Gradient::a;
  const Ranks ranks = ranks_of(linear, groups);
  const int rank = for_a ? ranks.stacked : ranks.single, width = ranks_at_once(rank);
  int64_t blocks = 0;
  for (int i = 0; i < (for_a ? 1 : linear.parts); ++i) blocks += blocks_of(for_a ? linear.in : linear.out[i], 1);
  WideArgs args = {tensor_maps_.get(p, kPanel, kRows), call, for_a, p.data, p.ld, l.data, l.ld, nullptr, 0, p.rows, p_there};
  args.slot = slot_of(linear, groups, for_a);
  const int64_t room = int64_t{device_.processors()} * (width <= 64 ? Shape<64, false>::kBlocks : Shape<128, false>::kBlocks);
  const Ranges ranges = ranges_of(groups, blocks * ceil_div(rank, width), room, args.slot, kMostScratch);
  args.range = ranges.rows;
  args.partial = static_cast<float*>(lora_scratch_.get(ranges.bytes));
  const std::source_location where = std::source_location::current();
  dispatch_half(dtype_, [&]<class T>() {
    const auto go = [&]<int NR>() { launch_wide<T, NR, false>(args, blocks, ranges.count, rank, stream(), where); };
    if (width == 16) go.template operator()<16>();
    else if (width == 32) go.template operator()<32>();
    else if (width == 48) go.template operator()<48>();
    else if (width == 64) go.template operator()<64>();
    else go.template operator()<kGradRanks>();
    finish<T>(args, ranges, 0, 0, stream());
  });
}

}  // namespace loquetier::cuda
