// The products that end in rank columns: out^T [ranks, rows] = Q P^T, summed over k. P holds the rows of the batch (k contiguous),
// Q is an adapter matrix: A [R, k] (shrink) or B [k, R] (backward_s, transposed in registers).
//
// The 8 warps of a block and the blocks of a cluster share out k: worker w of W takes the 64-wide pieces w, w + W, … (128 bytes of
// a row), and the partial sums meet in shared memory in a fixed order. So few rows still use many SMs, and A is read once a
// cluster.
#pragma once

#include <cooperative_groups.h>

#include "lora.cuh"

namespace loquetier::cuda {

// One product of one tile: P rows and Q of one group, site and rank range.
struct Reduction {
  const void* p = nullptr;  // element (row, k) at row * ld_p + k; row 0 is the tile's first
  int64_t ld_p = 0;
  int rows = 0;
  const void* q = nullptr;
  int k = 0;
  int rank = 0;                        // R of q: its rows (A) or its row length (B)
  int rank_begin = 0;                  // first rank of this chunk
  const uint64_t* row_keys = nullptr;  // of the tile's first row, with dropout
  uint32_t stream = 0;
  float dropout = 0;
};

// Floats of shared memory for the partial sums of a block.
constexpr int reduce_floats(int m_tiles, int n_tiles) { return kLoraWarps * m_tiles * n_tiles * 128; }

// Fragments of one 32-wide step of k. Word i of `p` and `q` stands for k = 8q + 2i, 8q + 2i + 1 of lane q.
template <int MT, int NT>
struct ReduceStep {
  uint4 p[NT];
  uint4 low[MT], high[MT];  // ranks g and g + 8
};

// Fast: no predicates. Rows and ranks past the end repeat the last one (their sums are not used), and past the end of k only P is
// made zero.
template <int MT, int NT, bool kDropout, bool kFast>
__device__ inline void load_rows(const Reduction& r, int k0, ReduceStep<MT, NT>& step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int k = k0 + 8 * q;
  const bool whole = !kFast || k0 + 32 <= r.k;  // the same for the whole warp
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int row = kFast ? min(n * 8 + g, r.rows - 1) : n * 8 + g;
    step.p[n] = {0, 0, 0, 0};
    if (!kFast && row >= r.rows) continue;
    const uint16_t* from = static_cast<const uint16_t*>(r.p) + row * r.ld_p;
    if constexpr (kFast) {
      // Not through the read-only path: the compiler may move such a load in front of the wait for the launch that writes the rows.
      if (whole || k < r.k) step.p[n] = *reinterpret_cast<const uint4*>(from + k);
    } else {
      step.p[n] = load8<false>(from, k, r.k);
    }
    if constexpr (kDropout) step.p[n] = masked(step.p[n], keep8(r.row_keys[row], r.stream, k, r.dropout));
  }
}

template <int MT, int NT, bool kTransposed, bool kFast>
__device__ inline void load_matrix(const Reduction& r, int k0, ReduceStep<MT, NT>& step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int k = k0 + 8 * q;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const int rank = r.rank_begin + m * 16;
    if constexpr (!kTransposed) {
      const uint16_t* a = static_cast<const uint16_t*>(r.q);
      if constexpr (kFast) {
        const int at = min(k, r.k - 8);
        step.low[m] = load8<true>(a + int64_t{min(rank + g, r.rank - 1)} * r.k, at, at + 1);
        step.high[m] = load8<true>(a + int64_t{min(rank + g + 8, r.rank - 1)} * r.k, at, at + 1);
      } else {
        step.low[m] = step.high[m] = {0, 0, 0, 0};
        if (rank + g < r.rank) step.low[m] = load8<false>(a + int64_t{rank + g} * r.k, k, r.k);
        if (rank + g + 8 < r.rank) step.high[m] = load8<false>(a + int64_t{rank + g + 8} * r.k, k, r.k);
      }
    } else {
      // Row j of the block for word i is k0 + 8 (j / 2) + (j % 2) + 2 i, so that after the transposition lane q has k = 8q + 2i, 8q
      // + 2i + 1.
      uint32_t low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = k0 + 8 * (g / 2) + g % 2 + 2 * i;
        if constexpr (kFast) {
          const uint16_t* b = static_cast<const uint16_t*>(r.q) + int64_t{min(row, r.k - 1)} * r.rank;
          const int c0 = min(rank + 2 * q, r.rank - 2), c1 = min(rank + 8 + 2 * q, r.rank - 2);
          low[i] = load2<true>(b, c0, c0 + 1);
          high[i] = load2<true>(b, c1, c1 + 1);
        } else {
          const uint16_t* b = static_cast<const uint16_t*>(r.q) + int64_t{row} * r.rank;
          low[i] = row < r.k ? load2<false>(b, rank + 2 * q, r.rank) : 0;
          high[i] = row < r.k ? load2<false>(b, rank + 8 + 2 * q, r.rank) : 0;
        }
      }
      step.low[m] = {low[0], low[1], low[2], low[3]};
      step.high[m] = {high[0], high[1], high[2], high[3]};
    }
  }
}

