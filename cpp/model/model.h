// The transformer, written once against ops: forward.cpp reads like the model, backward.cpp is the same list upside down, heads.cpp
// ends it (sample | loss). Holds no state but the weights; everything of a step is in BatchView, Saved and arenas.
//
// Rows of a batch: [0, train_rows) training, [train_rows, packed_rows) evaluation (no KV pages; packed attention), [packed_rows,
// rows) prompt chunks and decodes (KV pages).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "model/base_weights.h"
#include "model/saved.h"
#include "ops/ops.h"
#include "plan/slices.h"

namespace loquetier {

enum class HeadKind : uint8_t { train, logprob, sample };  // logprob: evaluation rows and prompt log-probabilities

// Consecutive head rows (rows that need logits), at most kHeadChunk of them, of one kind. Groups count rows from the chunk's begin.
struct HeadChunk {
  HeadKind kind = HeadKind::sample;
  int32_t begin = 0;  // into head_rows
  int32_t rows = 0;
  LoraGroups groups;     // for lm_head adapters; count 0 when there is none
  SampleBatch sampling;  // kind sample
};

// One step's batch: device arrays uploaded together, and what the host needs to launch.
struct BatchView {
  int64_t rows = 0;
  int64_t train_rows = 0;
  int64_t packed_rows = 0;  // training and evaluation
  int64_t saved_row =
      0;  // where the batch's first row lies in Saved: > 0 in a later chunk of a micro-batch, and of rows beside one
  const int32_t* ids = nullptr;        // [rows] device
  const int32_t* positions = nullptr;  // [rows] device
  const int32_t* kv_slots = nullptr;   // [rows] device, -1 for packed rows
  PackedBatch packed;                  // training sequences first, then evaluation; kv_begin counts rows of Saved
  PackedBatch train_packed;            // the training ones alone
  PagedBatch paged;                    // row_begin counts from the first row of the batch
  LoraGroups groups;                   // over all rows
  LoraGroups train_groups;             // over the training rows, with gradients
  int64_t lowest_layer = 0;            // lowest layer any training group adapts; L: none (only lm_head)
  bool dropout = false;                // any training group has dropout

  // Heads, in this order: training targets, log-probability rows, rows to sample.
  int32_t head_count = 0;
  const int32_t* head_rows = nullptr;  // [head_count] device: row of the batch
  const LossRow* loss_rows = nullptr;  // [head_count] device; unused for rows to sample
  std::vector<HeadChunk> chunks;
  float* logprob = nullptr;    // [head_count] device, out: of the target, or of the sampled token
  float* loss = nullptr;       // [head_count] device, out (train, logprob)
  int32_t* sampled = nullptr;  // [head_count] device, out (sample rows)
  TensorView top_ids;          // [sample rows, N] i32, out, or empty
  TensorView top_logprobs;     // [sample rows, N] f32, out, or empty
};

struct KvCache {
  KvShape shape;
  std::vector<KvLayer> layers;
  Buffer storage;
  static KvCache make(Ops& ops, const ModelConfig& config, int64_t pages, int32_t page_size);
  static size_t page_bytes(const ModelConfig& config, DType dtype, int32_t page_size);  // all layers, k and v
};

// Rows of a micro-batch that a slice of backward is about. Groups and sequences count rows from the block's begin.
struct BackwardBlock {
  int64_t row_begin = 0;
  int64_t rows = 0;
  LoraGroups groups;
  PackedBatch packed;  // parts attention and rerun: whole sequences
};

// What the scratch of a micro-batch in chunks and slices depends on beside the step's own rows.
struct SliceShape {
  bool chunked = false;
  int64_t block_rows = 0;  // largest block of a slice
  int64_t saved_rank = 0;  // columns of S that are saved
};

// Head rows of one vocabulary product at most. An H200 does 1,024 rows at full speed; twice as many logits gain nothing.
constexpr int64_t kHeadChunk = 1024;

class Model {
 public:
  Model(std::shared_ptr<const ModelWeights> weights, Ops& ops);

