// Attention forward, over pages and over packed sequences: one routine, which gets rows of keys and values by pointer.
//
// An item is one key/value head and a tile of query rows of one sequence. Keys pass in blocks of 64 that start at multiples of 64
// of the sequence; within a block the order of every sum is fixed and rows are independent. So a row's result is the same, bit for
// bit, whether its sequence lies in pages or packed, and whatever rows share its tile. The backward is in attention_backward.cpp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention.h"
#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

void check_attention(const char* op, const AttentionShape& shape) {
  require(shape.head_size > 0 && shape.kv_heads > 0 && shape.q_heads > 0 && shape.q_heads % shape.kv_heads == 0, "[", op,
          "] shape: expected query heads a multiple of key/value heads, got ", shape.q_heads, " and ", shape.kv_heads, " of size ",
          shape.head_size);
}

void CpuOps::check_packed(const char* op, const TensorView& q, const TensorView& k, const TensorView& v, const PackedBatch& batch,
                          const AttentionShape& shape) const {
  check_attention(op, shape);
  check_matrix(op, "q", q, -1, int64_t{shape.q_heads} * shape.head_size);
  check_matrix(op, "k", k, -1, int64_t{shape.kv_heads} * shape.head_size);
  check_matrix(op, "v", v, k.rows, int64_t{shape.kv_heads} * shape.head_size);
  for (int32_t i = 0; i < batch.sequences; ++i) {
    const int64_t q_begin = batch.host_q_begin[i], q_rows = batch.host_q_rows[i];
    const int64_t kv_begin = batch.host_kv_begin[i], kv_rows = batch.host_kv_rows[i];
    require(q_rows >= 0 && q_begin >= 0 && q_begin + q_rows <= q.rows, "[", op, "] sequence ", i, ": expected query rows within ",
            q.rows, ", got ", q_begin, " + ", q_rows);
    require(kv_rows >= q_rows && kv_begin >= 0 && kv_begin + kv_rows <= k.rows && kv_rows <= batch.max_rows, "[", op, "] sequence ",
            i, ": expected key rows within ", k.rows, ", at least ", q_rows, " and at most ", batch.max_rows, ", got ", kv_begin,
            " + ", kv_rows);
  }
}

// key_rows(sequence, kv_head, begin, n, k_rows, v_rows) points at keys [begin, begin + n) of a sequence.
template <class KeyRows>
void CpuOps::run_attention(const TensorView& q, const AttentionShape& shape, const TensorView& out, const TensorView& lse,
                           KeyRows key_rows) {
  const int64_t d = shape.head_size, group = shape.q_heads / shape.kv_heads;
  const int64_t tile = std::max<int64_t>(1, kQueryTile / group) * group;  // (row, query head) pairs of an item
  const int64_t key_panels = (kKeyBlock + kernels_.panel - 1) / kernels_.panel * kernels_.panel * d;
  const int64_t value_panels = (d + kernels_.panel - 1) / kernels_.panel * kernels_.panel * kKeyBlock;
  const size_t bytes = 2 * Workspaces::size_for<float>(tile * d) + Workspaces::size_for<float>(tile * kKeyBlock) +
                       Workspaces::size_for<float>(tile) + Workspaces::size_for<double>(tile) +
                       Workspaces::size_for<float>(key_panels) + Workspaces::size_for<float>(value_panels) +
                       2 * Workspaces::size_for<const float*>(kKeyBlock);
  parallel(static_cast<int64_t>(attention_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, bytes);
    float* queries = workspace.take<float>(tile * d);         // [tile, D], pair i * group + g
    float* result = workspace.take<float>(tile * d);          // [tile, D]
    float* scores = workspace.take<float>(tile * kKeyBlock);  // [tile, 64]
    float* top = workspace.take<float>(tile);                 // largest score so far
    double* total = workspace.take<double>(tile);             // sum of exp(score - top) so far
    float* keys = workspace.take<float>(key_panels);          // packed K^T [D, 64]
    float* values = workspace.take<float>(value_panels);      // packed V [64, D]
    const float** k_rows = workspace.take<const float*>(kKeyBlock);
    const float** v_rows = workspace.take<const float*>(kKeyBlock);
    for (int64_t index = begin; index < end; ++index) {
      const AttentionItem& item = attention_items_[static_cast<size_t>(index)];
      const int64_t pairs = item.rows * group, columns = int64_t{item.kv_head} * group * d;
      for (int64_t i = 0; i < item.rows; ++i) {
        const float* row = static_cast<const float*>(q.at(item.row + i, columns));
        std::copy(row, row + group * d, queries + i * group * d);  // the heads of a group are adjacent
      }
      std::fill(result, result + pairs * d, 0.0f);
      std::fill(top, top + pairs, -std::numeric_limits<float>::infinity());
      std::fill(total, total + pairs, 0.0);

      const int64_t all = item.visible + item.rows - 1;  // keys that the last row sees
      for (int64_t key = 0; key < all; key += kKeyBlock) {
        const int64_t n = std::min(kKeyBlock, all - key);
        const int64_t first = std::max<int64_t>(0, key - item.visible + 1) * group;  // pairs before it see none of this block
        key_rows(item.sequence, item.kv_head, key, n, k_rows, v_rows);
        kernels_.pack_transposed(d, n, k_rows, keys);
        kernels_.pack(n, d, v_rows, values);
        kernels_.multiply(pairs - first, n, d, queries + first * d, d, 1, keys, d, shape.scale, scores + first * kKeyBlock,
                          kKeyBlock, false);
        for (int64_t pair = first; pair < pairs; ++pair) {
          float* s = scores + pair * kKeyBlock;
          const int64_t seen = std::min(n, item.visible + pair / group - key);
          std::fill(s + seen, s + kKeyBlock, -std::numeric_limits<float>::infinity());
          const float block_top = kernels_.max(s, kKeyBlock);
          if (block_top > top[pair]) {
            const float shrink = std::exp(top[pair] - block_top);
            kernels_.scale(shrink, result + pair * d, result + pair * d, d);
            total[pair] *= static_cast<double>(shrink);
            top[pair] = block_top;
          }
          total[pair] += kernels_.exp_sum(s, kKeyBlock, top[pair], s);
        }
        kernels_.multiply(pairs - first, d, n, scores + first * kKeyBlock, kKeyBlock, 1, values, n, 1.0f, result + first * d, d,
                          true);
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t row = item.row + pair / group, head = int64_t{item.kv_head} * group + pair % group;
        kernels_.scale(static_cast<float>(1.0 / total[pair]), result + pair * d, static_cast<float*>(out.at(row, head * d)), d);
        if (lse.data)
          *static_cast<float*>(lse.at(row, head)) = static_cast<float>(static_cast<double>(top[pair]) + std::log(total[pair]));
      }
    }
  });
}

