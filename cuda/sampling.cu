// Sampling: a cluster has a row, each of its blocks one slice of the logits, which is read a few times from the L2 (64 rows run at
// the same time).
//
// The kept set of min-p, top-k and top-p is always "every token above a threshold, and of those that equal it the ones with the
// lowest ids". In which bin of logits, from the largest down, the threshold lies is seen from few numbers: for top-k from the
// largest logit of each lane (where k of those are, at least k tokens are), for top-p from the probability mass of each bin. The
// tokens down to there are listed, and the threshold is narrowed among those of its bin, three bits a pass. Counts and masses are
// integers (fixed point): no sort, no atomics whose order matters, the same result whoever is in the batch. Where the tokens are
// more than the list takes, they are read from the logits again.
//
// Log-probabilities are of the logits as they came in. Tokens that bias, forbidden lists or penalties change are few, so their old
// values are put aside in scratch before the change.
//
// sampling_row.cuh has the row and its slices, sampling_keep.cuh top-k and top-p.
#include <algorithm>

#include "core/random.h"
#include "cuda_ops.h"
#include "sampling_keep.cuh"

namespace loquetier::cuda {

namespace {

using namespace sampling;

constexpr int kResidentBlocks = 5;  // of a processor: eight of a row find places beside each other only where some are to spare

// Gumbel-max: the kept token with the largest z - log(-log(u)), u of philox_of_tokens(), lower id on ties.
// -log(u) >= 1 - u, so a token can only win where 1 - u <= e^(z - value) of one that is there: most need no logarithms, and the
// improbable ones no random number (1 - u >= 2^-24). `likely` has the largest logit.
__device__ uint64_t draw(const Slice& slice, const SampleRow& row, const Kept& kept, const Chosen& chosen, int likely) {
  const auto uniform = [&](int token) { return uniform01(one_of(philox_of_tokens(row.seed, row.index, token).v, token % 4)); };
  const float rounding = 1e-3f + fabsf(slice.top) * 0x1p-21f;
  uint64_t best = 0;
  float to_beat = -INFINITY;
  const auto offer = [&](float z, float u, int token) {
    const uint64_t rank = ranked(z - logf(-logf(u)), token);
    if (rank <= best) return;
    best = rank;
    to_beat = value_of(best) - rounding;
  };
  offer(slice.top, uniform(likely), likely);
  if (chosen.complete) {
    chosen.each([&](float z, int t) {
      if (kept.has(z, t)) offer(z, uniform(t), t);
    });
    return best;
  }
  slice.each_four([&](const float (&z)[4], int token) {
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      open |= static_cast<unsigned>(z[i] - to_beat >= -17.0f) & static_cast<unsigned>(kept.has(z[i], token + i)) ? 1u << i : 0u;
    if (open == 0) return;
    const Philox4 words = philox_of_tokens(row.seed, row.index, token);
    float u[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u[i] = uniform01(words.v[i]);
      if (1.0f - u[i] > exp_below(fminf(z[i] - to_beat, 0.0f))) open &= ~(1u << i);
    }
    for (; open != 0; open &= open - 1) {
      const int i = __ffs(static_cast<int>(open)) - 1;
      offer(one_of(z, i), one_of(u, i), token + i);
    }
  });
  return best;
}

// Words of marks of a slice.
__host__ __device__ constexpr int seen_words(int cols) { return static_cast<int>(ceil_div(slice_columns(cols), 32)); }

struct SampleArgs {
  float* logits;
  int64_t ld;
  int cols;
  bool vectors;  // rows are whole vectors of 16 bytes
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
__device__ Slice slice_of(const SampleArgs& a, int64_t row) {
  const auto cols = static_cast<int>(slice_columns(a.cols)),
             rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
  const int begin = min(a.cols, rank * cols), count = min(cols, a.cols - begin);
  return {a.logits + row * a.ld + begin, begin, count, a.cols, a.vectors};
}

// The n largest logits to the outputs, largest first. `logit` is the largest of this lane.
__device__ void report_top(const SampleArgs& a, int64_t index, int n, const Slice& slice, float logit, const RowSum& sum,
                           Shared& shared, Meeting& meeting) {
  Chosen chosen(slice, shared.candidates, meeting);
  if (n <= kMostByLanes) {
    RowBins bins(shared);
    if (logit > -INFINITY) bins.add_count(slice.bin(logit));
    bins.add_up();
    if (bins.count() >= static_cast<uint64_t>(n)) chosen.choose({}, 0, 0, bins.reach(static_cast<uint64_t>(n), false).bin);
  }
  uint64_t limit = UINT64_MAX;
  for (int i = 0; i < n; ++i) {
    uint64_t next = 0;
    const auto offer = [&](float z, int t) {
      const uint64_t rank = ranked(z, t);
      if (rank < limit) next = max(next, rank);
    };
    if (chosen.complete) chosen.each(offer);
    else slice.each([&](int t) { offer(slice.at(t), t); });
    limit = meeting.max(next);
    if (cooperative_groups::this_cluster().thread_rank() == 0) {
      a.top_ids[index * a.ld_top_ids + i] = token_of(limit);
      a.top_logprobs[index * a.ld_top_logprobs + i] = sum.logprob(value_of(limit));
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResidentBlocks) sample_kernel(SampleArgs a) {
  extern __shared__ uint32_t marks[];
  __shared__ Shared shared;
  auto cluster = cooperative_groups::this_cluster();
  const int64_t index = blockIdx.x / kVocabularySlices;
  const SampleRow row = a.batch.rows[index];
  Meeting meeting(shared.words);
  Slice slice = slice_of(a, index);
  cluster.sync();  // every block of it is there and may be written to

  LaneSum part;
  Best largest(slice);
  slice.each_group([&](const Group& x, int64_t column) {
    part.add(x);
    largest.add(x, column);
  });
  uint64_t best = largest.rank(slice);
  const RowSum sum = meeting.sum(part.of_warp(), best);
  float logit = largest.logit();
  slice.top = value_of(best);
  if (row.top_logprobs > 0 && a.top_ids != nullptr) report_top(a, index, row.top_logprobs, slice, logit, sum, shared, meeting);

  const Changes changes = {row, a.batch,
                           row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f};
  float* aside = a.aside + index * a.entries;
  if (changes.count() > 0) {
    apply_changes(a, row, changes, slice, aside, {marks, seen_words(a.cols)});
    __syncthreads();
    Best changed(slice);
    slice.each_group([&](const Group& x, int64_t column) { changed.add(x, column); });
    best = meeting.max(changed.rank(slice));
    logit = changed.logit();
  }
  if (row.temperature >= kGreedyBelow && isfinite(value_of(best))) {
    slice.inverse_temperature = 1.0f / row.temperature;
    slice.top = value_of(best) * slice.inverse_temperature;
    Kept kept;
    if (row.min_p > 0) kept.threshold = fminf(slice.top + logf(row.min_p), slice.top);
    Chosen chosen(slice, shared.candidates, meeting);
    narrow(slice, row, logit, kept, chosen, shared, meeting);
    best = meeting.max(draw(slice, row, kept, chosen, token_of(best)));
  }

  // The block that has the token reports it.
  const int32_t token = token_of(best);
  if (!slice.has(token)) return;
  __shared__ float drawn;
  if (threadIdx.x == 0) drawn = slice.at(token);
  __syncthreads();
  for (int64_t j = threadIdx.x; j < changes.count(); j += kThreads) {
    if (changes.token(j) == token && aside[j] == aside[j]) drawn = aside[j];  // one entry at most
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    a.ids[index] = token;
    a.logprob[index] = sum.logprob(drawn);
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
  const size_t marks = static_cast<size_t>(seen_words(static_cast<int>(logits.cols))) * 4;
  float* aside = static_cast<float*>(sample_scratch_.get(static_cast<size_t>(entries * batch.count + 1) * sizeof(float)));
  const SampleArgs args = {static_cast<float*>(logits.data),
                           logits.ld,
                           static_cast<int>(logits.cols),
                           rows_of_vectors(logits),
                           batch,
                           ids,
                           logprob,
                           static_cast<int32_t*>(top_ids.data),
                           top_ids.ld,
                           static_cast<float*>(top_logprobs.data),
                           top_logprobs.ld,
                           aside,
                           entries};
  Launch{dim3(static_cast<unsigned>(batch.count * kVocabularySlices)), dim3(kThreads), marks, stream(), kVocabularySlices}(
      sample_kernel, args);
}

}  // namespace loquetier::cuda
