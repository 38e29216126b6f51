// Gradients of the adapters: dA += ds^T (x * M) and dB += scale dy^T s. Both are G[r, n] += L^T P, summed over a group's rows: L
// holds rank columns, P wide rows, read once. A block takes 128 columns; its warps are two column halves by four row shares, the
// blocks of a cluster share the rows further, and all partial sums meet in shared memory in a fixed order: f32, no atomics.
// Operands have the summed index on the slow side, so their 8 x 8 blocks are transposed in registers. Many rows of a fast layout go
// to lora_wide.cu instead. At the end of the file: lora_backward, which chooses.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda_ops.h"
#include "lora.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kColumns = 128;  // of a block
constexpr int kRowShares = 4;  // warps that share the rows of the same columns
constexpr int kRowsPerStep = 16;

enum class Product { a, a_dropout, b };

struct GradArgs {
  LoraCall call;
  const void* l;  // [T, ranks] ds or s
  int64_t ld_l;
  const void* p;  // [T, wide] x or dy
  int64_t ld_p;
  int chunks;  // rank ranges; grid.z = products * chunks
};

// Column of n-tile i, slot j of a 32-column piece: a lane's 16-byte load holds columns 8q .. 8q + 7.
__device__ inline int grad_column(int i, int slot) { return 8 * (slot / 2) + 2 * i + slot % 2; }

template <class T, int MT, Product kProduct, bool kFast>
__global__ void __launch_bounds__(kLoraThreads) grad_kernel(GradArgs a) {
  extern __shared__ float shared[];
  auto cluster = cooperative_groups::this_cluster();
  const int cluster_size = static_cast<int>(cluster.num_blocks()), cluster_rank = static_cast<int>(cluster.block_rank());
  const LoraGroup& group = a.call.groups[blockIdx.x / static_cast<unsigned>(cluster_size)];
  if (group.sites == nullptr || group.grads == nullptr || group.rows == 0) return;
  if (kProduct != Product::b && (group.dropout > 0) != (kProduct == Product::a_dropout)) return;
  __shared__ LoraSite site;
  fetch_site(group.sites + a.call.site, site);
  __syncthreads();
  const LoraGradSite& grads = group.grads[a.call.site];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;

  const int chunk = static_cast<int>(blockIdx.z) % a.chunks;
  int part = static_cast<int>(blockIdx.z) / a.chunks, l_column = 0, rank = 0;
  int block = static_cast<int>(blockIdx.y), columns = static_cast<int>(a.call.in), p_column = 0;
  if constexpr (kProduct == Product::b) {
    part = 0;
    columns = static_cast<int>(a.call.out[0]);
    while (block >= (columns + kColumns - 1) / kColumns) {
      block -= (columns + kColumns - 1) / kColumns;
      p_column += columns;
      l_column += site.part[part].rank;
      columns = static_cast<int>(a.call.out[++part]);
    }
    rank = site.part[part].rank;
  } else if constexpr (kProduct == Product::a_dropout) {
    for (int p = 0; p < part; ++p) l_column += site.part[p].rank;
    rank = site.part[part].rank;
  } else {
    for (int p = 0; p < a.call.parts; ++p) rank += site.part[p].rank;  // all parts at once
  }
  const int rank_begin = chunk * MT * 16;
  if (rank_begin >= rank) return;

  const uint16_t* l = static_cast<const uint16_t*>(a.l) + group.row_begin * a.ld_l + l_column;
  const uint16_t* p = static_cast<const uint16_t*>(a.p) + group.row_begin * a.ld_p + p_column;
  const int n0 = block * kColumns + warp % 2 * 64;
  const int share = warp / 2 + kRowShares * cluster_rank, shares = kRowShares * cluster_size;

  float sum[MT][8][4] = {};  // n-tile 4 piece + i
#pragma unroll(kFast ? 2 : 1)
  for (int row0 = share * kRowsPerStep; row0 < group.rows; row0 += shares * kRowsPerStep) {
    uint4 wide[2][2];  // [rows g, g + 8][piece of 32 columns]
    uint32_t left[MT][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + half * 8 + g;
      const bool real = row < group.rows;
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int column = n0 + piece * 32 + 8 * q;
        wide[half][piece] = {0, 0, 0, 0};
        if (real) {
          wide[half][piece] = load8<kFast>(p + row * a.ld_p, column, columns);
          if constexpr (kProduct == Product::a_dropout) {
            wide[half][piece] = masked(wide[half][piece],
                                       keep8(a.call.row_keys[group.row_begin + row], a.call.stream[part], column, group.dropout));
          }
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const int r = rank_begin + m * 16 + 2 * q;
        left[m][2 * half] = real ? load2<kFast>(l + row * a.ld_l, r, rank) : 0;
        left[m][2 * half + 1] = real ? load2<kFast>(l + row * a.ld_l, r + 8, rank) : 0;
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m][i] = transpose(left[m][i]);
    }
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const uint32_t top[4] = {wide[0][piece].x, wide[0][piece].y, wide[0][piece].z, wide[0][piece].w};
      const uint32_t bottom[4] = {wide[1][piece].x, wide[1][piece].y, wide[1][piece].z, wide[1][piece].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t b0 = transpose(top[i]), b1 = transpose(bottom[i]);
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply<T>(sum[m][piece * 4 + i], left[m][0], left[m][1], left[m][2], left[m][3], b0, b1);
      }
    }
  }

  // Partial sums: [row share][column half][m][n-tile][i][lane]; a block's own total goes to share 0.
  constexpr int kHalf = MT * 8 * 128, kTile = 2 * kHalf;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shared[warp / 2 * kTile + warp % 2 * kHalf + ((m * 8 + n) * 4 + i) * kWarp + lane] = sum[m][n][i];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < kTile; e += kLoraThreads) {
    float total = shared[e];
    for (int s = 1; s < kRowShares; ++s) total += shared[s * kTile + e];
    shared[e] = total;
  }
  cluster.sync();
  const float scale = kProduct == Product::b           ? site.part[part].scale
                      : kProduct == Product::a_dropout ? 1.0f / (1.0f - group.dropout)
                                                       : 1.0f;
