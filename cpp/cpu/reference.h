// The oracle: every operation of ops.h, forward and backward, as plainly as it can be written, templated on the scalar S.
// With double it gives the values that backends are compared with; with std::complex<double> it proves each backward formula by
// complex step (tests/cpp/reference_tests.cpp). Comparisons look at the real part, so a derivative follows the branch that the
// value takes. Matrices are row-major; letters as in ops.h. Not part of the library: only tests include it.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "core/random.h"
#include "ops/ops.h"

namespace loquetier::reference {

inline double real(double x) { return x; }
inline double real(std::complex<double> x) { return x.real(); }

template <class S>
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<S> values;

  Matrix() = default;
  Matrix(int64_t r, int64_t c, S value = S{}) : rows(r), cols(c), values(static_cast<size_t>(r * c), value) {}
  S& operator()(int64_t i, int64_t j) { return values[static_cast<size_t>(i * cols + j)]; }
  const S& operator()(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * cols + j)]; }
  bool empty() const { return values.empty(); }
};

// ---------------------------------------------------------------- linear

template <class S>
Matrix<S> linear(const Matrix<S>& x, const Matrix<S>& w, const Matrix<S>& bias) {
  Matrix<S> y(x.rows, w.rows);
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t n = 0; n < w.rows; ++n) {
      S sum = bias.empty() ? S{} : bias(0, n);
      for (int64_t k = 0; k < x.cols; ++k) sum += x(t, k) * w(n, k);
      y(t, n) = sum;
    }
  return y;
}

template <class S>
Matrix<S> linear_backward(const Matrix<S>& dy, const Matrix<S>& w) {
  Matrix<S> dx(dy.rows, w.cols);
  for (int64_t t = 0; t < dy.rows; ++t)
    for (int64_t n = 0; n < w.rows; ++n)
      for (int64_t k = 0; k < w.cols; ++k) dx(t, k) += dy(t, n) * w(n, k);
  return dx;
}

// ---------------------------------------------------------------- lora

template <class S>
struct LoraPartOf {
  Matrix<S> a;  // [R, in]
  Matrix<S> b;  // [out, R]
  double scale = 0;
};

template <class S>
struct LoraGroupOf {
  int64_t row_begin = 0, rows = 0;
  std::vector<LoraPartOf<S>> parts;  // empty: no adapter
  double dropout = 0;
};

template <class S>
struct LoraCase {
  int32_t site = 0;
  int64_t in = 0;
  std::vector<int64_t> out;  // columns of each part
  std::vector<LoraGroupOf<S>> groups;
  std::vector<uint64_t> row_keys;  // [T]

  double mask(const LoraGroupOf<S>& group, int64_t row, int32_t part, int64_t column) const {
    if (group.dropout == 0) return 1;
    const bool keep =
        dropout_keep(row_keys[static_cast<size_t>(row)], dropout_stream(site, part), column, static_cast<float>(group.dropout));
    return keep ? 1 / (1 - group.dropout) : 0;
  }
  // each(group, its index, part, index of the part, r0, first output column)
  template <class Each>
  void for_each(Each each) const {
    for (size_t g = 0; g < groups.size(); ++g) {
      int64_t r0 = 0, n0 = 0;
      for (size_t p = 0; p < groups[g].parts.size(); ++p) {
        each(groups[g], g, groups[g].parts[p], static_cast<int32_t>(p), r0, n0);
        r0 += groups[g].parts[p].a.rows;
        n0 += out[p];
      }
    }
  }
};

// s is given, so that columns past a group's ranks keep what was there.
template <class S>
void lora_shrink(const LoraCase<S>& c, const Matrix<S>& x, Matrix<S>& s) {
  c.for_each([&](const auto& group, size_t, const auto& part, int32_t p, int64_t r0, int64_t) {
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t r = 0; r < part.a.rows; ++r) {
        S sum{};
        for (int64_t i = 0; i < c.in; ++i) sum += x(t, i) * c.mask(group, t, p, i) * part.a(r, i);
        s(t, r0 + r) = sum;
      }
  });
}

template <class S>
void lora_expand(const LoraCase<S>& c, const Matrix<S>& s, Matrix<S>& y) {
  c.for_each([&](const auto& group, size_t, const auto& part, int32_t, int64_t r0, int64_t n0) {
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t n = 0; n < part.b.rows; ++n)
        for (int64_t r = 0; r < part.a.rows; ++r) y(t, n0 + n) += part.scale * s(t, r0 + r) * part.b(n, r);
  });
}

