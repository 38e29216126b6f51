// Backward of one layer: forward.cpp's list upside down, for the training rows alone. The base is frozen, so only dx, dA and dB
// exist.
//
// saved.dx carries the gradient of the residual stream; every branch adds to it (rms_norm_backward adds, the residual passes
// through). gate_up is overwritten by its own gradient. The outputs of swiglu and of the norms are not kept: they come back, where
// their gradients were, for the LoRA gradients that need them.
//
// A layer runs in parts, each over a block of rows (cut_layer() in plan/slices.h): all of them at once over all rows
// (backward_layer), or one at a time (backward_slice), with BackwardState between them.
#include <stdexcept>

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

// What all parts of one layer's backward share.
struct Model::BackwardLayer {
  const LayerWeights& weights;
  const BatchView& batch;
  const Saved& saved;
  int64_t layer = 0;
  bool recompute = false;
  // Gradients go down only as far as something below is trained, in whichever rows.
  bool below_down = false, below_gate_up = false, below_o = false, below_qkv = false;
};

Model::BackwardLayer Model::layer_of(const BatchView& batch, const Saved& saved, int64_t layer) const {
  const ModelConfig& config = weights_->config;
  require(batch.lowest_layer <= layer && layer < config.num_layers, "[backward] layer: expected ", batch.lowest_layer, " .. ",
          config.num_layers - 1, ", got ", layer);
  require(saved.train_rows == batch.train_rows, "[backward] saved: expected ", batch.train_rows, " training rows, got ",
          saved.train_rows);
  const auto trained = [&](Site site) { return trains_site(batch.train_groups, site_of(layer, site)); };
  BackwardLayer of = {weights_->table.layers[static_cast<size_t>(layer)], batch, saved, layer, saved.recompute == Recompute::layer};
  of.below_qkv = layer > batch.lowest_layer;
  of.below_o = of.below_qkv || trained(Site::qkv);
  of.below_gate_up = of.below_o || trained(Site::o);
  of.below_down = of.below_gate_up || trained(Site::gate_up);
  return of;
}

void Model::backward_layer(const BatchView& batch, const Saved& saved, int64_t layer, Arena& scratch) const {
  const BackwardLayer of = layer_of(batch, saved, layer);
  if (batch.train_rows == 0) return;
  const size_t mark = scratch.mark();
  const BackwardScratch work =
      BackwardScratch::carve(scratch, weights_->config, ops_.compute_dtype(), batch.train_rows, saved.rank, saved.recompute, true);
  const BackwardBlock all = {0, batch.train_rows, batch.train_groups, batch.train_packed};
  for (const BackwardPart part : {BackwardPart::rerun, BackwardPart::mlp, BackwardPart::attention, BackwardPart::qkv}) {
    backward_part(of, part, all, work.state, work);
  }
  scratch.rewind(mark);
}

void Model::backward_slice(const BatchView& batch, const Saved& saved, int64_t layer, BackwardPart part, const BackwardBlock& block,
                           Arena& scratch) const {
  const BackwardLayer of = layer_of(batch, saved, layer);
  require(saved.chunked && part != BackwardPart::whole,
          "[backward] slice: expected a part of a layer of a Saved that reserve() made");
  require(block.row_begin >= 0 && block.rows >= 0 && block.row_begin + block.rows <= batch.train_rows,
          "[backward] block: expected rows inside ", batch.train_rows, ", got ", block.row_begin, " + ", block.rows);
  if (block.rows == 0) return;
  const size_t mark = scratch.mark();
  const BackwardScratch work =
      BackwardScratch::carve(scratch, weights_->config, ops_.compute_dtype(), block.rows, saved.rank, saved.recompute, false);
  backward_part(of, part, block, saved.backward, work);
  scratch.rewind(mark);
}

