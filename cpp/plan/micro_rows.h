// The rows of one micro-batch as the planner sees them: its examples in row order, and what any piece of their forward and backward
// costs in the terms of the cost model.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/batch.h"
#include "plan/slices.h"

namespace loquetier {

struct MicroRows {
  std::vector<MicroExample> examples;
  std::vector<int32_t> targets;  // beside examples: how many of its last rows have a loss
  int32_t rows = 0;
  int32_t lowest_layer = INT32_MAX;  // backward does nothing below it
  std::vector<BackwardSlice> layer_slices;

  void add(MicroExample example, int32_t target_rows, int32_t lowest);  // row_begin is set here
  void cut(int32_t slice_rows, bool rerun);                             // after the last add()
  int32_t slices(int32_t layers) const { return layers * static_cast<int32_t>(layer_slices.size()); }

  struct Piece {
    double pairs = 0;  // (query, key)
    int32_t heads = 0;
    int32_t rows = 0;
  };
  Piece piece(int32_t begin, int32_t count) const;  // forward of rows [begin, begin + count)
  // Of backward slice `index`, counted from the top layer's first. mlp_share: of a layer's products that part mlp has.
  StepWork slice_work(int32_t index, int32_t layers, double mlp_share) const;
};

}  // namespace loquetier