template <class S>
void lora_backward_s(const LoraCase<S>& c, const Matrix<S>& dy, Matrix<S>& ds) {
  c.for_each([&](const auto& group, size_t, const auto& part, int32_t, int64_t r0, int64_t n0) {
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t r = 0; r < part.a.rows; ++r) {
        S sum{};
        for (int64_t n = 0; n < part.b.rows; ++n) sum += dy(t, n0 + n) * part.b(n, r);
        ds(t, r0 + r) = part.scale * sum;
      }
  });
}

template <class S>
void lora_backward_x(const LoraCase<S>& c, const Matrix<S>& ds, Matrix<S>& dx) {
  c.for_each([&](const auto& group, size_t, const auto& part, int32_t p, int64_t r0, int64_t) {
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t r = 0; r < part.a.rows; ++r)
        for (int64_t i = 0; i < c.in; ++i) dx(t, i) += ds(t, r0 + r) * part.a(r, i) * c.mask(group, t, p, i);
  });
}

template <class S>
struct LoraGradOf {
  Matrix<S> da, db;
};

// grads[g][p], added to.
template <class S>
void lora_backward_weights(const LoraCase<S>& c, const Matrix<S>& x, const Matrix<S>& s, const Matrix<S>& dy, const Matrix<S>& ds,
                           std::vector<std::vector<LoraGradOf<S>>>& grads) {
  c.for_each([&](const auto& group, size_t g, const auto& part, int32_t p, int64_t r0, int64_t n0) {
    LoraGradOf<S>& grad = grads[g][static_cast<size_t>(p)];
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t r = 0; r < part.a.rows; ++r) {
        for (int64_t n = 0; n < part.b.rows; ++n) grad.db(n, r) += part.scale * dy(t, n0 + n) * s(t, r0 + r);
        for (int64_t i = 0; i < c.in; ++i) grad.da(r, i) += ds(t, r0 + r) * x(t, i) * c.mask(group, t, p, i);
      }
  });
}

// ---------------------------------------------------------------- norm, rope

template <class S>
Matrix<S> rms_norm(const Matrix<S>& x, const Matrix<S>& w, double eps) {
  Matrix<S> y(x.rows, x.cols);
  for (int64_t t = 0; t < x.rows; ++t) {
    S squares{};
    for (int64_t i = 0; i < x.cols; ++i) squares += x(t, i) * x(t, i);
    const S r = 1.0 / std::sqrt(squares / static_cast<double>(x.cols) + eps);
    for (int64_t i = 0; i < x.cols; ++i) y(t, i) = x(t, i) * r * w(0, i);
  }
  return y;
}

template <class S>
Matrix<S> rms_norm_backward(const Matrix<S>& x, const Matrix<S>& w, double eps, const Matrix<S>& dy) {
  Matrix<S> dx(x.rows, x.cols);
  for (int64_t t = 0; t < x.rows; ++t) {
    S squares{}, product{};
    for (int64_t i = 0; i < x.cols; ++i) {
      squares += x(t, i) * x(t, i);
      product += dy(t, i) * w(0, i) * x(t, i);
    }
    const double n = static_cast<double>(x.cols);
    const S r = 1.0 / std::sqrt(squares / n + eps);
    for (int64_t i = 0; i < x.cols; ++i) dx(t, i) = r * w(0, i) * dy(t, i) - x(t, i) * r * r * r * product / n;
  }
  return dx;
}

inline Matrix<double> rope_table(const std::vector<int32_t>& positions, const std::vector<float>& inv_freq, double factor) {
  const int64_t half = static_cast<int64_t>(inv_freq.size());
  Matrix<double> table(static_cast<int64_t>(positions.size()), 2 * half);
  for (int64_t t = 0; t < table.rows; ++t)
    for (int64_t i = 0; i < half; ++i) {
      // The angle is rounded to f32 as the models' own code does: positions are large, so that rounding is part of the model.
      const float angle = static_cast<float>(positions[static_cast<size_t>(t)]) * inv_freq[static_cast<size_t>(i)];
      table(t, i) = std::cos(static_cast<double>(angle)) * factor;
      table(t, half + i) = std::sin(static_cast<double>(angle)) * factor;
    }
  return table;
}

// Head h of x, columns [h D, (h + 1) D), as rows of a matrix of its own; and back.
template <class S>
Matrix<S> take_head(const Matrix<S>& x, int64_t h, int64_t d) {
  Matrix<S> head(x.rows, d);
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t i = 0; i < d; ++i) head(t, i) = x(t, h * d + i);
  return head;
}
template <class S>
void put_head(Matrix<S>& x, int64_t h, const Matrix<S>& head) {
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t i = 0; i < head.cols; ++i) x(t, h * head.cols + i) = head(t, i);
}

