#include "engine/step_batch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <span>

#include "core/random.h"

namespace loquetier {

namespace {

// Head rows gathered before they are packed.
struct Heads {
  std::vector<HeadRef> refs;
  std::vector<int32_t> rows;  // of the batch
  std::vector<LossRow> loss_rows;
  int32_t train = 0, logprob = 0;  // how many of each kind; the rest sample
  void reserve(size_t n) {
    refs.reserve(n);
    rows.reserve(n);
    loss_rows.reserve(n);
  }
};

// Sampling arrays, one entry per row to sample.
struct Sampling {
  std::vector<SampleRow> rows;
  std::vector<int32_t> history;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<int32_t> forbidden;
};

void carve_results(StepBatch& step, size_t samples, Blob& out) {
  BatchView& view = step.view;
  const auto heads = static_cast<size_t>(view.head_count), columns = static_cast<size_t>(step.top_columns);
  step.logprob = out.take<float>(heads);
  step.loss = out.take<float>(heads);
  step.sampled = out.take<int32_t>(heads);
  step.top_ids = out.take<int32_t>(samples * columns);
  step.top_logprobs = out.take<float>(samples * columns);
  step.norms = out.take<float>(step.update_jobs.size());
  view.logprob = step.logprob.device;
  view.loss = step.loss.device;
  view.sampled = step.sampled.device;
  if (columns == 0) return;
  const auto n = static_cast<int64_t>(samples);
  view.top_ids = matrix(step.top_ids.device, DType::i32, n, step.top_columns);
  view.top_logprobs = matrix(step.top_logprobs.device, DType::f32, n, step.top_columns);
}

class Builder {
 public:
  Builder(const Plan& plan, const StepContext& context) : plan_(plan), context_(context) {
    requests_.resize(plan.segments.size());
    for (size_t i = 0; i < plan.segments.size(); ++i) {
      const Segment& s = plan.segments[i];
      count_[static_cast<int>(s.kind)] += 1;
      if (packed(s)) continue;
      const Planner::Sequence sequence = context.planner.sequence(s.id);
      requests_[i] = {&context.requests.at(s.id), sequence.tokens, sequence.pages};
    }
  }

  StepBatch build(Blob& in, Blob& out) {
    gather_heads();
    gather_updates();
    gather_groups();
    const BatchCounts n = counts();
    in.begin(metadata_bytes(n));
    view().rows = static_cast<int64_t>(n.rows);
    view().train_rows = plan_.rows[0];
    view().packed_rows = plan_.rows[0] + plan_.rows[1];
    view().saved_row = plan_.micro_row;
    pack_rows(in);
    pack_packed(in);
    pack_paged(in);
    pack_groups(in);
    pack_heads(in);
    pack_updates(in);
    step_.tables.filling = in.filling();
    step_.plain = step_.decode && sampling_.history.empty() && sampling_.bias_ids.empty() && sampling_.forbidden.empty() &&
                  step_.top_columns == 0 && step_.update_jobs.empty() &&
                  std::ranges::all_of(view().chunks, [](const HeadChunk& chunk) { return chunk.groups.count == 0; });
    if (step_.decode) {
      for (const auto& [use, weights] : context_.weights) step_.weights.push_back(weights);
    }
    out.begin(results_bytes(n));
    carve_results(step_, static_cast<size_t>(n.samples), out);
    return std::move(step_);
  }

 private:
  BatchView& view() { return step_.view; }
  const Job& job(const Segment& s) const { return context_.jobs.at(s.id); }
  const MicroExampleData& trained(const Segment& s) const { return context_.micro->find(s.id, s.example); }
  const PreparedExample& example(const Segment& s) const {
    return s.kind == Kind::train ? trained(s).data : job(s).examples[static_cast<size_t>(s.example)];
  }
  // Of a segment with pages: looked up once.
  struct Served {
    const Request* request = nullptr;
    std::span<const int32_t> tokens, pages;
  };
  const AdapterLayout& layout(const Segment& s) const { return *context_.adapters.at(s.adapter)->layout; }
  static bool packed(const Segment& s) { return s.kind == Kind::train || s.kind == Kind::eval; }

