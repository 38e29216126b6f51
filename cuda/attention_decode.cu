// Attention of one query row a sequence over paged keys and values. Bound by their bytes, so the kernel is a stream of them through
// shared memory.
//
// The work is all keys of all sequences and kv heads in a row, in units of 64 keys; each block takes an equal run of units,
// wherever it begins and ends, so uneven lengths leave no processor idle and one long sequence keeps all of them busy. Lengths are
// read on the device: a recorded launch serves whatever batch it meets. A warp takes 16 keys of each unit, has its own ring of
// stages (cp.async) and its own running softmax; the ring runs ahead over the ends of sequences, and the warps meet only there. The
// query heads of a kv head are one tile, so keys and values are read once: S = K q^T with the keys as m and the heads as n, then
// O^T += V^T P^T, whose P^T is S with its 8 x 8 blocks transposed in registers.
//
// A kv head of a sequence whose units lie in several blocks: each block leaves its sums in memory, and the last of them to come
// (a ticket) adds them up, in the order of the blocks. So the same batch has the same result bit for bit; which keys are added up
// together does depend on the other sequences, and the deterministic mode has the plain kernels.
//
// With rope in front (kRope) q is qkv as the product left it: each run begins with norm and rotation of its q heads, which come to
// the warps through shared memory. The block that reads a sequence's last key makes that key and its value, too: they go to the
// pages, and in the ring take the place of what was fetched from there. So no key depends on the launch in front.
//
// attention_decode_ring.cuh has the shares of the work and the ring, attention_decode_rope.cuh the front.
#include <algorithm>
#include <bit>

#include "attention_decode.h"
#include "attention_decode_rope.cuh"

namespace loquetier::cuda {

namespace {

using namespace attention;

// ---------------------------------------------------------------- the running softmax of a warp

template <class T, int kD, int kN>
struct Running {
  float o[kN][kD / 16][4];       // O^T: d is m, heads are n
  float top[kN][2], sum[kN][2];  // of heads 8n + 2q and the next; the sum is this lane's part

  __device__ void clear() {
    for (int n = 0; n < kN; ++n) {
      for (auto& tile : o[n])
        for (float& v : tile) v = 0;
      for (int e = 0; e < 2; ++e) {
        top[n][e] = -INFINITY;
        sum[n][e] = 0;
      }
    }
  }

  // 16 keys, the first `keys` of which are there (at least one).
  __device__ void add(const uint32_t (&q)[kN][kD / 16][2], uint32_t stage, int keys, float scale) {
    using S = Tiling<kD>;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, block = lane / 8, in_block = lane % 8;
    float s[2][kN][4] = {};  // of even and odd steps: two chains
    {
      const int row = block % 2 * 8 + in_block;
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        const Fragment k = load_blocks(stage + static_cast<uint32_t>(row * S::row + ((2 * step + block / 2) ^ in_block) * 16));
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply<T>(s[step % 2][n], k.v[0], k.v[1], k.v[2], k.v[3], q[n][step][0], q[n][step][1]);
      }
    }
    uint32_t p[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float score[4], keep[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) score[i] = g + i / 2 * 8 < keys ? (s[0][n][i] + s[1][n][i]) * scale : -INFINITY;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float most = fmaxf(score[e], score[e + 2]);
        for (int offset = 4; offset < kWarp; offset *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        most = fmaxf(most, top[n][e]);
        keep[e] = power_of_2(top[n][e] - most);
        top[n][e] = most;
        score[e] = power_of_2(score[e] - most);
        score[e + 2] = power_of_2(score[e + 2] - most);
        sum[n][e] = sum[n][e] * keep[e] + (score[e] + score[e + 2]);
      }
      p[n][0] = transpose(pack2<T>(score[0], score[1]));
      p[n][1] = transpose(pack2<T>(score[2], score[3]));
#pragma unroll
      for (int m = 0; m < kD / 16; ++m)
        for (int i = 0; i < 4; ++i) o[n][m][i] *= keep[i % 2];
    }
    const int row = block / 2 * 8 + in_block;
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
      const Fragment v =
          load_blocks_transposed(stage + static_cast<uint32_t>(S::matrix + row * S::row + ((2 * m + block % 2) ^ in_block) * 16));
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply<T>(o[n][m], v.v[0], v.v[1], v.v[2], v.v[3], p[n][0], p[n][1]);
    }
  }
};

// ---------------------------------------------------------------- the ends of runs

