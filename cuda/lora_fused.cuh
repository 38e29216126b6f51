// The kernel of lora_fused.h: a persistent product of 128 x 256 tiles by TMA and wgmma, one warpgroup loading, two computing (64
// rows each). Instantiated per dtype in lora_fused_bf16.cu and lora_fused_f16.cu, for each FusedKind; CUTLASS is used for its
// instruction wrappers and shared-memory layouts alone.
//
// Barriers. full[stage] completes when the bytes of both operands are in, whoever sent them: half of w's tile comes from the other
// block for a pair, the rows of x for a left-over strip. empty[stage] completes when all computing warps of both blocks of the
// cluster have read the stage. Both blocks therefore run the same steps, which the slots of FusedTable provide, and a warpgroup
// releases the steps that it does not compute too: tiles of 64 rows are for the two warpgroups in turn, so that one stores while
// the other computes.
//
// Shared memory is laid out as the 128-byte swizzle of TMA leaves it, which is also what the descriptors of wgmma expect:
//   A operand, and B operand forward   rows of 64 elements of k (128 bytes), 8-row atoms
//   B operand backward                 blocks of 64 columns; in each 64 rows of k of 64 columns
//
// A finished tile leaves while the first products of the next one run (lora_fused_leave.cuh).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "lora_fused_leave.cuh"

namespace loquetier::cuda {

namespace fused {

constexpr int kStages = 4;
constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 at launch, moved between the warpgroups
constexpr int kHalf = kFusedColumns / kFusedPair;                 // columns of w's tile that one block of the cluster loads
constexpr uint32_t kStepBytes = (kFusedRows + kFusedColumns) * kFusedDepth * 2;
constexpr int kOutside = 1 << 24;                  // a row or column past every matrix: TMA fills with zeros
constexpr int kBoxSize = kFusedBox * kFusedDepth;  // elements of 64 rows of A, or of 64 columns of B backward
constexpr uint32_t kHalfStepBytes = (kFusedBox + kFusedColumns) * kFusedDepth * 2;
constexpr int kAddAtATime = 16;  // 16-byte loads in flight of another cluster's sums

template <class T>
struct Shared {
  alignas(1024) T a[kStages][kFusedRows * kFusedDepth];
  alignas(1024) T b[kStages][kFusedColumns * kFusedDepth];
  alignas(1024) T out[kConsumers][kOut];  // of each warpgroup: blocks of its last tile
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t in[kConsumers];
};

template <class T>
constexpr size_t kSharedBytes = sizeof(Shared<T>) + 1024;  // the base is rounded up to 1024

template <class T>
using Element = std::conditional_t<std::is_same_v<T, bf16>, cutlass::bfloat16_t, cutlass::half_t>;

template <class T, bool kBackward>
struct Layouts {
  using E = Element<T>;
  using Tile = cute::Shape<cute::Int<kFusedRows>, cute::Int<kFusedColumns>, cute::Int<kFusedDepth>>;
  static constexpr auto kMajorB = kBackward ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
  using AtomB = std::conditional_t<kBackward, cute::GMMA::Layout_MN_SW128_Atom<E>, cute::GMMA::Layout_K_SW128_Atom<E>>;
  using OrderB = std::conditional_t<kBackward, cute::Step<cute::_2, cute::_1, cute::_3>, cute::Step<cute::_1, cute::_2, cute::_3>>;
  using A = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<E>{},
                                         cute::Shape<cute::Int<kFusedRows>, cute::Int<kFusedDepth>, cute::Int<kStages>>{},
                                         cute::Step<cute::_1, cute::_2, cute::_3>{}));
  using B = decltype(cute::tile_to_shape(
      AtomB{}, cute::Shape<cute::Int<kFusedColumns>, cute::Int<kFusedDepth>, cute::Int<kStages>>{}, OrderB{}));
  using Mma = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<E, E, float, Tile, cute::GMMA::Major::K, kMajorB>(),
                                            cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
};

// A ring of stages as one role sees it.
struct Place {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The work of a cluster in its order, then a piece without steps. f(piece, work).
template <class F>
__device__ inline void for_each_piece(const FusedArgs& a, int rank, int cluster, int clusters, F&& f) {
  const FusedSchedule& schedule = a.schedule;
  const int dealt = schedule.dealt / clusters, first = schedule.piece_begin[cluster], before = schedule.before[cluster];
  const int pieces = schedule.piece_begin[cluster + 1] - first;
#pragma unroll 1
  for (int i = 0; i <= dealt + pieces; ++i) {
    FusedPiece piece;
    int item = cluster + (i < before ? i : i - pieces) * clusters;
    if (i == dealt + pieces) {
      item = 0;
    } else if (i < before || i >= before + pieces) {
      piece.end = static_cast<uint16_t>(a.steps);
    } else {
      piece = schedule.pieces[first + i - before];
      item = schedule.dealt + piece.item;
    }
    f(piece, fused_work(a, item, rank));
  }
}

__device__ inline void load_for_both(const CUtensorMap& map, uint64_t* barrier, void* to, int column, int row) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier, (1 << kFusedPair) - 1,
                                         static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, column, row);
}

