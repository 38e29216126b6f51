// Log-softmax of one row of logits. Sampling and losses use this one order of sums, so the log-probability of a sampled token
// equals, bit for bit, the one that training computes for it.
//
// A row is cut into ranges, each for a warp: one block may have all of them (log_sum_exp), or the blocks of a cluster one slice,
// kSliceWarps of them, each. A lane takes its vectors of a range in groups: the group's maximum, then its exponentials below the
// largest logit so far, in four sums, one for each place in a vector. Sums of lanes and then of warps are brought to the same top
// and added up by shuffles. The row is read once.
#pragma once

#include <cfloat>

#include "common.cuh"

namespace loquetier::cuda {

constexpr int kVocabularySlices = 8;
constexpr int kSliceWarps = 4;
constexpr int kSliceThreads = kSliceWarps * kWarp;
constexpr int kVocabularyThreads = kVocabularySlices * kSliceThreads;
constexpr int kVocabularyWarps = kVocabularyThreads / kWarp;
constexpr int64_t kMostSliceColumns = 50 * 1024;            // that fit in shared memory: a vocabulary of 400,000
constexpr int kGroupVectors = 8;                            // of four columns, a lane's
constexpr int kVectorStep = 4 * kWarp;                      // columns from one of a lane's vectors to the next
constexpr int kGroupColumns = kGroupVectors * kVectorStep;  // of a warp

// Columns of a warp's range: whole vectors of eight. A slice has kSliceWarps of them.
__host__ __device__ constexpr int64_t range_columns(int64_t cols) { return ceil_div(cols, kVocabularyWarps * 8) * 8; }
__host__ __device__ constexpr int64_t slice_columns(int64_t cols) { return kSliceWarps * range_columns(cols); }

// e^x in the fewest instructions, for x <= 0: to two units of the last place, and |x| / 2^24 for the rounding of x log2(e).
__device__ inline float exp_below(float x) { return power_of_2(x * kLog2E); }

// A lane's vectors that are loaded together, -infinity past the end of the row.
using Group = Pack<float, 4>[kGroupVectors];

// From the lane's column `begin` on.
__device__ inline void load_group(const float* row, int64_t begin, int64_t end, bool vectors, Group& x) {
  if (vectors && begin + (kGroupVectors - 1) * kVectorStep < end) {
#pragma unroll
    for (int i = 0; i < kGroupVectors; ++i) x[i] = load_pack<float, 4>(row + begin + i * kVectorStep);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroupVectors; ++i) {
    const int64_t c = begin + i * kVectorStep;
    if (vectors && c < end) {
      x[i] = load_pack<float, 4>(row + c);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i].v[k] = !vectors && c + k < end ? row[c + k] : -INFINITY;
    }
  }
}

// f(group, its first column) for a lane's share of a range of the row.
template <class F>
__device__ inline void for_each_group(const float* row, int64_t begin, int64_t end, bool vectors, F&& f) {
#pragma unroll 1
  for (int64_t c = begin + threadIdx.x % kWarp * 4; c < end; c += kGroupColumns) {
    Group x;
    load_group(row, c, end, vectors, x);
    f(x, c);
  }
}

// Sum of e^(x - top) over the columns of a warp. 16 bytes: one message.
struct alignas(16) WarpSum {
  double sum;
  float top;
};

// log softmax(row)[i] = (row[i] - top) - log_sum. Kept apart: together they would lose the small digits of a row far from zero.
struct RowSum {
  float top;
  double log_sum;
  __device__ float logprob(float x) const { return static_cast<float>(static_cast<double>(x - top) - log_sum); }
};

// The sum along a lane's columns, relative to the largest of them so far. The first top is finite, so that -infinity is below it.
class LaneSum {
 public:
  __device__ void add(const Group& x) {
    float most[4] = {top_, top_, top_, top_};
#pragma unroll
    for (int i = 0; i < kGroupVectors; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) most[k] = fmaxf(most[k], x[i].v[k]);
    const float top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])), less = exp_below(top_ - top);
    top_ = top;
#pragma unroll
    for (float& sum : sums_) sum *= less;
#pragma unroll
    for (int i = 0; i < kGroupVectors; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums_[k] += exp_below(x[i].v[k] - top);
  }
  __device__ WarpSum of_warp() const {
    const float top = warp_max(top_);
    const double sum = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    return {warp_sum(sum * exp_below(top_ - top)), top};
  }

 private:
  float top_ = -FLT_MAX;
  float sums_[4] = {};
};

// Of a whole row: lane i has the sum of its warp i.
__device__ inline RowSum row_sum(const WarpSum& of_warp) {
  static_assert(kVocabularyWarps == kWarp);
  const float top = warp_max(of_warp.top);
  return {top, log(warp_sum(of_warp.sum * exp_below(of_warp.top - top)))};
}

// By a block of kVocabularyThreads.
__device__ inline RowSum log_sum_exp(const float* row, int64_t cols, WarpSum* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t columns = range_columns(cols), begin = warp * columns, end = min(cols, begin + columns);
  LaneSum sum;
  for_each_group(row, begin, end, cols % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0,
                 [&](const Group& x, int64_t) { sum.add(x); });
  const WarpSum own = sum.of_warp();
  if (threadIdx.x % kWarp == 0) shared[warp] = own;
  __syncthreads();
  return row_sum(shared[threadIdx.x % kWarp]);
}

}  // namespace loquetier::cuda
