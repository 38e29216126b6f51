// Builds a BatchView from a list of sequences, for tests on a host-addressable backend ("device" arrays are host vectors it owns).
// Sequences come in the order of a batch: train, eval, prefill, decode. Neighbours with the same adapter and dropout become one
// group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "adapter/adapter.h"
#include "adapter/train_state.h"
#include "core/random.h"
#include "model/model.h"
#include "plan/batch.h"

namespace loquetier::test {

struct TestSequence {
  Kind kind = Kind::train;
  std::vector<int32_t> ids = {};                          // of its rows in this batch
  int32_t position = 0;                                   // of the first row; before it: already in the pages
  std::vector<int32_t> pages = {};                        // prefill, decode
  const AdapterWeights* weights = nullptr;                // null: base model
  const TrainState* train = nullptr;                      // kind train
  float dropout = 0;                                      // kind train
  uint64_t key = 0;                                       // of the dropout masks: row key = mix_key(key, position)
  std::vector<std::pair<int32_t, LossRow>> targets = {};  // row of the segment -> target; train: trained, else log-probability only
  bool sample = false;                                    // of the last row
  SampleRow sampling = {};
};

class BatchBuilder {
 public:
  BatchBuilder(const ModelConfig& config, const std::vector<TestSequence>& sequences, int32_t page_size = 4,
               int32_t chunk_rows = static_cast<int32_t>(kHeadChunk), int32_t top = 0)
      : config_(config) {
    struct Head {
      int32_t row, sequence;
      LossRow loss;
    };
    std::vector<Head> heads[3];
    std::vector<int32_t> begin;
    auto &ids = ints(), &positions = ints(), &slots = ints();
    auto& keys = words();
    for (const TestSequence& s : sequences) {
      const int32_t row = static_cast<int32_t>(ids.size()), index = static_cast<int32_t>(begin.size());
      begin.push_back(row);
      for (size_t i = 0; i < s.ids.size(); ++i) {
        const int32_t position = s.position + static_cast<int32_t>(i);
        ids.push_back(s.ids[i]);
        positions.push_back(position);
        keys.push_back(mix_key(s.key, static_cast<uint64_t>(position)));
        slots.push_back(paged(s) ? s.pages[static_cast<size_t>(position / page_size)] * page_size + position % page_size : -1);
      }
      for (const auto& [r, target] : s.targets) heads[s.kind == Kind::train ? 0 : 1].push_back({row + r, index, target});
      if (s.sample) heads[2].push_back({row + static_cast<int32_t>(s.ids.size()) - 1, index, {}});
      view.rows = static_cast<int64_t>(ids.size());
      if (s.kind == Kind::train) view.train_rows = view.rows;
      if (!paged(s)) view.packed_rows = view.rows;
      view.dropout |= s.dropout > 0;
    }
    view.ids = ids.data();
    view.positions = positions.data();
    view.kv_slots = slots.data();
    view.packed = packed(sequences, begin, true);
    view.train_packed = packed(sequences, begin, false);
    view.paged = paged_batch(sequences, begin, page_size);

    std::vector<Run> all, train;
    view.lowest_layer = config.num_layers;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const TestSequence& s = sequences[i];
      all.push_back({&s, begin[i], static_cast<int32_t>(s.ids.size())});
      if (s.kind != Kind::train) continue;
      train.push_back(all.back());
      if (s.weights && s.train) view.lowest_layer = std::min(view.lowest_layer, s.weights->layout().lowest_layer);
    }
    view.groups = groups(all, keys.data(), false);
    view.train_groups = groups(train, keys.data(), true);

    auto& head_rows = ints();
    auto& losses = loss_rows_;
    auto& samples = sample_rows_;
    for (int kind = 0; kind < 3; ++kind) {
      for (size_t first = 0; first < heads[kind].size(); first += static_cast<size_t>(chunk_rows)) {
        HeadChunk chunk;
        chunk.kind = static_cast<HeadKind>(kind);
        chunk.begin = static_cast<int32_t>(head_rows.size());
        chunk.rows = static_cast<int32_t>(std::min(heads[kind].size() - first, static_cast<size_t>(chunk_rows)));
        std::vector<Run> runs;
        auto& chunk_keys = words();
        for (int32_t i = 0; i < chunk.rows; ++i) {
          const Head& head = heads[kind][first + static_cast<size_t>(i)];
          const TestSequence& s = sequences[static_cast<size_t>(head.sequence)];
          head_rows.push_back(head.row);
          losses.push_back(head.loss);
          if (kind == 2) samples.push_back(s.sampling);
          chunk_keys.push_back(keys[static_cast<size_t>(head.row)]);
          runs.push_back({&s, i, 1});
        }
        chunk.groups = groups(runs, chunk_keys.data(), kind == 0);
        view.chunks.push_back(chunk);
      }
    }
    size_t sample = 0;
    for (HeadChunk& chunk : view.chunks) {
      if (chunk.kind != HeadKind::sample) continue;
      chunk.sampling.rows = chunk.sampling.host_rows = samples.data() + sample;
      chunk.sampling.count = chunk.rows;
      sample += static_cast<size_t>(chunk.rows);
    }
    view.head_count = static_cast<int32_t>(head_rows.size());
    view.head_rows = head_rows.data();
    view.loss_rows = losses.data();
    logprob.assign(head_rows.size(), kUnset);
    loss.assign(head_rows.size(), kUnset);
    sampled.assign(head_rows.size(), -1);
    view.logprob = logprob.data();
    view.loss = loss.data();
    view.sampled = sampled.data();
    if (top > 0) {
      top_ids.assign(sample * static_cast<size_t>(top), -1);
      top_logprobs.assign(top_ids.size(), kUnset);
      view.top_ids = matrix(top_ids.data(), DType::i32, static_cast<int64_t>(sample), top);
      view.top_logprobs = matrix(top_logprobs.data(), DType::f32, static_cast<int64_t>(sample), top);
    }
  }
  BatchBuilder(const BatchBuilder&) = delete;
  BatchBuilder& operator=(const BatchBuilder&) = delete;

