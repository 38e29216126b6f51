// What top-k and top-p keep of a row (sampling.cu): bins of logits, the tokens down to the bin in which the threshold lies, and the
// threshold among those.
#pragma once

#include "async.cuh"
#include "ops/ops.h"
#include "sampling_row.cuh"

namespace loquetier::cuda::sampling {

constexpr int kMostCandidates = 3072;                 // of a block
constexpr int kFew = 512;                             // of a row
constexpr int kMostByLanes = kVocabularyThreads / 2;  // k that may be found from the lanes' largest logits

// Tokens by their bin, of a slice.
struct Bins {
  uint32_t counts[kBins];
  uint32_t low[kBins], high[kBins];  // halves of the mass
};

// A bin, and what the bins in front of it have.
struct Edge {
  int bin;
  uint64_t count, mass;
};

struct Token {
  float z;  // scaled logit
  int id;
};

// The tokens of some bins that are still in.
struct Candidates {
  int listed;  // how many there are, also where the list does not take them
  Token list[kMostCandidates];
};

// All tokens of a row among which the threshold lies, if they are few, with their weights.
struct Few {
  Token tokens[kFew];
  uint64_t weights[kFew];
};

// What the blocks of a row share.
struct Shared {
  Meeting::Words words;
  Bins bins;
  Edge edge;
  uint64_t of_warp[2][kSliceWarps];
  Candidates candidates;
  Few few;
};

// atomicAdd() or 0, without a branch.
__device__ inline uint32_t add_where(bool really, uint32_t* to, uint32_t x) {
  uint32_t before;
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %3, 0;\n mov.u32 %0, 0;\n @p atom.shared.add.u32 %0, [%1], %2;\n}"
               : "=r"(before)
               : "r"(shared_address(to)), "r"(x), "r"(static_cast<uint32_t>(really))
               : "memory");
  return before;
}

// How many tokens a row's bins have, and which mass: a thread knows two of them.
class RowBins {
 public:
  __device__ explicit RowBins(Shared& shared) : shared_(shared) {
    cooperative_groups::this_cluster().sync();  // nobody reads those of the one before
    Bins& bins = shared.bins;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins.counts[i] = bins.low[i] = bins.high[i] = 0;
    __syncthreads();
  }
  // Of this thread's tokens, before add_up(): one in its bin, or four with their masses where these are not zero.
  __device__ void add_count(int bin) { atomicAdd(&shared_.bins.counts[bin], 1u); }
  __device__ void add_masses(const int (&bin)[4], const uint64_t (&mass)[4]) {
    uint32_t before[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) before[i] = add_where(mass[i] != 0, &shared_.bins.low[bin[i]], static_cast<uint32_t>(mass[i]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto low = static_cast<uint32_t>(mass[i]);
      const uint32_t high = static_cast<uint32_t>(mass[i] >> 32) + (before[i] + low < low ? 1 : 0);
      add_where(high != 0, &shared_.bins.high[bin[i]], high);
    }
  }
  // All threads together; then what follows is known.
  __device__ void add_up() {
    auto cluster = cooperative_groups::this_cluster();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    cluster.sync();
#pragma unroll
    for (unsigned rank = 0; rank < kVocabularySlices; ++rank) {
      const Bins& there = *cluster.map_shared_rank(&shared_.bins, rank);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int bin = 2 * thread + i;
        own_[i].add({there.counts[bin], (uint64_t{there.high[bin]} << 32) + there.low[bin]});
      }
    }
    Weights sum = own_[0];
    sum.add(own_[1]);
    const Weights both = sum;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const Weights other = {__shfl_up_sync(0xffffffffu, sum.count, offset), __shfl_up_sync(0xffffffffu, sum.mass, offset)};
      if (lane >= offset) sum.add(other);
    }
    if (lane == kWarp - 1) shared_.of_warp[0][warp] = sum.count, shared_.of_warp[1][warp] = sum.mass;
    __syncthreads();
    before_ = {sum.count - both.count, sum.mass - both.mass};
    for (int w = 0; w < kSliceWarps; ++w) {
      const Weights of = {shared_.of_warp[0][w], shared_.of_warp[1][w]};
      if (w < warp) before_.add(of);
      all_.add(of);
    }
  }
  __device__ uint64_t count() const { return all_.count; }
  __device__ uint64_t mass() const { return all_.mass; }
  // The bin in which the count, or the mass, reaches a target between 1 and that of all.
  __device__ Edge reach(uint64_t target, bool masses) const {
    Weights before = before_;
    __syncthreads();  // nobody reads the edge before
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t in_front = masses ? before.mass : before.count, here = masses ? own_[i].mass : own_[i].count;
      if (in_front < target && target <= in_front + here)
        shared_.edge = {2 * static_cast<int>(threadIdx.x) + i, before.count, before.mass};
      before.add(own_[i]);
    }
    __syncthreads();
    return shared_.edge;
  }

 private:
  struct Weights {
    uint64_t count = 0, mass = 0;
    __device__ void add(const Weights& w) { count += w.count, mass += w.mass; }
  };

  Shared& shared_;
  Weights own_[2], before_, all_;
};