// direction 1: the rotation; -1: its transpose.
template <class S>
Matrix<S> rotate(const Matrix<S>& x, const Matrix<double>& cos_sin, double direction) {
  const int64_t half = x.cols / 2;
  Matrix<S> y(x.rows, x.cols);
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t i = 0; i < half; ++i) {
      const double c = cos_sin(t, i), s = direction * cos_sin(t, half + i);
      y(t, i) = x(t, i) * c - x(t, half + i) * s;
      y(t, half + i) = x(t, half + i) * c + x(t, i) * s;
    }
  return y;
}

// qkv in place, on the q and k columns; norms [D] or empty.
template <class S>
void rope(Matrix<S>& qkv, const AttentionShape& shape, const Matrix<double>& cos_sin, const Matrix<S>& q_norm,
          const Matrix<S>& k_norm, double eps) {
  for (int64_t h = 0; h < shape.q_heads + shape.kv_heads; ++h) {
    Matrix<S> head = take_head(qkv, h, shape.head_size);
    const Matrix<S>& w = h < shape.q_heads ? q_norm : k_norm;
    if (!w.empty()) head = rms_norm(head, w, eps);
    put_head(qkv, h, rotate(head, cos_sin, 1));
  }
}

template <class S>
void rope_backward(Matrix<S>& dqkv, const AttentionShape& shape, const Matrix<double>& cos_sin, const Matrix<S>& q_norm,
                   const Matrix<S>& k_norm, double eps, const Matrix<S>& raw) {
  for (int64_t h = 0; h < shape.q_heads + shape.kv_heads; ++h) {
    Matrix<S> head = rotate(take_head(dqkv, h, shape.head_size), cos_sin, -1);
    const Matrix<S>& w = h < shape.q_heads ? q_norm : k_norm;
    if (!w.empty()) head = rms_norm_backward(take_head(raw, h, shape.head_size), w, eps, head);
    put_head(dqkv, h, head);
  }
}

// ---------------------------------------------------------------- attention

struct Sequence {
  int64_t q_begin = 0, q_rows = 0, kv_begin = 0, kv_rows = 0;
};

// The softmax weights of one query row and head over the keys it sees; returns the log of the sum of exp.
template <class S>
S attention_weights(const Matrix<S>& q, const Matrix<S>& k, const Sequence& s, const AttentionShape& shape, int64_t i, int64_t head,
                    std::vector<S>& weights) {
  const int64_t d = shape.head_size, kv = head / (shape.q_heads / shape.kv_heads), seen = s.kv_rows - s.q_rows + i + 1;
  weights.assign(static_cast<size_t>(seen), S{});
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < seen; ++j) {
    S score{};
    for (int64_t c = 0; c < d; ++c) score += q(s.q_begin + i, head * d + c) * k(s.kv_begin + j, kv * d + c);
    weights[static_cast<size_t>(j)] = score * static_cast<double>(shape.scale);
    top = std::max(top, real(weights[static_cast<size_t>(j)]));
  }
  S total{};
  for (S& w : weights) total += w = std::exp(w - top);
  for (S& w : weights) w /= total;
  return top + std::log(total);
}

template <class S>
void attention(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v, const std::vector<Sequence>& sequences,
               const AttentionShape& shape, Matrix<S>& out, Matrix<S>& lse) {
  const int64_t d = shape.head_size, group = shape.q_heads / shape.kv_heads;
  std::vector<S> p;
  for (const Sequence& s : sequences)
    for (int64_t i = 0; i < s.q_rows; ++i)
      for (int64_t head = 0; head < shape.q_heads; ++head) {
        lse(s.q_begin + i, head) = attention_weights(q, k, s, shape, i, head, p);
        for (int64_t c = 0; c < d; ++c) {
          S sum{};
          for (size_t j = 0; j < p.size(); ++j) sum += p[j] * v(s.kv_begin + static_cast<int64_t>(j), head / group * d + c);
          out(s.q_begin + i, head * d + c) = sum;
        }
      }
}

