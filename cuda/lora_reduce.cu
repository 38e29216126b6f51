// lora_shrink and lora_backward_s: the products into rank columns (lora_reduce.cuh), one cluster per tile of a group's rows and per
// rank range. Without dropout the parts' A matrices are one stacked matrix and X is read once; with it every part has its own mask.
// Many rows of a fast layout go to lora_tall.cu instead.
#include <algorithm>

#include "cuda_ops.h"
#include "lora_reduce.cuh"

namespace loquetier::cuda {

namespace {

enum class Product { shrink, shrink_dropout, backward };

struct ReduceArgs {
  LoraCall call;
  const void* p;
  int64_t ld_p;
  void* s;
  int64_t ld_s;
  int chunks;  // rank ranges of one product: grid.y = products * chunks
};

template <class T, int MT, int NT, Product kProduct, bool kFast>
__global__ void __launch_bounds__(kLoraThreads) reduce_kernel(ReduceArgs a) {
  extern __shared__ float shared[];
  auto cluster = cooperative_groups::this_cluster();
  const int cluster_size = static_cast<int>(cluster.num_blocks()), cluster_rank = static_cast<int>(cluster.block_rank());
  const Tile tile = find_tile(a.call, NT * 8, static_cast<int>(blockIdx.x) / cluster_size);
  if (tile.group < 0) return start_after_previous();
  const LoraGroup& group = a.call.groups[tile.group];
  if (kProduct != Product::backward && (group.dropout > 0) != (kProduct == Product::shrink_dropout)) return start_after_previous();
  __shared__ LoraSite site;
  fetch_site(tile.sites + a.call.site, site);
  __syncthreads();
  const int chunk = static_cast<int>(blockIdx.y) % a.chunks, product = static_cast<int>(blockIdx.y) / a.chunks;

  Reduction r;
  r.ld_p = a.ld_p;
  r.rows = tile.rows;
  r.rank_begin = chunk * MT * 16;
  r.k = static_cast<int>(a.call.in);
  int s_column = 0;
  float scale = 1;
  int64_t p_column = 0;
  if constexpr (kProduct == Product::shrink) {
    for (int p = 0; p < a.call.parts; ++p) {
      if (r.q == nullptr && site.part[p].rank > 0) r.q = site.part[p].a;
      r.rank += site.part[p].rank;
    }
  } else {
    for (int p = 0; p < product; ++p) {
      s_column += site.part[p].rank;
      p_column += a.call.out[p];
    }
    const LoraPart& part = site.part[product];
    r.rank = part.rank;
    if constexpr (kProduct == Product::backward) {
      r.q = part.b;
      r.k = static_cast<int>(a.call.out[product]);
      scale = part.scale;
    } else {
      p_column = 0;
      r.q = part.a;
      r.row_keys = a.call.row_keys + tile.row;
      r.stream = a.call.stream[product];
      r.dropout = group.dropout;
      scale = 1.0f / (1.0f - group.dropout);
    }
  }
  if (r.rank_begin >= r.rank) return start_after_previous();
  r.p = static_cast<const uint16_t*>(a.p) + tile.row * a.ld_p + p_column;
  reduce_k<T, MT, NT, kProduct == Product::shrink_dropout, kProduct == Product::backward, kFast,
           steps_ahead<MT, NT, kProduct == Product::shrink_dropout, kFast>()>(r, cluster_rank, cluster_size, shared);

  cluster.sync();
  T* s = static_cast<T*>(a.s) + tile.row * a.ld_s + s_column + r.rank_begin;
#pragma unroll 1
  for (int e = cluster_rank * kLoraThreads + static_cast<int>(threadIdx.x); e < MT * NT * 128; e += cluster_size * kLoraThreads) {
    int rank, row;
    reduce_place<NT>(e, rank, row);
    const float total = cluster_total(cluster, shared, e, cluster_size);
    if (row < tile.rows && r.rank_begin + rank < r.rank) s[row * a.ld_s + rank] = from_float<T>(total * scale);
  }
  cluster.sync();  // a block's sums stay until all have read them
}

struct Plan {
  int cluster = 1;
  int64_t tiles = 0;
  int rows = 64;     // of a tile
  bool few = false;  // tiles of 8 rows: every group has at most 8, or the layout is not fast
  bool fast = false;
};

// Enough blocks to fill the device, as far as k allows. Deterministic: always the same split, so a row's sum never changes its
// order.
Plan plan_of(const LoraGroups& groups, int64_t k, int products, bool fast, int processors, bool deterministic,
             bool shrink = false) {
  Plan plan;
  const TileCount eights = count_tiles(groups, 8);
  plan.fast = fast;
  plan.few = !fast || eights.largest <= 8;
  plan.rows = plan.few ? 8 : shrink && eights.largest <= 64 ? 16 : 64;
  plan.tiles = count_tiles(groups, plan.rows).tiles;
  if (deterministic) {
    plan.cluster = 4;
    return plan;
  }
  const int64_t room = int64_t{processors} * (plan.rows < 64 ? 2 : 1);
  while (plan.cluster < kMaxCluster && plan.tiles * products * plan.cluster * 2 <= room && k > plan.cluster * kLoraWarps * 64)
    plan.cluster *= 2;
  return plan;
}

template <class T, int MT, int NT, Product kProduct, bool kFast>
void launch_reduce(const Plan& plan, const ReduceArgs& args, int products, cudaStream_t stream, std::source_location where) {
  Launch{dim3(static_cast<unsigned>(plan.tiles * plan.cluster), static_cast<unsigned>(products * args.chunks)),
         dim3(kLoraThreads),
         static_cast<size_t>(reduce_floats(MT, NT)) * sizeof(float),
         stream,
         plan.cluster,
         where,
         true}(reduce_kernel<T, MT, NT, kProduct, kFast>, args);
}

// Rank tiles of a block: as many as the largest rank needs, at most 64 ranks; larger ranks go in ranges.
template <class T, Product kProduct>
void launch_ranks(const Plan& plan, ReduceArgs args, int rank, int products, cudaStream_t stream,
                  std::source_location where = std::source_location::current()) {
  args.chunks = static_cast<int>(ceil_div(rank, 64));
  if (!plan.fast) {
    launch_reduce<T, 4, 1, kProduct, false>(plan, args, products, stream, where);
  } else if (kProduct == Product::shrink && plan.rows == 16) {
    if (rank <= 16) launch_reduce<T, 1, 2, Product::shrink, true>(plan, args, products, stream, where);
    else if (rank <= 48) launch_reduce<T, 3, 2, Product::shrink, true>(plan, args, products, stream, where);
    else launch_reduce<T, 4, 2, Product::shrink, true>(plan, args, products, stream, where);
  } else if (rank <= 16) {
    plan.few ? launch_reduce<T, 1, 1, kProduct, true>(plan, args, products, stream, where)
             : launch_reduce<T, 1, 8, kProduct, true>(plan, args, products, stream, where);
  } else if (rank <= 48) {
    plan.few ? launch_reduce<T, 3, 1, kProduct, true>(plan, args, products, stream, where)
             : launch_reduce<T, 3, 8, kProduct, true>(plan, args, products, stream, where);
  } else {
    plan.few ? launch_reduce<T, 4, 1, kProduct, true>(plan, args, products, stream, where)
             : launch_reduce<T, 4, 8, kProduct, true>(plan, args, products, stream, where);
  }
}

}  // namespace

void CudaOps::lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) {
  shrink_on(stream(), linear, groups, x, s);
}

