// A micro-batch from its first row's forward to the end of its backward: what of its examples the steps need (the jobs may be
// cancelled meanwhile), the training view over all of its rows, and the blocks that slices of its backward are about.
//
// Its arrays lie in a metadata block of its own, which is sent with its first slice of backward, and again when the adapters have
// left the pool and come back elsewhere.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/blob.h"
#include "engine/records.h"
#include "model/model.h"
#include "plan/batch.h"
#include "plan/slices.h"

namespace loquetier {

struct MicroExampleData {
  MicroExample place;
  PreparedExample data;
  AdapterPtr adapter;
  uint64_t key = 0;  // of its dropout masks: a row's is mix_key(key, position)
};

struct MicroBatch {
  std::vector<MicroExampleData> examples;               // in row order
  std::map<std::pair<int64_t, int32_t>, size_t> index;  // (job, example) -> place in examples
  BatchView view;                                       // its training part, over all rows
  Saved saved;
  std::vector<BackwardSlice> layer_slices;
  std::vector<BackwardBlock> blocks;                     // beside layer_slices; empty when a slice is a whole layer
  int32_t slices_left = 0;                               // of backward
  int32_t rank = 0;                                      // largest of its adapters
  int64_t forwarded = 0;                                 // rows whose forward is complete
  std::vector<std::shared_ptr<AdapterWeights>> weights;  // of each training group
  std::vector<int64_t> jobs;
  std::vector<AdapterPtr> drop;  // adapters whose gradients are dropped when it ends (cancelled jobs)
  // A chunk that stopped between two layers, or between two of its head chunks.
  struct Stopped {
    Plan plan;  // its segments alone
    int64_t layer = 0, head_chunk = 0;
    int32_t losses_taken = 0;  // of its head rows: those that it had in the pass that it left
  };
  std::optional<Stopped> stopped;

  const MicroExampleData& find(int64_t job, int32_t example) const;
};

// Fills everything but `saved`. in: not yet uploaded. slice_rows 0: a slice is a layer.
MicroBatch build_micro_batch(const Plan& plan, const ModelConfig& config, std::vector<MicroExampleData> examples,
                             std::vector<std::shared_ptr<AdapterWeights>> weights_of_examples, int32_t slice_rows, bool rerun,
                             Blob& in);
// What its arrays take, at most.
size_t micro_metadata_bytes(size_t rows, size_t sequences, size_t groups, size_t slices);
// Points the groups at where the adapters' weights lie now, and sends the block when it does not lie on the device like that.
void refresh_micro_batch(MicroBatch& micro, Blob& in);

}  // namespace loquetier
