// Gradient norms and AdamW over all tensors of all adapters to update.
//
// Tensors are cut into chunks of fixed length; the norm adds chunk sums in order, in double, so it does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

namespace {
constexpr int64_t kChunk = 16384;
}

void CpuOps::list_chunks(const char* op, const AdamBatch& batch) {
  for (int32_t i = 0; i < batch.tensor_count; ++i) {
    const AdamTensor& tensor = batch.host_tensors[i];
    require(tensor.job >= 0 && tensor.job < batch.job_count, "[", op, "] tensors[", i, "]: expected a job below ", batch.job_count,
            ", got ", tensor.job);
    require(i == 0 || batch.host_tensors[i - 1].job <= tensor.job, "[", op, "] tensors[", i,
            "]: expected tensors in order of their jobs");
    require(tensor.n >= 0 && (tensor.n == 0 || tensor.grad), "[", op, "] tensors[", i, "]: expected a gradient of ", tensor.n,
            " elements");
  }
  chunks_.clear();
  for (int32_t i = 0; i < batch.tensor_count; ++i)
    for (int64_t begin = 0; begin < batch.host_tensors[i].n; begin += kChunk)
      chunks_.push_back({i, begin, std::min(kChunk, batch.host_tensors[i].n - begin)});
}

void CpuOps::grad_norm(const AdamBatch& batch, float* norm) {
  list_chunks("grad_norm", batch);
  partial_.resize(chunks_.size());
  parallel(static_cast<int64_t>(chunks_.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks_[static_cast<size_t>(i)];
      const float* g = batch.host_tensors[chunk.tensor].grad + chunk.begin;
      double sum = 0;  // squares in double: a large gradient must not overflow to an infinite norm
      for (int64_t j = 0; j < chunk.n; ++j) sum += static_cast<double>(g[j]) * static_cast<double>(g[j]);
      partial_[static_cast<size_t>(i)] = sum;
    }
  });
  size_t next = 0;
  for (int32_t job = 0; job < batch.job_count; ++job) {
    double sum = 0;
    for (; next < chunks_.size() && batch.host_tensors[chunks_[next].tensor].job == job; ++next) sum += partial_[next];
    norm[job] = static_cast<float>(std::sqrt(sum));
  }
}

void CpuOps::adamw(const AdamBatch& batch, const float* norm) {
  list_chunks("adamw", batch);
  for (int32_t i = 0; i < batch.tensor_count; ++i) {
    const AdamTensor& t = batch.host_tensors[i];
    require(t.n == 0 || (t.master && t.m && t.v && t.weight), "[adamw] tensors[", i, "]: expected master, m, v and weight");
  }
  parallel(static_cast<int64_t>(chunks_.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks_[static_cast<size_t>(i)];
      const AdamTensor& tensor = batch.host_tensors[chunk.tensor];
      const AdamJob& job = batch.host_jobs[tensor.job];
      float* grad = tensor.grad + chunk.begin;
      if (std::isfinite(norm[tensor.job])) {
        float* p = tensor.master + chunk.begin;
        float* m = tensor.m + chunk.begin;
        float* v = tensor.v + chunk.begin;
        float* weight = static_cast<float*>(tensor.weight) + chunk.begin;
        const float clip = job.max_grad_norm > 0 ? std::min(1.0f, job.max_grad_norm / (norm[tensor.job] + 1e-6f)) : 1.0f;
        const float keep = static_cast<float>(1.0 - static_cast<double>(tensor.lr) * static_cast<double>(job.weight_decay));
        const float step = tensor.lr / job.bias_correction1;
        const float root = std::sqrt(job.bias_correction2);
        for (int64_t j = 0; j < chunk.n; ++j) {
          const float g = grad[j] * clip;
          m[j] = m[j] + (1.0f - job.beta1) * (g - m[j]);
          v[j] = job.beta2 * v[j] + (1.0f - job.beta2) * g * g;
          p[j] = p[j] * keep - step * (m[j] / (std::sqrt(v[j]) / root + job.eps));
          weight[j] = p[j];
        }
      }
      std::memset(grad, 0, static_cast<size_t>(chunk.n) * sizeof(float));
    }
  });
}

}  // namespace loquetier::cpu
