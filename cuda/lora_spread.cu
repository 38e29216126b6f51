// lora_expand, lora_fill and lora_backward_x: the products out of rank columns into wide rows (lora_spread.cuh). A block takes 512
// columns of one part and up to 32 rows of one group; a warp 64 columns. What is there already is loaded before the products, all
// of it: bandwidth needs the loads in flight. With few rows a launch may begin beside the one in front.
#include <algorithm>

#include "cuda_ops.h"
#include "lora_spread.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kBlockColumns = kLoraWarps * kSpreadColumns;

constexpr int kStreamRows = 128;

enum class Product { expand, fill, backward, backward_dropout };  // fill: expand that overwrites

struct SpreadArgs {
  LoraCall call;
  const void* s;
  int64_t ld_s;
  void* y;
  int64_t ld_y;
};

template <class T, class Y, int NT, Product kProduct, bool kFast>
__global__ void __launch_bounds__(kLoraThreads) spread_kernel(SpreadArgs a) {
  const Tile tile = find_tile(a.call, NT * 8, static_cast<int>(blockIdx.x));
  if (tile.group < 0) return start_after_previous();
  const LoraGroup& group = a.call.groups[tile.group];
  constexpr bool kExpand = kProduct == Product::expand || kProduct == Product::fill;
  if (!kExpand && (group.dropout > 0) != (kProduct == Product::backward_dropout))
    return start_after_previous();  // of the whole block
  __shared__ LoraSite site;
  fetch_site(tile.sites + a.call.site, site);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;

  // This block's columns: of one part (expand), or of x (backward).
  int part = 0;
  int block = static_cast<int>(blockIdx.y), columns = static_cast<int>(a.call.in), y_column = 0, s_column = 0;
  if constexpr (kExpand) {
    columns = static_cast<int>(a.call.out[0]);
    while (block >= (columns + kBlockColumns - 1) / kBlockColumns) {
      block -= (columns + kBlockColumns - 1) / kBlockColumns;
      y_column += columns;
      s_column += site.part[part].rank;
      columns = static_cast<int>(a.call.out[++part]);
    }
  }
  const int n0 = block * kBlockColumns + warp * kSpreadColumns;
  if (n0 >= columns) return start_after_previous();
  // The matrix is an adapter's: its first ranks need not wait for the launch in front.
  const void* matrix = nullptr;
  int rank = 0;
  if constexpr (kExpand) {
    matrix = site.part[part].b;
    rank = site.part[part].rank;
  } else if constexpr (kProduct == Product::backward) {
    for (int p = 0; p < a.call.parts; ++p) {
      if (matrix == nullptr && site.part[p].rank > 0) matrix = site.part[p].a;  // the parts' A are one matrix [sum of ranks, in]
      rank += site.part[p].rank;
    }
  }
  SpreadFragments first = {};
  if (rank > 0) load_spread<!kExpand, kFast>(matrix, columns, rank, n0, 0, first);
  start_after_previous();
  if (rank == 0 && (kProduct == Product::expand || kProduct == Product::backward)) return;
  Y* y = static_cast<Y*>(a.y) + tile.row * a.ld_y + y_column;
  const int column = n0 + 8 * g;
  const T* s = static_cast<const T*>(a.s) + tile.row * a.ld_s;

  constexpr bool kVectors = kFast && sizeof(Y) == 2;
  constexpr bool kFill = kProduct == Product::fill;
  uint4 old[NT][2] = {};
  if constexpr (kVectors && !kFill) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int row = n * 8 + 2 * q + odd;
        if (row < tile.rows && column < columns) old[n][odd] = *reinterpret_cast<const uint4*>(y + row * a.ld_y + column);
      }
    }
  }

  float sum[NT][4][4] = {};
  // Adds S[:, s0 : s0 + ranks] Q^T to `to`; `f`: the fragments of the first ranks.
  const auto product = [&](const void* of, int ranks, int s0, SpreadFragments f, float (&to)[NT][4][4]) {
#pragma unroll 1
    for (int r = 0; r < ranks; r += 16) {
      if (r > 0) load_spread<!kExpand, kFast>(of, columns, ranks, n0, r, f);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int row = n * 8 + g;
        const T* from = s + row * a.ld_s + s0;
        const int at = r + 4 * q;
        uint2 b = {0, 0};
        if constexpr (kFast) {
          // Not through the read-only path: the compiler may move such a load in front of the wait for the launch that writes s.
          if (row < tile.rows && at < ranks) b = *reinterpret_cast<const uint2*>(from + at);
        } else {
          if (row < tile.rows) b = load4<false>(from, at, ranks);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) multiply<T>(to[n][t], f.a[t][0], f.a[t][1], f.a[t][2], f.a[t][3], b.x, b.y);
      }
    }
  };

  float scale = 1;
  if constexpr (kProduct != Product::backward_dropout) {
    if constexpr (kExpand) scale = site.part[part].scale;
    product(matrix, rank, s_column, first, sum);
  } else {
    int s0 = 0;
    for (int p = 0; p < a.call.parts; ++p) {
      const int ranks = site.part[p].rank;
      if (ranks == 0) continue;
      float own[NT][4][4] = {};
      load_spread<true, kFast>(site.part[p].a, columns, ranks, n0, 0, first);
      product(site.part[p].a, ranks, s0, first, own);
      s0 += ranks;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int row = n * 8 + 2 * q + odd;
          if (row >= tile.rows) continue;
          const uint32_t keep = keep8(a.call.row_keys[tile.row + row], a.call.stream[p], n0 + 8 * g, group.dropout);
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (keep >> (2 * t) & 1u) sum[n][t][odd] += own[n][t][odd];
            if (keep >> (2 * t + 1) & 1u) sum[n][t][2 + odd] += own[n][t][2 + odd];
          }
        }
      }
    }
    scale = 1.0f / (1.0f - group.dropout);
  }

  if (column >= columns) return;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int row = n * 8 + 2 * q + odd;
      if (row >= tile.rows) continue;
      float add[8];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        add[2 * t] = sum[n][t][odd] * scale;
        add[2 * t + 1] = sum[n][t][2 + odd] * scale;
      }
      if constexpr (kVectors) *reinterpret_cast<uint4*>(y + row * a.ld_y + column) = sum8<T>(old[n][odd], add);
      else add8<Y, kFill, kFast>(y + row * a.ld_y + column, add, columns - column);
    }
  }
}

