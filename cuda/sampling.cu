// Sampling: a cluster has a row, each of its blocks one slice of the logits. Logits that are read more than twice are held in
// shared memory; those of greedy rows are not, so that 64 rows run at the same time (64 x 128,256: 13 us). The kept set of
// min-p, top-k and top-p is always "every token above a threshold, and of those that equal it the ones with the lowest ids", so it
// is found by narrowing the threshold, three bits a pass, with counts and probability masses in integers (fixed point): no sort, no
// atomics whose order matters, the same result whoever is in the batch.
//
// Log-probabilities are of the logits as they came in. Tokens that bias, forbidden lists or penalties change are few, so their old
// values are put aside in scratch before the change.
#include <cooperative_groups.h>

#include <algorithm>
#include <climits>

#include "common.cuh"
#include "core/random.h"
#include "cuda_ops.h"
#include "tma.cuh"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = kSliceThreads;        // of a block
constexpr double kMassUnit = 1099511627776.0;  // 2^40: 2^17 tokens of mass 1 still fit 64 bits

// Order-preserving: larger float, larger key. NaN counts as the smallest.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // the two zeros are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Largest value first, lowest token on ties, as one integer to maximise.
__device__ inline uint64_t ranked(float x, int token) {
  return uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ inline int32_t token_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }
__device__ inline float value_of(uint64_t rank) {
  const auto key = static_cast<uint32_t>(rank >> 32);
  if (key == 0) return NAN;
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// What the warps of a row tell each other: words of each, in shared memory of every block.
class Meeting {
 public:
  static constexpr int kMostWords = 7;
  struct Words {
    uint64_t of[2][kMostWords][kVocabularyWarps];
  };

  __device__ explicit Meeting(Words& words) : words_(words) {}
  __device__ uint64_t max(uint64_t x) {
    const uint64_t own[1] = {warp_max(x)};
    return warp_max(exchange(own)[0][threadIdx.x % kWarp]);
  }
  template <int kCount>
  __device__ void sum(uint64_t (&x)[kCount]) {
    static_assert(kVocabularyWarps == kWarp);
    for (uint64_t& v : x) v = warp_sum(v);
    const auto* all = exchange(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = warp_sum(all[i][threadIdx.x % kWarp]);
  }
  __device__ uint64_t sum(uint64_t x) {
    uint64_t one[1] = {x};
    sum(one);
    return one[0];
  }
  // The row's sum in the order of log_sum_exp(), and the maximum of `best`.
  __device__ RowSum sum(const WarpSum& part, uint64_t& best) {
    const uint64_t own[3] = {static_cast<uint64_t>(__double_as_longlong(part.sum)), __float_as_uint(part.top), warp_max(best)};
    const auto* all = exchange(own);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    best = warp_max(all[2][lane]);
    return row_sum(
        {__longlong_as_double(static_cast<int64_t>(all[0][lane])), __uint_as_float(static_cast<uint32_t>(all[1][lane]))});
  }

 private:
  __device__ static uint64_t warp_max(uint64_t x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      x = ::max(x, static_cast<uint64_t>(__shfl_xor_sync(0xffffffffu, x, offset)));
    return x;
  }
  // Two places in turn: who writes to one has seen that everybody is done with what was there.
  template <int kCount>
  __device__ const uint64_t (*exchange(const uint64_t (&own)[kCount])) [kVocabularyWarps] {
    static_assert(kCount <= kMostWords);
    auto cluster = cooperative_groups::this_cluster();
    const int lane = static_cast<int>(threadIdx.x) % kWarp,
              warp = (static_cast<int>(cluster.block_rank()) * kThreads + static_cast<int>(threadIdx.x)) / kWarp;
    auto* here = words_.of[place_];
    place_ ^= 1;
    if (lane < kVocabularySlices) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) *cluster.map_shared_rank(&here[i][warp], static_cast<unsigned>(lane)) = own[i];
    }
    cluster.sync();
    return here;
  }

  Words& words_;
  int place_ = 0;
};

// The tokens still in: key > threshold, or key == threshold and token <= last.
struct Kept {
  uint32_t threshold = 0;
  int last = INT_MAX;
  __device__ bool has(uint32_t key, int token) const { return key > threshold || (key == threshold && token <= last); }
};

// The tokens of a block: [begin, begin + count) of the row.
struct Slice {
  float* logits;
  int begin, count, cols;
  bool vectors;
  float inverse_temperature = 1;
  float top = 0;  // largest scaled logit of the row

