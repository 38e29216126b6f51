#include "adapter/train_state.h"

#include <algorithm>
#include <cmath>

namespace loquetier {

size_t TrainState::bytes_for(const AdapterLayout& layout) {
  return 4 * static_cast<size_t>(layout.elements) * sizeof(float) + static_cast<size_t>(layout.sites) * sizeof(LoraGradSite);
}

TrainState::TrainState(Ops& ops, std::shared_ptr<const AdapterLayout> layout, const float* master)
    : ops_(ops), layout_(std::move(layout)) {
  require(layout_ != nullptr && master != nullptr, "[train state] expected a layout and master weights, got none");
  Device& device = ops_.device();
  const size_t n = static_cast<size_t>(layout_->elements), table_bytes = static_cast<size_t>(layout_->sites) * sizeof(LoraGradSite);
  storage_ = Buffer(device, bytes_for(*layout_));
  master_ = static_cast<float*>(storage_.data());
  grad_ = master_ + n;
  m_ = grad_ + n;
  v_ = m_ + n;
  device_grads_ = reinterpret_cast<LoraGradSite*>(v_ + n);  // n is a multiple of 64: aligned
  host_grads_ = layout_->grad_table(grad_);
  device.copy_to_device(master_, master, n * sizeof(float));
  device.zero(grad_, 3 * n * sizeof(float));
  device.copy_to_device(device_grads_, host_grads_.data(), table_bytes);
  device.synchronize();  // `master` may go away
}

void TrainState::append_update(const AdamW& options, void* weight_block, std::vector<AdamTensor>& tensors,
                               std::vector<AdamJob>& jobs) const {
  require(weight_block != nullptr, "[train state] weight_block: expected the resident weights to round into, got none");
  const auto correction = [&](double beta) { return static_cast<float>(1 - std::pow(beta, static_cast<double>(steps_ + 1))); };
  const int32_t job = static_cast<int32_t>(jobs.size());
  jobs.push_back({.beta1 = static_cast<float>(options.betas[0]),
                  .beta2 = static_cast<float>(options.betas[1]),
                  .eps = static_cast<float>(options.eps),
                  .weight_decay = static_cast<float>(options.weight_decay),
                  .bias_correction1 = correction(options.betas[0]),
                  .bias_correction2 = correction(options.betas[1]),
                  .max_grad_norm = static_cast<float>(options.max_grad_norm.value_or(0))});
  const auto append = [&](int64_t begin, int64_t n, double lr) {
    std::byte* weight = static_cast<std::byte*>(weight_block) + static_cast<size_t>(begin) * size_of(ops_.compute_dtype());
    tensors.push_back({master_ + begin, grad_ + begin, m_ + begin, v_ + begin, weight, n, job, static_cast<float>(lr)});
  };
  append(0, layout_->a_elements, options.lr);
  append(layout_->a_elements, layout_->elements - layout_->a_elements, options.lr * options.loraplus_lr_ratio);
}

void TrainState::drop_gradients() {
  ops_.device().zero(grad_, static_cast<size_t>(layout_->elements) * sizeof(float));
  has_gradients = false;
}

std::vector<float> TrainState::read(const std::string& what) const {
  const float* source = what == "master"       ? master_
                        : what == "gradients"  ? grad_
                        : what == "exp_avg"    ? m_
                        : what == "exp_avg_sq" ? v_
                                               : nullptr;
  require(source != nullptr, "[train state] what: expected 'master', 'gradients', 'exp_avg' or 'exp_avg_sq', got '", what, "'");
  std::vector<float> values(static_cast<size_t>(layout_->elements));
  ops_.device().copy_to_host(values.data(), source, values.size() * sizeof(float));
  return values;
}

void TrainState::restore(const float* master, const float* exp_avg, const float* exp_avg_sq, const float* gradients,
                         int64_t steps) {
  require(master && exp_avg && exp_avg_sq && gradients,
          "[train state] restore: expected master, exp_avg, exp_avg_sq and gradients");
  require(steps >= 0, "[train state] steps: expected >= 0, got ", steps);
  Device& device = ops_.device();
  const size_t n = static_cast<size_t>(layout_->elements), bytes = n * sizeof(float);
  device.copy_to_device(master_, master, bytes);
  device.copy_to_device(grad_, gradients, bytes);
  device.copy_to_device(m_, exp_avg, bytes);
  device.copy_to_device(v_, exp_avg_sq, bytes);
  device.synchronize();
  steps_ = steps;
  has_gradients = std::any_of(gradients, gradients + n, [](float g) { return g != 0; });
}

}  // namespace loquetier
