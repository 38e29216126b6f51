#include "plan/slices.h"

#include <algorithm>

namespace loquetier {

std::vector<BackwardSlice> cut_layer(std::span<const int32_t> sequence_rows, int32_t slice_rows, bool rerun) {
  int32_t total = 0;
  for (const int32_t rows : sequence_rows) total += rows;
  const auto count = static_cast<int32_t>(sequence_rows.size());
  if (slice_rows <= 0) return {{BackwardPart::whole, 0, total, 0, count}};

  std::vector<BackwardSlice> sequences;  // blocks of whole sequences
  for (int32_t i = 0, row = 0; i < count; ++i) {
    const int32_t rows = sequence_rows[static_cast<size_t>(i)];
    if (sequences.empty() || sequences.back().rows + rows > slice_rows)
      sequences.push_back({BackwardPart::attention, row, 0, i, 0});
    sequences.back().rows += rows;
    sequences.back().sequences += 1;
    row += rows;
  }
  std::vector<BackwardSlice> slices;
  const auto add_sequences = [&](BackwardPart part) {
    for (BackwardSlice slice : sequences) {
      slice.part = part;
      slices.push_back(slice);
    }
  };
  const auto add_rows = [&](BackwardPart part) {
    for (int32_t row = 0; row < total; row += slice_rows) slices.push_back({part, row, std::min(slice_rows, total - row), 0, 0});
  };
  if (rerun) add_sequences(BackwardPart::rerun);
  add_rows(BackwardPart::mlp);
  add_sequences(BackwardPart::attention);
  add_rows(BackwardPart::qkv);
  return slices;
}

}  // namespace loquetier
