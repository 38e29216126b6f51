// Which cluster computes which items of a fused product (lora_fused.h), and which items are divided.
//
// Items are dealt to the clusters in turn. In the last turn, where they are fewer than the clusters, the others help: every item's
// steps over w are cut at the same places, because clusters that walk along w and x together read both from memory once; pieces of
// even length at uneven places took longer than no division at all. What a division saves must exceed the exchange of sums.
//
// Tiles of 64 rows read w for half the work. Two of them go on a cluster in place of an item of the last turn: behind many turns
// spread over the whole time, since all of them together at the end wait for memory; behind few turns at the end, where the
// second one's first steps are lent by others if sums are long. 2,112 rows of an 8B Llama's layer on an H200, its four products
// over those of 2,048 rows: 1.066 without either, 1.043 spread out, 1.03 with both.
#pragma once

#include "lora_fused.h"

namespace loquetier::cuda {

// Rows in strips, into args.table: pairs of tiles from the top, then what is left over as a strip of 128 rows, of 64, or both.
// Needs args.column_tiles. False: too many rows.
bool fused_strips(int64_t rows, FusedArgs& args);
// Fills args.schedule from the strips and column tiles, for at most `most` clusters at a time. Returns how many have work.
int32_t fused_schedule(FusedArgs& args, int32_t most);

}  // namespace loquetier::cuda
