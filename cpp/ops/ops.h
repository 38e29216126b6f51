// The compute contract: every operation of the engine, once. The CPU (cpp/cpu/) and CUDA (cuda/) backends implement this page;
// cpp/cpu/reference.h is its templated oracle, tests/cpp/op_tests.cpp has a case per entry.
//
// Rules. Views are row-major with a leading dimension; `C` is the backend's compute dtype (CPU f32; CUDA bf16 or f16), products
// accumulate in f32. Nothing allocates and nothing waits: workspaces are arguments or were reserved at construction. Arrays that
// describe the batch are on the device, uploaded once a step; where a backend needs a shape on the host to launch, the host copy
// stands beside it. Zero rows are legal everywhere and do nothing. Outputs are overwritten unless the line says "+=".
// Bad shapes throw InvalidArgument "[op] tensor: expected …, got …" before anything is written.
//
// Alphabet: T rows in the batch, H hidden, F feed-forward, Q query heads, K key/value heads, D head size, R rank, V vocabulary,
// P page size. dx is the gradient of x. Parameter gradients add, activation gradients overwrite, the residual adds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/memory.h"
#include "core/tensor.h"

namespace loquetier {

// ---------------------------------------------------------------- LoRA tables (design section 5: the virtual module)

constexpr int kMaxParts = 3;  // sub-projections of one fused linear: q|k|v, gate|up

// One projection of one adapter, in the compute dtype. rank 0: this adapter does not touch it.
struct LoraPart {
  const void* a = nullptr;  // [R, in] C
  const void* b = nullptr;  // [out, R] C
  int32_t rank = 0;
  float scale = 0;  // alpha / r, or alpha / sqrt(r)
};

// One fused linear of one layer of one adapter. The A of all its parts are adjacent in memory: [sum of ranks, in], in part order.
struct LoraSite {
  LoraPart part[kMaxParts];
};

// Gradients beside it, f32, same shapes; null where the rank is 0.
struct LoraGradPart {
  float* da = nullptr;  // [R, in]
  float* db = nullptr;  // [out, R]
};
struct LoraGradSite {
  LoraGradPart part[kMaxParts];
};

// Consecutive rows that use one adapter. `sites` has one entry per (layer, linear), indexed by LoraLinear::site; null: no adapter.
struct LoraGroup {
  int32_t row_begin = 0;
  int32_t rows = 0;
  const LoraSite* sites = nullptr;       // device memory, lives with the adapter in the pool
  const LoraSite* host_sites = nullptr;  // the same table readable by the host (ranks, scales; pointers are device pointers)
  const LoraGradSite* grads = nullptr;   // device memory; null when the group is not trained
  const LoraGradSite* host_grads = nullptr;
  float dropout = 0;  // probability on the input of A; only for rows in training
};

// The groups of a range of rows. Groups are ordered by row_begin and do not overlap; rows outside every group have no adapter.
// A device backend sizes its launches by host_groups and works by groups: for a recorded step the former describe the largest batch
// that the latter may come to hold (engine/decode_graph.h), in tiles of at least 8 rows and in ranks. Rows are below 512 then.
struct LoraGroups {
  const LoraGroup* groups = nullptr;       // [count], device
  const LoraGroup* host_groups = nullptr;  // [count], host
  int32_t count = 0;
  int32_t max_rank = 0;                // largest sum of part ranks of any site of any group: the columns of S
  const uint64_t* row_keys = nullptr;  // [T] device: dropout key of each row; null when no group has dropout
};
// No adapter in the batch costs nothing: not one LoRA op is called then, or it does nothing.
inline bool any_lora(const LoraGroups& groups) { return groups.count > 0 && groups.max_rank > 0; }

// Which fused linear: its place in the adapter's table and its shape. Columns of y: part 0, part 1, … adjacent.
struct LoraLinear {
  int32_t site = 0;
  int32_t parts = 1;
  int64_t in = 0;
  int64_t out[kMaxParts] = {0, 0, 0};
};

// The `stream` of dropout_keep() for one part of one site: every backend draws the same mask.
inline constexpr uint32_t dropout_stream(int32_t site, int32_t part) {
  return static_cast<uint32_t>(site) * 4 + static_cast<uint32_t>(part);
}

// ---------------------------------------------------------------- attention tables

// Keys and values of one layer in pages: [pages, P, K, D] C each.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
};

