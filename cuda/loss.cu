// Losses of rows with a target, over the vocabulary: log-softmax in f32 (stable), the gradient in the same launch.
#include <cooperative_groups.h>

#include "common.cuh"
#include "cuda_ops.h"
#include "tma.cuh"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int64_t kMostSliceColumns = 50 * 1024;  // that fit in shared memory: a vocabulary of 400,000

// `bytes` of global memory, a multiple of 16, to shared memory.
__device__ inline void load_slice(void* to, const void* from, uint32_t bytes, uint64_t& arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&arrival))
               : "memory");
}

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

// Any columns and alignment: a block reads its row three times.
template <class D>
__global__ void loss_kernel(const float* logits, int64_t ld, const LossRow* rows, D* dlogits, int64_t ld_grad, float* logprob,
                            float* loss, int64_t cols) {
  __shared__ double shared[kVocabularyWarps];
  const int64_t row = blockIdx.x;
  const float* x = logits + row * ld;
  const RowSum sum = log_sum_exp(x, cols, shared);
  const LossRow target = rows[row];
  const float p = sum.logprob(x[target.target]), log_sum = static_cast<float>(sum.log_sum);
  const LossValue value = loss_at(target, p);
  if (threadIdx.x == 0) {
    logprob[row] = p;
    loss[row] = value.loss;
  }
  if (dlogits == nullptr) return;
  D* d = dlogits + row * ld_grad;
  for (int64_t c = threadIdx.x; c < cols; c += kVocabularyThreads)
    d[c] = from_float<D>(value.slope * ((c == target.target ? 1.0f : 0.0f) - expf(x[c] - sum.top - log_sum)));
}

// A cluster has a row, each of its blocks one slice in shared memory: logits are read once. Several blocks of other clusters on a
// processor load while this one computes.
template <class D>
__global__ void __launch_bounds__(kSliceThreads)
    loss_slices_kernel(const float* logits, int64_t ld, const LossRow* rows, D* dlogits, int64_t ld_grad, float* logprob,
                       float* loss, int64_t cols) {
  extern __shared__ __align__(16) float held[];  // [slice_columns(cols)]
  __shared__ float tops[kVocabularyWarps];       // of the warps of all slices
  __shared__ double sums[kVocabularyWarps];
  __shared__ uint64_t arrival;
  auto cluster = cooperative_groups::this_cluster();
  const int slice = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int64_t row = blockIdx.x / kVocabularySlices, columns = slice_columns(cols), begin = min(cols, slice * columns);
  const int64_t count = min(columns, cols - begin);
  const float* x = logits + row * ld;
  if (thread == 0) {
    barrier_init(arrival, 1);
    barrier_init_fence();
    barrier_expect(arrival, static_cast<uint32_t>(count * 4));
    if (count > 0) load_slice(held, x + begin, static_cast<uint32_t>(count * 4), arrival);
  }
  const LossRow target = rows[row];
  const float at_target = x[target.target];
  cluster.sync();  // every block of it is there and may be written to
  barrier_wait(arrival, 0);

  // One value of every warp to every block.
  const auto share = [&](auto* all, auto value) {
    if (lane < kVocabularySlices)
      cluster.map_shared_rank(all, static_cast<unsigned>(lane))[slice * (kSliceThreads / kWarp) + thread / kWarp] = value;
    cluster.sync();
  };
  float top = -INFINITY;
  for_each_four(held, 0, count, thread, true, [&](const Pack<float, 4>& v) {
    for (int i = 0; i < 4; ++i) top = fmaxf(top, v.v[i]);
  });
  share(tops, warp_max(top));
  top = tops[0];
  for (int i = 1; i < kVocabularyWarps; ++i) top = fmaxf(top, tops[i]);
  float part = 0;
  for (int64_t c = thread * 4; c < count; c += kSliceThreads * 4) {
    Pack<float, 4> v = load_pack<float, 4>(held + c);
    for (int i = 0; i < 4; ++i) part += v.v[i] = expf(v.v[i] - top);
    store_pack<float, 4>(held + c, v);
  }
  share(sums, warp_sum(static_cast<double>(part)));
  double total = sums[0];
  for (int i = 1; i < kVocabularyWarps; ++i) total += sums[i];

  const float p = RowSum{top, log(total)}.logprob(at_target), inverse = static_cast<float>(1 / total);
  const LossValue value = loss_at(target, p);
  if (slice == 0 && thread == 0) {
    logprob[row] = p;
    loss[row] = value.loss;
  }
  if (dlogits == nullptr) return;
  D* d = dlogits + row * ld_grad + begin;
  const int64_t own_target = target.target - begin;
  for (int64_t c = thread * 4; c < count; c += kSliceThreads * 4) {
    const Pack<float, 4> v = load_pack<float, 4>(held + c);
    Pack<D, 4> out;
    for (int i = 0; i < 4; ++i) out.v[i] = from_float<D>(value.slope * ((c + i == own_target ? 1.0f : 0.0f) - v.v[i] * inverse));
    store_pack<D, 4>(d + c, out);
  }
}

}  // namespace

void CudaOps::token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) {
  expect("token_loss", "logits", logits, DType::f32, -1, -1);
  if (dlogits.data != nullptr) expect("token_loss", "dlogits", dlogits, dtype_, logits.rows, logits.cols);
  if (logits.size() == 0) return;
  device_.use();
  const bool slices = rows_of_vectors(logits) && (dlogits.data == nullptr || rows_of_vectors(dlogits)) &&
                      slice_columns(logits.cols) <= kMostSliceColumns;
  dispatch_half(dtype_, [&]<class T>() {
    const Launch launch = slices
                              ? Launch{dim3(static_cast<unsigned>(logits.rows * kVocabularySlices)), dim3(kSliceThreads),
                                       static_cast<size_t>(slice_columns(logits.cols)) * sizeof(float), stream(), kVocabularySlices}
                              : Launch{dim3(static_cast<unsigned>(logits.rows)), dim3(kVocabularyThreads), 0, stream()};
    launch(slices ? loss_slices_kernel<T> : loss_kernel<T>, static_cast<const float*>(logits.data), logits.ld, rows,
           static_cast<T*>(dlogits.data), dlogits.ld, logprob, loss, logits.cols);
  });
}

}  // namespace loquetier::cuda
