// The adapters' part of the product of decode steps (linear_decode.cu): A and B pass through the same ring of stages as W.
//
// Shrink, s = x A^T. A task is up to 8 rows of one group by up to 16 ranks of its parts together, and takes `pieces` of k. The
// blocks of the launch share out the pieces of all tasks as one line, so a task is summed by one or several neighbouring blocks.
// Each lays down its sums (slot task + block: no two are equal), every one in a word with the launch's mark; who needs them reads
// until the mark is there, and adds up in the order of the blocks.
//
// Expand, y += scale s B^T. A tile's rows of an adapter's B are adjacent in memory; a stage holds the rows of several adapters, or
// a share of one's when its rank is large. The splits of a tile share out the rows of the batch. The products go to registers of
// their own and are added to the rows of the group alone: what is not finite stays in its rows. A tile of gate and up together
// ("pair") needs both parts of an adapter: an item then has the rows of either B, and its s is that of both side by side.
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

// s of one part, or of both, for the rows [from, to) into shared memory, `stride` bytes a row, as soon as the blocks that have
// shares of it have laid them down; and to a.s when this block is to write it. By the helpers.
template <class T, bool kPair>
__device__ inline void add_up_s(const AdapterArgs& a, const Adapters& all, const ShrinkShares& shares, int part, int from, int to,
                                bool write, uint32_t s, int stride) {
  const int thread = static_cast<int>(threadIdx.x) % kHelpers;
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
      const uint2 packed = {pack2<T>(total[0], total[1]), pack2<T>(total[2], total[3])};
      store_shared8(s + static_cast<uint32_t>(row * stride + r * 2), packed);
      if (write) *reinterpret_cast<uint2*>(static_cast<T*>(a.s) + row * a.ld_s + column) = packed;
    }
  }
}

// Rows of one group's B in a stage, times s of those of its rows that lie in one block of 8.
struct alignas(16) ExpandItem {
  float scale;
  uint32_t place;  // in the stage, in bytes
  int16_t rank;
  int16_t w_row;        // of the tile, the first one
  int16_t w_rows;       // the place has room for
  uint8_t block, mask;  // of 8 rows of the batch, and which of them
};
// Of a pair, these are gate's (all of its rows in the tile); up's B lies behind.
struct ExpandPair : ExpandItem {
  float up_scale;
  uint32_t up_place;
  int16_t up_rank;
};
constexpr int kMostUnits = 8;  // groups in a stage
// Each has an item, and one more for every block of 8 rows, of 8 in all, that it reaches into.
constexpr int kMostItems = kMostUnits + static_cast<int>(kMaxDecodeRows) / 8;
template <bool kPair>
struct ExpandStage {
  using Item = std::conditional_t<kPair, ExpandPair, ExpandItem>;
  Item items[kMostItems];
  int count;
  bool last;  // of the tile; it may have no item
};

// The rows of B that a tile needs for rows [from, to) of the batch, in units that fit a stage, into the stages from `at` on. By one
// warp: a lane finds its group, then its unit, and the units of a stage are asked for together. Of a pair every unit is whole.
template <bool kPair, class Ring, class Cursor>
__device__ inline void fetch_b(const Adapters& all, const TilePart& tile, int height, int from, int to, Ring& ring, Cursor& at) {
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
      const int items_here = static_cast<int>(__reduce_add_sync(kAll, mine ? items : 0));
      ring.wait_empty(at);
      async_fence();  // a piece of A may have been there
      auto& stage = ring.expand[at.place];
      if (mine && real) {
        const auto place = static_cast<uint32_t>(whole == 0 ? 0 : bytes_end - bytes - before),
                   up_place = place + static_cast<uint32_t>(height / 2 * row_bytes);
        auto* item = stage.items + (items_end - items - items_before);
#pragma unroll 1
        for (int block = row / 8; block * 8 < row_end; ++block) {
          const int low = max(row - 8 * block, 0), high = min(row_end - 8 * block, 8);
          const ExpandItem plain = {matrix.scale,
                                    place,
                                    static_cast<int16_t>(matrix.rank),
                                    static_cast<int16_t>(begin),
                                    static_cast<int16_t>(w_rows),
                                    static_cast<uint8_t>(block),
                                    static_cast<uint8_t>((1 << high) - (1 << low))};
          if constexpr (kPair) *item++ = {plain, up.scale, up_place, static_cast<int16_t>(up.rank)};
          else *item++ = plain;
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
      if (lane == 0) {
        stage.count = items_here;
        stage.last = base + kWarp >= groups && done >= here;
      }
      __syncwarp();
      if (lane == 0) barrier_expect(ring.full[at.place], static_cast<uint32_t>(copied));
      ring.next(at);
    } while (done < here);
  }
}

// The expand of a warp: products go to registers of their own, and from there to the sums of W's product whenever the block of 8
// rows of the batch changes (the items are in the order of their rows). Those sums lie as the sums of m16n8k16 do: of block j,
// sum[m][4 j .. 4 j + 3]. What takes time is the instructions (without them 64 adapters took 25 us a layer less, without the bytes
// of B 2 us, when there were twice as many), so what an item needs is worked out by the warp that fetches.
template <class T, bool kPair, int kM, int kRows>
struct Expand {
  float more[kM][4] = {};
  int block = 0;

