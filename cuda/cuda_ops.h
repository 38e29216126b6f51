// The CUDA backend's class. Each topic has its own file: device.cpp, linear.cpp (construction, products), elementwise.cu, norm.cu,
// rope.cu, lora_*.cu, fused_linear.cpp (base and LoRA as one product), attention.cpp with attention_decode.cu,
// attention_cudnn.cpp and attention_plain.cu (any shape), loss.cu, sampling.cu, adamw.cu.
//
// Ops are ordered on one stream (a branch may run beside it inside an op), allocate nothing and wait for nothing, so they can be
// captured in a CUDA graph. Two things are made at first use, before any capture: attention plans (cuDNN compiles them), and
// scratch when a problem needs more than any before it.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <unordered_map>

#include "core/memory.h"
#include "ops/ops.h"
#include "ops/workspace.h"
#include "tensor_maps.h"

namespace loquetier::cuda {

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  std::string name() const override { return "cuda:" + std::to_string(index_); }
  void* allocate(size_t bytes) override;
  void release(void* data) noexcept override;
  void* allocate_host(size_t bytes) override;
  void release_host(void* data) noexcept override;
  void copy_to_device(void* dst, const void* host, size_t bytes) override;
  void copy_to_host(void* host, const void* src, size_t bytes) override;
  void start_copy_to_host(void* host, const void* src, size_t bytes) override;
  void copy_on_device(void* dst, const void* src, size_t bytes) override;
  void zero(void* dst, size_t bytes) override;
  void synchronize() override;
  uint64_t record() override;
  void wait(uint64_t mark) override;
  bool reached(uint64_t mark) override;
  void side_copy_to_device(void* dst, const void* host, size_t bytes) override;
  void side_follow(uint64_t mark) override;
  uint64_t side_mark() override;
  void wait_for_side(uint64_t mark) override;
  void side_synchronize() override;
  size_t free_bytes() const override;
  bool host_addressable() const override { return false; }

  cudaStream_t stream() const { return stream_; }
  int processors() const { return processors_; }
  void use() const;  // makes this device the calling thread's current one

 private:
  int index_ = 0;
  int processors_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[kMarks] = {};  // made at construction; mark m is in marks_[m % kMarks]
  uint64_t next_mark_ = 0;
  // Marks of the side queue in a ring: a mark whose event was recorded again is behind the newer one, which is waited for instead.
  static constexpr uint64_t kSideMarks = 64;
  cudaStream_t side_ = nullptr;
  cudaEvent_t side_marks_[kSideMarks] = {};
  uint64_t last_side_mark_ = 0;
};

// One product of cuBLASLt: what decides the algorithm. Rows are rounded up to a bucket, so nearby batch sizes share an entry.
struct LinearKey {
  int64_t rows, in, out, ld_x, ld_w, ld_y;
  int32_t y_dtype, bias, backward, accumulate, alignment;
  bool operator==(const LinearKey&) const = default;
};
struct LinearKeyHash {
  size_t operator()(const LinearKey& key) const;
};

// Device scratch that grows when a larger problem than any before comes (never in the steady state).
class Scratch {
 public:
  explicit Scratch(CudaDevice& device) : device_(device) {}
  void* get(size_t bytes);
  void reserve(size_t bytes);
  size_t bytes() const { return buffer_.bytes(); }

 private:
  CudaDevice& device_;
  Buffer buffer_;
};

class AttentionPlans;  // attention_cudnn.cpp
class FusedLinear;     // fused_linear.cpp
struct KShares;        // linear_decode.h
struct LoraCall;       // lora_call.h

class CudaOps final : public Ops {
 public:
  CudaOps(int device, DType compute_dtype, bool deterministic);
  ~CudaOps() override;

  Device& device() override { return device_; }
  DType compute_dtype() const override { return dtype_; }

  size_t workspace_need(const OpsLimits& limits) const override { return workspace_of(limits).total(); }
  void reserve(const OpsLimits& limits) override;
  void warm_up(const AttentionShape& shape, const KvShape& kv_shape) override;
  size_t workspace_bytes() const override;
  std::unique_ptr<StepGraph> capture(const std::function<void()>& work) override;

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

