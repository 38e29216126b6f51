// y = x W^T for few rows (decode steps), with the adapters' shrink and expand in the same launch. Bound by the bytes of W, A and B,
// so the kernel is a stream of them through shared memory.
//
// A block owns a tile of W's rows (as low as keeps all processors busy) and one of `splits` shares of k. One warp keeps a ring of
// stages on its way (TMA), two warpgroups multiply: W is the left operand (its rows are m), the rows of x are n, so 8 to 64 of them
// cost no padding. The shares of k meet in global memory (which the L2 holds): every block lays its sums down, waits for the others
// of its tile, and adds up its part of them in a fixed order.
//
// With adapters (linear_decode_lora.cuh) the ring carries as much of W as it holds, the block's share of all A and more of W in
// turns, the rest of W, and the tile's rows of B. The sums of the shrink cross between the blocks while W passes; three more warps
// list the adapters at the start and bring s to shared memory for the expand, which adds to the same registers as W's product. A
// launch without adapters has a kernel of its own: it runs from a cold instruction cache, and so a third of the code starts sooner.
//
// One file because every part of the kernel works on the same ring.
//
// Launches overlap: what does not depend on x is requested before the launch in front has ended, which keeps the memory busy across
// the small kernels between two products. All blocks of a launch run at the same time (at most one a processor), so they may wait
// for each other.
#include <cuda.h>

#include <algorithm>

#include "core/check.h"
#include "cuda_ops.h"
#include "linear_decode.h"
#include "linear_decode_lora.cuh"
#include "linear_decode_mma.cuh"
#include "tma.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kK = 64;  // columns of a stage: 128 bytes, one row of the swizzle
constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * 128;
constexpr int kConsumerWarps = kConsumers / kWarp;
constexpr int kBaseThreads = kConsumers + kWarp;      // and the warp that fetches
constexpr int kAllThreads = kBaseThreads + kHelpers;  // without adapters in the batch the helpers are not launched
constexpr int kSharedBytes = 216 * 1024;              // five stages of 224 rows of W and 64 of x; measured faster than 150 KB
constexpr int kMostStages = 10;
constexpr int kTurn = 1;         // pieces of A between two of W; 2: the same, measured
constexpr uint64_t kTile = 840;  // divisible by every number of splits
static_assert(kTile % 8 == 0 && kTile % 7 == 0 && kTile % 5 == 0 && kTile % 3 == 0 && kMaxDecodeSplits == 8);
enum NamedBarrier { kGroupBarrier = 1, kConsumerBarrier = 3, kHelperBarrier, kStagingFree, kSumsReady };

template <int kM, int kRows>
struct Tiling {
  static constexpr int most = 64 * kM * kGroups;  // rows of W of a tile at most
  static constexpr int x_bytes = kRows * kK * 2;
  static constexpr int stride = 64 * kM * 2 + 16;  // bytes of a row of y of one group; 16 keep rows off each other's banks
  static constexpr int staging = kGroups * kRows * stride;
  // s in the place of y's staging, before it; the stride keeps the 8 bytes of 16 lanes off each other's banks.
  static constexpr int s_stride = kGroups * stride, max_rank = 128 * kM;
  static_assert(max_rank * 2 <= s_stride);
  static_assert(kConsumerWarps * kTaskSums * sizeof(float) <= staging);
};

// Where a warp is in the ring: a place, and the parity of how often the ring has been gone round.
struct Cursor {
  int place = 0;
  uint32_t round = 0;
};

// Stages and their barriers. Stage i, counted from the start of the block, lies at place i % count.
struct Ring {
  uint64_t full[kMostStages], empty[kMostStages];
  ExpandStage expand[kMostStages];
  uint32_t stages;
  int bytes, count;
  int open;  // pieces of A may go to the stages before this one

  __device__ Cursor at(int stage) const { return {stage % count, static_cast<uint32_t>(stage / count) & 1}; }
  __device__ void next(Cursor& c) const {
    if (++c.place < count) return;
    c.place = 0;
    c.round ^= 1;
  }
  __device__ void wait_full(const Cursor& c) { barrier_wait(full[c.place], c.round); }
  __device__ void wait_empty(const Cursor& c) { barrier_wait(empty[c.place], c.round ^ 1); }
  // By all lanes of each warp that multiplies, when it has read the stage.
  __device__ void release(int place) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty[place]);
  }
  __device__ uint32_t address(const Cursor& c) const { return stages + static_cast<uint32_t>(c.place * bytes); }
};