  __device__ bool has(int token) const { return token >= begin && token - begin < count; }
  __device__ float& at(int token) const { return logits[token - begin]; }
  __device__ float scaled(int token) const { return at(token) * inverse_temperature; }
  __device__ uint64_t mass(float z) const { return static_cast<uint64_t>(static_cast<double>(expf(z - top)) * kMassUnit); }
  // f(token) for this thread's tokens.
  template <class F>
  __device__ void each(F&& f) const {
    for (int t = begin + static_cast<int>(threadIdx.x); t < begin + count; t += kThreads) f(t);
  }
  // This warp's range: [first, end) of the slice.
  __device__ int first() const { return static_cast<int>(threadIdx.x) / kWarp * static_cast<int>(range_columns(cols)); }
  __device__ int end() const { return min(count, first() + static_cast<int>(range_columns(cols))); }
  // f(group, its first column) for this lane's.
  template <class F>
  __device__ void each_group(F&& f) const {
    for_each_group(logits, first(), end(), vectors, f);
  }
};

// The largest logit that is a number, along a lane's columns.
class Best {
 public:
  __device__ explicit Best(const Slice& slice) : place_(slice.first() + static_cast<int>(threadIdx.x) % kWarp * 4) {
    there_ = place_ < slice.end();
  }
  __device__ void add(const Group& x, int64_t column) {
#pragma unroll
    for (int i = 0; i < kGroupVectors; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (x[i].v[k] > most_) most_ = x[i].v[k], place_ = static_cast<int>(column) + i * kVectorStep + k;
  }
  __device__ uint64_t rank(const Slice& slice) const { return there_ ? ranked(most_, slice.begin + place_) : 0; }

 private:
  float most_ = -INFINITY;
  int place_;
  bool there_;
};

// Narrows `kept` to its smallest set of highest keys whose weight reaches `target`. weight(z) is 1 (top-k) or a mass (top-p); equal
// keys weigh the same. The whole of `kept` weighs at least `target`, which is at least 1.
template <class Weight>
__device__ void narrow(const Slice& slice, Kept& kept, uint64_t target, Weight weight, Meeting& meeting) {
  uint32_t base = 0;
  for (int shift = 30; shift >= 0; shift -= 3) {
    const int steps = shift == 30 ? 3 : 7;
    uint64_t sums[7] = {};
    slice.each([&](int t) {
      const float z = slice.scaled(t);
      const uint32_t key = key_of(z);
      if (key < base || !kept.has(key, t)) return;
      const uint64_t w = weight(z);
#pragma unroll
      for (int j = 0; j < 7; ++j) {
        if (j < steps && key - base >= static_cast<uint32_t>(j + 1) << shift) sums[j] += w;
      }
    });
    meeting.sum(sums);
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < 7; ++j) {
      if (j < steps && sums[j] >= target) best = static_cast<uint32_t>(j + 1);
    }
    base += best << shift;
  }
  // Of the tokens that equal the threshold, as many as the target still needs.
  uint64_t sums[2] = {}, each = 0;  // weight above, number of equal ones; weight of one of those
  slice.each([&](int t) {
    const float z = slice.scaled(t);
    const uint32_t key = key_of(z);
    if (key < base || !kept.has(key, t)) return;
    if (key > base) {
      sums[0] += weight(z);
    } else {
      ++sums[1];
      each = weight(z);
    }
  });
  meeting.sum(sums);
  each = meeting.max(each);
  const uint64_t needed = each == 0 ? sums[1] : (target - sums[0] + each - 1) / each;
  int last = base == kept.threshold ? kept.last : INT_MAX;
  if (needed < sums[1]) {
    int low = 0, high = slice.cols - 1;  // the smallest `last` with `needed` equal tokens up to it
    while (low < high) {
      const int middle = low + (high - low) / 2;
      uint64_t count = 0;
      slice.each([&](int t) {
        const uint32_t key = key_of(slice.scaled(t));
        count += t <= middle && key == base && kept.has(key, t) ? 1 : 0;
      });
      if (meeting.sum(count) >= needed) high = middle;
      else low = middle + 1;
    }
    last = low;
  }
  kept = {base, last};
}

// Words of marks in front of a slice, which they leave on 16 bytes.
__host__ __device__ constexpr int seen_words(int cols) { return static_cast<int>(ceil_div(slice_columns(cols), 128)) * 4; }

