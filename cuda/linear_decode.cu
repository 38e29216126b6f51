// y = x W^T for few rows (decode steps), with the adapters' shrink and expand in the same launch. Bound by the bytes of W, A and B,
// so the kernel is a stream of them through shared memory.
//
// A block owns a tile of W's rows (as low as keeps all processors busy) and one of `splits` shares of k. One warp keeps a ring of
// stages on its way (TMA), two warpgroups multiply: W is the left operand (its rows are m), the rows of x are n, so 8 to 64 of them
// cost no padding. The shares of k stay in f32 in global memory (which the L2 holds) for the launch behind to add up, where that
// one can; or they meet there: every block lays its sums down, waits for the others of its tile, and adds up its part in a fixed
// order.
//
// With adapters (linear_decode_lora.cuh) the ring carries as much of W as it holds, the block's share of all A and more of W in
// turns, the rest of W, and the tile's rows of B. The sums of the shrink cross between the blocks while W passes; three more warps
// list the adapters at the start and bring s to shared memory for the expand, which adds to the same registers as W's product.
// Processors that have no tile take a larger share of the shrink. A launch without adapters has a kernel of its own. Both run from
// a cold instruction cache, so code is kept short: what runs once is not unrolled, and divisions are quotient()s or the host's.
//
// Gate and up with swiglu behind them ("pair"): a tile is as many rows of gate as of up, in blocks gate, up, gate, up, the first
// two for one warpgroup, the others for the other. A thread then has both values of an h, and y is h.
//
// linear_decode_ring.cuh has the ring and its sizes, linear_decode_lora.cuh the adapters' part, linear_decode_sums.cuh how shares
// of k leave or meet.
//
// Launches overlap: what does not depend on x is requested before the launch in front has ended, which keeps the memory busy across
// the small kernels between two products. All blocks of a launch run at the same time (at most one a processor), so they may wait
// for each other.
#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cuda_ops.h"
#include "linear_decode.h"
#include "linear_decode_mma.cuh"
#include "linear_decode_sums.cuh"