bool CudaOps::shrink_on(cudaStream_t on, const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s,
                        TensorView e) {
  expect("lora_shrink", "x", x, dtype_, -1, linear.in);
  const LoraCall call = lora_call("lora_shrink", linear, groups, x.rows);
  const Ranks ranks = ranks_of(linear, groups);
  const int stacked = ranks.stacked, single = ranks.single;
  if (stacked == 0 || x.rows == 0) return false;
  expect("lora_shrink", "s", s, dtype_, x.rows, -1);
  require(s.cols >= stacked, "[lora_shrink] s: expected at least ", stacked, " columns, got ", s.cols);
  device_.use();
  const ReduceArgs args = {call, x.data, x.ld, s.data, s.ld, 1};
  const bool fast = fast_layout(linear, groups, {x});
  // Many rows: another order of the sums, so the deterministic mode, where a row's bits must not depend on the rows beside it,
  // keeps to one.
  const bool tall = !deterministic_ && many_rows(groups) && fast_layout(linear, groups, {x, s});
  const bool dropout = count_tiles(groups, 8).dropout;
  bool plain = false;
  for (int32_t g = 0; g < groups.count; ++g)
    plain = plain || (groups.host_groups[g].sites != nullptr && groups.host_groups[g].dropout == 0);
  if (plain && tall) tall_shrink(on, linear, groups, call, stacked, x, s, e);
  dispatch_half(dtype_, [&]<class T>() {
    if (plain && !tall)
      launch_ranks<T, Product::shrink>(plan_of(groups, linear.in, 1, fast, device_.processors(), deterministic_, true), args,
                                       stacked, 1, on);
    if (dropout) {
      launch_ranks<T, Product::shrink_dropout>(plan_of(groups, linear.in, linear.parts, fast, device_.processors(), deterministic_),
                                               args, single, linear.parts, on);
    }
  });
  return !e.empty() && plain && tall && !dropout;
}

void CudaOps::lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) {
  expect("lora_backward_s", "dy", dy, dtype_, -1, columns_of(linear));
  const LoraCall call = lora_call("lora_backward_s", linear, groups, dy.rows);
  const Ranks ranks = ranks_of(linear, groups);
  const int stacked = ranks.stacked, single = ranks.single;
  if (stacked == 0 || dy.rows == 0) return;
  expect("lora_backward_s", "ds", ds, dtype_, dy.rows, -1);
  require(ds.cols >= stacked, "[lora_backward_s] ds: expected at least ", stacked, " columns, got ", ds.cols);
  device_.use();
  if (!deterministic_ && many_rows(groups) && fast_layout(linear, groups, {dy, ds})) {
    tall_backward_s(linear, groups, call, single, dy, ds);
    return;
  }
  const ReduceArgs args = {call, dy.data, dy.ld, ds.data, ds.ld, 1};
  const bool fast = fast_layout(linear, groups, {dy});
  const int64_t k = *std::max_element(linear.out, linear.out + linear.parts);
  dispatch_half(dtype_, [&]<class T>() {
    launch_ranks<T, Product::backward>(plan_of(groups, k, linear.parts, fast, device_.processors(), deterministic_), args, single,
                                       linear.parts, stream());
  });
}

}  // namespace loquetier::cuda