#pragma unroll 1
  for (int e = cluster_rank * kLoraThreads + static_cast<int>(threadIdx.x); e < kTile; e += cluster_size * kLoraThreads) {
    const int el = e % kWarp, i = e / kWarp % 4, n = e / 128 % 8, m = e / 1024 % MT, half = e / kHalf;
    int r = rank_begin + m * 16 + el / 4 + 8 * (i / 2);
    const int column = block * kColumns + half * 64 + n / 4 * 32 + grad_column(n % 4, el % 4 * 2 + i % 2);
    if (r >= rank || column >= columns) continue;
    float total = 0;
#pragma unroll 1
    for (int b = 0; b < cluster_size; ++b) total += *cluster.map_shared_rank(shared + e, static_cast<unsigned>(b));
    if constexpr (kProduct == Product::b) {
      float* db = grads.part[part].db;
      if (db != nullptr) db[int64_t{column} * rank + r] += scale * total;
    } else {
      int owner = part;
      if constexpr (kProduct == Product::a) {
        owner = 0;
        while (r >= site.part[owner].rank) r -= site.part[owner++].rank;
      }
      float* da = grads.part[owner].da;
      if (da != nullptr) da[int64_t{r} * columns + column] += scale * total;
    }
  }
  cluster.sync();
}

// Blocks of a cluster: enough to fill the device, none with less than 64 rows.
int cluster_of(int64_t blocks, int64_t rows, int processors) {
  int cluster = 1;
  while (cluster < kMaxCluster && blocks * cluster * 2 <= 2 * processors && rows >= cluster * 128) cluster *= 2;
  return cluster;
}

template <class T, int MT, Product kProduct, bool kFast>
void launch_grad(const GradArgs& args, int64_t blocks, int products, int64_t rows, int processors, cudaStream_t stream,
                 std::source_location where) {
  const int cluster = cluster_of(int64_t{args.call.count} * blocks * products * args.chunks, rows, processors);
  const Launch launch{dim3(static_cast<unsigned>(args.call.count * cluster), static_cast<unsigned>(blocks),
                           static_cast<unsigned>(products * args.chunks)),
                      dim3(kLoraThreads),
                      static_cast<size_t>(kRowShares * 2 * MT * 8 * 128) * sizeof(float),
                      stream,
                      cluster,
                      where};
  launch(grad_kernel<T, MT, kProduct, kFast>, args);
}