// Tokens that were still in, of the bins from the first one on.
class Chosen {
 public:
  __device__ Chosen(const Slice& slice, Candidates& candidates, Meeting& meeting)
      : slice_(slice), candidates_(candidates), meeting_(meeting) {}
  // Those of `kept` in the bins `first` to `last`. The threshold lies in one of `narrow` to `last`.
  __device__ void choose(const Kept& kept, int first, int narrow, int last) {
    kept_ = kept;
    first_ = static_cast<float>(first);
    end_ = static_cast<float>(last + 1);
    __syncthreads();  // nobody reads the list before
    if (threadIdx.x == 0) candidates_.listed = 0;
    __syncthreads();
    uint64_t most[3] = {};  // of a key, of a key's complement, of a list
    slice_.each_four([&](const float (&z)[4], int token) {
      unsigned in = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) in |= has(z[i], token + i) ? 1u << i : 0u;
      for (; in != 0; in &= in - 1) {
        const int i = __ffs(static_cast<int>(in)) - 1;
        const float own = one_of(z, i);
        const int place = atomicAdd(&candidates_.listed, 1);
        if (place < kMostCandidates) candidates_.list[place] = {own, token + i};
        if (slice_.bin(own) < narrow) continue;
        const uint32_t key = key_of(own);
        most[0] = max(most[0], uint64_t{key});
        most[1] = max(most[1], uint64_t{~key});
      }
    });
    __syncthreads();
    most[2] = static_cast<uint64_t>(candidates_.listed);
    meeting_.max(most);
    highest = static_cast<uint32_t>(most[0]);
    lowest = ~static_cast<uint32_t>(most[1]);
    fits = most[2] <= kMostCandidates;
    complete = fits && first == 0;
  }
  // f(scaled logit, token) for this thread's.
  template <class F>
  __device__ void each(F&& f) const {
    if (fits) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < candidates_.listed; i += kThreads) {
        const Token token = candidates_.list[i];
        f(token.z, token.id);
      }
    } else {
      slice_.each_four([&](const float (&z)[4], int token) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (has(z[i], token + i)) f(z[i], token + i);
      });
    }
  }
  // Those of all blocks to `few`, in the same order in each; what `kept` does not have between lowest and highest weighs nothing.
  // How many they are, or more than `few` takes, and then nothing else. For all threads.
  template <class Weight>
  __device__ int gather(const Kept& kept, Weight weight, Few& few) const {
    if (!fits) return kFew + 1;
    auto cluster = cooperative_groups::this_cluster();
    int listed = 0;
    for (unsigned rank = 0; rank < kVocabularySlices; ++rank) listed += cluster.map_shared_rank(&candidates_, rank)->listed;
    if (listed > kFew) return listed;
    int begin = 0;
#pragma unroll 1
    for (unsigned rank = 0; rank < kVocabularySlices; ++rank) {
      const Candidates& there = *cluster.map_shared_rank(&candidates_, rank);
      for (int i = static_cast<int>(threadIdx.x); i < there.listed; i += kThreads) {
        const Token token = there.list[i];
        const uint32_t key = key_of(token.z);
        few.tokens[begin + i] = token;
        few.weights[begin + i] = key >= lowest && key <= highest && kept.has(token.z, token.id) ? weight(token.z) : 0;
      }
      begin += there.listed;
    }
    __syncthreads();
    return listed;
  }

  uint32_t lowest = 0, highest = 0;  // keys of those among which the threshold lies
  bool fits = false;                 // the lists of all blocks
  bool complete = false;             // and no other token is still in

 private:
  __device__ bool has(float z, int token) const {
    const float depth = slice_.depth(z);
    return (static_cast<int>(depth >= first_) & static_cast<int>(depth < end_) & static_cast<int>(kept_.has(z, token))) != 0;
  }

  const Slice& slice_;
  Candidates& candidates_;
  Meeting& meeting_;
  Kept kept_;
  float first_ = 0, end_ = 0;  // depths
};

