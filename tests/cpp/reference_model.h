// The whole model once more, straightforward, one sequence at a time and templated on the scalar: `double` is the oracle for
// values, `Dual` (forward-mode derivatives, kLanes directions at once) for gradients, exact to rounding. Shares no code with
// cpp/model or cpp/cpu but the random numbers of dropout.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "adapter/adapter.h"
#include "core/random.h"
#include "model/base_weights.h"

namespace loquetier::test {

constexpr int kLanes = 8;

struct Dual {
  double v = 0;
  std::array<double, kLanes> d{};
  Dual() = default;
  Dual(double value) : v(value) {}  // NOLINT: a constant
};
inline Dual chain(const Dual& a, double value, double slope) {
  Dual r(value);
  for (int i = 0; i < kLanes; ++i) r.d[i] = slope * a.d[i];
  return r;
}
inline Dual operator+(const Dual& a, const Dual& b) {
  Dual r(a.v + b.v);
  for (int i = 0; i < kLanes; ++i) r.d[i] = a.d[i] + b.d[i];
  return r;
}
inline Dual operator*(const Dual& a, const Dual& b) {
  Dual r(a.v * b.v);
  for (int i = 0; i < kLanes; ++i) r.d[i] = a.d[i] * b.v + a.v * b.d[i];
  return r;
}
inline Dual operator*(const Dual& a, double b) { return chain(a, a.v * b, b); }
inline Dual operator-(const Dual& a, const Dual& b) { return a + b * -1.0; }
inline Dual& operator+=(Dual& a, const Dual& b) { return a = a + b; }
using std::exp;
using std::log;
inline Dual exp(const Dual& a) { return chain(a, std::exp(a.v), std::exp(a.v)); }
inline Dual log(const Dual& a) { return chain(a, std::log(a.v), 1 / a.v); }
inline Dual rsqrt(const Dual& a) { return chain(a, 1 / std::sqrt(a.v), -0.5 / (a.v * std::sqrt(a.v))); }
inline Dual inverse(const Dual& a) { return chain(a, 1 / a.v, -1 / (a.v * a.v)); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }
inline double inverse(double a) { return 1 / a; }
inline double value(double a) { return a; }
inline double value(const Dual& a) { return a.v; }

template <class S>
using Matrix = std::vector<std::vector<S>>;  // [rows][cols]

// An adapter's parameters as scalars of S, in the flat layout; rows of one sequence with their dropout keys.
template <class S>
struct ReferenceLora {
  const AdapterLayout* layout = nullptr;  // null: base model
  const S* flat = nullptr;
  double dropout = 0;
  std::vector<uint64_t> row_keys;  // per position, when dropout > 0
};

template <class S>
class ReferenceModel {
 public:
  explicit ReferenceModel(const BaseWeights& base)
      : config_(base.config), table_(base.host), inv_freq_(rope_inv_freq(base.config)) {}

  // Logits [T][V] of every position.
  Matrix<S> logits(const std::vector<int32_t>& ids, const ReferenceLora<S>& lora) const {
    const size_t n = ids.size();
    const int d = config_.head_size, heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    Matrix<S> x(n);
    for (size_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < config_.hidden_size; ++i) x[t].push_back(S(at(table_.embedding, ids[t], i)));
    }
    for (int64_t l = 0; l < config_.num_layers; ++l) {
      const LayerWeights& w = table_.layers[static_cast<size_t>(l)];
      const Matrix<S> qkv = linear(norm(x, w.input_norm), w.qkv, site_of(l, Site::qkv), lora);
      Matrix<S> q = columns(qkv, 0, heads * d), k = columns(qkv, heads * d, kv_heads * d),
                v = columns(qkv, (heads + kv_heads) * d, kv_heads * d);
      rotate(q, heads, w.q_norm);
      rotate(k, kv_heads, w.k_norm);
      add(x, linear(attention(q, k, v), w.o, site_of(l, Site::o), lora));
      const Matrix<S> gate_up = linear(norm(x, w.post_norm), w.gate_up, site_of(l, Site::gate_up), lora);
      const size_t f = static_cast<size_t>(config_.intermediate_size);
      Matrix<S> act(n, std::vector<S>(f));
      for (size_t t = 0; t < n; ++t) {
        for (size_t i = 0; i < f; ++i) {
          const S gate = gate_up[t][i];
          act[t][i] = gate * inverse(S(1.0) + exp(gate * -1.0)) * gate_up[t][f + i];
        }
      }
      add(x, linear(act, w.down, site_of(l, Site::down), lora));
    }
    return linear(norm(x, table_.final_norm), table_.lm_head, lm_head_site(config_), lora);
  }

  static S logprob(const std::vector<S>& logits, int32_t target) {
    double largest = value(logits[0]);
    for (const S& z : logits) largest = std::max(largest, value(z));
    S sum(0.0);
    for (const S& z : logits) sum += exp(z - S(largest));
    return logits[static_cast<size_t>(target)] - S(largest) - log(sum);
  }

  static S loss(const S& p, const LossRow& row) {
    const double weight = row.weight, advantage = row.advantage;
    if (row.kind == LossKind::cross_entropy || row.kind == LossKind::weighted_logprob) return p * -weight;
    const S ratio = exp(p - S(double{row.old_logprob}));
    if (row.kind == LossKind::importance_sampling) return ratio * (-weight * advantage);
    const double clipped = std::min(std::max(value(ratio), 1.0 - row.clip_low), 1.0 + row.clip_high);
    if (clipped * advantage < value(ratio) * advantage) return S(-weight * clipped * advantage);
    return ratio * (-weight * advantage);
  }

