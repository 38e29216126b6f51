// Shrink and expand of small groups (decode rows) in one launch. A cluster takes one tile of a group's rows: its blocks share out k
// for the shrink, exchange the sums through distributed shared memory, and then share out the columns of the expand, whose
// fragments were loaded at the start. So S makes no round trip through global memory, every adapter matrix is read once, and a
// linear costs one launch beside its base product.
//
// With few tiles several clusters ("splits") do the same shrink and each a part of the columns. Sums have the order of
// lora_reduce.cu.
#include <algorithm>

#include "cuda_ops.h"
#include "lora_reduce.cuh"
#include "lora_spread.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kMaxFusedRank = 64;  // of the parts together
constexpr int kMaxFusedRows = 64;  // of a group

struct FusedArgs {
  LoraCall call;
  const void* x;
  int64_t ld_x;
  void* s;
  int64_t ld_s;
  void* y;
  int64_t ld_y;
  int splits;
};

// 64 columns of one part.
struct Unit {
  int part = 0;
  int s_column = 0;
  int y_column = 0;  // of the part
  int n0 = 0;        // in the part
  int columns = 0;   // of the part
};

__device__ inline bool find_unit(const LoraCall& call, const LoraSite& site, int index, Unit& unit) {
  int y_column = 0, s_column = 0;
#pragma unroll 1
  for (int p = 0; p < call.parts; ++p) {
    const int columns = static_cast<int>(call.out[p]), units = (columns + kSpreadColumns - 1) / kSpreadColumns;
    if (index < units) {
      unit = {p, s_column, y_column, index * kSpreadColumns, columns};
      return true;
    }
    index -= units;
    y_column += columns;
    s_column += site.part[p].rank;
  }
  return false;
}

// A unit whose first fragments are on their way.
struct Ahead {
  bool real = false;
  Unit unit;
  SpreadFragments fragments = {};
};

__device__ inline void fetch_unit(const LoraCall& call, const LoraSite& site, int index, Ahead& ahead) {
  ahead.real = find_unit(call, site, index, ahead.unit);
  if (!ahead.real) return;
  const LoraPart& part = site.part[ahead.unit.part];
  if (part.rank > 0) load_spread<false, true>(part.b, ahead.unit.columns, part.rank, ahead.unit.n0, 0, ahead.fragments);
}

template <class T, int MT, int NT>
__global__ void __launch_bounds__(kLoraThreads, 2) fused_kernel(FusedArgs a) {
  extern __shared__ float shared[];
  constexpr int kTile = MT * NT * 128;
  // S of the tile, [rows][ranks], rounded as lora_shrink leaves it. The stride keeps 8-byte loads aligned and rows in different
  // banks.
  constexpr int kStride = MT * 16 + 4;
  T* s_tile = reinterpret_cast<T*>(shared + kLoraWarps * kTile);
  auto cluster = cooperative_groups::this_cluster();
  const int cluster_size = static_cast<int>(cluster.num_blocks()), cluster_rank = static_cast<int>(cluster.block_rank());
  const int index = static_cast<int>(blockIdx.x) / cluster_size, split = index % a.splits;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;

  let_next_start();
  const Tile tile = find_tile(a.call, NT * 8, index / a.splits);
  if (tile.group < 0) return;
  __shared__ LoraSite site;
  fetch_site(tile.sites + a.call.site, site);
  __syncthreads();
  Reduction r;
  for (int p = 0; p < a.call.parts; ++p) {
    if (r.q == nullptr && site.part[p].rank > 0) r.q = site.part[p].a;
    r.rank += site.part[p].rank;
  }
  if (r.rank == 0) return;

  // Fragments of this warp's first units do not depend on anything of this step. From then on the loads stay kDepth units ahead.
  const int workers = kLoraWarps * cluster_size * a.splits;
  int at = (split * cluster_size + cluster_rank) * kLoraWarps + warp;
  constexpr int kDepth = NT == 1 ? 2 : 1;  // two blocks to a processor leave 128 registers
  Ahead ahead[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    fetch_unit(a.call, site, at, ahead[i]);
    at += workers;
  }
  wait_for_previous();  // x and y come from the launches before

  r.p = static_cast<const uint16_t*>(a.x) + tile.row * a.ld_x;
  r.ld_p = a.ld_x;
  r.rows = tile.rows;
  r.k = static_cast<int>(a.call.in);
  reduce_k<T, MT, NT, false, false, true, MT == 1 ? 4 : MT == 3 ? 2 : 1>(r, cluster_rank, cluster_size, shared);
  cluster.sync();
#pragma unroll 1
  for (int e = cluster_rank * kLoraThreads + static_cast<int>(threadIdx.x); e < kTile; e += cluster_size * kLoraThreads) {
    int rank, row;
    reduce_place<NT>(e, rank, row);
    const T value = from_float<T>(cluster_total(cluster, shared, e, cluster_size));
#pragma unroll 1
    for (int b = 0; b < cluster_size; ++b)
      *cluster.map_shared_rank(s_tile + row * kStride + rank, static_cast<unsigned>(b)) = value;
    if (split == 0 && row < tile.rows && rank < r.rank) static_cast<T*>(a.s)[(tile.row + row) * a.ld_s + rank] = value;
  }
  cluster.sync();

#pragma unroll 1
  while (ahead[0].real) {
    const Unit unit = ahead[0].unit;
    SpreadFragments f = ahead[0].fragments;
#pragma unroll
    for (int i = 0; i + 1 < kDepth; ++i) ahead[i] = ahead[i + 1];
    fetch_unit(a.call, site, at, ahead[kDepth - 1]);
    at += workers;
    const LoraPart& part = site.part[unit.part];
    const int column = unit.n0 + 8 * g;
    if (part.rank == 0) continue;
    T* y = static_cast<T*>(a.y) + tile.row * a.ld_y + unit.y_column + column;
    uint4 old[NT][2] = {};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int row = n * 8 + 2 * q + odd;
        if (row < tile.rows && column < unit.columns) old[n][odd] = *reinterpret_cast<const uint4*>(y + row * a.ld_y);
      }
    }
    float sum[NT][4][4] = {};
