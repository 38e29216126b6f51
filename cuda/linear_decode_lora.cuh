// The adapters' part of the product of decode steps (linear_decode.cu): A and B pass through the same ring of stages as W.
//
// Shrink, s = x A^T. A task is up to 8 rows of one group by up to 16 ranks of its parts together, and takes `pieces` of k. The
// blocks of the launch share out the pieces of all tasks as one line, so a task is summed by one or several neighbouring blocks.
// Each lays down its sums (slot task + block: no two are equal), every one in a word with the launch's mark; who needs them reads
// until the mark is there, and adds up in the order of the blocks.
//
// Expand, y += scale s B^T. A tile's rows of an adapter's B are adjacent in memory; a stage holds the rows of several adapters, or
// a share of one's when its rank is large. The splits of a tile share out the rows of the batch. s has its scale in it when it is
// rounded. Products are of 8 rows of the batch, and are added to the rows of the group alone: what is not finite stays in its rows.
// A tile of gate and up together ("pair") needs both parts of an adapter: an item then has the rows of either B, and its s is that
// of both side by side.
#pragma once

#include <cstddef>
#include <utility>

#include "linear_decode.h"
#include "lora.cuh"
#include "ops/workspace.h"
#include "tma.cuh"

namespace loquetier::cuda {

constexpr int kTaskRows = 8, kTaskRanks = 16, kTaskSums = kTaskRows * kTaskRanks;
static_assert(kTaskSums * sizeof(uint64_t) == kDecodeTask);
// Threads that list the adapters and add up s. With one warp more there are 13, four of them on a quarter of the processor, and
// then 128 registers a thread in place of 168, which the expand does not fit.
constexpr int kHelperWarps = 3, kHelpers = kHelperWarps * kWarp;
// a / b for a < 2^20: six instructions (the next whole number is further away than what the division may be off).
__device__ inline int quotient(int a, int b) {
  return static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
}

// Things dealt out evenly, in order: the first `more` shares have one more than `each`.
struct Equal {
  int each = 0, more = 0;
  __host__ __device__ int begin(int share) const { return share * each + min(share, more); }
  __device__ int owner(int thing) const {
    const int larger = more * (each + 1);
    const bool first = thing < larger;
    return (first ? 0 : more) + quotient(thing - (first ? 0 : larger), first ? each + 1 : max(each, 1));
  }
};
__device__ inline Equal deal_out(int things, int shares) {
  const int each = quotient(things, shares);
  return {each, things - each * shares};
}

constexpr uint64_t kLaunch = uint64_t{1} << 20;  // what all blocks of a launch together add to the counter

enum NamedBarrier { kGroupBarrier = 1, kConsumerBarrier = 3, kHelperBarrier, kStagingFree, kSumsReady };

// The groups of the batch that have rows and ranks here, in the order of their rows.
struct Adapters {
  struct Group {
    LoraSite site;
    const void* a = nullptr;  // [ranks, k], of all parts
    int row = 0, rows = 0;
    int ranks = 0;  // of all parts: the columns of s
  };
  Group of[kMaxDecodeRows];
  int first_task[kMaxDecodeRows];
  int8_t owner[kMaxDecodeRows];  // group of a row; -1: none
  int count, tasks;
  int listing[kHelperWarps];  // what the warps that list have found
  uint32_t mark;              // of the launch
  uint64_t listed;            // arrival barrier
};

// What is the same for all blocks of a launch.
struct AdapterArgs {
  LoraCall call;  // count is 0 without adapters
  const void* x;  // [T, k]
  int64_t ld_x;
  void* s;  // [T, >= ranks]
  int64_t ld_s;
  uint64_t* sums;     // [tasks + blocks][kTaskRows][kTaskRanks], a sum and above it the mark of the launch it is from
  uint64_t* counter;  // kLaunch for every launch before this one
  int pieces;         // of k
  int busy, idle;     // blocks with a tile, and behind them those without
  int ahead;          // pieces that the idle ones together may have before the busy ones get any
};

// A number, the same in all blocks, that the next 2^32 - 2 launches do not have; never 0. Each block raises the counter once it has
// read it.
__device__ inline uint32_t launch_mark(const uint64_t* counter) {
  return static_cast<uint32_t>(load_acquire(counter) / kLaunch % 0xffffffffu) + 1;
}
__device__ inline void end_of_mark(uint64_t* counter, int block, int blocks) {
  const uint64_t each = quotient(static_cast<int>(kLaunch), blocks);
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), block > 0 ? each : kLaunch - each * (blocks - 1));
}
__device__ inline void lay_down(uint64_t* to, float sum, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(uint64_t{mark} << 32 | __float_as_uint(sum)) : "memory");
}

