// What the blocks of a cluster tell each other (PTX ISA 8, sections on barrier.cluster, mbarrier, st.async): a barrier without
// memory order, and messages of 16 bytes that arrive at a barrier in shared memory, here by its 32-bit address.
#pragma once

#include "async.cuh"

namespace loquetier::cuda {

// A barrier of all threads of the blocks of a cluster. It orders no memory (a release would wait for the copies under way): what
// one block gives another goes by send16() and an arrival barrier; what a thread has read into registers before it arrives is read.
__device__ inline void cluster_arrive() {
  __syncwarp();  // whole warps arrive
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// An arrival barrier (barrier_init() for one arrival): a phase ends when one thread has said how many bytes come (barrier_expect())
// and they came. What other blocks sent may then be read.
__device__ inline void wait_arrival(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
// 16 bytes into the shared memory of block `rank` of the cluster; `to` and `barrier` are the addresses as that block knows them.
__device__ inline void send16(uint32_t to, uint32_t barrier, uint32_t rank, float4 value) {
  asm volatile(
      "{\n.reg .b32 to, barrier;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [barrier];\n}\n" ::"r"(to),
      "r"(barrier), "r"(rank), "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
      "r"(__float_as_uint(value.w))
      : "memory");
}

}  // namespace loquetier::cuda