struct KvShape {
  int64_t pages = 0;
  int32_t page_size = 0;  // P, a power of two
  int32_t kv_heads = 0;   // K
  int32_t head_size = 0;  // D
};

// Rows that attend to the pages: sequence i owns rows [row_begin[i], row_begin[i] + rows[i]) of q; its last row sees kv_len[i]
// keys, the row before it one less (causal, bottom-right). k and v of these rows are already in the pages.
struct PagedBatch {
  int32_t sequences = 0;
  int32_t max_pages = 0;
  const int32_t* row_begin = nullptr;   // [sequences] device
  const int32_t* rows = nullptr;        // [sequences] device
  const int32_t* kv_len = nullptr;      // [sequences] device
  const int32_t* page_table = nullptr;  // [sequences, max_pages] device
  const int32_t* host_row_begin = nullptr;
  const int32_t* host_rows = nullptr;
  const int32_t* host_kv_len = nullptr;
  int32_t decodes = 0;  // the last `decodes` sequences have one row each; the others are prompt chunks
};

// Packed variable-length sequences (training and evaluation): sequence i owns rows [row_begin[i], row_begin[i] + q_rows[i]) of q
// and out, and rows [kv_begin[i], kv_begin[i] + kv_rows[i]) of k and v; causal, bottom-right aligned (q_rows <= kv_rows).
struct PackedBatch {
  int32_t sequences = 0;
  int32_t max_rows = 0;              // largest kv_rows
  const int32_t* q_begin = nullptr;  // [sequences] device
  const int32_t* q_rows = nullptr;
  const int32_t* kv_begin = nullptr;
  const int32_t* kv_rows = nullptr;
  const int32_t* host_q_begin = nullptr;
  const int32_t* host_q_rows = nullptr;
  const int32_t* host_kv_begin = nullptr;
  const int32_t* host_kv_rows = nullptr;
};

struct AttentionShape {
  int32_t q_heads = 0;    // Q
  int32_t kv_heads = 0;   // K, divides Q
  int32_t head_size = 0;  // D
  float scale = 0;        // of the scores, usually 1 / sqrt(D)
};

// What rope() takes beside q, k and v.
struct Rope {
  AttentionShape shape;
  TensorView cos_sin, q_norm, k_norm;
  float eps = 0;
  TensorView raw;
  const int32_t* kv_slots = nullptr;
  KvLayer kv;
  KvShape kv_shape;
};

// ---------------------------------------------------------------- heads and optimizer tables

enum class LossKind : int32_t { cross_entropy, importance_sampling, ppo, weighted_logprob };

// One row that has a target. With p = log softmax(logits)[target], ratio = exp(p - old_logprob):
//   cross_entropy, weighted_logprob   loss = -weight * p
//   importance_sampling               loss = -weight * ratio * advantage
//   ppo                               loss = -weight * min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
// `weight` already holds the reduction (1 / targets for the mean).
struct LossRow {
  int32_t target = 0;
  LossKind kind = LossKind::cross_entropy;
  float weight = 1;
  float old_logprob = 0;
  float advantage = 0;
  float clip_low = 0.2f;
  float clip_high = 0.2f;
};

constexpr float kGreedyBelow = 1e-5f;  // a temperature so low leaves one token, and dividing by it could overflow

