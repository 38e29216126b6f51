// What the CUDA benchmarks share: a backend with buffers, graphs and their times, the linears of an 8B Llama, adapters on a batch,
// JSON. kernels.cu: attention of decodes, LoRA beside the base products. operations.cu: other operations one by one.
//
// Build, from the repository's root, beside the libraries of the preset `cuda` (add -I for the toolkit's headers where nvcc does
// not find them itself):
//   nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Icpp -Icpp/include -Icuda benchmarks/PROGRAM.cu -o PROGRAM
//     -Lbuild/cuda -lloquetier_cuda -lloquetier -Xlinker -rpath=build/cuda -Xlinker --allow-shlib-undefined
// and run ./PROGRAM there, with the folders of cuBLAS and cuDNN in LD_LIBRARY_PATH where they are not installed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_ops.h"
#include "ops/ops.h"

extern "C" loquetier::Ops* loquetier_make_cuda_ops(int device, int compute_dtype, int deterministic);

namespace loquetier::bench {

inline void must(bool ran) {
  if (!ran) {
    std::printf("the fused product declined a shape of the benchmark\n");
    std::exit(1);
  }
}
inline void must(cudaError_t status) {
  if (status != cudaSuccess) {
    std::printf("CUDA error: %s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}

__global__ void fill_kernel(__nv_bfloat16* p, int64_t n, uint64_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (static_cast<uint64_t>(i) + seed) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float sum =
        static_cast<float>((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48)) / 65536.0f - 2.0f;  // near normal
    p[i] = __float2bfloat16(sum * scale);
  }
}

class Bench {
 public:
  Bench() : ops(loquetier_make_cuda_ops(0, static_cast<int>(DType::bf16), 0)) {
    stream = static_cast<cuda::CudaDevice&>(ops->device()).stream();
  }
  TensorView random(int64_t rows, int64_t cols, float scale = 1) {
    buffers.emplace_back(ops->device(), static_cast<size_t>(rows * cols) * 2);
    const TensorView t = matrix(buffers.back().data(), DType::bf16, rows, cols);
    fill_kernel<<<1024, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(t.data), rows * cols, seed += 977, scale);
    must(cudaGetLastError());
    return t;
  }
  TensorView zeros(DType dtype, int64_t rows, int64_t cols) {
    const size_t bytes = static_cast<size_t>(rows * cols) * size_of(dtype);
    buffers.emplace_back(ops->device(), bytes);
    ops->device().zero(buffers.back().data(), bytes);
    return matrix(buffers.back().data(), dtype, rows, cols);
  }
  template <class V>
  V* upload(const std::vector<V>& host) {
    buffers.emplace_back(ops->device(), std::max<size_t>(host.size() * sizeof(V), 16));
    ops->device().copy_to_device(buffers.back().data(), host.data(), host.size() * sizeof(V));
    ops->device().synchronize();
    return static_cast<V*>(buffers.back().data());
  }
  cudaGraphExec_t capture(const std::function<void()>& work) {
    work();  // makes plans and scratch
    ops->device().synchronize();
    cudaGraph_t graph;
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    must(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t exec;
    must(cudaGraphInstantiate(&exec, graph, 0));
    must(cudaGraphDestroy(graph));
    return exec;
  }
  // Median microseconds of each graph over interleaved replays.
  std::vector<double> time(const std::vector<cudaGraphExec_t>& graphs, double budget_ms = 150) {
    cudaEvent_t begin, end;
    must(cudaEventCreate(&begin));
    must(cudaEventCreate(&end));
    std::vector<std::vector<double>> times(graphs.size());
    double spent = 0;
    for (int round = 0; round < 200 && (round < 7 || spent < budget_ms); ++round) {
      for (size_t g = 0; g < graphs.size(); ++g) {
        must(cudaEventRecord(begin, stream));
        must(cudaGraphLaunch(graphs[g], stream));
        must(cudaEventRecord(end, stream));
        must(cudaEventSynchronize(end));
        float ms = 0;
        must(cudaEventElapsedTime(&ms, begin, end));
        if (round >= 2) times[g].push_back(ms * 1000.0);
        spent += ms;
      }
    }
    std::vector<double> medians;
    for (auto& t : times) {
      std::nth_element(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2), t.end());
      medians.push_back(t[t.size() / 2]);
    }
    for (cudaGraphExec_t g : graphs) must(cudaGraphExecDestroy(g));
    return medians;
  }
  // The same of work that is yet to be captured. All of it runs once before: scratch that one needs larger than another has its
  // place before the first address is recorded.
  std::vector<double> measure(const std::vector<std::function<void()>>& works, double budget_ms = 150) {
    for (const auto& work : works) work();
    std::vector<cudaGraphExec_t> graphs;
    for (const auto& work : works) graphs.push_back(capture(work));
    return time(graphs, budget_ms);
  }

  std::unique_ptr<Ops> ops;
  cudaStream_t stream = nullptr;
  std::vector<Buffer> buffers;
  uint64_t seed = 1;
};

constexpr int kCopyVectors = 4, kCopyThreads = 256;  // of a thread, of a block
__global__ void copy_kernel(const uint4* from, uint4* to) {
  const int64_t first = int64_t{blockIdx.x} * kCopyThreads * kCopyVectors + threadIdx.x;
  uint4 held[kCopyVectors];
#pragma unroll
  for (int i = 0; i < kCopyVectors; ++i) held[i] = from[first + i * kCopyThreads];
#pragma unroll
  for (int i = 0; i < kCopyVectors; ++i) to[first + i * kCopyThreads] = held[i];
}

// GB/s of a large copy by a kernel, read and written: more than cudaMemcpyAsync reaches in a graph.
inline double copy_bandwidth() {
  Bench b;
  const TensorView from = b.random(1 << 15, 1 << 16), to = b.random(1 << 15, 1 << 16);
  const int64_t bytes = from.size() * 2, blocks = bytes / 16 / (kCopyVectors * kCopyThreads);
  const std::vector<double> us = b.measure({[&] {
    copy_kernel<<<static_cast<unsigned>(blocks), kCopyThreads, 0, b.stream>>>(static_cast<const uint4*>(from.data),
                                                                              static_cast<uint4*>(to.data));
    must(cudaGetLastError());
  }});
  return 2.0 * static_cast<double>(bytes) / us[0] / 1e3;
}

constexpr int64_t kHidden = 4096, kFeed = 14336;
inline const LoraLinear kLinears[4] = {
    {0, 3, kHidden, {4096, 1024, 1024}}, {1, 1, kHidden, {kHidden}}, {2, 2, kHidden, {kFeed, kFeed}}, {3, 1, kFeed, {kHidden}}};
inline int64_t columns(const LoraLinear& l) { return l.out[0] + l.out[1] + l.out[2]; }

// Adapters of every layer for one batch: consecutive runs of rows, one adapter each.
struct Batch {
  LoraGroups groups;
  std::vector<LoraGroup> host;
  std::vector<std::vector<LoraSite>> sites;
  std::vector<std::vector<LoraGradSite>> grads;
};

inline void make_batch(Bench& b, Batch& batch, int64_t rows, int adapters, int rank, int layers, bool train) {
  for (int a = 0; a < adapters; ++a) {
    std::vector<LoraSite> sites;
    std::vector<LoraGradSite> grads;
    for (int l = 0; l < layers; ++l) {
      for (const LoraLinear& linear : kLinears) {
        LoraSite site;
        LoraGradSite grad;
        const TensorView all = b.random(linear.parts * rank, linear.in, 0.02f);
        for (int p = 0; p < linear.parts; ++p) {
          site.part[p] = {all.at(p * rank), b.random(linear.out[p], rank, 0.02f).data, rank, 2.0f};
          if (train) {
            grad.part[p].da = static_cast<float*>(b.random(rank, linear.in * 2, 0).data);
            grad.part[p].db = static_cast<float*>(b.random(linear.out[p], rank * 2, 0).data);
          }
        }
        sites.push_back(site);
        grads.push_back(grad);
      }
    }
    batch.sites.push_back(sites);
    batch.grads.push_back(grads);
  }
  for (int a = 0; a < adapters; ++a) {
    LoraGroup g;
    g.row_begin = static_cast<int32_t>(rows * a / adapters);
    g.rows = static_cast<int32_t>(rows * (a + 1) / adapters - rows * a / adapters);
    g.host_sites = batch.sites[static_cast<size_t>(a)].data();
    g.sites = b.upload(batch.sites[static_cast<size_t>(a)]);
    if (train) {
      g.host_grads = batch.grads[static_cast<size_t>(a)].data();
      g.grads = b.upload(batch.grads[static_cast<size_t>(a)]);
    }
    batch.host.push_back(g);
  }
  batch.groups = {b.upload(batch.host), batch.host.data(), adapters, 3 * rank, nullptr};
}

inline LoraLinear at_layer(int index, int layer) {
  LoraLinear l = kLinears[index];
  l.site = layer * 4 + index;
  return l;
}

constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};

// The last line of a program's output: one object with the device, the rank and what was added.
class Json {
 public:
  explicit Json(int rank) {
    cudaDeviceProp properties;
    must(cudaGetDeviceProperties(&properties, 0));
    gpu = properties.name;
    text_ = "{\"gpu\": \"" + gpu + "\", \"rank\": " + std::to_string(rank);
  }
  void operator()(const std::string& name, double value) {
    char text[128];
    std::snprintf(text, sizeof(text), ", \"%s\": %.2f", name.c_str(), value);
    text_ += text;
  }
  void print() const { std::printf("%s}\n", text_.c_str()); }

  std::string gpu;

 private:
  std::string text_;
};

}  // namespace loquetier::bench