// By the helpers. Two trips to memory, each made for all groups at once.
__device__ inline void list_adapters(const LoraCall& call, Adapters& all, int thread) {
  const int warp = thread / kWarp, lane = thread % kWarp;
  const uint64_t policy = keep_policy();
  if (thread < kMaxDecodeRows) all.owner[thread] = -1;
  int found = 0;  // groups, and above them tasks
  constexpr int kTasks = 1 << 8;
#pragma unroll 1
  for (int base = 0; base < call.count; base += kHelpers) {
    Adapters::Group group;
    const int g = base + thread;
    uint64_t place = 0, sites = 0;  // row_begin and rows; sites
    if (g < call.count) {
      place = load_kept(call.groups + g, policy);
      sites = load_kept(&call.groups[g].sites, policy);
    }
    group.row = static_cast<int>(static_cast<uint32_t>(place));
    group.rows = static_cast<int>(place >> 32);
    if (sites != 0 && group.rows > 0) {
      const LoraPart* parts = reinterpret_cast<const LoraSite*>(sites)[call.site].part;
#pragma unroll
      for (int p = 0; p < kMaxParts; ++p) {
        static_assert(offsetof(LoraPart, scale) == offsetof(LoraPart, rank) + 4);
        if (p >= call.parts) continue;
        LoraPart& part = group.site.part[p];
        part.a = reinterpret_cast<const void*>(load_kept(&parts[p].a, policy));
        part.b = reinterpret_cast<const void*>(load_kept(&parts[p].b, policy));
        const uint64_t both = load_kept(&parts[p].rank, policy);
        part.rank = static_cast<int32_t>(both);
        part.scale = __uint_as_float(static_cast<uint32_t>(both >> 32));
      }
#pragma unroll
      for (int p = 0; p < kMaxParts; ++p) {
        if (group.a == nullptr && group.site.part[p].rank > 0) group.a = group.site.part[p].a;
        group.ranks += group.site.part[p].rank;
      }
    }
    const int tasks = (group.rows + kTaskRows - 1) / kTaskRows * ((group.ranks + kTaskRanks - 1) / kTaskRanks);
    const int own = tasks * kTasks + (tasks > 0 ? 1 : 0), sum = warp_prefix_sum(own);
    if (lane == kWarp - 1) all.listing[warp] = sum;
    named_barrier(kHelperBarrier, kHelpers);
    int at = found + sum - own;
#pragma unroll
    for (int w = 0; w < kHelperWarps; ++w) {
      if (w < warp) at += all.listing[w];
      found += all.listing[w];
    }
    if (tasks > 0) {
      all.of[at % kTasks] = group;
      all.first_task[at % kTasks] = at / kTasks;
#pragma unroll 1
      for (int i = 0; i < group.rows; ++i) all.owner[group.row + i] = static_cast<int8_t>(at % kTasks);
    }
    named_barrier(kHelperBarrier, kHelpers);
  }
  if (thread == 0) {
    all.count = found % kTasks;
    all.tasks = found / kTasks;
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(all.listed);
  barrier_wait(all.listed, 0);
}

// The pieces of all tasks in one line: the busy blocks have the first ones, the idle blocks the rest.
struct ShrinkShares {
  int pieces;         // of one task
  int blocks, total;  // of the busy ones
  Equal busy, idle;
  __device__ ShrinkShares(const Adapters& all, const AdapterArgs& a) : pieces(a.pieces), blocks(a.busy) {
    const int line = all.tasks * pieces, left = max(line - a.ahead, 0);
    // The busy ones their part of what is left, in whole pieces each.
    total = a.idle > 0 ? min(quotient(left + a.busy + a.idle - 1, a.busy + a.idle) * a.busy, line) : line;
    busy = deal_out(total, a.busy);
    if (a.idle > 0) idle = deal_out(line - total, a.idle);
  }
  __device__ int begin(int block) const { return block < blocks ? busy.begin(block) : total + idle.begin(block - blocks); }
  __device__ int block_of(int piece) const {
    const bool first = piece < total;
    return (first ? 0 : blocks) + (first ? busy : idle).owner(piece - (first ? 0 : total));
  }
};

struct ShrinkTask {
  const Adapters::Group* group;
  int row, rows;          // of the batch
  int rank_begin, ranks;  // of the group's
};

// All lanes of a warp call it together.
__device__ inline ShrinkTask find_task(const Adapters& all, int task) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int behind = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = half * kWarp + lane;
    behind += __popc(__ballot_sync(0xffffffffu, i < all.count && all.first_task[i] <= task));
  }
  const Adapters::Group& group = all.of[behind - 1];
  const int in = task - all.first_task[behind - 1], chunks = (group.ranks + kTaskRanks - 1) / kTaskRanks,
            of_rows = quotient(in, chunks), row = of_rows * kTaskRows, rank = (in - of_rows * chunks) * kTaskRanks;
  return {&group, group.row + row, min(kTaskRows, group.rows - row), rank, min(kTaskRanks, group.ranks - rank)};
}

