// Row moves, conversion and SwiGLU. All are bandwidth-bound: a thread moves 16 bytes where rows allow it, one element
// otherwise.
#include "common.cuh"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

constexpr int kThreads = 256;

// A grid over rows x vectors of N columns.
Launch over(int64_t rows, int64_t vectors, cudaStream_t stream, std::source_location where = std::source_location::current()) {
  return {dim3(static_cast<unsigned>(ceil_div(rows * vectors, kThreads))), dim3(kThreads), 0, stream, 1, where, true};
}

// The (row, column) of this thread, or false past the end. cols counts elements and is a multiple of N. Every kernel here begins
// with it, so it also waits for the launch in front.
template <int N>
__device__ inline bool place(int64_t rows, int64_t cols, int64_t& row, int64_t& col) {
  let_next_start();
  wait_for_previous();
  const int64_t vectors = cols / N, i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= rows * vectors) return false;
  row = i / vectors;
  col = (i - row * vectors) * N;
  return true;
}

__global__ void take_tokens_kernel(const int32_t* const* from, int32_t* ids, int64_t n) {
  int64_t row, col;
  if (place<1>(n, 1, row, col) && from[row] != nullptr) ids[row] = *from[row];
}

// y[i] = x[index[i]]
template <class T, int N>
__global__ void gather_kernel(const T* x, int64_t ld_x, const int32_t* index, T* y, int64_t ld_y, int64_t rows, int64_t cols) {
  int64_t row, col;
  if (!place<N>(rows, cols, row, col)) return;
  store_pack<T, N>(y + row * ld_y + col, load_pack<T, N>(x + index[row] * ld_x + col));
}

// y[index[i]] += x[i]
template <class T, int N>
__global__ void scatter_add_kernel(const T* x, int64_t ld_x, const int32_t* index, T* y, int64_t ld_y, int64_t rows, int64_t cols) {
  int64_t row, col;
  if (!place<N>(rows, cols, row, col)) return;
  T* out = y + index[row] * ld_y + col;
  const Pack<T, N> a = load_pack<T, N>(x + row * ld_x + col);
  Pack<T, N> b = load_pack<T, N>(out);
  for (int i = 0; i < N; ++i) b.v[i] = from_float<T>(to_float(a.v[i]) + to_float(b.v[i]));
  store_pack<T, N>(out, b);
}

template <class S, class D>
__global__ void convert_kernel(const S* src, int64_t ld_src, D* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  int64_t row, col;
  if (!place<1>(rows, cols, row, col)) return;
  dst[row * ld_dst + col] = from_float<D>(to_float(src[row * ld_src + col]));
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = silu(gate) * up
template <class T, int N>
__global__ void swiglu_kernel(const T* gate_up, int64_t ld_in, T* y, int64_t ld_y, int64_t rows, int64_t cols) {
  int64_t row, col;
  if (!place<N>(rows, cols, row, col)) return;
  const Pack<T, N> gate = load_pack<T, N>(gate_up + row * ld_in + col), up = load_pack<T, N>(gate_up + row * ld_in + cols + col);
  Pack<T, N> out;
  for (int i = 0; i < N; ++i) {
    const float g = to_float(gate.v[i]);
    out.v[i] = from_float<T>(g * sigmoid(g) * to_float(up.v[i]));
  }
  store_pack<T, N>(y + row * ld_y + col, out);
}

// d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g). y: the forward's output too, or null. dgate_up may be gate_up and y may be
// dy: a thread reads its elements before it writes them.
template <class T, int N>
__global__ void swiglu_backward_kernel(const T* gate_up, int64_t ld_in, const T* dy, int64_t ld_dy, T* out, int64_t ld_out, T* y,
                                       int64_t ld_y, int64_t rows, int64_t cols) {
  int64_t row, col;
  if (!place<N>(rows, cols, row, col)) return;
  const Pack<T, N> gate = load_pack<T, N>(gate_up + row * ld_in + col), up = load_pack<T, N>(gate_up + row * ld_in + cols + col),
                   grad = load_pack<T, N>(dy + row * ld_dy + col);
  Pack<T, N> dgate, dup, again;
  for (int i = 0; i < N; ++i) {
    const float g = to_float(gate.v[i]), d = to_float(grad.v[i]), s = sigmoid(g);
    dgate.v[i] = from_float<T>(d * to_float(up.v[i]) * (s + g * s * (1.0f - s)));
    dup.v[i] = from_float<T>(d * g * s);
    again.v[i] = from_float<T>(g * s * to_float(up.v[i]));
  }
  store_pack<T, N>(out + row * ld_out + col, dgate);
  store_pack<T, N>(out + row * ld_out + cols + col, dup);
  if (y != nullptr) store_pack<T, N>(y + row * ld_y + col, again);
}

}  // namespace

