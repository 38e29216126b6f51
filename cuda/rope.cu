// Rotary positions on the q and k columns of qkv, with the q/k norm before and the write of k and v into the KV pages after; and
// the gradient. Both are bound by the bytes of q and k. Attention of decodes does the same as it reads q (attention_decode.cu).
#include <algorithm>
#include <bit>
#include <initializer_list>
#include <utility>

#include "common.cuh"
#include "cuda_ops.h"
#include "rope.cuh"
#include "shares.cuh"

namespace loquetier::cuda {

namespace {

constexpr int64_t kManyRows = 1024;
constexpr int64_t kFewThreads = 128, kMostThreads = 512;  // of a block

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
  KShares shares;  // of qkv
};

// A block owns one row. `lanes` neighbouring threads (a power of two, at most a warp) own a head: each holds N columns of its first
// half and the N that rotate with them, so norm, rotation and page write need one pass. With N = 8 the lanes cover a half at once
// and their cosines and sines stay in registers over the heads.
template <class T, int N>
struct Rotor {
  __device__ Rotor(const float* cos_sin, int half_size, int lane_count)
      : half(half_size), lanes(lane_count), lane(static_cast<int>(threadIdx.x) % lane_count), table(cos_sin) {
    const int in_warp = static_cast<int>(threadIdx.x) % kWarp;
    mask = lanes == kWarp ? 0xffffffffu : ((1u << lanes) - 1) << (in_warp - lane);
    if (N > 1 && lane * N < half) load(lane * N);
  }
  __device__ void load(int i) {
    for (int n = 0; n < N; ++n) {
      cosine[n] = table[i + n];
      sine[n] = table[half + i + n];
    }
  }
  // f(i) for every N columns of this lane, with cosine and sine of them loaded.
  template <class F>
  __device__ void each(F f) {
    if constexpr (N > 1) {
      if (lane * N < half) f(lane * N);
    } else {
      for (int i = lane; i < half; i += lanes) {
        load(i);
        f(i);
      }
    }
  }
  __device__ float sum(float x) const {  // over the head
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
    return x;
  }
  int half, lanes, lane;
  unsigned mask;
  const float* table;
  float cosine[N], sine[N];
};

// heads: q heads, then k heads, then v heads where they go to pages or come from shares.
template <class T, int N, bool kShares>
__global__ void rope_kernel(RopeArgs<T> a, int heads, int lanes) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int size = a.head_size, half = size / 2, groups = static_cast<int>(blockDim.x) / lanes;
  Rotor<T, N> rotor(a.cos_sin + row * a.ld_cos, half, lanes);
  const int32_t slot = a.kv_slots != nullptr ? a.kv_slots[row] : -1;
  for (int head = static_cast<int>(threadIdx.x) / lanes; head < heads; head += groups) {
    T* x = a.qkv + row * a.ld + int64_t{head} * size;
    const auto load = [&](int i) {
      if constexpr (!kShares) {
        return load_pack<T, N>(x + i);
      } else {
        const Pack<float, N> sum = sum_of_shares<N>(a.shares, row, int64_t{head} * size + i);
        Pack<T, N> out;
        for (int n = 0; n < N; ++n) out.v[n] = from_float<T>(sum.v[n]);
        return out;
      }
    };
    const bool value = head >= a.q_heads + a.kv_heads;
    const int kv_head = head - a.q_heads - (value ? a.kv_heads : 0);
    const int64_t page_place = (int64_t{slot} * a.kv_heads + kv_head) * size;  // slot counts tokens over all pages
    if (value) {
      if (slot < 0 && !kShares) continue;
      rotor.each([&](int i) {
        const Pack<T, N> first = load(i), second = load(half + i);
        if (kShares) {
          store_pack<T, N>(x + i, first);
          store_pack<T, N>(x + half + i, second);
        }
        if (slot < 0) return;
        store_pack<T, N>(a.v_pages + page_place + i, first);
        store_pack<T, N>(a.v_pages + page_place + half + i, second);
      });
      continue;
    }
    const T* w = head < a.q_heads ? a.q_norm : a.k_norm;
    float scale = 1;
    if (w != nullptr) {
      float squares = 0;
      rotor.each([&](int i) {
        const Pack<T, N> first = load(i), second = load(half + i);
        for (int n = 0; n < N; ++n) squares += squares_of(to_float(first.v[n]), to_float(second.v[n]));
      });
      scale = norm_factor(rotor.sum(squares), size, a.eps);
    }
    T* keep = a.raw != nullptr && row < a.raw_rows ? a.raw + row * a.ld_raw + int64_t{head} * size : nullptr;
    T* page = head >= a.q_heads && slot >= 0 ? a.k_pages + page_place : nullptr;
    rotor.each([&](int i) {
      Pack<T, N> first = load(i), second = load(half + i);
      if (keep != nullptr) {
        store_pack<T, N>(keep + i, first);
        store_pack<T, N>(keep + half + i, second);
      }
      for (int n = 0; n < N; ++n) {
        float x1 = to_float(first.v[n]), x2 = to_float(second.v[n]);
        if (w != nullptr) {
          x1 *= scale * to_float(w[i + n]);
          x2 *= scale * to_float(w[half + i + n]);
        }
        first.v[n] = from_float<T>(rotated(x1, x2, rotor.cosine[n], -rotor.sine[n]));
        second.v[n] = from_float<T>(rotated(x2, x1, rotor.cosine[n], rotor.sine[n]));
      }
      store_pack<T, N>(x + i, first);
      store_pack<T, N>(x + half + i, second);
      if (page != nullptr) {
        store_pack<T, N>(page + i, first);
        store_pack<T, N>(page + half + i, second);
      }
    });
  }
}

