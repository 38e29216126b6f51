// Attention of decode steps: one query row a sequence over the pages (attention_decode.cu).
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"
#include "ops/ops.h"

namespace loquetier::cuda {

struct KShares;  // linear_decode.h

// Unfinished sums and tickets; zeroed once, then the launches' own.
size_t decode_attention_workspace_bytes(int processors);

// Head sizes, groups and alignments that the kernel takes; and those with rope in front, for qkv [T, (Q + 2K) D], where no raw q
// and k are to be kept.
bool takes_decode_attention(TensorView q, KvLayer kv, const KvShape& kv_shape, const AttentionShape& shape, TensorView out);
bool takes_decode_rope(TensorView qkv, const Rope& of, TensorView out);

// Sequences [first, first + count) of the batch, of at most one row each; q and out bf16 or f16. Keys but a sequence's last one are
// read before the launch in front has ended: of the launches that may still run by then, none but that one writes keys or values
// that these rows see, and it writes the last ones only. False: not what it takes, nothing was launched.
// blocks: at most kDecodeAttentionBlocks for each processor; fewer leave processors to what runs beside.
bool decode_attention(void* workspace, TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, int32_t first,
                      int32_t count, const AttentionShape& shape, TensorView out, int processors, int blocks, cudaStream_t stream);

// Rope on the rows of qkv, then attention of all sequences over its q columns, in one launch; for what takes_decode_rope() takes,
// and rows whose slot, where they have one, is the place of their sequence's last key. `shares` of qkv are read in its place,
// unless their count is 0; qkv is not written. All other keys are read before the launch in front has ended: they come from earlier
// steps, and rope_table(), which waits for everything in front of it, lies between.
void decode_rope_attention(void* workspace, TensorView qkv, const KShares& shares, const Rope& of, const PagedBatch& batch,
                           TensorView out, int processors, int blocks, cudaStream_t stream);

}  // namespace loquetier::cuda