struct SampleArgs {
  float* logits;
  int64_t ld;
  int cols;
  bool vectors;  // rows are whole vectors of 16 bytes
  bool held;     // slices fit in shared memory
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

// One bit for each token of the slice, in shared memory.
struct Seen {
  uint32_t* bits;
  int words;
  __device__ void clear() const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) bits[i] = 0;
    __syncthreads();
  }
  // True for the one thread that marks the place first.
  __device__ bool mark(int place) const { return (atomicOr(&bits[place / 32], 1u << (place % 32)) >> (place % 32) & 1u) == 0; }
};

// A block changes its own tokens.
__device__ void apply_changes(const SampleArgs& a, const SampleRow& row, const Changes& changes, const Slice& slice, float* aside,
                              const Seen& seen) {
  const auto for_tokens = [&](const int32_t* tokens, int count, auto&& f) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      if (slice.has(tokens[i])) f(i, tokens[i], slice.at(tokens[i]));
    }
  };
  const auto mark = [&](int32_t token) { return seen.mark(token - slice.begin); };
  seen.clear();
  for (int64_t j = threadIdx.x; j < changes.count(); j += kThreads) {
    const int32_t token = changes.token(j);
    if (slice.has(token)) aside[j] = mark(token) ? slice.at(token) : NAN;  // NaN: another entry has it
  }
  __syncthreads();
  for_tokens(a.batch.bias_ids + row.bias_begin, row.bias_count,
             [&](int i, int32_t, float& x) { atomicAdd(&x, a.batch.bias_values[row.bias_begin + i]); });
  __syncthreads();
  for_tokens(a.batch.forbidden + row.forbidden_begin, row.forbidden_count, [](int, int32_t, float& x) { x = -INFINITY; });
  if (!changes.history) return;
  const int32_t* history = a.batch.history + row.history_begin;
  if (row.repetition_penalty != 1.0f) {
    seen.clear();
    for_tokens(history, row.prompt_length + row.output_length, [&](int, int32_t token, float& x) {
      if (mark(token)) x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    });
  }
  seen.clear();
  // Every occurrence subtracts the same number, so the order does not show; the presence penalty comes after all of them.
  const int32_t* output = history + row.prompt_length;
  for_tokens(output, row.output_length, [&](int, int32_t, float& x) { atomicAdd(&x, -row.frequency_penalty); });
  __syncthreads();
  for_tokens(output, row.output_length, [&](int, int32_t token, float& x) {
    if (mark(token)) x -= row.presence_penalty;
  });
}

// This block's slice of its row.
__device__ Slice load_slice(const SampleArgs& a, int64_t row, float* shared, uint64_t& arrival) {
  const auto cols = static_cast<int>(slice_columns(a.cols)),
             rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
  const int begin = min(a.cols, rank * cols), count = min(cols, a.cols - begin);
  float* logits = a.logits + row * a.ld + begin;
  if (!a.held) return {logits, begin, count, a.cols, a.vectors};
  if (a.vectors) {
    if (threadIdx.x == 0) {
      barrier_init(arrival, 1);
      barrier_init_fence();
      barrier_expect(arrival, static_cast<uint32_t>(count) * 4);
      if (count > 0) bulk_load(shared_address(shared), logits, static_cast<uint32_t>(count) * 4, arrival, kNoHint);
    }
    __syncthreads();
    barrier_wait(arrival, 0);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) shared[i] = logits[i];
    __syncthreads();
  }
  return {shared, begin, count, a.cols, a.vectors};
}

