// Sampling: one block a row, the row's logits read from L2 a few times. The kept set of min-p, top-k and top-p is always "every
// token above a threshold, and of those that equal it the ones with the lowest ids", so it is found by narrowing the threshold,
// three bits a pass, with counts and probability masses in integers (fixed point): no sort, no atomics whose order matters, the
// same result whoever is in the batch.
//
// Log-probabilities are of the logits as they came in. Tokens that bias, forbidden lists or penalties change are few, so their old
// values are put aside in scratch before the change.
#include <algorithm>

#include "common.cuh"
#include "core/random.h"
#include "cuda_ops.h"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = kVocabularyThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr double kMassUnit = 1099511627776.0;  // 2^40: 2^17 tokens of mass 1 still fit 64 bits

// Order-preserving: larger float, larger key. NaN counts as the smallest.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Largest value first, lowest token on ties, as one integer to maximise.
__device__ inline uint64_t ranked(float x, int64_t token) {
  return uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ inline int32_t token_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }

__device__ inline uint64_t block_max_u64(uint64_t x, uint64_t* shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max(x, static_cast<uint64_t>(__shfl_xor_sync(0xffffffffu, x, offset)));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  uint64_t best = shared[0];
  for (int i = 1; i < kWarps; ++i) best = max(best, shared[i]);
  return best;
}

// The tokens still in: key > threshold, or key == threshold and token <= last.
struct Kept {
  uint32_t threshold = 0;
  int64_t last = INT64_MAX;
  __device__ bool has(uint32_t key, int64_t token) const { return key > threshold || (key == threshold && token <= last); }
};

struct Row {
  const float* logits;
  int64_t cols;
  float inverse_temperature;
  float top;  // largest scaled logit
  __device__ float scaled(int64_t token) const { return logits[token] * inverse_temperature; }
  __device__ uint64_t mass(float z) const { return static_cast<uint64_t>(static_cast<double>(expf(z - top)) * kMassUnit); }
};

// Narrows `kept` to its smallest set of highest keys whose weight reaches `target`. weight(z) is 1 (top-k) or a mass (top-p); equal
// keys weigh the same. The whole of `kept` weighs at least `target`, which is at least 1.
template <class Weight>
__device__ void narrow(const Row& row, Kept& kept, uint64_t target, Weight weight, uint64_t* shared) {
  uint32_t base = 0;
  for (int shift = 30; shift >= 0; shift -= 3) {
    const int steps = shift == 30 ? 3 : 7;
    uint64_t sums[7] = {};
    for (int64_t t = threadIdx.x; t < row.cols; t += kThreads) {
      const float z = row.scaled(t);
      const uint32_t key = key_of(z);
      if (key < base || !kept.has(key, t)) continue;
      const uint64_t w = weight(z);
#pragma unroll
      for (int j = 0; j < 7; ++j) {
        if (j < steps && key - base >= static_cast<uint32_t>(j + 1) << shift) sums[j] += w;
      }
    }
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < 7; ++j) {
      const uint64_t sum = block_sum(sums[j], shared);
      if (j < steps && sum >= target) best = static_cast<uint32_t>(j + 1);
    }
    base += best << shift;
  }
  // Of the tokens that equal the threshold, as many as the target still needs.
  uint64_t above = 0, equal = 0, each = 0;
  for (int64_t t = threadIdx.x; t < row.cols; t += kThreads) {
    const float z = row.scaled(t);
    const uint32_t key = key_of(z);
    if (key < base || !kept.has(key, t)) continue;
    if (key > base) {
      above += weight(z);
    } else {
      ++equal;
      each = weight(z);
    }
  }
  above = block_sum(above, shared);
  equal = block_sum(equal, shared);
  each = block_max_u64(each, shared);
  const uint64_t needed = each == 0 ? equal : (target - above + each - 1) / each;
  int64_t last = base == kept.threshold ? kept.last : INT64_MAX;
  if (needed < equal) {
    int64_t low = 0, high = row.cols - 1;  // the smallest `last` with `needed` equal tokens up to it
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      uint64_t count = 0;
      for (int64_t t = threadIdx.x; t <= middle; t += kThreads) {
        const uint32_t key = key_of(row.scaled(t));
        count += key == base && kept.has(key, t) ? 1 : 0;
      }
      if (block_sum(count, shared) >= needed) high = middle;
      else low = middle + 1;
    }
    last = low;
  }
  kept = {base, last};
}

