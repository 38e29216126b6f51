// y = x W^T for few rows (decode steps), with the adapters' shrink and expand in the same launch. Bound by the bytes of W, A and B,
// so the kernel is a stream of them through shared memory.
//
// A block owns a tile of W's rows and one of `splits` shares of k. One warp keeps a ring of stages on its way (TMA), two warpgroups
// multiply: W is the left operand (its rows are m), the rows of x are n, so 8 to 64 of them cost no padding. The shares of k meet
// in global memory (which the L2 holds): every block lays its sums down, waits for the others of its tile, and adds up its part of
// them in a fixed order.
//
// With adapters (linear_decode_lora.cuh) the ring carries the first pieces of W, the block's share of all A, the rest of W, and the
// tile's rows of B. The sums of the shrink cross between the blocks while W passes; four more warps list the adapters at the start
// and bring s to shared memory for the expand, which adds to the same registers as W's product.
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
constexpr int kSharedBytes = 200 * 1024;              // 220 KB: the same, measured
constexpr int kFirstPieces = 3;                       // of W before A: on their way while the adapters are listed
constexpr uint64_t kTurn = 840;                       // divisible by every number of splits
static_assert(kTurn % 8 == 0 && kTurn % 7 == 0 && kTurn % 5 == 0 && kTurn % 3 == 0 && kMaxDecodeSplits == 8);
enum NamedBarrier { kGroupBarrier = 1, kConsumerBarrier = 3, kHelperBarrier, kStagingFree, kSumsReady };

template <int kM, int kRows>
struct Tiling {
  static constexpr int tile = 64 * kM * kGroups;  // rows of W
  static constexpr int w_bytes = tile * kK * 2, x_bytes = kRows * kK * 2, used = w_bytes + x_bytes,
                       stage = used > kPieceBytes ? used : kPieceBytes;
  static constexpr int stride = 64 * kM * 2 + 16;  // bytes of a row of y of one group; 16 keep rows off each other's banks
  static constexpr int staging = kGroups * kRows * stride;
  static constexpr int stages = (kSharedBytes - staging) / stage;
  static constexpr int shared = stages * stage + staging + 1024;
  // s in the place of y's staging, before it; the stride keeps the 8 bytes of 16 lanes off each other's banks.
  static constexpr int s_stride = kGroups * stride, max_rank = 128 * kM;
  static_assert(stages >= kFirstPieces && stage % 1024 == 0 && max_rank * 2 <= s_stride);
  static_assert(kConsumerWarps * kTaskSums * sizeof(float) <= staging);
};

// Stages and their barriers. Stage `at`, counted from the start of the block, lies at at % kStages.
template <int kStages, int kBytes>
struct Ring {
  uint64_t full[kStages], empty[kStages];
  ExpandStage expand[kStages];
  uint32_t stages;
  int open;  // pieces of A may go to the stages before this one

  __device__ void wait_full(int at) { barrier_wait(full[at % kStages], static_cast<uint32_t>(at / kStages) & 1); }
  __device__ void wait_empty(int at) { barrier_wait(empty[at % kStages], static_cast<uint32_t>(at / kStages + 1) & 1); }
  // By all lanes of each warp that multiplies, when it has read the stage.
  __device__ void release(int at) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty[at % kStages]);
  }
  __device__ uint32_t address(int at) const { return stages + static_cast<uint32_t>(at % kStages * kBytes); }
};
template <int kM, int kRows>
using RingOf = Ring<Tiling<kM, kRows>::stages, Tiling<kM, kRows>::stage>;

struct DecodeArgs {
  void* y;
  int64_t ld_y;
  const void* bias;  // [n] or null
  int rows, n, k;
  int tiles, splits;
  float4* sums;       // [blocks][n-blocks of 16][row blocks of 8][lane]: of other shares of k
  uint64_t* tickets;  // [tiles] kTurn for every launch that ended, and kTurn / splits for every block that has laid down its sums
  AdapterArgs lora;
};

