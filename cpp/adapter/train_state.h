// Training state of one adapter: fp32 master weights, gradients, Adam moments, all flat in the adapter's layout.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "adapter/adapter.h"
#include "loquetier/options.h"

namespace loquetier {

class TrainState {
 public:
  TrainState(Ops& ops, std::shared_ptr<const AdapterLayout> layout, const float* master);  // moments and gradients zero

  const LoraGradSite* device_grads() const { return device_grads_; }
  const LoraGradSite* host_grads() const { return host_grads_.data(); }
  int64_t optimizer_steps() const { return steps_; }
  uint64_t dropout_counter = 0;  // examples seen: key of the next dropout mask
  bool has_gradients = false;    // something was accumulated since the last update
  size_t bytes() const { return storage_.bytes(); }
  static size_t bytes_for(const AdapterLayout& layout);

  // Appends this adapter's two tensors (all A, all B) and its job to a step's optimizer table; weight is the device block to round
  // into. `steps_` is not advanced here but by applied().
  void append_update(const AdamW& options, void* weight_block, std::vector<AdamTensor>& tensors, std::vector<AdamJob>& jobs) const;
  void applied() {
    ++steps_;
    has_gradients = false;
  }
  void drop_gradients();  // zero them

  std::vector<float> read(const std::string& what) const;  // "master", "gradients", "exp_avg", "exp_avg_sq": [elements] f32
  void restore(const float* master, const float* exp_avg, const float* exp_avg_sq, const float* gradients, int64_t steps);

 private:
  Ops& ops_;
  std::shared_ptr<const AdapterLayout> layout_;
  Buffer storage_;  // [4, elements] f32 and the gradient table
  float* master_ = nullptr;
  float* grad_ = nullptr;
  float* m_ = nullptr;
  float* v_ = nullptr;
  LoraGradSite* device_grads_ = nullptr;
  std::vector<LoraGradSite> host_grads_;
  int64_t steps_ = 0;
};

}  // namespace loquetier
