// The frozen weights: on the host as the checkpoint has them (BaseWeights), and placed for one backend (ModelWeights).
//
// A fused linear is one or more row blocks (q, k, v; gate, up). On the CPU the blocks stay where the checkpoint has them (f32: in
// the mapped file, no copy; f16 / bf16: converted once); a device backend joins them into one matrix when it places them.
// Checkpoints are bound to tables in base_model.cpp; placing is in base_weights.cpp.
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
  TensorView embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  TensorView final_norm;  // [H]
  LinearWeights lm_head;  // V x H; the embedding when tied
};

// Placed in one backend's memory and compute dtype.
struct ModelWeights {
  ModelConfig config;
  WeightTable table;
  TensorView inv_freq;                              // [D/2] f32
  std::shared_ptr<const void> backend;              // outlives `storage`, whose buffers go back through its Device
  std::vector<Buffer> storage;                      // device memory
  std::vector<std::shared_ptr<void>> host_storage;  // host memory, of no backend
  std::shared_ptr<const BaseModel> base;            // keeps mapped or lent host memory alive
  size_t allocated = 0;
  size_t bytes() const { return allocated; }  // that this placement allocated
};

struct BaseWeights {
  ModelConfig config;
  WeightTable host;  // host memory, checkpoint dtypes; may be unaligned
  std::vector<std::shared_ptr<const void>> owners;
  mutable std::mutex mutex;
  mutable std::map<std::string, std::weak_ptr<const ModelWeights>> placed;  // by device and dtype: several engines share one copy
};

// Host memory for weights: 64-byte aligned, not zeroed. OutOfMemory names the bytes.
std::shared_ptr<void> allocate_weights(size_t bytes);

// `backend` is what keeps `ops` alive. Engines on one device share a placement when it lies in host memory, or when each of them
// gives its backend: device memory is returned through the backend that placed it.
std::shared_ptr<const ModelWeights> place_weights(const std::shared_ptr<const BaseModel>& base, Ops& ops,
                                                  std::shared_ptr<const void> backend = nullptr);
// Whether place_weights() with a backend would share a placement that is there.
bool weights_placed(const BaseModel& base, Ops& ops);
// The same without sharing, in a device's memory and a dtype.
std::shared_ptr<ModelWeights> place_weights_on(const std::shared_ptr<const BaseModel>& base, Device& device, DType dtype);

}  // namespace loquetier