  uint64_t row_key(const Segment& s, int32_t row) const { return mix_key(trained(s).key, static_cast<uint64_t>(s.position + row)); }

  // ---- heads

  void gather_heads() {
    for (const Kind kind : {Kind::train, Kind::eval}) {
      for (size_t i = 0; i < plan_.segments.size(); ++i) {
        const Segment& s = plan_.segments[i];
        if (s.kind != kind) continue;
        const PreparedExample& e = example(s);
        for (size_t t = 0; t < e.targets.size(); ++t) {
          const int32_t row = e.target_rows[t] - s.position;  // of the segment, which may be a chunk of the example
          if (row >= 0 && row < s.rows) add_head(i, static_cast<int32_t>(t), s.row_begin + row, e.targets[t]);
        }
      }
      if (kind == Kind::train) heads_.train = static_cast<int32_t>(heads_.refs.size());
    }
    for (size_t i = 0; i < plan_.segments.size(); ++i) {
      const Segment& s = plan_.segments[i];
      if (s.kind == Kind::prefill && requests_[i].request->sampling.prompt_logprobs) gather_prompt_heads(i, s);
    }
    heads_.logprob = static_cast<int32_t>(heads_.refs.size()) - heads_.train;
    step_.sample_begin = static_cast<int32_t>(heads_.refs.size());
    const auto samples = static_cast<size_t>(std::ranges::count(plan_.segments, true, &Segment::samples));
    heads_.reserve(heads_.refs.size() + samples);
    sampling_.rows.reserve(samples);
    for (size_t i = 0; i < plan_.segments.size(); ++i) {
      const Segment& s = plan_.segments[i];
      if (!s.samples) continue;
      add_head(i, 0, s.row_begin + s.rows - 1, {});
      gather_sampling(requests_[i]);
    }
    view().head_count = static_cast<int32_t>(heads_.refs.size());
  }

  void gather_prompt_heads(size_t segment, const Segment& s) {
    const auto tokens = requests_[segment].tokens;
    const int64_t prompt_length = requests_[segment].request->prompt_length;
    for (int32_t r = 0; r < s.rows; ++r) {
      const int32_t position = s.position + r;
      if (position + 1 >= prompt_length) break;
      LossRow row;
      row.target = tokens[static_cast<size_t>(position + 1)];
      add_head(segment, position + 1, s.row_begin + r, row);
    }
  }

  void add_head(size_t segment, int32_t index, int32_t row, const LossRow& loss) {
    heads_.refs.push_back({static_cast<int32_t>(segment), index});
    heads_.rows.push_back(row);
    heads_.loss_rows.push_back(loss);
  }

  void gather_sampling(const Served& served) {
    const Request& r = *served.request;
    const SamplingParams& p = r.sampling;
    const auto tokens = served.tokens;
    SampleRow row;
    row.temperature = static_cast<float>(p.temperature);
    row.top_p = static_cast<float>(p.top_p);
    row.min_p = static_cast<float>(p.min_p);
    row.top_k = p.top_k;
    row.repetition_penalty = static_cast<float>(p.repetition_penalty);
    row.presence_penalty = static_cast<float>(p.presence_penalty);
    row.frequency_penalty = static_cast<float>(p.frequency_penalty);
    row.top_logprobs = p.logprobs;
    row.seed = r.seed;
    row.index = static_cast<int64_t>(tokens.size()) - r.prompt_length;
    row.history_begin = static_cast<int32_t>(sampling_.history.size());
    if (reads_history(p)) {
      step_.reads_history = true;
      sampling_.history.insert(sampling_.history.end(), tokens.begin(), tokens.end());
      row.prompt_length = static_cast<int32_t>(r.prompt_length);
      row.output_length = static_cast<int32_t>(row.index);
    }
    row.bias_begin = static_cast<int32_t>(sampling_.bias_ids.size());
    row.bias_count = static_cast<int32_t>(p.logit_bias.size());
    for (const auto& [id, bias] : p.logit_bias) {
      sampling_.bias_ids.push_back(id);
      sampling_.bias_values.push_back(static_cast<float>(bias));
    }
    row.forbidden_begin = static_cast<int32_t>(sampling_.forbidden.size());
    if (row.index < p.min_tokens) {
      sampling_.forbidden.insert(sampling_.forbidden.end(), r.stop_ids.begin(), r.stop_ids.end());
      row.forbidden_count = static_cast<int32_t>(r.stop_ids.size());
    }
    sampling_.rows.push_back(row);
    step_.top_columns = std::max(step_.top_columns, p.logprobs);
  }

