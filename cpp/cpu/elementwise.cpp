// Row operations: embedding, gather, scatter, convert, norms, swiglu.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

namespace {

void check_index(const char* op, const char* name, const int32_t* index, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    require(index[i] >= 0 && index[i] < limit, "[", op, "] ", name, "[", i, "]: expected 0 to ", limit - 1, ", got ", index[i]);
}

float from_bf16(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);
  const float magnitude =
      exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f : std::bit_cast<float>((exponent + 112) << 23 | fraction << 13);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

uint16_t to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00);   // NaN
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00);  // rounds above 65504
  if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 rounds to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

float read_float(const void* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(row)[i]);
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(row)[i]);
    default:
      return static_cast<const float*>(row)[i];
  }
}

bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

// 1 / sqrt(mean(x^2) + eps)
float inverse_rms(const Kernels& kernels, const float* x, int64_t n, float eps) {
  return static_cast<float>(1.0 / std::sqrt(kernels.dot_double(x, x, n) / static_cast<double>(n) + static_cast<double>(eps)));
}

}  // namespace

void CpuOps::embedding(const int32_t* ids, TensorView table, TensorView y) {
  check_matrix("embedding", "table", table, -1, -1);
  check_matrix("embedding", "y", y, -1, table.cols);
  check_index("embedding", "ids", ids, y.rows, table.rows);
  for (int64_t t = 0; t < y.rows; ++t) std::memcpy(y.at(t), table.at(ids[t]), static_cast<size_t>(y.cols) * sizeof(float));
}

void CpuOps::take_tokens(const int32_t* const* from, int32_t* ids, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (from[i] != nullptr) ids[i] = *from[i];
  }
}

void CpuOps::gather_rows(TensorView x, const int32_t* index, TensorView y) {
  check_matrix("gather_rows", "x", x, -1, -1);
  check_matrix("gather_rows", "y", y, -1, x.cols);
  check_index("gather_rows", "index", index, y.rows, x.rows);
  for (int64_t t = 0; t < y.rows; ++t) std::memcpy(y.at(t), x.at(index[t]), static_cast<size_t>(y.cols) * sizeof(float));
}

void CpuOps::scatter_add_rows(TensorView x, const int32_t* index, TensorView y) {
  check_matrix("scatter_add_rows", "x", x, -1, -1);
  check_matrix("scatter_add_rows", "y", y, -1, x.cols);
  check_index("scatter_add_rows", "index", index, x.rows, y.rows);
  for (int64_t t = 0; t < x.rows; ++t)
    kernels_.axpy(1.0f, static_cast<const float*>(x.at(t)), static_cast<float*>(y.at(index[t])), x.cols);
}

void CpuOps::convert(TensorView src, TensorView dst) {
  for (const TensorView& view : {src, dst})
    require(is_float(view.dtype), "[convert] dtype: expected f32, f16 or bf16, got ", name_of(view.dtype));
  check_matrix("convert", "src", src, -1, -1, src.dtype);
  check_matrix("convert", "dst", dst, src.rows, src.cols, dst.dtype);
  parallel_rows(src.rows, src.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const void* from = src.at(t);
      void* to = dst.at(t);
      if (src.dtype == dst.dtype) {
        std::memmove(to, from, static_cast<size_t>(src.cols) * size_of(src.dtype));
      } else {
        for (int64_t i = 0; i < src.cols; ++i) {
          const float x = read_float(from, src.dtype, i);
          if (dst.dtype == DType::f32) static_cast<float*>(to)[i] = x;
          else static_cast<uint16_t*>(to)[i] = dst.dtype == DType::f16 ? to_f16(x) : to_bf16(x);
        }
      }
    }
  });
}

void CpuOps::rms_norm(TensorView x, TensorView w, float eps, TensorView y) {
  check_matrix("rms_norm", "x", x, -1, -1);
  check_vector("rms_norm", "w", w, x.cols);
  check_matrix("rms_norm", "y", y, x.rows, x.cols);
  const float* ws = w.as<float>();
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* xs = static_cast<const float*>(x.at(t));
      kernels_.scale_by(inverse_rms(kernels_, xs, x.cols, eps), xs, ws, static_cast<float*>(y.at(t)), x.cols);
    }
  });
}

void CpuOps::add_rms_norm(TensorView x, TensorView delta, TensorView w, float eps, TensorView sum, TensorView y) {
  check_matrix("add_rms_norm", "x", x, -1, -1);
  check_matrix("add_rms_norm", "delta", delta, x.rows, x.cols);
  check_vector("add_rms_norm", "w", w, x.cols);
  check_matrix("add_rms_norm", "sum", sum, x.rows, x.cols);
  check_matrix("add_rms_norm", "y", y, x.rows, x.cols);
  const float* ws = w.as<float>();
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* xs = static_cast<const float*>(x.at(t));
      float* sums = static_cast<float*>(sum.at(t));
      if (sums != xs) std::memcpy(sums, xs, static_cast<size_t>(x.cols) * sizeof(float));
      kernels_.axpy(1.0f, static_cast<const float*>(delta.at(t)), sums, x.cols);
      kernels_.scale_by(inverse_rms(kernels_, sums, x.cols, eps), sums, ws, static_cast<float*>(y.at(t)), x.cols);
    }
  });
}