// The rotation turned back, then the gradient of the norm: with g = d w, dx = r g - x r^3 mean(g x).
template <class T, int N>
__global__ void rope_backward_kernel(RopeArgs<T> a, int heads, int lanes) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int size = a.head_size, half = size / 2, groups = static_cast<int>(blockDim.x) / lanes;
  Rotor<T, N> rotor(a.cos_sin + row * a.ld_cos, half, lanes);
  for (int head = static_cast<int>(threadIdx.x) / lanes; head < heads; head += groups) {
    T* d = a.qkv + row * a.ld + int64_t{head} * size;
    const T* w = head < a.q_heads ? a.q_norm : a.k_norm;
    const T* x = w != nullptr ? a.raw + row * a.ld_raw + int64_t{head} * size : nullptr;
    const auto turned_back = [&](const Pack<T, N>& first, const Pack<T, N>& second, int n, float& g1, float& g2) {
      const float d1 = to_float(first.v[n]), d2 = to_float(second.v[n]);
      g1 = d1 * rotor.cosine[n] + d2 * rotor.sine[n];
      g2 = d2 * rotor.cosine[n] - d1 * rotor.sine[n];
    };
    float r = 1, coefficient = 0;
    if (w != nullptr) {
      float squares = 0, dot = 0;
      rotor.each([&](int i) {
        const Pack<T, N> d1 = load_pack<T, N>(d + i), d2 = load_pack<T, N>(d + half + i);
        for (int n = 0; n < N; ++n) {
          const float x1 = to_float(x[i + n]), x2 = to_float(x[half + i + n]);
          float g1, g2;
          turned_back(d1, d2, n, g1, g2);
          squares += x1 * x1 + x2 * x2;
          dot += g1 * to_float(w[i + n]) * x1 + g2 * to_float(w[half + i + n]) * x2;
        }
      });
      const float columns = static_cast<float>(size);
      r = rsqrtf(rotor.sum(squares) / columns + a.eps);
      coefficient = r * r * r * rotor.sum(dot) / columns;
    }
    rotor.each([&](int i) {
      Pack<T, N> d1 = load_pack<T, N>(d + i), d2 = load_pack<T, N>(d + half + i);
      for (int n = 0; n < N; ++n) {
        float g1, g2;
        turned_back(d1, d2, n, g1, g2);
        if (w != nullptr) {
          g1 = r * g1 * to_float(w[i + n]) - coefficient * to_float(x[i + n]);
          g2 = r * g2 * to_float(w[half + i + n]) - coefficient * to_float(x[half + i + n]);
        }
        d1.v[n] = from_float<T>(g1);
        d2.v[n] = from_float<T>(g2);
      }
      store_pack<T, N>(d + i, d1);
      store_pack<T, N>(d + half + i, d2);
    });
  }
}

// Whether heads and places (first row, elements between rows) allow 16-byte vectors.
bool by_vectors(int half, std::initializer_list<std::pair<const void*, int64_t>> rows) {
  bool all = half % 8 == 0 && half <= 8 * kWarp;
  for (const auto& [p, ld] : rows) all = all && aligned16(p) && ld % 8 == 0;
  return all;
}
bool takes_vectors(TensorView qkv, const Rope& of) {
  return by_vectors(of.shape.head_size / 2, {{qkv.data, qkv.ld}, {of.raw.data, of.raw.ld}, {of.kv.k, 0}, {of.kv.v, 0}});
}