__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs a) {
  extern __shared__ __align__(16) uint32_t shared[];  // marks, then logits of the slice
  __shared__ Meeting::Words words;
  __shared__ uint64_t arrival;
  auto cluster = cooperative_groups::this_cluster();
  const int64_t index = blockIdx.x / kVocabularySlices;
  const SampleRow row = a.batch.rows[index];
  const Seen seen = {shared, seen_words(a.cols)};
  Meeting meeting(words);
  Slice slice = load_slice(a, index, reinterpret_cast<float*>(shared + seen.words), arrival);
  cluster.sync();  // every block of it is there and may be written to

  LaneSum part;
  Best largest(slice);
  slice.each_group([&](const Group& x, int64_t column) {
    part.add(x);
    largest.add(x, column);
  });
  uint64_t best = largest.rank(slice);
  const RowSum sum = meeting.sum(part.of_warp(), best);

  uint64_t limit = UINT64_MAX;
  for (int n = 0; n < row.top_logprobs && a.top_ids != nullptr; ++n) {
    uint64_t next = 0;
    slice.each([&](int t) {
      const uint64_t rank = ranked(slice.at(t), t);
      if (rank < limit) next = max(next, rank);
    });
    limit = meeting.max(next);
    if (cluster.thread_rank() == 0) {
      a.top_ids[index * a.ld_top_ids + n] = token_of(limit);
      a.top_logprobs[index * a.ld_top_logprobs + n] = sum.logprob(value_of(limit));
    }
  }

  const Changes changes = {row, a.batch,
                           row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f};
  float* aside = a.aside + index * a.entries;
  if (changes.count() > 0) {
    apply_changes(a, row, changes, slice, aside, seen);
    __syncthreads();
    Best changed(slice);
    slice.each_group([&](const Group& x, int64_t column) { changed.add(x, column); });
    best = meeting.max(changed.rank(slice));
  }
  if (row.temperature > 0) {
    slice.inverse_temperature = 1.0f / row.temperature;
    slice.top = value_of(best) * slice.inverse_temperature;
    Kept kept;
    if (row.min_p > 0) kept.threshold = min(key_of(slice.top + logf(row.min_p)), key_of(slice.top));
    if (row.top_k > 0 && row.top_k < a.cols) {
      uint64_t count = 0;
      slice.each([&](int t) { count += kept.has(key_of(slice.scaled(t)), t) ? 1 : 0; });
      if (meeting.sum(count) > static_cast<uint64_t>(row.top_k)) {
        narrow(slice, kept, static_cast<uint64_t>(row.top_k), [](float) { return uint64_t{1}; }, meeting);
      }
    }
    if (row.top_p < 1.0f) {
      uint64_t total = 0;
      slice.each([&](int t) {
        const float z = slice.scaled(t);
        total += kept.has(key_of(z), t) ? slice.mass(z) : 0;
      });
      total = meeting.sum(total);
      const uint64_t target =
          max(uint64_t{1}, static_cast<uint64_t>(ceil(static_cast<double>(row.top_p) * static_cast<double>(total))));
      narrow(slice, kept, min(target, total), [&](float z) { return slice.mass(z); }, meeting);
    }
    best = 0;
    slice.each([&](int t) {
      const float z = slice.scaled(t);
      if (!kept.has(key_of(z), t)) return;
      const float u = uniform01(philox(row.seed, static_cast<uint64_t>(row.index), static_cast<uint64_t>(t)).v[0]);
      best = max(best, ranked(z - logf(-logf(u)), t));
    });
    best = meeting.max(best);
  }

  // The block that has the token reports it.
  const int32_t token = token_of(best);
  if (!slice.has(token)) return;
  __shared__ float logit;
  if (threadIdx.x == 0) logit = slice.at(token);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < changes.count(); j += kThreads) {
    if (changes.token(j) == token && aside[j] == aside[j]) logit = aside[j];  // one entry at most
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    a.ids[index] = token;
    a.logprob[index] = sum.logprob(logit);
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
  bool often = false;  // logits are read more than twice
  for (int i = 0; i < batch.count; ++i) {
    const SampleRow& row = batch.host_rows[i];
    require(row.temperature >= 0, "[sample] row ", i, ": expected a temperature >= 0, got ", row.temperature);
    require(row.top_logprobs <= std::min(top_ids.data != nullptr ? top_ids.cols : 0, logits.cols) || row.top_logprobs == 0,
            "[sample] row ", i, ": expected top_logprobs of at most ", top_ids.data != nullptr ? top_ids.cols : 0, ", got ",
            row.top_logprobs);
    often = often || row.temperature > 0 || row.top_logprobs > 0;
    entries = std::max(entries, int64_t{row.bias_count} + row.forbidden_count + row.prompt_length + row.output_length);
  }
  device_.use();
  const int64_t columns = slice_columns(logits.cols);
  const bool held = often && columns <= kMostSliceColumns;
  const size_t shared = static_cast<size_t>(seen_words(static_cast<int>(logits.cols)) + (held ? columns : 0)) * 4;
  float* aside = static_cast<float*>(sample_scratch_.get(static_cast<size_t>(entries * batch.count + 1) * sizeof(float)));
  const SampleArgs args = {static_cast<float*>(logits.data),
                           logits.ld,
                           static_cast<int>(logits.cols),
                           rows_of_vectors(logits),
                           held,
                           batch,
                           ids,
                           logprob,
                           static_cast<int32_t*>(top_ids.data),
                           top_ids.ld,
                           static_cast<float*>(top_logprobs.data),
                           top_logprobs.ld,
                           aside,
                           entries};
  Launch{dim3(static_cast<unsigned>(batch.count * kVocabularySlices)), dim3(kThreads), shared, stream(), kVocabularySlices}(
      sample_kernel, args);
}

}  // namespace loquetier::cuda