// The fast way for large groups: a block walks down 128 rows of its 512 columns, 16 at a time, with the next 16 rows of `y` and of
// S on their way and the fragments of the first 16 ranks in registers (further ranks are read again, from L1).
template <class T, Product kProduct>
__global__ void __launch_bounds__(kLoraThreads, 2) stream_kernel(SpreadArgs a) {
  constexpr bool kExpand = kProduct == Product::expand || kProduct == Product::fill;
  constexpr bool kFill = kProduct == Product::fill;
  constexpr int NT = 2;
  const Tile tile = find_tile(a.call, kStreamRows, static_cast<int>(blockIdx.x));
  if (tile.group < 0) return;
  if (!kExpand && a.call.groups[tile.group].dropout > 0) return;  // of the whole block
  __shared__ LoraSite site;
  fetch_site(tile.sites + a.call.site, site);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  int block = static_cast<int>(blockIdx.y), columns = static_cast<int>(a.call.in), y_column = 0, s_column = 0, part = 0, rank = 0;
  const void* matrix = nullptr;
  float scale = 1;
  if constexpr (kExpand) {
    columns = static_cast<int>(a.call.out[0]);
    while (block >= (columns + kBlockColumns - 1) / kBlockColumns) {
      block -= (columns + kBlockColumns - 1) / kBlockColumns;
      y_column += columns;
      s_column += site.part[part].rank;
      columns = static_cast<int>(a.call.out[++part]);
    }
    matrix = site.part[part].b;
    rank = site.part[part].rank;
    scale = site.part[part].scale;
  } else {
    for (int p = 0; p < a.call.parts; ++p) {
      if (matrix == nullptr && site.part[p].rank > 0) matrix = site.part[p].a;
      rank += site.part[p].rank;
    }
  }
  const int n0 = block * kBlockColumns + warp * kSpreadColumns, column = n0 + 8 * g;
  if (n0 >= columns || (!kFill && rank == 0)) return;
  T* y = static_cast<T*>(a.y) + tile.row * a.ld_y + y_column + column;
  const T* s = static_cast<const T*>(a.s) + tile.row * a.ld_s + s_column;

  SpreadFragments first = {};
  if (rank > 0) load_spread<!kExpand, true>(matrix, columns, rank, n0, 0, first);
  uint4 next[NT][2] = {};
  uint2 s_next[NT];
  const auto fetch = [&](int row0) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int s_row = row0 + n * 8 + g;
      s_next[n] = s_row < tile.rows ? load4<true>(s + s_row * a.ld_s, 4 * q, rank) : uint2{0, 0};
      if constexpr (!kFill) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int row = row0 + n * 8 + 2 * q + odd;
          if (row < tile.rows && column < columns) next[n][odd] = __ldcs(reinterpret_cast<const uint4*>(y + row * a.ld_y));
        }
      }
    }
  };
  fetch(0);