void CudaOps::embedding(const int32_t* ids, TensorView table, TensorView y) {
  expect("embedding", "table", table, dtype_, -1, -1);
  expect("embedding", "y", y, dtype_, -1, table.cols);
  gather_rows(table, ids, y);
}

void CudaOps::take_tokens(const int32_t* const* from, int32_t* ids, int64_t n) {
  if (n == 0) return;
  device_.use();
  over(n, 1, stream())(take_tokens_kernel, from, ids, n);
}

void CudaOps::gather_rows(TensorView x, const int32_t* index, TensorView y) {
  expect("gather_rows", "x", x, dtype_, -1, -1);
  expect("gather_rows", "y", y, dtype_, -1, x.cols);
  if (y.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(x) && rows_of_vectors(y);
    over(y.rows, vectors ? y.cols / 8 : y.cols, stream())(vectors ? gather_kernel<T, 8> : gather_kernel<T, 1>,
                                                          static_cast<const T*>(x.data), x.ld, index, static_cast<T*>(y.data), y.ld,
                                                          y.rows, y.cols);
  });
}

void CudaOps::scatter_add_rows(TensorView x, const int32_t* index, TensorView y) {
  expect("scatter_add_rows", "x", x, dtype_, -1, -1);
  expect("scatter_add_rows", "y", y, dtype_, -1, x.cols);
  if (x.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(x) && rows_of_vectors(y);
    over(x.rows, vectors ? x.cols / 8 : x.cols, stream())(vectors ? scatter_add_kernel<T, 8> : scatter_add_kernel<T, 1>,
                                                          static_cast<const T*>(x.data), x.ld, index, static_cast<T*>(y.data), y.ld,
                                                          x.rows, x.cols);
  });
}

namespace {

template <class F>
void dispatch_float(const char* tensor, DType dtype, F&& f) {
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16, "[convert] ", tensor,
          ": expected f32, f16 or bf16, got ", name_of(dtype));
  if (dtype == DType::f32) f.template operator()<float>();
  else dispatch_half(dtype, f);
}

}  // namespace

void CudaOps::convert(TensorView src, TensorView dst) {
  expect("convert", "src", src, src.dtype, -1, -1);
  expect("convert", "dst", dst, dst.dtype, src.rows, src.cols);
  dispatch_float("src", src.dtype, [&]<class S>() {
    dispatch_float("dst", dst.dtype, [&]<class D>() {
      if (src.size() == 0) return;
      device_.use();
      over(src.rows, src.cols, stream())(convert_kernel<S, D>, static_cast<const S*>(src.data), src.ld, static_cast<D*>(dst.data),
                                         dst.ld, src.rows, src.cols);
    });
  });
}

void CudaOps::swiglu(TensorView gate_up, TensorView y) {
  expect("swiglu", "gate_up", gate_up, dtype_, -1, -1);
  require(gate_up.cols % 2 == 0, "[swiglu] gate_up: expected an even number of columns, got ", gate_up.cols);
  expect("swiglu", "y", y, dtype_, gate_up.rows, gate_up.cols / 2);
  if (y.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(gate_up) && rows_of_vectors(y);
    over(y.rows, vectors ? y.cols / 8 : y.cols, stream())(vectors ? swiglu_kernel<T, 8> : swiglu_kernel<T, 1>,
                                                          static_cast<const T*>(gate_up.data), gate_up.ld, static_cast<T*>(y.data),
                                                          y.ld, y.rows, y.cols);
  });
}

void CudaOps::swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) {
  swiglu_backward_onto("swiglu_backward", gate_up, dy, dgate_up, {});
}

void CudaOps::swiglu_and_backward(TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) {
  expect("swiglu_and_backward", "y", y, dtype_, dy.rows, dy.cols);
  swiglu_backward_onto("swiglu_and_backward", gate_up, dy, dgate_up, y);
}

void CudaOps::swiglu_backward_onto(const char* op, TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) {
  expect(op, "dy", dy, dtype_, -1, -1);
  expect(op, "gate_up", gate_up, dtype_, dy.rows, 2 * dy.cols);
  expect(op, "dgate_up", dgate_up, dtype_, dy.rows, 2 * dy.cols);
  if (dy.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(gate_up) && rows_of_vectors(dy) && rows_of_vectors(dgate_up) && rows_of_vectors(y);
    over(dy.rows, vectors ? dy.cols / 8 : dy.cols, stream())(vectors ? swiglu_backward_kernel<T, 8> : swiglu_backward_kernel<T, 1>,
                                                             static_cast<const T*>(gate_up.data), gate_up.ld,
                                                             static_cast<const T*>(dy.data), dy.ld, static_cast<T*>(dgate_up.data),
                                                             dgate_up.ld, static_cast<T*>(y.data), y.ld, dy.rows, dy.cols);
  });
}

}  // namespace loquetier::cuda
