// Hopper's asynchronous copies and products for the kernels that use them directly: barriers in shared memory, bulk tensor copies,
// the bookkeeping of wgmma (PTX ISA 8, sections on mbarrier, cp.async.bulk, wgmma). Shared memory is addressed by its 32-bit
// address.
#pragma once

#include <cuda.h>

#include "async.cuh"

namespace loquetier::cuda {

// ---------------------------------------------------------------- barriers

__device__ inline void barrier_init(uint32_t address, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init(uint64_t& barrier, uint32_t arrivals) { barrier_init(shared_address(&barrier), arrivals); }
// After the inits, by the thread that made them: the copy engine sees them too, and behind a cluster's barrier its other blocks.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and lets the phase end only when `bytes` have been copied.
__device__ inline void barrier_expect(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}
__device__ inline void barrier_expect(uint64_t& barrier, uint32_t bytes) { barrier_expect(shared_address(&barrier), bytes); }
// Waits for the end of the phase of that parity.
__device__ inline void barrier_wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Arrives without waiting; `threads` counts those that wait too.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A counter in shared memory by which one thread tells others of the block how far it is.
__device__ inline void store_release(int* p, int value) {
  asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" ::"r"(shared_address(p)), "r"(value) : "memory");
}
__device__ inline int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(p)) : "memory");
  return value;
}

// ---------------------------------------------------------------- bulk copies

// Hints for the L2: weights that pass once, and rows that every block reads.
constexpr uint64_t kStreamOnce = 0x12F0000000000000, kKeep = 0x14F0000000000000, kNoHint = 0x1000000000000000;

__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, uint64_t& barrier, int column, int row, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], "
      "%5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(hint)
      : "memory");
}

// Contiguous bytes, a multiple of 16; both addresses on 16 bytes.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint64_t& barrier, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(hint)
      : "memory");
}

// ---------------------------------------------------------------- products

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// An operand with k contiguous in rows of 128 swizzled bytes: 8 rows are 1024 bytes.
__device__ inline uint64_t swizzled_operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// ---------------------------------------------------------------- loads and stores

__device__ inline uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ inline uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ inline void store_shared8(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void store_shared16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Two words that other blocks have written, perhaps. Each is whole, nothing is said about their order.
__device__ inline ulonglong2 load_relaxed16(const uint64_t* p) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
__device__ inline uint64_t load_relaxed(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
// A counter that every block raises after its writes and the barrier behind them; another that has seen it raised may read those.
__device__ inline void raise_release(uint64_t* p, uint64_t add) {
  asm volatile("red.add.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(add) : "memory");
}
__device__ inline uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

}  // namespace loquetier::cuda
