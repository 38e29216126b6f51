// Attention of decode steps: one query row a sequence over the pages (attention_decode.cu).
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"
#include "ops/ops.h"

namespace loquetier::cuda {

// Unfinished sums and tickets; zeroed once, then the launches' own.
size_t decode_attention_workspace_bytes(int processors);

// Sequences [first, first + count) of the batch, of at most one row each; q and out bf16 or f16. Keys but a sequence's last one are
// read before the launch in front has ended: of the launches that may still run by then, none but that one writes keys or values
// that these rows see, and it writes the last ones only. False: a shape or alignment it does not take, nothing was launched.
// blocks: at most kDecodeAttentionBlocks for each processor; fewer leave processors to what runs beside.
bool decode_attention(void* workspace, TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, int32_t first,
                      int32_t count, const AttentionShape& shape, TensorView out, int processors, int blocks, cudaStream_t stream);

}  // namespace loquetier::cuda