  // ---- updates

  void gather_updates() {
    for (int64_t id : plan_.completed_jobs) {
      const Job& j = context_.jobs.at(id);
      if (!j.optimizer) continue;
      const AdapterRecord& a = *j.adapter;
      a.train->append_update(*j.optimizer, a.weights->device_block(), adam_tensors_, adam_jobs_);
      step_.update_jobs.push_back(id);
    }
  }

  // ---- packing

  BatchCounts counts() const {
    BatchCounts n;
    n.rows = static_cast<size_t>(plan_.total_rows());
    n.segments = plan_.segments.size();
    n.paged = static_cast<size_t>(count_[2] + count_[3]);
    for (const Served& served : requests_) n.pages = std::max(n.pages, served.pages.size());
    if (const auto& shape = step_.decode) {
      n.rows = n.paged = static_cast<size_t>(shape->rows);
      n.segments = std::max(n.segments, static_cast<size_t>(shape->groups));
      n.pages = static_cast<size_t>(shape->pages);
    }
    n.heads = heads_.refs.size();
    n.samples = sampling_.rows.size();
    n.words = sampling_.history.size() + sampling_.bias_ids.size() * 2 + sampling_.forbidden.size();
    n.adam_tensors = adam_tensors_.size();
    n.adam_jobs = adam_jobs_.size();
    n.top_columns = static_cast<size_t>(step_.top_columns);
    return n;
  }

  void pack_rows(Blob& in) {
    const auto rows = static_cast<size_t>(view().rows);
    auto ids = in.take<int32_t>(rows), positions = in.take<int32_t>(rows), slots = in.take<int32_t>(rows);
    for (size_t i = 0; i < plan_.segments.size(); ++i) {
      const Segment& s = plan_.segments[i];
      const int32_t* source = packed(s) ? example(s).ids.data() : requests_[i].tokens.data();
      const auto pages = requests_[i].pages;
      for (int32_t r = 0; r < s.rows; ++r) {
        const int32_t row = s.row_begin + r, position = s.position + r;
        ids.host[row] = source[position];
        positions.host[row] = position;
        slots.host[row] = packed(s) ? -1
                                    : pages[static_cast<size_t>(position / context_.page_size)] * context_.page_size +
                                          position % context_.page_size;
      }
    }
    for (size_t row = static_cast<size_t>(plan_.total_rows()); row < rows; ++row) {  // of a graph's layout
      ids.host[row] = positions.host[row] = 0;
      slots.host[row] = -1;
    }
    step_.tables.positions = positions.host;
    step_.tables.slots = slots.host;
    view().ids = ids.device;
    view().positions = positions.device;
    view().kv_slots = slots.device;
    if (!step_.decode) return;
    const auto awaited = in.take<const int32_t*>(rows);
    std::fill_n(awaited.host, rows, nullptr);
    std::ranges::copy(context_.awaited, awaited.host);  // a row each
    step_.tables.awaited = awaited.host;
    step_.awaited = {awaited.device, ids.device};
  }

