// Gradient norms and AdamW over all tensors of all jobs, each in one launch (the norm has a second, tiny one). A tensor is cut into
// chunks; a block finds its tensor by walking the table, which is short (an adapter has two tensors). Sums are in double and in a
// fixed order.
#include <algorithm>

#include "common.cuh"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;          // elements of a block: 64 KiB of each array
constexpr int64_t kMaxPartials = 1 << 18;  // beyond, chunks grow

struct Chunk {
  int tensor;
  int64_t begin, end;
};

__device__ bool find_chunk(const AdamTensor* tensors, int count, int64_t chunk, int64_t index, Chunk& found) {
  for (int t = 0; t < count; ++t) {
    const int64_t n = tensors[t].n, chunks = (n + chunk - 1) / chunk;
    if (index < chunks) {
      found = {t, index * chunk, min(n, (index + 1) * chunk)};
      return true;
    }
    index -= chunks;
  }
  return false;
}

__global__ void square_sum_kernel(const AdamTensor* tensors, int count, int64_t chunk, double* partial) {
  __shared__ double shared[kThreads / kWarp];
  Chunk place;
  if (!find_chunk(tensors, count, chunk, blockIdx.x, place)) return;
  const float* grad = tensors[place.tensor].grad;
  double sum = 0;
  for (int64_t i = place.begin + threadIdx.x; i < place.end; i += kThreads) sum += static_cast<double>(grad[i]) * grad[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block a job: adds the partial sums of its tensors' chunks.
__global__ void norm_kernel(const AdamTensor* tensors, int count, int64_t chunk, const double* partial, float* norm) {
  __shared__ double shared[kThreads / kWarp];
  double sum = 0;
  int64_t first = 0;
  for (int t = 0; t < count; ++t) {
    const int64_t chunks = (tensors[t].n + chunk - 1) / chunk;
    if (tensors[t].job == static_cast<int>(blockIdx.x)) {
      for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[first + i];
    }
    first += chunks;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) norm[blockIdx.x] = static_cast<float>(sqrt(sum));
}

// Elements [begin, end) of a tensor, N at once.
template <class T, int N>
__device__ void update(const AdamTensor& tensor, const AdamJob& job, float clip, int64_t begin, int64_t end) {
  const float decay = 1.0f - tensor.lr * job.weight_decay, step = tensor.lr / job.bias_correction1,
              root2 = sqrtf(job.bias_correction2);
  for (int64_t i = begin + threadIdx.x * N; i < end; i += kThreads * N) {
    const Pack<float, N> grad = load_pack<float, N>(tensor.grad + i);
    Pack<float, N> m = load_pack<float, N>(tensor.m + i), v = load_pack<float, N>(tensor.v + i),
                   w = load_pack<float, N>(tensor.master + i), zero;
    Pack<T, N> weight;
    for (int j = 0; j < N; ++j) {
      const float g = grad.v[j] * clip;
      m.v[j] = m.v[j] + (1.0f - job.beta1) * (g - m.v[j]);
      v.v[j] = job.beta2 * v.v[j] + (1.0f - job.beta2) * g * g;
      w.v[j] = w.v[j] * decay - step * m.v[j] / (sqrtf(v.v[j]) / root2 + job.eps);
      weight.v[j] = from_float<T>(w.v[j]);
      zero.v[j] = 0;
    }
    store_pack<float, N>(tensor.m + i, m);
    store_pack<float, N>(tensor.v + i, v);
    store_pack<float, N>(tensor.master + i, w);
    store_pack<float, N>(tensor.grad + i, zero);
    store_pack<T, N>(static_cast<T*>(tensor.weight) + i, weight);
  }
}

template <class T>
__global__ void adamw_kernel(const AdamTensor* tensors, int count, int64_t chunk, const AdamJob* jobs, const float* norm) {
  Chunk place;
  if (!find_chunk(tensors, count, chunk, blockIdx.x, place)) return;
  const AdamTensor tensor = tensors[place.tensor];
  const AdamJob job = jobs[tensor.job];
  const float total = norm[tensor.job];
  if (!isfinite(total)) {
    for (int64_t i = place.begin + threadIdx.x; i < place.end; i += kThreads) tensor.grad[i] = 0;
    return;
  }
  const float clip = job.max_grad_norm > 0 ? fminf(1.0f, job.max_grad_norm / (total + 1e-6f)) : 1.0f;
  uint64_t misplaced = static_cast<uint64_t>(place.begin | place.end) % 4;
  for (const void* p :
       {static_cast<const void*>(tensor.grad), static_cast<const void*>(tensor.m), static_cast<const void*>(tensor.v),
        static_cast<const void*>(tensor.master), static_cast<const void*>(tensor.weight)})
    misplaced |= reinterpret_cast<uintptr_t>(p) % 16;
  if (misplaced == 0) update<T, 4>(tensor, job, clip, place.begin, place.end);
  else update<T, 1>(tensor, job, clip, place.begin, place.end);
}

struct Chunks {
  int64_t size;
  int64_t count;
};

Chunks chunks_of(const char* op, const AdamBatch& batch) {
  int64_t total = 0;
  for (int t = 0; t < batch.tensor_count; ++t) {
    const AdamTensor& tensor = batch.host_tensors[t];
    require(tensor.n >= 0 && tensor.job >= 0 && tensor.job < batch.job_count, "[", op, "] tensor ", t,
            ": expected a size and a job of 0 .. ", batch.job_count - 1, ", got n ", tensor.n, " and job ", tensor.job);
    total += tensor.n;
  }
  const int64_t size = std::max(kChunk, ceil_div(total, kMaxPartials));
  int64_t count = 0;
  for (int t = 0; t < batch.tensor_count; ++t) count += ceil_div(batch.host_tensors[t].n, size);
  return {size, count};
}

}  // namespace

void CudaOps::grad_norm(const AdamBatch& batch, float* norm) {
  const Chunks chunks = chunks_of("grad_norm", batch);
  if (batch.job_count == 0) return;
  device_.use();
  double* partial = static_cast<double*>(norm_scratch_.get(static_cast<size_t>(chunks.count + 1) * sizeof(double)));
  Launch{dim3(static_cast<unsigned>(chunks.count)), dim3(kThreads), 0, stream()}(square_sum_kernel, batch.tensors,
                                                                                 batch.tensor_count, chunks.size, partial);
  Launch{dim3(static_cast<unsigned>(batch.job_count)), dim3(kThreads), 0, stream()}(norm_kernel, batch.tensors, batch.tensor_count,
                                                                                    chunks.size, partial, norm);
}

void CudaOps::adamw(const AdamBatch& batch, const float* norm) {
  const Chunks chunks = chunks_of("adamw", batch);
  if (chunks.count == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    Launch{dim3(static_cast<unsigned>(chunks.count)), dim3(kThreads), 0, stream()}(
        adamw_kernel<T>, batch.tensors, batch.tensor_count, chunks.size, batch.jobs, norm);
  });
}

}  // namespace loquetier::cuda
