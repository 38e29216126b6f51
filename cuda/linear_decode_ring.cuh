// What the parts of the product of decode steps share (linear_decode.cu): its sizes, the ring of stages, what a launch is given and
// what of it a block does.
#pragma once

#include "linear_decode.h"
#include "linear_decode_lora.cuh"
#include "tma.cuh"

namespace loquetier::cuda::decode {

constexpr int kK = 64;  // columns of a stage: 128 bytes, one row of the swizzle
constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * 128;
constexpr int kConsumerWarps = kConsumers / kWarp;
constexpr int kBaseThreads = kConsumers + kWarp;      // and the warp that fetches
constexpr int kAllThreads = kBaseThreads + kHelpers;  // without adapters in the batch the helpers are not launched
constexpr int kSharedBytes = 216 * 1024;              // five stages of 224 rows of W and 64 of x; measured faster than 150 KB
constexpr int kMostStages = 10;
constexpr int64_t kMostColumns = 128 * 1024;  // of k: quotient() of the pieces of all tasks
// Of the bytes of W of another block, in percent: what a block without a tile may have of A before the others get any.
constexpr int kIdleShare = 60;
constexpr int kTurn = 1;         // pieces of A between two of W; 2: the same, measured
constexpr uint64_t kTile = 840;  // divisible by every number of splits
static_assert(kTile % 8 == 0 && kTile % 7 == 0 && kTile % 5 == 0 && kTile % 3 == 0 && kMaxDecodeSplits == 8);

template <int kM, int kRows>
struct Tiling {
  static constexpr int most = 64 * kM * kGroups;  // rows of W of a tile at most
  static constexpr int x_bytes = kRows * kK * 2;
  static constexpr int stride = 64 * kM * 2 + 16;  // bytes of a row of y of one group; 16 keep rows off each other's banks
  static constexpr int staging = kGroups * kRows * stride;
  // s in the place of y's staging, before it; the stride keeps the 8 bytes of 16 lanes off each other's banks.
  static constexpr int s_stride = kGroups * stride, max_rank = 128 * kM, zeros = max_rank * 2;
  static_assert(zeros + 16 <= s_stride);
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
  uint64_t sums;  // arrival barrier
  uint32_t stages;
  int bytes, count;
  int open;  // pieces of A may go to the stages before this one

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
  void* y;  // with the type of x
  int64_t ld_y;
  float* wide;  // not null: y is not written, but the sums [splits, rows, n], rows ld_wide apart
  int64_t ld_wide;
  const void* bias;  // [n] or null
  int rows, n, k;    // n: columns of y
  int height;        // rows of W of a tile, a multiple of 16
  int block;         // of a pair: rows of gate, or of up, that one 64 of m has
  int tiles, splits;
  Equal pieces, s_rows, blocks;  // of k, rows of the batch, blocks of 16 columns of a tile: over the splits
  int stages, stage;             // of the ring, and the bytes of one
  float4* sums;                  // [tiles][splits][blocks of 16 columns][blocks of 8 rows][lane]
  uint64_t* tickets;  // [tiles] kTile for every launch that ended, and kTile / splits for every block that has laid down its sums
  AdapterArgs lora;
};

// What a block does: tiles first, first + step, …, of k the pieces [begin, end), the expand of the rows [from, to). Of a launch
// with adapters there may be blocks without a tile: all they do is a share of the shrink.
struct Share {
  int split, first, step, tiles, begin, end, from, to;

  __device__ explicit Share(const DecodeArgs& a)
      : split(static_cast<int>(blockIdx.x)),
        first(static_cast<int>(blockIdx.y)),
        step(static_cast<int>(gridDim.y)),
        tiles(a.tiles),
        begin(a.pieces.begin(split)),
        end(first < tiles ? a.pieces.begin(split + 1) : begin),
        from(a.s_rows.begin(split)),
        to(a.s_rows.begin(split + 1)) {}
  __device__ int pieces() const { return end - begin; }
};

}  // namespace loquetier::cuda::decode