template <class T, Product kProduct>
void launch_ranks(GradArgs args, int rank, int64_t blocks, int products, int64_t rows, bool fast, int processors,
                  cudaStream_t stream, std::source_location where = std::source_location::current()) {
  args.chunks = static_cast<int>(ceil_div(rank, rank <= 16 || !fast ? 16 : 48));
  if (!fast) launch_grad<T, 1, kProduct, false>(args, blocks, products, rows, processors, stream, where);
  else if (rank <= 16) launch_grad<T, 1, kProduct, true>(args, blocks, products, rows, processors, stream, where);
  else launch_grad<T, 3, kProduct, true>(args, blocks, products, rows, processors, stream, where);
}

}  // namespace

void CudaOps::small_gradient(Gradient of, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, bool fast,
                             TensorView l, TensorView p) {
  int64_t largest = 0, b_blocks = 0;
  for (int32_t g = 0; g < groups.count; ++g) largest = std::max(largest, int64_t{groups.host_groups[g].rows});
  for (int i = 0; i < linear.parts; ++i) b_blocks += ceil_div(linear.out[i], kColumns);
  const int64_t a_blocks = ceil_div(linear.in, kColumns);
  const Ranks ranks = ranks_of(linear, groups);
  const GradArgs args = {call, l.data, l.ld, p.data, p.ld, 1};
  const int processors = device_.processors();
  dispatch_half(dtype_, [&]<class T>() {
    if (of == Gradient::b) launch_ranks<T, Product::b>(args, ranks.single, b_blocks, 1, largest, fast, processors, stream());
    else if (of == Gradient::a) launch_ranks<T, Product::a>(args, ranks.stacked, a_blocks, 1, largest, fast, processors, stream());
    else launch_ranks<T, Product::a_dropout>(args, ranks.single, a_blocks, linear.parts, largest, fast, processors, stream());
  });
}

void CudaOps::lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                                    TensorView ds) {
  gradients("lora_backward_weights", linear, groups, x, s, dy, ds, false);
}

void CudaOps::lora_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                            TensorView ds) {
  gradients("lora_backward", linear, groups, x, s, dy, ds, true);
}

void CudaOps::gradients(const char* op, const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s,
                        TensorView dy, TensorView ds, bool with_ds) {
  const bool with_a = x.data != nullptr, with_b = with_ds || dy.data != nullptr;
  const int64_t rows = with_b ? dy.rows : x.rows;
  if (with_b) expect(op, "dy", dy, dtype_, rows, columns_of(linear));
  if (with_a) expect(op, "x", x, dtype_, rows, linear.in);
  const LoraCall call = lora_call(op, linear, groups, rows);
  const int stacked = ranks_of(linear, groups).stacked;
  if (stacked == 0 || rows == 0) return;
  bool plain = false, dropout = false;  // of the trained groups
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.sites != nullptr && group.grads != nullptr && group.rows > 0) (group.dropout > 0 ? dropout : plain) = true;
  }
  const bool trained = plain || dropout;
  if (!trained && !with_ds) return;
  const auto expect_ranks = [&](const char* name, const TensorView& view) {
    expect(op, name, view, dtype_, rows, -1);
    require(view.cols >= stacked, "[", op, "] ", name, ": expected at least ", stacked, " columns, got ", view.cols);
  };
  if (with_b) expect_ranks("s", s);
  if (with_ds || with_a) expect_ranks("ds", ds);
  device_.use();
  const bool fast = fast_layout(linear, groups, {x, s, dy, ds});  // views without data are zeros: no objection
  const bool wide = fast && !deterministic_ && many_rows(groups);
  const bool summed = with_ds && trained && wide && wide_sum(linear, groups, call, s, dy, ds);
  if (!summed) {
    if (with_ds) lora_backward_s(linear, groups, dy, ds);
    if (trained && with_b && wide) wide_gradient(Gradient::b, linear, groups, call, s, dy, false);
    else if (trained && with_b) small_gradient(Gradient::b, linear, groups, call, fast, s, dy);
  }
  if (!with_a) return;
  if (plain && wide) wide_gradient(Gradient::a, linear, groups, call, ds, x, summed);
  else if (plain) small_gradient(Gradient::a, linear, groups, call, fast, ds, x);
  if (dropout) small_gradient(Gradient::a_dropout, linear, groups, call, fast, ds, x);
}

}  // namespace loquetier::cuda