struct DecodeArgs {
  void* y;
  int64_t ld_y;
  const void* bias;  // [n] or null
  int rows, n, k;
  int height;  // rows of W of a tile, a multiple of 16
  int tiles, splits;
  int stages, stage;  // of the ring, and the bytes of one
  float4* sums;       // [blocks][n-blocks of 16][row blocks of 8][lane]: of other shares of k
  uint64_t* tickets;  // [tiles] kTile for every launch that ended, and kTile / splits for every block that has laid down its sums
  AdapterArgs lora;
};

// What a block does: tiles first, first + step, …, of k the pieces [begin, end), the expand of the rows [from, to).
struct Share {
  int split, splits, first, step, tiles, begin, end, from, to;

  __device__ explicit Share(const DecodeArgs& a)
      : split(static_cast<int>(blockIdx.x) % a.splits),
        splits(a.splits),
        first(static_cast<int>(blockIdx.x) / a.splits),
        step(static_cast<int>(gridDim.x) / a.splits),
        tiles(a.tiles) {
    const int all = (a.k + kK - 1) / kK;
    begin = all * split / splits;
    end = all * (split + 1) / splits;
    from = a.rows * split / splits;
    to = a.rows * (split + 1) / splits;
  }
  __device__ int pieces() const { return end - begin; }
};

// How the pieces of A are shared out, and which of them are this block's.
struct OwnPieces : ShrinkShares {
  int first, count;
  __device__ OwnPieces(const DecodeArgs& a, const Adapters& all)
      : ShrinkShares(all, (a.k + kPieceColumns - 1) / kPieceColumns, static_cast<int>(gridDim.x)),
        first(begin(static_cast<int>(blockIdx.x))),
        count(begin(static_cast<int>(blockIdx.x) + 1) - first) {}
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
template <bool kLora, int kM, int kRows>
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
    tma_load(ring.address(c), w_map, ring.full[c.place], (share.begin + i) * kK, tile * a.height, kStreamOnce);
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
  Cursor at = ring.at(first);
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
  __syncwarp();
  at = ring.at(order.count());
  for (int tile = share.first;;) {
    if constexpr (kLora) fetch_b(all, part_of(a.lora.call, tile, a.height), a.height, share.from, share.to, ring, at);
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
template <class T, int kM, int kRows>
__device__ inline void help(const DecodeArgs& a, const Share& share, Adapters& all, Ring& ring, uint32_t staging) {
  using S = Tiling<kM, kRows>;
  constexpr int kHelperWarps = kHelpers / kWarp;
  const int thread = static_cast<int>(threadIdx.x) - kBaseThreads, warp = thread / kWarp;
  if (warp == 0) list_adapters(a.lora.call, all);
  barrier_wait(all.listed, 0);
  wait_for_previous();
  if (thread == 0) all.mark = launch_mark(a.lora.counter);
  named_barrier(kHelperBarrier, kHelpers);
  if (thread == 0) end_of_mark(a.lora.counter);
  const OwnPieces own(a, all);
  const Order order(a, share, own.count);

  const auto copy = [&](int i, uint32_t stage) {
    const ShrinkTask task = find_task(all, (own.first + i) / own.pieces);
    const int column = (own.first + i) % own.pieces * kPieceColumns;
    copy_rows(stage, 0, task.ranks, static_cast<const uint16_t*>(task.group->a) + int64_t{task.rank_begin} * a.k, a.k, column, a.k);
    copy_rows(stage, kTaskRanks, task.rows, static_cast<const uint16_t*>(a.lora.x) + task.row * a.lora.ld_x, a.lora.ld_x, column,
              a.k);
    commit_copies();
  };
  int under_way = -1;  // place of the piece before
  const auto arrive = [&] {
    __syncwarp();
    if (under_way >= 0 && thread % kWarp == 0) barrier_arrive(ring.full[under_way]);
    under_way = -1;
  };
  const auto open = [&](int stage) { return __all_sync(0xffffffffu, load_acquire(&ring.open) > stage); };
  for (int i = warp; i < own.count; i += kHelperWarps) {
    const int stage = order.of_a(i);
    while (!open(stage)) {  // perhaps until the piece before has been multiplied
      if (under_way < 0) continue;
      wait_copies<0>();
      arrive();
    }
    const Cursor at = ring.at(stage);
    copy(i, ring.address(at));
    wait_copies<1>();
    arrive();
    under_way = at.place;
  }
  wait_copies<0>();
  arrive();

  for (int tile = share.first; tile < a.tiles; tile += share.step) {
    named_barrier(kStagingFree, kConsumers + kHelpers);
    const TilePart part = part_of(a.lora.call, tile, a.height);
    add_up_s<T>(a.lora, all, own, part.part, share.from, share.to, part.column == 0, staging, S::s_stride);
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
    task = own.first / pieces;
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
      lay_down(a.lora.sums + int64_t{task + static_cast<int>(blockIdx.x)} * kTaskSums + row * kTaskRanks + rank, total, all.mark);
    }
    named_barrier(kConsumerBarrier, kConsumers);
    ++task;
    task_left = pieces;
  }

 private:
  float sum[4] = {};
};

// Adds the adapters' part of a tile to the sums of W's product.
template <class T, int kM, int kRows>
__device__ inline void expand(Ring& ring, Cursor& at, uint32_t s, float (&sum)[kM][kRows / 2]) {
  using S = Tiling<kM, kRows>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int w_row[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) w_row[m] = ((warp / 4 * kM + m) * 4 + warp % 4) * 16;
  Expand<T, kM, kRows> warps;
#pragma unroll 1
  for (bool last = false; !last; ring.next(at)) {
    ring.wait_full(at);
    const ExpandStage& stage = ring.expand[at.place];
    warps.add(stage, ring.address(at), w_row, s, S::s_stride, sum);
    last = stage.last;
    ring.release(at.place);
  }
  warps.flush(sum);
}

// ---------------------------------------------------------------- the meeting of the shares of k

// What a ticket reads once all blocks of the tile have laid down their sums. By one thread, in advance: a trip to memory less when
// it matters.
__device__ inline uint64_t full_ticket(const DecodeArgs& a, const Share& share) {
  wait_for_previous();
  return (load_relaxed(a.tickets + share.first) / kTile + 1) * kTile;
}

template <int kM, int kRows>
__device__ inline void lay_down_sums(const DecodeArgs& a, const Share& share, const float (&sum)[kM][kRows / 2], uint64_t full) {
  constexpr int kRowBlocks = kRows / 8;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  float4* mine = a.sums + int64_t{blockIdx.x} * 8 * kM * kRowBlocks * kWarp;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int block = (warp / 4 * kM + m) * 4 + warp % 4;
#pragma unroll
    for (int j = 0; j < kRowBlocks; ++j) {
      const float* c = sum[m] + 4 * j;
      if (j * 8 < a.rows) mine[(block * kRowBlocks + j) * kWarp + lane] = {c[0], c[1], c[2], c[3]};
    }
  }
  named_barrier(kConsumerBarrier, kConsumers);
  if (threadIdx.x == 0) {
    raise_release(a.tickets + share.first, kTile / static_cast<uint64_t>(a.splits));
    while (load_acquire(a.tickets + share.first) < full) {
    }
  }
  named_barrier(kConsumerBarrier, kConsumers);
}

