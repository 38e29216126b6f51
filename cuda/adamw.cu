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
  const float decay = 1.0f - tensor.lr * job.weight_decay, step = tensor.lr / job.bias_correction1,
              root2 = sqrtf(job.bias_correction2);
  T* weight = static_cast<T*>(tensor.weight);
  for (int64_t i = place.begin + threadIdx.x; i < place.end; i += kThreads) {
    const float g = tensor.grad[i] * clip;
    const float m = tensor.m[i] + (1.0f - job.beta1) * (g - tensor.m[i]);
    const float v = job.beta2 * tensor.v[i] + (1.0f - job.beta2) * g * g;
    const float w = tensor.master[i] * decay - step * m / (sqrtf(v) / root2 + job.eps);
    tensor.m[i] = m;
    tensor.v[i] = v;
    tensor.master[i] = w;
    tensor.grad[i] = 0;
    weight[i] = from_float<T>(w);
  }
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
