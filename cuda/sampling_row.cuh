// A row of logits as sampling (sampling.cu) sees it: the order of logits, the cluster's blocks and their slices, what they tell
// each other, and which tokens are still in.
#pragma once

#include <cooperative_groups.h>

#include <cfloat>
#include <climits>

#include "common.cuh"
#include "vocabulary.cuh"

namespace loquetier::cuda::sampling {

constexpr int kThreads = kSliceThreads;  // of a block
constexpr float kMassUnit = 0x1p40f;     // 2^23 tokens of mass 1 still fit 64 bits

// Order-preserving: larger float, larger key. NaN counts as the smallest.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // the two zeros are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float float_of(uint32_t key) {
  if (key == 0) return NAN;
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Largest value first, lowest token on ties, as one integer to maximise.
__device__ inline uint64_t ranked(float x, int token) {
  return uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ inline int32_t token_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }
__device__ inline float value_of(uint64_t rank) { return float_of(static_cast<uint32_t>(rank >> 32)); }

// What the warps of a row tell each other: words of each, in shared memory of every block.
class Meeting {
 public:
  static constexpr int kMostWords = 7;
  struct Words {
    uint64_t of[2][kMostWords][kVocabularyWarps];
  };

  __device__ explicit Meeting(Words& words) : words_(words) {}
  template <int kCount>
  __device__ void max(uint64_t (&x)[kCount]) {
    for (uint64_t& v : x) v = warp_max(v);
    const auto* all = exchange(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = warp_max(all[i][threadIdx.x % kWarp]);
  }
  __device__ uint64_t max(uint64_t x) {
    uint64_t one[1] = {x};
    max(one);
    return one[0];
  }
  template <int kCount>
  __device__ void sum(uint64_t (&x)[kCount]) {
    static_assert(kVocabularyWarps == kWarp);
    for (uint64_t& v : x) v = warp_sum(v);
    const auto* all = exchange(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = warp_sum(all[i][threadIdx.x % kWarp]);
  }
  __device__ uint64_t sum(uint64_t x) {
    uint64_t one[1] = {x};
    sum(one);
    return one[0];
  }
  // The row's sum in the order of log_sum_exp(), and the maximum of `best`.
  __device__ RowSum sum(const WarpSum& part, uint64_t& best) {
    const uint64_t own[3] = {static_cast<uint64_t>(__double_as_longlong(part.sum)), __float_as_uint(part.top), warp_max(best)};
    const auto* all = exchange(own);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    best = warp_max(all[2][lane]);
    return row_sum(
        {__longlong_as_double(static_cast<int64_t>(all[0][lane])), __uint_as_float(static_cast<uint32_t>(all[1][lane]))});
  }

 private:
  __device__ static uint64_t warp_max(uint64_t x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      x = ::max(x, static_cast<uint64_t>(__shfl_xor_sync(0xffffffffu, x, offset)));
    return x;
  }
  // Two places in turn: who writes to one has seen that everybody is done with what was there.
  template <int kCount>
  __device__ const uint64_t (*exchange(const uint64_t (&own)[kCount])) [kVocabularyWarps] {
    static_assert(kCount <= kMostWords);
    auto cluster = cooperative_groups::this_cluster();
    const int lane = static_cast<int>(threadIdx.x) % kWarp,
              warp = (static_cast<int>(cluster.block_rank()) * kThreads + static_cast<int>(threadIdx.x)) / kWarp;
    auto* here = words_.of[place_];
    place_ ^= 1;
    if (lane < kVocabularySlices) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) *cluster.map_shared_rank(&here[i][warp], static_cast<unsigned>(lane)) = own[i];
    }
    cluster.sync();
    return here;
  }

  Words& words_;
  int place_ = 0;
};

// The tokens still in: above the threshold, or at it and not after `last`.
struct Kept {
  float threshold = -FLT_MAX;  // so not those of -infinity
  int last = INT_MAX;
  __device__ bool has(float z, int token) const {  // without branches
    return (static_cast<int>(z > threshold) | (static_cast<int>(z == threshold) & static_cast<int>(token <= last))) != 0;
  }
};

constexpr int kBins = 2 * kThreads;  // the last one has what is further below
constexpr float kBinsOfUnit = 8;     // from the largest logit down

// x[i], x in registers.
template <class V>
__device__ inline V one_of(const V (&x)[4], int i) {
  return i < 2 ? i == 0 ? x[0] : x[1] : i == 2 ? x[2] : x[3];
}

// The tokens of a block: [begin, begin + count) of the row.
struct Slice {
  float* logits;
  int begin, count, cols;
  bool vectors;
  float inverse_temperature = 1;
  float top = 0;  // largest scaled logit of the row

  __device__ bool has(int token) const { return token >= begin && token - begin < count; }
  __device__ float& at(int token) const { return logits[token - begin]; }
  __device__ uint64_t mass(float z) const { return __float2ull_rz(exp_below(z - top) * kMassUnit); }
  // In bins.
  __device__ float depth(float z) const { return fminf((top - z) * kBinsOfUnit, kBins - 0.5f); }
  __device__ int bin(float z) const { return __float2int_rz(depth(z)); }
  // f(token) for this thread's tokens.
  template <class F>
  __device__ void each(F&& f) const {
    for (int t = begin + static_cast<int>(threadIdx.x); t < begin + count; t += kThreads) f(t);
  }
  // This warp's range: [first, end) of the slice.
  __device__ int first() const { return static_cast<int>(threadIdx.x) / kWarp * static_cast<int>(range_columns(cols)); }
  __device__ int end() const { return min(count, first() + static_cast<int>(range_columns(cols))); }
  // f(group, its first column) for this lane's.
  template <class F>
  __device__ void each_group(F&& f) const {
    for_each_group(logits, first(), end(), vectors, f);
  }
  // f(four scaled logits, token of the first) for this lane's; -infinity past the end.
  template <class F>
  __device__ void each_four(F&& f) const {
    const int last = end();
    int c = first() + static_cast<int>(threadIdx.x) % kWarp * 4;
    Pack<float, 4> next = load_columns(c, last);
#pragma unroll 1
    for (; c < last; c += kVectorStep) {
      Pack<float, 4> x = next;
      next = load_columns(c + kVectorStep, last);
#pragma unroll
      for (float& z : x.v) z *= inverse_temperature;
      f(x.v, begin + c);
    }
  }

 private:
  __device__ Pack<float, 4> load_columns(int c, int last) const {
    if (vectors && c < last) return load_pack<float, 4>(logits + c);
    Pack<float, 4> x;
#pragma unroll
    for (int k = 0; k < 4; ++k) x.v[k] = c + k < last ? logits[c + k] : -INFINITY;
    return x;
  }
};

// The largest logit that is a number, along a lane's columns.
class Best {
 public:
  __device__ explicit Best(const Slice& slice) : place_(slice.first() + static_cast<int>(threadIdx.x) % kWarp * 4) {
    there_ = place_ < slice.end();
  }
  __device__ void add(const Group& x, int64_t column) {
#pragma unroll
    for (int i = 0; i < kGroupVectors; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (x[i].v[k] > most_) most_ = x[i].v[k], place_ = static_cast<int>(column) + i * kVectorStep + k;
  }
  __device__ float logit() const { return most_; }
  __device__ uint64_t rank(const Slice& slice) const { return there_ ? ranked(most_, slice.begin + place_) : 0; }

 private:
  float most_ = -INFINITY;
  int place_;
  bool there_;
};

}  // namespace loquetier::cuda::sampling