  // All items of a stage. The rows of W of fragment m begin at w_row[m] of the tile; of a pair fragment 0 is of gate, 1 of up, both
  // from row w_row[m] of their half.
  __device__ void add(const ExpandStage<kPair>& of, uint32_t stage, const int (&w_row)[kM], uint32_t s, int s_stride,
                      float (&sum)[kM][kRows / 2]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4, count = of.count;
    if (count == 0) return;
    const uint32_t s_lane = s + static_cast<uint32_t>(g * s_stride);
    // An item's fragments are asked for while the one before is multiplied.
    Item item = place(of, 0, stage, w_row, s_lane, s_stride, g, q);
    Fragments first = load(item, 4 * q);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Item next = place(of, min(i + 1, count - 1), stage, w_row, s_lane, s_stride, g, q);
      const Fragments next_first = load(next, 4 * q);
      const int most = kPair ? max(item.factor[0].rank, item.factor[kM - 1].rank) : item.factor[0].rank;
      float c[kM][4] = {};
      add_product(first, c);
#pragma unroll 1
      for (int r = 4 * q + 16; r - 4 * q < most; r += 16) add_product(load(item, r), c);
      if (item.block != block) flush(sum);
      block = item.block;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const Factor& f = item.factor[m];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          if ((f.mask >> odd & 1) == 0) continue;
          more[m][odd] += f.scale * c[m][odd];
          more[m][2 + odd] += f.scale * c[m][2 + odd];
        }
      }
      item = next;
      first = next_first;
    }
  }

  __device__ void flush(float (&sum)[kM][kRows / 2]) {
    flush_block(sum, std::make_integer_sequence<int, kRows / 8>());
#pragma unroll
    for (auto& part : more)
      for (float& v : part) v = 0;
  }
  // No index: sum would become an array in memory.
  template <int... kBlocks>
  __device__ void flush_block(float (&sum)[kM][kRows / 2], std::integer_sequence<int, kBlocks...>) {
    ((kBlocks == block ? flush_one<kBlocks>(sum) : void()), ...);
  }
  template <int kBlock>
  __device__ void flush_one(float (&sum)[kM][kRows / 2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][4 * kBlock + e] += more[m][e];
    }
  }

 private:
  // What a fragment's product needs: this lane's row of B and of s, and which of its two rows of the batch it is for.
  struct Factor {
    int rank;
    float scale;
    uint32_t b, s, mask;
    __device__ uint32_t row_bytes() const { return static_cast<uint32_t>(rank) * 2; }
  };
  struct Item {
    Factor factor[kM];
    int block;
  };
  struct Fragments {
    uint2 n[kM], low[kM], high[kM];
  };

  __device__ static Item place(const ExpandStage<kPair>& of, int i, uint32_t stage, const int (&w_row)[kM], uint32_t s_lane,
                               int s_stride, int g, int q) {
    const auto item = of.items[i];
    const uint32_t s_row = s_lane + item.block * static_cast<uint32_t>(8 * s_stride);
    Item to;
    to.block = item.block;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Factor& f = to.factor[m];
      if constexpr (kPair) {
        f = m == 0 ? Factor{item.rank, item.scale, stage + item.place, s_row, item.mask}
                   : Factor{item.up_rank, item.up_scale, stage + item.up_place, s_row + item.rank * 2u, item.mask};
        f.b += static_cast<uint32_t>(w_row[m] + g) * f.row_bytes();
        if (f.rank == 0) f.mask = 0;
      } else {
        const int row = w_row[m] - item.w_row;
        const bool real = static_cast<unsigned>(row) < static_cast<unsigned>(item.w_rows);
        f = {item.rank, item.scale, stage + item.place, s_row, real ? item.mask : 0u};
        f.b += static_cast<uint32_t>((real ? row : 0) + g) * f.row_bytes();  // not real: anything of the stage
      }
      f.mask >>= 2 * q;
    }
    return to;
  }
  // Columns [r, r + 4) of the rank, zeros behind it.
  __device__ static Fragments load(const Item& item, int r) {
    Fragments to;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const Factor& f = item.factor[m];
      const uint32_t k = static_cast<uint32_t>(max(min(r, f.rank - 4), 0)) * 2;
      to.n[m] = kPair || m == 0 ? load_shared8(f.s + k) : to.n[0];
      to.low[m] = load_shared8(f.b + k);
      to.high[m] = load_shared8(f.b + k + 8 * f.row_bytes());
      if (r >= f.rank) to.n[m] = {0, 0};
    }
    return to;
  }
  __device__ static void add_product(const Fragments& of, float (&c)[kM][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) multiply<T>(c[m], of.low[m].x, of.high[m].x, of.low[m].y, of.high[m].y, of.n[m].x, of.n[m].y);
  }
};

}  // namespace loquetier::cuda