// One row to sample. Order: logit bias, forbidden tokens, penalties, then (from kGreedyBelow on) temperature, min-p, top-k, top-p.
// Log-probabilities are those of the model's own distribution (before all of that), so they equal the ones training computes.
struct SampleRow {
  float temperature = 0;         // below kGreedyBelow: greedy, lowest token id wins a tie
  float top_p = 1;               // 1: off
  float min_p = 0;               // 0: off
  int32_t top_k = 0;             // <= 0: off
  float repetition_penalty = 1;  // over prompt and output
  float presence_penalty = 0;    // over output
  float frequency_penalty = 0;   // over output
  int32_t top_logprobs = 0;      // how many of the most probable tokens to report, <= columns of top_ids
  uint64_t seed = 0;             // random numbers are philox(seed, index, token / 4)[token % 4]: Gumbel-max over the kept
  int64_t index = 0;             // of this token among the generated ones
  int32_t history_begin = 0;     // into SampleBatch::history: prompt tokens, then output tokens
  int32_t prompt_length = 0;
  int32_t output_length = 0;
  int32_t bias_begin = 0;  // into SampleBatch::bias_ids / bias_values
  int32_t bias_count = 0;
  int32_t forbidden_begin = 0;  // into SampleBatch::forbidden (stop tokens before min_tokens)
  int32_t forbidden_count = 0;
};

struct SampleBatch {
  const SampleRow* rows = nullptr;  // [n] device
  const SampleRow* host_rows = nullptr;
  int32_t count = 0;
  const int32_t* history = nullptr;  // device; filled only for rows with a penalty
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const int32_t* forbidden = nullptr;
};

// One parameter tensor of an optimizer step.
struct AdamTensor {
  float* master = nullptr;  // [n] f32
  float* grad = nullptr;    // [n] f32, set to zero by adamw()
  float* m = nullptr;       // [n] f32
  float* v = nullptr;       // [n] f32
  void* weight = nullptr;   // [n] C: what the forward pass reads; rounded from master
  int64_t n = 0;
  int32_t job = 0;  // index into AdamJob
  float lr = 0;     // of this tensor (LoRA+ gives B its own)
};

// One adapter's update (Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019).
struct AdamJob {
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0;
  float bias_correction1 = 1;  // 1 - beta1^step
  float bias_correction2 = 1;  // 1 - beta2^step
  float max_grad_norm = 0;     // 0: no clipping
};

struct AdamBatch {
  const AdamTensor* tensors = nullptr;  // [tensor_count] device, ordered by job
  const AdamTensor* host_tensors = nullptr;
  int32_t tensor_count = 0;
  const AdamJob* jobs = nullptr;  // [job_count] device
  const AdamJob* host_jobs = nullptr;
  int32_t job_count = 0;
};

// ---------------------------------------------------------------- the operations

// Operations that were recorded once and run again, as they were: the same addresses, counts and launch sizes.
class StepGraph {
 public:
  virtual ~StepGraph() = default;
  virtual void launch() = 0;  // on the stream of the Ops that made it
};

// The most that an engine will ask of a backend in one step.
struct OpsLimits {
  int64_t rows = 0;
  int64_t train_rows = 0;
  int64_t sequences = 0;
  int64_t vocabulary = 0;
  int64_t max_positions = 0;
  int32_t q_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_size = 0;
  int32_t rank = 0;  // of one projection's adapter
};

class Ops {
 public:
  virtual ~Ops() = default;
  virtual Device& device() = 0;
  virtual DType compute_dtype() const = 0;  // C

  // Device memory of the backend's own: libraries' workspaces and kernels' scratch. reserve() allocates what steps within the
  // limits need, so that none of them does (what a library asks for beyond the estimate is allocated at its first use).
  virtual size_t workspace_need(const OpsLimits&) const { return 0; }
  virtual void reserve(const OpsLimits&) {}
  // Makes now what steps within the reserved limits would make at their first use and wait for: attention's plans.
  virtual void warm_up(const AttentionShape&, const KvShape&) {}
  virtual size_t workspace_bytes() const { return 0; }  // held now; grows when a block of it is exchanged for a larger one

  // Records what `work` calls of this interface instead of doing it. Null, and nothing was called, where that is not supported.
  virtual std::unique_ptr<StepGraph> capture(const std::function<void()>&) { return nullptr; }

