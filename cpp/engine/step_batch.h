// From a plan to what the model runs on: every array of one step, packed into one upload, and where each result comes back.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/blob.h"
#include "engine/decode_graph.h"
#include "engine/micro_batch.h"
#include "engine/records.h"
#include "model/model.h"
#include "plan/planner.h"

namespace loquetier {

using AdapterTable = std::unordered_map<AdapterId, AdapterPtr>;
using RequestTable = std::unordered_map<int64_t, Request>;
using JobTable = std::unordered_map<int64_t, Job>;
using WeightTableOfStep = std::map<std::pair<AdapterId, int64_t>, std::shared_ptr<AdapterWeights>>;  // (adapter, version)

struct StepContext {
  const ModelConfig& config;
  const Planner& planner;
  const AdapterTable& adapters;
  const RequestTable& requests;
  const JobTable& jobs;
  const WeightTableOfStep& weights;  // of every plan.adapters entry, resident
  int32_t page_size = 0;
  const MicroBatch* micro = nullptr;  // of training segments
  int32_t max_rank = 0;               // of one projection
  int32_t head_chunk = kHeadSlice;    // rows of a vocabulary product with a loss
  int32_t most_graph_rows = 0;        // steps of decodes alone up to this bucket are laid out for a graph; 0: none
  // Beside the plan's segments, or empty: where on the device the step under way leaves the segment's last token, which is not
  // known yet, or null.
  std::span<const int32_t* const> awaited = {};
};

// Whether its tokens depend on all of those before, and not on the last one alone.
bool reads_history(const SamplingParams& sampling);

// Which segment a head row belongs to, and which of its targets (train, eval) or prompt positions (prefill).
struct HeadRef {
  int32_t segment = 0;
  int32_t index = 0;
};

// The tables of a step of decodes on the host, to be written on for the next step of the same ones.
struct DecodeTables {
  uint64_t filling = 0;  // of the blob that they lie in
  int32_t* positions = nullptr;
  int32_t* slots = nullptr;
  int32_t* kv_len = nullptr;
  int32_t* page_table = nullptr;
  SampleRow* sampling = nullptr;
  const int32_t** awaited = nullptr;
};

struct StepBatch {
  BatchView view;
  std::optional<DecodeShape> decode;  // the layout, when it is by buckets
  AwaitedIds awaited;                 // with `decode`
  DecodeTables tables;
  bool plain = false;  // with `decode`: tokens are sampled from logits alone (no words, no log-probabilities of others, no adapter
                       // there), and nothing else has results
  std::vector<std::shared_ptr<AdapterWeights>> weights;  // of the plan's adapters, with `decode`
  bool reads_history = false;                            // the sampling of some row depends on all tokens before
  std::vector<HeadRef> heads;                            // [view.head_count]
  int64_t largest_chunk = 0;                             // rows of the largest of view.chunks
  int32_t sample_begin = 0;                              // first head row that samples
  int32_t first_loss = 0;            // first head row whose loss is still to be taken: those before were in an earlier step
  std::vector<int64_t> update_jobs;  // jobs of plan.completed_jobs that end with an optimizer step, in order
  AdamBatch updates;                 // one AdamJob per entry of update_jobs
  Both<float> logprob;               // [head_count]
  Both<float> loss;                  // [head_count]
  Both<int32_t> sampled;             // [head_count]
  Both<int32_t> top_ids;             // [samples, top_columns]
  Both<float> top_logprobs;
  int32_t top_columns = 0;
  Both<float> norms;  // [update_jobs]
};

// How much of everything a step has; what its tables take is a function of that, so that they can be reserved by their maxima.
struct BatchCounts {
  size_t rows = 0;
  size_t segments = 0;
  size_t paged = 0;  // segments with pages
  size_t pages = 0;  // most of one of them
  size_t heads = 0;
  size_t samples = 0;
  size_t words = 0;  // int32 of sampling: histories, biases, forbidden tokens
  size_t adam_tensors = 0, adam_jobs = 0;
  size_t top_columns = 0;
};
size_t metadata_bytes(const BatchCounts& counts);
size_t results_bytes(const BatchCounts& counts);
// The most that steps have, but for the words: long histories under penalties and large bias maps may need more than is foreseen.
BatchCounts most_counts(int64_t rows, int64_t sequences, int64_t pages, int64_t train_rows);

// Fills `in` (metadata, not yet uploaded) and carves `out` (results).
StepBatch build_step(const Plan& plan, const StepContext& context, Blob& in, Blob& out);
// The same for `next`, planned behind `plan` whose step is under way, when it has the very decodes of that one with a token more
// each: most of the tables stay as they are. False, and they have to be built, when it has not, or when they are not in `in` any
// more.
bool advance_step(const Plan& plan, const StepBatch& batch, const Plan& next, const Planner& planner, int32_t page_size, Blob& in,
                  Blob& out, StepBatch& step);

}  // namespace loquetier