// One thread: all loads of this block.
template <class T, FusedKind kKind>
__device__ inline void produce(const FusedArgs& a, Shared<T>& shared, int rank, int cluster, int clusters) {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr bool kSwiglu = kKind == FusedKind::swiglu;
  if (a.wait_first) wait_for_previous();
  Place place;
  int turn = 0;  // the warpgroup that computes the next tile of 64 rows
  for_each_piece(a, rank, cluster, clusters, [&](const FusedPiece& piece, const FusedWork& work) {
    const int column = work.column * tile_columns(kKind), part = rank == 0 ? work.part[0] : work.part[1];
    const int a_place = work.half ? turn * kBoxSize : 0;
    const auto acquire = [&] {
      Barrier::wait(&shared.empty[place.stage], place.phase ^ 1);
      Barrier::arrive_and_expect_tx(&shared.full[place.stage], work.half ? kHalfStepBytes : kStepBytes);
    };
#pragma unroll 1
    for (int step = piece.begin; step < piece.end; ++step) {
      acquire();
      uint64_t* full = &shared.full[place.stage];
      T* to = shared.a[place.stage] + a_place;
      const int depth = step * kFusedDepth;
      if (!work.wide) {
        load(a.x, full, to, depth, work.row);
        load(a.x, full, to + kBoxSize, depth, work.row + kFusedBox);
      } else if (!work.half) {
        load_for_both(a.x, full, to + rank * kBoxSize, depth, work.row + rank * kFusedBox);
      } else if (rank == 0) {
        load_for_both(a.x, full, to, depth, work.row);
      }
      T* b = shared.b[place.stage];
      if constexpr (is_backward(kKind)) {
        for (int i = 0; i < kFusedColumns / kFusedBox; ++i) {
          T* block = b + i * kBoxSize;
          if (work.wide) load(a.w, full, block, column + i * kFusedBox, depth);
          else if (i / (kHalf / kFusedBox) == rank) load_for_both(a.w, full, block, column + i * kFusedBox, depth);
        }
      } else {
        for (int i = 0; i < kFusedPair; ++i) {
          T* half = b + i * kHalf * kFusedDepth;
          const int row = column + i * (kSwiglu ? a.columns : kHalf);
          if (work.wide) load(a.w, full, half, depth, row);
          else if (i == rank) load_for_both(a.w, full, half, depth, row);
        }
      }
      place.advance();
    }
    if (work.half) turn ^= 1;
    if (piece.end < a.steps) return;
    wait_for_previous();  // E is written by the launch in front; whatever x and y wait for was done before that one began
    const int part_column = column - a.part_tile[part] * kFusedColumns, tile = work.wide ? 0 : rank;
#pragma unroll 1
    for (int slot = a.table.slot_begin[work.strip]; slot < a.table.slot_begin[work.strip + 1]; ++slot) {
      const int group = a.table.slot_group[slot][tile], quarters = fused_slot_quarters(a.table, slot, work);
      // Every entry of q is a map; of a part that the group leaves alone, or of no group, it is read where there is nothing.
      const CUtensorMap* q = &a.q[max(group, 0) * a.maps + part];
      const int own = group < 0 ? 0 : a.table.quarters[group][part];
      const int e_row = !a.table.by_rows ? (slot * kFusedPair + tile) * kFusedRows : group < 0 ? kOutside : work.row;
#pragma unroll 1
      for (int step = 0; step * kFusedQuarters < quarters; ++step) {
        acquire();
        uint64_t* full = &shared.full[place.stage];
        T* to = shared.a[place.stage] + a_place;
        const int e_column = a.table.column[part] + step * kFusedDepth;
        load(a.e, full, to, e_column, e_row);
        if (!work.half) load(a.e, full, to + kBoxSize, e_column, e_row + kFusedBox);
        const int depth = own == 0 ? kOutside : step * kFusedDepth;
        T* b = shared.b[place.stage];
        if constexpr (is_backward(kKind)) {
#pragma unroll
          for (int i = 0; i < kFusedColumns / kFusedBox; ++i) load(*q, full, b + i * kBoxSize, column + i * kFusedBox, depth);
        } else if constexpr (kSwiglu) {
          const int gate = group < 0 ? 0 : a.table.gate[group];
          load(q[0], full, b, gate == 0 ? kOutside : depth, column);
          load(q[1], full, b + kHalf * kFusedDepth, gate == own ? kOutside : depth - gate * kFusedQuarter, column);
        } else {
          load(*q, full, b, depth, part_column);
        }
        place.advance();
      }
    }
  });
  wait_for_previous();  // the launch behind this one relies on both
  let_next_start();     // its blocks come where clusters end early
}

