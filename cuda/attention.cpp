// The attention ops: checks, and the choice between the kernel for decodes (attention_decode.cu), cuDNN for all else
// (attention_cudnn.cpp, which holds the facts to know) and the plain kernels (attention_plain.cu): those serve the deterministic
// mode's forward and whatever cuDNN refuses.
#include <algorithm>

#include "attention_decode.h"
#include "attention_plain.h"
#include "attention_plans.h"
#include "core/check.h"
#include "cuda_check.h"
#include "cuda_ops.h"
#include "linear_decode.h"
#include "ops/workspace.h"

namespace loquetier::cuda {

namespace {

void check_shape(const char* op, const AttentionShape& shape) {
  require(shape.q_heads > 0 && shape.kv_heads > 0 && shape.q_heads % shape.kv_heads == 0, "[", op,
          "] shape: expected q_heads a multiple of kv_heads, got ", shape.q_heads, " and ", shape.kv_heads);
  require(shape.head_size > 0 && shape.head_size <= 256, "[", op, "] shape: expected a head size of 1 .. 256, got ",
          shape.head_size);
}

bool one_row_each(const PagedBatch& batch, int32_t sequences) {
  return std::all_of(batch.host_rows, batch.host_rows + sequences, [](int32_t rows) { return rows <= 1; });
}

// Blocks of decodes' attention beside packed rows: so many that it ends a little before the other. A block that is alone on its
// processor reads 0.028 MB/us, a processor does 3 MFLOP/us of packed attention (both beside each other on an H200; 48 and 132
// blocks instead of these 80 cost the same there, 16 and 24 too much).
int blocks_beside(const PackedBatch& packed, const PagedBatch& paged, const AttentionShape& shape, int processors) {
  double products = 0, keys = 0;
  for (int i = 0; i < packed.sequences; ++i) {
    const double rows = packed.host_q_rows[i];
    products += rows * (packed.host_kv_rows[i] - rows / 2);
  }
  for (int i = 0; i < paged.sequences; ++i) keys += paged.host_kv_len[i];
  const double us = products * shape.q_heads * shape.head_size * 4 / (3e6 * processors);
  const double megabytes = keys * shape.kv_heads * shape.head_size * 4 / 1e6;
  const double blocks = megabytes / (0.028 * 0.7 * std::max(us, 1.0));
  return static_cast<int>(std::clamp(blocks, 8.0, static_cast<double>(kDecodeAttentionBlocks * processors)));
}

}  // namespace

void CudaOps::warm_up(const AttentionShape& shape, const KvShape& kv_shape) {
  device_.use();
  attention_plans_->warm_up(attention_scratch_, shape, kv_shape);
}

void CudaOps::check_paged(TensorView q, const KvShape& kv_shape, const PagedBatch& batch, const AttentionShape& shape,
                          TensorView out) const {
  check_shape("attention_paged", shape);
  const int64_t cols = int64_t{shape.q_heads} * shape.head_size;
  expect("attention_paged", "q", q, dtype_, -1, cols);
  expect("attention_paged", "out", out, dtype_, q.rows, cols);
  require(kv_shape.kv_heads == shape.kv_heads && kv_shape.head_size == shape.head_size, "[attention_paged] kv: expected pages of ",
          shape.kv_heads, " heads of ", shape.head_size, ", got ", kv_shape.kv_heads, " of ", kv_shape.head_size);
  require(batch.decodes >= 0 && batch.decodes <= batch.sequences, "[attention_paged] decodes: expected 0 .. ", batch.sequences,
          ", got ", batch.decodes);
  for (int i = 0; i < batch.sequences; ++i) {
    const int64_t begin = batch.host_row_begin[i], rows = batch.host_rows[i], keys = batch.host_kv_len[i];
    require(
        begin >= 0 && rows >= 0 && begin + rows <= q.rows && rows <= keys && keys <= int64_t{batch.max_pages} * kv_shape.page_size,
        "[attention_paged] sequence ", i, ": expected rows inside [0, ", q.rows,
        ") and rows <= keys <= ", int64_t{batch.max_pages} * kv_shape.page_size, ", got rows ", begin, " + ", rows, " and ", keys,
        " keys");
  }
}

void CudaOps::attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                              const AttentionShape& shape, TensorView out) {
  check_paged(q, kv_shape, batch, shape, out);
  if (batch.sequences == 0 || q.rows == 0) return;
  device_.use();
  if (deterministic_ || !attention_plans_->takes_paged(q, kv, kv_shape, shape, out)) {
    plain_attention_paged(stream(), dtype_, q, kv, kv_shape, batch, shape, out);
    return;
  }
  int32_t chunks = batch.sequences - batch.decodes;
  if (one_row_each(batch, chunks)) chunks = 0;  // ends of prompts are as decodes
  const int32_t decodes = batch.sequences - chunks;
  if (chunks > 0) attention_plans_->paged(stream(), attention_scratch_, q, kv, kv_shape, batch, 0, chunks, shape, out);
  if (decodes > 0 && !decode_attention(attention_decode_workspace_.data(), q, kv, kv_shape, batch, chunks, decodes, shape, out,
                                       device_.processors(), kDecodeAttentionBlocks * device_.processors(), stream()))
    attention_plans_->paged(stream(), attention_scratch_, q, kv, kv_shape, batch, chunks, decodes, shape, out);
}

