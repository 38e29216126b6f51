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

namespace {

// x = residual + linear(in), norm = rms_norm(x); delta is scratch.
void linear_into_stream(Ops& ops, const LinearWeights& weights, const LoraLinear& lora, const LoraGroups& groups, TensorView in,
                        TensorView s, TensorView delta, TensorView residual, TensorView norm_weight, float eps, TensorView x,
                        TensorView norm) {
  if (weights.size() == 1) {
    ops.linear_lora_add_rms_norm(in, weights[0].w, weights[0].bias, lora, groups, s, delta, residual, norm_weight, eps, x, norm);
  } else {
    adapted_linear(ops, weights, lora, groups, in, s, delta);
    ops.add_rms_norm(residual, delta, norm_weight, eps, x, norm);
  }
}

}  // namespace

void layer_forward(Ops& ops, const ModelConfig& config, const LayerWeights& weights, int64_t layer, const LayerBatch& batch,
                   const LayerSaved& keep, KvLayer kv, const KvShape& kv_shape, TensorView norm, TensorView act, TensorView delta,
                   const LayerOutput* output) {
  const AttentionShape shape = config.attention();
  const int64_t q_cols = int64_t{shape.q_heads} * shape.head_size, k_cols = int64_t{shape.kv_heads} * shape.head_size;
  const LoraGroups& groups = *batch.groups;
  const auto lora = [&](Site site) { return lora_linear(config, site_of(layer, site)); };

  const float eps = config.rms_norm_eps;
  const Rope rope = {shape, batch.cos_sin, weights.q_norm, weights.k_norm, eps, keep.raw, batch.kv_slots, kv, kv_shape};
  const bool paged = batch.paged && batch.paged->sequences > 0, whole = weights.qkv.size() == 1;
  const bool at_once = paged && batch.packed_rows == 0 && whole;  // nothing reads qkv later: that of packed rows alone is kept
  if (at_once) {
    ops.linear_lora_rope_attention(norm, weights.qkv[0].w, weights.qkv[0].bias, lora(Site::qkv), groups, keep.s[0], keep.qkv, rope,
                                   *batch.paged, keep.attn);
  } else if (whole) {
    ops.linear_lora_rope(norm, weights.qkv[0].w, weights.qkv[0].bias, lora(Site::qkv), groups, keep.s[0], keep.qkv, rope);
  } else {
    adapted_linear(ops, weights.qkv, lora(Site::qkv), groups, norm, keep.s[0], keep.qkv);
    ops.rope(keep.qkv, rope);
  }

  const TensorView q = keep.qkv.slice_cols(0, q_cols);
  if (batch.packed_rows > 0) {
    const auto packed = [&](TensorView t) { return t.slice_rows(0, batch.packed_rows); };
    const TensorView rows = batch.packed_kv.empty() ? packed(keep.qkv) : batch.packed_kv;
    const TensorView k = rows.slice_cols(q_cols, k_cols), v = rows.slice_cols(q_cols + k_cols, k_cols),
                     lse = keep.lse.empty() ? TensorView{} : packed(keep.lse);
    if (paged) {
      ops.attention_mixed(q, k, v, batch.packed_rows, *batch.packed, kv, kv_shape, *batch.paged, shape, keep.attn, lse);
    } else {
      ops.attention_packed(packed(q), k, v, *batch.packed, shape, packed(keep.attn), lse);
    }
  } else if (paged && !at_once) {
    ops.attention_paged(q, kv, kv_shape, *batch.paged, shape, keep.attn);
  }

  linear_into_stream(ops, weights.o, lora(Site::o), groups, keep.attn, keep.s[1], delta, keep.x, weights.post_norm, eps, keep.mid,
                     norm);

  const LinearWeights& gate_up = weights.gate_up;
  if (gate_up.size() == 1 && gate_up[0].bias.empty()) {
    ops.linear_lora_swiglu(norm, gate_up[0].w, lora(Site::gate_up), groups, keep.s[2], keep.gate_up, act, batch.for_backward);
  } else {
    adapted_linear(ops, gate_up, lora(Site::gate_up), groups, norm, keep.s[2], keep.gate_up);
    ops.swiglu(keep.gate_up, act);
  }
  if (output) {
    linear_into_stream(ops, weights.down, lora(Site::down), groups, act, keep.s[3], delta, keep.mid, output->norm, eps, output->x,
                       norm);
  } else if (any_lora(groups)) {
    ops.lora_shrink(lora(Site::down), groups, act, keep.s[3]);
  }
}