// dq, dk, dv: zero on entry.
template <class S>
void attention_backward(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v, const Matrix<S>& dout,
                        const std::vector<Sequence>& sequences, const AttentionShape& shape, Matrix<S>& dq, Matrix<S>& dk,
                        Matrix<S>& dv) {
  const int64_t d = shape.head_size, group = shape.q_heads / shape.kv_heads;
  std::vector<S> p, dp;
  for (const Sequence& s : sequences)
    for (int64_t i = 0; i < s.q_rows; ++i)
      for (int64_t head = 0; head < shape.q_heads; ++head) {
        const int64_t row = s.q_begin + i, kv = head / group;
        attention_weights(q, k, s, shape, i, head, p);
        dp.assign(p.size(), S{});
        S mean{};
        for (size_t j = 0; j < p.size(); ++j) {
          const int64_t key = s.kv_begin + static_cast<int64_t>(j);
          for (int64_t c = 0; c < d; ++c) {
            dp[j] += dout(row, head * d + c) * v(key, kv * d + c);
            dv(key, kv * d + c) += p[j] * dout(row, head * d + c);
          }
          mean += p[j] * dp[j];
        }
        for (size_t j = 0; j < p.size(); ++j) {
          const int64_t key = s.kv_begin + static_cast<int64_t>(j);
          const S dscore = p[j] * (dp[j] - mean) * static_cast<double>(shape.scale);
          for (int64_t c = 0; c < d; ++c) {
            dq(row, head * d + c) += dscore * k(key, kv * d + c);
            dk(key, kv * d + c) += dscore * q(row, head * d + c);
          }
        }
      }
}

// ---------------------------------------------------------------- swiglu

template <class S>
Matrix<S> swiglu(const Matrix<S>& gate_up) {
  const int64_t n = gate_up.cols / 2;
  Matrix<S> y(gate_up.rows, n);
  for (int64_t t = 0; t < y.rows; ++t)
    for (int64_t i = 0; i < n; ++i) y(t, i) = gate_up(t, i) / (1.0 + std::exp(-gate_up(t, i))) * gate_up(t, n + i);
  return y;
}

template <class S>
Matrix<S> swiglu_backward(const Matrix<S>& gate_up, const Matrix<S>& dy) {
  const int64_t n = dy.cols;
  Matrix<S> d(gate_up.rows, gate_up.cols);
  for (int64_t t = 0; t < d.rows; ++t)
    for (int64_t i = 0; i < n; ++i) {
      const S gate = gate_up(t, i), up = gate_up(t, n + i), sigmoid = 1.0 / (1.0 + std::exp(-gate));
      d(t, i) = dy(t, i) * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid));
      d(t, n + i) = dy(t, i) * gate * sigmoid;
    }
  return d;
}

// ---------------------------------------------------------------- heads

template <class S>
std::vector<S> log_softmax(const Matrix<S>& logits, int64_t row) {
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < logits.cols; ++i) top = std::max(top, real(logits(row, i)));
  S total{};
  for (int64_t i = 0; i < logits.cols; ++i) total += std::exp(logits(row, i) - top);
  std::vector<S> result;
  for (int64_t i = 0; i < logits.cols; ++i) result.push_back(logits(row, i) - top - std::log(total));
  return result;
}

template <class S>
S token_loss(const LossRow& row, S p) {
  const double w = static_cast<double>(row.weight), advantage = static_cast<double>(row.advantage);
  if (row.kind == LossKind::cross_entropy || row.kind == LossKind::weighted_logprob) return -w * p;
  const S ratio = std::exp(p - static_cast<double>(row.old_logprob));
  const S plain = ratio * advantage;
  if (row.kind == LossKind::importance_sampling) return -w * plain;
  const double low = 1 - static_cast<double>(row.clip_low), high = 1 + static_cast<double>(row.clip_high);
  const S clipped = (real(ratio) < low ? S(low) : real(ratio) > high ? S(high) : ratio) * advantage;
  return -w * (real(plain) <= real(clipped) ? plain : clipped);
}

// d token_loss / d p
inline double token_loss_slope(const LossRow& row, double p) {
  const double w = static_cast<double>(row.weight), advantage = static_cast<double>(row.advantage);
  if (row.kind == LossKind::cross_entropy || row.kind == LossKind::weighted_logprob) return -w;
  const double ratio = std::exp(p - static_cast<double>(row.old_logprob));
  if (row.kind == LossKind::ppo) {
    const bool above = ratio > 1 + static_cast<double>(row.clip_high), below = ratio < 1 - static_cast<double>(row.clip_low);
    if ((above && advantage > 0) || (below && advantage < 0)) return 0;
  }
  return -w * ratio * advantage;
}

inline Matrix<double> token_loss_gradient(const Matrix<double>& logits, const std::vector<LossRow>& rows) {
  Matrix<double> d(logits.rows, logits.cols);
  for (int64_t i = 0; i < logits.rows; ++i) {
    const LossRow& row = rows[static_cast<size_t>(i)];
    const std::vector<double> p = log_softmax(logits, i);
    const double slope = token_loss_slope(row, p[static_cast<size_t>(row.target)]);
    for (int64_t j = 0; j < logits.cols; ++j)
      d(i, j) = slope * ((j == row.target ? 1.0 : 0.0) - std::exp(p[static_cast<size_t>(j)]));
  }
  return d;
}

