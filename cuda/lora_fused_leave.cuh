// How a finished tile of the fused product leaves (lora_fused.cuh). It stays in registers, rounded, and goes out a block of columns
// at a time while the first steps of the next tile run: registers -> swizzled shared memory -> memory by TMA, which leaves out what
// lies past the edges.
//   forward, backward   blocks of 64 columns, one a step, in two places by turns
//   swiglu              a tile is 128 columns of gate and the same of up: blocks of 32 of either, and of h
//   swiglu_backward     the tile is dh: gate and up of 32 columns come a few steps ahead; their gradients and h take their places
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "lora.cuh"
#include "lora_fused.h"

namespace loquetier::cuda::fused {

constexpr int kWarpgroup = 128;
constexpr int kPacked = kFusedSums / kWarpgroup / 2;  // pairs of values of a tile in a thread
constexpr int kOut = 2 * kFusedBox * kFusedDepth;     // values of a warpgroup on their way

__device__ inline void load(const CUtensorMap& map, uint64_t* barrier, void* to, int column, int row) {
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, column, row);
}

// 16 x 16 values of a warp as its sums lie: matrices of 8 x 8, below one another, then beside.
__device__ inline void load_matrices(uint32_t from, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}
__device__ inline void store_matrices(uint32_t to, const uint32_t* v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}

// A warpgroup's 64 rows of a tile.
template <class T, FusedKind kKind>
class Leaving {
 public:
  // `out`: kOut values of shared memory, aligned to 1024 bytes; `in`: a barrier for one arrival (swiglu_backward).
  __device__ Leaving(const FusedArgs& args, T* out, uint64_t* in, int consumer)
      : args_(args), out_(out), in_(in), consumer_(static_cast<uint32_t>(consumer)) {}

  __device__ bool any() const { return blocks_ > 0; }

  // Nothing is left of the tile before.
  template <class Sums>
  __device__ void take(Sums& sums, int row, int column) {
    row_ = row;
    column_ = column;
    blocks_ = kBlocks;
    if (!has_swiglu(kKind) && args_.bias != nullptr) add_bias(sums);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) values_[i] = pack2<T>(sums(2 * i), sums(2 * i + 1));
  }

  // While any(): a block is begun, and kBeat steps of the next tile later sent.
  static constexpr int kBeat = kKind == FusedKind::swiglu_backward ? 6 : kKind == FusedKind::swiglu ? 2 : 1;
  __device__ void begin() {
    if (kKind == FusedKind::swiglu_backward) ask_for_gate_and_up();
  }
  __device__ void send() {
    if constexpr (kKind == FusedKind::swiglu) send_swiglu();
    else if constexpr (kKind == FusedKind::swiglu_backward) send_gradient();
    else send_block();
    // What is left moves up, so that its places are the same for every block.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = part * kPartValues; i + kBlockValues < (part + 1) * kPartValues; ++i) values_[i] = values_[i + kBlockValues];
    }
    column_ += kColumns;
    --blocks_;
  }

  // Shared memory is read until then.
  __device__ void end() {
    if (leads()) cute::tma_store_wait<0>();
  }

 private:
  static constexpr int kColumns = block_columns(kKind);
  static constexpr int kParts = kKind == FusedKind::swiglu ? 2 : 1;  // gate and up
  static constexpr int kBlocks = kFusedColumns / kParts / kColumns;
  static constexpr int kPartValues = kPacked / kParts, kBlockValues = kPartValues / kBlocks;
  static constexpr int kBlockSize = kFusedBox * kColumns;
  static constexpr uint32_t kBlockBytes = kBlockSize * sizeof(T);

  // Sums of thread (g, q): per 8 columns, (row g, columns 2q, 2q + 1), (row g + 8, the same).
  template <class Sums>
  __device__ void add_bias(Sums& sums) const {
#pragma unroll
    for (int block = 0; block < kFusedColumns / 8; ++block) {
      const int at = column_ + block * 8 + 2 * static_cast<int>(threadIdx.x % 4);
      if (at >= args_.columns) continue;
      const uint32_t bias = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(args_.bias) + at));
