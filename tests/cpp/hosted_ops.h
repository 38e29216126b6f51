// A whole backend on a FakeDevice: its memory is not the host's as far as the engine knows, every copy is checked, allocations can
// be refused, and the computations are those of the CPU backend on the very bytes the engine put there. So the engine's life on a
// GPU is tested on any machine.
//
// It records like one too: a captured call keeps its arguments as they were, and a replay sees only what the memory they point to
// has become. LoRA calls are sized by the host's groups and work by the device's, as kernels do; that the former cover the latter
// is checked at every call, replayed ones included.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "fake_device.h"

namespace loquetier::test {

class HostedOps : public Ops {
 public:
  explicit HostedOps(size_t capacity = ~size_t{0} >> 1) : device_(capacity), cpu_(make_cpu_ops(1, false)) {}
  FakeDevice& fake() { return device_; }
  Device& device() override { return device_; }
  DType compute_dtype() const override { return DType::f32; }

  std::unique_ptr<StepGraph> capture(const std::function<void()>& work) override {
    if (!records) return nullptr;
    auto recorded = std::make_unique<Recording>(device_);
    device_.recording = &recorded->calls;
    try {
      work();
    } catch (...) {
      device_.recording = nullptr;
      throw;
    }
    device_.recording = nullptr;
    return recorded;
  }
  bool records = true;
  int64_t calls = 0;  // made directly, not by a replay