// Finished elements of a head's row.
template <class T, int kV>
__device__ inline void store_out(T* to, const Pack<float, kV>& sum, float factor) {
  Pack<T, kV> pack;
  for (int i = 0; i < kV; ++i) pack.v[i] = from_float<T>(sum.v[i] * factor);
  store_pack<T, kV>(to, pack);
}

// Adds up the `parts` parts of a row that lie in neighbouring blocks from `block` on; `second` is the first one's. A warp takes
// every fourth head, all its loads on their way together: the whole launch waits for this.
template <class T, int kD, int kN>
__device__ inline void add_parts(const DecodeAttentionArgs& a, int block, int second, int parts, T* out) {
  constexpr int kV = kD / kWarp, kOwn = kN * kHeads / kWarps;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto place = [&](int p, int i) {
    return int64_t{2 * (block + p) + (p == 0 ? second : 0)} * kMostHeads + min(warp + i * kWarps, a.group - 1);
  };
  float top[kOwn], total[kOwn] = {};
  Pack<float, kV> sum[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) top[i] = -INFINITY;
  for (int p = lane; p < parts; p += kWarp) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) top[i] = fmaxf(top[i], __ldcg(a.marks + place(p, i)).x);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) top[i] = warp_max(top[i]);
#pragma unroll 4
  for (int p = 0; p < parts; ++p) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float2 mark = __ldcg(a.marks + place(p, i));
      const float* from = a.sums + place(p, i) * kD + lane * kV;
      Pack<float, kV> part;
      if constexpr (kV == 4) *reinterpret_cast<float4*>(&part) = __ldcg(reinterpret_cast<const float4*>(from));
      else *reinterpret_cast<float2*>(&part) = __ldcg(reinterpret_cast<const float2*>(from));
      const float factor = power_of_2(mark.x - top[i]);
      total[i] += factor * mark.y;
      for (int e = 0; e < kV; ++e) sum[i].v[e] += factor * part.v[e];
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int head = warp + i * kWarps;
    if (head < a.group) store_out<T, kV>(out + head * kD + lane * kV, sum[i], 1.0f / total[i]);
  }
}

// ---------------------------------------------------------------- the kernel

