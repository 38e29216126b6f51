// Losses of rows with a target, over the vocabulary: one block a row, log-softmax in f32 (stable), the gradient in the same launch.
#include "common.cuh"
#include "cuda_ops.h"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = kVocabularyThreads;

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

template <class D, int N>
__global__ void loss_kernel(const float* logits, int64_t ld, const LossRow* rows, D* dlogits, int64_t ld_grad, float* logprob,
                            float* loss, int64_t cols) {
  __shared__ double shared[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const float* x = logits + row * ld;
  const RowSum sum = log_sum_exp(x, cols, shared);
  const LossRow target = rows[row];
  const float p = sum.logprob(x[target.target]), log_sum = static_cast<float>(sum.log_sum);
  LossValue value = loss_of(target, p);
  if (!isfinite(value.loss)) value.slope = NAN;  // the row's gradient becomes NaN: the norm tells, and the update is skipped
  if (threadIdx.x == 0) {
    logprob[row] = p;
    loss[row] = value.loss;
  }
  if (dlogits == nullptr) return;
  D* d = dlogits + row * ld_grad;
  for (int64_t c = threadIdx.x * N; c < cols; c += kThreads * N) {
    const Pack<float, N> v = load_pack<float, N>(x + c);
    Pack<D, N> out;
    for (int i = 0; i < N; ++i)
      out.v[i] = from_float<D>(value.slope * ((c + i == target.target ? 1.0f : 0.0f) - expf(v.v[i] - sum.top - log_sum)));
    store_pack<D, N>(d + c, out);
  }
}

}  // namespace

void CudaOps::token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) {
  expect("token_loss", "logits", logits, DType::f32, -1, -1);
  if (dlogits.data != nullptr) expect("token_loss", "dlogits", dlogits, dtype_, logits.rows, logits.cols);
  if (logits.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(logits) && (dlogits.data == nullptr || rows_of_vectors(dlogits));
    Launch{dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream()}(
        vectors ? loss_kernel<T, 4> : loss_kernel<T, 1>, static_cast<const float*>(logits.data), logits.ld, rows,
        static_cast<T*>(dlogits.data), dlogits.ld, logprob, loss, logits.cols);
  });
}

}  // namespace loquetier::cuda