// Narrows `kept` to the smallest set of highest keys whose weight, of those between chosen.lowest and chosen.highest, reaches
// `target`: at least 1, and at most what those of them that are kept weigh. A token weighs its mass, or 1; equal keys weigh the
// same.
__device__ inline void narrow(const Slice& slice, const Chosen& chosen, Kept& kept, uint64_t target, bool masses, Few& few,
                              Meeting& meeting) {
  const auto weight = [&](float z) { return masses ? slice.mass(z) : uint64_t{1}; };
  const int count = chosen.gather(kept, weight, few);
  if (count <= kFew) {  // each thread of the cluster weighs what comes before one of them
    const auto own = static_cast<int>(cooperative_groups::this_cluster().thread_rank());
    uint64_t last = 0;
    if (own < count) {
      const Token token = few.tokens[own];
      uint64_t before = 0;
      for (int i = 0; i < count; ++i) {
        const Token other = few.tokens[i];
        const bool first = other.z > token.z || (other.z == token.z && other.id < token.id);
        before += first ? few.weights[i] : 0;
      }
      if (before < target && target <= before + few.weights[own]) last = ranked(token.z, token.id);
    }
    last = meeting.max(last);
    kept = {value_of(last), token_of(last)};
    return;
  }
  uint32_t base = chosen.lowest;
  const uint32_t span = chosen.highest - base;
  for (int shift = span == 0 ? -1 : (31 - __clz(static_cast<int>(span))) / 3 * 3; shift >= 0; shift -= 3) {
    const int steps = shift == 30 ? 3 : 7;
    uint64_t sums[7] = {};
    chosen.each([&](float z, int t) {
      const uint32_t key = key_of(z);
      if (key < base || key > chosen.highest || !kept.has(z, t)) return;
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
  const float threshold = float_of(base);
  uint64_t sums[2] = {}, each = 0;  // weight above, number of equal ones; weight of one of those
  chosen.each([&](float z, int t) {
    const uint32_t key = key_of(z);
    if (key < base || key > chosen.highest || !kept.has(z, t)) return;
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
  int last = threshold == kept.threshold ? kept.last : INT_MAX;
  if (needed < sums[1]) {
    int low = 0, high = slice.cols - 1;  // the smallest `last` with `needed` equal tokens up to it
    while (low < high) {
      const int middle = low + (high - low) / 2;
      uint64_t count_to = 0;
      chosen.each([&](float z, int t) { count_to += t <= middle && z == threshold && kept.has(z, t) ? 1 : 0; });
      if (meeting.sum(count_to) >= needed) high = middle;
      else low = middle + 1;
    }
    last = low;
  }
  kept = {threshold, last};
}

// What top-k and then top-p leave of `kept`. `logit` is the largest of this lane.
__device__ inline void narrow(const Slice& slice, const SampleRow& row, float logit, Kept& kept, Chosen& chosen, Shared& shared,
                              Meeting& meeting) {
  const auto target_of = [&](uint64_t mass) {
    const auto part = static_cast<uint64_t>(ceil(static_cast<double>(row.top_p) * static_cast<double>(mass)));
    return min(max(uint64_t{1}, part), mass);
  };
#pragma unroll 1
  for (const bool masses : {false, true}) {
    if (masses ? row.top_p >= 1.0f : row.top_k <= 0 || row.top_k >= slice.cols) continue;
    auto target = static_cast<uint64_t>(row.top_k);
    bool found = false;
    if (masses && chosen.complete) {
      uint64_t mass = 0;
      chosen.each([&](float z, int t) { mass += kept.has(z, t) ? slice.mass(z) : 0; });
      target = target_of(meeting.sum(mass));
      chosen.highest = key_of(slice.top);
      found = true;
    } else if (!masses && row.top_k <= kMostByLanes) {
      RowBins bins(shared);
      const float z = logit * slice.inverse_temperature;
      if (kept.has(z, 0)) bins.add_count(slice.bin(z));
      bins.add_up();
      const int last = bins.count() < target ? kBins - 1 : bins.reach(target, false).bin;
      if (last < kBins - 1) {
        chosen.choose(kept, 0, 0, last);
        found = chosen.fits;
      }
    }
    if (!found) {
      RowBins bins(shared);
      if (masses) {
        slice.each_four([&](const float (&z)[4], int token) {
          int bin[4];
          uint64_t mass[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            bin[i] = slice.bin(z[i]);
            mass[i] = slice.mass(z[i]);
            if (!kept.has(z[i], token + i)) mass[i] = 0;
          }
          bins.add_masses(bin, mass);
        });
      } else {
        slice.each_four([&](const float (&z)[4], int token) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (kept.has(z[i], token + i)) bins.add_count(slice.bin(z[i]));
        });
      }
      bins.add_up();
      if (masses) target = target_of(bins.mass());
      else if (bins.count() <= target) continue;
      const Edge edge = bins.reach(target, masses);
      if (edge.bin == kBins - 1) continue;  // by their count: those have no mass, nor can they be drawn
      target -= masses ? edge.mass : edge.count;
#pragma unroll 1
      for (const int first : {0, edge.bin}) {
        chosen.choose(kept, first, edge.bin, edge.bin);
        if (chosen.fits) break;
      }
    }
    narrow(slice, chosen, kept, target, masses, shared.few, meeting);
  }
}

}  // namespace loquetier::cuda::sampling
