// Products of one thread, blocked for the caches around the kernels. The operations split their outputs into items, one product
// each.
//
// Both forms sum over k in an order that depends on k alone (blocks of fixed size, in ascending order), never on m, n or on how the
// output was split. So an output element is the same, bit for bit, in whatever batch it is computed.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace loquetier::cpu {

// y[t, n] (+)= x[t, :] . w[n, :]: operands contiguous along k, nothing is packed. Best for few rows and for deterministic results.
//   x [rows, k], w [cols, k], y [rows, cols]
struct DotProduct {
  int64_t rows = 0, cols = 0, k = 0;
  const float* x = nullptr;
  int64_t ldx = 0;
  const float* w = nullptr;
  int64_t ldw = 0;
  float* y = nullptr;
  int64_t ldy = 0;
};
void run(const Kernels& kernels, const DotProduct& product);

// c (+)= alpha * a B: a(i, p) = a[i * row_step + p * k_step] is broadcast, B is packed first.
//   B(p, j) = b[p * ldb + j], or b[j * ldb + p] when b_transposed
struct Product {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t row_step = 0, k_step = 1;
  const float* b = nullptr;
  int64_t ldb = 0;
  bool b_transposed = false;
  float alpha = 1;
  float* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
};

// Blocks of B: 256 KiB, so that a packed block and the rows of a passing through stay in the second-level cache.
constexpr int64_t kBlockK = 512;
constexpr int64_t kBlockN = 128;
// Rows of one item: at most 512 (with a block of k they fill the second-level cache), split evenly. Packing B is about one vector
// operation per element and item, so the fewer items share the rows the better.
constexpr int64_t kItemRows = 512;
constexpr int64_t item_rows(int64_t rows) {
  const int64_t items = (rows + kItemRows - 1) / kItemRows;
  return items > 1 ? (rows + items - 1) / items : rows;
}

size_t product_bytes();  // workspace of run(Product)
void run(const Kernels& kernels, Workspaces::Lease& workspace, const Product& product);

}  // namespace loquetier::cpu