#pragma unroll 1
  for (int row0 = 0; row0 < tile.rows; row0 += NT * 8) {
    uint4 old[NT][2];
    uint2 b[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      old[n][0] = next[n][0];
      old[n][1] = next[n][1];
      b[n] = s_next[n];
    }
    fetch(row0 + NT * 8);
    float sum[NT][4][4] = {};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int t = 0; t < 4; ++t)
        multiply<T>(sum[n][t], first.a[t][0], first.a[t][1], first.a[t][2], first.a[t][3], b[n].x, b[n].y);
    }
#pragma unroll 1
    for (int r = 16; r < rank; r += 16) {
      SpreadFragments f;
      load_spread<!kExpand, true>(matrix, columns, rank, n0, r, f);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int row = row0 + n * 8 + g;
        const uint2 more = row < tile.rows ? load4<true>(s + row * a.ld_s, r + 4 * q, rank) : uint2{0, 0};
#pragma unroll
        for (int t = 0; t < 4; ++t) multiply<T>(sum[n][t], f.a[t][0], f.a[t][1], f.a[t][2], f.a[t][3], more.x, more.y);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int row = row0 + n * 8 + 2 * q + odd;
        if (row >= tile.rows || column >= columns) continue;
        float add[8];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          add[2 * t] = sum[n][t][odd] * scale;
          add[2 * t + 1] = sum[n][t][2 + odd] * scale;
        }
        *reinterpret_cast<uint4*>(y + row * a.ld_y) = sum8<T>(kFill ? uint4{0, 0, 0, 0} : old[n][odd], add);
      }
    }
  }
}

template <class T, class Y, int NT, Product kProduct, bool kFast>
void launch_tiles(int64_t tiles, const SpreadArgs& args, int64_t blocks, cudaStream_t stream, std::source_location where) {
  Launch{dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(blocks)), dim3(kLoraThreads), 0, stream, 1, where, true}(
      spread_kernel<T, Y, NT, kProduct, kFast>, args);
}

template <class T, class Y, Product kProduct>
void launch_spread(const LoraGroups& groups, const SpreadArgs& args, int64_t blocks, bool fast, cudaStream_t stream,
                   std::source_location where = std::source_location::current()) {
  constexpr int kTiles = kProduct == Product::backward_dropout ? 2 : 4;  // of 8 rows; with dropout every part has sums of its own
  constexpr bool kStreams = sizeof(Y) == 2 && kProduct != Product::backward_dropout;
  const TileCount eights = count_tiles(groups, 8);
  if (!fast) {
    launch_tiles<T, Y, 1, kProduct, false>(eights.tiles, args, blocks, stream, where);
  } else if (eights.largest <= 8) {
    launch_tiles<T, Y, 1, kProduct, true>(eights.tiles, args, blocks, stream, where);
  } else if (kStreams && eights.largest <= 64) {
    launch_tiles<T, Y, 2, kProduct, true>(count_tiles(groups, 16).tiles, args, blocks, stream, where);
  } else if constexpr (kStreams) {
    Launch{dim3(static_cast<unsigned>(count_tiles(groups, kStreamRows).tiles), static_cast<unsigned>(blocks)),
           dim3(kLoraThreads),
           0,
           stream,
           1,
           where}(stream_kernel<T, kProduct>, args);
  } else {
    launch_tiles<T, Y, kTiles, kProduct, true>(count_tiles(groups, kTiles * 8).tiles, args, blocks, stream, where);
  }
}

}  // namespace