namespace loquetier::cuda {

namespace {

using namespace decode;

__device__ inline int block_of_launch() { return static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x); }

// How the pieces of A are shared out, and which of them are this block's.
struct OwnPieces : ShrinkShares {
  int first, count;
  __device__ OwnPieces(const DecodeArgs& a, const Adapters& all)
      : ShrinkShares(all, a.lora), first(begin(block_of_launch())), count(begin(block_of_launch() + 1) - first) {}
};

// The stages of a block's first tile: as much of W as the ring holds, which is asked for before the adapters are known, then A and
// W in turns.
struct Order {
  int first, rest, a;  // pieces of W before A and behind, pieces of A
  __device__ Order(const DecodeArgs& args, const Share& share, int a_pieces)
      : first(min(share.pieces(), args.stages)), rest(share.pieces() - first), a(a_pieces) {}
  __device__ int of_w(int i) const { return i < first ? i : i + min((i - first + 1) * kTurn, a); }
  __device__ int of_a(int i) const { return first + i + min(i / kTurn, rest); }
  __device__ int count() const { return first + rest + a; }
};

// ---------------------------------------------------------------- the warps

// One warp fetches: a lane W and x, all of them B.
template <bool kLora, bool kPair, int kM, int kRows>
__device__ inline void fetch_stages(const CUtensorMap& w_map, const CUtensorMap& x_map, const DecodeArgs& a, const Share& share,
                                    Adapters& all, Ring& ring) {
  using S = Tiling<kM, kRows>;
  const int pieces = share.pieces(), lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto wait_empty = [&](const Cursor& c) {
    ring.wait_empty(c);
    if (kLora) async_fence();  // a piece of A may have been there
  };
  const auto fetch_w = [&](const Cursor& c, int tile, int i) {
    barrier_expect(ring.full[c.place], static_cast<uint32_t>(a.height * kK * 2 + S::x_bytes));
    const int column = (share.begin + i) * kK;
    if constexpr (kPair) {
#pragma unroll 1
      for (int block = 0; block < kGroups * kM; ++block)
        tma_load(ring.address(c) + static_cast<uint32_t>(block * a.block * kK * 2), w_map, ring.full[c.place], column,
                 (tile * kGroups + block / kM) * a.block + block % kM * a.n, kStreamOnce);
    } else {
      tma_load(ring.address(c), w_map, ring.full[c.place], column, tile * a.height, kStreamOnce);
    }
  };
  const auto fetch_x = [&](const Cursor& c, int i) {
    tma_load(ring.address(c) + static_cast<uint32_t>(a.height * kK * 2), x_map, ring.full[c.place], (share.begin + i) * kK, 0,
             kKeep);
  };

  const int first = min(pieces, a.stages);
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < first; ++i) fetch_w({i, 0}, share.first, i);
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < first; ++i) fetch_x({i, 0}, i);
  }
  int a_pieces = 0;
  if constexpr (kLora) {
    barrier_wait(all.listed, 0);
    a_pieces = OwnPieces(a, all).count;
  }
  const Order order(a, share, a_pieces);
  Cursor at = first < ring.count ? Cursor{first, 0} : Cursor{0, 1};
  if (lane == 0) {
    // This thread waits for every place in turn, also on behalf of the helpers: the parity of a barrier tells two phases apart, no
    // more.
#pragma unroll 1
    for (int stage = first, i = first; stage < order.count(); ++stage, ring.next(at)) {
      wait_empty(at);
      if (kLora && (i >= pieces || stage != order.of_w(i))) {
        store_release(&ring.open, stage + 1);
        continue;
      }
      fetch_w(at, share.first, i);
      fetch_x(at, i);
      ++i;
    }
  }
  at.place = __shfl_sync(0xffffffffu, at.place, 0);
  at.round = __shfl_sync(0xffffffffu, at.round, 0);
  for (int tile = share.first; tile < a.tiles;) {
    if constexpr (kLora)
      fetch_b<kPair>(all, part_of<kPair>(a.lora.call, tile, a.height), a.height, share.from, share.to, S::s_stride, ring, at);
    tile += share.step;
    if (tile >= a.tiles) return;
#pragma unroll 1
    for (int i = 0; i < pieces; ++i, ring.next(at)) {
      if (lane != 0) continue;
      wait_empty(at);
      fetch_w(at, tile, i);
      fetch_x(at, i);
    }
    __syncwarp();
  }
}

// The warps beside it: a list of the adapters, the pieces of A (a warp takes every third, 16 bytes a lane: bulk copies of rows as
// short as these are issued one lane at a time, and measured three times slower), and s of every tile's part.
template <class T, bool kPair, int kM, int kRows>
__device__ inline void help(const DecodeArgs& a, const Share& share, Adapters& all, Ring& ring, uint32_t staging) {
  using S = Tiling<kM, kRows>;
  const int thread = static_cast<int>(threadIdx.x) - kBaseThreads, warp = thread / kWarp;
  list_adapters(a.lora.call, all, thread);
  wait_for_previous();
  const OwnPieces own(a, all);
  const Order order(a, share, own.count);

  int under_way = -1;  // place of the piece before
  const auto arrive = [&] {
    __syncwarp();
    if (under_way >= 0 && thread % kWarp == 0) barrier_arrive(ring.full[under_way]);
    under_way = -1;
  };
  const auto open = [&](int stage) { return __all_sync(0xffffffffu, load_acquire(&ring.open) > stage); };
  Cursor at;
  int reached = 0;  // the stage of the cursor
#pragma unroll 1
  for (int i = warp; i < own.count; i += kHelperWarps) {
    const int stage = order.of_a(i);
    while (!open(stage)) {  // perhaps until the piece before has been multiplied
      if (under_way < 0) continue;
      wait_copies<0>();
      arrive();
    }
#pragma unroll 1
    for (; reached < stage; ++reached) ring.next(at);
    const int of = quotient(own.first + i, own.pieces), column = (own.first + i - of * own.pieces) * kPieceColumns;
    const ShrinkTask task = find_task(all, of);
    copy_rows(ring.address(at), 0, task.ranks, static_cast<const uint16_t*>(task.group->a) + int64_t{task.rank_begin} * a.k, a.k,
              column, a.k);
    copy_rows(ring.address(at), kTaskRanks, task.rows, static_cast<const uint16_t*>(a.lora.x) + task.row * a.lora.ld_x, a.lora.ld_x,
              column, a.k);
    commit_copies();
    wait_copies<1>();
    arrive();
    under_way = at.place;
  }
  wait_copies<0>();
  arrive();

  for (int tile = share.first; tile < a.tiles; tile += share.step) {
    named_barrier(kStagingFree, kConsumers + kHelpers);
    const TilePart part = part_of<kPair>(a.lora.call, tile, a.height);
    add_up_s<T, kPair>(a.lora, all, own, part.part, share.from, share.to, part.column == 0, staging, S::s_stride, S::zeros);
    named_barrier_arrive(kSumsReady, kConsumers + kHelpers);
  }
}

