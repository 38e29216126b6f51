// Rope in front of attention of decodes (attention_decode.cu): what a run makes of its row of qkv before it meets the keys.
#pragma once

#include "attention_decode_ring.cuh"
#include "rope.cuh"

namespace loquetier::cuda::attention {

// What a run of kv head `head` takes from the row of qkv: its q heads come to rows 0, 1, … of `tile`, a matrix as in the stages,
// and unless `slot` is negative the new key and value to the next two, and to the pages. kD / 8 lanes own a head, eight columns
// each, so all heads of most groups are on their way together.
template <class T, int kD>
__device__ inline void rotate_run(const DecodeAttentionArgs& a, int head, int row, int slot, uint32_t tile) {
  constexpr int kLanes = kD / 8, kAtOnce = kThreads / kLanes, kHalf = kD / 2;  // lanes of a head, heads at once
  constexpr int kTogether = 6;                                                 // shares; q|k|v of an 8B Llama leaves five
  constexpr unsigned kAll = 0xffffffffu;
  const RopeArgs& rope = a.rope;
  const int chunk = static_cast<int>(threadIdx.x) % kLanes, column = chunk * 8;
  const float* angles = rope.cos_sin + row * rope.ld_cos + column % kHalf;
  Pack<float, 4> cosine[2], sine[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    cosine[i] = load_pack<float, 4>(angles + 4 * i);
    sine[i] = load_pack<float, 4>(angles + kHalf + 4 * i);
  }
  const int items = a.group + (slot >= 0 ? 2 : 0);
#pragma unroll 1
  for (int first = 0; first < items; first += kAtOnce) {
    const int item = first + static_cast<int>(threadIdx.x) / kLanes;
    const bool query = item < a.group, value = item == a.group + 1;
    const int64_t from = int64_t{query ? head * a.group + item : item * a.kv_heads + head} * kD + column;
    const T* w = static_cast<const T*>(query ? rope.q_norm : value ? nullptr : rope.k_norm);
    Pack<T, 8> own = {}, partner, weight = {}, partner_weight = {};
    if (item < items) {
      if (w != nullptr) {
        weight = load_pack<T, 8>(w + column);
        partner_weight = load_pack<T, 8>(w + (column ^ kHalf));
      }
      if (rope.shares.count > 0) {
        const Pack<float, 8> sum = sum_of_shares_together<8, kTogether>(rope.shares, row, from);
#pragma unroll
        for (int i = 0; i < 8; ++i) own.v[i] = from_float<T>(sum.v[i]);
      } else {
        own = load_pack<T, 8>(static_cast<const T*>(a.q) + row * a.ld_q + from);
      }
    }
    const uint4 words = reinterpret_cast<const uint4&>(own);
    const auto swapped = [](uint32_t word) { return __shfl_xor_sync(kAll, word, kLanes / 2); };  // with the other half
    reinterpret_cast<uint4&>(partner) = {swapped(words.x), swapped(words.y), swapped(words.z), swapped(words.w)};
    float scale = 1;
    if (rope.q_norm != nullptr || rope.k_norm != nullptr) {  // of all lanes
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += squares_of(to_float(own.v[i]), to_float(partner.v[i]));
#pragma unroll
      for (int offset = kLanes / 4; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
      scale = norm_factor(squares, kD, rope.eps);
    }
    if (!value) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float x = to_float(own.v[i]), y = to_float(partner.v[i]);
        if (w != nullptr) {
          x *= scale * to_float(weight.v[i]);
          y *= scale * to_float(partner_weight.v[i]);
        }
        const float s = sine[i / 4].v[i % 4];
        own.v[i] = from_float<T>(rotated(x, y, cosine[i / 4].v[i % 4], column < kHalf ? -s : s));
      }
    }
    if (item >= items) continue;
    store_shared16(chunk_of<kD>(tile, item, chunk), reinterpret_cast<const uint4&>(own));
    if (!query) {
      T* pages = static_cast<T*>(value ? a.v : a.k);
      store_pack<T, 8>(pages + (int64_t{slot} * a.kv_heads + head) * kD + column, own);
    }
  }
}

// The fragments of q from the tile; heads that are not there are the last one again.
template <int kD, int kN>
__device__ inline void load_queries(uint32_t (&q)[kN][kD / 16][2], uint32_t tile, int group) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int row = min(n * kHeads + lane % 8, group - 1);
#pragma unroll
    for (int step = 0; step < kD / 16; step += 2) {
      const Fragment f = load_blocks(chunk_of<kD>(tile, row, 2 * step + lane / 8));
      q[n][step][0] = f.v[0], q[n][step][1] = f.v[1], q[n][step + 1][0] = f.v[2], q[n][step + 1][1] = f.v[3];
    }
  }
}

// The new key and value: one chunk a lane, of the key and then of the value, from the tile and into a stage.
template <int kD>
__device__ inline uint4 load_new(uint32_t tile, int group) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, of = lane / (kD / 8) % 2;
  return load_shared16(chunk_of<kD>(tile, group + of, lane % (kD / 8)));
}
template <int kD>
__device__ inline void store_new(uint4 chunk, uint32_t stage, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, of = lane / (kD / 8) % 2;
  store_shared16(chunk_of<kD>(stage + static_cast<uint32_t>(of * Tiling<kD>::matrix), row, lane % (kD / 8)), chunk);
  __syncwarp();
}

}  // namespace loquetier::cuda::attention
