// RMSNorm, with the residual add before it, and its gradient. One block a row; statistics in f32.
#include <algorithm>

#include "common.cuh"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

// Threads for a row of `vectors` vectors: a warp for short rows, at most 8 warps.
unsigned threads_for(int64_t vectors) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(vectors, kWarp) * kWarp, kWarp, 256));
}

// sum = x + delta (delta null: x alone, sum not written); y = sum * rsqrt(mean(sum^2) + eps) * w. The norm sees the rounded sum, as
// backward will. A thread keeps its first kHeld vectors in registers, and reads back what it wrote itself of the others.
template <class T, int N>
__global__ void norm_kernel(const T* x, int64_t ld_x, const T* delta, int64_t ld_delta, const T* w, float eps, T* sum,
                            int64_t ld_sum, T* y, int64_t ld_y, int64_t cols) {
  constexpr int kHeld = 4;
  __shared__ float shared[8];
  const int64_t row = blockIdx.x, first = threadIdx.x * N, step = blockDim.x * N;
  const auto held = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (first + i * step < cols) f(i, first + i * step);
  };
  Pack<T, N> a[kHeld], b[kHeld], weight[kHeld];
  let_next_start();
  held([&](int i, int64_t c) { weight[i] = load_pack<T, N>(w + c); });
  wait_for_previous();
  x += row * ld_x;
  sum += row * ld_sum;
  y += row * ld_y;
  held([&](int i, int64_t c) { a[i] = load_pack<T, N>(x + c); });
  float squares = 0;
  const auto take = [&](Pack<T, N>& v, const Pack<T, N>& more, int64_t c) {
    if (delta != nullptr) {
      for (int i = 0; i < N; ++i) v.v[i] = from_float<T>(to_float(v.v[i]) + to_float(more.v[i]));
      store_pack<T, N>(sum + c, v);
    }
    for (int i = 0; i < N; ++i) squares += to_float(v.v[i]) * to_float(v.v[i]);
  };
  if (delta != nullptr) {
    delta += row * ld_delta;
    held([&](int i, int64_t c) { b[i] = load_pack<T, N>(delta + c); });
  }
  held([&](int i, int64_t c) { take(a[i], b[i], c); });
  for (int64_t c = first + kHeld * step; c < cols; c += step) {
    Pack<T, N> v = load_pack<T, N>(x + c), more;
    if (delta != nullptr) more = load_pack<T, N>(delta + c);
    take(v, more, c);
  }
  const float scale = rsqrtf(block_sum(squares, shared) / static_cast<float>(cols) + eps);
  const auto leave = [&](const Pack<T, N>& v, const Pack<T, N>& g, int64_t c) {
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(to_float(v.v[i]) * scale * to_float(g.v[i]));
    store_pack<T, N>(y + c, out);
  };
  held([&](int i, int64_t c) { leave(a[i], weight[i], c); });
  const T* in = delta != nullptr ? sum : x;
  for (int64_t c = first + kHeld * step; c < cols; c += step) leave(load_pack<T, N>(in + c), load_pack<T, N>(w + c), c);
}

// With r = rsqrt(mean(x^2) + eps) and g = dy * w:  dx += r g - x r^3 mean(g x). y: the forward's output too, bit for bit, or null;
// it may be dy: in the second pass a thread reads its elements before it writes them.
template <class T, int N>
__global__ void norm_backward_kernel(const T* x, int64_t ld_x, const T* w, float eps, const T* dy, int64_t ld_dy, T* dx,
                                     int64_t ld_dx, T* y, int64_t ld_y, int64_t cols) {
  __shared__ float shared[8];
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  float squares = 0, dot = 0;
  for (int64_t c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
    const Pack<T, N> a = load_pack<T, N>(x + row * ld_x + c), d = load_pack<T, N>(dy + row * ld_dy + c), g = load_pack<T, N>(w + c);
    for (int i = 0; i < N; ++i) {
      const float v = to_float(a.v[i]);
      squares += v * v;
      dot += to_float(d.v[i]) * to_float(g.v[i]) * v;
    }
  }
  const float n = static_cast<float>(cols), r = rsqrtf(block_sum(squares, shared) / n + eps);
  const float coefficient = r * r * r * block_sum(dot, shared) / n;
  for (int64_t c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
    const Pack<T, N> a = load_pack<T, N>(x + row * ld_x + c), d = load_pack<T, N>(dy + row * ld_dy + c), g = load_pack<T, N>(w + c);
    Pack<T, N> out = load_pack<T, N>(dx + row * ld_dx + c);
    for (int i = 0; i < N; ++i) {
      out.v[i] = from_float<T>(to_float(out.v[i]) + r * to_float(d.v[i]) * to_float(g.v[i]) - coefficient * to_float(a.v[i]));
    }
    store_pack<T, N>(dx + row * ld_dx + c, out);
    if (y == nullptr) continue;
    for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(to_float(a.v[i]) * r * to_float(g.v[i]));
    store_pack<T, N>(y + row * ld_y + c, out);
  }
}

