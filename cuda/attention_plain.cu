// Attention by plain kernels: forward a warp per (row, q head), backward a warp per (row, q head) for dq and per (key row, kv head)
// for dk and dv. No shape is refused and every sum has a fixed order. cuDNN (attention_cudnn.cpp) is the fast way; this is the
// reference and the deterministic one.
#include "attention_plain.h"

#include <algorithm>

#include "common.cuh"

namespace loquetier::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kMaxPerLane = 8;  // head size up to 256

// Where the keys of one sequence are: rows of a matrix, or pages.
template <class T>
struct Keys {
  const T* k;
  const T* v;
  int64_t ld_k, ld_v;
  const int32_t* pages;  // null: packed rows
  int page_size;
  int kv_heads, head_size;
  __device__ int64_t place(int64_t key, int head, int64_t ld) const {
    if (pages == nullptr) return key * ld + int64_t{head} * head_size;
    const int64_t slot = int64_t{pages[key / page_size]} * page_size + key % page_size;
    return (slot * kv_heads + head) * head_size;
  }
};

struct Shape {
  int q_heads, kv_heads, head_size;
  float scale;
};

template <class T>
struct ForwardArgs {
  const T* q;
  int64_t ld_q;
  T* out;
  int64_t ld_out;
  float* lse;  // or null
  int64_t ld_lse;
  const T* k;
  const T* v;
  int64_t ld_k, ld_v;
  const int32_t* q_begin;
  const int32_t* q_rows;
  const int32_t* kv_begin;  // null: pages
  const int32_t* kv_rows;
  const int32_t* page_table;
  int max_pages, page_size;
  int sequences;
  int64_t rows;
  Shape shape;
};

// The sequence that owns a row, or -1. Sequences are few beside the work of a row.
__device__ int owner(const int32_t* begin, const int32_t* rows, int sequences, int64_t row) {
  for (int base = 0; base < sequences; base += kWarp) {
    const int i = base + static_cast<int>(threadIdx.x % kWarp);
    const bool mine = i < sequences && row >= begin[i] && row < begin[i] + int64_t{rows[i]};
    const unsigned hit = __ballot_sync(0xffffffffu, mine);
    if (hit != 0) return base + __ffs(static_cast<int>(hit)) - 1;
  }
  return -1;
}

template <class T>
__device__ float dot_key(const float (&q)[kMaxPerLane], const T* k, int size) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    const int d = i * kWarp + static_cast<int>(threadIdx.x % kWarp);
    if (d < size) sum += q[i] * to_float(k[d]);
  }
  return warp_sum(sum);
}

template <class T>
__device__ void load_head(float (&x)[kMaxPerLane], const T* from, int size) {
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    const int d = i * kWarp + static_cast<int>(threadIdx.x % kWarp);
    x[i] = d < size ? to_float(from[d]) : 0.0f;
  }
}

template <class T>
__device__ void store_head(T* to, const float (&x)[kMaxPerLane], int size, float factor) {
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    const int d = i * kWarp + static_cast<int>(threadIdx.x % kWarp);
    if (d < size) to[d] = from_float<T>(x[i] * factor);
  }
}

