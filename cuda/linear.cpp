// Plain products through cuBLASLt (few rows: linear_decode.cu), and construction of the backend. cuBLASLt is column-major, so a
// row-major y [T, N] is its N x T matrix:
//   forward   y^T [N, T] = w (stored K x N, transposed) * x^T [K, T]        backward   dx^T [K, T] = w^T (K x N, as stored) * dy^T
//   [N, T]
// Algorithms come from cuBLASLt's heuristic, once per shape with the rows rounded up to a bucket. In deterministic mode the rows
// that the heuristic sees are always the same and split sums are refused, so a row's value does not depend on how many rows are
// beside it.
#include <algorithm>
#include <memory>

#include "attention_decode.h"
#include "attention_plans.h"
#include "core/check.h"
#include "cuda_check.h"
#include "cuda_ops.h"
#include "fused_linear.h"
#include "linear_decode.h"
#include "lora_call.h"

namespace loquetier::cuda {

namespace {

constexpr int64_t kDeterministicRows = 2048;
constexpr int64_t kManyRows = 512;       // with an adapter: base and LoRA as one product, or the expand before the base product
constexpr int64_t kManyBaseRows = 2048;  // without an adapter: from here on the fused product is as fast as cuBLASLt
constexpr int64_t kBranchTiles = 8;      // tiles of 16 rows up to which the shrink goes beside it

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// Rows the heuristic is asked about. Exact at decode sizes, where one tile more or less shows; coarse above.
int64_t bucket_of(int64_t rows) {
  if (rows <= 16) return rows;
  const int64_t step = rows <= 256 ? 16 : rows <= 2048 ? 128 : 1024;
  return (rows + step - 1) / step * step;
}

int32_t alignment_of(const void* pointer, int64_t ld, DType dtype) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(pointer) | (static_cast<uint64_t>(ld) * size_of(dtype)) | 256u;
  return static_cast<int32_t>(bits & (~bits + 1));
}

// cuBLASLt descriptors with their destroyers.
template <class Handle, cublasStatus_t (*destroy)(Handle)>
struct Destroyer {
  using pointer = Handle;
  void operator()(Handle handle) const { destroy(handle); }
};
using Layout = std::unique_ptr<void, Destroyer<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Description = std::unique_ptr<void, Destroyer<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Preference = std::unique_ptr<void, Destroyer<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

Layout layout(DType dtype, int64_t rows, int64_t cols, int64_t ld) {
  cublasLtMatrixLayout_t handle = nullptr;
  check(cublasLtMatrixLayoutCreate(&handle, cuda_type(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), ld),
        "cublasLtMatrixLayoutCreate");
  return Layout(handle);
}

template <class V>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute, const V& value) {
  check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
}

template <class V>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const V& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
}

// Whether most rows have an adapter, and enough of them.
bool many_rows(const LoraGroups& groups, int64_t rows) {
  int64_t covered = 0;
  for (int32_t g = 0; g < groups.count; ++g) covered += groups.host_groups[g].sites != nullptr ? groups.host_groups[g].rows : 0;
  return covered >= kManyRows && 2 * covered >= rows;
}

// What linear_lora's way through s, and its backward's, expect of it.
void expect_s(const char* op, const char* name, TensorView s, const LoraGroups& groups, int64_t rows, DType dtype) {
  expect(op, name, s, dtype, rows, -1);
  require(s.cols >= groups.max_rank, "[", op, "] ", name, ": expected at least ", groups.max_rank, " columns, got ", s.cols);
}

// Rows, layout and groups as the products of decode steps take them.
bool is_decode(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView y) {
  return x.rows <= kMaxDecodeRows && fast_layout(linear, groups, {x, s, y}) && !count_tiles(groups, 8).dropout;
}

// The groups from `first` on.
LoraGroups groups_from(LoraGroups groups, int32_t first) {
  groups.groups += first;
  groups.host_groups += first;
  groups.count -= first;
  return groups;
}

}  // namespace

size_t LinearKeyHash::operator()(const LinearKey& key) const {
  size_t hash = 0;
  const auto mix = [&](int64_t value) { hash = (hash ^ static_cast<size_t>(value)) * 0x9E3779B97F4A7C15u + (hash >> 29); };
  for (const int64_t value : {key.rows, key.in, key.out, key.ld_x, key.ld_w, key.ld_y}) mix(value);
  for (const int32_t value : {key.y_dtype, key.bias, key.backward, key.accumulate, key.alignment}) mix(value);
  return hash;
}

