// Device memory that the CUDA backend holds for itself, by the limits of a step: what it reserves, and what plans for a device that
// is not there count. Estimates for cuDNN, whose plans tell their need only when they are built.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ops/ops.h"

namespace loquetier {

constexpr size_t kBlasWorkspace = size_t{32} << 20;  // what cuBLAS recommends for Hopper

constexpr int kHopperProcessors = 132;  // of a device that is not there: H100 and H200 (SXM)
// The product of few rows (cuda/linear_decode.cu): for every processor the sums of 256 columns by 64 rows and a ticket; sums of s
// with their marks, 8 rows by 16 ranks, for every task and once more for every processor; a counter.
constexpr size_t kDecodeSums = 256 * 64 * sizeof(float), kDecodeTask = 8 * 16 * sizeof(uint64_t);
constexpr size_t kMostDecodeTasks = size_t{64} * kMaxParts * 256 / 16;
constexpr size_t decode_workspace(int processors) {
  return static_cast<size_t>(processors) * (kDecodeSums + kDecodeTask + sizeof(uint64_t)) + kMostDecodeTasks * kDecodeTask +
         sizeof(uint64_t);
}
// Of a processor, for attention of decodes: two unfinished runs of a block, each the sums of a tile of heads and a mark for each
// of them, and a ticket (cuda/attention_decode.cu).
constexpr int kDecodeAttentionBlocks = 2;  // of a processor
constexpr int kMostDecodeGroup = 16, kMostDecodeHeadSize = 128;
constexpr size_t kDecodeAttentionWorkspace =
    kDecodeAttentionBlocks * (size_t{2} * kMostDecodeGroup * (kMostDecodeHeadSize + 2) * sizeof(float) + sizeof(uint32_t));
// Of the fused product's E (cuda/lora_fused.h): rows and columns of a block, blocks along the rows at most, groups, blocks in all.
constexpr int64_t kFusedBlockRows = 256, kFusedBlockColumns = 64, kMostFusedPairs = 128, kMostFusedGroups = 64,
                  kMostFusedBlocks = 320;
// Of a processor: sums of a tile of it, and two flags (cuda/lora_fused.h).
constexpr size_t kFusedSumsOfProcessor = 128 * 256 * sizeof(float) + 2 * sizeof(uint32_t);
// Shares of ds, and unfinished gradients (cuda/lora_wide.cu).
constexpr size_t kMostLoraShares = size_t{64} << 20;

struct CudaWorkspace {
  size_t blas = kBlasWorkspace;
  size_t decode = 0;      // sums of the product of few rows and of decodes' attention
  size_t fused_sums = 0;  // sums of tiles that several processors compute together, with many rows
  size_t fused = 0;       // S of large groups, laid out for base and LoRA as one product
  size_t lora = 0;        // shares of ds and of gradients
  size_t attention = 0;   // plans' workspaces and tables
  size_t sample = 0;      // old values of the logits that bias, forbidden tokens or penalties change
  size_t norm = 0;        // partial sums of gradient norms
  size_t total() const { return blas + decode + fused_sums + fused + lora + attention + sample + norm; }
};

inline CudaWorkspace cuda_workspace(const OpsLimits& limits, bool deterministic, int processors = kHopperProcessors) {
  constexpr size_t kSampleEntries = 4096;  // of a row; longer histories under penalties grow the scratch once
  constexpr size_t kSampleRows = 256;      // of one vocabulary product
  constexpr size_t kNormPartials = size_t{1} << 18;
  const auto up = [](int64_t n, int64_t to) { return static_cast<size_t>((n + to - 1) / to * to); };
  CudaWorkspace bytes;
  bytes.decode = decode_workspace(processors) + static_cast<size_t>(processors) * kDecodeAttentionWorkspace;
  if (!deterministic) {
    bytes.fused_sums = static_cast<size_t>(processors) * kFusedSumsOfProcessor;
    // A group has a block wherever it meets one of a pair's two tiles: at most as often as there are groups and tiles.
    const auto pairs = std::min<int64_t>(static_cast<int64_t>(up(limits.rows, kFusedBlockRows)) / kFusedBlockRows, kMostFusedPairs);
    const int64_t blocks = std::min(kMostFusedGroups + 2 * pairs, kMostFusedBlocks);
    // Forward: every part's ranks from a step of their own; backward: all of them together, which is no more.
    bytes.fused = static_cast<size_t>(blocks * kFusedBlockRows * kMaxParts) * up(limits.rank, kFusedBlockColumns) * 2;
    if (limits.train_rows > 0) bytes.lora = 2 * kMostLoraShares;
  }
  // Forward plans: at most half a MiB measured. Tables: lengths, offsets and pages of every sequence.
  bytes.attention = size_t{1} << 20;
  bytes.attention +=
      up(limits.sequences + limits.train_rows, 64) * 64 + up(limits.sequences, 64) * up(limits.max_positions / 8, 64) * 4;
  if (limits.train_rows > 0) {
    // cuDNN's backward: f32 sums of dq, and of dk and dv for every query head of a group, all as far apart as rows of dqkv; and a
    // sum a row and head. 1729 MiB measured for 8192 rows of 32 and 8 heads of 128.
    const auto q = static_cast<size_t>(limits.q_heads), k = static_cast<size_t>(std::max(limits.kv_heads, 1));
    bytes.attention +=
        up(limits.train_rows, 1024) * ((q + 2 * k) * static_cast<size_t>(limits.head_size) * (1 + 2 * q / k) + q) * sizeof(float);
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