// A piece of a task in a stage: 16 rows of A, then 8 of x, in units of 8 columns; unit u of a row lies at u ^ 4 (row & 1), so that
// eight lanes read from different banks. Rows that a task does not have hold anything: what comes of them is not used. Columns
// behind the end of k are zeros.
constexpr int kPieceColumns = 512, kPieceRow = kPieceColumns * 2, kPieceBytes = (kTaskRanks + kTaskRows) * kPieceRow;
__device__ inline uint32_t piece_unit(int row, int unit) {
  return static_cast<uint32_t>(row * kPieceRow + (unit ^ (row & 1) << 2) * 16);
}

// `rows` rows of a matrix, columns [column, column + kPieceColumns) of k, into a piece from row `first` on. By one warp, 16 bytes a
// lane.
__device__ inline void copy_rows(uint32_t piece, int first, int rows, const void* from, int64_t ld, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint16_t* row = static_cast<const uint16_t*>(from) + column + 8 * lane;
  const bool low = column + 8 * lane < k, high = column + 8 * (lane + kWarp) < k;
#pragma unroll 1
  for (int i = 0; i < rows; ++i, row += ld) {
    copy16(piece + piece_unit(first + i, lane), low ? row : from, low);
    copy16(piece + piece_unit(first + i, lane + kWarp), high ? row + 8 * kWarp : from, high);
  }
}

// sum += A x^T over the warp's share of a piece's columns: m are ranks, n rows.
template <class T, int kWarps>
__device__ inline void shrink_add(uint32_t piece, int warp, float (&sum)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  constexpr int kUnits = kPieceColumns / 8 / kWarps;
  static_assert(kUnits % 4 == 0);
#pragma unroll
  for (int i = 0; i < kUnits; i += 4) {
    const int unit = warp * kUnits + i + q;
    const uint4 low = load_shared16(piece + piece_unit(g, unit)), high = load_shared16(piece + piece_unit(g + 8, unit)),
                x = load_shared16(piece + piece_unit(kTaskRanks + g, unit));
    multiply<T>(sum, low.x, high.x, low.y, high.y, x.x, x.y);
    multiply<T>(sum, low.z, high.z, low.w, high.w, x.z, x.w);
  }
}

// Which part of y a tile of columns lies in.
struct TilePart {
  int part, column, rows;  // the tile's first row of the part's B, and how many there are
};
// A tile of gate and up has half its height of each.
template <bool kPair>
__device__ inline TilePart part_of(const LoraCall& call, int tile, int height) {
  if (kPair) {
    const int column = tile * (height / 2);
    return {0, column, min(height / 2, static_cast<int>(call.out[0]) - column)};
  }
  int part = 0, begin = 0;
  while (part + 1 < call.parts && tile * height >= begin + call.out[part]) begin += static_cast<int>(call.out[part++]);
  const int column = tile * height - begin;
  return {part, column, min(height, static_cast<int>(call.out[part]) - column)};
}

