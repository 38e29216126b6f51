// linear and linear_backward, and the blocked products under them. Measured on one Zen 4 core at k = 768: 94 to 106 GFLOP/s from 16
// rows on, as OpenBLAS (69 at 16 rows, 105 at 2048) and oneDNN (77 and 101); one row streams the weights, where OpenBLAS packs them
// first (4 times slower).
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Block length for a sum of k terms: at most `limit`, all blocks about equal, a multiple of 16.
constexpr int64_t k_block(int64_t k, int64_t limit) { return ceil_div(ceil_div(k, ceil_div(k, limit)), 16) * 16; }

// dot(): a block of w rows (4 x 1024 floats) stays in the first-level cache while x rows stream from the second. Measured at k =
// 768: one block of 768 is 15 % faster than two of 384, because each block ends in a fold of the lanes.
constexpr int64_t kDotK = 1024;
constexpr int64_t kDotRows = 48;  // rows of x that stay in the second-level cache
constexpr int64_t kDotCols = 96;  // columns of one item

// From this many rows on packing the weights pays: T = 16 72 GFLOP/s packed against 94, T = 64 97 against 95, T = 512 104
// against 92.
constexpr int64_t kPackedRows = 48;

}  // namespace

void run(const Kernels& kernels, const DotProduct& p) {
  const int64_t block = k_block(p.k, kDotK);
  for (int64_t k = 0; k < p.k; k += block) {
    for (int64_t t = 0; t < p.rows; t += kDotRows) {
      kernels.dot(std::min(kDotRows, p.rows - t), p.cols, std::min(block, p.k - k), p.x + t * p.ldx + k, p.ldx, p.w + k, p.ldw,
                  p.y + t * p.ldy, p.ldy, k > 0);
    }
  }
}

size_t product_bytes() { return Workspaces::size_for<float>(kBlockK * kBlockN) + Workspaces::size_for<const float*>(kBlockK); }

void run(const Kernels& kernels, Workspaces::Lease& workspace, const Product& p) {
  float* panels = workspace.take<float>(kBlockK * kBlockN);
  const float** rows = workspace.take<const float*>(kBlockK);
  const int64_t block = k_block(p.k, kBlockK);
  for (int64_t j = 0; j < p.n; j += kBlockN) {
    const int64_t cols = std::min(kBlockN, p.n - j);
    for (int64_t k = 0; k < p.k; k += block) {
      const int64_t depth = std::min(block, p.k - k);
      if (p.b_transposed) {
        for (int64_t i = 0; i < cols; ++i) rows[i] = p.b + (j + i) * p.ldb + k;
        kernels.pack_transposed(depth, cols, rows, panels);
      } else {
        for (int64_t i = 0; i < depth; ++i) rows[i] = p.b + (k + i) * p.ldb + j;
        kernels.pack(depth, cols, rows, panels);
      }
      kernels.multiply(p.m, cols, depth, p.a + k * p.k_step, p.row_step, p.k_step, panels, depth, p.alpha, p.c + j, p.ldc,
                       p.accumulate || k > 0);
    }
  }
}

void CpuOps::linear(TensorView x, TensorView w, TensorView bias, TensorView y) {
  check_matrix("linear", "x", x, -1, -1);
  check_matrix("linear", "w", w, -1, x.cols);
  check_matrix("linear", "y", y, x.rows, w.rows);
  if (!bias.empty()) check_vector("linear", "bias", bias, w.rows);
  require(x.cols > 0, "[linear] x: expected at least 1 column, got 0");
  const int64_t rows = x.rows, cols = w.rows, k = x.cols;
  if (rows == 0 || cols == 0) return;
  const float* xs = x.as<float>();
  const float* ws = w.as<float>();
  const float* bs = bias.empty() ? nullptr : bias.as<float>();
  float* ys = y.as<float>();
  const bool packed = !deterministic_ && rows >= kPackedRows;

  const int64_t item_cols = packed ? kBlockN : std::clamp<int64_t>(ceil_div(ceil_div(cols, threads() * 6), 4) * 4, 4, kDotCols);
  const int64_t column_items = ceil_div(cols, item_cols), height = item_rows(rows);
  parallel(ceil_div(rows, height) * column_items, 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, packed ? product_bytes() : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / column_items * height, n = item % column_items * item_cols;
      const int64_t m = std::min(height, rows - t), c = std::min(item_cols, cols - n);
      float* out = ys + t * y.ld + n;
      if (packed) {
        workspace.rewind();
        run(kernels_, workspace, {m, c, k, xs + t * x.ld, x.ld, 1, ws + n * w.ld, w.ld, true, 1.0f, out, y.ld, false});
      } else {
        run(kernels_, {m, c, k, xs + t * x.ld, x.ld, ws + n * w.ld, w.ld, out, y.ld});
      }
      if (bs)
        for (int64_t i = 0; i < m; ++i) kernels_.axpy(1.0f, bs + n, out + i * y.ld, c);
    }
  });
}

void CpuOps::linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) {
  check_matrix("linear_backward", "dy", dy, -1, -1);
  check_matrix("linear_backward", "w", w, dy.cols, -1);
  check_matrix("linear_backward", "dx", dx, dy.rows, w.cols);
  require(dy.cols > 0, "[linear_backward] dy: expected at least 1 column, got 0");
  const int64_t rows = dx.rows, cols = dx.cols;
  if (rows == 0 || cols == 0) return;
  const float* dys = dy.as<float>();
  const float* ws = w.as<float>();
  float* dxs = dx.as<float>();
  const int64_t column_items = ceil_div(cols, kBlockN), height = item_rows(rows);
  parallel(ceil_div(rows, height) * column_items, 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, product_bytes());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / column_items * height, n = item % column_items * kBlockN;
      workspace.rewind();
      run(kernels_, workspace,
          {std::min(height, rows - t), std::min(kBlockN, cols - n), dy.cols, dys + t * dy.ld, dy.ld, 1, ws + n, w.ld, false, 1.0f,
           dxs + t * dx.ld + n, dx.ld, accumulate});
    }
  });
}

}  // namespace loquetier::cpu
