// Forward, top to bottom like the model: embedding; per layer qkv, rope, attention, o, gate and up, swiglu, down; then the heads.
// The residual add and the norm that follows it are one op, so each layer ends by making the next one's normed input.
// Mirror: backward.cpp. Heads: heads.cpp.
#include "model/layer.h"

namespace loquetier {

void base_linear(Ops& ops, const LinearWeights& weights, TensorView x, TensorView y) {
  int64_t column = 0;
  for (const LinearBlock& block : weights) {
    ops.linear(x, block.w, block.bias, y.slice_cols(column, block.w.rows));
    column += block.w.rows;
  }
}

void adapted_linear(Ops& ops, const LinearWeights& weights, const LoraLinear& lora, const LoraGroups& groups, TensorView x,
                    TensorView s, TensorView y) {
  if (!any_lora(groups)) {
    base_linear(ops, weights, x, y);
  } else if (weights.size() == 1) {
    ops.linear_lora(x, weights[0].w, weights[0].bias, lora, groups, s, y);
  } else {
    base_linear(ops, weights, x, y);
    ops.lora_shrink(lora, groups, x, s);
    ops.lora_expand(lora, groups, s, y);
  }
}

void layer_forward(Ops& ops, const ModelConfig& config, const LayerWeights& weights, int64_t layer, const LayerBatch& batch,
                   const LayerSaved& keep, KvLayer kv, const KvShape& kv_shape, TensorView norm, TensorView act, TensorView delta,
                   bool output) {
  const AttentionShape shape = config.attention();
  const int64_t q_cols = int64_t{shape.q_heads} * shape.head_size, k_cols = int64_t{shape.kv_heads} * shape.head_size;
  const LoraGroups& groups = *batch.groups;
  const auto lora = [&](Site site) { return lora_linear(config, site_of(layer, site)); };

  adapted_linear(ops, weights.qkv, lora(Site::qkv), groups, norm, keep.s[0], keep.qkv);
  ops.rope(keep.qkv, shape, batch.cos_sin, weights.q_norm, weights.k_norm, config.rms_norm_eps, keep.raw, batch.kv_slots, kv,
           kv_shape);

  const TensorView q = keep.qkv.slice_cols(0, q_cols), k = keep.qkv.slice_cols(q_cols, k_cols),
                   v = keep.qkv.slice_cols(q_cols + k_cols, k_cols);
  if (batch.packed_rows > 0) {
    const auto packed = [&](TensorView t) { return t.slice_rows(0, batch.packed_rows); };
    ops.attention_packed(packed(q), packed(k), packed(v), *batch.packed, shape, packed(keep.attn),
                         keep.lse.empty() ? TensorView{} : packed(keep.lse));
  }
  if (batch.paged && batch.paged->sequences > 0) ops.attention_paged(q, kv, kv_shape, *batch.paged, shape, keep.attn);

  adapted_linear(ops, weights.o, lora(Site::o), groups, keep.attn, keep.s[1], delta);
  ops.add_rms_norm(keep.x, delta, weights.post_norm, config.rms_norm_eps, keep.mid, norm);

  adapted_linear(ops, weights.gate_up, lora(Site::gate_up), groups, norm, keep.s[2], keep.gate_up);
  ops.swiglu(keep.gate_up, act);
  if (output) {
    adapted_linear(ops, weights.down, lora(Site::down), groups, act, keep.s[3], delta);
  } else if (any_lora(groups)) {
    ops.lora_shrink(lora(Site::down), groups, act, keep.s[3]);
  }
}

void Model::forward(const BatchView& batch, KvCache& kv, Saved* saved, Arena& saved_arena, Arena& scratch,
                    Recompute recompute) const {
  const ModelConfig& config = weights_->config;
  const WeightTable& table = weights_->table;
  const DType dtype = ops_.compute_dtype();
  const int64_t rows = batch.rows, layers = config.num_layers, rank = batch.groups.max_rank;
  const bool train = batch.train_rows > 0;
  require(0 <= batch.train_rows && batch.train_rows <= batch.packed_rows && batch.packed_rows <= rows,
          "[forward] batch: expected 0 <= train_rows <= packed_rows <= rows, got ", batch.train_rows, ", ", batch.packed_rows, ", ",
          rows);
  require(!train || saved, "[forward] saved: expected a place to keep activations of ", batch.train_rows,
          " training rows, got none");
  require(std::ssize(kv.layers) == layers, "[forward] kv: expected ", layers, " layers, got ", kv.layers.size());
  if (rows == 0) return;

  const size_t mark = scratch.mark();
  ForwardScratch work = ForwardScratch::carve(scratch, config, dtype, rows, train, rank, recompute);
  if (train) *saved = Saved::carve(saved_arena, config, dtype, rows, batch.train_rows, rank, recompute);
  const bool keep_all = train && recompute == Recompute::none;
  const TensorView cos_sin = train ? saved->cos_sin : work.cos_sin;
  const TensorView final_x = train ? saved->final_x : work.x;
  // Where layer l reads the residual stream, and the layer below it writes it.
  const auto stream = [&](int64_t l) { return !train ? work.x : l < layers ? saved->layers[static_cast<size_t>(l)].x : final_x; };

  const LayerBatch layer_batch = {rows, batch.packed_rows, &batch.groups, &batch.packed, &batch.paged, batch.kv_slots, cos_sin};
  ops_.rope_table(batch.positions, weights_->inv_freq.as<float>(), 1.0f, cos_sin);
  ops_.embedding(batch.ids, table.embedding, stream(0));
  ops_.rms_norm(stream(0), table.layers[0].input_norm, config.rms_norm_eps, work.norm);
  for (int64_t l = 0; l < layers; ++l) {
    const size_t i = static_cast<size_t>(l);
    LayerSaved keep = keep_all ? saved->layers[i] : work.layer;
    if (!keep_all) {  // the residual stream runs in place, or through the inputs that are kept
      keep.x = stream(l);
      keep.mid = stream(l + 1);
    }
    layer_forward(ops_, config, table.layers[i], l, layer_batch, keep, kv.layers[i], kv.shape, work.norm, work.act, work.delta,
                  true);
    const TensorView next_norm = l + 1 < layers ? table.layers[i + 1].input_norm : table.final_norm;
    ops_.add_rms_norm(keep.mid, work.delta, next_norm, config.rms_norm_eps, stream(l + 1), work.norm);
  }

  scratch.rewind(work.heads_mark);
  if (train) ops_.device().zero(saved->dx.data, static_cast<size_t>(saved->dx.size()) * size_of(dtype));
  run_heads(ops_, *weights_, batch, work.norm, final_x, train ? saved->dx : TensorView{}, scratch);
  scratch.rewind(mark);
}

}  // namespace loquetier