// The block's share of the shrink, by the warps that multiply. The sums of a task's pieces are added over the warps in `scratch`,
// and laid down.
template <class T>
struct Shrink {
  int left = 0;                             // pieces
  int task = 0, task_left = 0, pieces = 0;  // of the task: pieces left, and all

  __device__ void begin(const OwnPieces& own) {
    left = own.count;
    pieces = own.pieces;
    task = quotient(own.first, pieces);
    task_left = (task + 1) * pieces - own.first;
  }

  __device__ void add(const DecodeArgs& a, const Adapters& all, Ring& ring, Cursor& at, float* scratch) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    ring.wait_full(at);
    shrink_add<T, kConsumerWarps>(ring.address(at), warp, sum);
    ring.release(at.place);
    ring.next(at);
    --left;
    if (--task_left > 0 && left > 0) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scratch[warp * kTaskSums + e * kWarp + lane] = sum[e];
      sum[e] = 0;
    }
    named_barrier(kConsumerBarrier, kConsumers);
    if (threadIdx.x < kTaskSums) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) total += scratch[w * kTaskSums + static_cast<int>(threadIdx.x)];
      const int rank = lane / 4 + warp / 2 * 8, row = lane % 4 * 2 + warp % 2;
      lay_down(a.lora.sums + int64_t{task + block_of_launch()} * kTaskSums + row * kTaskRanks + rank, total, all.mark);
    }
    named_barrier(kConsumerBarrier, kConsumers);
    ++task;
    task_left = pieces;
  }

 private:
  float sum[4] = {};
};

// Adds the adapters' part of a tile to the sums of W's product.
template <class T, bool kPair, int kM, int kRows>
__device__ inline void expand(Ring& ring, Cursor& at, int block, uint32_t s, float (&sum)[kM][kRows / 2]) {
  using S = Tiling<kM, kRows>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int w_row[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) w_row[m] = kPair ? warp / 4 * block + warp % 4 * 16 : ((warp / 4 * kM + m) * 4 + warp % 4) * 16;
  Expand<T, kPair, kM, kRows> warps(s, S::s_stride, S::zeros, w_row);
#pragma unroll 1
  for (bool last = false; !last; ring.next(at)) {
    ring.wait_full(at);
    const auto& stage = ring.expand[at.place];
    warps.add(stage, ring.address(at), sum);
    last = stage.last;
    ring.release(at.place);
  }
}

// ---------------------------------------------------------------- the kernel