  // Keys and values of a chunk's examples lie in Saved, where the rows of their earlier chunks are just before.
  void pack_packed(Blob& in) {
    std::vector<int32_t> begin, rows, kv_begin, kv_rows;
    PackedBatch& p = view().packed;
    for (const Segment& s : plan_.segments) {
      if (!packed(s)) continue;
      begin.push_back(s.row_begin);
      rows.push_back(s.rows);
      kv_begin.push_back(static_cast<int32_t>(view().saved_row) + s.row_begin - s.position);
      kv_rows.push_back(s.position + s.rows);
      p.max_rows = std::max(p.max_rows, kv_rows.back());
    }
    p.sequences = static_cast<int32_t>(begin.size());
    const auto b = in.put(begin.data(), begin.size()), r = in.put(rows.data(), rows.size());
    const auto kb = in.put(kv_begin.data(), kv_begin.size()), kr = in.put(kv_rows.data(), kv_rows.size());
    p.q_begin = b.device;
    p.q_rows = r.device;
    p.kv_begin = kb.device;
    p.kv_rows = kr.device;
    p.host_q_begin = b.host;
    p.host_q_rows = r.host;
    p.host_kv_begin = kb.host;
    p.host_kv_rows = kr.host;
  }

  void pack_paged(Blob& in) {
    PagedBatch& p = view().paged;
    p.sequences = step_.decode ? step_.decode->rows : count_[2] + count_[3];
    p.decodes = step_.decode ? step_.decode->rows : count_[3];
    const auto n = static_cast<size_t>(p.sequences);
    size_t width = step_.decode ? static_cast<size_t>(step_.decode->pages) : 0;
    for (const Served& served : requests_) width = std::max(width, served.pages.size());
    p.max_pages = static_cast<int32_t>(width);
    auto begin = in.take<int32_t>(n), rows = in.take<int32_t>(n), kv_len = in.take<int32_t>(n), table = in.take<int32_t>(n * width);
    size_t i = 0;
    const auto put = [&](int32_t row_begin, int32_t row_count, int32_t keys, std::span<const int32_t> pages) {
      begin.host[i] = row_begin;
      rows.host[i] = row_count;
      kv_len.host[i] = keys;
      int32_t* row = table.host + i * width;
      std::fill(std::copy(pages.begin(), pages.end(), row), row + width, 0);
      ++i;
    };
    for (size_t at = 0; at < plan_.segments.size(); ++at) {
      const Segment& s = plan_.segments[at];
      if (!packed(s)) put(s.row_begin, s.rows, s.position + s.rows, requests_[at].pages);
    }
    while (i < n) put(static_cast<int32_t>(i), 0, 0, {});  // of a graph's layout: no rows
    step_.tables.kv_len = kv_len.host;
    step_.tables.page_table = table.host;
    p.row_begin = begin.device;
    p.rows = rows.device;
    p.kv_len = kv_len.device;
    p.page_table = table.device;
    p.host_row_begin = begin.host;
    p.host_rows = rows.host;
    p.host_kv_len = kv_len.host;
  }

  LoraGroup group_of(const Segment& s) const {
    const AdapterRecord& a = *context_.adapters.at(s.adapter);
    const AdapterWeights& w = *context_.weights.at({s.adapter, s.version});
    LoraGroup g;
    g.sites = w.device_sites();
    g.host_sites = w.host_sites();
    if (s.kind == Kind::train) {
      g.grads = a.train->device_grads();
      g.host_grads = a.train->host_grads();
      g.dropout = static_cast<float>(a.config.lora_dropout);
    }
    return g;
  }

  struct GroupList {
    std::vector<LoraGroup> groups;
    int32_t max_rank = 0;
    DecodeCounts counts;  // of the layers: groups, largest, rank, vectors, parts
  };

