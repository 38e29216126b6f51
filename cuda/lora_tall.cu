// lora_shrink and lora_backward_s over many rows: s [rows, R] = wide rows times a thin matrix, at the speed of one read of the wide
// rows whatever the rank. lora_reduce.cu has the same products for few rows, any alignment and dropout.
//
// A block takes 128 rows of one group, a warpgroup 64 of them, and up to 256 ranks: wgmma with the sums in registers, its operands
// staged in pieces along k, the wide rows by the copy engine and the thin matrix by cp.async. The blocks of a cluster share out k
// piece by piece; their sums meet in shared memory and are added in the order of the blocks.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda_ops.h"
#include "lora.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kRows = 128;  // of a block
constexpr int kBox = 64;    // rows and columns that the copy engine moves at a time: a warpgroup's rows of a panel
constexpr int kBoxBytes = kBox * kBox * 2;

struct TallArgs {
  CUtensorMap map;  // of x or dy [T, wide]
  LoraCall call;
  void* s;  // [T, ranks]
  int64_t ld_s;
  void* e = nullptr;  // [T, ranks] or null: scale * s too
  int64_t ld_e = 0;
};

// NR ranks at once. One block a processor, with as many pieces under way as there is room for: at 8,192 rows of 4,096 columns 21 us
// where two blocks with half of it each took 26 (16 ranks, H200).
template <int NR>
struct Shape {
  static constexpr int kPiece = NR <= 64 ? 128 : 64;  // of k
  static constexpr int kWideBytes = kRows * kPiece * 2;
  static constexpr int kStageBytes = kWideBytes + NR * kPiece * 2;
  static constexpr int kStages = 224 * 1024 / kStageBytes;
  static constexpr int kLdSum = NR + 4;  // floats; of the sums in shared memory, which take the place of the stages
  static constexpr size_t kShared = size_t{kStages} * kStageBytes + 1024;
  static_assert(kRows * kLdSum * 4 <= kStages * kStageBytes);
};