#pragma unroll
      for (int i = 4 * block; i < 4 * block + 4; i += 2) sums(i) += low_float<T>(bias), sums(i + 1) += high_float<T>(bias);
    }
  }

  __device__ static bool leads() { return threadIdx.x % kWarpgroup == 0; }
  __device__ void barrier() const { cutlass::arch::NamedBarrier::sync(kWarpgroup, consumer_); }

  // Where this lane's row of the warp's 16 rows and of 16 columns, the `pair`-th of the block, is: lane l names row l % 16 and the
  // left or right half. The swizzle of TMA for rows as wide as the block.
  __device__ static uint32_t offset(int pair) {
    constexpr int kChunks = kColumns / 8, kRowsOf128 = 8 / kChunks;
    const int lane = static_cast<int>(threadIdx.x) % kWarp,
              row = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp * 16 + lane % 16;
    const int chunk = (2 * pair + lane / 16) ^ (row / kRowsOf128 % kChunks);
    return static_cast<uint32_t>(row * kChunks + chunk) * 16;
  }
  __device__ uint32_t place(int block) const { return cute::cast_smem_ptr_to_uint(out_ + block * kBlockSize); }

  __device__ void store(const CUtensorMap& map, int block) const {
    cute::SM90_TMA_STORE_2D::copy(&map, out_ + block * kBlockSize, column_, row_);
  }

  __device__ void send_block() {
    const int block = blocks_ % 2;
    if (leads()) cute::tma_store_wait<1>();  // the block that stood here has been read
    barrier();
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) store_matrices(place(block) + offset(pair), values_ + 4 * pair);
    cute::tma_store_fence();  // TMA, another proxy, reads what these threads wrote
    barrier();
    if (leads()) {
      store(args_.y, block);
      cute::tma_store_arrive();
    }
  }

  __device__ void send_swiglu() {
    if (leads()) cute::tma_store_wait<0>();
    barrier();
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      const uint32_t *gate = values_ + 4 * pair, *up = gate + kPartValues;
      uint32_t h[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[i] = pack2<T>(swiglu(low_float<T>(gate[i]), low_float<T>(up[i])), swiglu(high_float<T>(gate[i]), high_float<T>(up[i])));
      }
      const uint32_t at = offset(pair);
      store_matrices(place(0) + at, gate);
      store_matrices(place(1) + at, up);
      store_matrices(place(2) + at, h);
    }
    send_three();
  }

  __device__ void ask_for_gate_and_up() {
    if (!leads()) return;
    cute::tma_store_wait<0>();
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(in_, 2 * kBlockBytes);
    load(args_.gate, in_, out_, column_, row_);
    load(args_.up, in_, out_ + kBlockSize, column_, row_);
  }
  __device__ void send_gradient() {
    cutlass::arch::ClusterTransactionBarrier::wait(in_, phase_);
    phase_ ^= 1;
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      const uint32_t at = offset(pair);
      uint32_t gates[4], ups[4], hs[4];
      load_matrices(place(0) + at, gates);
      load_matrices(place(1) + at, ups);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float dgate[2], dup[2], h[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t dh = values_[4 * pair + i];
          const float g = j == 0 ? low_float<T>(gates[i]) : high_float<T>(gates[i]);
          const float u = j == 0 ? low_float<T>(ups[i]) : high_float<T>(ups[i]);
          const float d = j == 0 ? low_float<T>(dh) : high_float<T>(dh), s = sigmoid(g), silu_g = g * s;
          dgate[j] = d * u * (s + silu_g * (1.0f - s));
          dup[j] = d * silu_g;
          h[j] = silu_g * u;
        }
        gates[i] = pack2<T>(dgate[0], dgate[1]);
        ups[i] = pack2<T>(dup[0], dup[1]);
        hs[i] = pack2<T>(h[0], h[1]);
      }
      store_matrices(place(0) + at, gates);
      store_matrices(place(1) + at, ups);
      store_matrices(place(2) + at, hs);
    }
    send_three();
  }
  __device__ void send_three() {
    cute::tma_store_fence();  // TMA, another proxy, reads what these threads wrote
    barrier();
    if (leads()) {
      store(args_.gate, 0);
      store(args_.up, 1);
      store(args_.y, 2);
      cute::tma_store_arrive();
    }
  }

  const FusedArgs& args_;
  T* out_;
  uint64_t* in_;
  uint32_t consumer_, phase_ = 0;
  int blocks_ = 0, row_ = 0, column_ = 0;  // blocks that are still here; of the next one
  uint32_t values_[kPacked];               // per 16 columns 4 matrices of 8 x 8, as stmatrix takes them
};

}  // namespace loquetier::cuda::fused