  // Groups of consecutive items that use one adapter; `segment_of(i)` and `row_of(i)` describe item i, `rows_of(i)` its rows.
  template <class Segments, class Rows>
  GroupList list_groups(size_t items, Segments segment_of, Rows rows_of, bool lm_head_only) const {
    GroupList list;
    const Segment* previous = nullptr;
    const AdapterLayout* shape = nullptr;  // of `previous`
    for (size_t i = 0; i < items; ++i) {
      const Segment& s = segment_of(i);
      const auto [row, rows] = rows_of(i);
      if (s.adapter != kBaseAdapter && (!previous || previous->adapter != s.adapter)) shape = &layout(s);
      if (s.adapter == kBaseAdapter || (lm_head_only && !shape->lm_head)) {
        previous = nullptr;
        continue;
      }
      const bool same = previous && previous->adapter == s.adapter && previous->version == s.version &&
                        (previous->kind == Kind::train) == (s.kind == Kind::train) &&
                        list.groups.back().row_begin + list.groups.back().rows == row;
      if (!same) {
        list.groups.push_back(group_of(s));
        list.groups.back().row_begin = row;
        list.max_rank = std::max(list.max_rank, shape->max_rank);
        list.counts.rank = std::max(list.counts.rank, shape->part_rank);
        list.counts.vectors = list.counts.vectors && shape->vector_ranks;
        list.counts.parts |= shape->parts;
      }
      list.groups.back().rows += rows;
      list.counts.largest = std::max(list.counts.largest, list.groups.back().rows);
      previous = &s;
    }
    list.counts.groups = static_cast<int32_t>(list.groups.size());
    return list;
  }

  LoraGroups put_groups(Blob& in, const GroupList& list, const uint64_t* row_keys) const {
    LoraGroups out;
    const Both<LoraGroup> both = in.put(list.groups.data(), list.groups.size());
    out.groups = both.device;
    out.host_groups = both.host;
    out.count = static_cast<int32_t>(list.groups.size());
    out.max_rank = list.max_rank;
    out.row_keys = row_keys;
    return out;
  }

  // The batch's groups, and whether it is one for a graph.
  void gather_groups() {
    auto segment_of = [&](size_t i) -> const Segment& { return plan_.segments[i]; };
    auto rows_of = [&](size_t i) { return std::pair(plan_.segments[i].row_begin, plan_.segments[i].rows); };
    groups_ = list_groups(plan_.segments.size(), segment_of, rows_of, false);
    if (count_[3] == 0 || count_[3] != static_cast<int32_t>(plan_.segments.size())) return;
    DecodeCounts& n = groups_.counts;
    n.rows = count_[3];
    if (decode_bucket(n.rows) > context_.most_graph_rows) return;
    for (const Served& served : requests_) n.pages = std::max(n.pages, static_cast<int32_t>(served.pages.size()));
    step_.decode = decode_shape(n, context_.max_rank);
    LoraGroup none;  // behind the last row, no rows, no adapter
    none.row_begin = step_.decode->rows;
    groups_.groups.resize(static_cast<size_t>(step_.decode->groups), none);
    groups_.max_rank = step_.decode->columns;
  }

  void pack_groups(Blob& in) {
    view().lowest_layer = context_.config.num_layers;
    for (const Segment& s : plan_.segments) {
      if (s.kind != Kind::train) continue;
      view().lowest_layer = std::min(view().lowest_layer, layout(s).lowest_layer);
      view().dropout |= context_.adapters.at(s.adapter)->config.lora_dropout > 0;
    }
    const uint64_t* row_keys = nullptr;
    if (view().dropout) {
      auto keys = in.take<uint64_t>(static_cast<size_t>(view().train_rows));
      for (const Segment& s : plan_.segments) {
        if (s.kind != Kind::train) continue;
        for (int32_t r = 0; r < s.rows; ++r) keys.host[s.row_begin + r] = row_key(s, r);
      }
      row_keys = keys.device;
    }
    view().groups = put_groups(in, groups_, row_keys);
  }

