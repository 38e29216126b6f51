// What forward, backward and heads share (private to cpp/model/): a fused linear with LoRA in both directions, one layer's forward,
// and the scratch each of the three needs, carved by one function per phase so that sizing and running cannot disagree.
#pragma once

#include <cstdint>

#include "model/model.h"

namespace loquetier {

// y = x W^T + bias, block by block into adjacent columns.                          x [T, in]; y [T, sum out]
void base_linear(Ops& ops, const LinearWeights& weights, TensorView x, TensorView y);
// The same, then the LoRA of each row's adapter; s [T, R] keeps x A^T. One matrix goes as one op, which a backend may fuse.
void adapted_linear(Ops& ops, const LinearWeights& weights, const LoraLinear& lora, const LoraGroups& groups, TensorView x,
                    TensorView s, TensorView y);
// dx = dy W, summed over the blocks.                                               dy [T, sum out]; dx [T, in]
void base_linear_backward(Ops& ops, const LinearWeights& weights, TensorView dy, TensorView dx);

// True when some group has a gradient at this site: only then is the input of its A recomputed.
bool trains_site(const LoraGroups& groups, int32_t site);

// What one layer's forward needs of the batch, for rows [0, rows).
struct LayerBatch {
  int64_t rows = 0;
  int64_t packed_rows = 0;
  const LoraGroups* groups = nullptr;
  const PackedBatch* packed = nullptr;
  const PagedBatch* paged = nullptr;  // null: no rows with pages
  const int32_t* kv_slots = nullptr;  // null: no row writes keys and values
  TensorView cos_sin;                 // [rows, D] f32
  TensorView packed_kv;               // [>= rows, (Q + 2K) D]  rows that packed.kv_begin counts; empty: qkv of the rows themselves
  bool for_backward = false;          // gate_up is an output; otherwise scratch
};

// Where a layer ends: the norm in front of what comes next, and the residual stream.
struct LayerOutput {
  TensorView norm;  // [H]
  TensorView x;     // [T, H]  may be keep.mid
};

// One layer over all rows. in: keep.x, norm = rms_norm(keep.x). Fills keep (qkv, attn, mid, gate_up, s, ...), act is the swiglu
// output; norm ends as that of output.x, or without an output, where the layer ends in front of down's product, of keep.mid.
// delta [T, H] is scratch.
void layer_forward(Ops& ops, const ModelConfig& config, const LayerWeights& weights, int64_t layer, const LayerBatch& batch,
                   const LayerSaved& keep, KvLayer kv, const KvShape& kv_shape, TensorView norm, TensorView act, TensorView delta,
                   const LayerOutput* output);

// The heads of chunks [first, last) (heads.cpp). final_norm [T, H] is rms_norm(final_x); final_x and dx [train rows, H] are used by
// train chunks only.
void run_heads(Ops& ops, const ModelWeights& weights, const BatchView& batch, size_t first, size_t last, TensorView final_norm,
               TensorView final_x, TensorView dx, Arena& scratch);

// ---------------------------------------------------------------- scratch

struct ForwardScratch {
  TensorView norm;        // [T, H]  the normed residual stream; of the last layer: the heads' input
  TensorView x;           // [T, H]  residual stream, when nothing is saved
  TensorView cos_sin;     // [T, D] f32, when nothing is saved
  size_t heads_mark = 0;  // from here on the layers' scratch is given to the heads
  LayerSaved layer;       // one layer's buffers for all layers, unless each is saved
  TensorView s[4];        // [T, R]  when the rows beside a chunk need more columns than the micro-batch has saved
  TensorView act;         // [T, F]
  TensorView delta;       // [T, H]
  static ForwardScratch carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, bool train, int64_t rank,
                              int64_t saved_rank, Recompute recompute);
};

struct HeadScratch {
  TensorView norm;    // [n, H]  head rows of final_norm; then its gradient
  TensorView s;       // [n, R]
  TensorView logits;  // [n, V] f32
  // train chunks only
  TensorView dlogits;  // [n, V] C; logits itself when C is f32
  TensorView ds;       // [n, R]
  TensorView x;        // [n, H]  head rows of final_x
  TensorView dx;       // [n, H]
  static HeadScratch carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, bool train, int64_t rank);
};

// Of n rows: a block's, or all of them when the layer runs as a whole, which then keeps its BackwardState here too.
struct BackwardScratch {
  TensorView delta;     // [n, H]   with Recompute::layer
  TensorView wide;      // [n, F]   gradient of the swiglu output, then that output
  TensorView norm;      // [n, H]   a norm's output, then its gradient
  TensorView ds;        // [n, R]
  BackwardState state;  // whole layer only; dqkv lies in the memory of `wide`, which is dead by then
  static BackwardScratch carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t rank,
                               Recompute recompute, bool whole);
};

}  // namespace loquetier