  void embedding(const int32_t* ids, TensorView table, TensorView y) override {
    run([=, this] { cpu_->embedding(ids, table, y); });
  }
  void take_tokens(const int32_t* const* from, int32_t* ids, int64_t n) override {
    run([=, this] { cpu_->take_tokens(from, ids, n); });
  }
  void gather_rows(TensorView x, const int32_t* index, TensorView y) override {
    run([=, this] { cpu_->gather_rows(x, index, y); });
  }
  void scatter_add_rows(TensorView x, const int32_t* index, TensorView y) override {
    run([=, this] { cpu_->scatter_add_rows(x, index, y); });
  }
  void convert(TensorView src, TensorView dst) override {
    run([=, this] { cpu_->convert(src, dst); });
  }
  void linear(TensorView x, TensorView w, TensorView bias, TensorView y) override {
    run([=, this] { cpu_->linear(x, w, bias, y); });
  }
  void linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) override {
    run([=, this] { cpu_->linear_backward(dy, w, dx, accumulate); });
  }
  void lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) override {
    run([=, this, sizes = sizes_of(linear, groups)] { cpu_->lora_shrink(linear, checked(linear, groups, sizes), x, s); });
  }
  void lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) override {
    run([=, this, sizes = sizes_of(linear, groups)] { cpu_->lora_expand(linear, checked(linear, groups, sizes), s, y); });
  }
  void lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) override {
    run([=, this] { cpu_->lora_backward_s(linear, groups, dy, ds); });
  }
  void lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) override {
    run([=, this] { cpu_->lora_backward_x(linear, groups, ds, dx); });
  }
  void lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                             TensorView ds) override {
    run([=, this] { cpu_->lora_backward_weights(linear, groups, x, s, dy, ds); });
  }
  void rms_norm(TensorView x, TensorView w, float eps, TensorView y) override {
    run([=, this] { cpu_->rms_norm(x, w, eps, y); });
  }
  void add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) override {
    run([=, this] { cpu_->add_rms_norm(x, delta, w, eps, sum, y); });
  }
  void rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) override {
    run([=, this] { cpu_->rms_norm_backward(x, w, eps, dy, dx); });
  }
  void rms_norm_and_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y) override {
    run([=, this] { cpu_->rms_norm_and_backward(x, w, eps, dy, dx, y); });
  }
  void rope_table(const int32_t* positions, const float* inv_freq, float factor, TensorView cos_sin) override {
    run([=, this] { cpu_->rope_table(positions, inv_freq, factor, cos_sin); });
  }
  void rope(TensorView qkv, const Rope& rope) override {
    run([=, this] { cpu_->rope(qkv, rope); });
  }
  void rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                     float eps, TensorView raw) override {
    run([=, this] { cpu_->rope_backward(dqkv, shape, cos_sin, q_norm, k_norm, eps, raw); });
  }
  void attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, const AttentionShape& shape,
                       TensorView out) override {
    run([=, this, b = on_device(batch)] { cpu_->attention_paged(q, kv, kv_shape, b, shape, out); });
  }
  void attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                        TensorView out, TensorView lse) override {
    run([=, this] { cpu_->attention_packed(q, k, v, batch, shape, out, lse); });
  }
  void attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                          const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                          TensorView dv) override {
    run([=, this] { cpu_->attention_backward(q, k, v, out, lse, dout, batch, shape, dq, dk, dv); });
  }
  void swiglu(TensorView gate_up, TensorView y) override {
    run([=, this] { cpu_->swiglu(gate_up, y); });
  }
  void swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) override {
    run([=, this] { cpu_->swiglu_backward(gate_up, dy, dgate_up); });
  }
  void swiglu_and_backward(TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) override {
    run([=, this] { cpu_->swiglu_and_backward(gate_up, dy, dgate_up, y); });
  }
  void token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) override {
    run([=, this] { cpu_->token_loss(logits, rows, dlogits, logprob, loss); });
  }
  void sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
              TensorView top_logprobs) override {
    run([=, this, b = on_device(batch)] { cpu_->sample(logits, b, ids, logprob, top_ids, top_logprobs); });
  }
  void grad_norm(const AdamBatch& batch, float* norm) override {
    run([=, this] { cpu_->grad_norm(batch, norm); });
  }
  void adamw(const AdamBatch& batch, const float* norm) override {
    run([=, this] { cpu_->adamw(batch, norm); });
  }

 private:
  struct Recording : StepGraph {
    std::vector<std::function<void()>> calls;
    FakeDevice& device;
    explicit Recording(FakeDevice& on) : device(on) {}
    void launch() override {
      for (const auto& call : calls) device.in_order(call);
    }
  };
  template <class F>
  void run(F call) {
    calls += device_.recording == nullptr;
    device_.in_order(call);
  }

  // The CPU reads tables where the host has them; a kernel reads those of the device when its turn comes.
  static PagedBatch on_device(PagedBatch batch) {
    batch.host_row_begin = batch.row_begin;
    batch.host_rows = batch.rows;
    batch.host_kv_len = batch.kv_len;
    return batch;
  }
  static SampleBatch on_device(SampleBatch batch) {
    batch.host_rows = batch.rows;
    return batch;
  }

  static int64_t tiles(const LoraGroup* groups, int32_t count, int32_t rows) {
    int64_t sum = 0;
    for (int32_t g = 0; g < count; ++g) sum += groups[g].sites ? (groups[g].rows + rows - 1) / rows : 0;
    return sum;
  }
  static constexpr int32_t kTileRows[] = {8, 16, 32, 64, 128};
  // What a launch is sized by: taken from the host's groups when the call is made.
  struct Sizes {
    int64_t tiles[5] = {};
    int32_t ranks[kMaxParts] = {};
    bool vectors = true;  // all ranks are multiples of 8
  };
  static Sizes sizes_of(const LoraLinear& linear, const LoraGroups& groups) {
    Sizes sizes;
    for (int t = 0; t < 5; ++t) sizes.tiles[t] = tiles(groups.host_groups, groups.count, kTileRows[t]);
    for (int32_t g = 0; g < groups.count; ++g) {
      for (int p = 0; groups.host_groups[g].sites && p < kMaxParts; ++p) {
        const int32_t rank = groups.host_groups[g].host_sites[linear.site].part[p].rank;
        sizes.ranks[p] = std::max(sizes.ranks[p], rank);
        sizes.vectors = sizes.vectors && rank % 8 == 0;
      }
    }
    return sizes;
  }
  // The groups of the device's table, which the launch must be large enough for.
  static LoraGroups checked(const LoraLinear& linear, LoraGroups groups, const Sizes& sizes) {
    for (int t = 0; t < 5; ++t) {
      if (sizes.tiles[t] < tiles(groups.groups, groups.count, kTileRows[t])) throw std::logic_error("a launch of too few tiles");
    }
    for (int32_t g = 0; g < groups.count; ++g) {
      for (int p = 0; groups.groups[g].sites && p < kMaxParts; ++p) {
        const int32_t rank = groups.groups[g].host_sites[linear.site].part[p].rank;
        if (rank > sizes.ranks[p] || (sizes.vectors && rank % 8 != 0)) {
          throw std::logic_error("a launch for other ranks than " + std::to_string(rank) + " at site " +
                                 std::to_string(linear.site));
        }
      }
    }
    groups.host_groups = groups.groups;
    return groups;
  }

  FakeDevice device_;
  std::unique_ptr<Ops> cpu_;
};

}  // namespace loquetier::test
