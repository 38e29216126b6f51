// Decides whether a linear with LoRA runs as the one product of lora_fused.h, and runs it: which groups stand in which tiles,
// tensor maps, E. Owned by CudaOps.
#pragma once

#include "cuda_ops.h"
#include "lora_fused.h"

namespace loquetier::cuda {

class FusedLinear {
 public:
  FusedLinear(CudaDevice& device, DType dtype, TensorMaps& maps, bool deterministic);

  // y = x w^T + bias + the groups' scale * s B^T, or dx = dy w + ds A: all of y or dx is overwritten. s and ds are there already.
  // Returns how many of the groups, from the first on, are in it (small ones at the end cost less apart), or -1: does not fit,
  // nothing was done.
  // x [T, in]; w [sum out, in]; bias [sum out] or empty; s [T, sum R]; e: place_of_e() with scale * s, by the launch in front of
  // this one, or empty; y [T, sum out]
  int32_t forward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView w, TensorView bias, TensorView s,
                  TensorView e, TensorView y);
  // The same of gate and up without a bias, and h = swiglu(gate_up); of groups that are not in it both are the base's.
  // gate_up [T, 2 F]; h [T, F]
  int32_t swiglu(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView w, TensorView s, TensorView e,
                 TensorView gate_up, TensorView h);
  int32_t backward(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView w, TensorView ds, TensorView dx);
  // The same, then with dh = dx: gate_up becomes its gradient, h the output of swiglu. All groups or, returning false, nothing.
  // gate_up [T, 2 in]; h [T, in]
  bool swiglu_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView w, TensorView ds,
                       TensorView gate_up, TensorView h);
  // Where the shrink may put scale * s for the product behind it, [T, sum R]; empty: that takes it from s.
  TensorView place_of_e(const LoraLinear& linear, LoraGroups groups, int64_t rows);
  void reserve(size_t bytes) { e_.reserve(bytes); }  // CudaWorkspace::fused
  size_t workspace_bytes() const { return e_.bytes() + sums_.bytes(); }

 private:
  int32_t run(FusedKind kind, const LoraLinear& linear, LoraGroups groups, TensorView x, TensorView w, const void* bias,
              TensorView s, TensorView e, TensorView y, TensorView gate_up = {});
  void encode_maps(FusedKind kind, const LoraLinear& linear, const LoraGroups& groups, const FusedPackArgs& pack, FusedArgs& args);

  CudaDevice& device_;
  DType dtype_;
  TensorMaps& maps_;
  int clusters_[std::size(kFusedKinds)] = {};  // that run at a time
  Scratch e_;
  Buffer sums_;  // FusedArgs::sums and ready
};

}  // namespace loquetier::cuda