#pragma unroll 1
    for (int r0 = 0; r0 < part.rank; r0 += 16) {
      if (r0 > 0) load_spread<false, true>(part.b, unit.columns, part.rank, unit.n0, r0, f);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const T* from = s_tile + (n * 8 + g) * kStride + unit.s_column + r0 + 4 * q;
        const uint2 b = r0 + 4 * q < part.rank ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
#pragma unroll
        for (int t = 0; t < 4; ++t) multiply<T>(sum[n][t], f.a[t][0], f.a[t][1], f.a[t][2], f.a[t][3], b.x, b.y);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int row = n * 8 + 2 * q + odd;
        if (row >= tile.rows || column >= unit.columns) continue;
        float add[8];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          add[2 * t] = sum[n][t][odd] * part.scale;
          add[2 * t + 1] = sum[n][t][2 + odd] * part.scale;
        }
        *reinterpret_cast<uint4*>(y + row * a.ld_y) = sum8<T>(old[n][odd], add);
      }
    }
  }
}

template <class T, int MT, int NT>
void launch_fused(const FusedArgs& args, int64_t clusters, int cluster, cudaStream_t stream,
                  std::source_location where = std::source_location::current()) {
  const size_t shared =
      static_cast<size_t>(reduce_floats(MT, NT)) * sizeof(float) + static_cast<size_t>(NT * 8 * (MT * 16 + 4)) * sizeof(T);
  Launch launch{dim3(static_cast<unsigned>(clusters * cluster)), dim3(kLoraThreads), shared, stream, cluster, where};
  launch.overlap = true;
  launch(fused_kernel<T, MT, NT>, args);
}

template <class T>
void launch_ranks(const FusedArgs& args, int rank, bool small, int64_t clusters, int cluster, cudaStream_t stream) {
  if (rank <= 16)
    small ? launch_fused<T, 1, 1>(args, clusters, cluster, stream) : launch_fused<T, 1, 2>(args, clusters, cluster, stream);
  else if (rank <= 48)
    small ? launch_fused<T, 3, 1>(args, clusters, cluster, stream) : launch_fused<T, 3, 2>(args, clusters, cluster, stream);
  else small ? launch_fused<T, 4, 1>(args, clusters, cluster, stream) : launch_fused<T, 4, 2>(args, clusters, cluster, stream);
}

}  // namespace

bool CudaOps::lora_small(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView y) {
  const TileCount eights = count_tiles(groups, 8);
  int rank = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.rows == 0) continue;
    int sum = 0;
    for (int p = 0; p < linear.parts; ++p) sum += group.host_sites[linear.site].part[p].rank;
    rank = std::max(rank, sum);
  }
  if (rank > kMaxFusedRank || eights.largest > kMaxFusedRows || eights.dropout || y.dtype != dtype_) return false;
  const LoraCall call = lora_call("linear_lora", linear, groups, x.rows);
  expect("linear_lora", "s", s, dtype_, x.rows, -1);
  require(s.cols >= rank, "[linear_lora] s: expected at least ", rank, " columns, got ", s.cols);
  if (rank == 0) return true;
  if (!fast_layout(linear, groups, {x, s, y})) return false;

  const bool small = eights.largest <= 8;
  const int64_t tiles = small ? eights.tiles : count_tiles(groups, 16).tiles;
  // Blocks for about two a processor; clusters of eight while tiles are few. A split repeats the shrink, so it is worth one only
  // when a warp would have more than two units of columns.
  const int64_t room = 2 * int64_t{device_.processors()};
  int cluster = deterministic_ ? 4 : kMaxCluster;
  while (!deterministic_ && cluster > 2 && tiles * cluster > room) cluster /= 2;
  int64_t units = 0;
  for (int p = 0; p < linear.parts; ++p) units += ceil_div(linear.out[p], kSpreadColumns);
  const int64_t wanted = ceil_div(units, int64_t{cluster} * kLoraWarps * 2), most = std::max<int64_t>(1, room / (tiles * cluster));
  const FusedArgs args = {call, x.data, x.ld, s.data, s.ld, y.data, y.ld, static_cast<int>(std::min(wanted, most))};
  dispatch_half(dtype_, [&]<class T>() { launch_ranks<T>(args, rank, small, tiles * args.splits, cluster, stream()); });
  return true;
}

}  // namespace loquetier::cuda
