// RMSNorm, with the residual add before it, and its gradient. One block a row; statistics in f32.
#include <algorithm>

#include "common.cuh"
#include "cuda_ops.h"
#include "shares.cuh"

namespace loquetier::cuda {

namespace {

// Threads for a row of `vectors` vectors: a warp for short rows, at most 8 warps.
unsigned threads_for(int64_t vectors) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(vectors, kWarp) * kWarp, kWarp, 256));
}

// What is added to x: a matrix, or nothing where it is null; or the shares of k of a product (linear_decode.h).
template <class T, int N>
struct MatrixDelta {
  using Value = Pack<T, N>;
  static constexpr int held = 2;
  static constexpr bool rehearsed = false;
  __device__ MatrixDelta rehearsal(const void*) const { return *this; }
  const T* p;
  int64_t ld;
  __device__ bool any() const { return p != nullptr; }
  __device__ Value at(int64_t row, int64_t c) const { return load_pack<T, N>(p + row * ld + c); }
};
struct SharesDelta {
  using Value = Pack<float, 8>;
  static constexpr int held = 2;
  static constexpr bool rehearsed = true;
  __device__ SharesDelta rehearsal(const void* p) const { return {{static_cast<const float*>(p), of.count, 0, 0}}; }
  KShares of;
  __device__ bool any() const { return true; }
  __device__ Value at(int64_t row, int64_t c) const { return sum_of_shares<8>(of, row, c); }
};

// sum = x + delta (without delta sum is not written); y = sum * rsqrt(mean(sum^2) + eps) * w. The norm sees the rounded sum, as
// backward will. A thread keeps its first vectors in registers, and reads back what it wrote itself of the others.
// With shares (decode steps, where other kernels have taken the instruction cache) a block goes through it twice: the first time
// before the launch in front has ended, with the beginning of w in place of what that writes, and nothing stored. 0.5 us a launch.
template <class T, int N, class Delta>
__global__ void norm_kernel(const T* x, int64_t ld_x, const Delta delta, const T* w, float eps, T* sum, int64_t ld_sum, T* y,
                            int64_t ld_y, int64_t cols) {
  constexpr int kHeld = Delta::held;
  using More = typename Delta::Value;
  __shared__ float shared[8];
  const int64_t row = blockIdx.x, first = threadIdx.x * N, step = blockDim.x * N;
  const auto held = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (first + i * step < cols) f(i, first + i * step);
  };
  Pack<T, N> a[kHeld], weight[kHeld];
  More b[kHeld];
  let_next_start();
  held([&](int i, int64_t c) { weight[i] = load_pack<T, N>(w + c); });
  sum += row * ld_sum;
  y += row * ld_y;
#pragma unroll 1
  for (bool real = !Delta::rehearsed || cols < 2 * N;; real = true) {
    if (real) wait_for_previous();
    const T* from = real ? x + row * ld_x : w;
    const Delta more_of = real ? delta : delta.rehearsal(w);
    const int64_t factor = real ? 1 : 0;
    held([&](int i, int64_t c) { a[i] = load_pack<T, N>(from + c * factor); });
    if (delta.any()) held([&](int i, int64_t c) { b[i] = more_of.at(row * factor, c * factor); });
    float squares = 0;
    const auto take = [&](Pack<T, N>& v, const More& more, int64_t c) {
      if (delta.any()) {
        for (int i = 0; i < N; ++i) v.v[i] = from_float<T>(to_float(v.v[i]) + to_float(more.v[i]));
        if (real) store_pack<T, N>(sum + c, v);
      }
      for (int i = 0; i < N; ++i) squares += to_float(v.v[i]) * to_float(v.v[i]);
    };
    held([&](int i, int64_t c) { take(a[i], b[i], c); });
    for (int64_t c = first + kHeld * step; c < cols && real; c += step) {
      Pack<T, N> v = load_pack<T, N>(from + c);
      More more;
      if (delta.any()) more = more_of.at(row, c);
      take(v, more, c);
    }
    const float scale = rsqrtf(block_sum(squares, shared) / static_cast<float>(cols) + eps);
    const auto leave = [&](const Pack<T, N>& v, const Pack<T, N>& g, int64_t c) {
      Pack<T, N> out;
      for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(to_float(v.v[i]) * scale * to_float(g.v[i]));
      if (real) store_pack<T, N>(y + c, out);
    };
    held([&](int i, int64_t c) { leave(a[i], weight[i], c); });
    const T* in = delta.any() ? sum : from;
    for (int64_t c = first + kHeld * step; c < cols && real; c += step) leave(load_pack<T, N>(in + c), load_pack<T, N>(w + c), c);
    if (real) return;
  }
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