// The tokens that min-p, top-k and top-p keep of logits that already hold bias, penalties and temperature; most preferred first.
inline std::vector<int32_t> kept_tokens(const std::vector<double>& x, const SampleRow& row) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i] > -std::numeric_limits<double>::infinity()) order.push_back(static_cast<int32_t>(i));
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
  if (order.empty()) return order;
  const double top = x[static_cast<size_t>(order[0])];
  const auto mass = [&](int32_t id) { return std::exp(x[static_cast<size_t>(id)] - top); };
  if (row.min_p > 0) std::erase_if(order, [&](int32_t id) { return id != order[0] && mass(id) < static_cast<double>(row.min_p); });
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order.size()) order.resize(static_cast<size_t>(row.top_k));
  if (row.top_p < 1) {
    double total = 0, sum = 0;
    for (int32_t id : order) total += mass(id);
    size_t n = 0;
    while (n < order.size() && (n == 0 || sum < static_cast<double>(row.top_p) * total)) sum += mass(order[n++]);
    order.resize(n);
  }
  return order;
}

// Logits after bias, forbidden tokens, penalties and temperature.
inline std::vector<double> adjusted_logits(std::vector<double> x, const SampleRow& row, const int32_t* history,
                                           const int32_t* bias_ids, const float* bias_values, const int32_t* forbidden) {
  for (int32_t i = row.bias_begin; i < row.bias_begin + row.bias_count; ++i)
    x[static_cast<size_t>(bias_ids[i])] += static_cast<double>(bias_values[i]);
  for (int32_t i = row.forbidden_begin; i < row.forbidden_begin + row.forbidden_count; ++i)
    x[static_cast<size_t>(forbidden[i])] = -std::numeric_limits<double>::infinity();
  std::vector<int> seen(x.size()), output(x.size());
  for (int32_t i = 0; i < row.prompt_length + row.output_length; ++i) {
    ++seen[static_cast<size_t>(history[row.history_begin + i])];
    if (i >= row.prompt_length) ++output[static_cast<size_t>(history[row.history_begin + i])];
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const double penalty = static_cast<double>(row.repetition_penalty);
    if (seen[i] > 0) x[i] = x[i] > 0 ? x[i] / penalty : x[i] * penalty;
    if (output[i] > 0) x[i] -= static_cast<double>(row.frequency_penalty) * output[i] + static_cast<double>(row.presence_penalty);
    if (row.temperature > 0) x[i] /= static_cast<double>(row.temperature);
  }
  return x;
}

inline int32_t sample(const std::vector<double>& adjusted, const SampleRow& row) {
  const std::vector<int32_t> kept = kept_tokens(adjusted, row);
  if (row.temperature < kGreedyBelow) return kept[0];
  int32_t best = -1;
  double best_value = 0;
  for (int32_t id : kept) {
    const auto u = static_cast<double>(uniform01(philox_of_tokens(row.seed, row.index, id).v[id % 4]));
    const double value = adjusted[static_cast<size_t>(id)] - std::log(-std::log(u));
    if (best < 0 || value > best_value || (value == best_value && id < best)) {
      best = id;
      best_value = value;
    }
  }
  return best;
}

// ---------------------------------------------------------------- optimizer

struct AdamState {
  std::vector<double> master, grad, m, v;
};

inline double grad_norm(const std::vector<const std::vector<double>*>& grads) {
  double sum = 0;
  for (const std::vector<double>* grad : grads)
    for (double g : *grad) sum += g * g;
  return std::sqrt(sum);
}

inline void adamw(AdamState& s, const AdamJob& job, double lr, double norm) {
  const double b1 = static_cast<double>(job.beta1), b2 = static_cast<double>(job.beta2);
  const double limit = static_cast<double>(job.max_grad_norm), clip = limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0;
  for (size_t i = 0; i < s.master.size(); ++i) {
    if (std::isfinite(norm)) {
      const double g = s.grad[i] * clip;
      s.master[i] *= 1 - lr * static_cast<double>(job.weight_decay);
      s.m[i] = b1 * s.m[i] + (1 - b1) * g;
      s.v[i] = b2 * s.v[i] + (1 - b2) * g * g;
      const double m_hat = s.m[i] / static_cast<double>(job.bias_correction1),
                   v_hat = s.v[i] / static_cast<double>(job.bias_correction2);
      s.master[i] -= lr * m_hat / (std::sqrt(v_hat) + static_cast<double>(job.eps));
    }
    s.grad[i] = 0;
  }
}

}  // namespace loquetier::reference
