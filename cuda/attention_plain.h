// Attention without cuDNN, for any shape, and the small kernel that lays out cuDNN's tables (attention_plain.cu).
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"
#include "ops/ops.h"

namespace loquetier::cuda {

// One warp computes one row and head, in an order that depends on its own number of keys only: the deterministic mode's attention,
// the same bit for bit in pages and packed, and what serves shapes that cuDNN refuses.
void plain_attention_paged(cudaStream_t stream, DType dtype, TensorView q, KvLayer kv, const KvShape& kv_shape,
                           const PagedBatch& batch, const AttentionShape& shape, TensorView out);
void plain_attention_packed(cudaStream_t stream, DType dtype, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
                            const AttentionShape& shape, TensorView out, TensorView lse);
void plain_attention_backward(cudaStream_t stream, DType dtype, TensorView q, TensorView k, TensorView v, TensorView out,
                              TensorView lse, TensorView dout, const PackedBatch& batch, const AttentionShape& shape, TensorView dq,
                              TensorView dk, TensorView dv);

// Tables of one cuDNN launch, padded to the plan's batch with empty sequences. Offsets count elements: row * ld.
struct RaggedTables {
  int32_t count = 0;                 // sequences
  int32_t batch = 0;                 // of the plan, >= count
  const int32_t* q_begin = nullptr;  // [count] device, as the op got them
  const int32_t* q_rows = nullptr;
  const int32_t* kv_begin = nullptr;  // null: keys are in pages
  const int32_t* kv_rows = nullptr;
  const int32_t* page_table = nullptr;  // [count, max_pages] or null
  int32_t max_pages = 0;
  int32_t plan_pages = 0;
  int32_t* q_len = nullptr;   // out [batch]
  int32_t* kv_len = nullptr;  // out [batch]
  static constexpr int kOffsets = 8;
  int32_t* offsets[kOffsets] = {};  // out [batch + 1] each, or null
  int64_t ld[kOffsets] = {};        // elements a row of the tensor takes
  bool of_kv[kOffsets] = {};        // rows of k and v, else of q
  int32_t* plan_table = nullptr;    // out [batch, plan_pages] or null
  // With pages: what follows a sequence's last key in its last page is set to zero, and table entries past it repeat its first
  // page. cuDNN multiplies whole tiles, masked keys by a probability of zero, so whatever it reads must be a number: a NaN left
  // there by another request would show.
  KvLayer kv;
  int32_t page_size = 0;
  int64_t slot_elements = 0;  // K D
};
void fill_ragged_tables(cudaStream_t stream, const RaggedTables& tables);

}  // namespace loquetier::cuda
