// What the kernels with asynchronous copies and products share (PTX ISA 8, sections on cp.async and on proxies): shared memory by
// its 32-bit address, copies of 16 bytes a thread.
#pragma once

#include "common.cuh"

namespace loquetier::cuda {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes a thread, from global to shared memory; zeros when not `real` (the address is then not read).
__device__ inline void copy16(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Bulk copies and products asked for behind it see shared memory as this thread has left it.
__device__ inline void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace loquetier::cuda