template <class T, bool kLora, bool kPair, int kM, int kRows>
__global__ void __launch_bounds__(kLora ? kAllThreads : kBaseThreads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ DecodeArgs a) {
  using S = Tiling<kM, kRows>;
  extern __shared__ std::byte raw[];
  __shared__ Ring ring;
  alignas(16) __shared__ std::byte adapters[kLora ? sizeof(Adapters) : 16];
  Adapters& all = *reinterpret_cast<Adapters*>(adapters);
  const uint32_t stages = (shared_address(raw) + 1023) / 1024 * 1024, staging = stages + static_cast<uint32_t>(a.stages * a.stage);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Share share(a);

  if (static_cast<int>(threadIdx.x) < a.stages) {
    barrier_init(ring.full[threadIdx.x], 1);
    barrier_init(ring.empty[threadIdx.x], kConsumerWarps);
    barrier_init_fence();
  }
  if (threadIdx.x == 0) {
    barrier_init(ring.sums, 1);
    if constexpr (kLora) barrier_init(all.listed, kHelperWarps);
    barrier_init_fence();
    ring.stages = stages;
    ring.bytes = a.stage;
    ring.count = a.stages;
    ring.open = 0;
  }
  __syncthreads();
  let_next_start();

  if constexpr (kLora) {
    if (warp >= kBaseThreads / kWarp) return help<T, kPair, kM, kRows>(a, share, all, ring, staging);
  }
  if (warp == kConsumerWarps) return fetch_stages<kLora, kPair, kM, kRows>(w_map, x_map, a, share, all, ring);

  const int group = warp / 4, quarter = warp % 4, block = kPair ? a.block : 64;
  const uint32_t own = staging + static_cast<uint32_t>(group * kRows * S::stride);
  float* const scratch = reinterpret_cast<float*>(raw + (staging - shared_address(raw)));
  float sum[kM][kRows / 2];
  Cursor at;
  const uint64_t full = a.splits > 1 && a.wide == nullptr && threadIdx.x == 0 ? full_ticket(a, share) : 0;
  if (kLora && threadIdx.x == kWarp) {
    wait_for_previous();
    all.mark = launch_mark(a.lora.counter);
    end_of_mark(a.lora.counter, block_of_launch(), static_cast<int>(gridDim.x * gridDim.y));
  }
  // The next `count` stages: pieces of W.
  const auto multiply = [&](int count) {
    if (count == 0) return;
    int before = -1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      ring.wait_full(at);
      const uint32_t w = ring.address(at) + static_cast<uint32_t>(group * kM * block * kK * 2),
                     x = ring.address(at) + static_cast<uint32_t>(a.height * kK * 2);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
          multiply_async<T, kRows>(sum[m], swizzled_operand(w + static_cast<uint32_t>(m * block * kK * 2 + k * 32)),
                                   swizzled_operand(x + k * 32));
      }
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been read: its place may be filled
      if (before >= 0) ring.release(before);
      before = at.place;
      ring.next(at);
    }
    wgmma_wait<0>();
    ring.release(before);
  };
  for (int tile = share.first;; tile += share.step) {
    for (auto& part : sum)
      for (float& v : part) v = 0;
    int rest = share.pieces(), run = rest;
    Shrink<T> shrink;
    const bool with_shrink = kLora && tile == share.first;
    if constexpr (kLora) {
      if (with_shrink) {
        barrier_wait(all.listed, 0);
        shrink.begin(OwnPieces(a, all));
        run = min(run, a.stages);
        if (shrink.left == 0) named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
      }
    }
#pragma unroll 1
    for (;;) {
      multiply(run);
      rest -= run;
      if constexpr (kLora) {
        if (shrink.left > 0) {
#pragma unroll 1
          for (int i = rest > 0 ? min(kTurn, shrink.left) : shrink.left; i > 0; --i) shrink.add(a, all, ring, at, scratch);
          if (shrink.left == 0) named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
        }
      }
      run = shrink.left > 0 ? min(1, rest) : rest;
      if (run == 0) break;
    }
    if constexpr (kLora) {
      if (tile >= a.tiles) return;
      named_barrier(kSumsReady, kConsumers + kHelpers);
      expand<T, kPair, kM, kRows>(ring, at, block, staging, sum);
    }

    if constexpr (!kPair) {
      if (a.wide != nullptr) {
        store_wide<T, kM, kRows>(a, share, tile, sum);
        if (tile + share.step >= a.tiles) return;
        if (kLora) {
          named_barrier(kConsumerBarrier, kConsumers);  // s has been read
          named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
        }
        continue;
      }
      if (a.splits > 1) {  // one tile a block
        add_up_sums<T, kM, kRows>(a, share, sum, full, ring);
        return;
      }
    }

    // y [rows, tile] through shared memory, each group its own columns.
    if (kLora) named_barrier(kConsumerBarrier, kConsumers);  // s has been read: y takes its place
    constexpr int kOut = kPair ? 1 : kM;                     // blocks of 64 columns of y
#pragma unroll
    for (int m = 0; m < kOut; ++m) {
      const int n0 = tile * a.height + (group * kM + m) * 64 + quarter * 16 + lane / 4;
      float add0 = 0, add8 = 0;
      if (a.bias != nullptr) {
        if (n0 < a.n) add0 = to_float(static_cast<const T*>(a.bias)[n0]);
        if (n0 + 8 < a.n) add8 = to_float(static_cast<const T*>(a.bias)[n0 + 8]);
      }
#pragma unroll
      for (int j = 0; j < kRows / 16; ++j) {  // 16 rows of x: registers 8 j .. 8 j + 7
        float* c = sum[m] + 8 * j;
        if constexpr (kPair) {
#pragma unroll
          for (int i = 0; i < 8; ++i) c[i] = swiglu(rounded<T>(c[i]), rounded<T>(sum[kM - 1][8 * j + i]));
        }
        const uint32_t address = own + static_cast<uint32_t>((j * 16 + lane / 16 * 8 + lane % 8) * S::stride) +
                                 static_cast<uint32_t>(m * 64 + quarter * 16 + lane / 8 % 2 * 8) * 2;
        store_transposed(address, pack2<T>(c[0] + add0, c[1] + add0), pack2<T>(c[2] + add8, c[3] + add8),
                         pack2<T>(c[4] + add0, c[5] + add0), pack2<T>(c[6] + add8, c[7] + add8));
      }
    }
    named_barrier(kGroupBarrier + group, 128);
    constexpr int kVectors = 64 * kOut / 8;  // of a row
    const int first = group * kOut * block, height = kPair ? a.height / 2 : a.height, column = tile * height + first;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x) % 128; i < a.rows * kVectors; i += 128) {
      const int row = i / kVectors, vector = i % kVectors;
      if ((kPair ? vector * 8 >= block : first + vector * 8 >= height) || column + vector * 8 >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<T*>(a.y) + row * a.ld_y + column + vector * 8) =
          load_shared16(own + static_cast<uint32_t>(row * S::stride + vector * 16));
    }
    if (tile + share.step >= a.tiles) return;
    named_barrier(kGroupBarrier + group, 128);
    if (kLora) named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
  }
}