  // y[t] = table[ids[t]].                                     ids [T] i32 device; table [V, H] C; y [T, H] C
  virtual void embedding(const int32_t* ids, TensorView table, TensorView y) = 0;
  // ids[i] = *from[i] where from[i] is not null: tokens that a step samples are the input of the next one.
  // from [n] addresses, device; ids [n] i32 device
  virtual void take_tokens(const int32_t* const* from, int32_t* ids, int64_t n) = 0;
  // y[i] = x[index[i]].                                       x [T, H] C; index [n] i32 device; y [n, H] C
  virtual void gather_rows(TensorView x, const int32_t* index, TensorView y) = 0;
  // y[index[i]] += x[i], indices distinct.                    x [n, H] C; index [n] i32 device; y [T, H] C
  virtual void scatter_add_rows(TensorView x, const int32_t* index, TensorView y) = 0;
  // dst = src, converting the dtype.                          src, dst [T, n], any float dtypes
  virtual void convert(TensorView src, TensorView dst) = 0;

  // y = x W^T + bias.                                         x [T, K]; w [N, K] C; bias [N] C or empty; y [T, N]
  // y may also be f32 (vocabulary logits).
  virtual void linear(TensorView x, TensorView w, TensorView bias, TensorView y) = 0;
  // dx = dy W, or dx += dy W.                                 dy [T, N]; w [N, K]; dx [T, K]
  virtual void linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) = 0;

  // For every group and part, with r0 the sum of the ranks of the parts before it and M the dropout mask / (1 - p) (or 1):
  // s[:, r0:r0+R] = (x * M) A^T.                              x [T, in] C; s [T, >= max_rank] C
  virtual void lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) = 0;
  // y[:, part] += scale * s[:, r0:r0+R] B^T.                  s [T, >= max_rank] C; y [T, sum out] C or f32
  virtual void lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) = 0;
  // y = x W^T + bias, then lora_shrink and lora_expand: s and y end as these three leave them. One call for a fused linear that is
  // one matrix (w [sum out, in], as device backends place it), so that a backend may fuse the three.                  y [T, sum
  // out] C or f32
  virtual void linear_lora(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                           TensorView s, TensorView y) {
    this->linear(x, w, bias, y);
    if (!any_lora(groups)) return;
    lora_shrink(linear, groups, x, s);
    lora_expand(linear, groups, s, y);
  }
  // linear_lora, then add_rms_norm of what it adds to x: sum = residual + y, z = rms_norm(sum). y is scratch. One call so that a
  // backend may finish y where the norm reads it.     y, residual, sum, z [T, sum out] C, sum may be residual; norm [sum out] C
  virtual void linear_lora_add_rms_norm(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear,
                                        const LoraGroups& groups, TensorView s, TensorView y, TensorView residual, TensorView norm,
                                        float eps, TensorView sum, TensorView z) {
    linear_lora(x, w, bias, linear, groups, s, y);
    add_rms_norm(residual, y, norm, eps, sum, z);
  }
  // linear_lora of q, k and v, then rope: qkv [T, (Q + 2K) D] C as that leaves it.
  virtual void linear_lora_rope(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                TensorView s, TensorView qkv, const Rope& rope) {
    linear_lora(x, w, bias, linear, groups, s, qkv);
    this->rope(qkv, rope);
  }
  // linear_lora_rope, then attention_paged of the q columns over the pages of `rope`. qkv is scratch. One call so that a backend
  // may do rope where attention reads q. A row of a sequence has the slot of that sequence's last key but for rows in front, or
  // none: then its key is in the pages; rows of no sequence have none.             qkv [T, (Q + 2K) D] C; out [T, Q D] C
  virtual void linear_lora_rope_attention(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear,
                                          const LoraGroups& groups, TensorView s, TensorView qkv, const Rope& rope,
                                          const PagedBatch& batch, TensorView out) {
    linear_lora_rope(x, w, bias, linear, groups, s, qkv, rope);
    const TensorView q = qkv.slice_cols(0, int64_t{rope.shape.q_heads} * rope.shape.head_size);
    attention_paged(q, rope.kv, rope.kv_shape, batch, rope.shape, out);
  }
  // ds[:, r0:r0+R] = scale * dy[:, part] B.                   dy [T, sum out] C; ds [T, >= max_rank] C
  virtual void lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) = 0;
  // dx += (ds[:, r0:r0+R] A) * M, summed over parts.          ds [T, >= max_rank] C; dx [T, in] C
  virtual void lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) = 0;
  // dx = dy W, then lora_backward_x: for the same linears as linear_lora, again so that a backend may fuse them.
  // dy [T, sum out] C; w [sum out, in] C; ds [T, >= max_rank] C; dx [T, in] C
  virtual void linear_lora_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView ds,
                                    TensorView dx) {
    this->linear_backward(dy, w, dx, false);
    if (any_lora(groups)) lora_backward_x(linear, groups, ds, dx);
  }
  // dB += scale * dy[:, part]^T s;  dA += ds^T (x * M).       groups with grads only, no two of one adapter; f32, in a fixed order
  // Views without data: x (then also ds): dB alone; s and dy: dA alone.
  virtual void lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                                     TensorView ds) = 0;
  // ds of all groups, then dB and dA of those with grads, as lora_backward_s and lora_backward_weights: one call, so that a backend
  // may read dy once for ds and dB. x without data: dA is left for later.            x [T, in]; s, ds [T, >= max_rank]; dy [T, sum
  // out]
  virtual void lora_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                             TensorView ds) {
    lora_backward_s(linear, groups, dy, ds);
    lora_backward_weights(linear, groups, x, s, dy, ds);
  }

  // y = x * rsqrt(mean(x^2) + eps) * w.                       x, y [T, H] C; w [H] C
  virtual void rms_norm(TensorView x, TensorView w, float eps, TensorView y) = 0;
  // sum = x + delta; y = rms_norm(sum).                       x, delta, sum, y [T, H] C; sum may be x
  virtual void add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) = 0;
  // dx += d rms_norm / dx applied to dy (the residual adds).  x, dy, dx [T, H] C; w [H] C
  virtual void rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) = 0;
  // The same and y = rms_norm(x), reading x once: y [T, H] may be dy itself.
  virtual void rms_norm_and_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y) = 0;

  // cos_sin[t, i] = cos, [t, D/2 + i] = sin of positions[t] * inv_freq[i], times `attention_factor`. Once a step.
  // positions [T] i32 device; inv_freq [D/2] f32 device; cos_sin [T, D] f32
  virtual void rope_table(const int32_t* positions, const float* inv_freq, float attention_factor, TensorView cos_sin) = 0;
  // In place on the q and k columns of qkv [T, (Q + 2K) D] C: q/k norm per head when the weights [D] are not empty, then rotation
  // (half-split, Su et al. 2021: first half with second half). Rows whose kv_slots >= 0 write k and v to slot = page * P + offset;
  // kv_slots null: no row writes.
  // raw [n, (Q + K) D] C or empty: q and k before the norm of the first n rows, kept for backward.
  virtual void rope(TensorView qkv, const Rope& rope) = 0;
  // The gradient of rope() on the q and k columns of dqkv [T, (Q + 2K) D] C, in place. raw as kept (empty without q/k norm).
  virtual void rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                             float eps, TensorView raw) = 0;

  // out = softmax(scale q k^T, causal) v over the pages.      q [T, Q D] C (may be columns of qkv); out [T, Q D] C
  virtual void attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                               const AttentionShape& shape, TensorView out) = 0;
  // The same over packed sequences; lse [T, Q] f32 = log of the sum of exp of the scaled scores (natural log), or empty.
  virtual void attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                                TensorView out, TensorView lse) = 0;
  // attention_packed on the first `packed_rows` rows of q and out, attention_paged on others: a device may run them side by side.
  virtual void attention_mixed(TensorView q, TensorView k, TensorView v, int64_t packed_rows, const PackedBatch& packed, KvLayer kv,
                               const KvShape& kv_shape, const PagedBatch& paged, const AttentionShape& shape, TensorView out,
                               TensorView lse) {
    attention_packed(q.slice_rows(0, packed_rows), k, v, packed, shape, out.slice_rows(0, packed_rows), lse);
    attention_paged(q, kv, kv_shape, paged, shape, out);
  }
  // Gradients of attention_packed over whole sequences (q_rows = kv_rows). dq [T, Q D], dk, dv [T, K D] C, overwritten.
  virtual void attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                                  const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                                  TensorView dv) = 0;

  // y = silu(gate) * up.                                      gate_up [T, 2F] C (gate first); y [T, F] C
  virtual void swiglu(TensorView gate_up, TensorView y) = 0;
  // linear_lora of gate and up in one matrix, without a bias, then swiglu. One call so that a backend may compute h where gate_up
  // still is at hand. Both are outputs with `keep`; without it gate_up is scratch.
  // x [T, in] C; w [2F, in] C; s [T, >= max_rank] C; gate_up [T, 2F] C; h [T, F] C
  virtual void linear_lora_swiglu(TensorView x, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView s,
                                  TensorView gate_up, TensorView h, [[maybe_unused]] bool keep) {
    if (any_lora(groups)) linear_lora(x, w, {}, linear, groups, s, gate_up);
    else this->linear(x, w, {}, gate_up);
    swiglu(gate_up, h);
  }
  // dgate_up [T, 2F] may be gate_up itself.                   dy [T, F] C
  virtual void swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) = 0;
  // Both, reading gate_up once: y [T, F] may be dy itself, dgate_up gate_up itself.
  virtual void swiglu_and_backward(TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) = 0;
  // linear_lora_backward of the linear behind swiglu, then swiglu_and_backward: gate_up becomes its own gradient, h the output of
  // swiglu. One call so that a backend may keep dh, the gradient between the two, to itself.
  // dy [T, N] C; w [N, F] C; ds [T, >= max_rank] C; gate_up [T, 2F] C; h [T, F] C
  virtual void linear_lora_swiglu_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups,
                                           TensorView ds, TensorView gate_up, TensorView h) {
    linear_lora_backward(dy, w, linear, groups, ds, h);
    swiglu_and_backward(gate_up, h, gate_up, h);
  }

  // Loss and its gradient of rows with a target. logprob[i] = p, loss[i] as in LossRow; dlogits = dloss/dp * (onehot - softmax).
  // A loss that is not finite makes its row of dlogits NaN, so that the gradient's norm tells and the update is skipped.
  // logits [n, V] f32, may be overwritten; rows [n] device; dlogits [n, V] C or empty (no gradient), may be logits when C is f32;
  // logprob, loss [n] f32 device
  virtual void token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) = 0;
  // logits [n, V] f32, overwritten freely; ids [n] i32; logprob [n] f32; top_ids [n, N] i32 and top_logprobs [n, N] f32, or empty:
  // the N most probable tokens, most probable first (lowest id first on ties); columns past a row's top_logprobs are left alone.
  virtual void sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
                      TensorView top_logprobs) = 0;

  // norm[j] = L2 norm of all gradients of job j, in a fixed order.   norm [job_count] f32 device
  virtual void grad_norm(const AdamBatch& batch, float* norm) = 0;
  // AdamW on every tensor: g = grad * min(1, max_grad_norm / (norm + 1e-6)) as torch clips; m, v, master, weight updated, grad
  // zeroed. A job whose norm is not finite is skipped: master, m, v, weight stay, its grad is zeroed.
  virtual void adamw(const AdamBatch& batch, const float* norm) = 0;
};

// The CPU backend: f32, `threads` as in ThreadPool. `deterministic`: every output row is computed by the same sequence of
// operations whatever the number of rows beside it, so results do not depend on the batch bit for bit (slower products).
std::unique_ptr<Ops> make_cpu_ops(int threads, bool deterministic);

// The CUDA backend, from its own shared library, loaded at the first call. Throws DeviceError naming what is missing.
std::unique_ptr<Ops> make_cuda_ops(int device, DType compute_dtype, bool deterministic);

}  // namespace loquetier