Launch row_launch(int64_t rows, int64_t vectors, cudaStream_t stream,
                  std::source_location where = std::source_location::current()) {
  return {dim3(static_cast<unsigned>(rows)), dim3(threads_for(vectors)), 0, stream, 1, where, true};
}

}  // namespace

void CudaOps::rms_norm(TensorView x, TensorView w, float eps, TensorView y) {
  expect("rms_norm", "x", x, dtype_, -1, -1);
  expect_vector("rms_norm", "w", w, dtype_, x.cols);
  expect("rms_norm", "y", y, dtype_, x.rows, x.cols);
  if (x.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors = rows_of_vectors(x) && rows_of_vectors(y) && aligned16(w.data);
    const Launch launch = row_launch(x.rows, vectors ? x.cols / 8 : x.cols, stream());
    launch(vectors ? norm_kernel<T, 8> : norm_kernel<T, 1>, static_cast<const T*>(x.data), x.ld, nullptr, 0,
           static_cast<const T*>(w.data), eps, nullptr, 0, static_cast<T*>(y.data), y.ld, x.cols);
  });
}

void CudaOps::add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) {
  expect("add_rms_norm", "x", x, dtype_, -1, -1);
  expect("add_rms_norm", "delta", delta, dtype_, x.rows, x.cols);
  expect_vector("add_rms_norm", "w", w, dtype_, x.cols);
  expect("add_rms_norm", "sum", sum, dtype_, x.rows, x.cols);
  expect("add_rms_norm", "y", y, dtype_, x.rows, x.cols);
  if (x.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors =
        rows_of_vectors(x) && rows_of_vectors(delta) && rows_of_vectors(sum) && rows_of_vectors(y) && aligned16(w.data);
    const Launch launch = row_launch(x.rows, vectors ? x.cols / 8 : x.cols, stream());
    launch(vectors ? norm_kernel<T, 8> : norm_kernel<T, 1>, static_cast<const T*>(x.data), x.ld, static_cast<const T*>(delta.data),
           delta.ld, static_cast<const T*>(w.data), eps, static_cast<T*>(sum.data), sum.ld, static_cast<T*>(y.data), y.ld, x.cols);
  });
}

void CudaOps::rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) {
  rms_norm_backward_onto("rms_norm_backward", x, w, eps, dy, dx, {});
}

void CudaOps::rms_norm_and_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y) {
  expect("rms_norm_and_backward", "y", y, dtype_, x.rows, x.cols);
  rms_norm_backward_onto("rms_norm_and_backward", x, w, eps, dy, dx, y);
}

void CudaOps::rms_norm_backward_onto(const char* op, TensorView x, TensorView w, float eps, TensorView dy, TensorView dx,
                                     TensorView y) {
  expect(op, "x", x, dtype_, -1, -1);
  expect_vector(op, "w", w, dtype_, x.cols);
  expect(op, "dy", dy, dtype_, x.rows, x.cols);
  expect(op, "dx", dx, dtype_, x.rows, x.cols);
  if (x.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const bool vectors =
        rows_of_vectors(x) && rows_of_vectors(dy) && rows_of_vectors(dx) && rows_of_vectors(y) && aligned16(w.data);
    const Launch launch = row_launch(x.rows, vectors ? x.cols / 8 : x.cols, stream());
    launch(vectors ? norm_backward_kernel<T, 8> : norm_backward_kernel<T, 1>, static_cast<const T*>(x.data), x.ld,
           static_cast<const T*>(w.data), eps, static_cast<const T*>(dy.data), dy.ld, static_cast<T*>(dx.data), dx.ld,
           static_cast<T*>(y.data), y.ld, x.cols);
  });
}

}  // namespace loquetier::cuda