template <class T, bool kLora, bool kPair, int kM, int kRows>
void launch_decode(TensorMaps& maps, TensorView x, TensorView w, DecodeArgs args, int processors, cudaStream_t stream,
                   std::source_location where = std::source_location::current()) {
  using S = Tiling<kM, kRows>;
  args.tiles = static_cast<int>(ceil_div(w.rows, args.height));
  args.stage = static_cast<int>(ceil_div(args.height * kK * 2, 1024)) * 1024 + S::x_bytes;
  if (kLora) args.stage = std::max(args.stage, kPieceBytes);
  const int staging = kLora || (args.splits == 1 && args.wide == nullptr) ? S::staging : 0;
  args.stages = std::min((kSharedBytes - staging) / args.stage, kMostStages);
  const int read = (args.stages - 1) * args.stage + S::most * kK * 2;  // by wgmma, also behind the rows of a lower tile
  const int shared = std::max(args.stages * args.stage + staging, read) + 1024;
  const auto equal = [&](int things) { return Equal{things / args.splits, things % args.splits}; };
  args.pieces = equal(static_cast<int>(ceil_div(args.k, kK)));
  args.s_rows = equal(args.rows);
  args.blocks = equal(args.height / 16);
  // Processors without a tile help with the shrink.
  const int with_tile = std::min(args.tiles, processors / args.splits), most = processors / args.splits,
            all = kLora ? most : with_tile;
  args.lora.pieces = static_cast<int>(ceil_div(args.k, kPieceColumns));
  args.lora.busy = with_tile * args.splits;
  args.lora.idle = (all - with_tile) * args.splits;
  args.lora.ahead = args.lora.idle * (kIdleShare * args.pieces.each * args.stage / kPieceBytes / 100);
  Launch launch{dim3(static_cast<unsigned>(args.splits), static_cast<unsigned>(all)),
                dim3(static_cast<unsigned>(kLora ? kAllThreads : kBaseThreads)),
                static_cast<size_t>(shared),
                stream,
                1,
                where,
                true};
  launch(decode_kernel<T, kLora, kPair, kM, kRows>, maps.get(w, kK, kPair ? args.block : args.height), maps.get(x, kK, kRows),
         args);
}

