// Gradients of packed attention. An item is one key/value head of one sequence: its dk and dv, and dq of its query heads, are its
// own.
//
// For every block of keys and tile of rows the scores are recomputed from q, k and the log-sum-exp:
//   P = exp(scale q k^T - lse), dP = dout v^T, delta = sum(dout * out), dS = scale P (dP - delta)
//   dv += P^T dout, dk += dS^T q, dq += dS k
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

void CpuOps::attention_backward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dout,
                                const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                                TensorView dv) {
  check_packed("attention_backward", q, k, v, batch, shape);
  check_matrix("attention_backward", "out", out, q.rows, q.cols);
  check_matrix("attention_backward", "lse", lse, q.rows, shape.q_heads);
  check_matrix("attention_backward", "dout", dout, q.rows, q.cols);
  check_matrix("attention_backward", "dq", dq, q.rows, q.cols);
  check_matrix("attention_backward", "dk", dk, k.rows, k.cols);
  check_matrix("attention_backward", "dv", dv, v.rows, v.cols);
  int64_t longest = 0;
  attention_items_.clear();
  for (int32_t i = 0; i < batch.sequences; ++i) {
    const int64_t rows = batch.host_q_rows[i];
    require(rows == batch.host_kv_rows[i], "[attention_backward] sequence ", i, ": expected as many query as key rows, got ", rows,
            " and ", batch.host_kv_rows[i]);
    longest = std::max(longest, rows);
    if (rows == 0) continue;
    for (int32_t h = 0; h < shape.kv_heads; ++h) attention_items_.push_back({i, h, batch.host_q_begin[i], rows, 1});
  }
  const int64_t d = shape.head_size, group = shape.q_heads / shape.kv_heads, panel = kernels_.panel;
  const int64_t transposed = (kKeyBlock + panel - 1) / panel * panel * d;                            // packed [D, 64]
  const int64_t plain = (d + panel - 1) / panel * panel * std::max<int64_t>(kKeyBlock, kQueryTile);  // packed [64, D]
  const size_t bytes = 2 * Workspaces::size_for<float>(kQueryTile * kKeyBlock) + 2 * Workspaces::size_for<float>(transposed) +
                       2 * Workspaces::size_for<float>(plain) + Workspaces::size_for<float>(longest * group) +
                       Workspaces::size_for<const float*>(kKeyBlock);
  parallel(static_cast<int64_t>(attention_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, bytes);
    float* p = workspace.take<float>(kQueryTile * kKeyBlock);   // scores, then P [64, 64]
    float* ds = workspace.take<float>(kQueryTile * kKeyBlock);  // dP, then dS [64, 64]
    float* k_t = workspace.take<float>(transposed);
    float* v_t = workspace.take<float>(transposed);
    float* k_plain = workspace.take<float>(plain);
    float* rows_plain = workspace.take<float>(plain);       // dout, then q, of the tile
    float* delta = workspace.take<float>(longest * group);  // [group, rows]
    const float** pointers = workspace.take<const float*>(kKeyBlock);
    const auto point_at = [&](const TensorView& view, int64_t row, int64_t n, int64_t col) {
      for (int64_t i = 0; i < n; ++i) pointers[i] = static_cast<const float*>(view.at(row + i, col));
    };
    for (int64_t index = begin; index < end; ++index) {
      const AttentionItem& item = attention_items_[static_cast<size_t>(index)];
      const int64_t rows = item.rows, q0 = item.row, kv0 = batch.host_kv_begin[item.sequence], kv_col = item.kv_head * d;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t col = (item.kv_head * group + g) * d;
        for (int64_t t = 0; t < rows; ++t)
          delta[g * rows + t] = static_cast<float>(kernels_.dot_double(static_cast<const float*>(out.at(q0 + t, col)),
                                                                       static_cast<const float*>(dout.at(q0 + t, col)), d));
      }
      for (int64_t key = 0; key < rows; key += kKeyBlock) {
        const int64_t n = std::min(kKeyBlock, rows - key);
        point_at(k, kv0 + key, n, kv_col);
        kernels_.pack_transposed(d, n, pointers, k_t);
        kernels_.pack(n, d, pointers, k_plain);
        point_at(v, kv0 + key, n, kv_col);
        kernels_.pack_transposed(d, n, pointers, v_t);
        float* dk_block = static_cast<float*>(dk.at(kv0 + key, kv_col));
        float* dv_block = static_cast<float*>(dv.at(kv0 + key, kv_col));
        bool first = true;  // of what adds to dk and dv of this block
        for (int64_t t = key; t < rows; t += kQueryTile) {
          const int64_t m = std::min(kQueryTile, rows - t);
          for (int64_t g = 0; g < group; ++g, first = false) {
            const int64_t head = item.kv_head * group + g, col = head * d;
            const float* qs = static_cast<const float*>(q.at(q0 + t, col));
            const float* douts = static_cast<const float*>(dout.at(q0 + t, col));
            kernels_.multiply(m, n, d, qs, q.ld, 1, k_t, d, shape.scale, p, kKeyBlock, false);
            kernels_.multiply(m, n, d, douts, dout.ld, 1, v_t, d, 1.0f, ds, kKeyBlock, false);
            for (int64_t i = 0; i < m; ++i) {
              float* p_row = p + i * kKeyBlock;
              float* ds_row = ds + i * kKeyBlock;
              const int64_t seen = std::min(n, t + i - key + 1);
              kernels_.softmax_backward(p_row, ds_row, *static_cast<const float*>(lse.at(q0 + t + i, head)),
                                        delta[g * rows + t + i], shape.scale, p_row, ds_row, seen);
              std::fill(p_row + seen, p_row + n, 0.0f);
              std::fill(ds_row + seen, ds_row + n, 0.0f);
            }
            point_at(dout, q0 + t, m, col);
            kernels_.pack(m, d, pointers, rows_plain);
            kernels_.multiply(n, d, m, p, 1, kKeyBlock, rows_plain, m, 1.0f, dv_block, dv.ld, !first);
            point_at(q, q0 + t, m, col);
            kernels_.pack(m, d, pointers, rows_plain);
            kernels_.multiply(n, d, m, ds, 1, kKeyBlock, rows_plain, m, 1.0f, dk_block, dk.ld, !first);
            kernels_.multiply(m, d, n, ds, kKeyBlock, 1, k_plain, n, 1.0f, static_cast<float*>(dq.at(q0 + t, col)), dq.ld, key > 0);
          }
        }
      }
    }
  });
}

}  // namespace loquetier::cpu
