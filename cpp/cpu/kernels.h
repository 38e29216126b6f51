// The inner loops of the CPU backend, as a table of functions: one table per instruction set, chosen once at run time.
//
// Order of summation is part of the contract. Every output element is computed by the same sequence of operations whatever the
// number of rows, columns or tiles beside it; that is what makes results independent of the batch (see gemm.h). All floats are f32.
// The bodies are in kernels_impl.h, compiled by kernels_*.cpp; gemm.cpp and attention.cpp block for the caches around them.
#pragma once

#include <cstdint>

namespace loquetier::cpu {

struct Kernels {
  const char* name;
  int64_t lanes;      // floats in one vector
  int64_t panel;      // columns of one packed panel (two vectors)
  int64_t tile_rows;  // rows of one tile of multiply()

  // y[t, n] = x[t, :] . w[n, :], or += when accumulate.          x [rows, k], w [cols, k], y [rows, cols]
  // Lanes run over k and are folded by a fixed tree at the end.
  void (*dot)(int64_t rows, int64_t cols, int64_t k, const float* x, int64_t ldx, const float* w, int64_t ldw, float* y,
              int64_t ldy, bool accumulate);

  // Packs B [k, n] into panels [ceil(n / panel)][k][panel], zero-filled on the right.
  void (*pack)(int64_t k, int64_t n, const float* const* rows, float* panels);             // rows[i]: row i of B, i < k
  void (*pack_transposed)(int64_t k, int64_t n, const float* const* rows, float* panels);  // rows[j]: column j of B, j < n

  // c[i, j] = alpha * sum_p a[i, p] B[p, j], p in ascending order, or += when accumulate.   a(i, p) = a[i * row_step + p * k_step]
  // `stride`: rows of B that the panels were packed with (>= k; a shorter product reads the first k).
  void (*multiply)(int64_t m, int64_t n, int64_t k, const float* a, int64_t row_step, int64_t k_step, const float* panels,
                   int64_t stride, float alpha, float* c, int64_t ldc, bool accumulate);

  float (*max)(const float* x, int64_t n);  // -inf when n = 0; NaN is passed over
  double (*exp_sum)(const float* x, int64_t n, float shift,
                    float* y);                                      // y = exp(x - shift) unless null (may be x); returns the sum
  double (*dot_double)(const float* x, const float* y, int64_t n);  // sum x y, partial sums of a few hundred terms in f32
  void (*axpy)(float alpha, const float* x, float* y, int64_t n);   // y += alpha x
  void (*scale)(float alpha, const float* x, float* y, int64_t n);  // y = alpha x (may be x)
  void (*scale_by)(float alpha, const float* x, const float* w, float* y, int64_t n);  // y = alpha x w (may be x)
  // dx += alpha * w * dy - beta * x
  void (*norm_backward)(float alpha, const float* w, const float* dy, float beta, const float* x, float* dx, int64_t n);
  double (*dot3_double)(const float* x, const float* y, const float* z, int64_t n);            // sum x y z
  void (*rotate)(const float* cos, const float* sin, float* first, float* second, int64_t n);  // (a, b) -> (a c - b s, b c + a s)
  void (*swiglu)(const float* gate, const float* up, float* y, int64_t n);
  void (*swiglu_backward)(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n);  // may alias
  // ds = p * (dp - delta) * scale with p = exp(s - lse); p and ds may be s and dp.
  void (*softmax_backward)(const float* s, const float* dp, float lse, float delta, float scale, float* p, float* ds, int64_t n);
};

// Null where the build or the processor lacks the instruction set.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

// The best of them on this processor.
const Kernels& select_kernels();

}  // namespace loquetier::cpu
