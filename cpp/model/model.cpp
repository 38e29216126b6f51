// Construction, the scratch of each phase and its sizes, and the KV cache. The computation is in forward.cpp, backward.cpp and
// heads.cpp.
#include "model/model.h"

#include <algorithm>

#include "model/layer.h"

namespace loquetier {

ForwardScratch ForwardScratch::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, bool train, int64_t rank,
                                     int64_t saved_rank, Recompute recompute) {
  ForwardScratch work;
  work.norm = arena.take(dtype, rows, config.hidden_size);
  if (!train) {
    work.x = arena.take(dtype, rows, config.hidden_size);
    work.cos_sin = arena.take(DType::f32, rows, config.head_size);
  }
  work.heads_mark = arena.mark();
  if (!train || recompute == Recompute::layer) work.layer = LayerSaved::carve(arena, config, dtype, rows, 0, rank);
  if (train && recompute == Recompute::none && rank > saved_rank) {
    for (TensorView& s : work.s) s = arena.take(dtype, rows, rank);
  }
  work.act = arena.take(dtype, rows, config.intermediate_size);
  work.delta = arena.take(dtype, rows, config.hidden_size);
  return work;
}

HeadScratch HeadScratch::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, bool train, int64_t rank) {
  HeadScratch work;
  work.norm = arena.take(dtype, rows, config.hidden_size);
  work.s = arena.take(dtype, rows, rank);
  work.logits = arena.take(DType::f32, rows, config.vocab_size);
  if (train) {
    work.dlogits = dtype == DType::f32 ? work.logits : arena.take(dtype, rows, config.vocab_size);
    work.ds = arena.take(dtype, rows, rank);
    work.x = arena.take(dtype, rows, config.hidden_size);
    work.dx = arena.take(dtype, rows, config.hidden_size);
  }
  return work;
}

BackwardScratch BackwardScratch::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t rank,
                                       Recompute recompute, bool whole) {
  BackwardScratch work;
  if (recompute == Recompute::layer) work.delta = arena.take(dtype, rows, config.hidden_size);
  const TensorView wide =
      arena.take(dtype, rows, whole ? std::max(config.intermediate_size, config.qkv_columns()) : config.intermediate_size);
  work.wide = matrix(wide.data, dtype, rows, config.intermediate_size);
  work.norm = arena.take(dtype, rows, config.hidden_size);
  work.ds = arena.take(dtype, rows, rank);
  if (!whole) return work;
  work.state.dattn = arena.take(dtype, rows, int64_t{config.num_heads} * config.head_size);
  work.state.dqkv = matrix(wide.data, dtype, rows, config.qkv_columns());
  if (recompute == Recompute::layer) {
    work.state.rerun = LayerSaved::carve(arena, config, dtype, rows, rows, rank);
    work.state.rerun.mid = arena.take(dtype, rows, config.hidden_size);
  }
  return work;
}

Model::Model(std::shared_ptr<const ModelWeights> weights, Ops& ops) : weights_(std::move(weights)), ops_(ops) {
  require(weights_ != nullptr, "[model] weights: expected placed weights, got none");
  require(std::ssize(weights_->table.layers) == weights_->config.num_layers && weights_->config.num_layers > 0,
          "[model] weights: expected ", weights_->config.num_layers, " (at least 1) layers, got ", weights_->table.layers.size());
  require(weights_->table.embedding.dtype == ops.compute_dtype(), "[model] weights: expected ", name_of(ops.compute_dtype()),
          ", got ", name_of(weights_->table.embedding.dtype));
}

size_t Model::scratch_bytes(int64_t rows, int64_t train_rows, int64_t head_rows, int64_t rank, Recompute recompute,
                            const SliceShape& slices) const {
  return scratch_bytes(weights_->config, ops_.compute_dtype(), rows, train_rows, head_rows, rank, recompute, slices);
}

size_t Model::saved_bytes(int64_t rows, int64_t train_rows, int64_t rank, Recompute recompute, bool chunked) const {
  return saved_bytes(weights_->config, ops_.compute_dtype(), rows, train_rows, rank, recompute, chunked);
}

size_t Model::scratch_bytes(const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t head_rows,
                            int64_t rank, Recompute recompute, const SliceShape& slices) {
  const bool train = train_rows > 0;
  Arena counter;
  const int64_t saved_rank = slices.chunked ? slices.saved_rank : rank;
  const ForwardScratch forward = ForwardScratch::carve(counter, config, dtype, rows, train, rank, saved_rank, recompute);
  counter.rewind(forward.heads_mark);
  HeadScratch::carve(counter, config, dtype, std::min(head_rows, kHeadChunk), train, rank);
  counter.rewind(0);
  const int64_t block = slices.chunked ? slices.block_rows : train_rows;
  if (train) BackwardScratch::carve(counter, config, dtype, block, saved_rank, recompute, !slices.chunked);
  return counter.peak();
}

size_t Model::saved_bytes(const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank,
                          Recompute recompute, bool chunked) {
  if (train_rows == 0) return 0;
  Arena counter;
  Saved::carve(counter, config, dtype, rows, train_rows, rank, recompute, chunked);
  return counter.peak();
}

Saved Model::reserve(Arena& arena, int64_t rows, int64_t train_rows, int64_t rank, Recompute recompute) const {
  Saved saved = Saved::carve(arena, weights_->config, ops_.compute_dtype(), rows, train_rows, rank, recompute, true);
  ops_.device().zero(saved.dx.data, static_cast<size_t>(saved.dx.size()) * size_of(saved.dx.dtype));
  return saved;
}

size_t KvCache::page_bytes(const ModelConfig& config, DType dtype, int32_t page_size) {
  return static_cast<size_t>(config.num_layers) * 2 * static_cast<size_t>(page_size) *
         static_cast<size_t>(int64_t{config.num_kv_heads} * config.head_size) * size_of(dtype);
}

KvCache KvCache::make(Ops& ops, const ModelConfig& config, int64_t pages, int32_t page_size) {
  require(pages >= 0, "[kv cache] pages: expected >= 0, got ", pages);
  require(page_size > 0 && (page_size & (page_size - 1)) == 0, "[kv cache] page_size: expected a power of two, got ", page_size);
  KvCache cache;
  cache.shape = {pages, page_size, config.num_kv_heads, config.head_size};
  const size_t page = page_bytes(config, ops.compute_dtype(), page_size);
  require<OutOfMemory>(page == 0 || static_cast<size_t>(pages) <= ops.device().free_bytes() / page, "[kv cache] expected room for ",
                       pages, " pages of ", page, " bytes, ", ops.device().free_bytes(), " bytes are free on ",
                       ops.device().name());
  const size_t half = page / 2 / static_cast<size_t>(config.num_layers) * static_cast<size_t>(pages);  // k, or v, of one layer
  cache.storage = Buffer(ops.device(), page * static_cast<size_t>(pages));
  // Zeroed once on a device: tiled kernels multiply a page's rows behind the last key by a weight of 0, which a NaN would survive.
  // The host backend reads only keys that exist, and memory it has not touched yet costs nothing.
  if (cache.storage.bytes() > 0 && !ops.device().host_addressable()) ops.device().zero(cache.storage.data(), cache.storage.bytes());
  for (int64_t l = 0; l < config.num_layers; ++l) {
    std::byte* k = static_cast<std::byte*>(cache.storage.data());
    if (k) k += static_cast<size_t>(2 * l) * half;
    cache.layers.push_back({k, k ? k + half : nullptr});
  }
  return cache;
}

}  // namespace loquetier