struct SampleArgs {
  float* logits;
  int64_t ld;
  int64_t cols;
  SampleBatch batch;
  int32_t* ids;
  float* logprob;
  int32_t* top_ids;
  int64_t ld_top_ids;
  float* top_logprobs;
  int64_t ld_top_logprobs;
  float* aside;  // [n, entries] old logits of changed tokens
  int64_t entries;
};

// Entry j of a row's changes: its bias tokens, its forbidden tokens, then (with a penalty) its history.
struct Changes {
  const SampleRow& row;
  const SampleBatch& batch;
  bool history;
  __device__ int64_t count() const {
    return int64_t{row.bias_count} + row.forbidden_count + (history ? int64_t{row.prompt_length} + row.output_length : 0);
  }
  __device__ int32_t token(int64_t j) const {
    if (j < row.bias_count) return batch.bias_ids[row.bias_begin + j];
    j -= row.bias_count;
    if (j < row.forbidden_count) return batch.forbidden[row.forbidden_begin + j];
    return batch.history[row.history_begin + j - row.forbidden_count];
  }
};

__device__ void clear(uint32_t* seen, int64_t cols) {
  __syncthreads();
  for (int64_t i = threadIdx.x; i < (cols + 31) / 32; i += kThreads) seen[i] = 0;
  __syncthreads();
}
// True for the one thread that marks the token first.
__device__ bool mark(uint32_t* seen, int32_t token) {
  return (atomicOr(&seen[token / 32], 1u << (token % 32)) >> (token % 32) & 1u) == 0;
}

// `seen`: one bit a token, shared memory.
__device__ void apply_changes(const SampleArgs& a, const SampleRow& row, const Changes& changes, float* logits, float* aside,
                              uint32_t* seen) {
  const int64_t count = changes.count();
  clear(seen, a.cols);
  for (int64_t j = threadIdx.x; j < count; j += kThreads) {
    const int32_t token = changes.token(j);
    aside[j] = mark(seen, token) ? logits[token] : __uint_as_float(0x7fc00000u);  // NaN: another entry has it
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row.bias_count; i += kThreads) {
    atomicAdd(&logits[a.batch.bias_ids[row.bias_begin + i]], a.batch.bias_values[row.bias_begin + i]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row.forbidden_count; i += kThreads) logits[a.batch.forbidden[row.forbidden_begin + i]] = -INFINITY;
  if (!changes.history) return;
  const int32_t* history = a.batch.history + row.history_begin;
  if (row.repetition_penalty != 1.0f) {
    clear(seen, a.cols);
    for (int i = threadIdx.x; i < row.prompt_length + row.output_length; i += kThreads) {
      const int32_t token = history[i];
      if (mark(seen, token))
        logits[token] = logits[token] > 0 ? logits[token] / row.repetition_penalty : logits[token] * row.repetition_penalty;
    }
  }
  clear(seen, a.cols);
  // Every occurrence subtracts the same number, so the order does not show; the presence penalty comes after all of them.
  for (int i = threadIdx.x; i < row.output_length; i += kThreads)
    atomicAdd(&logits[history[row.prompt_length + i]], -row.frequency_penalty);
  __syncthreads();
  for (int i = threadIdx.x; i < row.output_length; i += kThreads) {
    const int32_t token = history[row.prompt_length + i];
    if (mark(seen, token)) logits[token] -= row.presence_penalty;
  }
}

__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs a) {
  extern __shared__ uint32_t seen[];
  __shared__ uint64_t shared[kWarps];
  __shared__ float old_logit;
  const int64_t index = blockIdx.x;
  const SampleRow row = a.batch.rows[index];
  float* logits = a.logits + index * a.ld;

  const RowSum sum = log_sum_exp(logits, a.cols, reinterpret_cast<double*>(shared));

  uint64_t limit = UINT64_MAX;
  for (int n = 0; n < row.top_logprobs && a.top_ids != nullptr; ++n) {
    uint64_t best = 0;
    for (int64_t t = threadIdx.x; t < a.cols; t += kThreads) {
      const uint64_t rank = ranked(logits[t], t);
      if (rank < limit) best = max(best, rank);
    }
    limit = block_max_u64(best, shared);
    if (threadIdx.x == 0) {
      a.top_ids[index * a.ld_top_ids + n] = token_of(limit);
      a.top_logprobs[index * a.ld_top_logprobs + n] = sum.logprob(logits[token_of(limit)]);
    }
  }

  const Changes changes = {row, a.batch,
                           row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f};
  float* aside = a.aside + index * a.entries;
  if (changes.count() > 0) {
    __syncthreads();
    apply_changes(a, row, changes, logits, aside, seen);
    __syncthreads();
  }

  uint64_t best = 0;
  for (int64_t t = threadIdx.x; t < a.cols; t += kThreads) best = max(best, ranked(logits[t], t));
  best = block_max_u64(best, shared);
  if (row.temperature > 0) {
    Row scaled = {logits, a.cols, 1.0f / row.temperature, 0.0f};
    scaled.top = scaled.scaled(token_of(best));
    Kept kept;
    if (row.min_p > 0) kept.threshold = min(key_of(scaled.top + logf(row.min_p)), key_of(scaled.top));
    if (row.top_k > 0 && row.top_k < a.cols) {
      uint64_t count = 0;
      for (int64_t t = threadIdx.x; t < a.cols; t += kThreads) count += kept.has(key_of(scaled.scaled(t)), t) ? 1 : 0;
      if (block_sum(count, shared) > static_cast<uint64_t>(row.top_k)) {
        narrow(scaled, kept, static_cast<uint64_t>(row.top_k), [](float) { return uint64_t{1}; }, shared);
      }
    }
    if (row.top_p < 1.0f) {
      uint64_t total = 0;
      for (int64_t t = threadIdx.x; t < a.cols; t += kThreads) {
        const float z = scaled.scaled(t);
        total += kept.has(key_of(z), t) ? scaled.mass(z) : 0;
      }
      total = block_sum(total, shared);
      const uint64_t target =
          max(uint64_t{1}, static_cast<uint64_t>(ceil(static_cast<double>(row.top_p) * static_cast<double>(total))));
      narrow(scaled, kept, min(target, total), [&](float z) { return scaled.mass(z); }, shared);
    }
    best = 0;
    for (int64_t t = threadIdx.x; t < a.cols; t += kThreads) {
      const float z = scaled.scaled(t);
      if (!kept.has(key_of(z), t)) continue;
      const float u = uniform01(philox(row.seed, static_cast<uint64_t>(row.index), static_cast<uint64_t>(t)).v[0]);
      best = max(best, ranked(z - logf(-logf(u)), t));
    }
    best = block_max_u64(best, shared);
  }

  const int32_t token = token_of(best);
  if (threadIdx.x == 0) old_logit = logits[token];
  __syncthreads();
  for (int64_t j = threadIdx.x; j < changes.count(); j += kThreads) {
    if (changes.token(j) == token && aside[j] == aside[j]) old_logit = aside[j];  // one entry at most
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    a.ids[index] = token;
    a.logprob[index] = sum.logprob(old_logit);
  }
}

}  // namespace

