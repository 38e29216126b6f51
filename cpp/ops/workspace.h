// Device memory that the CUDA backend holds for itself, by the limits of a step: what it reserves, and what plans for a device that
// is not there count. Estimates for cuDNN, whose plans tell their need only when they are built.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ops/ops.h"

namespace loquetier {

constexpr size_t kBlasWorkspace = size_t{32} << 20;  // what cuBLAS recommends for Hopper

struct CudaWorkspace {
  size_t blas = kBlasWorkspace;
  size_t attention = 0;  // plans' workspaces and tables
  size_t sample = 0;     // old values of the logits that bias, forbidden tokens or penalties change
  size_t norm = 0;       // partial sums of gradient norms
  size_t total() const { return blas + attention + sample + norm; }
};

inline CudaWorkspace cuda_workspace(const OpsLimits& limits, bool deterministic) {
  constexpr size_t kSampleEntries = 4096;  // of a row; longer histories under penalties grow the scratch once
  constexpr size_t kSampleRows = 256;      // of one vocabulary product
  constexpr size_t kNormPartials = size_t{1} << 18;
  const auto up = [](int64_t n, int64_t to) { return static_cast<size_t>((n + to - 1) / to * to); };
  CudaWorkspace bytes;
  // Forward plans: at most half a MiB measured. Tables: lengths, offsets and pages of every sequence.
  bytes.attention = size_t{1} << 20;
  bytes.attention +=
      up(limits.sequences + limits.train_rows, 64) * 64 + up(limits.sequences, 64) * up(limits.max_positions / 8, 64) * 4;
  if (limits.train_rows > 0) {
    // Backward of 8192 rows of 32 heads of 128: 385 MiB measured, three f32 copies of dq. It grows with the rows.
    bytes.attention +=
        3 * up(limits.train_rows, 1024) * static_cast<size_t>(limits.q_heads) * static_cast<size_t>(limits.head_size) * 4;
    const int64_t longest = std::min(limits.train_rows, limits.max_positions);
    // The deterministic one adds 2 bytes a head, query and key, of whole tiles: most for one long sequence.
    if (deterministic) bytes.attention += static_cast<size_t>(limits.q_heads) * up(longest, 64) * up(longest, 128) * 2;
  }
  bytes.sample =
      kSampleEntries * std::min(kSampleRows, static_cast<size_t>(std::max<int64_t>(limits.sequences, 1))) * sizeof(float);
  bytes.norm = limits.train_rows > 0 ? (kNormPartials + 1) * sizeof(double) : 0;
  return bytes;
}

}  // namespace loquetier