template <class T>
__global__ void forward_kernel(ForwardArgs<T> a) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (item >= a.rows * a.shape.q_heads) return;
  const int64_t row = item / a.shape.q_heads;
  const int head = static_cast<int>(item - row * a.shape.q_heads), size = a.shape.head_size;
  const int sequence = owner(a.q_begin, a.q_rows, a.sequences, row);
  if (sequence < 0) return;
  const int kv_head = head / (a.shape.q_heads / a.shape.kv_heads);
  const int64_t first = a.kv_begin != nullptr ? a.kv_begin[sequence] : 0;
  const Keys<T> keys = {a.k + first * a.ld_k,
                        a.v + first * a.ld_v,
                        a.ld_k,
                        a.ld_v,
                        a.page_table != nullptr ? a.page_table + int64_t{sequence} * a.max_pages : nullptr,
                        a.page_size,
                        a.shape.kv_heads,
                        size};
  const int64_t visible = a.kv_rows[sequence] - (a.q_rows[sequence] - 1 - (row - a.q_begin[sequence]));

  float q[kMaxPerLane], sum[kMaxPerLane] = {};
  load_head(q, a.q + row * a.ld_q + int64_t{head} * size, size);
  float top = -INFINITY, total = 0;
  for (int64_t j = 0; j < visible; ++j) {
    const float score = a.shape.scale * dot_key(q, keys.k + keys.place(j, kv_head, keys.ld_k), size);
    const float next = fmaxf(top, score), keep = expf(top - next), p = expf(score - next);
    const T* v = keys.v + keys.place(j, kv_head, keys.ld_v);
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      const int d = i * kWarp + static_cast<int>(threadIdx.x % kWarp);
      if (d < size) sum[i] = sum[i] * keep + p * to_float(v[d]);
    }
    total = total * keep + p;
    top = next;
  }
  store_head(a.out + row * a.ld_out + int64_t{head} * size, sum, size, total > 0 ? 1.0f / total : 0.0f);
  if (a.lse != nullptr && threadIdx.x % kWarp == 0) a.lse[row * a.ld_lse + head] = top + logf(total);
}

template <class T>
struct BackwardArgs {
  const T* q;
  const T* k;
  const T* v;
  const T* out;
  const float* lse;
  const T* dout;
  T* dq;
  T* dk;
  T* dv;
  int64_t ld_q, ld_k, ld_v, ld_out, ld_lse, ld_dout, ld_dq, ld_dk, ld_dv;
  const int32_t* begin;
  const int32_t* count;
  int sequences;
  int64_t rows;
  Shape shape;
};

// With p = exp(scale q k - lse) and delta = dout . out:  ds = p (dout . v - delta);  dq = scale sum ds k
template <class T>
__global__ void backward_q_kernel(BackwardArgs<T> a) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (item >= a.rows * a.shape.q_heads) return;
  const int64_t row = item / a.shape.q_heads;
  const int head = static_cast<int>(item - row * a.shape.q_heads), size = a.shape.head_size;
  const int sequence = owner(a.begin, a.count, a.sequences, row);
  if (sequence < 0) return;
  const int kv_head = head / (a.shape.q_heads / a.shape.kv_heads);
  float q[kMaxPerLane], dout[kMaxPerLane], sum[kMaxPerLane] = {};
  load_head(q, a.q + row * a.ld_q + int64_t{head} * size, size);
  load_head(dout, a.dout + row * a.ld_dout + int64_t{head} * size, size);
  const float delta = dot_key(dout, a.out + row * a.ld_out + int64_t{head} * size, size), lse = a.lse[row * a.ld_lse + head];
  for (int64_t j = a.begin[sequence]; j <= row; ++j) {
    const T* k = a.k + j * a.ld_k + int64_t{kv_head} * size;
    const float p = expf(a.shape.scale * dot_key(q, k, size) - lse);
    const float ds = p * (dot_key(dout, a.v + j * a.ld_v + int64_t{kv_head} * size, size) - delta);
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      const int d = i * kWarp + static_cast<int>(threadIdx.x % kWarp);
      if (d < size) sum[i] += ds * to_float(k[d]);
    }
  }
  store_head(a.dq + row * a.ld_dq + int64_t{head} * size, sum, size, a.shape.scale);
}

