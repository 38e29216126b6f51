// Rotary positions with the optional norm of q and k, the write into the pages, and the gradient.
#include <cmath>
#include <cstring>

#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

namespace {

void check_rope(const char* op, const TensorView& qkv, const AttentionShape& shape, const TensorView& cos_sin,
                const TensorView& q_norm, const TensorView& k_norm) {
  const int64_t d = shape.head_size;
  require(d > 0 && d % 2 == 0 && shape.q_heads > 0 && shape.kv_heads > 0, "[", op,
          "] shape: expected heads and an even head size, got ", shape.q_heads, " and ", shape.kv_heads, " heads of ", d);
  check_matrix(op, "qkv", qkv, -1, (shape.q_heads + 2 * int64_t{shape.kv_heads}) * d);
  check_matrix(op, "cos_sin", cos_sin, -1, d);
  require(cos_sin.rows >= qkv.rows, "[", op, "] cos_sin: expected at least ", qkv.rows, " rows, got ", cos_sin.rows);
  require(q_norm.empty() == k_norm.empty(), "[", op, "] k_norm: expected both norms or none");
  if (!q_norm.empty()) {
    check_vector(op, "q_norm", q_norm, d);
    check_vector(op, "k_norm", k_norm, d);
  }
}

}  // namespace

void CpuOps::rope_table(const int32_t* positions, const float* inv_freq, float attention_factor, TensorView cos_sin) {
  check_matrix("rope_table", "cos_sin", cos_sin, -1, -1);
  require(cos_sin.cols % 2 == 0, "[rope_table] cos_sin: expected an even number of columns, got ", cos_sin.cols);
  const int64_t half = cos_sin.cols / 2;
  parallel_rows(cos_sin.rows, half * 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = static_cast<float*>(cos_sin.at(t));
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions[t]) * inv_freq[i];
        row[i] = std::cos(angle) * attention_factor;
        row[half + i] = std::sin(angle) * attention_factor;
      }
    }
  });
}

void CpuOps::rope(TensorView qkv, const Rope& rope) {
  const AttentionShape& shape = rope.shape;
  const KvShape& kv_shape = rope.kv_shape;
  const TensorView cos_sin = rope.cos_sin, q_norm = rope.q_norm, k_norm = rope.k_norm, raw = rope.raw;
  const int32_t* const kv_slots = rope.kv_slots;
  check_rope("rope", qkv, shape, cos_sin, q_norm, k_norm);
  const int64_t d = shape.head_size, half = d / 2, q_heads = shape.q_heads, heads = q_heads + shape.kv_heads;
  if (!raw.empty()) {
    check_matrix("rope", "raw", raw, -1, heads * d);
    require(raw.rows <= qkv.rows, "[rope] raw: expected at most ", qkv.rows, " rows, got ", raw.rows);
  }
  if (kv_slots) {
    require(kv_shape.kv_heads == shape.kv_heads && kv_shape.head_size == shape.head_size, "[rope] kv: expected pages of ",
            shape.kv_heads, " heads of ", d, ", got ", kv_shape.kv_heads, " of ", kv_shape.head_size);
    const int64_t slots = kv_shape.pages * kv_shape.page_size;
    for (int64_t t = 0; t < qkv.rows; ++t)
      require(kv_slots[t] < slots, "[rope] kv_slots[", t, "]: expected below ", slots, ", got ", kv_slots[t]);
  }
  const float* norms[2] = {q_norm.empty() ? nullptr : q_norm.as<float>(), k_norm.empty() ? nullptr : k_norm.as<float>()};
  const int64_t raw_rows = raw.empty() ? 0 : raw.rows, kv_width = int64_t{shape.kv_heads} * d;
  parallel_rows(qkv.rows, qkv.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = static_cast<float*>(qkv.at(t));
      const float* cos = static_cast<const float*>(cos_sin.at(t));
      if (t < raw_rows) std::memcpy(raw.at(t), row, static_cast<size_t>(heads * d) * sizeof(float));
      for (int64_t h = 0; h < heads; ++h) {
        float* x = row + h * d;
        if (const float* w = norms[h >= q_heads]) {
          const double mean = kernels_.dot_double(x, x, d) / static_cast<double>(d);
          kernels_.scale_by(static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(rope.eps))), x, w, x, d);
        }
        kernels_.rotate(cos, cos + half, x, x + half, half);
      }
      if (kv_slots && kv_slots[t] >= 0) {
        const int64_t slot = int64_t{kv_slots[t]} * kv_width;
        const size_t bytes = static_cast<size_t>(kv_width) * sizeof(float);
        std::memcpy(static_cast<float*>(rope.kv.k) + slot, row + q_heads * d, bytes);
        std::memcpy(static_cast<float*>(rope.kv.v) + slot, row + heads * d, bytes);
      }
    }
  });
}

// The rotation back (its transpose; the factor of cos_sin is in it on both sides), then the gradient of the norm from `raw`.
void CpuOps::rope_backward(TensorView dqkv, const AttentionShape& shape, TensorView cos_sin, TensorView q_norm, TensorView k_norm,
                           float eps, TensorView raw) {
  check_rope("rope_backward", dqkv, shape, cos_sin, q_norm, k_norm);
  const int64_t d = shape.head_size, half = d / 2, q_heads = shape.q_heads, heads = q_heads + shape.kv_heads;
  if (!q_norm.empty()) {
    check_matrix("rope_backward", "raw", raw, -1, heads * d);
    require(raw.rows >= dqkv.rows, "[rope_backward] raw: expected at least ", dqkv.rows, " rows, got ", raw.rows);
  }
  const float* norms[2] = {q_norm.empty() ? nullptr : q_norm.as<float>(), k_norm.empty() ? nullptr : k_norm.as<float>()};
  const size_t scratch = 2 * Workspaces::size_for<float>(d);
  parallel_rows(dqkv.rows, dqkv.cols, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, scratch);
    float* back = workspace.take<float>(half);  // -sin
    float* dy = workspace.take<float>(d);
    for (int64_t t = begin; t < end; ++t) {
      float* row = static_cast<float*>(dqkv.at(t));
      const float* cos = static_cast<const float*>(cos_sin.at(t));
      kernels_.scale(-1.0f, cos + half, back, half);
      for (int64_t h = 0; h < heads; ++h) {
        float* dx = row + h * d;
        kernels_.rotate(cos, back, dx, dx + half, half);
        if (const float* w = norms[h >= q_heads]) {
          const float* x = static_cast<const float*>(raw.at(t, h * d));
          const float r =
              static_cast<float>(1.0 / std::sqrt(kernels_.dot_double(x, x, d) / static_cast<double>(d) + static_cast<double>(eps)));
          const double mean = kernels_.dot3_double(x, w, dx, d) / static_cast<double>(d);
          std::memcpy(dy, dx, static_cast<size_t>(d) * sizeof(float));
          std::memset(dx, 0, static_cast<size_t>(d) * sizeof(float));
          kernels_.norm_backward(r, w, dy, static_cast<float>(mean * r * r * r), x, dx, d);
        }
      }
    }
  });
}

}  // namespace loquetier::cpu
