// Losses of rows with a target, over the vocabulary: log-softmax in f32 (stable), the gradient in the same launch.
#include <cooperative_groups.h>

#include <algorithm>

#include "cluster.cuh"
#include "cuda_ops.h"
#include "tma.cuh"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kMostPieces = static_cast<int>(ceil_div(kMostSliceColumns / kSliceWarps, kGroupColumns));  // of a warp's range

struct LossValue {
  float loss = 0;
  float slope = 0;  // dloss / dp
};

__device__ LossValue loss_of(const LossRow& row, float p) {
  if (row.kind == LossKind::cross_entropy || row.kind == LossKind::weighted_logprob) return {-row.weight * p, -row.weight};
  const float ratio = expf(p - row.old_logprob), plain = ratio * row.advantage;
  if (row.kind == LossKind::importance_sampling) return {-row.weight * plain, -row.weight * plain};
  const float clipped = fminf(fmaxf(ratio, 1.0f - row.clip_low), 1.0f + row.clip_high) * row.advantage;
  if (plain <= clipped) return {-row.weight * plain, -row.weight * plain};
  return {-row.weight * clipped, 0.0f};  // the clipped ratio is a constant
}

// What the row with this target loses, and the factor of its gradient.
__device__ LossValue loss_at(const LossRow& row, float p) {
  LossValue value = loss_of(row, p);
  if (!isfinite(value.loss)) value.slope = NAN;  // the row's gradient becomes NaN: the norm tells, and the update is skipped
  return value;
}

// dloss / dx of the columns that are not the target; at the target the slope comes on top.
struct Gradient {
  float slope, top, log2_sum;
  __device__ Gradient(const LossValue& value, const RowSum& sum)
      : slope(value.slope), top(sum.top), log2_sum(static_cast<float>(sum.log_sum * kLog2E)) {}
  __device__ float operator()(float x) const { return -slope * power_of_2(fmaf(x - top, kLog2E, -log2_sum)); }
  __device__ float at_target(float x) const { return slope + (*this)(x); }
};

// A block has a row: without a gradient, and any columns and alignment. The gradient reads the row again.
template <class D>
__global__ void __launch_bounds__(kVocabularyThreads) loss_kernel(const float* logits, int64_t ld, const LossRow* rows, D* dlogits,
                                                                  int64_t ld_grad, float* logprob, float* loss, int64_t cols) {
  __shared__ WarpSum shared[kVocabularyWarps];
  const int64_t row = blockIdx.x;
  const float* x = logits + row * ld;
  const RowSum sum = log_sum_exp(x, cols, shared);
  const LossRow target = rows[row];
  const float p = sum.logprob(x[target.target]);
  const LossValue value = loss_at(target, p);
  if (threadIdx.x == 0) {
    logprob[row] = p;
    loss[row] = value.loss;
  }
  if (dlogits == nullptr) return;
  const Gradient gradient(value, sum);
  D* d = dlogits + row * ld_grad;
  for (int64_t c = threadIdx.x; c < cols; c += kVocabularyThreads)
    d[c] = from_float<D>(c == target.target ? gradient.at_target(x[c]) : gradient(x[c]));
}