void Model::backward_part(const BackwardLayer& of, BackwardPart part, const BackwardBlock& block, const BackwardState& state,
                          const BackwardScratch& work) const {
  const ModelConfig& config = weights_->config;
  const LayerWeights& weights = of.weights;
  const LoraGroups& groups = block.groups;
  const AttentionShape shape = config.attention();
  const int64_t q_cols = int64_t{shape.q_heads} * shape.head_size, k_cols = int64_t{shape.kv_heads} * shape.head_size;
  const auto lora = [&](Site site) { return lora_linear(config, site_of(of.layer, site)); };
  const auto trained = [&](Site site) { return trains_site(groups, site_of(of.layer, site)); };
  const auto mine = [&](TensorView t) { return t.empty() ? TensorView{} : t.slice_rows(block.row_begin, block.rows); };

  const LayerSaved& kept = of.saved.layers[static_cast<size_t>(of.layer)];
  const LayerSaved& from = of.recompute ? state.rerun : kept;
  const TensorView x = mine(kept.x), dx = mine(of.saved.dx), cos_sin = mine(of.saved.cos_sin);
  const TensorView qkv = mine(from.qkv), attn = mine(from.attn), mid = mine(from.mid), gate_up = mine(from.gate_up);
  const TensorView dattn = mine(state.dattn), dqkv = mine(state.dqkv), act = work.wide;

  // A linear and the norm in front of it, down to the norm's input unless nothing below is trained. The linear's input comes back
  // where its gradient was, from the one reading that the norm's gradient needs.
  const auto norm_linear = [&](Site site, const LinearWeights& linear, TensorView input, TensorView norm, TensorView s,
                               TensorView dy, bool below) {
    const bool adapted = trained(site);
    if (adapted && !below) ops_.rms_norm(input, norm, config.rms_norm_eps, work.norm);
    linear_backward(ops_, linear, lora(site), groups, adapted, below ? TensorView{} : work.norm, s, dy, work.ds,
                    below ? work.norm : TensorView{});
    if (below && adapted) {
      ops_.rms_norm_and_backward(input, norm, config.rms_norm_eps, work.norm, dx, work.norm);
      ops_.lora_backward_weights(lora(site), groups, work.norm, {}, {}, work.ds);
    } else if (below) {
      ops_.rms_norm_backward(input, norm, config.rms_norm_eps, work.norm, dx);
    }
  };

  switch (part) {
    case BackwardPart::rerun: {
      if (!of.recompute) return;
      LayerSaved keep = {x, qkv, mine(from.raw), attn, mine(from.lse), mid, gate_up, {}};
      for (int i = 0; i < 4; ++i) keep.s[i] = mine(from.s[i]);
      const LayerBatch rows = {block.rows, block.rows, &groups, &block.packed, nullptr, nullptr, cos_sin, {}, true};
      ops_.rms_norm(x, weights.input_norm, config.rms_norm_eps, work.norm);
      layer_forward(ops_, config, weights, of.layer, rows, keep, {}, {}, work.norm, act, work.delta, nullptr);
      return;
    }
    case BackwardPart::mlp: {
      // down, which is one matrix: its input comes back with the gradient of swiglu, from the one reading of gate_up for both
      const bool down_trained = trained(Site::down), o_trained = trained(Site::o);
      if (down_trained && of.below_down) {
        ops_.lora_backward(lora(Site::down), groups, {}, mine(from.s[3]), dx, work.ds);
        ops_.linear_lora_swiglu_backward(dx, weights.down[0].w, lora(Site::down), groups, work.ds, gate_up, act);
        ops_.lora_backward_weights(lora(Site::down), groups, act, {}, {}, work.ds);
      } else if (down_trained) {
        ops_.swiglu(gate_up, act);
        ops_.lora_backward(lora(Site::down), groups, act, mine(from.s[3]), dx, work.ds);
      } else if (of.below_down) {
        base_linear_backward(ops_, weights.down, dx, act);
        ops_.swiglu_backward(gate_up, act, gate_up);
      }
      if (of.below_down)
        norm_linear(Site::gate_up, weights.gate_up, mid, weights.post_norm, mine(from.s[2]), gate_up, of.below_gate_up);
      // o
      if (of.below_gate_up) {
        linear_backward(ops_, weights.o, lora(Site::o), groups, o_trained, attn, mine(from.s[1]), dx, work.ds,
                        of.below_o ? dattn : TensorView{});
      }
      return;
    }
    case BackwardPart::attention: {
      if (!of.below_o) return;
      const auto q = [&](TensorView t) { return t.slice_cols(0, q_cols); };
      const auto k = [&](TensorView t) { return t.slice_cols(q_cols, k_cols); };
      const auto v = [&](TensorView t) { return t.slice_cols(q_cols + k_cols, k_cols); };
      ops_.attention_backward(q(qkv), k(qkv), v(qkv), attn, mine(from.lse), dattn, block.packed, shape, q(dqkv), k(dqkv), v(dqkv));
      return;
    }
    case BackwardPart::qkv: {
      if (!of.below_o) return;
      ops_.rope_backward(dqkv, shape, cos_sin, weights.q_norm, weights.k_norm, config.rms_norm_eps, mine(from.raw));
      norm_linear(Site::qkv, weights.qkv, x, weights.input_norm, mine(from.s[0]), dqkv, of.below_qkv);
      return;
    }
    case BackwardPart::whole:
      throw std::logic_error("[backward] part: expected one of a layer's parts");
  }
}

}  // namespace loquetier