template <class T, int kD, int kN, bool kRope>
__global__ void __launch_bounds__(kThreads, kDecodeAttentionBlocks) decode_attention_kernel(const DecodeAttentionArgs a) {
  using S = Tiling<kD>;
  constexpr int kV = kD / kWarp;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ float2 marks[kWarps][kN * kHeads];
  __shared__ bool last;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, quad = lane % 4, block = static_cast<int>(blockIdx.x);
  const uint32_t ring = shared_address(shared) + static_cast<uint32_t>(warp * kRingBytes);
  float* meeting = reinterpret_cast<float*>(shared + kWarps * kRingBytes);
  let_next_start();

  int total = 0;
  for (int i = lane; i < a.sequences; i += kWarp) total += units_of(keys_of(a, i));
  total = warp_sum(total) * a.kv_heads;
  const Shares shares = {total, min(static_cast<int>(gridDim.x), total)};
  if (block >= shares.blocks) {
    wait_for_previous();  // without work too: the next launch takes this one's end for that of all before it
    return;
  }
  const int begin = shares.begin(block), count = shares.begin(block + 1) - begin;

  // The ring runs ahead: `ahead` is the place of the next unit to ask for, `page` this lane's page there.
  Place at = find_unit(a, begin), ahead = at;
  int asked = 0, page = page_of(a, ahead);
  uint32_t fill = 0, use = 0;  // stages
  const auto ask = [&](bool early) {
    if (asked < count) {
      const int key0 = first_key(ahead);
      if (!kRope && early && key0 + kTileKeys >= ahead.keys) wait_for_previous();  // the last key is that launch's
      if (key0 < ahead.keys) fetch<kD>(a, ahead, page, ring + fill * S::stage);
      if (++asked < count) {
        ahead.advance(a);
        page = page_of(a, ahead);
      }
    }
    commit_copies();
    fill = fill + 1 == S::stages ? 0 : fill + 1;
  };
  for (int i = 0; i + 1 < S::stages; ++i) ask(true);
  int row = 0, slot = -1;  // of q; of the new key, negative: none is made
  const auto find_row = [&] {
    row = table_entry(a.row_begin + at.sequence);
    if constexpr (kRope) slot = table_entry(a.rope.kv_slots + row);
  };
  find_row();
  wait_for_previous();  // for q; and for the angles, since no launch in front need have ended before

  for (int done = 0; done < count;) {
    const int units = min(at.units - at.unit, count - done);
    uint32_t q[kN][kD / 16][2];
    uint4 fresh = {};  // this lane's part of the new key and value
    if constexpr (kRope) {
      const uint32_t tile = shared_address(meeting);
      if (at.unit + units < at.units) slot = -1;  // the last key is another block's
      rotate_run<T, kD>(a, at.head, row, slot, tile);
      __syncthreads();
      load_queries<kD, kN>(q, tile, a.group);
      fresh = load_new<kD>(tile, a.group);
      __syncthreads();  // the warps' sums come to the same place
    } else {
      const T* q_row = static_cast<const T*>(a.q) + row * a.ld_q + at.head * a.group * kD;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const bool real = n * kHeads + g < a.group;
        const T* from = q_row + (real ? n * kHeads + g : 0) * kD + 2 * quad;
#pragma unroll
        for (int step = 0; step < kD / 16; ++step) {
          q[n][step][0] = real ? *reinterpret_cast<const uint32_t*>(from + step * 16) : 0;
          q[n][step][1] = real ? *reinterpret_cast<const uint32_t*>(from + step * 16 + 8) : 0;
        }
      }
    }
    Running<T, kD, kN> running;
    running.clear();
    for (int i = 0; i < units; ++i) {
      wait_copies<S::stages - 2>();
      __syncwarp();  // the copies of all lanes are there, and the stage before has been read
      ask(false);
      const int keys = at.keys - (at.unit + i) * kUnitKeys - warp * kTileKeys;
      if (kRope && slot >= 0 && keys > 0 && keys <= kTileKeys) store_new<kD>(fresh, ring + use * S::stage, keys - 1);
      if (keys > 0) running.add(q, ring + use * S::stage, keys, a.scale);
      use = use + 1 == S::stages ? 0 : use + 1;
    }

    // The warps' sums meet, eight heads at a time.
    const bool whole = units == at.units;
    const int second = at.unit == 0 && done > 0 ? 1 : 0;  // 0: begins with the block's run
    T* out_row = static_cast<T*>(a.out) + row * a.ld_out + at.head * a.group * kD;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      for (int e = 0; e < 2; ++e) {
        float sum = running.sum[n][e];
        for (int offset = 4; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (g == 0) marks[warp][n * kHeads + 2 * quad + e] = {running.top[n][e], sum};
      }
#pragma unroll
      for (int m = 0; m < kD / 16; ++m) {
        for (int i = 0; i < 4; ++i) {  // heads 2q and 2q + 1, elements 8 apart: each q has banks of its own
          const int head = 2 * quad + i % 2, element = (m * 16 + g + i / 2 * 8) ^ (quad * 8);
          meeting[(warp * kHeads + head) * kD + element] = running.o[n][m][i];
        }
      }
      __syncthreads();
      for (int head = warp; head < min(kHeads, a.group - n * kHeads); head += kWarps) {
        float top = -INFINITY, total_sum = 0;
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, marks[w][n * kHeads + head].x);
        Pack<float, kV> sum = {};
        for (int w = 0; w < kWarps; ++w) {
          const float2 mark = marks[w][n * kHeads + head];
          const float factor = power_of_2(mark.x - top);
          const auto part =
              *reinterpret_cast<const Pack<float, kV>*>(meeting + (w * kHeads + head) * kD + ((lane * kV) ^ (head / 2 * 8)));
          total_sum += factor * mark.y;
          for (int i = 0; i < kV; ++i) sum.v[i] += factor * part.v[i];
        }
        if (whole) {
          store_out<T, kV>(out_row + (n * kHeads + head) * kD + lane * kV, sum, 1.0f / total_sum);
        } else {
          const int64_t place = int64_t{2 * block + second} * kMostHeads + n * kHeads + head;
          *reinterpret_cast<Pack<float, kV>*>(a.sums + place * kD + lane * kV) = sum;
          if (lane == 0) a.marks[place] = {top, total_sum};
        }
      }
      if (n + 1 < kN || whole) __syncthreads();
    }
    if (!whole) {
      const int from = begin + done - at.unit, owner = shares.owner(from), parts = shares.owner(from + at.units - 1) - owner + 1;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(a.tickets + owner, 1u) + 1 == static_cast<unsigned>(parts);
      __syncthreads();
      if (last) {
        __threadfence();
        add_parts<T, kD, kN>(a, owner, from > shares.begin(owner) ? 1 : 0, parts, out_row);
        if (threadIdx.x == 0) a.tickets[owner] = 0;
      }
    }
    done += units;
    at.unit += units - 1;
    at.advance(a);
    if (done < count) find_row();
  }
}

