// Rotary positions on the q and k columns of qkv, with the q/k norm before and the write of k and v into the KV pages after; and
// the gradient. A warp owns one head of one row: its lanes hold the D columns, so norm, rotation and page write need one pass.
#include "common.cuh"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

constexpr int kWarps = 8;

__global__ void rope_table_kernel(const int32_t* positions, const float* inv_freq, float factor, float* cos_sin, int64_t ld,
                                  int64_t rows, int half) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * half) return;
  const int64_t row = i / half;
  const int column = static_cast<int>(i - row * half);
  // The angle is rounded to f32, as models are trained; sincosf reduces large arguments exactly.
  float sine, cosine;
  sincosf(static_cast<float>(positions[row]) * inv_freq[column], &sine, &cosine);
  cos_sin[row * ld + column] = cosine * factor;
  cos_sin[row * ld + half + column] = sine * factor;
}

template <class T>
struct RopeArgs {
  T* qkv;
  int64_t ld;
  int64_t rows;
  int q_heads, kv_heads, head_size;
  const float* cos_sin;
  int64_t ld_cos;
  const T* q_norm;  // [D] or null
  const T* k_norm;
  float eps;
  T* raw;  // [raw_rows, (Q + K) D] or null
  int64_t ld_raw;
  int64_t raw_rows;
  const int32_t* kv_slots;
  T* k_pages;
  T* v_pages;
};

// heads: q heads, then k heads, then (only with pages) v heads, which are copied.
template <class T>
__global__ void rope_kernel(RopeArgs<T> a, int heads) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (item >= a.rows * heads) return;
  const int lane = threadIdx.x % kWarp, size = a.head_size, half = size / 2;
  const int64_t row = item / heads;
  const int head = static_cast<int>(item - row * heads);
  T* x = a.qkv + row * a.ld + int64_t{head} * size;
  const int32_t slot = a.kv_slots != nullptr ? a.kv_slots[row] : -1;
  const int kv_head = head - a.q_heads - (head >= a.q_heads + a.kv_heads ? a.kv_heads : 0);
  const int64_t page_place = (int64_t{slot} * a.kv_heads + kv_head) * size;  // slot counts tokens over all pages

  if (head >= a.q_heads + a.kv_heads) {
    if (slot < 0) return;
    for (int i = lane; i < size; i += kWarp) a.v_pages[page_place + i] = x[i];
    return;
  }
  const T* w = head < a.q_heads ? a.q_norm : a.k_norm;
  float scale = 1;
  if (w != nullptr) {
    float squares = 0;
    for (int i = lane; i < size; i += kWarp) squares += to_float(x[i]) * to_float(x[i]);
    scale = rsqrtf(warp_sum(squares) / static_cast<float>(size) + a.eps);
  }
  T* keep = a.raw != nullptr && row < a.raw_rows ? a.raw + row * a.ld_raw + int64_t{head} * size : nullptr;
  T* page = head >= a.q_heads && slot >= 0 ? a.k_pages + page_place : nullptr;
  const float* cosine = a.cos_sin + row * a.ld_cos;
  for (int i = lane; i < half; i += kWarp) {
    const T raw1 = x[i], raw2 = x[half + i];
    if (keep != nullptr) {
      keep[i] = raw1;
      keep[half + i] = raw2;
    }
    float x1 = to_float(raw1), x2 = to_float(raw2);
    if (w != nullptr) {
      x1 *= scale * to_float(w[i]);
      x2 *= scale * to_float(w[half + i]);
    }
    const float c = cosine[i], s = cosine[half + i];
    const T y1 = from_float<T>(x1 * c - x2 * s), y2 = from_float<T>(x2 * c + x1 * s);
    x[i] = y1;
    x[half + i] = y2;
    if (page != nullptr) {
      page[i] = y1;
      page[half + i] = y2;
    }
  }
}

// The rotation turned back, then the gradient of the norm: with g = d w, dx = r g - x r^3 mean(g x).
template <class T>
__global__ void rope_backward_kernel(RopeArgs<T> a, int heads) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (item >= a.rows * heads) return;
  const int lane = threadIdx.x % kWarp, size = a.head_size, half = size / 2;
  const int64_t row = item / heads;
  const int head = static_cast<int>(item - row * heads);
  T* d = a.qkv + row * a.ld + int64_t{head} * size;
  const float* cosine = a.cos_sin + row * a.ld_cos;
  const T* w = head < a.q_heads ? a.q_norm : a.k_norm;
  const T* x = w != nullptr ? a.raw + row * a.ld_raw + int64_t{head} * size : nullptr;
  float squares = 0, dot = 0;
  if (w != nullptr) {
    for (int i = lane; i < half; i += kWarp) {
      const float d1 = to_float(d[i]), d2 = to_float(d[half + i]), c = cosine[i], s = cosine[half + i];
      const float x1 = to_float(x[i]), x2 = to_float(x[half + i]);
      squares += x1 * x1 + x2 * x2;
      dot += (d1 * c + d2 * s) * to_float(w[i]) * x1 + (d2 * c - d1 * s) * to_float(w[half + i]) * x2;
    }
    squares = warp_sum(squares);
    dot = warp_sum(dot);
  }
  const float n = static_cast<float>(size), r = rsqrtf(squares / n + a.eps), coefficient = r * r * r * dot / n;
  for (int i = lane; i < half; i += kWarp) {
    const float d1 = to_float(d[i]), d2 = to_float(d[half + i]), c = cosine[i], s = cosine[half + i];
    float g1 = d1 * c + d2 * s, g2 = d2 * c - d1 * s;
    if (w != nullptr) {
      g1 = r * g1 * to_float(w[i]) - coefficient * to_float(x[i]);
      g2 = r * g2 * to_float(w[half + i]) - coefficient * to_float(x[half + i]);
    }
    d[i] = from_float<T>(g1);
    d[half + i] = from_float<T>(g2);
  }
}

