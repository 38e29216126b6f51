// The CPU backend: the ops page in f32. One class; its methods stand by topic in gemm.cpp, lora.cpp, attention.cpp,
// attention_backward.cpp, elementwise.cpp, rope.cpp, loss.cpp, sampling.cpp and optimizer.cpp.
//
// Every method checks shapes before it writes, then splits its output into items for the thread pool. An item owns its part of the
// output, so nothing is added across threads and results do not depend on the number of threads.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "ops/ops.h"

namespace loquetier::cpu {

class CpuDevice : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void* allocate(size_t bytes) override;
  void release(void* data) noexcept override;
  void* allocate_host(size_t bytes) override { return allocate(bytes); }
  void release_host(void* data) noexcept override { release(data); }
  void copy_to_device(void* dst, const void* host, size_t bytes) override;
  void copy_to_host(void* host, const void* src, size_t bytes) override;
  void copy_on_device(void* dst, const void* src, size_t bytes) override;
  void zero(void* dst, size_t bytes) override;
  void synchronize() override {}
  size_t free_bytes() const override;
  bool host_addressable() const override { return true; }
};

// Throws unless `view` is f32 with this shape; -1: any.
void check_matrix(const char* op, const char* name, const TensorView& view, int64_t rows, int64_t cols, DType dtype = DType::f32);
void check_vector(const char* op, const char* name, const TensorView& view, int64_t n, DType dtype = DType::f32);

class CpuOps : public Ops {
 public:
  CpuOps(int threads, bool deterministic, const Kernels& kernels);

  Device& device() override { return device_; }
  DType compute_dtype() const override { return DType::f32; }

  void embedding(const int32_t* ids, TensorView table, TensorView y) override;
  void take_tokens(const int32_t* const* from, int32_t* ids, int64_t n) override;
  void gather_rows(TensorView x, const int32_t* index, TensorView y) override;
  void scatter_add_rows(TensorView x, const int32_t* index, TensorView y) override;
  void convert(TensorView src, TensorView dst) override;

  void linear(TensorView x, TensorView w, TensorView bias, TensorView y) override;
  void linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) override;

  void lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) override;
  void lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) override;
  void lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) override;
  void lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) override;
  void lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                             TensorView ds) override;
  void lora_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                     TensorView ds) override;

  void rms_norm(TensorView x, TensorView w, float eps, TensorView y) override;
  void add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) override;
  void rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) override;
  void rms_norm_and_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y) override;

  void rope_table(const int32_t* positions, const float* inv_freq, float attention_factor, TensorView cos_sin) override;
  void rope(TensorView qkv, const Rope& rope) override;
  void rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                     float eps, TensorView raw) override;

  void attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, const AttentionShape& shape,
                       TensorView out) override;
  void attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                        TensorView out, TensorView lse) override;
  void attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                          const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                          TensorView dv) override;

  void swiglu(TensorView gate_up, TensorView y) override;
  void swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) override;
  void swiglu_and_backward(TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) override;

  void token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) override;
  void sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
              TensorView top_logprobs) override;

  void grad_norm(const AdamBatch& batch, float* norm) override;
  void adamw(const AdamBatch& batch, const float* norm) override;

 private:
  // A part of one group's work: rows [row, row + rows) and, where the operation splits them, columns [col, col + cols) of part
  // `part`.
  struct LoraItem {
    const LoraGroup* group;
    int32_t part;
    int32_t rank_begin;  // r0: ranks of the parts before it
    int64_t out_begin;   // columns of the parts before it
    int64_t row, rows;
    int64_t col, cols;
  };
  // One key/value head and rows [row, row + rows) of q of one sequence; the first of them sees `visible` keys, the next one more.
  struct AttentionItem {
    int32_t sequence, kv_head;
    int64_t row, rows;
    int64_t visible;
  };
  struct Chunk {
    int32_t tensor;
    int64_t begin, n;
  };

  int64_t threads() const { return pool_.threads(); }
  // fn(begin, end) over [0, n). By reference, so that nothing is allocated for the call.
  template <class F>
  void parallel(int64_t n, int64_t grain, F&& fn) {
    pool_.parallel_for(n, grain, std::ref(fn));
  }
  // The same over rows of `width` elements each, with ranges worth a thread's attention.
  template <class F>
  void parallel_rows(int64_t rows, int64_t width, F&& fn) {
    constexpr int64_t kElements = 16384;
    parallel(rows, width >= kElements ? 1 : kElements / (width > 0 ? width : 1), std::forward<F>(fn));
  }
  void check_lora(const char* op, const LoraLinear& linear, const LoraGroups& groups, int64_t rows) const;
  void check_gradients(const char* op, const LoraLinear& linear, const LoraGroups& groups, const TensorView& x, const TensorView& s,
                       const TensorView& dy, const TensorView& ds, bool with_ds) const;
  template <class Each>
  void for_each_part(const LoraLinear& linear, const LoraGroups& groups, Each each) const;
  void check_packed(const char* op, const TensorView& q, const TensorView& k, const TensorView& v, const PackedBatch& batch,
                    const AttentionShape& shape) const;
  template <class KeyRows>
  void run_attention(const TensorView& q, const AttentionShape& shape, const TensorView& out, const TensorView& lse,
                     KeyRows key_rows);
  void rms_norm_backward_onto(const char* op, TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y);
  void list_chunks(const char* op, const AdamBatch& batch);

  CpuDevice device_;
  const Kernels& kernels_;
  const bool deterministic_;
  Workspaces workspaces_;
  std::vector<LoraItem> lora_items_;  // of the running call; kept to keep their memory
  std::vector<AttentionItem> attention_items_;
  std::vector<Chunk> chunks_;
  std::vector<double> partial_;
  ThreadPool pool_;
};

}  // namespace loquetier::cpu