// y of the n-blocks of 16 columns that this block adds up, of 8 kM in the tile.
template <class T, int kM, int kRows>
__device__ inline void add_up_sums(const DecodeArgs& a, const Share& share) {
  constexpr int kRowBlocks = kRows / 8, kItems = 2;  // of a warp at a time
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, tile = share.first;
  const int first = 8 * kM * share.split / a.splits, row_blocks = (a.rows + 7) / 8,
            items = (8 * kM * (share.split + 1) / a.splits - first) * row_blocks;
#pragma unroll 1
  for (int base = warp; base < items; base += kItems * kConsumerWarps) {
    float total[kItems][4] = {};
    int block[kItems], j[kItems];
    const float4* from[kItems];
    bool real[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int item = base + i * kConsumerWarps;
      real[i] = item < items;
      block[i] = first + item / row_blocks;
      j[i] = item % row_blocks;
      from[i] = a.sums + ((int64_t{tile} * a.splits * 8 * kM + block[i]) * kRowBlocks + j[i]) * kWarp + lane;
    }
#pragma unroll 4
    for (int p = 0; p < a.splits; ++p) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const float4 part = real[i] ? __ldcg(from[i] + int64_t{p} * 8 * kM * kRowBlocks * kWarp) : float4{0, 0, 0, 0};
        total[i][0] += part.x;
        total[i][1] += part.y;
        total[i][2] += part.z;
        total[i][3] += part.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = j[i] * 8 + lane % 4 * 2 + e % 2, column = tile * a.height + block[i] * 16 + lane / 4 + e / 2 * 8;
        if (!real[i] || row >= a.rows || column >= a.n) continue;
        float value = total[i][e];
        if (a.bias != nullptr) value += to_float(static_cast<const T*>(a.bias)[column]);
        static_cast<T*>(a.y)[row * a.ld_y + column] = from_float<T>(value);
      }
    }
  }
}

