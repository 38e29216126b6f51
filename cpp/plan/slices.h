// How the backward of one layer is cut into slices: by part of the layer, and inside a part by rows. The planner counts and prices
// slices, the engine runs them; both cut with this function, so a slice's number means the same to both.
//
// Rows are independent of each other but in attention, so a block of the other parts may begin and end anywhere; blocks of
// attention (and of the layer's rerun, with Recompute::layer) hold whole sequences.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace loquetier {

constexpr int32_t kHeadSlice = 256;  // head rows of a forward slice, about a millisecond of an 8B model's vocabulary product

enum class BackwardPart : uint8_t { whole, rerun, mlp, attention, qkv };

struct BackwardSlice {
  BackwardPart part = BackwardPart::whole;
  int32_t row_begin = 0;  // of the micro-batch
  int32_t rows = 0;
  int32_t sequence_begin = 0;  // of the parts with attention
  int32_t sequences = 0;
};

// The slices of one layer, in the order they run. sequence_rows: of the micro-batch's examples. slice_rows 0: one slice, all of it.
// rerun: the layer's forward is computed again first.
std::vector<BackwardSlice> cut_layer(std::span<const int32_t> sequence_rows, int32_t slice_rows, bool rerun);

}  // namespace loquetier