// Layers [first, last) over all rows; `work.norm` ends as the normed input of the layer that comes next, or of the heads.
int64_t Model::run_layers(const BatchView& batch, KvCache& kv, const Saved* saved, int64_t first, int64_t last,
                          ForwardScratch& work, const std::function<bool()>& leave) const {
  const ModelConfig& config = weights_->config;
  const WeightTable& table = weights_->table;
  const int64_t rows = batch.rows, layers = config.num_layers, rank = batch.groups.max_rank;
  const bool train = saved != nullptr, keep_all = train && saved->recompute == Recompute::none;
  const bool copy_s = keep_all && rank > saved->rank;  // the rows beside a chunk use more columns of S than it saves
  const auto mine = [&](TensorView t) { return t.empty() ? TensorView{} : t.slice_rows(batch.saved_row, rows); };
  const TensorView cos_sin = train ? mine(saved->cos_sin) : work.cos_sin;
  // Where layer l reads the residual stream, and the layer below it writes it.
  const auto stream = [&](int64_t l) {
    return !train ? work.x : mine(l < layers ? saved->layers[static_cast<size_t>(l)].x : saved->final_x);
  };

  LayerBatch layer_batch = {rows, batch.packed_rows, &batch.groups, &batch.packed, &batch.paged, batch.kv_slots, cos_sin,
                            {},   keep_all};
  if (first == 0) {
    ops_.rope_table(batch.positions, weights_->inv_freq.as<float>(), 1.0f, cos_sin);
    ops_.embedding(batch.ids, table.embedding, stream(0));
  }
  ops_.rms_norm(stream(first), table.layers[static_cast<size_t>(first)].input_norm, config.rms_norm_eps, work.norm);
  for (int64_t l = first; l < last; ++l) {
    const size_t i = static_cast<size_t>(l);
    LayerSaved keep = work.layer;
    if (train) {
      const LayerSaved& kept = saved->layers[i];
      if (keep_all) {
        keep.qkv = mine(kept.qkv);
        if (!kept.raw.empty()) keep.raw = kept.raw.slice_rows(batch.saved_row, batch.train_rows);
        keep.attn = mine(kept.attn);
        keep.lse = mine(kept.lse);
        keep.gate_up = mine(kept.gate_up);
        for (int k = 0; k < 4; ++k) keep.s[k] = copy_s ? work.s[k] : mine(kept.s[k]);
      } else if (saved->chunked) {
        keep.qkv = mine(kept.qkv);
      }
      if (saved->chunked) layer_batch.packed_kv = kept.qkv.slice_rows(0, batch.saved_row + batch.packed_rows);
    }
    // Unless all is kept the residual stream runs in place, or through the inputs that are kept.
    keep.x = stream(l);
    keep.mid = keep_all ? mine(saved->layers[i].mid) : stream(l + 1);
    const LayerOutput output = {l + 1 < layers ? table.layers[i + 1].input_norm : table.final_norm, stream(l + 1)};
    layer_forward(ops_, config, table.layers[i], l, layer_batch, keep, kv.layers[i], kv.shape, work.norm, work.act, work.delta,
                  &output);
    if (copy_s && saved->rank > 0 && batch.train_rows > 0) {
      for (int k = 0; k < 4; ++k) {
        ops_.convert(work.s[k].slice_rows(0, batch.train_rows).slice_cols(0, saved->rank),
                     saved->layers[i].s[k].slice_rows(batch.saved_row, batch.train_rows));
      }
    }
    if (leave && leave()) return l + 1;
  }
  return last;
}