// dk = scale sum ds q, dv = sum p dout over the rows from this key on and the q heads of its group.
template <class T>
__global__ void backward_kv_kernel(BackwardArgs<T> a) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (item >= a.rows * a.shape.kv_heads) return;
  const int64_t key = item / a.shape.kv_heads;
  const int kv_head = static_cast<int>(item - key * a.shape.kv_heads), size = a.shape.head_size;
  const int sequence = owner(a.begin, a.count, a.sequences, key);
  if (sequence < 0) return;
  const int group = a.shape.q_heads / a.shape.kv_heads;
  const int64_t end = a.begin[sequence] + int64_t{a.count[sequence]};
  float k[kMaxPerLane], v[kMaxPerLane], dk[kMaxPerLane] = {}, dv[kMaxPerLane] = {};
  load_head(k, a.k + key * a.ld_k + int64_t{kv_head} * size, size);
  load_head(v, a.v + key * a.ld_v + int64_t{kv_head} * size, size);
  for (int64_t row = key; row < end; ++row) {
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      float q[kMaxPerLane], dout[kMaxPerLane];
      load_head(q, a.q + row * a.ld_q + int64_t{head} * size, size);
      load_head(dout, a.dout + row * a.ld_dout + int64_t{head} * size, size);
      const float delta = dot_key(dout, a.out + row * a.ld_out + int64_t{head} * size, size);
      float score = 0, dp = 0;
#pragma unroll
      for (int i = 0; i < kMaxPerLane; ++i) {
        score += q[i] * k[i];
        dp += dout[i] * v[i];
      }
      const float p = expf(a.shape.scale * warp_sum(score) - a.lse[row * a.ld_lse + head]), ds = p * (warp_sum(dp) - delta);
#pragma unroll
      for (int i = 0; i < kMaxPerLane; ++i) {
        dk[i] += ds * q[i];
        dv[i] += p * dout[i];
      }
    }
  }
  store_head(a.dk + key * a.ld_dk + int64_t{kv_head} * size, dk, size, a.shape.scale);
  store_head(a.dv + key * a.ld_dv + int64_t{kv_head} * size, dv, size, 1.0f);
}

// Block i lays out sequence i of the plan's batch; block 0 ends the offsets.
__global__ void ragged_tables_kernel(RaggedTables t) {
  let_next_start();
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x), last = t.count - 1;
  const bool real = i < t.count;
  const auto offset = [&](int o, bool exists) {
    const int32_t* begin = t.of_kv[o] ? t.kv_begin : t.q_begin;
    const int32_t* rows = t.of_kv[o] ? t.kv_rows : t.q_rows;
    return static_cast<int32_t>((exists ? begin[i] : begin[last] + int64_t{rows[last]}) * t.ld[o]);
  };
  const int keys = real ? t.kv_rows[i] : 0;
  if (threadIdx.x == 0) {
    t.q_len[i] = real ? t.q_rows[i] : 0;
    t.kv_len[i] = keys;
  }
#pragma unroll
  for (int o = 0; o < RaggedTables::kOffsets; ++o) {
    if (t.ld[o] < 0) continue;
    if (threadIdx.x == 0) t.offsets[o][i] = offset(o, real);
    if (threadIdx.x == 1 && i == 0) t.offsets[o][t.batch] = offset(o, false);
  }
  if (t.plan_table == nullptr) return;
  const int32_t* table = t.page_table + int64_t{i} * t.max_pages;
  const int pages = (keys + t.page_size - 1) / t.page_size;
  for (int page = threadIdx.x; page < t.plan_pages; page += blockDim.x) {
    t.plan_table[int64_t{i} * t.plan_pages + page] = pages == 0 ? 0 : table[page < pages ? page : 0];
  }
  if (keys % t.page_size == 0) return;
  const int64_t begin = (int64_t{table[pages - 1]} * t.page_size + keys % t.page_size) * t.slot_elements;
  const int64_t elements = (t.page_size - keys % t.page_size) * t.slot_elements;  // a multiple of 8
  for (int64_t e = threadIdx.x * 8; e < elements; e += blockDim.x * 8) {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.kv.k) + begin + e) = {0, 0, 0, 0};
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.kv.v) + begin + e) = {0, 0, 0, 0};
  }
}

Shape shape_of(const AttentionShape& shape) { return {shape.q_heads, shape.kv_heads, shape.head_size, shape.scale}; }