// Lends the sums of a warpgroup to the cluster that finishes the item, and the other side of it. `at`: of FusedArgs::ready.
template <class Sums>
__device__ inline void lend_sums(const FusedArgs& a, const Sums& sums, int consumer, int at) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  float4* to = reinterpret_cast<float4*>(a.sums + int64_t{at} * kFusedSums) + thread;
#pragma unroll
  for (int i = 0; i < kFusedSums / kWarpgroup / 4; ++i)
    to[i * kWarpgroup] = make_float4(sums(4 * i), sums(4 * i + 1), sums(4 * i + 2), sums(4 * i + 3));
  cutlass::arch::NamedBarrier::sync(kWarpgroup, static_cast<uint32_t>(consumer));
  if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(a.ready + at), "r"(1) : "memory");
}
// The whole warpgroup waits for them.
template <class Sums>
__device__ inline void add_sums(const FusedArgs& a, Sums& sums, int consumer, int at) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (thread == 0) {
    uint32_t there = 0;
    while (there == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(a.ready + at) : "memory");
    a.ready[at] = 0;  // for the next launch
  }
  cutlass::arch::NamedBarrier::sync(kWarpgroup, static_cast<uint32_t>(consumer));
  const float4* from = reinterpret_cast<const float4*>(a.sums + int64_t{at} * kFusedSums) + thread;
#pragma unroll
  for (int i = 0; i < kFusedSums / kWarpgroup / 4; i += kAddAtATime) {
    float4 v[kAddAtATime];
#pragma unroll
    for (int j = 0; j < kAddAtATime; ++j) v[j] = __ldcg(from + (i + j) * kWarpgroup);
#pragma unroll
    for (int j = 0; j < kAddAtATime; ++j) {
      const int k = 4 * (i + j);
      sums(k) += v[j].x, sums(k + 1) += v[j].y, sums(k + 2) += v[j].z, sums(k + 3) += v[j].w;
    }
  }
}

// Two warpgroups: products and results.
template <class T, FusedKind kKind>
__device__ inline void consume(const FusedArgs& a, Shared<T>& shared, int rank, int cluster, int clusters) {
  using Layout = Layouts<T, is_backward(kKind)>;
  using Barrier = cutlass::arch::ClusterBarrier;
  // The same for a whole warpgroup, as the compiler must see to keep descriptors in uniform registers.
  const int consumer = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  typename Layout::Mma mma;
  auto slice = mma.get_slice(consumer * kWarpgroup);
  using E = Element<T>;
  const auto tile_a = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<E*>(shared.a[0])), typename Layout::A{});
  const auto tile_b = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<E*>(shared.b[0])), typename Layout::B{});
  auto operand_a = slice.make_fragment_A(slice.partition_A(tile_a));  // descriptors (MMA, M, K, stage)
  auto operand_b = slice.make_fragment_B(slice.partition_B(tile_b));
  auto sums = cute::partition_fragment_C(mma, cute::Shape<cute::Int<kFusedRows>, cute::Int<kFusedColumns>>{});
  static_assert(decltype(cute::size(sums))::value == 64 * kFusedColumns / kWarpgroup);

  Leaving<T, kKind> leaving(a, shared.out[consumer], &shared.in[consumer], consumer);
  Place place;
  int last = 0;  // the stage of the product that may still run
  const auto release = [&](int stage) {
    if (lane < kFusedPair) Barrier::arrive(&shared.empty[stage], static_cast<uint32_t>(lane), 1);
  };
  const auto pass = [&] {
    Barrier::wait(&shared.full[place.stage], place.phase);
    release(place.stage);
    place.advance();
  };
  const auto start = [&](int quarters) {
    Barrier::wait(&shared.full[place.stage], place.phase);
    cute::warpgroup_fence_operand(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kFusedQuarters; ++k) {
      if (k >= quarters) continue;
      cute::gemm(mma, operand_a(cute::_, cute::_, k, place.stage), operand_b(cute::_, cute::_, k, place.stage), sums);
      mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
  };
  const auto multiply = [&](int quarters) {
    start(quarters);
    cute::warpgroup_wait<1>();  // the product before this one is done
    cute::warpgroup_fence_operand(sums);
    release(last);
    last = place.stage;
    place.advance();
  };

  int turn = 0;
  for_each_piece(a, rank, cluster, clusters, [&](const FusedPiece& piece, const FusedWork& work) {
    const int steps = piece.end - piece.begin;
    const int first_slot = a.table.slot_begin[work.strip];
    const int last_slot = piece.end == a.steps ? a.table.slot_begin[work.strip + 1] : first_slot;
    const bool mine = !work.half || turn == consumer;
    if (work.half) turn ^= 1;
    int step = 0;
    if (mine && steps > 0) {
      mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
      start(kFusedQuarters);
      last = place.stage;
      place.advance();
      ++step;
    }
    // Two loops, so that what only the first one needs costs the other nothing: it decides about the card's power.
#pragma unroll 1
    while (leaving.any()) {
      leaving.begin();
#pragma unroll 1
      for (int beat = 0; beat < leaving.kBeat; ++beat, ++step) {
        if (step >= steps) continue;
        if (mine) multiply(kFusedQuarters);
        else pass();
      }
      leaving.send();
    }
    if (mine) {
#pragma unroll 1
      for (; step < steps; ++step) multiply(kFusedQuarters);
    } else {
#pragma unroll 1
      for (; step < steps; ++step) pass();
    }
#pragma unroll 1
    for (int slot = first_slot; slot < last_slot; ++slot) {
#pragma unroll 1
      for (int left = fused_slot_quarters(a.table, slot, work); left > 0; left -= kFusedQuarters) {
        if (mine) multiply(left);
        else pass();
      }
    }
    if (!mine || steps == 0) return;  // where these paths meet ptxas adds a wait (C7517): nothing runs any more, it costs nothing
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sums);
    release(last);
    const int upper = work.half ? 0 : consumer;  // which 64 rows of the tile
    const int first_place = (piece.item - a.schedule.divided) * (a.schedule.parts - 1);
    const auto place_of = [&](int part) { return ((first_place + part) * kFusedPair + rank) * kConsumers + upper; };
    if (piece.end < a.steps) {
      lend_sums(a, sums, consumer, place_of(piece.part));
    } else {
#pragma unroll 1
      for (int part = 0; part < piece.part; ++part) add_sums(a, sums, consumer, place_of(part));
      leaving.take(sums, work.row + upper * kFusedBox, work.column * tile_columns(kKind));
    }
  });
  leaving.end();
}