// One launch of the forward or the backward kernel.
template <class T, class Vectors, class Single>
void launch_rope(const RopeArgs<T>& a, int heads, Vectors vectors, Single single, cudaStream_t stream,
                 std::source_location where = std::source_location::current()) {
  const int half = a.head_size / 2;
  const bool fast = by_vectors(half, {{a.qkv, a.ld}, {a.raw, a.ld_raw}, {a.k_pages, 0}, {a.v_pages, 0}});
  const int lanes = fast ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(half / 8))) : kWarp;
  // Many rows: few threads that keep their cosines over several heads. Few rows: a thread for everything.
  const int64_t wanted = a.rows >= kManyRows ? kFewThreads : std::min<int64_t>(int64_t{heads} * lanes, kMostThreads);
  const unsigned threads = static_cast<unsigned>(ceil_div(wanted, kWarp) * kWarp);
  const Launch launch{dim3(static_cast<unsigned>(a.rows)), dim3(threads), 0, stream, 1, where, true};
  fast ? launch(vectors, a, heads, lanes) : launch(single, a, heads, lanes);
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

void CudaOps::rope(TensorView qkv, const Rope& of) {
  expect_rope("rope", qkv, of);
  rope_onto(qkv, of, {});
}

void CudaOps::linear_lora_rope(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                               TensorView s, TensorView qkv, const Rope& of) {
  expect_rope("linear_lora_rope", qkv, of);
  KShares shares;
  // Without adapters the product's own sums are the faster way, at 64 rows by 1.4 us of 21.
  linear_lora_leaving(x, w, bias, linear, groups, s, qkv, any_lora(groups) && takes_vectors(qkv, of) ? &shares : nullptr);
  rope_onto(qkv, of, shares);
}

void CudaOps::expect_rope(const char* op, TensorView qkv, const Rope& of) const {
  const AttentionShape& shape = of.shape;
  check_heads(op, shape);
  const int64_t d = shape.head_size;
  expect(op, "qkv", qkv, dtype_, -1, (shape.q_heads + 2 * shape.kv_heads) * d);
  expect(op, "cos_sin", of.cos_sin, DType::f32, qkv.rows, d);
  expect_vector(op, "q_norm", of.q_norm, dtype_, d, true);
  expect_vector(op, "k_norm", of.k_norm, dtype_, d, true);
  if (of.raw.data != nullptr) {
    expect(op, "raw", of.raw, dtype_, -1, (shape.q_heads + shape.kv_heads) * d);
    require(of.raw.rows <= qkv.rows, "[", op, "] raw: expected at most ", qkv.rows, " rows, got ", of.raw.rows);
  }
  if (of.kv_slots != nullptr && of.kv.k != nullptr) {
    require(of.kv_shape.kv_heads == shape.kv_heads && of.kv_shape.head_size == shape.head_size, "[", op, "] kv: expected pages of ",
            shape.kv_heads, " heads of ", shape.head_size, ", got ", of.kv_shape.kv_heads, " of ", of.kv_shape.head_size);
  }
}

void CudaOps::rope_onto(TensorView qkv, const Rope& of, const KShares& shares) {
  if (qkv.rows == 0) return;
  const AttentionShape& shape = of.shape;
  const bool pages = of.kv_slots != nullptr && of.kv.k != nullptr;
  device_.use();
  dispatch_half(dtype_, [&]<class T>() {
    const RopeArgs<T> args = {static_cast<T*>(qkv.data),
                              qkv.ld,
                              qkv.rows,
                              shape.q_heads,
                              shape.kv_heads,
                              shape.head_size,
                              static_cast<const float*>(of.cos_sin.data),
                              of.cos_sin.ld,
                              static_cast<const T*>(of.q_norm.data),
                              static_cast<const T*>(of.k_norm.data),
                              of.eps,
                              static_cast<T*>(of.raw.data),
                              of.raw.ld,
                              of.raw.rows,
                              pages ? of.kv_slots : nullptr,
                              static_cast<T*>(of.kv.k),
                              static_cast<T*>(of.kv.v),
                              shares};
    const bool values = pages || shares.count > 0;
    const int heads = shape.q_heads + shape.kv_heads * (values ? 2 : 1);
    // Shares are asked for only where takes_vectors().
    if (shares.count > 0) launch_rope(args, heads, rope_kernel<T, 8, true>, rope_kernel<T, 8, true>, stream());
    else launch_rope(args, heads, rope_kernel<T, 8, false>, rope_kernel<T, 1, false>, stream());
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
                              nullptr,
                              {}};
    const int heads = shape.q_heads + shape.kv_heads;
    launch_rope(args, heads, rope_backward_kernel<T, 8>, rope_backward_kernel<T, 1>, stream());
  });
}

}  // namespace loquetier::cuda