// The gradient too, logits read once: a cluster has a row at a time, each of its blocks one slice in shared memory. A warp loads
// its range of the slice in pieces, a group of every lane each, and those of the cluster's next row as soon as it is done with this
// one's; the warps meet once a row. 1024 x 128,256 with three blocks a processor: 238 us; with one row a cluster half as long
// again, 16 bytes a store 236; warps of half the columns, bulk stores, other hints for the L2: 2 % better at most.
template <class D>
__global__ void __launch_bounds__(kSliceThreads)
    loss_slices_kernel(const float* logits, int64_t ld, const LossRow* rows, D* dlogits, int64_t ld_grad, float* logprob,
                       float* loss, int64_t count, int cols) {
  extern __shared__ __align__(16) float held[];  // [slice_columns(cols)]
  __shared__ WarpSum sums[2][kVocabularyWarps];  // of the warps of all slices, in turn for a row and the next
  __shared__ uint64_t met[2], loaded[kSliceWarps][kMostPieces];
  auto cluster = cooperative_groups::this_cluster();
  const int slice = static_cast<int>(cluster.block_rank()), clusters = static_cast<int>(gridDim.x) / kVocabularySlices;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int range = static_cast<int>(range_columns(cols)), begin = min(cols, (slice * kSliceWarps + warp) * range);
  const int end = min(range, cols - begin), pieces = (end + kGroupColumns - 1) / kGroupColumns;  // of the warp's columns
  float* x = held + warp * range;
  const auto load = [&](int64_t row, int piece) {
    if (row >= count || lane != 0) return;
    const int c = piece * kGroupColumns;
    const uint32_t bytes = static_cast<uint32_t>(min(kGroupColumns, end - c)) * 4;
    barrier_expect(loaded[warp][piece], bytes);
    bulk_load(shared_address(x + c), logits + row * ld + begin + c, bytes, loaded[warp][piece], kNoHint);
  };

  int64_t row = blockIdx.x / kVocabularySlices;
  if (lane == 0) {
    if (warp == 0) barrier_init(met[0], 1), barrier_init(met[1], 1);
    for (int i = 0; i < pieces; ++i) barrier_init(loaded[warp][i], 1);
    barrier_init_fence();
  }
  for (int i = 0; i < pieces; ++i) load(row, i);
  LossRow target = rows[row];
  cluster.sync();  // every block of it is there and may be written to
  for (uint32_t n = 0; row < count; row += clusters, ++n) {
    const float at_target = logits[row * ld + target.target];
    LaneSum part;
    for (int i = 0; i < pieces; ++i) {
      barrier_wait(loaded[warp][i], n % 2);
      const int c = i * kGroupColumns + lane * 4;
      if (c >= end) continue;
      Group group;
      load_group(x, c, end, true, group);
      part.add(group);
    }

    // A warp's sum to every block. Who sends into a place again has all sums of the row between: nobody reads there any more.
    const WarpSum own = part.of_warp();
    WarpSum* all = sums[n % 2];
    uint64_t& arrival = met[n % 2];
    if (threadIdx.x == 0) barrier_expect(arrival, sizeof(sums[0]));
    if (lane < kVocabularySlices) {
      send16(shared_address(&all[slice * kSliceWarps + warp]), shared_address(&arrival), static_cast<uint32_t>(lane),
             *reinterpret_cast<const float4*>(&own));
    }
    const LossRow next = row + clusters < count ? rows[row + clusters] : target;
    wait_arrival(shared_address(&arrival), n / 2 % 2);
    const RowSum sum = row_sum(all[lane]);

    const float p = sum.logprob(at_target);
    const LossValue value = loss_at(target, p);
    if (slice == 0 && threadIdx.x == 0) {
      logprob[row] = p;
      loss[row] = value.loss;
    }
    const Gradient gradient(value, sum);
    D* d = dlogits + row * ld_grad + begin;
    for (int i = 0; i < pieces; ++i) {
      const int c = i * kGroupColumns + lane * 4;
      Group group;
      load_group(x, c, end, true, group);
#pragma unroll
      for (int j = 0; j < kGroupVectors; ++j) {
        const auto& v = group[j].v;
        const uint2 out = {pack2<D>(gradient(v[0]), gradient(v[1])), pack2<D>(gradient(v[2]), gradient(v[3]))};
        // By name: the compiler cuts a plain store in two, far from each other.
        if (c + j * kVectorStep < end) __stwb(reinterpret_cast<uint2*>(d + c + j * kVectorStep), out);
      }
      __syncwarp();
      load(row + clusters, i);
    }
    const int own_target = target.target - begin;
    if (own_target >= 0 && own_target < end && own_target % kVectorStep / 4 == lane)  // the lane that has stored there
      d[own_target] = from_float<D>(gradient.at_target(at_target));
    target = next;
  }
  cluster.sync();  // nobody sends any more
}

}  // namespace

void CudaOps::token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) {
  expect("token_loss", "logits", logits, DType::f32, -1, -1);
  if (dlogits.data != nullptr) expect("token_loss", "dlogits", dlogits, dtype_, logits.rows, logits.cols);
  if (logits.size() == 0) return;
  device_.use();
  const size_t shared = static_cast<size_t>(slice_columns(logits.cols)) * sizeof(float);
  const bool slices = dlogits.data != nullptr && rows_of_vectors(logits) && rows_of_vectors(dlogits) &&
                      slice_columns(logits.cols) <= kMostSliceColumns;
  dispatch_half(dtype_, [&]<class T>() {
    const auto* x = static_cast<const float*>(logits.data);
    auto* d = static_cast<T*>(dlogits.data);
    if (slices) {
      int& most = loss_clusters_[shared];
      if (most == 0) most = std::max(clusters_at_once(loss_slices_kernel<T>, kVocabularySlices, kSliceThreads, shared), 1);
      const int64_t clusters = std::min<int64_t>(logits.rows, most);
      Launch{dim3(static_cast<unsigned>(clusters * kVocabularySlices)), dim3(kSliceThreads), shared, stream(), kVocabularySlices}(
          loss_slices_kernel<T>, x, logits.ld, rows, d, dlogits.ld, logprob, loss, logits.rows, static_cast<int>(logits.cols));
    } else {
      Launch{dim3(static_cast<unsigned>(logits.rows)), dim3(kVocabularyThreads), 0, stream()}(
          loss_kernel<T>, x, logits.ld, rows, d, dlogits.ld, logprob, loss, logits.cols);
    }
  });
}

}  // namespace loquetier::cuda