// ---------------------------------------------------------------- the kernel

template <class T, bool kLora, int kM, int kRows>
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

  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(ring.full[i], 1);
      barrier_init(ring.empty[i], kConsumerWarps);
    }
    if constexpr (kLora) barrier_init(all.listed, 1);
    barrier_init_fence();
    ring.stages = stages;
    ring.bytes = a.stage;
    ring.count = a.stages;
    ring.open = 0;
  }
  __syncthreads();
  let_next_start();

  if constexpr (kLora) {
    if (warp >= kBaseThreads / kWarp) return help<T, kM, kRows>(a, share, all, ring, staging);
  }
  if (warp == kConsumerWarps) return fetch_stages<kLora, kM, kRows>(w_map, x_map, a, share, all, ring);

  const int group = warp / 4, quarter = warp % 4;
  const uint32_t own = staging + static_cast<uint32_t>(group * kRows * S::stride);
  float* const scratch = reinterpret_cast<float*>(raw + (staging - shared_address(raw)));
  float sum[kM][kRows / 2];
  Cursor at;
  const uint64_t full = a.splits > 1 && threadIdx.x == 0 ? full_ticket(a, share) : 0;
  // The next `count` stages: pieces of W.
  const auto multiply = [&](int count) {
    if (count == 0) return;
    int before = -1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      ring.wait_full(at);
      const uint32_t w = ring.address(at) + static_cast<uint32_t>(group * kM) * 64 * kK * 2,
                     x = ring.address(at) + static_cast<uint32_t>(a.height * kK * 2);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
          multiply_async<T, kRows>(sum[m], swizzled_operand(w + m * 64 * kK * 2 + k * 32), swizzled_operand(x + k * 32));
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
  for (int tile = share.first; tile < a.tiles; tile += share.step) {
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
      named_barrier(kSumsReady, kConsumers + kHelpers);
      expand<T, kM, kRows>(ring, at, staging, sum);
    }

    if (a.splits > 1) {  // one tile a block
      lay_down_sums<kM, kRows>(a, share, sum, full);
      add_up_sums<T, kM, kRows>(a, share);
      return;
    }

    // y [rows, tile] through shared memory, each group its own columns.
    if (kLora) named_barrier(kConsumerBarrier, kConsumers);  // s has been read: y takes its place
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int n0 = tile * a.height + (group * kM + m) * 64 + quarter * 16 + lane / 4;
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
        store_transposed(address, pack2<T>(c[0] + add0, c[1] + add0), pack2<T>(c[2] + add8, c[3] + add8),
                         pack2<T>(c[4] + add0, c[5] + add0), pack2<T>(c[6] + add8, c[7] + add8));
      }
    }
    named_barrier(kGroupBarrier + group, 128);
    constexpr int kVectors = 64 * kM / 8;  // of a row
    const int first = group * kM * 64, column = tile * a.height + first;
    for (int i = static_cast<int>(threadIdx.x) % 128; i < a.rows * kVectors; i += 128) {
      const int row = i / kVectors, vector = i % kVectors;
      if (first + vector * 8 >= a.height || column + vector * 8 >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<T*>(a.y) + row * a.ld_y + column + vector * 8) =
          load_shared16(own + static_cast<uint32_t>(row * S::stride + vector * 16));
    }
    if (tile + share.step >= a.tiles) return;
    named_barrier(kGroupBarrier + group, 128);
    if (kLora) named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
  }
}

template <class T, bool kLora, int kM, int kRows>
void launch_decode(TensorMaps& maps, TensorView x, TensorView w, DecodeArgs args, int processors, cudaStream_t stream,
                   std::source_location where = std::source_location::current()) {
  using S = Tiling<kM, kRows>;
  args.tiles = static_cast<int>(ceil_div(w.rows, args.height));
  args.stage = static_cast<int>(ceil_div(args.height * kK * 2, 1024)) * 1024 + S::x_bytes;
  if (kLora) args.stage = std::max(args.stage, kPieceBytes);
  const int staging = kLora || args.splits == 1 ? S::staging : 0;
  args.stages = std::min((kSharedBytes - staging) / args.stage, kMostStages);
  const int read = (args.stages - 1) * args.stage + S::most * kK * 2;  // by wgmma, also behind the rows of a lower tile
  const int shared = std::max(args.stages * args.stage + staging, read) + 1024;
  const int blocks = args.splits > 1 ? args.tiles * args.splits : std::min(args.tiles, processors);
  Launch launch{dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(kLora ? kAllThreads : kBaseThreads)),
                static_cast<size_t>(shared),
                stream,
                1,
                where,
                true};
  launch(decode_kernel<T, kLora, kM, kRows>, maps.get(w, kK, args.height), maps.get(x, kK, kRows), args);
}

