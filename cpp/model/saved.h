// What a training row keeps between forward and backward (design section 6), as a value. Carved from one arena per micro-batch; the
// same carve() with a counting arena sizes it. Written by forward.cpp and heads.cpp (dx), read by backward.cpp.
//
// A micro-batch whose forward comes in chunks over several steps is carved once. A step's rows lie at [saved_row, saved_row + T) of
// every array: the chunk's training rows first, behind those of earlier chunks, whose keys and values they attend to; the other
// rows of the step behind them, where the next chunk writes over them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "model/model_config.h"

namespace loquetier {

enum class Recompute { none, layer };

// T rows of the batch (training rows are the first of them; only those are read back).
struct LayerSaved {
  TensorView x;        // [T, H]            layer input (the residual stream)
  TensorView qkv;      // [T, (Q + 2K) D]   after q/k norm and rope
  TensorView raw;      // [n, (Q + K) D]    q and k before the q/k norm, n training rows; empty without one
  TensorView attn;     // [T, Q D]          attention output
  TensorView lse;      // [T, Q] f32        empty without training rows
  TensorView mid;      // [T, H]            residual after attention
  TensorView gate_up;  // [T, 2F]           backward overwrites it with its gradient
  TensorView s[4];     // [T, R]            LoRA S of qkv, o, gate_up, down (R = largest in the batch); empty when R = 0

  // Everything but x and mid: where the residual stream lies is the caller's choice. train_rows 0: nothing will be differentiated.
  static LayerSaved carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank);
};

// What a backward keeps between its slices: of the layer under way, n training rows.
struct BackwardState {
  TensorView dattn;  // [n, Q D]
  TensorView dqkv;   // [n, (Q + 2K) D]
  LayerSaved rerun;  // with Recompute::layer: the layer's activations, computed again
  static BackwardState carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t train_rows, int64_t rank,
                             Recompute recompute);
};

struct Saved {
  int64_t rows = 0;  // T when the forward ran at once, else what all chunks and the rows beside them have room in
  int64_t train_rows = 0;
  int64_t rank = 0;  // columns of s
  Recompute recompute = Recompute::none;
  bool chunked = false;            // the forward comes in chunks, the backward in slices
  std::vector<LayerSaved> layers;  // [L]; with Recompute::layer only x is there, and qkv when chunked
  TensorView final_x;              // [T, H]  residual after the last layer
  TensorView dx;                   // [train_rows, H]  gradient of final_x, then of each layer's input as backward goes down
  TensorView cos_sin;              // [T, D] f32  rope table of the rows
  BackwardState backward;          // when chunked

  static Saved carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank,
                     Recompute recompute, bool chunked = false);
};

}  // namespace loquetier