// What a block does: tiles first, first + step, …, of k the pieces [begin, end), of the groups' expand [from(), to()).
struct Share {
  int split, splits, first, step, tiles, begin, end, before;

  __device__ explicit Share(const DecodeArgs& a)
      : split(static_cast<int>(blockIdx.x) % a.splits),
        splits(a.splits),
        first(static_cast<int>(blockIdx.x) / a.splits),
        step(static_cast<int>(gridDim.x) / a.splits),
        tiles(a.tiles) {
    const int pieces = (a.k + kK - 1) / kK;
    begin = pieces * split / splits;
    end = pieces * (split + 1) / splits;
    before = a.lora.call.count > 0 ? min(end - begin, kFirstPieces) : end - begin;  // pieces of W before A
  }
  __device__ int from(const Adapters& all) const { return all.count * split / splits; }
  __device__ int to(const Adapters& all) const { return all.count * (split + 1) / splits; }
};

// ---------------------------------------------------------------- the warps

// How the pieces of A are shared out, and which of them are this block's: stages share.before and on.
struct OwnPieces : ShrinkShares {
  int first, count;
  __device__ OwnPieces(const DecodeArgs& a, const Adapters& all)
      : ShrinkShares(all, (a.k + kPieceColumns - 1) / kPieceColumns, static_cast<int>(gridDim.x)),
        first(begin(static_cast<int>(blockIdx.x))),
        count(begin(static_cast<int>(blockIdx.x) + 1) - first) {}
};

// One thread fetches W, x and B.
template <int kM, int kRows>
__device__ inline void fetch_stages(const CUtensorMap& w_map, const CUtensorMap& x_map, const DecodeArgs& a, const Share& share,
                                    Adapters& all, RingOf<kM, kRows>& ring) {
  using S = Tiling<kM, kRows>;
  const bool adapters = a.lora.call.count > 0;
  const int pieces = share.end - share.begin;
  const auto wait_empty = [&](int at) {
    ring.wait_empty(at);
    if (adapters) async_fence();  // a piece of A may have been there
  };
  const auto fetch_w = [&](int at, int tile, int i) {
    barrier_expect(ring.full[at % S::stages], S::used);
    tma_load(ring.address(at), w_map, ring.full[at % S::stages], (share.begin + i) * kK, tile * S::tile, kStreamOnce);
  };
  const auto fetch_x = [&](int at, int i) {
    tma_load(ring.address(at) + S::w_bytes, x_map, ring.full[at % S::stages], (share.begin + i) * kK, 0, kKeep);
  };

  // The first tile's stages: `before` pieces of W, those of A, the other pieces of W. As many of W as the ring then holds do not
  // wait for x.
  const int early = min(share.before, S::stages);
  for (int i = 0; i < early; ++i) fetch_w(i, share.first, i);
  int a_pieces = 0;
  if (adapters) {
    barrier_wait(all.listed, 0);
    a_pieces = OwnPieces(a, all).count;
  }
  const auto stage_of = [&](int i) { return i < share.before ? i : i + a_pieces; };
  int ahead = early;
  for (; ahead < pieces && stage_of(ahead) < S::stages; ++ahead) fetch_w(stage_of(ahead), share.first, ahead);
  wait_for_previous();
  for (int i = 0; i < ahead; ++i) fetch_x(stage_of(i), i);
  // This thread waits for every place in turn, also on behalf of the helpers: the parity of a barrier tells two phases apart, no
  // more.
  int at = S::stages;
  for (int i = ahead; at < pieces + a_pieces; ++at) {
    wait_empty(at);
    if (i >= pieces || at != stage_of(i)) {
      store_release(&ring.open, at + 1);
      continue;
    }
    fetch_w(at, share.first, i);
    fetch_x(at, i);
    ++i;
  }
  at = pieces + a_pieces;
  for (int tile = share.first;;) {
    if (adapters) {
      const TilePart part = part_of<S::tile>(a.lora.call, tile);
      ExpandWalk<S::tile, S::stage> walk(all, part, share.from(all), share.to(all));
      do {
        wait_empty(at);
        uint64_t& full = ring.full[at % S::stages];
        ExpandStage& stage = ring.expand[at % S::stages];
        uint32_t place = 0, bytes = 0;
        int count = 0;
        for (; walk.real && count < kMostUnits && place + walk.bytes() <= S::stage; walk.next(), ++count) {
          const Adapters::Group& group = all.of[walk.of];
          const LoraPart& matrix = group.site.part[part.part];
          const uint32_t size = static_cast<uint32_t>(min(walk.rows, part.rows - walk.row) * walk.rank) * 2;
          bulk_load(ring.address(at) + place, static_cast<const uint16_t*>(matrix.b) + int64_t{part.column + walk.row} * walk.rank,
                    size, full, kStreamOnce);
          stage.units[count] = {matrix.scale,
                                place,
                                static_cast<int16_t>(walk.rank),
                                static_cast<int16_t>(walk.row),
                                static_cast<int16_t>(walk.rows),
                                static_cast<uint8_t>(group.row),
                                static_cast<uint8_t>(group.rows)};
          place += static_cast<uint32_t>(walk.bytes());
          bytes += size;
        }
        stage.count = count;
        stage.last = !walk.real;
        barrier_expect(full, bytes);
        ++at;
      } while (walk.real);
    }
    tile += share.step;
    if (tile >= a.tiles) return;
    for (int i = 0; i < pieces; ++i, ++at) {
      wait_empty(at);
      fetch_w(at, tile, i);
      fetch_x(at, i);
    }
  }
}