template <class T, int N, class Delta>
void launch_norm(TensorView x, const Delta& delta, TensorView w, float eps, TensorView sum, TensorView y, cudaStream_t stream,
                 std::source_location where = std::source_location::current()) {
  row_launch(x.rows, x.cols / N, stream, where)(norm_kernel<T, N, Delta>, static_cast<const T*>(x.data), x.ld, delta,
                                                static_cast<const T*>(w.data), eps, static_cast<T*>(sum.data), sum.ld,
                                                static_cast<T*>(y.data), y.ld, x.cols);
}

}  // namespace

void CudaOps::rms_norm(TensorView x, TensorView w, float eps, TensorView y) {
  expect("rms_norm", "x", x, dtype_, -1, -1);
  expect_vector("rms_norm", "w", w, dtype_, x.cols);
  expect("rms_norm", "y", y, dtype_, x.rows, x.cols);
  norm_onto(x, {}, w, eps, {}, y);
}

void CudaOps::add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) {
  expect_add_rms_norm("add_rms_norm", x, delta, w, sum, y);
  norm_onto(x, delta, w, eps, sum, y);
}

void CudaOps::expect_add_rms_norm(const char* op, TensorView x, TensorView delta, TensorView w, TensorView sum,
                                  TensorView y) const {
  expect(op, "x", x, dtype_, -1, -1);
  expect(op, "delta", delta, dtype_, x.rows, x.cols);
  expect_vector(op, "w", w, dtype_, x.cols);
  expect(op, "sum", sum, dtype_, x.rows, x.cols);
  expect(op, "y", y, dtype_, x.rows, x.cols);
}

void CudaOps::norm_onto(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) {
  if (x.size() == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const auto matrix = [&]<int N>() { return MatrixDelta<T, N>{static_cast<const T*>(delta.data), delta.ld}; };
    const bool vectors =
        rows_of_vectors(x) && rows_of_vectors(delta) && rows_of_vectors(sum) && rows_of_vectors(y) && aligned16(w.data);
    if (vectors) launch_norm<T, 8>(x, matrix.template operator()<8>(), w, eps, sum, y, stream());
    else launch_norm<T, 1>(x, matrix.template operator()<1>(), w, eps, sum, y, stream());
  });
}

void CudaOps::linear_lora_add_rms_norm(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear,
                                       const LoraGroups& groups, TensorView s, TensorView y, TensorView residual, TensorView norm,
                                       float eps, TensorView sum, TensorView z) {
  expect_add_rms_norm("linear_lora_add_rms_norm", residual, y, norm, sum, z);
  KShares shares;
  const bool vectors = rows_of_vectors(residual) && rows_of_vectors(sum) && rows_of_vectors(z) && aligned16(norm.data);
  linear_lora_leaving(x, w, bias, linear, groups, s, y, vectors ? &shares : nullptr);
  if (shares.count == 0) return norm_onto(residual, y, norm, eps, sum, z);
  dispatch_half(dtype_, [&]<class T>() { launch_norm<T, 8>(residual, SharesDelta{shares}, norm, eps, sum, z, stream()); });
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
