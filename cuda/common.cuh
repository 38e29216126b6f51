// What every CUDA source shares: checked launches, dtype dispatch, 16-byte vectors, warp and block reductions.
// Launches are checked where they are made and report the caller's line. Nothing here synchronises.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <source_location>
#include <utility>

#include "core/check.h"
#include "core/tensor.h"
#include "cuda_check.h"

namespace loquetier::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;

// A kernel launch: Launch{grid, block, shared, stream}(kernel, args...). The location is the caller's.
struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;  // thread blocks of one cluster, along x
  std::source_location where = std::source_location::current();
  bool overlap = false;  // may start before the launch in front of it has ended: the kernel waits for it (griddepcontrol.wait)

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), Args&&... args) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            "cudaFuncSetAttribute(shared memory)", where);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...), "kernel launch", where);
    check_launch(stream, where);
  }
};

// Clusters of `cluster` blocks along x that the device runs at a time: fewer than its processors have room for, since the blocks of
// a cluster are on processors of one group.
template <class... Params>
int clusters_at_once(void (*kernel)(Params...), int cluster, int threads, size_t shared) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "cudaFuncSetAttribute(shared memory)");
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

// Calls f.operator()<T>() with the element type of the compute dtype.
template <class F>
void dispatch_half(DType dtype, F&& f) {
  if (dtype == DType::bf16) f.template operator()<bf16>();
  else f.template operator()<f16>();
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// True when every row of the view begins on 16 bytes and holds a whole number of 8-element vectors.
inline bool rows_of_vectors(const TensorView& t) {
  return aligned16(t.data) && t.cols % 8 == 0 && (t.ld * static_cast<int64_t>(size_of(t.dtype))) % 16 == 0;
}

// ---------------------------------------------------------------- overlapped launches

// A kernel launched with `overlap` may begin while the launch in front of it still runs: before it touches anything that launch may
// write (or writes what that launch may read) every thread waits here. Without `overlap` it returns at once.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// From here on the next launch may begin, if it was made with `overlap`.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Both, so that the next launch may rely on what came before this one. Every thread of every block passes it, also of blocks
// without work.
__device__ inline void start_after_previous() {
  wait_for_previous();
  let_next_start();
}

// ---------------------------------------------------------------- elements

__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

constexpr float kLog2E = 1.44269504f;
// In one instruction: to two units of the last place, exact at 0, zero below 2^-126.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

// N elements; what is loaded and stored at once has at most 16 bytes, and the address is aligned to them.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Two elements of 16 bits in one register. As a Pack the compiler may round and store them one by one.
template <class T>
__device__ inline uint32_t pack2(float low, float high) {
  const T a = from_float<T>(low), b = from_float<T>(high);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&a)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&b)) << 16;
}

// ---------------------------------------------------------------- reductions, in a fixed order

template <class V>
__device__ inline V warp_sum(V x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Of this lane's value and those of the lanes below it.
__device__ inline int warp_prefix_sum(int x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over the block, the same value in every thread. `shared` has one slot per warp; may be used again at once.
template <class V>
__device__ inline V block_sum(V x, V* shared) {
  x = warp_sum(x);
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warps == 1) return x;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[warp] = x;
  __syncthreads();
  V total = shared[0];
  for (int i = 1; i < warps; ++i) total += shared[i];
  return total;
}

__device__ inline float block_max(float x, float* shared) {
  x = warp_max(x);
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warps == 1) return x;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[warp] = x;
  __syncthreads();
  float total = shared[0];
  for (int i = 1; i < warps; ++i) total = fmaxf(total, shared[i]);
  return total;
}

}  // namespace loquetier::cuda
