// Sampling, one row per item: log-probabilities and the most probable tokens of the model's own distribution, then bias, forbidden
// tokens and penalties, then greedy choice or Gumbel-max over the tokens that min-p, top-k and top-p keep.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/random.h"
#include "cpu/cpu_ops.h"
#include "cpu/loss.h"

namespace loquetier::cpu {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Candidate {
  float x;
  int32_t id;
};

// The order in which tokens are preferred: larger first, lower id first on ties.
bool before(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

// Keeps the n most preferred tokens of a row in `best`, most preferred first.
void find_best(const float* x, int64_t vocabulary, int64_t n, Candidate* best) {
  int64_t held = 0;
  for (int64_t id = 0; id < vocabulary; ++id) {
    if (held == n && !(x[id] > best[n - 1].x)) continue;
    if (held < n) ++held;
    int64_t at = held - 1;
    for (; at > 0 && x[id] > best[at - 1].x; --at) best[at] = best[at - 1];
    best[at] = {x[id], static_cast<int32_t>(id)};
  }
}

int32_t greedy(const Kernels& kernels, const float* x, int64_t vocabulary) {
  const float top = kernels.max(x, vocabulary);
  for (int64_t id = 0; id < vocabulary; ++id)
    if (x[id] == top) return static_cast<int32_t>(id);
  return 0;  // no number in the row: its log-probability is NaN and says so
}

void apply_penalties(const SampleRow& row, const int32_t* history, int64_t vocabulary, float* x, int32_t* counts) {
  if (row.repetition_penalty == 1 && row.presence_penalty == 0 && row.frequency_penalty == 0) return;
  std::fill(counts, counts + vocabulary, -1);  // -1: not seen; else how often in the output
  for (int32_t i = 0; i < row.prompt_length; ++i) counts[history[i]] = 0;
  for (int32_t i = row.prompt_length; i < row.prompt_length + row.output_length; ++i)
    counts[history[i]] = std::max(counts[history[i]], 0) + 1;
  for (int32_t i = 0; i < row.prompt_length + row.output_length; ++i) {
    const int32_t id = history[i];
    if (counts[id] < 0) continue;  // done already
    x[id] = x[id] > 0 ? x[id] / row.repetition_penalty : x[id] * row.repetition_penalty;
    if (counts[id] > 0) x[id] -= row.frequency_penalty * static_cast<float>(counts[id]) + row.presence_penalty;
    counts[id] = -1;
  }
}

// Gumbel-max: the kept token with the largest x - log(-log(u)), u of philox_of_tokens(), lower id on ties.
// A token can only win when 1 - u <= exp(x - best), because -log(u) >= 1 - u: so most need no logarithm, and the improbable
// ones no random number (1 - u >= 2^-24).
class GumbelChoice {
 public:
  explicit GumbelChoice(const SampleRow& row) : seed_(row.seed), index_(row.index) {}
  // bound >= exp(x - value of some token offered before), or any number >= 1.
  void offer(float x, int32_t id, float bound) {
    if (bound < 0x1p-25f) return;
    if (id / 4 != four_) words_ = philox_of_tokens(seed_, index_, id);
    four_ = id / 4;
    const float u = uniform01(words_.v[id % 4]);
    if (1.0f - u > bound * 1.001f) return;
    const float value = x - std::log(-std::log(u));
    if (id_ < 0 || value > value_ || (value == value_ && id < id_)) {
      value_ = value;
      id_ = id;
    }
  }
  void offer(float x, int32_t id) { offer(x, id, id_ < 0 ? 1.0f : std::exp(std::min(x - value_, 0.0f))); }
  float value() const { return value_; }
  int32_t id() const { return id_; }

 private:
  uint64_t seed_;
  int64_t index_;
  Philox4 words_ = {};  // of tokens 4 four_ to 4 four_ + 3
  int32_t four_ = -1;
  float value_ = 0;
  int32_t id_ = -1;
};

int32_t draw_from_all(const Kernels& kernels, const SampleRow& row, const float* x, int64_t vocabulary) {
  const int32_t top = greedy(kernels, x, vocabulary);
  GumbelChoice choice(row);
  choice.offer(x[top], top, 1.0f);
  const float best = choice.value();
  constexpr int64_t kBlock = 256;
  float bound[kBlock];
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t n = std::min(kBlock, vocabulary - begin);
    kernels.exp_sum(x + begin, n, best, bound);
    for (int64_t i = 0; i < n; ++i)
      if (x[begin + i] > kMinusInfinity && begin + i != top) choice.offer(x[begin + i], static_cast<int32_t>(begin + i), bound[i]);
  }
  return choice.id();
}

// Moves the nucleus to the front: the fewest of the n > 0 candidates, most preferred first, whose mass e^(x - top) reaches `p` of
// that of all, and at least one. Returns how many they are. Only those of the bin of logits in which its end lies are sorted.
int64_t nucleus(Candidate* candidates, int64_t n, float top, float p) {
  constexpr int kBins = 256;  // an eighth wide; the last one has what is further below
  const auto bin = [&](const Candidate& c) { return static_cast<int>(std::min((top - c.x) * 8, kBins - 0.5f)); };
  const auto mass = [&](const Candidate& c) { return std::exp(static_cast<double>(c.x) - static_cast<double>(top)); };
  double masses[kBins] = {};
  for (int64_t i = 0; i < n; ++i) masses[bin(candidates[i])] += mass(candidates[i]);
  double target = static_cast<double>(p) * std::accumulate(masses, masses + kBins, 0.0);
  int last = 0;
  while (last + 1 < kBins && masses[last] < target) target -= masses[last++];
  Candidate* to = std::partition(candidates, candidates + n, [&](const Candidate& c) { return bin(c) < last; });
  Candidate* const end = std::partition(to, candidates + n, [&](const Candidate& c) { return bin(c) == last; });
  std::sort(to, end, before);
  for (; to < end && (target > 0 || to == candidates); ++to) target -= mass(*to);
  return to - candidates;
}

// x holds logits over temperature.
int32_t draw(const Kernels& kernels, const SampleRow& row, const float* x, int64_t vocabulary, Candidate* kept) {
  const bool min_p = row.min_p > 0, top_k = row.top_k > 0 && row.top_k < vocabulary, top_p = row.top_p < 1;
  const float top = kernels.max(x, vocabulary);
  if (!(top > kMinusInfinity) || !std::isfinite(top)) return greedy(kernels, x, vocabulary);
  if (!min_p && !top_k && !top_p) return draw_from_all(kernels, row, x, vocabulary);

  const float lowest = min_p ? top + std::log(row.min_p) : kMinusInfinity;
  int64_t n = 0;
  for (int64_t id = 0; id < vocabulary; ++id)
    if (x[id] > kMinusInfinity && (x[id] >= lowest || x[id] == top)) kept[n++] = {x[id], static_cast<int32_t>(id)};
  if (top_k && row.top_k < n) {
    std::nth_element(kept, kept + row.top_k, kept + n, before);
    n = row.top_k;
  }
  if (top_p) n = nucleus(kept, n, top, row.top_p);
  GumbelChoice choice(row);
  for (int64_t i = 0; i < n; ++i) choice.offer(kept[i].x, kept[i].id);
  return choice.id();
}

}  // namespace

