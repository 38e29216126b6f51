// What attention forward and backward share: block sizes and the check of the shape.
#pragma once

#include <cstdint>

#include "ops/ops.h"

namespace loquetier::cpu {

constexpr int64_t kKeyBlock =
    64;  // keys per block: with head size 64 to 128 keys, values and scores of a tile stay in the second-level cache
constexpr int64_t kQueryTile = 64;  // (row, query head) pairs per item of the forward, rows per tile of the backward

void check_attention(const char* op, const AttentionShape& shape);

}  // namespace loquetier::cpu
