// Forward of a batch that keeps nothing for backward, in the two pieces that a step of decodes runs it in: the layers, which may be
// recorded and replayed, and the heads. Both carve the same scratch from the same place, so the second finds what the first left.
// forward.cpp has the whole.
#include "model/layer.h"

namespace loquetier {

void Model::decode_layers(const BatchView& batch, KvCache& kv, Arena scratch) const {
  const ModelConfig& config = weights_->config;
  const WeightTable& table = weights_->table;
  const int64_t layers = config.num_layers;
  require(batch.packed_rows == 0, "[decode] batch: expected rows with pages only, got ", batch.packed_rows, " packed rows");
  const ForwardScratch work =
      ForwardScratch::carve(scratch, config, ops_.compute_dtype(), batch.rows, false, batch.groups.max_rank, 0, Recompute::none);
  const LayerBatch layer_batch = {batch.rows, 0, &batch.groups, &batch.packed, &batch.paged, batch.kv_slots, work.cos_sin, {}};
  ops_.rope_table(batch.positions, weights_->inv_freq.as<float>(), 1.0f, work.cos_sin);
  ops_.embedding(batch.ids, table.embedding, work.x);
  ops_.rms_norm(work.x, table.layers[0].input_norm, config.rms_norm_eps, work.norm);
  LayerSaved keep = work.layer;
  keep.x = keep.mid = work.x;
  for (int64_t l = 0; l < layers; ++l) {
    const auto i = static_cast<size_t>(l);
    layer_forward(ops_, config, table.layers[i], l, layer_batch, keep, kv.layers[i], kv.shape, work.norm, work.act, work.delta,
                  true);
    const TensorView next_norm = l + 1 < layers ? table.layers[i + 1].input_norm : table.final_norm;
    ops_.add_rms_norm(work.x, work.delta, next_norm, config.rms_norm_eps, work.x, work.norm);
  }
}

void Model::decode_heads(const BatchView& batch, Arena& scratch) const {
  const size_t mark = scratch.mark();
  const ForwardScratch work = ForwardScratch::carve(scratch, weights_->config, ops_.compute_dtype(), batch.rows, false,
                                                    batch.groups.max_rank, 0, Recompute::none);
  scratch.rewind(work.heads_mark);
  run_heads(ops_, *weights_, batch, 0, batch.chunks.size(), work.norm, work.x, TensorView{}, scratch);
  scratch.rewind(mark);
}

}  // namespace loquetier
