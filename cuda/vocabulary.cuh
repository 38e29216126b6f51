// Log-softmax of one row of logits. Sampling and losses use this one function, so the log-probability of a sampled token equals,
// bit for bit, the one that training computes for it.
#pragma once

#include "common.cuh"

namespace loquetier::cuda {

constexpr int kVocabularyThreads = 1024;  // of a row's block

// log softmax(row)[i] = (row[i] - top) - log_sum. Kept apart: together they would lose the small digits of a row far from zero.
struct RowSum {
  float top;
  double log_sum;
  __device__ float logprob(float x) const { return static_cast<float>(static_cast<double>(x - top) - log_sum); }
};

// `shared`: one double a warp.
__device__ inline RowSum log_sum_exp(const float* row, int64_t cols, double* shared) {
  float top = -INFINITY;
  for (int64_t c = threadIdx.x; c < cols; c += kVocabularyThreads) top = fmaxf(top, row[c]);
  top = block_max(top, reinterpret_cast<float*>(shared));
  __syncthreads();
  float sum = 0;  // of at most a few hundred terms a thread; doubles from there on
  for (int64_t c = threadIdx.x; c < cols; c += kVocabularyThreads) sum += expf(row[c] - top);
  return {top, log(block_sum(static_cast<double>(sum), shared))};
}

}  // namespace loquetier::cuda
