// The products that start from rank columns: out[rows, n] += scale * S Q^T. S holds rank columns of the batch's rows, Q is an
// adapter matrix: B [n, R] (expand) or A [R, n] (backward_x, transposed in registers). Bound by the traffic of `out`, which is read
// and written 16 bytes a lane.
//
// A warp owns 64 columns: m-tile t of four, slots g and g + 8, stand for columns 8g + 2t and 8g + 2t + 1, so that a lane ends up
// with eight neighbouring columns of two rows.
#pragma once

#include "lora.cuh"

namespace loquetier::cuda {

constexpr int kSpreadColumns = 64;  // of a warp

// Fragments of Q for 64 columns from n0 on and ranks [r, r + 16): k order 4q, 4q + 1 (words 0, 1), 4q + 2, 4q + 3 (words 2, 3).
struct SpreadFragments {
  uint32_t a[4][4];  // [m-tile][word]
};

template <bool kTransposed, bool kFast>
__device__ inline void load_spread(const void* q_matrix, int n_total, int rank, int n0, int r, SpreadFragments& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const uint16_t* m = static_cast<const uint16_t*>(q_matrix);
  if constexpr (!kTransposed && kFast) {
    // No predicates: columns past the end repeat the last one (they are not stored), ranks past the end the last four (S is zero
    // there).
    const int column = min(r + 4 * q, rank - 4);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int n = min(n0 + 8 * g + 2 * t, n_total - 2);
      const uint2 low = load4<true>(m + int64_t{n} * rank, column, column + 1),
                  high = load4<true>(m + int64_t{n + 1} * rank, column, column + 1);
      f.a[t][0] = low.x;
      f.a[t][1] = high.x;
      f.a[t][2] = low.y;
      f.a[t][3] = high.y;
    }
  } else if constexpr (!kTransposed) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int n = n0 + 8 * g + 2 * t;
      const uint2 low = n < n_total ? load4<false>(m + int64_t{n} * rank, r + 4 * q, rank) : uint2{0, 0};
      const uint2 high = n + 1 < n_total ? load4<false>(m + int64_t{n + 1} * rank, r + 4 * q, rank) : uint2{0, 0};
      f.a[t][0] = low.x;
      f.a[t][1] = high.x;
      f.a[t][2] = low.y;
      f.a[t][3] = high.y;
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Row j of the block is rank r + 4 (j / 2) + (j % 2) + 2 half: after the transposition lane q has ranks 4q + 2 half and the
      // next.
      const int row = r + 4 * (g / 2) + g % 2 + 2 * half;
      const uint16_t* from = m + int64_t{row} * n_total;
      uint4 v0 = {0, 0, 0, 0}, v1 = {0, 0, 0, 0};
      if (row < rank) {
        v0 = load8<kFast>(from, n0 + 16 * q, n_total);
        v1 = load8<kFast>(from, n0 + 16 * q + 8, n_total);
      }
      const uint32_t w0[4] = {v0.x, v0.y, v0.z, v0.w}, w1[4] = {v1.x, v1.y, v1.z, v1.w};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        f.a[t][2 * half] = transpose(__byte_perm(w0[t], w1[t], 0x5410));
        f.a[t][2 * half + 1] = transpose(__byte_perm(w0[t], w1[t], 0x7632));
      }
    }
  }
}

// old + add of eight neighbours in a 16-bit type.
template <class T>
__device__ inline uint4 sum8(uint4 old, const float (&add)[8]) {
  return {pack2<T>(low_float<T>(old.x) + add[0], high_float<T>(old.x) + add[1]),
          pack2<T>(low_float<T>(old.y) + add[2], high_float<T>(old.y) + add[3]),
          pack2<T>(low_float<T>(old.z) + add[4], high_float<T>(old.z) + add[5]),
          pack2<T>(low_float<T>(old.w) + add[6], high_float<T>(old.w) + add[7])};
}

// Adds eight neighbouring values to out[0 .. 8), or overwrites it; `columns` of them exist. For f32 and for layouts that are not
// fast.
template <class Y, bool kOverwrite, bool kFast>
__device__ inline void add8(Y* out, const float (&add)[8], int64_t columns) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (kFast || i < columns) out[i] = from_float<Y>((kOverwrite ? 0.0f : to_float(out[i])) + add[i]);
  }
}

}  // namespace loquetier::cuda
