// cuDNN's attention behind a plain face, so that its headers stay in one file (attention_cudnn.cpp, which holds the facts to know).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "core/tensor.h"
#include "ops/ops.h"

namespace loquetier::cuda {

class CudaDevice;
class Scratch;

class AttentionPlans {
 public:
  virtual ~AttentionPlans() = default;
  // Throws DeviceError when cuDNN is missing or older than 9.19.
  static std::unique_ptr<AttentionPlans> make(CudaDevice& device, DType dtype, bool deterministic);

  // The most that calls will ask for, so that few plans serve them all; before the first call.
  virtual void limit(const OpsLimits& limits) = 0;
  // Builds the plans that calls within the limits will need, and reserves their scratch.
  virtual void warm_up(Scratch& scratch, const AttentionShape& shape, const KvShape& kv_shape) = 0;

  // Whether cuDNN can take it (head size, alignment, page size); if not, the plain kernels do.
  virtual bool takes_paged(TensorView q, const KvLayer& kv, const KvShape& kv_shape, const AttentionShape& shape,
                           TensorView out) const = 0;
  virtual bool takes_packed(TensorView q, TensorView k, TensorView v, const AttentionShape& shape, TensorView out) const = 0;

  // Sequences [first, first + count) of the batch.
  virtual void paged(cudaStream_t stream, Scratch& scratch, TensorView q, KvLayer kv, const KvShape& kv_shape,
                     const PagedBatch& batch, int32_t first, int32_t count, const AttentionShape& shape, TensorView out) = 0;
  virtual void packed(cudaStream_t stream, Scratch& scratch, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
                      const AttentionShape& shape, TensorView out, TensorView lse) = 0;
  virtual void backward(cudaStream_t stream, Scratch& scratch, TensorView q, TensorView k, TensorView v, TensorView out,
                        TensorView lse, TensorView dout, const PackedBatch& batch, const AttentionShape& shape, TensorView dq,
                        TensorView dk, TensorView dv) = 0;
};

}  // namespace loquetier::cuda