namespace {

void check_batch(const BatchView& batch, const KvCache& kv, int64_t layers) {
  require(0 <= batch.train_rows && batch.train_rows <= batch.packed_rows && batch.packed_rows <= batch.rows,
          "[forward] batch: expected 0 <= train_rows <= packed_rows <= rows, got ", batch.train_rows, ", ", batch.packed_rows, ", ",
          batch.rows);
  require(std::ssize(kv.layers) == layers, "[forward] kv: expected ", layers, " layers, got ", kv.layers.size());
}

void check_chunk(const BatchView& batch, const Saved& saved) {
  require(saved.chunked, "[forward] saved: expected one that reserve() made");
  require(
      batch.saved_row >= 0 && batch.saved_row + batch.train_rows <= saved.train_rows && batch.saved_row + batch.rows <= saved.rows,
      "[forward] chunk: expected at most ", saved.train_rows, " training rows and ", saved.rows, " in all, got ", batch.train_rows,
      " and ", batch.rows, " from ", batch.saved_row);
}

}  // namespace

void Model::forward(const BatchView& batch, KvCache& kv, Saved* saved, Arena& saved_arena, Arena& scratch,
                    Recompute recompute) const {
  const ModelConfig& config = weights_->config;
  const DType dtype = ops_.compute_dtype();
  const int64_t rows = batch.rows, rank = batch.groups.max_rank;
  const bool train = batch.train_rows > 0;
  check_batch(batch, kv, config.num_layers);
  require(!train || saved, "[forward] saved: expected a place to keep activations of ", batch.train_rows,
          " training rows, got none");
  require(batch.saved_row == 0, "[forward] saved_row: expected 0, got ", batch.saved_row);
  if (rows == 0) return;

  const size_t mark = scratch.mark();
  ForwardScratch work = ForwardScratch::carve(scratch, config, dtype, rows, train, rank, rank, recompute);
  if (train) {
    *saved = Saved::carve(saved_arena, config, dtype, rows, batch.train_rows, rank, recompute);
    ops_.device().zero(saved->dx.data, static_cast<size_t>(saved->dx.size()) * size_of(dtype));
  }
  run_layers(batch, kv, train ? saved : nullptr, 0, config.num_layers, work);
  scratch.rewind(work.heads_mark);
  run_heads(ops_, *weights_, batch, 0, batch.chunks.size(), work.norm, train ? saved->final_x : work.x,
            train ? saved->dx : TensorView{}, scratch);
  scratch.rewind(mark);
}

int64_t Model::forward_layers(const BatchView& batch, KvCache& kv, const Saved& saved, int64_t first, int64_t last, Arena& scratch,
                              const std::function<bool()>& leave) const {
  const ModelConfig& config = weights_->config;
  check_batch(batch, kv, config.num_layers);
  check_chunk(batch, saved);
  require(0 <= first && first <= last && last <= config.num_layers, "[forward] layers: expected a range inside 0 .. ",
          config.num_layers, ", got ", first, " .. ", last);
  if (batch.rows == 0 || first == last) return last;
  const size_t mark = scratch.mark();
  ForwardScratch work = ForwardScratch::carve(scratch, config, ops_.compute_dtype(), batch.rows, true, batch.groups.max_rank,
                                              saved.rank, saved.recompute);
  const int64_t next = run_layers(batch, kv, &saved, first, last, work, leave);
  scratch.rewind(mark);
  return next;
}

void Model::forward_heads(const BatchView& batch, const Saved& saved, int64_t first, int64_t last, Arena& scratch) const {
  const ModelConfig& config = weights_->config;
  check_chunk(batch, saved);
  require(0 <= first && first <= last && last <= std::ssize(batch.chunks), "[forward] head chunks: expected a range inside 0 .. ",
          batch.chunks.size(), ", got ", first, " .. ", last);
  if (batch.rows == 0 || first == last) return;
  const size_t mark = scratch.mark();
  const TensorView norm = scratch.take(ops_.compute_dtype(), batch.rows, config.hidden_size);
  const TensorView final_x = saved.final_x.slice_rows(batch.saved_row, batch.rows);
  ops_.rms_norm(final_x, weights_->table.final_norm, config.rms_norm_eps, norm);
  run_heads(ops_, *weights_, batch, static_cast<size_t>(first), static_cast<size_t>(last), norm, final_x,
            saved.dx.slice_rows(batch.saved_row, batch.train_rows), scratch);
  scratch.rewind(mark);
}

}  // namespace loquetier
