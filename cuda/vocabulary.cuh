// Log-softmax of one row of logits. Sampling and losses use this one order of sums, so the log-probability of a sampled token
// equals, bit for bit, the one that training computes for it.
//
// A row is cut into slices, each for 128 threads. One block may have all of them (log_sum_exp), or a cluster one a block, which
// then keeps it in shared memory (loss.cu): sums run along a thread's columns, over its warp, over the warps of all slices.
#pragma once

#include "common.cuh"

namespace loquetier::cuda {

constexpr int kVocabularySlices = 8;
constexpr int kSliceThreads = 128;
constexpr int kVocabularyThreads = kVocabularySlices * kSliceThreads;
constexpr int kVocabularyWarps = kVocabularyThreads / kWarp;

// log softmax(row)[i] = (row[i] - top) - log_sum. Kept apart: together they would lose the small digits of a row far from zero.
struct RowSum {
  float top;
  double log_sum;
  __device__ float logprob(float x) const { return static_cast<float>(static_cast<double>(x - top) - log_sum); }
};

// Columns of a slice: whole vectors of four.
__host__ __device__ constexpr int64_t slice_columns(int64_t cols) { return ceil_div(cols, kVocabularySlices * 4) * 4; }

// f(four values) for a thread's share of [begin, end) of the row; -infinity past the end.
template <class F>
__device__ inline void for_each_four(const float* row, int64_t begin, int64_t end, int thread, bool vectors, F&& f) {
  for (int64_t c = begin + thread * 4; c < end; c += kSliceThreads * 4) {
    Pack<float, 4> x;
    if (vectors) {
      x = load_pack<float, 4>(row + c);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x.v[i] = c + i < end ? row[c + i] : -INFINITY;
    }
    f(x);
  }
}

// By a block of kVocabularyThreads. `shared`: one double a warp.
__device__ inline RowSum log_sum_exp(const float* row, int64_t cols, double* shared) {
  const int64_t columns = slice_columns(cols), begin = threadIdx.x / kSliceThreads * columns, end = min(cols, begin + columns);
  const int thread = static_cast<int>(threadIdx.x) % kSliceThreads;
  const bool vectors = cols % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  float top = -INFINITY;
  for_each_four(row, begin, end, thread, vectors, [&](const Pack<float, 4>& x) {
    for (int i = 0; i < 4; ++i) top = fmaxf(top, x.v[i]);
  });
  top = block_max(top, reinterpret_cast<float*>(shared));
  __syncthreads();
  float sum = 0;  // of at most a few hundred terms a thread; doubles from there on
  for_each_four(row, begin, end, thread, vectors, [&](const Pack<float, 4>& x) {
    for (int i = 0; i < 4; ++i) sum += expf(x.v[i] - top);
  });
  return {top, log(block_sum(static_cast<double>(sum), shared))};
}

}  // namespace loquetier::cuda