// scale s of one part, or of both, for the rows [from, to) into shared memory, `stride` bytes a row, as soon as the blocks that
// have shares of it have laid them down; and s to a.s when this block is to write it. 16 bytes of zeros lie at `zeros` of row 0. By
// the helpers.
template <class T, bool kPair>
__device__ inline void add_up_s(const AdapterArgs& a, const Adapters& all, const ShrinkShares& shares, int part, int from, int to,
                                bool write, uint32_t s, int stride, int zeros) {
  const int thread = static_cast<int>(threadIdx.x) % kHelpers;
  if (thread < 2) store_shared8(s + static_cast<uint32_t>(zeros + 8 * thread), {0, 0});
#pragma unroll 1
  for (int row = from + thread / 4; row < to; row += kHelpers / 4) {
    const int of = all.owner[row];
    if (of < 0) continue;
    const Adapters::Group& group = all.of[of];
    const int rank = kPair ? group.ranks : group.site.part[part].rank, chunks = (group.ranks + kTaskRanks - 1) / kTaskRanks,
              in = row - group.row;
    int first_column = 0;
    for (int p = 0; p < part; ++p) first_column += group.site.part[p].rank;  // of a pair: the first one
#pragma unroll 1
    for (int r = thread % 4 * 4; r < rank; r += kTaskRanks) {
      const int column = first_column + r, task = all.first_task[of] + in / kTaskRows * chunks + column / kTaskRanks;
      const int begin = shares.block_of(task * shares.pieces), end = shares.block_of(task * shares.pieces + shares.pieces - 1) + 1;
      const uint64_t* slot = a.sums + int64_t{task} * kTaskSums + in % kTaskRows * kTaskRanks + column % kTaskRanks;
      float total[4] = {};
      constexpr int kAtOnce = 4;
#pragma unroll 1
      for (int b = begin; b < end; b += kAtOnce) {
        ulonglong2 v[kAtOnce][2] = {};
        for (bool missing = true; missing;) {
          missing = false;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              if (b + i < end) v[i][half] = load_relaxed16(slot + (b + i) * kTaskSums + 2 * half);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              if (b + i < end) missing |= v[i][half].x >> 32 != all.mark || v[i][half].y >> 32 != all.mark;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // behind the end: zeros
            total[2 * half] += __uint_as_float(static_cast<uint32_t>(v[i][half].x));
            total[2 * half + 1] += __uint_as_float(static_cast<uint32_t>(v[i][half].y));
          }
      }
      const float by = group.site.part[kPair && r >= group.site.part[0].rank ? 1 : part].scale;
      store_shared8(s + static_cast<uint32_t>(row * stride + r * 2),
                    {pack2<T>(by * total[0], by * total[1]), pack2<T>(by * total[2], by * total[3])});
      if (write)
        *reinterpret_cast<uint2*>(static_cast<T*>(a.s) + row * a.ld_s + column) = {pack2<T>(total[0], total[1]),
                                                                                   pack2<T>(total[2], total[3])};
    }
  }
}

// Rows of one group's B in a stage, times s of those of its rows that lie in one block of 8.
struct alignas(16) ExpandItem {
  uint32_t place;  // in the stage, in bytes
  uint32_t more;   // of the tile: the first row, and above it how many the place has room for; of a pair: the place of up's B
  uint32_t ranks;  // of a pair: gate's (all of its rows are in the stage), and above it up's
  uint32_t rows;   // which of the block's, and above it the block's place in s, in bytes
};
constexpr int kMostUnits = 8, kMostBlocks = static_cast<int>(kMaxDecodeRows) / 8;  // groups in a stage, blocks of 8 rows
// Each has an item, and one more for every block that it reaches into.
constexpr int kMostItems = kMostUnits + kMostBlocks;
struct ExpandStage {
  ExpandItem items[kMostItems + 2];  // in the order of their rows; two behind the last one may be read, and not used
  int end[kMostBlocks];              // behind the items of a block, or 0
  bool last;                         // of the tile; it may have no item
};

// The rows of B that a tile needs for rows [from, to) of the batch, in units that fit a stage, into the stages from `at` on. By one
// warp: a lane finds its group, then its unit, and the units of a stage are asked for together. Of a pair every unit is whole.
template <bool kPair, class Ring, class Cursor>
__device__ inline void fetch_b(const Adapters& all, const TilePart& tile, int height, int from, int to, int s_stride, Ring& ring,
                               Cursor& at) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int first_group = 0, groups = 0;  // the first one with rows here, and behind the last one
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = half * kWarp + lane;
    const bool real = i < all.count;
    first_group += __popc(__ballot_sync(kAll, real && all.of[i].row + all.of[i].rows <= from));
    groups += __popc(__ballot_sync(kAll, real && from < to && all.of[i].row < to));
  }