CudaOps::CudaOps(int device, DType compute_dtype, bool deterministic)
    : device_(device),
      dtype_(compute_dtype),
      deterministic_(deterministic),
      sample_scratch_(device_),
      norm_scratch_(device_),
      lora_scratch_(device_),
      attention_scratch_(device_) {
  require(dtype_ == DType::bf16 || dtype_ == DType::f16, "[cuda] compute dtype: expected bf16 or f16, got ", name_of(dtype_));
  blas_workspace_ = Buffer(device_, kBlasWorkspace);
  decode_workspace_ = Buffer(device_, decode_workspace(device_.processors()));
  device_.zero(decode_workspace_.data(), decode_workspace_.bytes());
  attention_decode_workspace_ = Buffer(device_, decode_attention_workspace_bytes(device_.processors()));
  device_.zero(attention_decode_workspace_.data(), attention_decode_workspace_.bytes());
  check(cublasLtCreate(&blas_), "cublasLtCreate");
  check(cudaStreamCreateWithFlags(&branch_.stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  check(cudaEventCreateWithFlags(&branch_.fork, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  check(cudaEventCreateWithFlags(&branch_.join, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  attention_plans_ = AttentionPlans::make(device_, dtype_, deterministic_);
  fused_linear_ = std::make_unique<FusedLinear>(device_, dtype_, tensor_maps_, deterministic_);
}

CudaOps::~CudaOps() {
  cudaStreamSynchronize(stream());
  attention_plans_.reset();  // they may have run on the branch
  cudaEventDestroy(branch_.fork);
  cudaEventDestroy(branch_.join);
  cudaStreamDestroy(branch_.stream);
  if (blas_ != nullptr) cublasLtDestroy(blas_);
}

void CudaOps::reserve(const OpsLimits& limits) {
  const CudaWorkspace bytes = workspace_of(limits);
  fused_linear_->reserve(bytes.fused);
  lora_scratch_.reserve(bytes.lora);
  attention_scratch_.reserve(bytes.attention);
  attention_plans_->limit(limits);
  sample_scratch_.reserve(bytes.sample);
  norm_scratch_.reserve(bytes.norm);
}

size_t CudaOps::workspace_bytes() const {
  size_t bytes =
      blas_workspace_.bytes() + decode_workspace_.bytes() + attention_decode_workspace_.bytes() + fused_linear_->workspace_bytes();
  for (const Scratch* scratch : {&sample_scratch_, &norm_scratch_, &lora_scratch_, &attention_scratch_}) bytes += scratch->bytes();
  return bytes;
}

// y^T = op(w) x^T for `rows` columns of x^T; key.rows is already the bucket.
void CudaOps::matmul(const LinearKey& key, const void* x, const void* w, const void* bias, void* y, int64_t rows) {
  const DType y_dtype = static_cast<DType>(key.y_dtype);
  const int64_t k = key.backward ? key.out : key.in, m = key.backward ? key.in : key.out;  // y^T [m, rows], sum over k
  cublasLtMatmulDesc_t handle = nullptr;
  check(cublasLtMatmulDescCreate(&handle, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  const Description description(handle);
  const cublasOperation_t op_w = key.backward ? CUBLAS_OP_N : CUBLAS_OP_T;
  set(handle, CUBLASLT_MATMUL_DESC_TRANSA, op_w);
  if (bias != nullptr) {
    set(handle, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(handle, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    set(handle, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, cuda_type(dtype_));
  }
  const Layout w_layout = layout(dtype_, key.in, key.out, key.ld_w), x_layout = layout(dtype_, k, rows, key.ld_x),
               y_layout = layout(y_dtype, m, rows, key.ld_y);

  auto found = linear_algorithms_.find(key);
  if (found == linear_algorithms_.end()) {
    const Layout x_bucket = layout(dtype_, k, key.rows, key.ld_x), y_bucket = layout(y_dtype, m, key.rows, key.ld_y);
    cublasLtMatmulPreference_t raw = nullptr;
    check(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate");
    const Preference preference(raw);
    set(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kBlasWorkspace);
    const uint32_t alignment = static_cast<uint32_t>(key.alignment);
    for (const auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                 CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set(raw, attribute, alignment);
    }
    if (deterministic_) set(raw, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
    cublasLtMatmulHeuristicResult_t result = {};
    int results = 0;
    check(cublasLtMatmulAlgoGetHeuristic(blas_, handle, w_layout.get(), x_bucket.get(), y_bucket.get(), y_bucket.get(), raw, 1,
                                         &result, &results),
          "cublasLtMatmulAlgoGetHeuristic");
    require<DeviceError>(results > 0, "[linear] cuBLASLt has no algorithm for x [", rows, ", ", k, "] ", name_of(dtype_),
                         " and y [", rows, ", ", m, "] ", name_of(y_dtype));
    found = linear_algorithms_.emplace(key, result.algo).first;
  }
  const float alpha = 1, beta = key.accumulate ? 1.0f : 0.0f;
  check(cublasLtMatmul(blas_, handle, &alpha, w, w_layout.get(), x, x_layout.get(), &beta, y, y_layout.get(), y, y_layout.get(),
                       &found->second, blas_workspace_.data(), kBlasWorkspace, stream()),
        "cublasLtMatmul");
}

void CudaOps::linear(TensorView x, TensorView w, TensorView bias, TensorView y) { linear_onto(x, w, bias, y, false); }

void CudaOps::linear_onto(TensorView x, TensorView w, TensorView bias, TensorView y, bool accumulate, KShares* shares) {
  expect("linear", "x", x, dtype_, -1, -1);
  expect("linear", "w", w, dtype_, -1, x.cols);
  expect_vector("linear", "bias", bias, dtype_, w.rows, true);
  expect("linear", "y", y, y.dtype == DType::f32 ? DType::f32 : dtype_, x.rows, w.rows);
  require(bias.data == nullptr || y.dtype == dtype_, "[linear] y: expected ", name_of(dtype_), " with a bias, got ",
          name_of(y.dtype));
  if (x.rows == 0 || w.rows == 0) return;
  device_.use();
  if (!deterministic_ && !accumulate &&
      decode_linear(tensor_maps_, decode_workspace_.data(), x, w, bias.data, y, {}, device_.processors(), stream(), shares)) {
    return;
  }
  const int32_t alignment =
      std::min({alignment_of(x.data, x.ld, dtype_), alignment_of(w.data, w.ld, dtype_), alignment_of(y.data, y.ld, y.dtype)});
  const LinearKey key = {deterministic_ ? kDeterministicRows : bucket_of(x.rows),
                         x.cols,
                         w.rows,
                         x.ld,
                         w.ld,
                         y.ld,
                         static_cast<int32_t>(y.dtype),
                         bias.data != nullptr,
                         0,
                         accumulate ? 1 : 0,
                         alignment};
  matmul(key, x.data, w.data, bias.data, y.data, x.rows);
}

// Five ways with adapters, each the fastest of what was measured at its size (benchmarks/results):
// * A decode step: all in one launch (linear_decode.cu).
// * Many rows with adapters: base and LoRA as one product (fused_linear.h). Rounding differs from the single operations by one
// step,
//   so the deterministic mode, where a row's bits must not depend on its group's size, does not; nor does the next way.
// * The same, where the layout does not allow that: the expand writes y first and the base product adds to it, whose epilogue reads
//   y while other tiles compute; the other way round y would be read and written once more, bound by bandwidth.
// * A few small tiles: the shrink runs beside the base product, on a branch of the stream, and only the expand comes after.
// * Many small tiles: the base product, then shrink and expand in one launch (lora_decode.cu).
void CudaOps::linear_lora(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                          TensorView s, TensorView y) {
  linear_lora_leaving(x, w, bias, linear, groups, s, y, nullptr);
}

void CudaOps::linear_lora_leaving(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                  TensorView s, TensorView y, KShares* shares) {
  expect("linear_lora", "x", x, dtype_, -1, linear.in);
  expect("linear_lora", "w", w, dtype_, columns_of(linear), linear.in);
  expect_vector("linear_lora", "bias", bias, dtype_, w.rows, true);
  expect("linear_lora", "y", y, y.dtype == DType::f32 ? DType::f32 : dtype_, x.rows, w.rows);
  require(bias.data == nullptr || y.dtype == dtype_, "[linear_lora] y: expected ", name_of(dtype_), " with a bias, got ",
          name_of(y.dtype));
  if (!any_lora(groups) || x.rows == 0) {
    linear_onto(x, w, bias, y, false, shares);
    return;
  }
  expect_s("linear_lora", "s", s, groups, x.rows, dtype_);
  const LoraCall call = lora_call("linear_lora", linear, groups, x.rows);
  if (!deterministic_ && y.dtype == dtype_ && is_decode(linear, groups, x, s, y)) {
    const Ranks ranks = ranks_of(linear, groups);
    if (ranks.stacked == 0) return linear_onto(x, w, bias, y, false, shares);
    device_.use();
    if (decode_linear(tensor_maps_, decode_workspace_.data(), x, w, bias.data, y, {call, s, ranks.single}, device_.processors(),
                      stream(), shares)) {
      return;
    }
  }
  if (!deterministic_ && y.dtype == dtype_ && many_rows(groups, x.rows)) {
    const TensorView e = shrink_for_product(linear, groups, x, s);
    if (fused_onto(x, w, bias, linear, groups, s, e, y)) return;
    linear_lora_filled(x, w, bias, linear, groups, s, y);
    return;
  }
  if (count_tiles(groups, 16).tiles > kBranchTiles) {
    linear_onto(x, w, bias, y, false);
    if (lora_small(linear, groups, x, s, y)) return;
    lora_shrink(linear, groups, x, s);
  } else {
    device_.use();
    check(cudaEventRecord(branch_.fork, stream()), "cudaEventRecord");
    check(cudaStreamWaitEvent(branch_.stream, branch_.fork), "cudaStreamWaitEvent");
    shrink_on(branch_.stream, linear, groups, x, s);
    check(cudaEventRecord(branch_.join, branch_.stream), "cudaEventRecord");
    linear_onto(x, w, bias, y, false);
    check(cudaStreamWaitEvent(stream(), branch_.join), "cudaStreamWaitEvent");
  }
  lora_expand(linear, groups, s, y);
}

bool CudaOps::linear_lora_fused(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                TensorView s, TensorView y) {
  return fused_onto(x, w, bias, linear, groups, s, {}, y);
}

TensorView CudaOps::shrink_for_product(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) {
  const TensorView e = fused_linear_->place_of_e(linear, groups, x.rows);
  return shrink_on(stream(), linear, groups, x, s, e) ? e : TensorView{};
}

bool CudaOps::fused_onto(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                         TensorView s, TensorView e, TensorView y) {
  const int32_t taken = fused_linear_->forward(linear, groups, x, w, bias, s, e, y);
  if (taken < 0) return false;
  if (taken < groups.count) lora_expand(linear, groups_from(groups, taken), s, y);
  return true;
}

void CudaOps::linear_lora_filled(TensorView x, TensorView w, TensorView bias, const LoraLinear& linear, const LoraGroups& groups,
                                 TensorView s, TensorView y) {
  lora_fill(linear, groups, s, y);
  linear_onto(x, w, bias, y, true);
}

void CudaOps::linear_lora_swiglu(TensorView x, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView s,
                                 TensorView gate_up, TensorView h, bool keep) {
  const char* op = "linear_lora_swiglu";
  expect(op, "x", x, dtype_, -1, linear.in);
  expect(op, "w", w, dtype_, columns_of(linear), linear.in);
  expect(op, "gate_up", gate_up, dtype_, x.rows, w.rows);
  require(linear.parts == 2 && linear.out[0] == linear.out[1], "[", op, "] linear: expected two parts as wide as one another");
  expect(op, "h", h, dtype_, x.rows, linear.out[0]);
  const bool lora = any_lora(groups);
  if (lora) expect_s(op, "s", s, groups, x.rows, dtype_);
  const LoraCall call = lora ? lora_call(op, linear, groups, x.rows) : LoraCall{};
  if (x.rows == 0) return;
  if (!deterministic_ && !keep && (!lora || is_decode(linear, groups, x, s, h))) {
    const int rank = lora ? ranks_of(linear, groups).stacked : 0;
    device_.use();
    if (decode_swiglu(tensor_maps_, decode_workspace_.data(), x, w, h, {rank > 0 ? call : LoraCall{}, s, rank},
                      device_.processors(), stream())) {
      return;
    }
  }
  if (deterministic_ || (lora ? !many_rows(groups, x.rows) : x.rows < kManyBaseRows))
    return Ops::linear_lora_swiglu(x, w, linear, groups, s, gate_up, h, keep);
  const TensorView e = lora ? shrink_for_product(linear, groups, x, s) : TensorView{};
  const int32_t taken = fused_linear_->swiglu(linear, groups, x, w, s, e, gate_up, h);
  if (taken < 0) {
    if (!fused_onto(x, w, {}, linear, groups, s, e, gate_up)) linear_lora_filled(x, w, {}, linear, groups, s, gate_up);
    swiglu(gate_up, h);
  } else if (taken < groups.count) {
    lora_expand(linear, groups_from(groups, taken), s, gate_up);
    const int64_t from = groups.host_groups[taken].row_begin;
    swiglu(gate_up.slice_rows(from, x.rows - from), h.slice_rows(from, x.rows - from));
  }
}

void CudaOps::linear_lora_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups, TensorView ds,
                                   TensorView dx) {
  expect("linear_lora_backward", "dy", dy, dtype_, -1, columns_of(linear));
  expect("linear_lora_backward", "w", w, dtype_, columns_of(linear), linear.in);
  expect("linear_lora_backward", "dx", dx, dtype_, dy.rows, linear.in);
  if (!any_lora(groups) || dy.rows == 0) {
    linear_backward(dy, w, dx, false);
    return;
  }
  expect_s("linear_lora_backward", "ds", ds, groups, dy.rows, dtype_);
  lora_call("linear_lora_backward", linear, groups, dy.rows);  // for its checks
  if (!deterministic_ && many_rows(groups, dy.rows) && linear_lora_backward_fused(dy, w, linear, groups, ds, dx)) return;
  linear_backward(dy, w, dx, false);
  lora_backward_x(linear, groups, ds, dx);
}

bool CudaOps::linear_lora_backward_fused(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups,
                                         TensorView ds, TensorView dx) {
  const int32_t taken = fused_linear_->backward(linear, groups, dy, w, ds, dx);
  if (taken < 0) return false;
  if (taken < groups.count) lora_backward_x(linear, groups_from(groups, taken), ds, dx);
  return true;
}

void CudaOps::linear_lora_swiglu_backward(TensorView dy, TensorView w, const LoraLinear& linear, const LoraGroups& groups,
                                          TensorView ds, TensorView gate_up, TensorView h) {
  const char* op = "linear_lora_swiglu_backward";
  expect(op, "dy", dy, dtype_, -1, columns_of(linear));
  expect(op, "w", w, dtype_, columns_of(linear), linear.in);
  expect(op, "gate_up", gate_up, dtype_, dy.rows, 2 * linear.in);
  expect(op, "h", h, dtype_, dy.rows, linear.in);
  if (!deterministic_ && groups.max_rank > 0 && many_rows(groups, dy.rows)) {
    expect_s(op, "ds", ds, groups, dy.rows, dtype_);
    lora_call(op, linear, groups, dy.rows);  // for its checks
    if (fused_linear_->swiglu_backward(linear, groups, dy, w, ds, gate_up, h)) return;
  }
  Ops::linear_lora_swiglu_backward(dy, w, linear, groups, ds, gate_up, h);
}

void CudaOps::linear_backward(TensorView dy, TensorView w, TensorView dx, bool accumulate) {
  expect("linear_backward", "dy", dy, dtype_, -1, -1);
  expect("linear_backward", "w", w, dtype_, dy.cols, -1);
  expect("linear_backward", "dx", dx, dtype_, dy.rows, w.cols);
  if (dy.rows == 0 || w.cols == 0) return;
  device_.use();
  const int32_t alignment =
      std::min({alignment_of(dy.data, dy.ld, dtype_), alignment_of(w.data, w.ld, dtype_), alignment_of(dx.data, dx.ld, dtype_)});
  const LinearKey key = {deterministic_ ? kDeterministicRows : bucket_of(dy.rows),
                         w.cols,
                         w.rows,
                         dy.ld,
                         w.ld,
                         dx.ld,
                         static_cast<int32_t>(dtype_),
                         0,
                         1,
                         accumulate ? 1 : 0,
                         alignment};
  matmul(key, dy.data, w.data, nullptr, dx.data, dy.rows);
}

}  // namespace loquetier::cuda

extern "C" __attribute__((visibility("default"))) loquetier::Ops* loquetier_make_cuda_ops(int device, int compute_dtype,
                                                                                          int deterministic) {
  return new loquetier::cuda::CudaOps(device, static_cast<loquetier::DType>(compute_dtype), deterministic != 0);
}