template <class T, int MT, int NT, bool kTransposed>
__device__ inline void multiply_step(ReduceStep<MT, NT>& step, int n_tiles, float (&sum)[MT][NT][4]) {
  if constexpr (kTransposed) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      step.low[m] = {transpose(step.low[m].x), transpose(step.low[m].y), transpose(step.low[m].z), transpose(step.low[m].w)};
      step.high[m] = {transpose(step.high[m].x), transpose(step.high[m].y), transpose(step.high[m].z), transpose(step.high[m].w)};
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    if (n >= n_tiles) continue;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      multiply<T>(sum[m][n], step.low[m].x, step.high[m].x, step.low[m].y, step.high[m].y, step.p[n].x, step.p[n].y);
      multiply<T>(sum[m][n], step.low[m].z, step.high[m].z, step.low[m].w, step.high[m].w, step.p[n].z, step.p[n].w);
    }
  }
}

// Steps whose loads are in flight together, as many as registers allow when nothing else is held.
template <int MT, int NT, bool kDropout, bool kFast>
__host__ __device__ constexpr int steps_ahead() {
  if (!kFast) return 1;
  if (NT <= 2) return MT * NT <= 2 ? 8 : MT * NT <= 4 ? 4 : 2;
  return MT <= 3 && !kDropout ? 2 : 1;
}

// Sums the product over the cluster's share of k. Afterwards `shared` holds, in the first MT * NT * 128 floats of every block of
// the cluster, that block's partial sums: element ((m * NT + n) * 4 + i) * 32 + lane of fragment c[i]. The caller synchronises the
// cluster before reading.
template <class T, int MT, int NT, bool kDropout, bool kTransposed, bool kFast, int kAhead>
__device__ inline void reduce_k(const Reduction& r, int cluster_rank, int cluster_size, float* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int n_tiles = (r.rows + 7) / 8;
  const int workers = kLoraWarps * cluster_size, worker = cluster_rank * kLoraWarps + warp;
  float sum[MT][NT][4] = {};
  if (worker * 64 >= r.k) start_after_previous();  // no piece of k for this warp
  // Step s of this worker: half s % 2 of its piece s / 2.
  const auto k_of = [&](int s) { return (worker + (s / 2) * workers) * 64 + (s % 2) * 32; };
#pragma unroll 1
  for (int s = 0; k_of(s) < r.k; s += kAhead) {
    ReduceStep<MT, NT> step[kAhead];
    // The matrix is an adapter's and does not change while steps are computed: its loads need not wait for the launch in front.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_matrix<MT, NT, kTransposed, kFast>(r, k_of(s + i), step[i]);
    if (s == 0) start_after_previous();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_rows<MT, NT, kDropout, kFast>(r, k_of(s + i), step[i]);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) multiply_step<T, MT, NT, kTransposed>(step[i], n_tiles, sum);
  }

  constexpr int kTile = MT * NT * 128;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shared[warp * kTile + ((m * NT + n) * 4 + i) * kWarp + lane] = sum[m][n][i];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < kTile; e += kLoraThreads) {
    float total = shared[e];
    for (int w = 1; w < kLoraWarps; ++w) total += shared[w * kTile + e];
    shared[e] = total;  // only this thread reads or writes element e of any warp
  }
}

// The sum of element e over the cluster's blocks, in order of rank.
__device__ inline float cluster_total(cooperative_groups::cluster_group& cluster, float* shared, int e, int cluster_size) {
  float total = 0;
#pragma unroll 1
  for (int b = 0; b < cluster_size; b += 4) {
    float part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      part[i] = b + i < cluster_size ? *cluster.map_shared_rank(shared + e, static_cast<unsigned>(b + i)) : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += part[i];
  }
  return total;
}

// Where element e of the tile belongs.
template <int NT>
__device__ inline void reduce_place(int e, int& rank, int& row) {
  const int lane = e % kWarp, i = e / kWarp % 4, n = e / (kWarp * 4) % NT, m = e / (kWarp * 4 * NT);
  rank = m * 16 + lane / 4 + 8 * (i / 2);
  row = n * 8 + lane % 4 * 2 + i % 2;
}

}  // namespace loquetier::cuda