// The warps beside it: a list of the adapters, the pieces of A (a warp takes every fourth, 16 bytes a lane: bulk copies of rows as
// short as these are issued one lane at a time, and measured three times slower), and s of every tile's part.
template <class T, int kM, int kRows>
__device__ inline void help(const DecodeArgs& a, const Share& share, Adapters& all, RingOf<kM, kRows>& ring, uint32_t staging) {
  using S = Tiling<kM, kRows>;
  constexpr int kHelperWarps = kHelpers / kWarp;
  const int thread = static_cast<int>(threadIdx.x) - kBaseThreads, warp = thread / kWarp;
  if (warp == 0) list_adapters(a.lora.call, all);
  barrier_wait(all.listed, 0);
  const OwnPieces own(a, all);

  const auto copy_a = [&](int i) {
    const ShrinkTask task = find_task(all, (own.first + i) / own.pieces);
    copy_rows(ring.address(share.before + i), 0, task.ranks,
              static_cast<const uint16_t*>(task.group->a) + int64_t{task.rank_begin} * a.k, a.k,
              (own.first + i) % own.pieces * kPieceColumns, a.k);
  };
  const auto copy_x = [&](int i) {
    const ShrinkTask task = find_task(all, (own.first + i) / own.pieces);
    copy_rows(ring.address(share.before + i), kTaskRanks, task.rows,
              static_cast<const uint16_t*>(a.lora.x) + task.row * a.lora.ld_x, a.lora.ld_x,
              (own.first + i) % own.pieces * kPieceColumns, a.k);
  };
  const auto arrive = [&](int i) {
    __syncwarp();
    if (thread % kWarp == 0) barrier_arrive(ring.full[(share.before + i) % S::stages]);
  };
  const int early = min(own.count, S::stages - share.before);
  for (int i = warp; i < early; i += kHelperWarps) copy_a(i);
  wait_for_previous();
  for (int i = warp; i < early; i += kHelperWarps) copy_x(i);
  commit_copies();
  wait_copies<0>();
  for (int i = warp; i < early; i += kHelperWarps) arrive(i);
  // A warp has two pieces on their way, if the place of the next one does not depend on the one before being multiplied.
  constexpr bool kTwo = S::stages > kHelperWarps;
  int open = -1;
  for (int i = early + (warp - early % kHelperWarps + kHelperWarps) % kHelperWarps; i < own.count; i += kHelperWarps) {
    while (load_acquire(&ring.open) <= share.before + i) {
    }
    copy_a(i);
    copy_x(i);
    commit_copies();
    if (open >= 0) {
      wait_copies<1>();
      arrive(open);
    }
    open = i;
    if (kTwo) continue;
    wait_copies<0>();
    arrive(i);
    open = -1;
  }
  if (open >= 0) {
    wait_copies<0>();
    arrive(open);
  }

  for (int tile = share.first; tile < a.tiles; tile += share.step) {
    named_barrier(kStagingFree, kConsumers + kHelpers);
    if (tile == share.first) {
      if (thread == 0) {  // this block's sums of s lie there; now those of the others
        const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
        const uint64_t old = add_release(a.lora.counter, kShrinkTurn * (block + 1) / blocks - kShrinkTurn * block / blocks);
        while (load_acquire(a.lora.counter) < (old / kShrinkTurn + 1) * kShrinkTurn) {
        }
      }
      named_barrier(kHelperBarrier, kHelpers);
    }
    const TilePart part = part_of<S::tile>(a.lora.call, tile);
    add_up_s<T>(a.lora, all, own, part.part, share.from(all), share.to(all), a.rows, part.column == 0, staging, S::s_stride);
    named_barrier_arrive(kSumsReady, kConsumers + kHelpers);
  }
}