  void pack_heads(Blob& in) {
    const auto n = heads_.refs.size();
    const auto rows = in.put(heads_.rows.data(), n);
    const auto loss_rows = in.put(heads_.loss_rows.data(), n);
    view().head_rows = rows.device;
    view().loss_rows = loss_rows.device;
    const uint64_t* head_keys = nullptr;
    if (view().dropout) {
      auto keys = in.take<uint64_t>(static_cast<size_t>(heads_.train));
      for (int32_t h = 0; h < heads_.train; ++h) {
        const HeadRef& ref = heads_.refs[static_cast<size_t>(h)];
        const Segment& s = plan_.segments[static_cast<size_t>(ref.segment)];
        keys.host[h] = row_key(s, heads_.rows[static_cast<size_t>(h)] - s.row_begin);
      }
      head_keys = keys.device;
    }
    const auto sample_rows = in.put(sampling_.rows.data(), sampling_.rows.size());
    step_.tables.sampling = sample_rows.host;
    const auto history = in.put(sampling_.history.data(), sampling_.history.size());
    const auto bias_ids = in.put(sampling_.bias_ids.data(), sampling_.bias_ids.size());
    const auto bias_values = in.put(sampling_.bias_values.data(), sampling_.bias_values.size());
    const auto forbidden = in.put(sampling_.forbidden.data(), sampling_.forbidden.size());

    auto add_chunks = [&](HeadKind kind, int32_t begin, int32_t count) {
      const int32_t most = kind == HeadKind::sample ? kHeadSlice : context_.head_chunk;  // sampling has scratch for so many rows
      for (int32_t done = 0; done < count; done += most) {
        HeadChunk chunk;
        chunk.kind = kind;
        chunk.begin = begin + done;
        chunk.rows = std::min(count - done, most);
        step_.largest_chunk = std::max<int64_t>(step_.largest_chunk, chunk.rows);
        auto segment_of = [&](size_t i) -> const Segment& {
          return plan_.segments[static_cast<size_t>(heads_.refs[static_cast<size_t>(chunk.begin) + i].segment)];
        };
        auto rows_of = [&](size_t i) { return std::pair(static_cast<int32_t>(i), 1); };
        const uint64_t* keys = kind == HeadKind::train && head_keys ? head_keys + chunk.begin : nullptr;
        chunk.groups = put_groups(in, list_groups(static_cast<size_t>(chunk.rows), segment_of, rows_of, true), keys);
        if (kind == HeadKind::sample) {
          chunk.sampling.rows = sample_rows.device + done;
          chunk.sampling.host_rows = sample_rows.host + done;
          chunk.sampling.count = chunk.rows;
          chunk.sampling.history = history.device;
          chunk.sampling.bias_ids = bias_ids.device;
          chunk.sampling.bias_values = bias_values.device;
          chunk.sampling.forbidden = forbidden.device;
        }
        view().chunks.push_back(chunk);
      }
    };
    add_chunks(HeadKind::train, 0, heads_.train);
    add_chunks(HeadKind::logprob, heads_.train, heads_.logprob);
    add_chunks(HeadKind::sample, step_.sample_begin, static_cast<int32_t>(sampling_.rows.size()));
    step_.heads = std::move(heads_.refs);
  }

  void pack_updates(Blob& in) {
    const auto tensors = in.put(adam_tensors_.data(), adam_tensors_.size());
    const auto jobs = in.put(adam_jobs_.data(), adam_jobs_.size());
    step_.updates = {tensors.device, tensors.host, static_cast<int32_t>(adam_tensors_.size()),
                     jobs.device,    jobs.host,    static_cast<int32_t>(adam_jobs_.size())};
  }

