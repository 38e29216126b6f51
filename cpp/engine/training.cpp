// Training in pieces: a micro-batch begins, its chunks run as part of a step's batch or layer by layer, its backward slice by
// slice.
//
// With a latency target (or slice_rows) the engine looks between two pieces whether a request has come, and ends the step's
// training when one has. A device that works asynchronously is at most kAhead pieces behind the host, so what is launched already
// and cannot be taken back is a matter of two slices.
//
// A chunk that shares its pass with other rows leaves it then (when Plan::chunk_leaves says so): between two layers, or between two
// of its head chunks. What it has so far stays in Saved, as that of a chunk which stopped alone, and later steps run the rest. The
// other rows (of requests, and evaluation examples, which are never cut) go on as a batch of their own from the layer they have
// come to.
#include <algorithm>

#include "core/random.h"
#include "engine/impl.h"

namespace loquetier {

// ---------------------------------------------------------------- pieces one after the other

bool Engine::Impl::interrupted() const { return slice_rows > 0 && arrivals.load(std::memory_order_relaxed) > 0; }

// Before a piece is launched: true when no more is to be. Waits until the device is not too far behind.
bool Engine::Impl::stop_before_piece(const Plan& plan) {
  if (slice_rows == 0) return false;
  Device& device = core->ops->device();
  if (core->launched.size() >= kAhead) {
    const double begin = now();
    device.wait(core->launched.front());
    if (!device.host_addressable()) waiting_seconds += now() - begin;
    core->launched.pop_front();
  }
  return plan.interruptible && interrupted();
}

void Engine::Impl::launched_piece(const char* name, double begin) {
  if (slice_rows > 0) core->launched.push_back(core->ops->device().record());
  core->stats.slices += 1;
  if (trace) trace->event(name, begin, now(), {});
}

// ---------------------------------------------------------------- a micro-batch begins

void Engine::Impl::begin_micro_batch(const Plan& plan, const WeightTableOfStep& weights) {
  Core& c = *core;
  std::vector<MicroExampleData> examples;
  std::vector<std::shared_ptr<AdapterWeights>> weights_of_examples;
  for (const MicroExample& e : plan.micro_batch) {
    Job& job = c.jobs.at(e.job);
    AdapterRecord& a = *job.adapter;
    const uint64_t key = mix_key(a.config.seed, job.dropout_base + static_cast<uint64_t>(e.example));
    examples.push_back({e, job.examples[static_cast<size_t>(e.example)], job.adapter, key});
    weights_of_examples.push_back(weights.at({e.adapter, e.version}));
  }
  MicroBatch micro = build_micro_batch(plan, c.model.config(), std::move(examples), std::move(weights_of_examples), slice_rows,
                                       recompute == Recompute::layer, c.micro_metadata);
  for (const MicroExampleData& e : micro.examples) {
    c.jobs.at(e.place.job).began = true;
    e.adapter->train->has_gradients = true;
  }
  c.micro = std::move(micro);
}

void Engine::Impl::end_micro_batch() {
  MicroBatch micro = *std::exchange(core->micro, std::nullopt);
  for (const AdapterPtr& adapter : micro.drop) {
    if (adapter->train) adapter->train->drop_gradients();
    forget_if_unused(adapter);
  }
}

SliceShape Engine::Impl::slice_shape() const {
  SliceShape shape;
  shape.chunked = slice_rows > 0;
  if (!shape.chunked || !core->micro) return shape;
  for (const BackwardSlice& s : core->micro->layer_slices) shape.block_rows = std::max<int64_t>(shape.block_rows, s.rows);
  shape.saved_rank = core->micro->rank;
  return shape;
}

// ---------------------------------------------------------------- forward

namespace {

Plan only_training(const Plan& plan) {
  Plan part;
  part.micro_row = plan.micro_row;
  part.rows[0] = plan.rows[0];
  std::ranges::copy_if(plan.segments, std::back_inserter(part.segments), [](const Segment& s) { return s.kind == Kind::train; });
  return part;
}

// The other rows, where they lie in Saved.
Plan without_training(const Plan& plan) {
  Plan part;
  part.micro_row = plan.micro_row + plan.rows[0];
  std::copy(plan.rows + 1, std::end(plan.rows), part.rows + 1);
  for (Segment s : plan.segments) {
    if (s.kind == Kind::train) continue;
    s.row_begin -= plan.rows[0];
    part.segments.push_back(s);
  }
  return part;
}

}  // namespace

// The forward of a step's batch when it holds a chunk. Layer by layer when the chunk leaves it for a request that comes, else in
// one go.
void Engine::Impl::run_chunk(const Plan& plan, StepBatch& batch, const StepContext& context, Arena& scratch, StepOutcome& outcome) {
  Core& c = *core;
  const BatchView& view = batch.view;
  const Saved& saved = c.micro->saved;
  const int64_t layers = c.model.config().num_layers, heads = std::ssize(view.chunks);
  if (!plan.chunk_leaves) {
    c.model.forward_layers(view, c.kv, saved, 0, layers, scratch);
    c.model.forward_heads(view, saved, 0, heads, scratch);
    return;
  }
  const auto launched = [&](const char* phase) {
    c.launched.push_back(c.ops->device().record());
    mark(phase);
    return stop_before_piece(plan);
  };
  const int64_t train_heads = std::ranges::count(view.chunks, HeadKind::train, &HeadChunk::kind);
  int64_t layer = 0, head = 0;
  bool leaves = stop_before_piece(plan);
  if (!leaves)
    layer = c.model.forward_layers(view, c.kv, saved, 0, layers, scratch, [&] { return leaves = launched("pass layer"); });
  for (; layer == layers && head < train_heads && !leaves; ++head) {
    c.model.forward_heads(view, saved, head, head + 1, scratch);
    leaves = launched("pass heads");
  }
  if (layer == layers && head == train_heads) c.model.forward_heads(view, saved, head, heads, scratch);
  else leave_pass(plan, batch, context, {only_training(plan), layer, head}, scratch, outcome);
}

// The chunk has come as far as `at` says; the rows beside it go on without it. Their results are those of the batch made here, the
// step's own keeps the losses that are in.
void Engine::Impl::leave_pass(const Plan& plan, StepBatch& batch, const StepContext& context, MicroBatch::Stopped at,
                              Arena& scratch, StepOutcome& outcome) {
  Core& c = *core;
  const double begin = now();
  if (at.head_chunk > 0) {
    const HeadChunk& last = batch.view.chunks[static_cast<size_t>(at.head_chunk - 1)];
    at.losses_taken = last.begin + last.rows;
  }
  batch.heads.resize(static_cast<size_t>(at.losses_taken));
  batch.sample_begin = at.losses_taken;
  outcome.forward_slices = static_cast<int32_t>(at.layer + at.head_chunk);
  outcome.forward_done = false;
  c.stats.interrupted_steps += 1;

  StepContext eager = context;
  eager.most_graph_rows = 0;  // rows of a graph do not lie in Saved
  Plan others = without_training(plan);
  StepBatch rest = build_step(others, eager, c.chunk_metadata, c.chunk_results);
  c.chunk_metadata.upload();
  mark("training left");
  c.model.forward_layers(rest.view, c.kv, c.micro->saved, at.layer, c.model.config().num_layers, scratch);
  c.model.forward_heads(rest.view, c.micro->saved, 0, std::ssize(rest.view.chunks), scratch);
  if (trace)
    trace->event("forward without training", begin, now(), {{"layer", double(at.layer)}, {"rows", double(rest.view.rows)}});
  c.apart.emplace(std::move(others), std::move(rest));
  c.micro->stopped = std::move(at);
}

// A chunk alone, or the rest of one that stopped: at most plan.forward_slices layers and head chunks. Its arrays are built anew
// each time, to the same places; what it has in Saved and in its results stays.
void Engine::Impl::run_forward_slices(const Plan& plan, const StepContext& context, StepOutcome& outcome) {
  Core& c = *core;
  MicroBatch& micro = *c.micro;
  if (!plan.resumes) {
    micro.stopped.emplace();
    micro.stopped->plan = only_training(plan);
  }
  MicroBatch::Stopped& chunk = *micro.stopped;
  StepBatch batch = build_step(chunk.plan, context, c.chunk_metadata, c.chunk_results);
  const BatchView& view = batch.view;
  const size_t bytes =
      c.model.scratch_bytes(view.rows, view.train_rows, batch.largest_chunk, view.groups.max_rank, recompute, slice_shape());
  if (c.scratch_storage.bytes() < bytes) {
    c.ops->device().synchronize();  // work under way may still use the old block
    ensure(c.scratch_storage, c.ops->device(), bytes);
  }
  c.chunk_metadata.upload();

  const int64_t layers = c.model.config().num_layers, heads = std::ssize(view.chunks);
  outcome.forward_slices = 0;
  outcome.forward_done = false;
  while (outcome.forward_slices < plan.forward_slices && (chunk.layer < layers || chunk.head_chunk < heads)) {
    if (stop_before_piece(plan)) {
      c.stats.interrupted_steps += 1;
      return;
    }
    const double begin = now();
    Arena scratch(c.scratch_storage.data(), c.scratch_storage.bytes());
    if (chunk.layer < layers) {
      c.model.forward_layers(view, c.kv, micro.saved, chunk.layer, chunk.layer + 1, scratch);
      ++chunk.layer;
    } else {
      c.model.forward_heads(view, micro.saved, chunk.head_chunk, chunk.head_chunk + 1, scratch);
      ++chunk.head_chunk;
    }
    ++outcome.forward_slices;
    launched_piece(chunk.head_chunk > 0 ? "heads" : "forward layer", begin);
    mark("forward slice");
  }
  if (chunk.layer < layers || chunk.head_chunk < heads) return;
  outcome.forward_done = true;
  micro.forwarded += view.train_rows;
  batch.first_loss = chunk.losses_taken;
  c.apart.emplace(std::move(chunk.plan), std::move(batch));
  micro.stopped.reset();
}

// ---------------------------------------------------------------- backward

// True when the micro-batch ended.
bool Engine::Impl::run_backward(const Plan& plan, StepOutcome& outcome) {
  Core& c = *core;
  outcome.backward_slices = 0;
  if (plan.backward_slices == 0 || !c.micro || c.micro->forwarded < c.micro->view.train_rows) return false;
  MicroBatch& micro = *c.micro;
  const auto per_layer = static_cast<int32_t>(micro.layer_slices.size());
  const auto layers = static_cast<int32_t>(c.model.config().num_layers);
  for (; outcome.backward_slices < plan.backward_slices; ++outcome.backward_slices) {
    const int32_t index = layers * per_layer - micro.slices_left;
    const int64_t layer = layers - 1 - index / per_layer;
    if (layer >= micro.view.lowest_layer) {
      if (stop_before_piece(plan)) {
        c.stats.interrupted_steps += 1;
        return false;
      }
      const double begin = now();
      Arena scratch(c.scratch_storage.data(), c.scratch_storage.bytes());
      const auto i = static_cast<size_t>(index % per_layer);
      if (micro.blocks.empty()) c.model.backward_layer(micro.view, micro.saved, layer, scratch);
      else c.model.backward_slice(micro.view, micro.saved, layer, micro.layer_slices[i].part, micro.blocks[i], scratch);
      c.stats.arena_peak = std::max(c.stats.arena_peak, static_cast<int64_t>(scratch.peak()));
      launched_piece("backward", begin);
      mark("backward layer");
    }
    if (--micro.slices_left == 0) {
      ++outcome.backward_slices;
      end_micro_batch();
      return true;
    }
  }
  return false;
}

}  // namespace loquetier