// The block's share of the shrink, by the warps that multiply; `at` is the first of its stages. The sums of a task's pieces are
// added over the warps in `scratch`, and laid down.
template <class T, int kM, int kRows>
__device__ inline void shrink(const DecodeArgs& a, Adapters& all, RingOf<kM, kRows>& ring, int& at, float* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  barrier_wait(all.listed, 0);
  const OwnPieces own(a, all);
  if (own.count == 0) return;
  int task = own.first / own.pieces, left = (task + 1) * own.pieces - own.first;  // pieces of the task
  float sum[4] = {};
  for (int i = 0; i < own.count; ++i, ++at) {
    ring.wait_full(at);
    shrink_add<T, kConsumerWarps>(ring.address(at), warp, sum);
    ring.release(at);
    if (--left > 0 && i + 1 < own.count) continue;
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
      a.lora.sums[int64_t{task + static_cast<int>(blockIdx.x)} * kTaskSums + row * kTaskRanks + rank] = total;
    }
    named_barrier(kConsumerBarrier, kConsumers);
    ++task;
    left = own.pieces;
  }
}

// Adds the adapters' part of a tile to the sums of W's product.
template <class T, int kM, int kRows>
__device__ inline void expand(RingOf<kM, kRows>& ring, int& at, uint32_t s, float (&sum)[kM][kRows / 2]) {
  using S = Tiling<kM, kRows>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int w_row[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) w_row[m] = ((warp / 4 * kM + m) * 4 + warp % 4) * 16;
  Expand<T, kM, kRows> warps;
  for (bool last = false; !last; ++at) {
    ring.wait_full(at);
    const ExpandStage& stage = ring.expand[at % S::stages];
    const int count = stage.count;
    for (int i = 0; i < count; ++i) warps.add(stage.units[i], ring.address(at), w_row, s, S::s_stride, sum);
    last = stage.last;
    ring.release(at);
  }
  warps.flush(sum);
}

// ---------------------------------------------------------------- the kernel

