// What a training row keeps between forward and backward (design section 6), as a value. Carved from one arena per micro-batch; the
// same carve() with a counting arena sizes it. Written by forward.cpp and heads.cpp (dx), read by backward.cpp.
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

struct Saved {
  int64_t rows = 0;  // T when the forward ran
  int64_t train_rows = 0;
  int64_t rank = 0;  // columns of s
  Recompute recompute = Recompute::none;
  std::vector<LayerSaved> layers;  // [L]; with Recompute::layer only x is there
  TensorView final_x;              // [T, H]  residual after the last layer
  TensorView dx;                   // [train_rows, H]  gradient of final_x, then of each layer's input as backward goes down
  TensorView cos_sin;              // [T, D] f32  rope table of the rows

  static Saved carve(Arena& arena, const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank,
                     Recompute recompute);
};

}  // namespace loquetier
