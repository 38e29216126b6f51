#include "plan/micro_rows.h"

#include <algorithm>

namespace loquetier {

namespace {

double causal_pairs(double rows) { return rows * (rows + 1) / 2; }

}  // namespace

void MicroRows::add(MicroExample example, int32_t target_rows, int32_t lowest) {
  example.row_begin = rows;
  rows += example.rows;
  targets.push_back(std::min(target_rows, example.rows));
  lowest_layer = std::min(lowest_layer, lowest);
  examples.push_back(example);
}

void MicroRows::cut(int32_t slice_rows, bool rerun) {
  std::vector<int32_t> sequence_rows;
  for (const MicroExample& e : examples) sequence_rows.push_back(e.rows);
  layer_slices = cut_layer(sequence_rows, slice_rows, rerun);
}

MicroRows::Piece MicroRows::piece(int32_t begin, int32_t count) const {
  Piece piece;
  piece.rows = count;
  const int32_t end = begin + count;
  auto e = std::ranges::upper_bound(examples, begin, {}, &MicroExample::row_begin);
  if (e != examples.begin()) --e;
  for (; e != examples.end() && e->row_begin < end; ++e) {
    const int32_t first = std::max(begin - e->row_begin, 0), last = std::min(end - e->row_begin, e->rows);
    piece.pairs += causal_pairs(last) - causal_pairs(first);
    const int32_t silent = e->rows - targets[static_cast<size_t>(e - examples.begin())];
    piece.heads += std::max(0, last - std::max(first, silent));
  }
  return piece;
}

StepWork MicroRows::slice_work(int32_t index, int32_t layers, double mlp_share) const {
  if (layers - 1 - index / static_cast<int32_t>(layer_slices.size()) < lowest_layer) return {};
  const BackwardSlice& s = layer_slices[static_cast<size_t>(index) % layer_slices.size()];
  const double layer = 1.0 / layers;
  StepWork work;
  work.steps = true;
  work.slices = 1;
  double pairs = 0;
  const bool all = s.part == BackwardPart::whole;
  for (int32_t i = 0; i < s.sequences; ++i) pairs += causal_pairs(examples[static_cast<size_t>(s.sequence_begin + i)].rows);
  if (all || s.part == BackwardPart::attention) work.backward_pairs = pairs * layer;
  if (all) work.add_backward(s.rows, layer);
  if (s.part == BackwardPart::mlp) work.add_backward(s.rows, layer * mlp_share);
  if (s.part == BackwardPart::qkv) work.add_backward(s.rows, layer * (1 - mlp_share));
  if (s.part == BackwardPart::rerun) {
    work.add_forward(s.rows, layer);
    work.train_pairs = pairs * layer;
  }
  return work;
}

}  // namespace loquetier
