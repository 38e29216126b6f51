// The arithmetic of rope, for its own kernel (rope.cu) and for attention that does rope as it reads q (attention_decode.cu):
// written out, so that both round alike and their results are the same bit for bit.
#pragma once

#include "common.cuh"

namespace loquetier::cuda {

// One of a pair that rotates together, the sine negated for that of the first half.
__device__ inline float rotated(float x, float partner, float cosine, float sine) { return fmaf(x, cosine, partner * sine); }

// What a pair adds to the sum of squares of its head, whichever of the two comes first.
__device__ inline float squares_of(float x, float partner) { return __fmul_rn(x, x) + __fmul_rn(partner, partner); }

// The factor of a head's norm, before the weights.
__device__ inline float norm_factor(float squares, int size, float eps) { return rsqrtf(squares / static_cast<float>(size) + eps); }

}  // namespace loquetier::cuda