struct Way {
  int m = 2, splits = 1, height = 256;
};
constexpr double kLeave = 6e3;  // for way_of(): what shares that are left cost, in bytes of W; 0 to 30e3: the same, measured

// Tile and shares of k: one wave of blocks, shares of at least eight stages, and then what costs a block least time by its bytes of
// W and, from the L2, of x and of sums. A tile lies in one part of an adapter.
Way way_of(int64_t rows, int64_t n, int64_t k, int rank, const LoraCall& call, int processors, bool leaves_shares) {
  const auto whole = [&](int height) {
    bool all = true;
    for (int p = 0; p + 1 < call.parts && call.count > 0; ++p) all = all && call.out[p] % height == 0;
    return all;
  };
  Way best;
  double least = INFINITY;
  for (int splits = 1; splits <= kMaxDecodeSplits && (splits == 1 || k >= int64_t{splits} * 8 * kK); ++splits) {
    int height = std::max(static_cast<int>(ceil_div(ceil_div(n, processors / splits), 16)) * 16, 64);
    while (height <= 256 && !whole(height)) height += 16;
    if (height > 256) continue;
    const int m = height <= 128 && rank <= Tiling<1, 64>::max_rank ? 1 : 2;
    // In bytes of W: of x, which comes from the L2, half; the meeting of the shares has its time, and its bytes pass it twice, but
    // once where the launch behind adds them up; the larger tile multiplies for longer.
    const double start = leaves_shares ? kLeave : 24e3, each = leaves_shares ? 1 : 3, x = 0.5 * static_cast<double>(rows),
                 sums = splits > 1 ? start + each * static_cast<double>(rows * height) : 0,
                 time = (height + x) * static_cast<double>(k) / splits * (m == 2 ? 1.1 : 1) + sums;
    if (time < least) least = time, best = {m, splits, height};
  }
  if (least == INFINITY && !whole(best.height)) best = {rank <= Tiling<1, 64>::max_rank ? 1 : 2, 1, 128};
  return best;
}

// Shapes and alignment of either product.
bool takes(TensorView x, TensorView w, TensorView y) {
  const auto aligned = [](const TensorView& t) { return aligned16(t.data) && t.ld % 8 == 0; };
  return x.rows <= kMaxDecodeRows && x.cols % 8 == 0 && x.cols <= kMostColumns && w.rows % 8 == 0 && aligned(x) && aligned(w) &&
         aligned(y);
}