// Of decodes rope is not a launch of its own: attention does it as it reads q, from the product's shares of k where there are some.
void CudaOps::linear_lora_rope_attention(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear,
                                         const LoraGroups& groups, TensorView s, TensorView qkv, const Rope& of,
                                         const PagedBatch& batch, TensorView out) {
  expect_rope("linear_lora_rope_attention", qkv, of);
  check_paged(qkv.slice_cols(0, int64_t{of.shape.q_heads} * of.shape.head_size), of.kv_shape, batch, of.shape, out);
  if (deterministic_ || batch.sequences == 0 || qkv.rows == 0 || !one_row_each(batch, batch.sequences) ||
      !takes_decode_rope(qkv, of, out))
    return Ops::linear_lora_rope_attention(x, w, bias, linear, groups, s, qkv, of, batch, out);
  KShares shares;
  linear_lora_leaving(x, w, bias, linear, groups, s, qkv, any_lora(groups) ? &shares : nullptr);
  device_.use();
  decode_rope_attention(attention_decode_workspace_.data(), qkv, shares, of, batch, out, device_.processors(),
                        kDecodeAttentionBlocks * device_.processors(), stream());
}

void CudaOps::attention_paged_by_cudnn(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                                       const AttentionShape& shape, TensorView out) {
  device_.use();
  attention_plans_->paged(stream(), attention_scratch_, q, kv, kv_shape, batch, 0, batch.sequences, shape, out);
}

// Attention of decodes waits for memory, that of packed rows computes: each has some of the processors, and whichever ends first
// leaves its own to the other.
void CudaOps::attention_mixed(TensorView q, TensorView k, TensorView v, int64_t packed_rows, const PackedBatch& packed, KvLayer kv,
                              const KvShape& kv_shape, const PagedBatch& paged, const AttentionShape& shape, TensorView out,
                              TensorView lse) {
  check_paged(q, kv_shape, paged, shape, out);
  const bool ours = !deterministic_ && paged.sequences > 0 && one_row_each(paged, paged.sequences) &&
                    attention_plans_->takes_paged(q, kv, kv_shape, shape, out);
  device_.use();
  check(cudaEventRecord(branch_.fork, stream()), "cudaEventRecord");
  if (!ours || !decode_attention(attention_decode_workspace_.data(), q, kv, kv_shape, paged, 0, paged.sequences, shape, out,
                                 device_.processors(), blocks_beside(packed, paged, shape, device_.processors()), stream())) {
    Ops::attention_mixed(q, k, v, packed_rows, packed, kv, kv_shape, paged, shape, out, lse);
    return;
  }
  check(cudaStreamWaitEvent(branch_.stream, branch_.fork), "cudaStreamWaitEvent");
  packed_on(branch_.stream, q.slice_rows(0, packed_rows), k, v, packed, shape, out.slice_rows(0, packed_rows), lse);
  check(cudaEventRecord(branch_.join, branch_.stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(stream(), branch_.join), "cudaStreamWaitEvent");
}

void CudaOps::attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                               TensorView out, TensorView lse) {
  packed_on(stream(), q, k, v, batch, shape, out, lse);
}