// kBackward: p is dy and the thin matrix B [out, R] of one part (grid.y); otherwise x and the stacked A [R, in] of all parts.
template <class T, int NR, bool kBackward>
__global__ void __launch_bounds__(kLoraThreads, 1) tall_kernel(const __grid_constant__ TallArgs a) {
  using S = Shape<NR>;
  constexpr int kPiece = S::kPiece;
  constexpr int N = NR < 64 ? NR : 64, kTiles = NR / N;  // ranks of one product; products side by side
  constexpr int kThinRows = kBackward ? kPiece : NR, kThinUnits = kBackward ? NR / 8 : kPiece / 8;
  extern __shared__ uint8_t raw[];
  __shared__ LoraSite site;
  __shared__ uint64_t arrived[S::kStages];  // a piece of p, by the copy engine
  const int thread = static_cast<int>(threadIdx.x);
  auto cluster = cooperative_groups::this_cluster();
  const int cluster_size = static_cast<int>(cluster.num_blocks()), cluster_rank = static_cast<int>(cluster.block_rank());
  if (thread == 0) {
    for (uint64_t& barrier : arrived) barrier_init(barrier, 1);
    barrier_init_fence();
  }
  const Tile tile = find_tile(a.call, kRows, static_cast<int>(blockIdx.x) / cluster_size);
  if (tile.group < 0) return start_after_previous();
  if (!kBackward && a.call.groups[tile.group].dropout > 0) return start_after_previous();  // of the whole cluster
  fetch_site(tile.sites + a.call.site, site);
  __syncthreads();

  int part = 0, rank = 0, s_column = 0, k = static_cast<int>(a.call.in);
  int64_t p_column = 0;
  const uint16_t* thin = nullptr;
  float scale = 1;
  if constexpr (kBackward) {
    for (; part < static_cast<int>(blockIdx.y); ++part) {
      s_column += site.part[part].rank;
      p_column += a.call.out[part];
    }
    thin = static_cast<const uint16_t*>(site.part[part].b);
    rank = site.part[part].rank;
    k = static_cast<int>(a.call.out[part]);
    scale = site.part[part].scale;
  } else {
    for (int p = 0; p < a.call.parts; ++p) {
      if (thin == nullptr && site.part[p].rank > 0) thin = static_cast<const uint16_t*>(site.part[p].a);
      rank += site.part[p].rank;
    }
  }
  const int rank_begin = static_cast<int>(blockIdx.z) * NR;
  if (rank_begin >= rank) return start_after_previous();
  const int ranks = min(NR, rank - rank_begin);

  uint8_t* shared = raw + (1024 - shared_address(raw) % 1024) % 1024;  // the same place in every block of the cluster
  const uint32_t base = shared_address(shared);
  const int pieces = (k + kPiece - 1) / kPiece, own = (pieces - cluster_rank + cluster_size - 1) / cluster_size;
  const auto load = [&](int i) {
    if (i < own) {
      const int k0 = (cluster_rank + i * cluster_size) * kPiece;
      const uint32_t stage = base + static_cast<uint32_t>(i % S::kStages * S::kStageBytes);
      if (thread == 0) {  // columns behind a part are the next one's of the same rows, and meet zeros
        const int boxes = tile.rows > kBox ? 2 : 1;
        barrier_expect(arrived[i % S::kStages], static_cast<uint32_t>(boxes * (kPiece / kBox) * kBoxBytes));
#pragma unroll 1
        for (int box = 0; box < boxes; ++box) {
#pragma unroll
          for (int panel = 0; panel < kPiece / kBox; ++panel)
            tma_load(stage + static_cast<uint32_t>(panel * kRows * 128 + box * kBoxBytes), a.map, arrived[i % S::kStages],
                     static_cast<int>(p_column) + k0 + panel * kBox, static_cast<int>(tile.row) + box * kBox, kNoHint);
        }
      }
      if constexpr (kBackward) {
        load_thin<kThinRows, kThinUnits, kLoraThreads>(stage + S::kWideBytes, thin + int64_t{k0} * rank + rank_begin, rank, k - k0,
                                                       ranks / 8);
      } else {
        load_thin<kThinRows, kThinUnits, kLoraThreads>(stage + S::kWideBytes, thin + int64_t{rank_begin} * k + k0, k, ranks,
                                                       (k - k0) / 8);
      }
    }
    commit_copies();  // also without copies: groups are counted
  };
  start_after_previous();
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) load(i);

  const int group_of_warps = static_cast<int>(threadIdx.x) / kWarpgroup;
  float sum[kTiles][N / 2] = {};
#pragma unroll 1
  for (int i = 0; i < own; ++i) {
    barrier_wait(arrived[i % S::kStages], static_cast<uint32_t>(i / S::kStages % 2));
    wait_copies<S::kStages - 2>();
    async_fence();
    __syncthreads();  // the piece is there, and nobody multiplies the one before it any more
    load(i + S::kStages - 1);
    const uint32_t stage = base + static_cast<uint32_t>(i % S::kStages * S::kStageBytes);
    const uint32_t rows = stage + static_cast<uint32_t>(group_of_warps * 64 * 128);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) pin(sum[j]);
    begin_products();
#pragma unroll
    for (int c = 0; c < kPiece / 16; ++c) {
      const uint64_t x = wide_operand(rows + static_cast<uint32_t>(c / 4 * (kRows * 128) + c % 4 * 32));
      const uint32_t from = stage + S::kWideBytes + static_cast<uint32_t>(kBackward ? c * 16 * 16 : c * 2 * NR * 16);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint32_t ranks_from = from + static_cast<uint32_t>(j * 8 * (kBackward ? kThinRows * 16 : 128));
        multiply_async<T, N, Along::sum, kBackward ? Along::across : Along::sum>(
            sum[j], x, thin_operand<kThinRows, kBackward ? Along::across : Along::sum>(ranks_from), 1);
      }
    }
    finish_products();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) pin(sum[j]);
  }

  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);  // [kRows, NR]
  {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, row = static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        float* to = sums + row * S::kLdSum + j * N + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {sum[j][4 * n], sum[j][4 * n + 1]};
        *reinterpret_cast<float2*>(to + 8 * S::kLdSum) = {sum[j][4 * n + 2], sum[j][4 * n + 3]};
      }
    }
  }
  cluster.sync();
  T* s = static_cast<T*>(a.s) + tile.row * a.ld_s + s_column + rank_begin;
