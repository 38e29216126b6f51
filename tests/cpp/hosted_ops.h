// A whole backend on a FakeDevice: its memory is not the host's as far as the engine knows, every copy is checked, allocations can
// be refused, and the computations are those of the CPU backend on the very bytes the engine put there. So the engine's life on a
// GPU is tested on any machine.
#pragma once

#include <memory>

#include "fake_device.h"

namespace loquetier::test {

class HostedOps : public Ops {
 public:
  explicit HostedOps(size_t capacity = ~size_t{0} >> 1) : device_(capacity), cpu_(make_cpu_ops(1, false)) {}
  FakeDevice& fake() { return device_; }
  Device& device() override { return device_; }
  DType compute_dtype() const override { return DType::f32; }

  void embedding(const int32_t* ids, TensorView table, TensorView y) override { cpu_->embedding(ids, table, y); }
  void gather_rows(TensorView x, const int32_t* index, TensorView y) override { cpu_->gather_rows(x, index, y); }
  void scatter_add_rows(TensorView x, const int32_t* index, TensorView y) override { cpu_->scatter_add_rows(x, index, y); }
  void add(TensorView x, TensorView y) override { cpu_->add(x, y); }
  void convert(TensorView src, TensorView dst) override { cpu_->convert(src, dst); }
  void linear(TensorView x, TensorView w, TensorView bias, TensorView y) override { cpu_->linear(x, w, bias, y); }
  void linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) override {
    cpu_->linear_backward(dy, w, dx, accumulate);
  }
  void lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) override {
    cpu_->lora_shrink(linear, groups, x, s);
  }
  void lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) override {
    cpu_->lora_expand(linear, groups, s, y);
  }
  void lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) override {
    cpu_->lora_backward_s(linear, groups, dy, ds);
  }
  void lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) override {
    cpu_->lora_backward_x(linear, groups, ds, dx);
  }
  void lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                             TensorView ds) override {
    cpu_->lora_backward_weights(linear, groups, x, s, dy, ds);
  }
  void rms_norm(TensorView x, TensorView w, float eps, TensorView y) override { cpu_->rms_norm(x, w, eps, y); }
  void add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) override {
    cpu_->add_rms_norm(x, delta, w, eps, sum, y);
  }
  void rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) override {
    cpu_->rms_norm_backward(x, w, eps, dy, dx);
  }
  void rope_table(const int32_t* positions, const float* inv_freq, float factor, TensorView cos_sin) override {
    cpu_->rope_table(positions, inv_freq, factor, cos_sin);
  }
  void rope(TensorView qkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm, float eps,
            TensorView raw, const int32_t* kv_slots, KvLayer kv, const KvShape& kv_shape) override {
    cpu_->rope(qkv, shape, cos_sin, q_norm, k_norm, eps, raw, kv_slots, kv, kv_shape);
  }
  void rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                     float eps, TensorView raw) override {
    cpu_->rope_backward(dqkv, shape, cos_sin, q_norm, k_norm, eps, raw);
  }
  void attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, const AttentionShape& shape,
                       TensorView out) override {
    cpu_->attention_paged(q, kv, kv_shape, batch, shape, out);
  }
  void attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                        TensorView out, TensorView lse) override {
    cpu_->attention_packed(q, k, v, batch, shape, out, lse);
  }
  void attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                          const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                          TensorView dv) override {
    cpu_->attention_backward(q, k, v, out, lse, dout, batch, shape, dq, dk, dv);
  }
  void swiglu(TensorView gate_up, TensorView y) override { cpu_->swiglu(gate_up, y); }
  void swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) override {
    cpu_->swiglu_backward(gate_up, dy, dgate_up);
  }
  void token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) override {
    cpu_->token_loss(logits, rows, dlogits, logprob, loss);
  }
  void sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
              TensorView top_logprobs) override {
    cpu_->sample(logits, batch, ids, logprob, top_ids, top_logprobs);
  }
  void grad_norm(const AdamBatch& batch, float* norm) override { cpu_->grad_norm(batch, norm); }
  void adamw(const AdamBatch& batch, const float* norm) override { cpu_->adamw(batch, norm); }

 private:
  FakeDevice device_;
  std::unique_ptr<Ops> cpu_;
};

}  // namespace loquetier::test