  void linear_lora(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups, TensorView s,
                   TensorView y) override;
  void linear_lora_add_rms_norm(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                TensorView s, TensorView y, TensorView residual, TensorView norm, float eps, TensorView sum,
                                TensorView z) override;
  void linear_lora_rope(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                        TensorView s, TensorView qkv, const Rope& rope) override;
  void linear_lora_rope_attention(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                  TensorView s, TensorView qkv, const Rope& rope, const PagedBatch& batch, TensorView out) override;
  void linear_lora_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView ds,
                            TensorView dx) override;
  void linear_lora_swiglu(TensorView x, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView s,
                          TensorView gate_up, TensorView h, bool keep) override;
  void linear_lora_swiglu_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView ds,
                                   TensorView gate_up, TensorView h) override;
  // The ways of linear_lora and linear_lora_backward with many rows, s and ds being there already; the benchmark compares them.
  // Base and LoRA as one product. False: does not fit, nothing was done.
  bool linear_lora_fused(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                         TensorView s, TensorView y);
  bool linear_lora_backward_fused(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView ds,
                                  TensorView dx);
  // The expand writes y, and the base product adds to it.
  void linear_lora_filled(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                          TensorView s, TensorView y);

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
  // attention_paged by cuDNN alone, for the benchmark.
  void attention_paged_by_cudnn(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                                const AttentionShape& shape, TensorView out);
  void attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                        TensorView out, TensorView lse) override;
  void attention_mixed(TensorView q, TensorView k, TensorView v, int64_t packed_rows, const PackedBatch& packed, KvLayer kv,
                       const KvShape& kv_shape, const PagedBatch& paged, const AttentionShape& shape, TensorView out,
                       TensorView lse) override;
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
  // linear_lora; with `shares` not null a decode step may leave these in place of y.
  void linear_lora_leaving(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                           TensorView s, TensorView y, KShares* shares);
  void expect_add_rms_norm(const char* op, TensorView x, TensorView delta, TensorView w, TensorView sum, TensorView y) const;
  void norm_onto(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y);
  void expect_rope(const char* op, TensorView qkv, const Rope& rope) const;
  void rope_onto(TensorView qkv, const Rope& rope, const KShares& shares);  // shares of qkv: they are added up first
  // y: the forward's output too, or without data.
  void rms_norm_backward_onto(const char* op, TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y);
  void swiglu_backward_onto(const char* op, TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y);
  void packed_on(cudaStream_t stream, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
                 const AttentionShape& shape, TensorView out, TensorView lse);
  void check_paged(TensorView q, const KvShape& kv_shape, const PagedBatch& batch, const AttentionShape& shape,
                   TensorView out) const;
  // e [T, sum R] or empty: scale * s of each part too. True: it was written, by the last launch.
  bool shrink_on(cudaStream_t stream, const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s,
                 TensorView e = {});
  // For the fused product behind it. Returns e, empty where there is none.
  TensorView shrink_for_product(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s);
  // linear_lora_fused with e, or without.
  bool fused_onto(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups, TensorView s,
                  TensorView e, TensorView y);
  // Shrink and expand in one launch when every group is small (lora_decode.cu); false: not such a batch, nothing was done.
  bool lora_small(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView y);
  // The products into rank columns over many rows of a fast layout (lora_tall.cu); shrink: the groups without dropout.
  void tall_shrink(cudaStream_t stream, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, int stacked,
                   TensorView x, TensorView s, TensorView e);
  void tall_backward_s(const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, int single, TensorView dy,
                       TensorView ds);
  // dB, dA of the groups without dropout, dA of those with it: by the kernels for any rows and layout (lora_grad.cu), or by the
  // passes over many rows (lora_wide.cu).
  enum class Gradient { b, a, a_dropout };
  void gradients(const char* op, const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                 TensorView ds, bool with_ds);
  void small_gradient(Gradient of, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, bool fast,
                      TensorView l, TensorView p);
  void wide_gradient(Gradient of, const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, TensorView l,
                     TensorView p, bool p_there);
  // ds and dB in one pass over dy; false: ranks or sums are too large for it, nothing was done.
  bool wide_sum(const LoraLinear& linear, const LoraGroups& groups, const LoraCall& call, TensorView s, TensorView dy,
                TensorView ds);
  // Expand that overwrites: y = scale * s B^T, zero where a row or part has no adapter (lora_spread.cu).
  void lora_fill(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y);
  void linear_onto(TensorView x, TensorView w, TensorView bias, TensorView y, bool accumulate, KShares* shares = nullptr);
  void matmul(const LinearKey& key, const void* x, const void* w, const void* bias, void* y, int64_t rows);
  cudaStream_t stream() const { return device_.stream(); }
  CudaWorkspace workspace_of(const OpsLimits& limits) const { return cuda_workspace(limits, deterministic_, device_.processors()); }

  CudaDevice device_;
  DType dtype_;
  bool deterministic_;
  cublasLtHandle_t blas_ = nullptr;
  Buffer blas_workspace_;
  std::unordered_map<LinearKey, cublasLtMatmulAlgo_t, LinearKeyHash> linear_algorithms_;
  TensorMaps tensor_maps_;
  int wide_clusters_[4] = {};  // lora_wide.cu: clusters that run at a time, for 16, 32, 48 and 64 ranks; 0: not asked yet
  std::unordered_map<size_t, int> loss_clusters_;  // loss.cu: the same, by the bytes of shared memory of a block
  Buffer decode_workspace_;                        // linear_decode.h
  Scratch sample_scratch_;                         // logits of tokens that bias or penalties change
  Scratch norm_scratch_;                           // partial sums of gradient norms
  Scratch lora_scratch_;                           // partial sums of ds, dA and dB
  Scratch attention_scratch_;
  std::unique_ptr<AttentionPlans> attention_plans_;
  std::unique_ptr<FusedLinear> fused_linear_;
  // A branch beside the main stream: shrink runs on it while the base product runs, attention of training while that of decodes.
  struct Branch {
    cudaStream_t stream = nullptr;
    cudaEvent_t fork = nullptr, join = nullptr;
  } branch_;
  Buffer attention_decode_workspace_;  // attention_decode.h
};

}  // namespace loquetier::cuda
