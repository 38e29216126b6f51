// Backward of one layer: forward.cpp's list upside down, for the training rows alone. The base is frozen, so only dx, dA and dB
// exist.
//
// saved.dx carries the gradient of the residual stream; every branch adds to it (rms_norm_backward adds, the residual passes
// through). Where a buffer's old content is dead its gradient takes its place: a norm's output and gate_up are each overwritten by
// their own gradient, after the LoRA weight gradients have read them. The swiglu output is not there until its gradient is.
#include "model/layer.h"

namespace loquetier {

void base_linear_backward(Ops& ops, const LinearWeights& weights, TensorView dy, TensorView dx) {
  int64_t column = 0;
  for (const LinearBlock& block : weights) {
    ops.linear_backward(dy.slice_cols(column, block.w.rows), block.w, dx, column > 0);
    column += block.w.rows;
  }
}

bool trains_site(const LoraGroups& groups, int32_t site) {
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (group.rows == 0 || !group.host_sites || !group.host_grads) continue;
    for (const LoraPart& part : group.host_sites[site].part) {
      if (part.rank > 0) return true;
    }
  }
  return false;
}

namespace {

// dA, dB += of one fused linear, then dx unless it is empty. x, the linear's input, may share memory with dx: it is read first.
// Without x, dA is left to the caller, from ds.
void linear_backward(Ops& ops, const LinearWeights& weights, const LoraLinear& lora, const LoraGroups& groups, bool trained,
                     TensorView x, TensorView s, TensorView dy, TensorView ds, TensorView dx) {
  if (trained) ops.lora_backward(lora, groups, x, s, dy, ds);
  if (dx.empty()) return;
  if (trained && weights.size() == 1) {
    ops.linear_lora_backward(dy, weights[0].w, lora, groups, ds, dx);
    return;
  }
  base_linear_backward(ops, weights, dy, dx);
  if (trained) ops.lora_backward_x(lora, groups, ds, dx);
}

}  // namespace

void Model::backward_layer(const BatchView& batch, const Saved& saved, int64_t layer, Arena& scratch) const {
  const ModelConfig& config = weights_->config;
  require(batch.lowest_layer <= layer && layer < config.num_layers, "[backward] layer: expected ", batch.lowest_layer, " .. ",
          config.num_layers - 1, ", got ", layer);
  require(saved.train_rows == batch.train_rows, "[backward] saved: expected ", batch.train_rows, " training rows, got ",
          saved.train_rows);
  const int64_t n = batch.train_rows;
  if (n == 0) return;

  const LayerWeights& weights = weights_->table.layers[static_cast<size_t>(layer)];
  const LoraGroups& groups = batch.train_groups;
  const AttentionShape shape = config.attention();
  const int64_t q_cols = int64_t{shape.q_heads} * shape.head_size, k_cols = int64_t{shape.kv_heads} * shape.head_size;
  const auto lora = [&](Site site) { return lora_linear(config, site_of(layer, site)); };
  const auto trained = [&](Site site) { return trains_site(groups, site_of(layer, site)); };
  const bool qkv_trained = trained(Site::qkv), o_trained = trained(Site::o), gate_up_trained = trained(Site::gate_up),
             down_trained = trained(Site::down);
  // Gradients go down only as far as something below is trained.
  const bool below_qkv = layer > batch.lowest_layer, below_o = below_qkv || qkv_trained, below_gate_up = below_o || o_trained,
             below_down = below_gate_up || gate_up_trained;

  const size_t mark = scratch.mark();
  BackwardScratch work = BackwardScratch::carve(scratch, config, ops_.compute_dtype(), n, saved.rank, saved.recompute);
  const TensorView act = matrix(work.wide.data, work.wide.dtype, n, config.intermediate_size),
                   dqkv = matrix(work.wide.data, work.wide.dtype, n, q_cols + 2 * k_cols);
  const auto first = [n](TensorView t) { return t.empty() ? TensorView{} : t.slice_rows(0, n); };
  const TensorView dx = saved.dx, cos_sin = first(saved.cos_sin);

  LayerSaved kept = saved.layers[static_cast<size_t>(layer)];
  kept.x = first(kept.x);
  if (saved.recompute == Recompute::layer) {
    work.layer.x = kept.x;
    kept = work.layer;
    const LayerBatch rows = {n, n, &groups, &batch.train_packed, nullptr, nullptr, cos_sin};
    ops_.rms_norm(kept.x, weights.input_norm, config.rms_norm_eps, work.norm);
    layer_forward(ops_, config, weights, layer, rows, kept, {}, {}, work.norm, act, work.delta, false);
  }
  const TensorView qkv = first(kept.qkv), attn = first(kept.attn), mid = first(kept.mid), gate_up = first(kept.gate_up);
  const auto rerun_norm = [&](TensorView x, TensorView w) { ops_.rms_norm(x, w, config.rms_norm_eps, work.norm); };

  // down: its input comes back where its gradient was, from the one reading of gate_up that the gradient of swiglu needs
  if (down_trained && !below_down) ops_.swiglu(gate_up, act);
  linear_backward(ops_, weights.down, lora(Site::down), groups, down_trained, below_down ? TensorView{} : act, first(kept.s[3]), dx,
                  work.ds, below_down ? act : TensorView{});
  if (below_down && down_trained) {
    ops_.swiglu_and_backward(gate_up, act, gate_up, act);
    ops_.lora_backward_weights(lora(Site::down), groups, act, {}, {}, work.ds);
  } else if (below_down) {
    ops_.swiglu_backward(gate_up, act, gate_up);
  }
  // gate_up, norm
  if (below_down) {
    if (gate_up_trained) rerun_norm(mid, weights.post_norm);
    linear_backward(ops_, weights.gate_up, lora(Site::gate_up), groups, gate_up_trained, work.norm, first(kept.s[2]), gate_up,
                    work.ds, below_gate_up ? work.norm : TensorView{});
  }
  // o
  if (below_gate_up) {
    ops_.rms_norm_backward(mid, weights.post_norm, config.rms_norm_eps, work.norm, dx);
    linear_backward(ops_, weights.o, lora(Site::o), groups, o_trained, attn, first(kept.s[1]), dx, work.ds,
                    below_o ? work.dattn : TensorView{});
  }
  // attention, rope, qkv
  if (below_o) {
    const auto q = [&](TensorView t) { return t.slice_cols(0, q_cols); };
    const auto k = [&](TensorView t) { return t.slice_cols(q_cols, k_cols); };
    const auto v = [&](TensorView t) { return t.slice_cols(q_cols + k_cols, k_cols); };
    ops_.attention_backward(q(qkv), k(qkv), v(qkv), attn, first(kept.lse), work.dattn, batch.train_packed, shape, q(dqkv), k(dqkv),
                            v(dqkv));
    ops_.rope_backward(dqkv, shape, cos_sin, weights.q_norm, weights.k_norm, config.rms_norm_eps, first(kept.raw));
    if (qkv_trained) rerun_norm(kept.x, weights.input_norm);
    linear_backward(ops_, weights.qkv, lora(Site::qkv), groups, qkv_trained, work.norm, first(kept.s[0]), dqkv, work.ds,
                    below_qkv ? work.norm : TensorView{});
  }
  // norm
  if (below_qkv) ops_.rms_norm_backward(kept.x, weights.input_norm, config.rms_norm_eps, work.norm, dx);
  scratch.rewind(mark);
}

}  // namespace loquetier