void check_heads(const char* op, const AttentionShape& shape) {
  require(shape.q_heads > 0 && shape.kv_heads > 0 && shape.q_heads % shape.kv_heads == 0, "[", op,
          "] shape: expected q_heads a multiple of kv_heads, got ", shape.q_heads, " and ", shape.kv_heads);
  require(shape.head_size > 0 && shape.head_size % 2 == 0, "[", op, "] shape: expected an even head size, got ", shape.head_size);
}

}  // namespace

void CudaOps::rope_table(const int32_t* positions, const float* inv_freq, float attention_factor, TensorView cos_sin) {
  expect("rope_table", "cos_sin", cos_sin, DType::f32, -1, -1);
  require(cos_sin.cols % 2 == 0, "[rope_table] cos_sin: expected an even number of columns, got ", cos_sin.cols);
  if (cos_sin.size() == 0) return;
  device_.use();
  const int half = static_cast<int>(cos_sin.cols / 2);
  Launch{dim3(static_cast<unsigned>(ceil_div(cos_sin.rows * half, 256))), dim3(256), 0, stream()}(
      rope_table_kernel, positions, inv_freq, attention_factor, static_cast<float*>(cos_sin.data), cos_sin.ld, cos_sin.rows, half);
}

void CudaOps::rope(TensorView qkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm, float eps,
                   TensorView raw, const int32_t* kv_slots, KvLayer kv, const KvShape& kv_shape) {
  check_heads("rope", shape);
  const int64_t d = shape.head_size;
  expect("rope", "qkv", qkv, dtype_, -1, (shape.q_heads + 2 * shape.kv_heads) * d);
  expect("rope", "cos_sin", cos_sin, DType::f32, qkv.rows, d);
  expect_vector("rope", "q_norm", q_norm, dtype_, d, true);
  expect_vector("rope", "k_norm", k_norm, dtype_, d, true);
  if (raw.data != nullptr) {
    expect("rope", "raw", raw, dtype_, -1, (shape.q_heads + shape.kv_heads) * d);
    require(raw.rows <= qkv.rows, "[rope] raw: expected at most ", qkv.rows, " rows, got ", raw.rows);
  }
  const bool pages = kv_slots != nullptr && kv.k != nullptr;
  if (pages) {
    require(kv_shape.kv_heads == shape.kv_heads && kv_shape.head_size == shape.head_size, "[rope] kv: expected pages of ",
            shape.kv_heads, " heads of ", shape.head_size, ", got ", kv_shape.kv_heads, " of ", kv_shape.head_size);
  }
  if (qkv.rows == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const RopeArgs<T> args = {static_cast<T*>(qkv.data),
                              qkv.ld,
                              qkv.rows,
                              shape.q_heads,
                              shape.kv_heads,
                              shape.head_size,
                              static_cast<const float*>(cos_sin.data),
                              cos_sin.ld,
                              static_cast<const T*>(q_norm.data),
                              static_cast<const T*>(k_norm.data),
                              eps,
                              static_cast<T*>(raw.data),
                              raw.ld,
                              raw.rows,
                              pages ? kv_slots : nullptr,
                              static_cast<T*>(kv.k),
                              static_cast<T*>(kv.v)};
    const int heads = shape.q_heads + shape.kv_heads * (pages ? 2 : 1);
    Launch{dim3(static_cast<unsigned>(ceil_div(qkv.rows * heads, kWarps))), dim3(kWarps * kWarp), 0, stream()}(rope_kernel<T>, args,
                                                                                                               heads);
  });
}

void CudaOps::rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                            float eps, TensorView raw) {
  check_heads("rope_backward", shape);
  const int64_t d = shape.head_size;
  expect("rope_backward", "dqkv", dqkv, dtype_, -1, (shape.q_heads + 2 * shape.kv_heads) * d);
  expect("rope_backward", "cos_sin", cos_sin, DType::f32, dqkv.rows, d);
  expect_vector("rope_backward", "q_norm", q_norm, dtype_, d, true);
  expect_vector("rope_backward", "k_norm", k_norm, dtype_, d, true);
  if (q_norm.data != nullptr || k_norm.data != nullptr) {
    expect("rope_backward", "raw", raw, dtype_, dqkv.rows, (shape.q_heads + shape.kv_heads) * d);
  }
  if (dqkv.rows == 0) return;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const RopeArgs<T> args = {static_cast<T*>(dqkv.data),
                              dqkv.ld,
                              dqkv.rows,
                              shape.q_heads,
                              shape.kv_heads,
                              shape.head_size,
                              static_cast<const float*>(cos_sin.data),
                              cos_sin.ld,
                              static_cast<const T*>(q_norm.data),
                              static_cast<const T*>(k_norm.data),
                              eps,
                              static_cast<T*>(raw.data),
                              raw.ld,
                              raw.rows,
                              nullptr,
                              nullptr,
                              nullptr};
    const int heads = shape.q_heads + shape.kv_heads;
    Launch{dim3(static_cast<unsigned>(ceil_div(dqkv.rows * heads, kWarps))), dim3(kWarps * kWarp), 0, stream()}(
        rope_backward_kernel<T>, args, heads);
  });
}

}  // namespace loquetier::cuda
