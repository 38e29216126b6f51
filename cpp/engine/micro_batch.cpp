#include "engine/micro_batch.h"

#include <algorithm>

#include "core/check.h"
#include "core/random.h"

namespace loquetier {

namespace {

struct Sequences {
  std::vector<int32_t> begin, rows;
};

PackedBatch put(Blob& in, const Sequences& s) {
  const auto begin = in.put(s.begin.data(), s.begin.size()), rows = in.put(s.rows.data(), s.rows.size());
  PackedBatch packed;
  packed.sequences = static_cast<int32_t>(s.begin.size());
  for (const int32_t n : s.rows) packed.max_rows = std::max(packed.max_rows, n);
  packed.q_begin = packed.kv_begin = begin.device;
  packed.q_rows = packed.kv_rows = rows.device;
  packed.host_q_begin = packed.host_kv_begin = begin.host;
  packed.host_q_rows = packed.host_kv_rows = rows.host;
  return packed;
}

// The groups that rows [begin, begin + rows) have, counted from `begin`.
std::vector<LoraGroup> clip(const std::vector<LoraGroup>& groups, int32_t begin, int32_t rows) {
  std::vector<LoraGroup> out;
  for (LoraGroup g : groups) {
    const int32_t first = std::max(g.row_begin, begin), end = std::min(g.row_begin + g.rows, begin + rows);
    if (first >= end) continue;
    g.row_begin = first - begin;
    g.rows = end - first;
    out.push_back(g);
  }
  return out;
}

}  // namespace

const MicroExampleData& MicroBatch::find(int64_t job, int32_t example) const {
  const auto found = index.find({job, example});
  require<std::logic_error>(found != index.end(), "[engine] example ", example, " of job ", job, " is in no micro-batch");
  return examples[found->second];
}

MicroBatch build_micro_batch(const Plan& plan, const ModelConfig& config, std::vector<MicroExampleData> examples,
                             std::vector<std::shared_ptr<AdapterWeights>> weights_of_examples, int32_t slice_rows, bool rerun,
                             Blob& in) {
  MicroBatch micro;
  BatchView& view = micro.view;
  Sequences all;
  std::vector<LoraGroup> groups;
  view.lowest_layer = config.num_layers;
  const AdapterRecord* previous = nullptr;
  for (size_t i = 0; i < examples.size(); ++i) {
    const MicroExampleData& e = examples[i];
    const AdapterRecord& a = *e.adapter;
    micro.index[{e.place.job, e.place.example}] = i;
    all.begin.push_back(e.place.row_begin);
    all.rows.push_back(e.place.rows);
    view.train_rows += e.place.rows;
    view.lowest_layer = std::min(view.lowest_layer, a.layout->lowest_layer);
    view.dropout |= a.config.lora_dropout > 0;
    micro.rank = std::max(micro.rank, a.layout->max_rank);
    if (std::ranges::find(micro.jobs, e.place.job) == micro.jobs.end()) micro.jobs.push_back(e.place.job);
    if (previous != &a) {
      LoraGroup g;
      g.row_begin = e.place.row_begin;
      g.grads = a.train->device_grads();
      g.host_grads = a.train->host_grads();
      g.dropout = static_cast<float>(a.config.lora_dropout);
      groups.push_back(g);
      micro.weights.push_back(weights_of_examples[i]);
    }
    groups.back().rows += e.place.rows;
    previous = &a;
  }
  view.rows = view.packed_rows = view.train_rows;
  micro.layer_slices = cut_layer(all.rows, slice_rows, rerun);
  micro.slices_left = static_cast<int32_t>(config.num_layers) * static_cast<int32_t>(micro.layer_slices.size());
  require<std::logic_error>(plan.micro_batch.size() == examples.size(), "[engine] micro-batch: expected ", plan.micro_batch.size(),
                            " examples, got ", examples.size());

  const size_t sequences = all.rows.size(), slices = micro.layer_slices.size();
  size_t bytes = sequences * 2 * sizeof(int32_t) + groups.size() * sizeof(LoraGroup) +
                 (view.dropout ? static_cast<size_t>(view.train_rows) * sizeof(uint64_t) : 0);
  // Every block of a part holds its rows' groups: at most all groups, and one more for each block.
  bytes += 4 * ((groups.size() + slices) * sizeof(LoraGroup) + sequences * 2 * sizeof(int32_t));
  in.begin(bytes + 64 * (8 + 4 * slices));
  const uint64_t* row_keys = nullptr;
  if (view.dropout) {
    auto keys = in.take<uint64_t>(static_cast<size_t>(view.train_rows));
    for (const MicroExampleData& e : examples) {
      for (int32_t r = 0; r < e.place.rows; ++r) keys.host[e.place.row_begin + r] = mix_key(e.key, static_cast<uint64_t>(r));
    }
    row_keys = keys.device;
  }
  const auto put_groups = [&](const std::vector<LoraGroup>& list, int32_t begin) {
    const auto both = in.put(list.data(), list.size());
    LoraGroups out;
    out.groups = both.device;
    out.host_groups = both.host;
    out.count = static_cast<int32_t>(list.size());
    out.max_rank = micro.rank;
    out.row_keys = row_keys ? row_keys + begin : nullptr;
    return out;
  };
  view.train_packed = put(in, all);
  view.train_groups = put_groups(groups, 0);
  if (slice_rows > 0) {
    for (const BackwardSlice& s : micro.layer_slices) {
      BackwardBlock block = {s.row_begin, s.rows, put_groups(clip(groups, s.row_begin, s.rows), s.row_begin), {}};
      Sequences inside;
      for (int32_t i = s.sequence_begin; i < s.sequence_begin + s.sequences; ++i) {
        inside.begin.push_back(all.begin[static_cast<size_t>(i)] - s.row_begin);
        inside.rows.push_back(all.rows[static_cast<size_t>(i)]);
      }
      block.packed = put(in, inside);
      micro.blocks.push_back(block);
    }
  }
  micro.examples = std::move(examples);
  return micro;
}

void refresh_micro_batch(MicroBatch& micro, Blob& in) {
  // The host copies of the groups lie in this engine's own block, which is const only for those who read the batch.
  const auto point = [&](const LoraGroups& list, int64_t begin) {
    auto* groups = const_cast<LoraGroup*>(list.host_groups);
    size_t w = 0;
    const LoraGroup* all = micro.view.train_groups.host_groups;
    for (int32_t g = 0; g < list.count; ++g) {
      while (all[w].row_begin + all[w].rows <= begin + groups[g].row_begin) ++w;
      groups[g].sites = micro.weights[w]->device_sites();
      groups[g].host_sites = micro.weights[w]->host_sites();
    }
  };
  point(micro.view.train_groups, 0);
  for (const BackwardBlock& block : micro.blocks) point(block.groups, block.row_begin);
  in.upload();
}

}  // namespace loquetier