  static constexpr float kUnset = -12345.0f;
  BatchView view;
  std::vector<float> logprob, loss, top_logprobs;
  std::vector<int32_t> sampled, top_ids;

 private:
  struct Run {
    const TestSequence* sequence;
    int32_t begin, rows;
  };

  static bool paged(const TestSequence& s) { return s.kind == Kind::prefill || s.kind == Kind::decode; }
  std::vector<int32_t>& ints() { return ints_.emplace_back(); }
  std::vector<uint64_t>& words() { return words_.emplace_back(); }

  LoraGroups groups(const std::vector<Run>& runs, const uint64_t* keys, bool grads) {
    std::vector<LoraGroup>& list = groups_.emplace_back();
    LoraGroups result;
    const TestSequence* last = nullptr;
    bool dropout = false;
    for (const Run& run : runs) {
      const TestSequence& s = *run.sequence;
      if (!s.weights) {
        last = nullptr;
        continue;
      }
      if (last && last->weights == s.weights && last->dropout == s.dropout && last->kind == s.kind) {
        list.back().rows += run.rows;
      } else {
        LoraGroup group{run.begin, run.rows, s.weights->device_sites(), s.weights->host_sites(), nullptr, nullptr, s.dropout};
        if (grads && s.train) {
          group.grads = s.train->device_grads();
          group.host_grads = s.train->host_grads();
        }
        list.push_back(group);
      }
      last = &s;
      dropout |= s.dropout > 0;
      result.max_rank = std::max(result.max_rank, s.weights->layout().max_rank);
    }
    result.groups = result.host_groups = list.data();
    result.count = static_cast<int32_t>(list.size());
    result.row_keys = dropout ? keys : nullptr;
    return result;
  }

  PackedBatch packed(const std::vector<TestSequence>& sequences, const std::vector<int32_t>& begin, bool eval) {
    auto &first = ints(), &rows = ints();
    PackedBatch batch;
    for (size_t i = 0; i < sequences.size(); ++i) {
      if (sequences[i].kind != Kind::train && !(eval && sequences[i].kind == Kind::eval)) continue;
      first.push_back(begin[i]);
      rows.push_back(static_cast<int32_t>(sequences[i].ids.size()));
      batch.max_rows = std::max(batch.max_rows, rows.back());
    }
    batch.sequences = static_cast<int32_t>(first.size());
    batch.q_begin = batch.kv_begin = batch.host_q_begin = batch.host_kv_begin = first.data();
    batch.q_rows = batch.kv_rows = batch.host_q_rows = batch.host_kv_rows = rows.data();
    return batch;
  }

  PagedBatch paged_batch(const std::vector<TestSequence>& sequences, const std::vector<int32_t>& begin, int32_t page_size) {
    auto &first = ints(), &rows = ints(), &length = ints(), &table = ints();
    PagedBatch batch;
    for (const TestSequence& s : sequences) {
      if (paged(s)) batch.max_pages = std::max(batch.max_pages, static_cast<int32_t>(s.pages.size()));
    }
    for (size_t i = 0; i < sequences.size(); ++i) {
      const TestSequence& s = sequences[i];
      if (!paged(s)) continue;
      first.push_back(begin[i]);
      rows.push_back(static_cast<int32_t>(s.ids.size()));
      length.push_back(s.position + rows.back());
      for (int32_t p = 0; p < batch.max_pages; ++p) {
        const bool used = p * page_size < length.back();
        table.push_back(used ? s.pages[static_cast<size_t>(p)] : -1);
      }
      batch.decodes += s.kind == Kind::decode;
    }
    batch.sequences = static_cast<int32_t>(first.size());
    batch.row_begin = batch.host_row_begin = first.data();
    batch.rows = batch.host_rows = rows.data();
    batch.kv_len = batch.host_kv_len = length.data();
    batch.page_table = table.data();
    return batch;
  }

  const ModelConfig& config_;
  std::deque<std::vector<int32_t>> ints_;
  std::deque<std::vector<uint64_t>> words_;
  std::deque<std::vector<LoraGroup>> groups_;
  std::vector<LossRow> loss_rows_;
  std::vector<SampleRow> sample_rows_;
};

}  // namespace loquetier::test