void CudaOps::packed_on(cudaStream_t on, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
                        const AttentionShape& shape, TensorView out, TensorView lse) {
  check_shape("attention_packed", shape);
  const int64_t cols = int64_t{shape.q_heads} * shape.head_size, kv_cols = int64_t{shape.kv_heads} * shape.head_size;
  expect("attention_packed", "q", q, dtype_, -1, cols);
  expect("attention_packed", "k", k, dtype_, -1, kv_cols);
  expect("attention_packed", "v", v, dtype_, k.rows, kv_cols);
  expect("attention_packed", "out", out, dtype_, q.rows, cols);
  if (lse.data != nullptr) expect("attention_packed", "lse", lse, DType::f32, q.rows, shape.q_heads);
  for (int i = 0; i < batch.sequences; ++i) {
    const int64_t begin = batch.host_q_begin[i], rows = batch.host_q_rows[i], first = batch.host_kv_begin[i],
                  keys = batch.host_kv_rows[i];
    require(begin >= 0 && rows >= 0 && begin + rows <= q.rows && first >= 0 && rows <= keys && first + keys <= k.rows &&
                keys <= batch.max_rows,
            "[attention_packed] sequence ", i, ": expected rows inside [0, ", q.rows, "), keys inside [0, ", k.rows,
            ") and rows <= keys <= ", batch.max_rows, ", got rows ", begin, " + ", rows, " and keys ", first, " + ", keys);
  }
  if (batch.sequences == 0 || q.rows == 0) return;
  device_.use();
  if (deterministic_ || batch.max_rows == 1 || !attention_plans_->takes_packed(q, k, v, shape, out)) {
    plain_attention_packed(on, dtype_, q, k, v, batch, shape, out, lse);
  } else {
    attention_plans_->packed(on, attention_scratch_, q, k, v, batch, shape, out, lse);
  }
}

void CudaOps::attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                                 const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                                 TensorView dv) {
  check_shape("attention_backward", shape);
  const int64_t cols = int64_t{shape.q_heads} * shape.head_size, kv_cols = int64_t{shape.kv_heads} * shape.head_size;
  expect("attention_backward", "q", q, dtype_, -1, cols);
  expect("attention_backward", "k", k, dtype_, q.rows, kv_cols);
  expect("attention_backward", "v", v, dtype_, q.rows, kv_cols);
  expect("attention_backward", "out", out, dtype_, q.rows, cols);
  expect("attention_backward", "lse", lse, DType::f32, q.rows, shape.q_heads);
  expect("attention_backward", "dout", dout, dtype_, q.rows, cols);
  expect("attention_backward", "dq", dq, dtype_, q.rows, cols);
  expect("attention_backward", "dk", dk, dtype_, q.rows, kv_cols);
  expect("attention_backward", "dv", dv, dtype_, q.rows, kv_cols);
  for (int i = 0; i < batch.sequences; ++i) {
    require(batch.host_q_begin[i] == batch.host_kv_begin[i] && batch.host_q_rows[i] == batch.host_kv_rows[i] &&
                batch.host_q_begin[i] >= 0 && int64_t{batch.host_q_begin[i]} + batch.host_q_rows[i] <= q.rows &&
                batch.host_q_rows[i] <= batch.max_rows,
            "[attention_backward] sequence ", i, ": expected a whole sequence inside [0, ", q.rows, ") of at most ", batch.max_rows,
            " rows, got rows ", batch.host_q_begin[i], " + ", batch.host_q_rows[i], " and keys ", batch.host_kv_begin[i], " + ",
            batch.host_kv_rows[i]);
  }
  if (batch.sequences == 0 || q.rows == 0) return;
  device_.use();
  const bool cudnn = batch.max_rows > 1 && attention_plans_->takes_packed(q, k, v, shape, out) &&
                     attention_plans_->takes_packed(dq, dk, dv, shape, dout);
  if (cudnn) {
    attention_plans_->backward(stream(), attention_scratch_, q, k, v, out, lse, dout, batch, shape, dq, dk, dv);
  } else {
    plain_attention_backward(stream(), dtype_, q, k, v, out, lse, dout, batch, shape, dq, dk, dv);
  }
}

}  // namespace loquetier::cuda
