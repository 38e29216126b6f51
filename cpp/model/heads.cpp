// The heads: head rows in chunks of at most kHeadChunk, so that logits [T, V] never exist whole. Each chunk ends in a loss (train:
// with its gradient down to final_x; logprob: without) or in sampled tokens.
#include "model/layer.h"

namespace loquetier {

namespace {

// From dlogits to the gradient of final_x: lm_head's LoRA gradients, the vocabulary product, the final norm, the rows' places in
// the batch.
void head_backward(Ops& ops, const ModelWeights& weights, const LoraLinear& lora, const BatchView& batch, const HeadChunk& chunk,
                   TensorView final_x, TensorView dx, const HeadScratch& work) {
  const ModelConfig& config = weights.config;
  const int32_t* index = batch.head_rows + chunk.begin;
  const bool trained = trains_site(chunk.groups, lora.site);
  if (trained) ops.lora_backward(lora, chunk.groups, work.norm, work.s, work.dlogits, work.ds);
  if (batch.lowest_layer >= config.num_layers) return;  // nothing below lm_head is trained
  base_linear_backward(ops, weights.table.lm_head, work.dlogits, work.norm);
  if (trained) ops.lora_backward_x(lora, chunk.groups, work.ds, work.norm);
  ops.gather_rows(final_x, index, work.x);
  ops.device().zero(work.dx.data, static_cast<size_t>(work.dx.size()) * size_of(work.dx.dtype));
  ops.rms_norm_backward(work.x, weights.table.final_norm, config.rms_norm_eps, work.norm, work.dx);
  ops.scatter_add_rows(work.dx, index, dx);
}

}  // namespace

void run_heads(Ops& ops, const ModelWeights& weights, const BatchView& batch, size_t first, size_t last, TensorView final_norm,
               TensorView final_x, TensorView dx, Arena& scratch) {
  const ModelConfig& config = weights.config;
  const LoraLinear lora = lora_linear(config, lm_head_site(config));
  int32_t first_sample = 0;  // head row of the first row to sample
  for (const HeadChunk& chunk : batch.chunks) {
    if (chunk.kind == HeadKind::sample) break;
    first_sample = chunk.begin + chunk.rows;
  }
  for (size_t i = first; i < last; ++i) {
    const HeadChunk& chunk = batch.chunks[i];
    require(chunk.begin >= 0 && 0 <= chunk.rows && chunk.rows <= kHeadChunk && chunk.begin + chunk.rows <= batch.head_count,
            "[heads] chunk: expected at most ", kHeadChunk, " of ", batch.head_count, " head rows, got ", chunk.rows, " from ",
            chunk.begin);
    const bool train = chunk.kind == HeadKind::train;
    require(!train || batch.train_rows > 0, "[heads] chunk: expected training rows in the batch of a training chunk, got none");
    if (chunk.rows == 0) continue;

    const size_t mark = scratch.mark();
    const HeadScratch work = HeadScratch::carve(scratch, config, ops.compute_dtype(), chunk.rows, train, chunk.groups.max_rank);
    ops.gather_rows(final_norm, batch.head_rows + chunk.begin, work.norm);
    adapted_linear(ops, weights.table.lm_head, lora, chunk.groups, work.norm, work.s, work.logits);

    if (chunk.kind == HeadKind::sample) {
      const auto part = [&](TensorView t) {
        return t.empty() ? TensorView{} : t.slice_rows(chunk.begin - first_sample, chunk.rows);
      };
      ops.sample(work.logits, chunk.sampling, batch.sampled + chunk.begin, batch.logprob + chunk.begin, part(batch.top_ids),
                 part(batch.top_logprobs));
    } else {
      ops.token_loss(work.logits, batch.loss_rows + chunk.begin, work.dlogits, batch.logprob + chunk.begin,
                     batch.loss + chunk.begin);
      if (train) head_backward(ops, weights, lora, batch, chunk, final_x, dx, work);
    }
    scratch.rewind(mark);
  }
}

}  // namespace loquetier