DecodeArgs args_of(void* workspace, TensorView x, TensorView w, TensorView y, const DecodeLora& lora, int processors) {
  // The workspace: sums of splits, sums of s, tickets, the counter.
  std::byte* const sums = static_cast<std::byte*>(workspace);
  std::byte* const s_sums = sums + static_cast<size_t>(processors) * kDecodeSums;
  uint64_t* const tickets =
      reinterpret_cast<uint64_t*>(s_sums + (static_cast<size_t>(processors) + kMostDecodeTasks) * kDecodeTask);
  DecodeArgs args = {};
  args.y = y.data;
  args.ld_y = y.ld;
  args.rows = static_cast<int>(x.rows);
  args.n = static_cast<int>(y.cols);
  args.k = static_cast<int>(w.cols);
  args.sums = reinterpret_cast<float4*>(sums);
  args.tickets = tickets;
  args.lora = {lora.call, x.data, x.ld, lora.s.data, lora.s.ld, reinterpret_cast<uint64_t*>(s_sums), tickets + processors, 0,
               0,         0,      0};
  return args;
}

// f.operator()<T, kLora, kRows>().
template <class F>
void dispatch(TensorView x, const DecodeLora& lora, F&& f) {
  dispatch_half(x.dtype, [&]<class T>() {
    const auto for_rows = [&]<bool kLora>() {
      if (x.rows <= 16) f.template operator()<T, kLora, 16>();
      else if (x.rows <= 32) f.template operator()<T, kLora, 32>();
      else f.template operator()<T, kLora, 64>();
    };
    if (lora.call.count > 0) for_rows.template operator()<true>();
    else for_rows.template operator()<false>();
  });
}

}  // namespace

bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream, KShares* shares) {
  const bool f32 = y.dtype == DType::f32;
  if (!takes(x, w, y) || lora.rank > Tiling<2, 64>::max_rank) return false;
  const Way way = way_of(x.rows, w.rows, x.cols, lora.rank, lora.call, processors, shares != nullptr);
  for (int p = 0; p + 1 < lora.call.parts && lora.call.count > 0; ++p)
    if (lora.call.out[p] % way.height != 0) return false;  // a tile lies in one part
  if (f32 && way.splits > 1) return false;
  DecodeArgs args = args_of(workspace, x, w, y, lora, processors);
  args.bias = bias;
  args.height = way.height;
  args.splits = way.splits;
  if (f32) {
    args.wide = static_cast<float*>(y.data);
    args.ld_wide = y.ld;
  } else if (shares != nullptr && way.splits > 1) {
    *shares = {reinterpret_cast<float*>(args.sums), way.splits, w.rows, x.rows * w.rows};
    args.wide = reinterpret_cast<float*>(args.sums);
    args.ld_wide = w.rows;
  }
  dispatch(x, lora, [&]<class T, bool kLora, int kRows>() {
    if (way.m == 2) launch_decode<T, kLora, false, 2, kRows>(maps, x, w, args, processors, stream);
    else launch_decode<T, kLora, false, 1, kRows>(maps, x, w, args, processors, stream);
  });
  return true;
}

bool decode_swiglu(TensorMaps& maps, void* workspace, TensorView x, TensorView w, TensorView h, const DecodeLora& lora,
                   int processors, cudaStream_t stream) {
  if (!takes(x, w, h) || h.cols % 8 != 0) return false;
  // One wave of tiles, or as many equal ones as it takes.
  const int64_t most = 64 * kGroups, waves = ceil_div(h.cols, most * processors);
  DecodeArgs args = args_of(workspace, x, w, h, lora, processors);
  args.block = static_cast<int>(std::max<int64_t>(ceil_div(ceil_div(h.cols, kGroups * processors * waves), 8) * 8, 16));
  args.height = 2 * kGroups * args.block;
  args.splits = 1;
  if (lora.rank > 2 * kK) return false;  // B of gate and up of a tile are one unit of a stage
  dispatch(x, lora, [&]<class T, bool kLora, int kRows>() {
    launch_decode<T, kLora, true, 2, kRows>(maps, x, w, args, processors, stream);
  });
  return true;
}

}  // namespace loquetier::cuda
