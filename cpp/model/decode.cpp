// Forward of a batch that keeps nothing for backward, in the two pieces that a step of decodes runs it in: the layers, which may be
// recorded and replayed, and the heads. Both carve the same scratch from the same place, so the second finds what the first left.
// forward.cpp has the whole.
#include "model/layer.h"

namespace loquetier {

void Model::decode_layers(const BatchView& batch, KvCache& kv, Arena scratch) const {
  require(batch.packed_rows == 0, "[decode] batch: expected rows with pages only, got ", batch.packed_rows, " packed rows");
  const int64_t rank = batch.groups.max_rank;
  ForwardScratch work =
      ForwardScratch::carve(scratch, weights_->config, ops_.compute_dtype(), batch.rows, false, rank, rank, Recompute::none);
  run_layers(batch, kv, nullptr, 0, weights_->config.num_layers, work);
}

void Model::decode_heads(const BatchView& batch, Arena& scratch) const {
  const size_t mark = scratch.mark();
  const int64_t rank = batch.groups.max_rank;
  const ForwardScratch work =
      ForwardScratch::carve(scratch, weights_->config, ops_.compute_dtype(), batch.rows, false, rank, rank, Recompute::none);
  scratch.rewind(work.heads_mark);
  run_heads(ops_, *weights_, batch, 0, batch.chunks.size(), work.norm, work.x, TensorView{}, scratch);
  scratch.rewind(mark);
}

}  // namespace loquetier