 private:
  static double at(TensorView t, int64_t row, int64_t col) { return double{static_cast<const float*>(t.data)[row * t.ld + col]}; }

  static Matrix<S> columns(const Matrix<S>& x, int begin, int count) {
    Matrix<S> y;
    for (const auto& row : x) y.emplace_back(row.begin() + begin, row.begin() + begin + count);
    return y;
  }

  static void add(Matrix<S>& x, const Matrix<S>& y) {
    for (size_t t = 0; t < x.size(); ++t) {
      for (size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  }

  void norm_span(S* x, size_t n, TensorView w) const {
    S sum(0.0);
    for (size_t i = 0; i < n; ++i) sum += x[i] * x[i];
    const S r = rsqrt(sum * (1.0 / static_cast<double>(n)) + S(double{config_.rms_norm_eps}));
    for (size_t i = 0; i < n; ++i) x[i] = x[i] * r * at(w, 0, static_cast<int64_t>(i));
  }

  Matrix<S> norm(Matrix<S> x, TensorView w) const {
    for (auto& row : x) norm_span(row.data(), row.size(), w);
    return x;
  }

  Matrix<S> linear(const Matrix<S>& x, const LinearWeights& blocks, int32_t site, const ReferenceLora<S>& lora) const {
    Matrix<S> y(x.size());
    int32_t part = 0;
    for (const LinearBlock& block : blocks) {
      const size_t begin = y.empty() ? 0 : y[0].size();
      for (size_t t = 0; t < x.size(); ++t) {
        for (int64_t o = 0; o < block.w.rows; ++o) {
          S sum(block.bias.empty() ? 0.0 : at(block.bias, 0, o));
          for (int64_t i = 0; i < block.w.cols; ++i) sum += x[t][static_cast<size_t>(i)] * at(block.w, o, i);
          y[t].push_back(sum);
        }
        add_lora(x[t], t, site, part, lora, y[t].data() + begin);
      }
      ++part;
    }
    return y;
  }

  static void add_lora(const std::vector<S>& x, size_t t, int32_t site, int32_t part, const ReferenceLora<S>& lora, S* y) {
    if (!lora.layout) return;
    for (size_t m = 0; m < lora.layout->targets.size(); ++m) {
      const LoraTarget& target = lora.layout->targets[m];
      if (target.module.site != site || target.module.part != part) continue;
      const S *a = lora.flat + lora.layout->a_offset[m], *b = lora.flat + lora.layout->b_offset[m];
      for (int64_t r = 0; r < target.rank; ++r) {
        S s(0.0);
        for (int64_t i = 0; i < target.module.in; ++i) {
          if (lora.dropout > 0 && !dropout_keep(lora.row_keys[t], dropout_stream(site, part), i, static_cast<float>(lora.dropout)))
            continue;
          s += a[r * target.module.in + i] * x[static_cast<size_t>(i)];
        }
        s = s * (double{target.scale} / (1 - lora.dropout));
        for (int64_t o = 0; o < target.module.out; ++o) y[o] += b[o * target.rank + r] * s;
      }
    }
  }

  void rotate(Matrix<S>& x, int heads, TensorView norm_weight) const {
    const int d = config_.head_size, half = d / 2;
    for (size_t t = 0; t < x.size(); ++t) {
      for (int h = 0; h < heads; ++h) {
        S* head = x[t].data() + h * d;
        if (norm_weight.data) norm_span(head, static_cast<size_t>(d), norm_weight);
        for (int i = 0; i < half; ++i) {
          const double angle = static_cast<double>(t) * double{inv_freq_[static_cast<size_t>(i)]};
          const S first = head[i], second = head[half + i];
          head[i] = first * std::cos(angle) - second * std::sin(angle);
          head[half + i] = second * std::cos(angle) + first * std::sin(angle);
        }
      }
    }
  }

  Matrix<S> attention(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v) const {
    const int d = config_.head_size, heads = config_.num_heads, group = heads / config_.num_kv_heads;
    Matrix<S> out(q.size(), std::vector<S>(static_cast<size_t>(heads * d), S(0.0)));
    for (size_t t = 0; t < q.size(); ++t) {
      for (int h = 0; h < heads; ++h) {
        std::vector<S> p;
        S sum(0.0);
        for (size_t u = 0; u <= t; ++u) {
          S score(0.0);
          for (int i = 0; i < d; ++i) score += q[t][static_cast<size_t>(h * d + i)] * k[u][static_cast<size_t>(h / group * d + i)];
          p.push_back(exp(score * (1.0 / std::sqrt(static_cast<double>(d)))));
          sum += p.back();
        }
        for (size_t u = 0; u <= t; ++u) {
          const S weight = p[u] * inverse(sum);
          for (int i = 0; i < d; ++i)
            out[t][static_cast<size_t>(h * d + i)] += weight * v[u][static_cast<size_t>(h / group * d + i)];
        }
      }
    }
    return out;
  }

  const ModelConfig& config_;
  const WeightTable& table_;
  std::vector<float> inv_freq_;
};

}  // namespace loquetier::test