  const ModelConfig& config() const { return weights_->config; }
  // Scratch bytes that forward, heads and backward need for such a step (counting mode of the same carving). head_rows: of the
  // largest head chunk.
  size_t scratch_bytes(int64_t rows, int64_t train_rows, int64_t head_rows, int64_t rank, Recompute recompute,
                       const SliceShape& slices = {}) const;
  size_t saved_bytes(int64_t rows, int64_t train_rows, int64_t rank, Recompute recompute, bool chunked = false) const;
  // The same of a model that is not there.
  static size_t scratch_bytes(const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t head_rows,
                              int64_t rank, Recompute recompute, const SliceShape& slices = {});
  static size_t saved_bytes(const ModelConfig& config, DType dtype, int64_t rows, int64_t train_rows, int64_t rank,
                            Recompute recompute, bool chunked = false);

  // Runs every layer over all rows, then the heads of every chunk: outputs of BatchView are written. With training rows, `saved` is
  // carved from saved_arena, its dx holds the gradient of final_x after this call, and lm_head's gradients are in. Without, `saved`
  // may be null.
  void forward(const BatchView& batch, KvCache& kv, Saved* saved, Arena& saved_arena, Arena& scratch, Recompute recompute) const;

  // The same in pieces, for a micro-batch whose rows come in chunks. reserve() carves what all chunks of `train_rows` rows in all,
  // and the rows beside each, need (see saved.h). For each chunk: forward_layers() over all layers, in one call or several, then
  // forward_heads() over all of its head chunks. Between the calls only Saved is kept, so that rows which began together may go on
  // apart: each of the two batches with the saved_row that its first row had. `leave` is asked behind each layer of the call, and
  // ends it when true; the result is the layer that comes next.
  Saved reserve(Arena& saved_arena, int64_t rows, int64_t train_rows, int64_t rank, Recompute recompute) const;
  int64_t forward_layers(const BatchView& batch, KvCache& kv, const Saved& saved, int64_t first, int64_t last, Arena& scratch,
                         const std::function<bool()>& leave = {}) const;
  void forward_heads(const BatchView& batch, const Saved& saved, int64_t first, int64_t last, Arena& scratch) const;
  // The same of a batch of rows with pages, in two pieces: all layers, and the heads over what they left. `scratch` of both is in
  // the same state. decode_layers() touches nothing but the stream, so it can be recorded (Ops::capture).
  void decode_layers(const BatchView& batch, KvCache& kv, Arena scratch) const;
  void decode_heads(const BatchView& batch, Arena& scratch) const;

  // One layer of backward, from layer = L - 1 down to batch.lowest_layer: saved.dx goes from the gradient of the layer's output to
  // that of its input (not needed and not computed for lowest_layer), gradients of the layer's adapters are added. Touches training
  // rows only. `batch` needs only its training part: train_packed, train_groups, train_rows, lowest_layer, positions.
  void backward_layer(const BatchView& batch, const Saved& saved, int64_t layer, Arena& scratch) const;
  // A slice of it: one part over a block of rows, in the order of cut_layer(). Of a Saved that reserve() made.
  void backward_slice(const BatchView& batch, const Saved& saved, int64_t layer, BackwardPart part, const BackwardBlock& block,
                      Arena& scratch) const;

 private:
  struct BackwardLayer;
  int64_t run_layers(const BatchView& batch, KvCache& kv, const Saved* saved, int64_t first, int64_t last,
                     struct ForwardScratch& work, const std::function<bool()>& leave = {}) const;
  BackwardLayer layer_of(const BatchView& batch, const Saved& saved, int64_t layer) const;
  void backward_part(const BackwardLayer& of, BackwardPart part, const BackwardBlock& block, const BackwardState& state,
                     const struct BackwardScratch& work) const;

  std::shared_ptr<const ModelWeights> weights_;
  Ops& ops_;
};

}  // namespace loquetier
