// The frozen weights: on the host as the checkpoint has them (BaseWeights), and placed for one backend (ModelWeights).
//
// A fused linear is one or more row blocks (q, k, v; gate, up). On the CPU the blocks stay where the checkpoint has them (f32: in the mapped file,
// no copy; f16 / bf16: converted once); a device backend joins them into one matrix when it places them.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/memory.h"
#include "loquetier/base_model.h"
#include "model/model_config.h"
#include "ops/ops.h"

namespace loquetier {

struct LinearBlock {
  TensorView w;     // [out, in]
  TensorView bias;  // [out] or empty
};
using LinearWeights = std::vector<LinearBlock>;  // blocks of adjacent output columns

struct LayerWeights {
  TensorView input_norm;  // [H]
  LinearWeights qkv;      // (Q + 2K) D x H
  TensorView q_norm;      // [D] or empty
  TensorView k_norm;      // [D] or empty
  LinearWeights o;        // H x Q D
  TensorView post_norm;   // [H]
  LinearWeights gate_up;  // 2F x H
  LinearWeights down;     // H x F
};

struct WeightTable {
  TensorView embedding;   // [V, H]
  std::vector<LayerWeights> layers;
  TensorView final_norm;  // [H]
  LinearWeights lm_head;  // V x H; the embedding when tied
};

// Placed in one backend's memory and compute dtype.
struct ModelWeights {
  ModelConfig config;
  WeightTable table;
  TensorView inv_freq;    // [D/2] f32
  std::vector<Buffer> storage;
  std::shared_ptr<const BaseModel> base;  // keeps mapped or lent host memory alive
  size_t bytes() const;   // that this placement allocated
};

struct BaseWeights {
  ModelConfig config;
  WeightTable host;       // host memory, checkpoint dtypes
  std::vector<std::shared_ptr<const void>> owners;
  mutable std::mutex mutex;
  mutable std::map<std::string, std::weak_ptr<const ModelWeights>> placed;  // by device and dtype: several engines share one copy
};

std::shared_ptr<const ModelWeights> place_weights(const std::shared_ptr<const BaseModel>& base, Ops& ops);

}  // namespace loquetier