#pragma unroll 1
  for (int u = cluster_rank * kLoraThreads + static_cast<int>(threadIdx.x); u < kRows * NR / 8; u += cluster_size * kLoraThreads) {
    const int row = u / (NR / 8), r = u % (NR / 8) * 8;
    if (row >= tile.rows || r >= ranks) continue;
    float total[8] = {};
    for (int b = 0; b < cluster_size; ++b) {
      const float4* from =
          reinterpret_cast<const float4*>(cluster.map_shared_rank(sums, static_cast<unsigned>(b)) + row * S::kLdSum + r);
      const float4 low = from[0], high = from[1];
      const float part_sum[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += part_sum[i];
    }
    Pack<T, 8> out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.v[i] = from_float<T>(total[i] * scale);
    store_pack<T, 8>(s + row * a.ld_s + r, out);
    if constexpr (!kBackward) {
      if (a.e == nullptr || rank_begin + r >= a.ld_e) continue;  // of a group that the product leaves out, perhaps
      int owner = 0;
      for (int before = r + rank_begin; before >= site.part[owner].rank;) before -= site.part[owner++].rank;
      const float factor = site.part[owner].scale;
#pragma unroll
      for (int i = 0; i < 8; ++i) out.v[i] = from_float<T>(to_float(out.v[i]) * factor);
      store_pack<T, 8>(static_cast<T*>(a.e) + (tile.row + row) * a.ld_e + rank_begin + r, out);
    }
  }
  cluster.sync();  // a block's sums stay until all have read them
}

template <class T, int NR, bool kBackward>
void launch_tall(const TallArgs& args, int64_t tiles, int products, int rank, int64_t k, int processors, cudaStream_t stream,
                 std::source_location where) {
  const int64_t chunks = ceil_div(rank, NR), blocks = tiles * products * chunks;
  int cluster = 1;
  while (cluster < kMaxCluster && blocks * cluster * 2 <= processors && k >= cluster * 4 * Shape<NR>::kPiece) cluster *= 2;
  Launch{dim3(static_cast<unsigned>(tiles * cluster), static_cast<unsigned>(products), static_cast<unsigned>(chunks)),
         dim3(kLoraThreads),
         Shape<NR>::kShared,
         stream,
         cluster,
         where,
         true}(tall_kernel<T, NR, kBackward>, args);
}

template <class T, bool kBackward>
void launch_ranks(const TallArgs& args, int64_t tiles, int products, int rank, int64_t k, int processors, cudaStream_t stream,
                  std::source_location where = std::source_location::current()) {
  const auto go = [&]<int NR>() { launch_tall<T, NR, kBackward>(args, tiles, products, rank, k, processors, stream, where); };
  if (rank <= 16) go.template operator()<16>();
  else if (rank <= 32) go.template operator()<32>();
  else if (rank <= 48) go.template operator()<48>();
  else if (rank <= 64) go.template operator()<64>();
  else if (rank <= 128) go.template operator()<128>();
  else if (rank <= 192) go.template operator()<192>();
  else go.template operator()<256>();
}

}  // namespace

void CudaOps::tall_shrink(cudaStream_t on, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, int stacked,
                          TensorView x, TensorView s, TensorView e) {
  const int64_t tiles = count_tiles(groups, kRows).tiles;
  dispatch_half(dtype_, [&]<class T>() {
    launch_ranks<T, false>({tensor_maps_.get(x, kBox, kBox), call, s.data, s.ld, e.data, e.ld}, tiles, 1, stacked, linear.in,
                           device_.processors(), on);
  });
}

void CudaOps::tall_backward_s(const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, int single, TensorView dy,
                              TensorView ds) {
  const int64_t tiles = count_tiles(groups, kRows).tiles, k = *std::max_element(linear.out, linear.out + linear.parts);
  dispatch_half(dtype_, [&]<class T>() {
    launch_ranks<T, true>({tensor_maps_.get(dy, kBox, kBox), call, ds.data, ds.ld}, tiles, linear.parts, single, k,
                          device_.processors(), stream());
  });
}

}  // namespace loquetier::cuda