void CudaOps::lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) {
  expect("lora_expand", "y", y, y.dtype == DType::f32 ? DType::f32 : dtype_, -1, columns_of(linear));
  const LoraCall call = lora_call("lora_expand", linear, groups, y.rows);
  if (!any_lora(groups) || y.rows == 0) return;
  expect("lora_expand", "s", s, dtype_, y.rows, -1);
  require(s.cols >= groups.max_rank, "[lora_expand] s: expected at least ", groups.max_rank, " columns, got ", s.cols);
  device_.use();
  int64_t blocks = 0;
  for (int p = 0; p < linear.parts; ++p) blocks += ceil_div(linear.out[p], kBlockColumns);
  const SpreadArgs args = {call, s.data, s.ld, y.data, y.ld};
  dispatch_half(dtype_, [&]<class T>() {
    const bool fast = fast_layout(linear, groups, {s, y});
    if (y.dtype == DType::f32) launch_spread<T, float, Product::expand>(groups, args, blocks, fast, stream());
    else launch_spread<T, T, Product::expand>(groups, args, blocks, fast, stream());
  });
}

void CudaOps::lora_fill(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) {
  const LoraCall call = lora_call("linear_lora", linear, groups, y.rows);
  const size_t size = size_of(dtype_);
  int64_t end = 0;  // rows without an adapter, between the groups
  const auto clear = [&](int64_t to) {
    if (to > end) {
      check(cudaMemset2DAsync(y.at(end), static_cast<size_t>(y.ld) * size, 0, static_cast<size_t>(y.cols) * size,
                              static_cast<size_t>(to - end), stream()),
            "cudaMemset2DAsync");
    }
  };
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites == nullptr || group.rows == 0) continue;
    clear(group.row_begin);
    end = int64_t{group.row_begin} + group.rows;
  }
  clear(y.rows);
  int64_t blocks = 0;
  for (int p = 0; p < linear.parts; ++p) blocks += ceil_div(linear.out[p], kBlockColumns);
  const SpreadArgs args = {call, s.data, s.ld, y.data, y.ld};
  dispatch_half(dtype_, [&]<class T>() {
    launch_spread<T, T, Product::fill>(groups, args, blocks, fast_layout(linear, groups, {s, y}), stream());
  });
}

void CudaOps::lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) {
  expect("lora_backward_x", "dx", dx, dtype_, -1, linear.in);
  const LoraCall call = lora_call("lora_backward_x", linear, groups, dx.rows);
  if (!any_lora(groups) || dx.rows == 0) return;
  expect("lora_backward_x", "ds", ds, dtype_, dx.rows, -1);
  require(ds.cols >= groups.max_rank, "[lora_backward_x] ds: expected at least ", groups.max_rank, " columns, got ", ds.cols);
  device_.use();
  bool plain = false, dropout = false;
  for (int32_t g = 0; g < groups.count; ++g) {
    if (groups.host_groups[g].sites != nullptr) (groups.host_groups[g].dropout > 0 ? dropout : plain) = true;
  }
  const SpreadArgs args = {call, ds.data, ds.ld, dx.data, dx.ld};
  const int64_t blocks = ceil_div(linear.in, kBlockColumns);
  dispatch_half(dtype_, [&]<class T>() {
    const bool fast = fast_layout(linear, groups, {ds, dx});
    if (plain) launch_spread<T, T, Product::backward>(groups, args, blocks, fast, stream());
    if (dropout) launch_spread<T, T, Product::backward_dropout>(groups, args, blocks, fast, stream());
  });
}

}  // namespace loquetier::cuda