Launch warps(int64_t items, cudaStream_t stream, std::source_location where = std::source_location::current()) {
  return {dim3(static_cast<unsigned>(ceil_div(items, kWarps))), dim3(kWarps * kWarp), 0, stream, 1, where};
}

}  // namespace

void plain_attention_paged(cudaStream_t stream, DType dtype, TensorView q, KvLayer kv, const KvShape& kv_shape,
                           const PagedBatch& batch, const AttentionShape& shape, TensorView out) {
  dispatch_half(dtype, [&]<class T>() {
    const ForwardArgs<T> args = {static_cast<const T*>(q.data),
                                 q.ld,
                                 static_cast<T*>(out.data),
                                 out.ld,
                                 nullptr,
                                 0,
                                 static_cast<const T*>(kv.k),
                                 static_cast<const T*>(kv.v),
                                 0,
                                 0,
                                 batch.row_begin,
                                 batch.rows,
                                 nullptr,
                                 batch.kv_len,
                                 batch.page_table,
                                 batch.max_pages,
                                 kv_shape.page_size,
                                 batch.sequences,
                                 q.rows,
                                 shape_of(shape)};
    warps(q.rows * shape.q_heads, stream)(forward_kernel<T>, args);
  });
}

void plain_attention_packed(cudaStream_t stream, DType dtype, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
                            const AttentionShape& shape, TensorView out, TensorView lse) {
  dispatch_half(dtype, [&]<class T>() {
    const ForwardArgs<T> args = {static_cast<const T*>(q.data),
                                 q.ld,
                                 static_cast<T*>(out.data),
                                 out.ld,
                                 static_cast<float*>(lse.data),
                                 lse.ld,
                                 static_cast<const T*>(k.data),
                                 static_cast<const T*>(v.data),
                                 k.ld,
                                 v.ld,
                                 batch.q_begin,
                                 batch.q_rows,
                                 batch.kv_begin,
                                 batch.kv_rows,
                                 nullptr,
                                 0,
                                 1,
                                 batch.sequences,
                                 q.rows,
                                 shape_of(shape)};
    warps(q.rows * shape.q_heads, stream)(forward_kernel<T>, args);
  });
}

void plain_attention_backward(cudaStream_t stream, DType dtype, TensorView q, TensorView k, TensorView v, TensorView out,
                              TensorView lse, TensorView dout, const PackedBatch& batch, const AttentionShape& shape, TensorView dq,
                              TensorView dk, TensorView dv) {
  dispatch_half(dtype, [&]<class T>() {
    const BackwardArgs<T> args = {static_cast<const T*>(q.data),
                                  static_cast<const T*>(k.data),
                                  static_cast<const T*>(v.data),
                                  static_cast<const T*>(out.data),
                                  static_cast<const float*>(lse.data),
                                  static_cast<const T*>(dout.data),
                                  static_cast<T*>(dq.data),
                                  static_cast<T*>(dk.data),
                                  static_cast<T*>(dv.data),
                                  q.ld,
                                  k.ld,
                                  v.ld,
                                  out.ld,
                                  lse.ld,
                                  dout.ld,
                                  dq.ld,
                                  dk.ld,
                                  dv.ld,
                                  batch.q_begin,
                                  batch.q_rows,
                                  batch.sequences,
                                  q.rows,
                                  shape_of(shape)};
    warps(q.rows * shape.q_heads, stream)(backward_q_kernel<T>, args);
    warps(k.rows * shape.kv_heads, stream)(backward_kv_kernel<T>, args);
  });
}

void fill_ragged_tables(cudaStream_t stream, const RaggedTables& tables) {
  const int threads = std::clamp(tables.plan_pages, 128, 1024);  // a power of two
  Launch launch{dim3(static_cast<unsigned>(tables.batch)), dim3(static_cast<unsigned>(threads)), 0, stream};
  launch.overlap = true;
  launch(ragged_tables_kernel, tables);
}

}  // namespace loquetier::cuda
