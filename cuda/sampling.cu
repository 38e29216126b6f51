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
#include <cooperative_groups.h>

#include <algorithm>
#include <climits>

#include "async.cuh"
#include "common.cuh"
#include "core/random.h"
#include "cuda_ops.h"
#include "vocabulary.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = kSliceThreads;  // of a block
constexpr float kMassUnit = 0x1p40f;     // 2^23 tokens of mass 1 still fit 64 bits

// Order-preserving: larger float, larger key. NaN counts as the smallest.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // the two zeros are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float float_of(uint32_t key) {
  if (key == 0) return NAN;
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Largest value first, lowest token on ties, as one integer to maximise.
__device__ inline uint64_t ranked(float x, int token) {
  return uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ inline int32_t token_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }
__device__ inline float value_of(uint64_t rank) { return float_of(static_cast<uint32_t>(rank >> 32)); }

// What the warps of a row tell each other: words of each, in shared memory of every block.
class Meeting {
 public:
  static constexpr int kMostWords = 7;
  struct Words {
    uint64_t of[2][kMostWords][kVocabularyWarps];
  };

  __device__ explicit Meeting(Words& words) : words_(words) {}
  template <int kCount>
  __device__ void max(uint64_t (&x)[kCount]) {
    for (uint64_t& v : x) v = warp_max(v);
    const auto* all = exchange(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = warp_max(all[i][threadIdx.x % kWarp]);
  }
  __device__ uint64_t max(uint64_t x) {
    uint64_t one[1] = {x};
    max(one);
    return one[0];
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

// The tokens still in: above the threshold, or at it and not after `last`.
struct Kept {
  float threshold = -FLT_MAX;  // so not those of -infinity
  int last = INT_MAX;
  __device__ bool has(float z, int token) const {  // without branches
    return (static_cast<int>(z > threshold) | (static_cast<int>(z == threshold) & static_cast<int>(token <= last))) != 0;
  }
};

constexpr int kResidentBlocks = 5;     // of a processor: eight of a row find places beside each other only where some are to spare
constexpr int kBins = 2 * kThreads;    // the last one has what is further below
constexpr float kBinsOfUnit = 8;       // from the largest logit down
constexpr int kMostCandidates = 3072;  // of a block
constexpr int kFew = 512;              // of a row
constexpr int kMostByLanes = kVocabularyThreads / 2;  // k that may be found from the lanes' largest logits

// x[i], x in registers.
template <class V>
__device__ inline V one_of(const V (&x)[4], int i) {
  return i < 2 ? i == 0 ? x[0] : x[1] : i == 2 ? x[2] : x[3];
}

// The tokens of a block: [begin, begin + count) of the row.
struct Slice {
  float* logits;
  int begin, count, cols;
  bool vectors;
  float inverse_temperature = 1;
  float top = 0;  // largest scaled logit of the row

  __device__ bool has(int token) const { return token >= begin && token - begin < count; }
  __device__ float& at(int token) const { return logits[token - begin]; }
  __device__ uint64_t mass(float z) const { return __float2ull_rz(exp_below(z - top) * kMassUnit); }
  // In bins.
  __device__ float depth(float z) const { return fminf((top - z) * kBinsOfUnit, kBins - 0.5f); }
  __device__ int bin(float z) const { return __float2int_rz(depth(z)); }
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
  // f(four scaled logits, token of the first) for this lane's; -infinity past the end.
  template <class F>
  __device__ void each_four(F&& f) const {
    const int last = end();
    int c = first() + static_cast<int>(threadIdx.x) % kWarp * 4;
    Pack<float, 4> next = load_columns(c, last);
#pragma unroll 1
    for (; c < last; c += kVectorStep) {
      Pack<float, 4> x = next;
      next = load_columns(c + kVectorStep, last);
#pragma unroll
      for (float& z : x.v) z *= inverse_temperature;
      f(x.v, begin + c);
    }
  }

 private:
  __device__ Pack<float, 4> load_columns(int c, int last) const {
    if (vectors && c < last) return load_pack<float, 4>(logits + c);
    Pack<float, 4> x;
#pragma unroll
    for (int k = 0; k < 4; ++k) x.v[k] = c + k < last ? logits[c + k] : -INFINITY;
    return x;
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
  __device__ float logit() const { return most_; }
  __device__ uint64_t rank(const Slice& slice) const { return there_ ? ranked(most_, slice.begin + place_) : 0; }

 private:
  float most_ = -INFINITY;
  int place_;
  bool there_;
};

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
__device__ void narrow(const Slice& slice, const Chosen& chosen, Kept& kept, uint64_t target, bool masses, Few& few,
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
__device__ void narrow(const Slice& slice, const SampleRow& row, float logit, Kept& kept, Chosen& chosen, Shared& shared,
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