  const Plan& plan_;
  const StepContext& context_;
  StepBatch step_;
  std::vector<Served> requests_;  // beside the plan's segments
  GroupList groups_;
  Heads heads_;
  Sampling sampling_;
  std::vector<AdamTensor> adam_tensors_;
  std::vector<AdamJob> adam_jobs_;
  int32_t count_[4] = {0, 0, 0, 0};  // segments by kind
};

}  // namespace

bool reads_history(const SamplingParams& p) {
  return p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

size_t metadata_bytes(const BatchCounts& n) {
  const size_t chunks = n.heads / static_cast<size_t>(kHeadSlice) + 4;
  size_t bytes = n.rows * (3 * sizeof(int32_t) + 2 * sizeof(uint64_t));
  bytes += n.segments * (16 * sizeof(int32_t) + 3 * sizeof(LoraGroup)) + n.paged * n.pages * sizeof(int32_t);
  bytes += (n.segments + chunks) * sizeof(LoraGroup) + n.samples * sizeof(SampleRow);
  bytes += n.heads * (sizeof(int32_t) + sizeof(LossRow) + sizeof(uint64_t)) + n.words * sizeof(int32_t);
  bytes += n.adam_tensors * sizeof(AdamTensor) + n.adam_jobs * sizeof(AdamJob);
  return bytes + 64 * (40 + chunks);  // alignment of each array
}

size_t results_bytes(const BatchCounts& n) {
  return n.heads * 3 * sizeof(float) + n.samples * n.top_columns * 2 * sizeof(float) + n.adam_jobs * sizeof(float) + 64 * 8;
}

BatchCounts most_counts(int64_t rows, int64_t sequences, int64_t pages, int64_t train_rows) {
  constexpr size_t kWordsPerSequence = 2048, kUpdates = 1024, kTopColumns = 20;
  const auto decodes = static_cast<size_t>(std::min<int64_t>(rows, decode_bucket(static_cast<int32_t>(sequences))));
  BatchCounts n;
  n.rows = n.heads = static_cast<size_t>(rows);
  n.segments = static_cast<size_t>(rows);
  n.paged = n.samples = decodes;
  n.pages = std::bit_ceil(static_cast<size_t>(pages));
  n.words = decodes * kWordsPerSequence;
  n.adam_jobs = std::min(static_cast<size_t>(train_rows), kUpdates);
  n.adam_tensors = 2 * n.adam_jobs;
  n.top_columns = kTopColumns;
  return n;
}

StepBatch build_step(const Plan& plan, const StepContext& context, Blob& in, Blob& out) {
  return Builder(plan, context).build(in, out);
}

bool advance_step(const Plan& plan, const StepBatch& batch, const Plan& next, const Planner& planner, int32_t page_size, Blob& in,
                  Blob& out, StepBatch& step) {
  const DecodeTables& tables = batch.tables;
  if (!batch.plain || tables.filling != in.filling()) return false;
  const auto follows = [](const Segment& s, const Segment& before) {
    return s.id == before.id && s.adapter == before.adapter && s.version == before.version && s.position == before.position + 1;
  };
  if (!std::ranges::equal(next.segments, plan.segments, follows)) return false;
  const int32_t width = batch.decode->pages;
  for (size_t i = 0; i < next.segments.size(); ++i) {
    const Segment& s = next.segments[i];
    tables.positions[i] = s.position;
    tables.kv_len[i] = s.position + 1;
    tables.sampling[i].index += 1;
    tables.awaited[i] = batch.sampled.device + i;
    if (!s.new_pages) {
      tables.slots[i] += 1;
      continue;
    }
    const std::span<const int32_t> pages = planner.pages(s.id);
    if (std::ssize(pages) > width) return false;
    std::ranges::copy(pages, tables.page_table + i * static_cast<size_t>(width));
    tables.slots[i] = pages[static_cast<size_t>(s.position / page_size)] * page_size + s.position % page_size;
  }
  step = batch;
  out.begin(results_bytes({.heads = static_cast<size_t>(step.view.head_count)}));
  carve_results(step, static_cast<size_t>(step.view.head_count), out);
  return true;
}

}  // namespace loquetier
