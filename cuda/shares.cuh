// Adding up the shares of k that a product of a decode step has left (linear_decode.h).
#pragma once

#include "common.cuh"
#include "linear_decode.h"

namespace loquetier::cuda {

// N neighbours of a row, whole vectors of four, in the order of the shares.
template <int N>
__device__ inline Pack<float, N> sum_of_shares(const KShares& of, int64_t row, int64_t column) {
  const float* from = of.sums + row * of.ld + column;
  Pack<float, N> sum = {};
#pragma unroll 4
  for (int share = 0; share < of.count; ++share, from += of.step) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + i);
      sum.v[i] += part.x, sum.v[i + 1] += part.y, sum.v[i + 2] += part.z, sum.v[i + 3] += part.w;
    }
  }
  return sum;
}

// The same sum, the loads of kTogether shares on their way at once: for whoever has the registers and waits for nothing else.
template <int N, int kTogether>
__device__ inline Pack<float, N> sum_of_shares_together(const KShares& of, int64_t row, int64_t column) {
  const float* from = of.sums + row * of.ld + column;
  Pack<float, N> sum = {};
#pragma unroll 1
  for (int left = of.count; left > 0; left -= kTogether, from += kTogether * of.step) {
    float4 part[kTogether][N / 4];
#pragma unroll
    for (int share = 0; share < kTogether; ++share) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i)
        part[share][i] = share < left ? *reinterpret_cast<const float4*>(from + share * of.step + 4 * i) : float4{};
    }
#pragma unroll
    for (int share = 0; share < kTogether; ++share) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum.v[i] += (&part[share][i / 4].x)[i % 4];
    }
  }
  return sum;
}

}  // namespace loquetier::cuda
