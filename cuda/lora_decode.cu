// Shrink and expand of small groups (decode rows) in one launch. A cluster takes one tile of a group's rows: its blocks share out k for the shrink,
// exchange the sums through distributed shared memory, and then share out the columns of the expand, whose fragments were loaded at the start. So S
// makes no round trip through global memory, every adapter matrix is read once, and a linear costs one launch beside its base product.
//
// With few tiles several clusters ("splits") do the same shrink and each a part of the columns. Sums have the order of lora_reduce.cu.
#include <algorithm>

#include "cuda_ops.h"
#include "lora_reduce.cuh"
#include "lora_spread.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kMaxFusedRank = 64;   // of the parts together
constexpr int kMaxFusedRows = 64;   // of a group

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
  int64_t y_column = 0;  // of the part
  int64_t n0 = 0;        // in the part
  int64_t columns = 0;   // of the part
};

__device__ inline bool find_unit(const LoraCall& call, const LoraSite& site, int64_t index, Unit& unit) {
  int64_t y_column = 0;
  int s_column = 0;
  for (int p = 0; p < call.parts; ++p) {
    const int64_t units = ceil_div(call.out[p], kSpreadColumns);
    if (index < units) {
      unit = {p, s_column, y_column, index * kSpreadColumns, call.out[p]};
      return true;
    }
    index -= units;
    y_column += call.out[p];
    s_column += site.part[p].rank;
  }
  return false;
}

template <class T, class Y, int MT, int NT>
__global__ void __launch_bounds__(kLoraThreads) fused_kernel(FusedArgs a) {
  extern __shared__ float shared[];
  constexpr int kTile = MT * NT * 128;
  // S of the tile, [rows][ranks], rounded as lora_shrink leaves it. The stride keeps 8-byte loads aligned and rows in different banks.
  constexpr int kStride = MT * 16 + 4;
  T* s_tile = reinterpret_cast<T*>(shared + kLoraWarps * kTile);
  auto cluster = cooperative_groups::this_cluster();
  const int cluster_size = static_cast<int>(cluster.num_blocks()), cluster_rank = static_cast<int>(cluster.block_rank());
  const int index = static_cast<int>(blockIdx.x) / cluster_size, split = index % a.splits;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;

  const Tile tile = find_tile(a.call, NT * 8, index / a.splits);
  if (tile.group < 0) return;
  const LoraSite& site = a.call.groups[tile.group].sites[a.call.site];
  Reduction r;
  for (int p = 0; p < a.call.parts; ++p) {
    if (r.q == nullptr && site.part[p].rank > 0) r.q = site.part[p].a;
    r.rank += site.part[p].rank;
  }
  if (r.rank == 0) return;

  // The first unit's fragments do not depend on anything of this step.
  const int64_t workers = int64_t{kLoraWarps} * cluster_size * a.splits;
  int64_t at = (int64_t{split} * cluster_size + cluster_rank) * kLoraWarps + warp;
  Unit unit;
  SpreadFragments first;
  bool more = find_unit(a.call, site, at, unit);
  if (more) {
    const LoraPart& part = site.part[unit.part];
    load_spread<false>(part.b, unit.columns, part.rank, unit.n0, 0, in_vectors(part.b, part.rank, 4), first);
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");  // x and y come from the launches before

  r.p = static_cast<const uint16_t*>(a.x) + tile.row * a.ld_x;
  r.ld_p = a.ld_x;
  r.rows = tile.rows;
  r.k = a.call.in;
  reduce_k<T, MT, NT, false, false>(r, cluster_rank, cluster_size, shared);
  cluster.sync();
  for (int e = cluster_rank * kLoraThreads + static_cast<int>(threadIdx.x); e < kTile; e += cluster_size * kLoraThreads) {
    int rank, row;
    reduce_place<NT>(e, rank, row);
    const T value = from_float<T>(cluster_total(cluster, shared, e, cluster_size));
    for (int b = 0; b < cluster_size; ++b) *cluster.map_shared_rank(s_tile + row * kStride + rank, static_cast<unsigned>(b)) = value;
    if (split == 0 && row < tile.rows && rank < r.rank) static_cast<T*>(a.s)[(tile.row + row) * a.ld_s + rank] = value;
  }
  cluster.sync();

  const int n_tiles = (tile.rows + 7) / 8;
  for (bool begun = false; more; begun = true) {
    const LoraPart& part = site.part[unit.part];
    const int rank = part.rank;
    Y* y = static_cast<Y*>(a.y) + tile.row * a.ld_y + unit.y_column;
    const bool vector_y = in_vectors(y, a.ld_y, static_cast<int>(16 / sizeof(Y))) && unit.columns % 8 == 0;
    const bool vector_b = in_vectors(part.b, rank, 4), vector_s = unit.s_column % 4 == 0 && rank % 4 == 0;
    const int64_t column = unit.n0 + 8 * g;
    if (rank > 0) {
      if (begun) load_spread<false>(part.b, unit.columns, rank, unit.n0, 0, vector_b, first);
      for (int n = 0; n < n_tiles; ++n) {
        float sum[4][4] = {};
        for (int r0 = 0; r0 < rank; r0 += 16) {
          SpreadFragments f = first;
          if (r0 > 0) load_spread<false>(part.b, unit.columns, rank, unit.n0, r0, vector_b, f);
          const uint2 b = load4(s_tile + (n * 8 + g) * kStride + unit.s_column, r0 + 4 * q, rank, vector_s);
#pragma unroll
          for (int t = 0; t < 4; ++t) multiply<T>(sum[t], f.a[t][0], f.a[t][1], f.a[t][2], f.a[t][3], b.x, b.y);
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int row = n * 8 + 2 * q + odd;
          if (row >= tile.rows || column >= unit.columns) continue;
          float add[8];
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            add[2 * t] = sum[t][odd] * part.scale;
            add[2 * t + 1] = sum[t][2 + odd] * part.scale;
          }
          add8<Y, T>(y + row * a.ld_y + column, add, unit.columns - column, vector_y);
        }
      }
    }
    at += workers;
    more = find_unit(a.call, site, at, unit);
  }
}