void CpuOps::attention_paged(TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
                             const AttentionShape& shape, TensorView out) {
  check_attention("attention_paged", shape);
  check_matrix("attention_paged", "q", q, -1, int64_t{shape.q_heads} * shape.head_size);
  check_matrix("attention_paged", "out", out, q.rows, q.cols);
  const int32_t page_size = kv_shape.page_size;
  require(kv_shape.kv_heads == shape.kv_heads && kv_shape.head_size == shape.head_size && page_size > 0 &&
              (page_size & (page_size - 1)) == 0,
          "[attention_paged] kv: expected pages of a power of two of keys of ", shape.kv_heads, " heads of ", shape.head_size,
          ", got ", page_size, " of ", kv_shape.kv_heads, " of ", kv_shape.head_size);
  for (int32_t i = 0; i < batch.sequences; ++i) {
    const int64_t row = batch.host_row_begin[i], rows = batch.host_rows[i], length = batch.host_kv_len[i];
    require(rows >= 0 && row >= 0 && row + rows <= q.rows && length >= rows, "[attention_paged] sequence ", i,
            ": expected rows within ", q.rows, " and at least as many keys, got ", row, " + ", rows, " with ", length, " keys");
    const int64_t pages = (length + page_size - 1) / page_size;
    require(pages <= batch.max_pages, "[attention_paged] sequence ", i, ": expected at most ", batch.max_pages, " pages, got ",
            pages);
    for (int64_t p = 0; p < pages; ++p) {
      const int32_t page = batch.page_table[int64_t{i} * batch.max_pages + p];
      require(page >= 0 && page < kv_shape.pages, "[attention_paged] page_table[", i, "][", p, "]: expected 0 to ",
              kv_shape.pages - 1, ", got ", page);
    }
  }
  const int64_t tile_rows = std::max<int64_t>(1, kQueryTile / (shape.q_heads / shape.kv_heads));
  attention_items_.clear();
  for (int32_t i = 0; i < batch.sequences; ++i) {
    const int64_t rows = batch.host_rows[i], length = batch.host_kv_len[i];
    for (int64_t t = 0; t < rows; t += tile_rows)
      for (int32_t h = 0; h < shape.kv_heads; ++h)
        attention_items_.push_back({i, h, batch.host_row_begin[i] + t, std::min(tile_rows, rows - t), length - rows + t + 1});
  }
  const int64_t d = shape.head_size, slot_width = d * shape.kv_heads;
  const float* k = static_cast<const float*>(kv.k);
  const float* v = static_cast<const float*>(kv.v);
  run_attention(q, shape, out, {},
                [&](int32_t sequence, int32_t head, int64_t begin, int64_t n, const float** k_rows, const float** v_rows) {
                  const int32_t* table = batch.page_table + int64_t{sequence} * batch.max_pages;
                  for (int64_t i = 0; i < n; ++i) {
                    const int64_t key = begin + i;
                    const int64_t at = (int64_t{table[key / page_size]} * page_size + key % page_size) * slot_width + head * d;
                    k_rows[i] = k + at;
                    v_rows[i] = v + at;
                  }
                });
}

void CpuOps::attention_packed(TensorView q, TensorView k, TensorView v, const PackedBatch& batch, const AttentionShape& shape,
                              TensorView out, TensorView lse) {
  check_packed("attention_packed", q, k, v, batch, shape);
  check_matrix("attention_packed", "out", out, q.rows, q.cols);
  if (lse.data) check_matrix("attention_packed", "lse", lse, q.rows, shape.q_heads);
  const int64_t tile_rows = std::max<int64_t>(1, kQueryTile / (shape.q_heads / shape.kv_heads));
  attention_items_.clear();
  for (int32_t i = 0; i < batch.sequences; ++i) {
    const int64_t rows = batch.host_q_rows[i], before = batch.host_kv_rows[i] - rows;
    for (int64_t t = 0; t < rows; t += tile_rows)
      for (int32_t h = 0; h < shape.kv_heads; ++h)
        attention_items_.push_back({i, h, batch.host_q_begin[i] + t, std::min(tile_rows, rows - t), before + t + 1});
  }
  const int64_t d = shape.head_size;
  run_attention(q, shape, out, lse,
                [&](int32_t sequence, int32_t head, int64_t begin, int64_t n, const float** k_rows, const float** v_rows) {
                  for (int64_t i = 0; i < n; ++i) {
                    const int64_t row = batch.host_kv_begin[sequence] + begin + i;
                    k_rows[i] = static_cast<const float*>(k.at(row, head * d));
                    v_rows[i] = static_cast<const float*>(v.at(row, head * d));
                  }
                });
}

}  // namespace loquetier::cpu