#pragma unroll 1
  for (int base = first_group; base == first_group || base < groups; base += kWarp) {
    LoraPart matrix, up;
    int row = 0, row_end = 0;
    if (base + lane < groups) {
      const Adapters::Group& group = all.of[base + lane];
      matrix = group.site.part[tile.part];
      if (kPair) up = group.site.part[1];
      row = max(group.row, from);
      row_end = min(group.row + group.rows, to);
    }
    const bool real = matrix.rank > 0 || (kPair && up.rank > 0);
    const int row_bytes = matrix.rank * 2, up_bytes = kPair ? up.rank * 2 : 0,
              bytes = kPair ? height / 2 * (row_bytes + up_bytes) : height * row_bytes,
              items = real ? (row_end + 7) / 8 - row / 8 : 0;
    const auto b = static_cast<const std::byte*>(matrix.b) + int64_t{tile.column} * row_bytes;
    const int bytes_end = warp_prefix_sum(bytes), items_end = warp_prefix_sum(items), here = min(kWarp, max(groups - base, 1));
    int done = 0, begin = 0;  // groups, and rows of the next one's B that went before: of one too large for a stage
#pragma unroll 1
    do {
      const int before = __shfl_sync(kAll, bytes_end - bytes, done), items_before = __shfl_sync(kAll, items_end - items, done);
      bool mine = lane >= done && lane < min(here, done + kMostUnits) && bytes_end - before <= ring.bytes;
      const int whole = __popc(__ballot_sync(kAll, mine));
      int w_rows = height;
      if (whole == 0) {
        mine = lane == done;
        w_rows = real ? quotient(ring.bytes, row_bytes) / 16 * 16 : 0;
      }
      const int rows = mine ? min(w_rows, tile.rows - begin) : 0, size = rows * row_bytes, up_size = rows * up_bytes,
                copied = static_cast<int>(__reduce_add_sync(kAll, size + up_size));
      ring.wait_empty(at);
      async_fence();  // a piece of A may have been there
      ExpandStage& stage = ring.expand[at.place];
      if (lane < kMostBlocks) stage.end[lane] = 0;
      __syncwarp();
      if (mine && real) {
        const auto place = static_cast<uint32_t>(whole == 0 ? 0 : bytes_end - bytes - before),
                   up_place = place + static_cast<uint32_t>(height / 2 * row_bytes);
        int item = items_end - items - items_before;
#pragma unroll 1
        for (int block = row / 8; block * 8 < row_end; ++block) {
          const int low = max(row - 8 * block, 0), high = min(row_end - 8 * block, 8);
          stage.items[item++] = {place, kPair ? up_place : static_cast<uint32_t>(begin | w_rows << 16),
                                 static_cast<uint32_t>(matrix.rank | (kPair ? up.rank << 16 : 0)),
                                 (1u << high) - (1u << low) | static_cast<uint32_t>(8 * block * s_stride) << 8};
          atomicMax(&stage.end[block], item);
        }
        if (!kPair || size > 0)
          bulk_load(ring.address(at) + place, b + int64_t{begin} * row_bytes, static_cast<uint32_t>(size), ring.full[at.place],
                    kStreamOnce);
        if (kPair && up_size > 0)
          bulk_load(ring.address(at) + up_place, static_cast<const std::byte*>(up.b) + int64_t{tile.column} * up_bytes,
                    static_cast<uint32_t>(up_size), ring.full[at.place], kStreamOnce);
      }
      begin = whole > 0 ? 0 : begin + __shfl_sync(kAll, w_rows, done);
      if (begin >= tile.rows) begin = 0;
      done += whole > 0 ? whole : begin == 0 ? 1 : 0;
      if (lane == 0) stage.last = base + kWarp >= groups && done >= here;
      __syncwarp();
      if (lane == 0) barrier_expect(ring.full[at.place], static_cast<uint32_t>(copied));
      ring.next(at);
    } while (done < here);
  }
}