void CudaOps::sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
                     TensorView top_logprobs) {
  expect("sample", "logits", logits, DType::f32, batch.count, -1);
  if (batch.count == 0) return;
  require(logits.cols > 0, "[sample] logits: expected a vocabulary, got no columns");
  if (top_ids.data != nullptr) {
    expect("sample", "top_ids", top_ids, DType::i32, batch.count, -1);
    expect("sample", "top_logprobs", top_logprobs, DType::f32, batch.count, top_ids.cols);
  }
  int64_t entries = 0;
  for (int i = 0; i < batch.count; ++i) {
    const SampleRow& row = batch.host_rows[i];
    require(row.temperature >= 0, "[sample] row ", i, ": expected a temperature >= 0, got ", row.temperature);
    require(row.top_logprobs <= std::min(top_ids.data != nullptr ? top_ids.cols : 0, logits.cols) || row.top_logprobs == 0,
            "[sample] row ", i, ": expected top_logprobs of at most ", top_ids.data != nullptr ? top_ids.cols : 0, ", got ",
            row.top_logprobs);
    entries = std::max(entries, int64_t{row.bias_count} + row.forbidden_count + row.prompt_length + row.output_length);
  }
  device_.use();
  const size_t seen = static_cast<size_t>(ceil_div(logits.cols, 32)) * sizeof(uint32_t);
  float* aside = static_cast<float*>(sample_scratch_.get(static_cast<size_t>(entries * batch.count + 1) * sizeof(float)));
  const SampleArgs args = {static_cast<float*>(logits.data),
                           logits.ld,
                           logits.cols,
                           batch,
                           ids,
                           logprob,
                           static_cast<int32_t*>(top_ids.data),
                           top_ids.ld,
                           static_cast<float*>(top_logprobs.data),
                           top_logprobs.ld,
                           aside,
                           entries};
  Launch{dim3(static_cast<unsigned>(batch.count)), dim3(kThreads), seen, stream()}(sample_kernel, args);
}

}  // namespace loquetier::cuda