void CpuOps::sample(TensorView logits, const SampleBatch& batch, int32_t* ids, float* logprob, TensorView top_ids,
                    TensorView top_logprobs) {
  const int64_t vocabulary = logits.cols;
  check_matrix("sample", "logits", logits, batch.count, -1);
  const bool tops = top_ids.data != nullptr;
  if (tops) {
    check_matrix("sample", "top_ids", top_ids, batch.count, -1, DType::i32);
    check_matrix("sample", "top_logprobs", top_logprobs, batch.count, top_ids.cols);
  }
  require(batch.count == 0 || vocabulary > 0, "[sample] logits: expected at least 1 column, got 0");
  const auto check_ids = [&](const char* name, int64_t row, const int32_t* list, int64_t begin, int64_t n) {
    for (int64_t i = begin; i < begin + n; ++i)
      require(list[i] >= 0 && list[i] < vocabulary, "[sample] ", name, " of row ", row, ": expected 0 to ", vocabulary - 1,
              ", got ", list[i]);
  };
  for (int64_t i = 0; i < batch.count; ++i) {
    const SampleRow& row = batch.host_rows[i];
    require(row.top_logprobs >= 0 &&
                (row.top_logprobs == 0 || (tops && row.top_logprobs <= top_ids.cols && row.top_logprobs <= vocabulary)),
            "[sample] top_logprobs of row ", i, ": expected at most ", tops ? std::min(top_ids.cols, vocabulary) : 0, ", got ",
            row.top_logprobs);
    require(row.temperature >= 0, "[sample] temperature of row ", i, ": expected 0 or more, got ", row.temperature);
    check_ids("bias_ids", i, batch.bias_ids, row.bias_begin, row.bias_count);
    check_ids("forbidden", i, batch.forbidden, row.forbidden_begin, row.forbidden_count);
    if (row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0)
      check_ids("history", i, batch.history, row.history_begin, int64_t{row.prompt_length} + row.output_length);
  }
  const size_t bytes = Workspaces::size_for<Candidate>(vocabulary) + Workspaces::size_for<int32_t>(vocabulary) +
                       Workspaces::size_for<float>(vocabulary);
  parallel(batch.count, 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, bytes);
    Candidate* candidates = workspace.take<Candidate>(vocabulary);
    int32_t* counts = workspace.take<int32_t>(vocabulary);
    float* adjusted = workspace.take<float>(vocabulary);
    for (int64_t i = begin; i < end; ++i) {
      const SampleRow& row = batch.host_rows[i];
      float* x = static_cast<float*>(logits.at(i));
      const double partition = log_partition(kernels_, x, vocabulary);
      if (row.top_logprobs > 0) {
        find_best(x, vocabulary, row.top_logprobs, candidates);
        for (int32_t j = 0; j < row.top_logprobs; ++j) {
          *static_cast<int32_t*>(top_ids.at(i, j)) = candidates[j].id;
          *static_cast<float*>(top_logprobs.at(i, j)) = log_probability(candidates[j].x, partition);
        }
      }
      std::copy(x, x + vocabulary, adjusted);  // the log-probability is that of the logits as they came
      for (int32_t j = row.bias_begin; j < row.bias_begin + row.bias_count; ++j)
        adjusted[batch.bias_ids[j]] += batch.bias_values[j];
      for (int32_t j = row.forbidden_begin; j < row.forbidden_begin + row.forbidden_count; ++j)
        adjusted[batch.forbidden[j]] = kMinusInfinity;
      apply_penalties(row, batch.history + row.history_begin, vocabulary, adjusted, counts);
      int32_t id;
      if (row.temperature < kGreedyBelow) {
        id = greedy(kernels_, adjusted, vocabulary);
      } else {
        if (row.temperature != 1) kernels_.scale(1.0f / row.temperature, adjusted, adjusted, vocabulary);
        id = draw(kernels_, row, adjusted, vocabulary, candidates);
      }
      ids[i] = id;
      logprob[i] = log_probability(x[id], partition);
    }
  });
}

}  // namespace loquetier::cpu
