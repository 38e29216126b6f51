#include "model/saved.h"

namespace loquetier {

LayerSaved LayerSaved::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank) {
  const AttentionShape shape = config.attention();
  const int64_t q = int64_t{shape.q_heads} * shape.head_size, k = int64_t{shape.kv_heads} * shape.head_size;
  LayerSaved layer;
  layer.qkv = arena.take(dtype, rows, q + 2 * k);
  if (config.qk_norm && train_rows > 0) layer.raw = arena.take(dtype, train_rows, q + k);
  layer.attn = arena.take(dtype, rows, q);
  if (train_rows > 0) layer.lse = arena.take(DType::f32, rows, shape.q_heads);
  layer.gate_up = arena.take(dtype, rows, 2 * config.intermediate_size);
  if (rank > 0) {
    for (TensorView& s : layer.s) s = arena.take(dtype, rows, rank);
  }
  return layer;
}

BackwardState BackwardState::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t train_rows, int64_t rank,
                                   Recompute recompute) {
  BackwardState state;
  state.dattn = arena.take(dtype, train_rows, int64_t{config.num_heads} * config.head_size);
  state.dqkv = arena.take(dtype, train_rows, config.qkv_columns());
  if (recompute == Recompute::layer) {
    state.rerun = LayerSaved::carve(arena, config, dtype, train_rows, train_rows, rank);
    state.rerun.mid = arena.take(dtype, train_rows, config.hidden_size);
  }
  return state;
}

Saved Saved::carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank,
                   Recompute recompute, bool chunked) {
  Saved saved;
  saved.rows = rows;
  saved.train_rows = train_rows;
  saved.rank = rank;
  saved.recompute = recompute;
  saved.chunked = chunked;
  saved.cos_sin = arena.take(DType::f32, rows, config.head_size);
  saved.layers.reserve(static_cast<size_t>(config.num_layers));
  for (int64_t l = 0; l < config.num_layers; ++l) {
    LayerSaved layer;
    if (recompute == Recompute::none) {
      layer = LayerSaved::carve(arena, config, dtype, rows, train_rows, rank);
      layer.mid = arena.take(dtype, rows, config.hidden_size);
    } else if (chunked) {
      layer.qkv = arena.take(dtype, rows, config.qkv_columns());  // later chunks attend to it
    }
    layer.x = arena.take(dtype, rows, config.hidden_size);
    saved.layers.push_back(layer);
  }
  saved.final_x = arena.take(dtype, rows, config.hidden_size);
  saved.dx = arena.take(dtype, train_rows, config.hidden_size);
  if (chunked) saved.backward = BackwardState::carve(arena, config, dtype, train_rows, rank, recompute);
  return saved;
}

}  // namespace loquetier