template <class T, int kM, int kRows>
__global__ void __launch_bounds__(kAllThreads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ DecodeArgs a) {
  using S = Tiling<kM, kRows>;
  constexpr int kRowBlocks = kRows / 8;
  extern __shared__ std::byte raw[];
  __shared__ RingOf<kM, kRows> ring;
  __shared__ Adapters all;
  const uint32_t staging = (shared_address(raw) + 1023) / 1024 * 1024 + S::stages * S::stage;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Share share(a);
  const bool adapters = a.lora.call.count > 0;

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(ring.full[i], 1);
      barrier_init(ring.empty[i], kConsumerWarps);
    }
    barrier_init(all.listed, 1);
    barrier_init_fence();
    ring.stages = staging - S::stages * S::stage;
    ring.open = 0;
  }
  __syncthreads();
  let_next_start();

  if (warp >= kBaseThreads / kWarp) return help<T, kM, kRows>(a, share, all, ring, staging);
  if (warp == kConsumerWarps) {
    if (lane == 0) fetch_stages<kM, kRows>(w_map, x_map, a, share, all, ring);
    return;
  }

  const int group = warp / 4, quarter = warp % 4;
  const uint32_t own = staging + static_cast<uint32_t>(group * kRows * S::stride);
  float sum[kM][kRows / 2];
  int at = 0;  // stages used so far
  for (int tile = share.first; tile < a.tiles; tile += share.step) {
    for (auto& part : sum)
      for (float& v : part) v = 0;
    const bool with_shrink = adapters && tile == share.first;
#pragma unroll 1
    for (int piece = share.begin, stop = with_shrink ? share.begin + share.before : share.end; piece < share.end;
         stop = share.end) {
      for (const int first = piece; piece < stop; ++piece, ++at) {
        ring.wait_full(at);
        const uint32_t w = ring.address(at) + static_cast<uint32_t>(group * kM) * 64 * kK * 2, x = ring.address(at) + S::w_bytes;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
          for (int m = 0; m < kM; ++m)
            multiply_async<T, kRows>(sum[m], swizzled_operand(w + m * 64 * kK * 2 + k * 32), swizzled_operand(x + k * 32));
        }
        wgmma_commit();
        wgmma_wait<1>();  // the stage before this one has been read: its place may be filled
        if (piece > first) ring.release(at - 1);
      }
      wgmma_wait<0>();
      ring.release(at - 1);
      if (with_shrink && piece == share.begin + share.before) {
        shrink<T, kM, kRows>(a, all, ring, at, reinterpret_cast<float*>(raw + (staging - shared_address(raw))));
        named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
      }
    }
    if (adapters) {
      named_barrier(kSumsReady, kConsumers + kHelpers);
      expand<T, kM, kRows>(ring, at, staging, sum);
    }

    if (a.splits > 1) {  // one tile a block
      float4* mine = a.sums + int64_t{blockIdx.x} * 8 * kM * kRowBlocks * kWarp;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int block = (group * kM + m) * 4 + quarter;
#pragma unroll
        for (int j = 0; j < kRowBlocks; ++j) {
          const float* c = sum[m] + 4 * j;
          if (j * 8 < a.rows) mine[(block * kRowBlocks + j) * kWarp + lane] = {c[0], c[1], c[2], c[3]};
        }
      }
      named_barrier(kConsumerBarrier, kConsumers);
      if (threadIdx.x == 0) {
        const uint64_t before = add_release(a.tickets + tile, kTurn / static_cast<uint64_t>(a.splits));
        while (load_acquire(a.tickets + tile) < (before / kTurn + 1) * kTurn) {
        }
      }
      named_barrier(kConsumerBarrier, kConsumers);
      // The n-blocks of 16 columns whose sums this block adds up, of 8 kM in the tile.
      const int block_begin = 8 * kM * share.split / a.splits, block_end = 8 * kM * (share.split + 1) / a.splits,
                row_blocks = (a.rows + 7) / 8;
      for (int i = warp; i < (block_end - block_begin) * row_blocks; i += kConsumers / kWarp) {
        const int block = block_begin + i / row_blocks, j = i % row_blocks;
        const float4* from = a.sums + ((int64_t{tile} * a.splits * 8 * kM + block) * kRowBlocks + j) * kWarp + lane;
        float total[4] = {0, 0, 0, 0};
#pragma unroll 4
        for (int p = 0; p < a.splits; ++p) {
          const float4 part = __ldcg(from + int64_t{p} * 8 * kM * kRowBlocks * kWarp);
          total[0] += part.x;
          total[1] += part.y;
          total[2] += part.z;
          total[3] += part.w;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = j * 8 + lane % 4 * 2 + e % 2, column = tile * S::tile + block * 16 + lane / 4 + e / 2 * 8;
          if (row >= a.rows || column >= a.n) continue;
          float value = total[e];
          if (a.bias != nullptr) value += to_float(static_cast<const T*>(a.bias)[column]);
          static_cast<T*>(a.y)[row * a.ld_y + column] = from_float<T>(value);
        }
      }
      return;
    }

    // y [rows, tile] through shared memory, each group its own columns.
    if (adapters) named_barrier(kConsumerBarrier, kConsumers);  // s has been read: y takes its place
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int n0 = tile * S::tile + (group * kM + m) * 64 + quarter * 16 + lane / 4;
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
    const int column = tile * S::tile + group * kM * 64;
    for (int i = static_cast<int>(threadIdx.x) % 128; i < a.rows * kVectors; i += 128) {
      const int row = i / kVectors, vector = i % kVectors;
      if (column + vector * 8 >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<T*>(a.y) + row * a.ld_y + column + vector * 8) =
          load_shared16(own + static_cast<uint32_t>(row * S::stride + vector * 16));
    }
    if (tile + share.step >= a.tiles) return;
    named_barrier(kGroupBarrier + group, 128);
    if (adapters) named_barrier_arrive(kStagingFree, kConsumers + kHelpers);
  }
}

