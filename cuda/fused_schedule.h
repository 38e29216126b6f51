// Which cluster computes which items of a fused product (lora_fused.h), and which items are divided.
//
// Items are dealt to the clusters in turn. In the last turn, where they are fewer than the clusters, the others help: every item's
// steps over w are cut at the same places, because clusters that walk along w and x together read both from memory once; pieces of
// even length at uneven places took longer than no division at all. What a division saves must exceed the exchange of sums.
#pragma once

#include "lora_fused.h"

namespace loquetier::cuda {

// Rows in strips, into args.table: pairs of tiles from the top, then what is left over as a strip of 128 rows, of 64, or both.
// Needs args.column_tiles. False: too many rows.
bool fused_strips(int64_t rows, FusedArgs& args);
// Fills args.schedule from the strips and column tiles, for at most `most` clusters at a time. Returns how many have work.
int32_t fused_schedule(FusedArgs& args, int32_t most);

}  // namespace loquetier::cuda