template <class T, FusedKind kKind>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ FusedArgs a) {
  extern __shared__ char memory[];
  const uint32_t at = cute::cast_smem_ptr_to_uint(memory);
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory + ((at + 1023) / 1024 * 1024 - at));
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int cluster = static_cast<int>(blockIdx.x) / kFusedPair, clusters = static_cast<int>(gridDim.x) / kFusedPair;
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&a.x, &a.w, &a.y, &a.e})
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    for (int stage = 0; stage < kStages; ++stage) {
      cutlass::arch::ClusterBarrier::init(&shared.full[stage], 1);
      cutlass::arch::ClusterBarrier::init(&shared.empty[stage], kFusedPair * kConsumers * kWarpgroup / kWarp);
    }
    for (uint64_t& in : shared.in) cutlass::arch::ClusterBarrier::init(&in, 1);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();  // the other block's barriers too
  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < kWarp && cute::elect_one_sync()) produce<T, kKind>(a, shared, rank, cluster, clusters);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume<T, kKind>(a, shared, rank, cluster, clusters);
    __syncwarp();
  }
  cute::cluster_sync();  // until both blocks are through, either may still arrive at the other's barriers
}

// Calls f.operator()<kKind>().
template <class F>
auto dispatch_kind(FusedKind kind, F&& f) {
  if (kind == FusedKind::forward) return f.template operator()<FusedKind::forward>();
  if (kind == FusedKind::swiglu) return f.template operator()<FusedKind::swiglu>();
  if (kind == FusedKind::backward) return f.template operator()<FusedKind::backward>();
  return f.template operator()<FusedKind::swiglu_backward>();
}

template <class T>
int clusters(FusedKind kind) {
  return dispatch_kind(
      kind, [&]<FusedKind kKind>() { return clusters_at_once(kernel<T, kKind>, kFusedPair, kThreads, kSharedBytes<T>); });
}

template <class T>
void product(const FusedArgs& args, FusedKind kind, int clusters, bool overlap, cudaStream_t stream) {
  Launch launch{dim3(static_cast<unsigned>(clusters * kFusedPair)), dim3(kThreads), kSharedBytes<T>, stream, kFusedPair};
  launch.overlap = overlap;
  dispatch_kind(kind, [&]<FusedKind kKind>() { launch(kernel<T, kKind>, args); });
}

}  // namespace fused

}  // namespace loquetier::cuda