// The expand of a warp, onto the sums of W's product. Those lie as the sums of m16n8k16 do: of block j, sum[m][4 j .. 4 j + 3]; so
// the blocks are gone through in code, one after the other. A step is 16 columns of an item's rank. What takes time is what the
// warps issue and wait for, not the bytes and not the instruction cache (measured): what an item needs is worked out by the warp
// that fetches, a step's addresses while the one before waits for its fragments, and what a step does not have is read as zeros.
template <class T, bool kPair, int kM, int kRows>
class Expand {
 public:
  // Rows of s and the zeros, as add_up_s() leaves them; w_row: where the rows of W of fragment m begin in the tile; of a pair
  // fragment 0 is of gate, 1 of up, in their half.
  __device__ Expand(uint32_t s, int s_stride, int zeros, const int (&w_row)[kM]) : zeros_(s + static_cast<uint32_t>(zeros)) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    s_lane_ = s + static_cast<uint32_t>(lane / 4 * s_stride);
#pragma unroll
    for (int m = 0; m < kM; ++m) w_row_[m] = w_row[m];
  }

  // All items of a stage.
  __device__ void add(const ExpandStage& of, uint32_t stage, float (&sum)[kM][kRows / 2]) {
    item_ = 0;
    from_ = shared_address(of.items);
    coming_ = load_shared16(from_);
    int end[kRows / 8];
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) end[i] = of.end[i];
    begin_item(stage);
    add_blocks(end, stage, sum, std::make_integer_sequence<int, kRows / 8>());
  }

 private:
  // No index: sum would become an array in memory.
  template <int... kBlocks>
  __device__ void add_blocks(const int (&end)[kRows / 8], uint32_t stage, float (&sum)[kM][kRows / 2],
                             std::integer_sequence<int, kBlocks...>) {
    (add_block<kBlocks>(end[kBlocks], stage, sum), ...);
  }

  template <int kBlock>
  __device__ void add_block(int end, uint32_t stage, float (&sum)[kM][kRows / 2]) {
#pragma unroll 1
    while (item_ < end) {
      uint2 low[kM], high[kM], n[kM];  // rows of B, the lane's and the one 8 behind it, and its row of s: four columns
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t b = b_[m] + static_cast<uint32_t>(min(column_, b_last_[m])) * 2;
        low[m] = load_shared8(b);
        high[m] = load_shared8(b + b_high_[m]);
        if (kPair || m == 0) n[m] = load_shared8(column_ < s_end_[m] ? s_[m] + static_cast<uint32_t>(column_) * 2 : zeros_);
      }
      const bool even = mine_ & 1, odd = mine_ & 2;
      column_ += 16;
      if (column_ >= end_) {
        ++item_;
        begin_item(stage);  // behind the last one: of anything
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint2 of_s = n[kPair ? m : 0];
        float c[4] = {};
        multiply<T>(c, low[m].x, high[m].x, low[m].y, high[m].y, of_s.x, of_s.y);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e % 2 == 0 ? even : odd) sum[m][4 * kBlock + e] += c[e];
      }
    }
  }

  __device__ void begin_item(uint32_t stage) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
    const auto [place, more, ranks, rows] = coming_;
    from_ += sizeof(ExpandItem);
    coming_ = load_shared16(from_);
    mine_ = rows >> 2 * q & 3;
    column_ = end_ = 4 * q;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      int w = w_row_[m];
      const int rank = static_cast<int>(kPair && m > 0 ? ranks >> 16 : ranks & 0xffff);
      bool real = rank > 0;
      if constexpr (!kPair) {
        w -= static_cast<int>(more & 0xffff);
        real = static_cast<unsigned>(w) < more >> 16;
      }
      end_ = max(end_, rank + 4 * q);
      b_[m] = real ? stage + (kPair && m > 0 ? more : place) + static_cast<uint32_t>((w + g) * rank) * 2 : zeros_;
      b_high_[m] = real ? static_cast<uint32_t>(rank) * 16 : 0;
      b_last_[m] = real ? rank - 4 : 0;
      s_[m] = s_lane_ + (rows >> 8) + (kPair && m > 0 ? (ranks & 0xffff) * 2 : 0);
      s_end_[m] = rank;
    }
  }

  uint32_t zeros_, s_lane_;
  int w_row_[kM];
  // Of the coming step: its item and the lane's column; the item's rows of B and of s that are the lane's (what is not there is
  // zeros), and where their columns end.
  int item_, column_, end_;
  uint32_t mine_;  // which of the two rows of the batch that the lane has sums of are the item's
  uint32_t b_[kM], b_high_[kM], s_[kM];
  int b_last_[kM], s_end_[kM];
  uint4 coming_;  // the item behind it, and where that came from
  uint32_t from_;
};

}  // namespace loquetier::cuda