struct Way {
  int m = 2;
  int splits = 1;
};

// Tile and shares of k, as measured on an H200: one wave of blocks, shares of at least eight stages. The sums of many rows cost
// their way through memory, so those take the smaller tile, which needs fewer shares; without shares the larger one reads x less
// often.
Way way_of(int64_t rows, int64_t n, int64_t k, int rank, int processors) {
  const auto with = [&](int m) {
    const int64_t tiles = ceil_div(n, 128 * m);
    return Way{m, static_cast<int>(std::clamp<int64_t>(std::min(processors / tiles, k / (8 * kK)), 1, kMaxDecodeSplits))};
  };
  const auto blocks = [&](const Way& way) {  // of a wave, on average
    const int64_t all = ceil_div(n, 128 * way.m) * way.splits;
    return all / ceil_div(all, processors);
  };
  const Way large = with(2), small = with(1);
  if (rank > Tiling<1, 64>::max_rank) return large;
  if (large.splits == 1 || rows <= 32) return blocks(small) > blocks(large) + blocks(large) / 8 ? small : large;
  return blocks(large) > blocks(small) + blocks(small) / 4 ? large : small;
}

// Rows of W of a tile: fewer than it could have where that brings more processors to work, one tile each. A tile lies in one part.
int height_of(const Way& way, int64_t n, const LoraCall& call, int processors) {
  const int most = 128 * way.m;
  if (way.splits > 1 || ceil_div(n, most) > processors) return most;
  for (int height = std::max(static_cast<int>(ceil_div(ceil_div(n, processors), 16)) * 16, most / 2); height < most; height += 16) {
    bool whole = true;
    for (int p = 0; p + 1 < call.parts && call.count > 0; ++p) whole = whole && call.out[p] % height == 0;
    if (whole) return height;
  }
  return most;
}

}  // namespace

bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream) {
  const auto aligned = [](const TensorView& t) { return aligned16(t.data) && t.ld % 8 == 0; };
  if (x.rows > kMaxDecodeRows || x.cols % 8 != 0 || w.rows % 8 != 0 || !aligned(x) || !aligned(w) || !aligned(y)) return false;
  if (lora.rank > Tiling<2, 64>::max_rank) return false;
  const Way way = way_of(x.rows, w.rows, x.cols, lora.rank, processors);
  const int height = height_of(way, w.rows, lora.call, processors);
  if (lora.call.count > 0) {
    for (int p = 0; p < lora.call.parts; ++p)
      if (p + 1 < lora.call.parts && lora.call.out[p] % height != 0) return false;  // a tile lies in one part
  }
  // The workspace: sums of splits, sums of s, tickets, the counter.
  std::byte* const sums = static_cast<std::byte*>(workspace);
  std::byte* const s_sums = sums + static_cast<size_t>(processors) * kDecodeSums;
  uint64_t* const tickets =
      reinterpret_cast<uint64_t*>(s_sums + (static_cast<size_t>(processors) + kMostDecodeTasks) * kDecodeTask);
  const DecodeArgs args = {
      y.data,
      y.ld,
      bias,
      static_cast<int>(x.rows),
      static_cast<int>(w.rows),
      static_cast<int>(x.cols),
      height,
      0,
      way.splits,
      0,
      0,
      reinterpret_cast<float4*>(sums),
      tickets,
      {lora.call, x.data, x.ld, lora.s.data, lora.s.ld, reinterpret_cast<uint64_t*>(s_sums), tickets + processors}};
  const auto launch = [&]<class T, bool kLora, int kRows>() {
    if (way.m == 2) launch_decode<T, kLora, 2, kRows>(maps, x, w, args, processors, stream);
    else launch_decode<T, kLora, 1, kRows>(maps, x, w, args, processors, stream);
  };
  const auto for_rows = [&]<class T, bool kLora>() {
    if (x.rows <= 16) launch.template operator()<T, kLora, 16>();
    else if (x.rows <= 32) launch.template operator()<T, kLora, 32>();
    else launch.template operator()<T, kLora, 64>();
  };
  dispatch_half(x.dtype, [&]<class T>() {
    if (lora.call.count > 0) for_rows.template operator()<T, true>();
    else for_rows.template operator()<T, false>();
  });
  return true;
}

}  // namespace loquetier::cuda