template <class T, int kD, bool kRope>
void launch_decode_attention(const DecodeAttentionArgs& args, int blocks, cudaStream_t stream,
                             std::source_location where = std::source_location::current()) {
  const Launch launch{dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Tiling<kD>::shared, stream, 1, where, true};
  if (args.group <= kHeads) launch(decode_attention_kernel<T, kD, 1, kRope>, args);
  else launch(decode_attention_kernel<T, kD, 2, kRope>, args);
}

// All of the arguments but those of rope.
DecodeAttentionArgs arguments(void* workspace, TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                              int32_t first, int32_t count, const AttentionShape& shape, TensorView out, int processors) {
  DecodeAttentionArgs args = {};
  args.q = q.data;
  args.ld_q = q.ld;
  args.out = out.data;
  args.ld_out = out.ld;
  args.k = kv.k;
  args.v = kv.v;
  args.row_begin = batch.row_begin + first;
  args.rows = batch.rows + first;
  args.kv_len = batch.kv_len + first;
  args.page_table = batch.page_table + int64_t{first} * batch.max_pages;
  args.sequences = count;
  args.max_pages = batch.max_pages;
  args.page_bits = std::countr_zero(static_cast<unsigned>(kv_shape.page_size));
  args.kv_heads = shape.kv_heads;
  args.group = shape.q_heads / shape.kv_heads;
  args.scale = shape.scale * kLog2E;
  const size_t parts = size_t{2} * kDecodeAttentionBlocks * static_cast<size_t>(processors) * kMostHeads;
  args.sums = static_cast<float*>(workspace);
  args.marks = reinterpret_cast<float2*>(args.sums + parts * kMostDecodeHeadSize);
  args.tickets = reinterpret_cast<unsigned*>(args.marks + parts);
  return args;
}

}  // namespace

size_t decode_attention_workspace_bytes(int processors) { return static_cast<size_t>(processors) * kDecodeAttentionWorkspace; }

bool takes_decode_attention(TensorView q, KvLayer kv, const KvShape& kv_shape, const AttentionShape& shape, TensorView out) {
  return (shape.head_size == 64 || shape.head_size == 128) && shape.q_heads / shape.kv_heads <= kMostHeads &&
         std::has_single_bit(static_cast<unsigned>(kv_shape.page_size)) && rows_of_vectors(q) && rows_of_vectors(out) &&
         aligned16(kv.k) && aligned16(kv.v);
}

bool takes_decode_rope(TensorView qkv, const Rope& of, TensorView out) {
  return of.raw.data == nullptr && of.kv_slots != nullptr && of.kv.k != nullptr && rows_of_vectors(of.cos_sin) &&
         aligned16(of.q_norm.data) && aligned16(of.k_norm.data) && takes_decode_attention(qkv, of.kv, of.kv_shape, of.shape, out);
}

bool decode_attention(void* workspace, TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch, int32_t first,
                      int32_t count, const AttentionShape& shape, TensorView out, int processors, int blocks, cudaStream_t stream) {
  if (!takes_decode_attention(q, kv, kv_shape, shape, out)) return false;
  const DecodeAttentionArgs args = arguments(workspace, q, kv, kv_shape, batch, first, count, shape, out, processors);
  dispatch_half(q.dtype, [&]<class T>() {
    if (shape.head_size == 128) launch_decode_attention<T, 128, false>(args, blocks, stream);
    else launch_decode_attention<T, 64, false>(args, blocks, stream);
  });
  return true;
}

void decode_rope_attention(void* workspace, TensorView qkv, const KShares& shares, const Rope& of, const PagedBatch& batch,
                           TensorView out, int processors, int blocks, cudaStream_t stream) {
  DecodeAttentionArgs args = arguments(workspace, qkv, of.kv, of.kv_shape, batch, 0, batch.sequences, of.shape, out, processors);
  args.rope = {shares,     static_cast<const float*>(of.cos_sin.data), of.cos_sin.ld, of.q_norm.data, of.k_norm.data, of.eps,
               of.kv_slots};
  dispatch_half(qkv.dtype, [&]<class T>() {
    if (of.shape.head_size == 128) launch_decode_attention<T, 128, true>(args, blocks, stream);
    else launch_decode_attention<T, 64, true>(args, blocks, stream);
  });
}

}  // namespace loquetier::cuda