template <class T, int kM, int kRows>
void launch_decode(TensorMaps& maps, TensorView x, TensorView w, DecodeArgs args, int splits, int processors, cudaStream_t stream,
                   std::source_location where = std::source_location::current()) {
  using S = Tiling<kM, kRows>;
  args.tiles = static_cast<int>(ceil_div(w.rows, S::tile));
  args.splits = splits;
  const int blocks = splits > 1 ? args.tiles * splits : std::min(args.tiles, processors);
  const int threads = args.lora.call.count > 0 ? kAllThreads : kBaseThreads;
  Launch launch{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), S::shared, stream, 1, where, true};
  launch(decode_kernel<T, kM, kRows>, maps.get(w, kK, S::tile), maps.get(x, kK, kRows), args);
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

}  // namespace

bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream) {
  const auto aligned = [](const TensorView& t) { return aligned16(t.data) && t.ld % 8 == 0; };
  if (x.rows > kMaxDecodeRows || x.cols % 8 != 0 || w.rows % 8 != 0 || !aligned(x) || !aligned(w) || !aligned(y)) return false;
  if (lora.rank > Tiling<2, 64>::max_rank) return false;
  const Way way = way_of(x.rows, w.rows, x.cols, lora.rank, processors);
  if (lora.call.count > 0) {
    for (int p = 0; p < lora.call.parts; ++p)
      if (p + 1 < lora.call.parts && lora.call.out[p] % (128 * way.m) != 0) return false;  // a tile lies in one part
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
      0,
      0,
      reinterpret_cast<float4*>(sums),
      tickets,
      {lora.call, x.data, x.ld, lora.s.data, lora.s.ld, reinterpret_cast<float*>(s_sums), tickets + processors}};
  const auto launch = [&]<class T, int kRows>() {
    if (way.m == 2) launch_decode<T, 2, kRows>(maps, x, w, args, way.splits, processors, stream);
    else launch_decode<T, 1, kRows>(maps, x, w, args, way.splits, processors, stream);
  };
  dispatch_half(x.dtype, [&]<class T>() {
    if (x.rows <= 16) launch.template operator()<T, 16>();
    else if (x.rows <= 32) launch.template operator()<T, 32>();
    else launch.template operator()<T, 64>();
  });
  return true;
}

}  // namespace loquetier::cuda