void CpuOps::rms_norm_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx) {
  rms_norm_backward_onto("rms_norm_backward", x, w, eps, dy, dx, {});
}

void CpuOps::rms_norm_and_backward(TensorView x, TensorView w, float eps, TensorView dy, TensorView dx, TensorView y) {
  check_matrix("rms_norm_and_backward", "y", y, x.rows, x.cols);
  rms_norm_backward_onto("rms_norm_and_backward", x, w, eps, dy, dx, y);
}

// With r = rsqrt(mean(x^2) + eps) and g = w dy: dx += r g - x r^3 mean(g x). y: the forward's output too, or without data.
void CpuOps::rms_norm_backward_onto(const char* op, TensorView x, TensorView w, float eps, TensorView dy, TensorView dx,
                                    TensorView y) {
  check_matrix(op, "x", x, -1, -1);
  check_vector(op, "w", w, x.cols);
  check_matrix(op, "dy", dy, x.rows, x.cols);
  check_matrix(op, "dx", dx, x.rows, x.cols);
  const float* ws = w.as<float>();
  parallel_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* xs = static_cast<const float*>(x.at(t));
      const float* dys = static_cast<const float*>(dy.at(t));
      const float r = inverse_rms(kernels_, xs, x.cols, eps);
      const double mean = kernels_.dot3_double(xs, ws, dys, x.cols) / static_cast<double>(x.cols);
      kernels_.norm_backward(r, ws, dys, static_cast<float>(mean * r * r * r), xs, static_cast<float*>(dx.at(t)), x.cols);
      if (y.data) kernels_.scale_by(r, xs, ws, static_cast<float*>(y.at(t)), x.cols);
    }
  });
}

void CpuOps::swiglu(TensorView gate_up, TensorView y) {
  check_matrix("swiglu", "gate_up", gate_up, -1, -1);
  check_matrix("swiglu", "y", y, gate_up.rows, gate_up.cols / 2);
  require(gate_up.cols % 2 == 0, "[swiglu] gate_up: expected an even number of columns, got ", gate_up.cols);
  const int64_t n = y.cols;
  parallel_rows(y.rows, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = static_cast<const float*>(gate_up.at(t));
      kernels_.swiglu(gate, gate + n, static_cast<float*>(y.at(t)), n);
    }
  });
}

void CpuOps::swiglu_backward(TensorView gate_up, TensorView dy, TensorView dgate_up) {
  check_matrix("swiglu_backward", "gate_up", gate_up, -1, -1);
  check_matrix("swiglu_backward", "dy", dy, gate_up.rows, gate_up.cols / 2);
  check_matrix("swiglu_backward", "dgate_up", dgate_up, gate_up.rows, gate_up.cols);
  require(gate_up.cols % 2 == 0, "[swiglu_backward] gate_up: expected an even number of columns, got ", gate_up.cols);
  const int64_t n = dy.cols;
  parallel_rows(dy.rows, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = static_cast<const float*>(gate_up.at(t));
      float* dgate = static_cast<float*>(dgate_up.at(t));
      kernels_.swiglu_backward(gate, gate + n, static_cast<const float*>(dy.at(t)), dgate, dgate + n, n);
    }
  });
}

void CpuOps::swiglu_and_backward(TensorView gate_up, TensorView dy, TensorView dgate_up, TensorView y) {
  check_matrix("swiglu_and_backward", "gate_up", gate_up, -1, -1);
  check_matrix("swiglu_and_backward", "dy", dy, gate_up.rows, gate_up.cols / 2);
  check_matrix("swiglu_and_backward", "dgate_up", dgate_up, gate_up.rows, gate_up.cols);
  check_matrix("swiglu_and_backward", "y", y, gate_up.rows, gate_up.cols / 2);
  require(gate_up.cols % 2 == 0, "[swiglu_and_backward] gate_up: expected an even number of columns, got ", gate_up.cols);
  const int64_t n = dy.cols;
  parallel_rows(dy.rows, n, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, Workspaces::size_for<float>(n));
    float* row = workspace.take<float>(n);  // of y, whose place dy may still have
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = static_cast<const float*>(gate_up.at(t));
      float* dgate = static_cast<float*>(dgate_up.at(t));
      kernels_.swiglu(gate, gate + n, row, n);
      kernels_.swiglu_backward(gate, gate + n, static_cast<const float*>(dy.at(t)), dgate, dgate + n, n);
      std::copy_n(row, n, static_cast<float*>(y.at(t)));
    }
  });
}

}  // namespace loquetier::cpu
