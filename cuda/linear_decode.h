// The product of decode steps, with the adapters' shrink and expand in the same launch (linear_decode.cu).
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"
#include "lora_call.h"
#include "tensor_maps.h"

namespace loquetier::cuda {

constexpr int64_t kMaxDecodeRows = 64;
constexpr int kMaxDecodeSplits = 8;

// The adapters of a call, or count 0; fast_layout() holds for them, x, s and y; no dropout. s [T, >= ranks] is written.
struct DecodeLora {
  LoraCall call;
  TensorView s;
  int rank = 0;  // largest of one part; decode_swiglu: of both parts together
};

// Sums over shares of k that a launch has left for the next one: y = sum of `count` matrices [rows, N], `step` elements apart.
struct KShares {
  const float* sums = nullptr;
  int count = 0;  // 0: none, y itself was written
  int64_t ld = 0, step = 0;
};

// y = x W^T + bias + scale s B^T for at most kMaxDecodeRows rows, 16-bit x, w [N, K] and y, or f32 y, f32 sums. False: shapes or
// alignment it does not take (rows of 16 bytes, parts that end inside a tile, ranks above 256), nothing was launched. The workspace
// has decode_workspace() bytes (ops/workspace.h), zeroed once, then the launches' own. shares not null: they may be left there in
// place of y, for the next launch on the stream and no later one.
bool decode_linear(TensorMaps& maps, void* workspace, TensorView x, TensorView w, const void* bias, TensorView y,
                   const DecodeLora& lora, int processors, cudaStream_t stream, KShares* shares = nullptr);
// h = swiglu(gate | up) of the same, where w [2 F, K] is gate, then up; h [T, F] 16-bit. Ranks of both together up to 128.
bool decode_swiglu(TensorMaps& maps, void* workspace, TensorView x, TensorView w, TensorView h, const DecodeLora& lora,
                   int processors, cudaStream_t stream);

}  // namespace loquetier::cuda