template <class T, class Y, int MT, int NT>
void launch_fused(const FusedArgs& args, int64_t clusters, int cluster, cudaStream_t stream,
                  std::source_location where = std::source_location::current()) {
  const size_t shared = static_cast<size_t>(reduce_floats(MT, NT)) * sizeof(float) + static_cast<size_t>(NT * 8 * (MT * 16 + 4)) * sizeof(T);
  Launch launch{dim3(static_cast<unsigned>(clusters * cluster)), dim3(kLoraThreads), shared, stream, cluster, where};
  launch.overlap = true;
  launch(fused_kernel<T, Y, MT, NT>, args);
}

template <class T, class Y>
void launch_ranks(const FusedArgs& args, int rank, bool small, int64_t clusters, int cluster, cudaStream_t stream) {
  if (rank <= 16) small ? launch_fused<T, Y, 1, 1>(args, clusters, cluster, stream) : launch_fused<T, Y, 1, 8>(args, clusters, cluster, stream);
  else if (rank <= 48) small ? launch_fused<T, Y, 3, 1>(args, clusters, cluster, stream) : launch_fused<T, Y, 3, 8>(args, clusters, cluster, stream);
  else small ? launch_fused<T, Y, 4, 1>(args, clusters, cluster, stream) : launch_fused<T, Y, 4, 8>(args, clusters, cluster, stream);
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
  if (rank > kMaxFusedRank || eights.largest > kMaxFusedRows || eights.dropout) return false;
  const LoraCall call = lora_call("linear_lora", linear, groups, x.rows);
  expect("linear_lora", "s", s, dtype_, x.rows, -1);
  require(s.cols >= rank, "[linear_lora] s: expected at least ", rank, " columns, got ", s.cols);
  if (rank == 0) return true;

  const bool small = eights.largest <= 8;
  const int64_t tiles = small ? eights.tiles : count_tiles(groups, kMaxFusedRows).tiles;
  // Blocks for about two a processor; clusters of eight while tiles are few. A split repeats the shrink, so it is worth one only when a warp would have
  // more than two units of columns.
  const int64_t room = 2 * int64_t{device_.processors()};
  int cluster = deterministic_ ? 4 : kMaxCluster;
  while (!deterministic_ && cluster > 2 && tiles * cluster > room) cluster /= 2;
  int64_t units = 0;
  for (int p = 0; p < linear.parts; ++p) units += ceil_div(linear.out[p], kSpreadColumns);
  const int64_t wanted = ceil_div(units, int64_t{cluster} * kLoraWarps * 2), most = std::max<int64_t>(1, room / (tiles * cluster));
  const FusedArgs args = {call, x.data, x.ld, s.data, s.ld, y.data, y.ld, static_cast<int>(std::min(wanted, most))};
  dispatch_half(dtype_, [&]<class T>() {
    if (y.dtype == DType::f32) launch_ranks<T, float>(args, rank, small, tiles * args.splits, cluster, stream());
    else launch_ranks<T, T>(args, rank, small, tiles * args.splits, cluster, stream());
  });
  return true;
}

}  // namespace loquetier::cuda
