// The product of decode steps, with the adapters' expand in the same launch (linear_decode.cu).
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"
#include "lora_call.h"
#include "tensor_maps.h"

namespace loquetier::cuda {

constexpr int64_t kMaxDecodeRows = 64;
constexpr int kMaxDecodeSplits = 8;

// The adapters of a call, or count 0. s [T, >= ranks] is made by the launch in front of this one, which lets this one begin only
// after it has waited for x itself; fast_layout() holds; no dropout.
struct DecodeLora {
  LoraCall call;
  TensorView s;
};

// Sums and tickets; zeroed once, then the launches' own.
size_t decode_workspace_bytes(int processors);

// y = x W^T + bias + scale s B^T for at most kMaxDecodeRows rows, 16-bit x, w [N, K] and y, f32 sums. False: shapes or alignment it
// does not take (rows of 16 bytes, parts that end inside a tile), nothing was launched.
bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream);

}  // namespace loquetier::cuda
