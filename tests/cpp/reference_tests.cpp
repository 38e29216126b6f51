// Proves the backward formulas of cpp/cpu/reference.h by complex step: for L = sum(dy * f(x)), dL/dx_i = Im L(x + i h e_i) / h with
// h = 1e-30, which has no cancellation, so each formula must agree to rounding of double. The step is taken through the reference's
// own forward.
#include "cpu/reference.h"

#include <cstdio>
#include <cstdlib>
#include <random>

#include "check.h"

using namespace loquetier;
using namespace loquetier::reference;

namespace {

using Complex = std::complex<double>;
constexpr double kStep = 1e-30;
constexpr double kBound = 1e-13;  // of max|analytic - step| / max|step|

std::mt19937_64& generator() {
  static std::mt19937_64 instance = [] {
    const unsigned long long seed = std::strtoull(test::option("--seed", "20251").c_str(), nullptr, 10);
    std::printf("seed %llu\n", seed);
    return std::mt19937_64(seed);
  }();
  return instance;
}

Matrix<double> random(int64_t rows, int64_t cols, double spread = 1) {
  Matrix<double> m(rows, cols);
  std::normal_distribution<double> normal(0, spread);
  for (double& x : m.values) x = normal(generator());
  return m;
}

Matrix<Complex> lift(const Matrix<double>& m) {
  Matrix<Complex> c(m.rows, m.cols);
  for (size_t i = 0; i < m.values.size(); ++i) c.values[i] = m.values[i];
  return c;
}

Complex weighted_sum(const Matrix<Complex>& y, const Matrix<double>& dy) {
  Complex sum{};
  for (size_t i = 0; i < dy.values.size(); ++i) sum += y.values[i] * dy.values[i];
  return sum;
}

// `input` is what `loss` reads; `analytic` what the backward formula says.
void check_gradient(const char* what, Matrix<Complex>& input, const Matrix<double>& analytic,
                    const std::function<Complex()>& loss) {
  CHECK_EQ(input.values.size(), analytic.values.size());
  double error = 0, largest = 0;
  for (size_t i = 0; i < input.values.size(); ++i) {
    const Complex before = input.values[i];
    input.values[i] += Complex(0, kStep);
    const double step = loss().imag() / kStep;
    input.values[i] = before;
    error = std::max(error, std::fabs(step - analytic.values[i]));
    largest = std::max(largest, std::fabs(step));
  }
  if (!(error <= kBound * largest) || largest == 0) std::printf("  %s: error %g of %g\n", what, error, largest);
  CHECK(largest > 0);
  CHECK(error <= kBound * largest);
}

}  // namespace

TEST(linear) {
  const auto x = random(5, 7), w = random(4, 7), bias = random(1, 4), dy = random(5, 4);
  auto xc = lift(x);
  check_gradient("x", xc, linear_backward(dy, w), [&] { return weighted_sum(linear(xc, lift(w), lift(bias)), dy); });
}

TEST(lora) {
  // Two adapters of different ranks, one part of rank 0, rows without an adapter, dropout on one group.
  LoraCase<double> c;
  c.site = 5;
  c.in = 6;
  c.out = {4, 3, 5};
  const int64_t rows = 9, rank = 6;
  for (int64_t t = 0; t < rows; ++t) c.row_keys.push_back(generator()());
  const auto part = [&](int64_t r, int64_t out, double scale) {
    return LoraPartOf<double>{random(r, c.in), random(out, r), scale};
  };
  c.groups = {{0, 3, {part(2, 4, 0.5), part(0, 3, 1.0), part(1, 5, 2.0)}, 0.4},
              {3, 2, {}, 0},
              {6, 3, {part(1, 4, 1.5), part(3, 3, 0.25), part(2, 5, 1.0)}, 0}};
  const auto x = random(rows, c.in), dy = random(rows, 12);

  LoraCase<Complex> cc;
  cc.site = c.site;
  cc.in = c.in;
  cc.out = c.out;
  cc.row_keys = c.row_keys;
  for (const auto& group : c.groups) {
    LoraGroupOf<Complex> g{group.row_begin, group.rows, {}, group.dropout};
    for (const auto& p : group.parts) g.parts.push_back({lift(p.a), lift(p.b), p.scale});
    cc.groups.push_back(g);
  }
  auto xc = lift(x);
  const auto loss = [&] {
    Matrix<Complex> s(rows, rank), y(rows, 12);
    lora_shrink(cc, xc, s);
    lora_expand(cc, s, y);
    return weighted_sum(y, dy);
  };

  Matrix<double> s(rows, rank), ds(rows, rank), dx(rows, c.in);
  lora_shrink(c, x, s);
  lora_backward_s(c, dy, ds);
  lora_backward_x(c, ds, dx);
  std::vector<std::vector<LoraGradOf<double>>> grads;
  for (const auto& group : c.groups) {
    grads.emplace_back();
    for (const auto& p : group.parts)
      grads.back().push_back({Matrix<double>(p.a.rows, p.a.cols), Matrix<double>(p.b.rows, p.b.cols)});
  }
  lora_backward_weights(c, x, s, dy, ds, grads);

  check_gradient("x", xc, dx, loss);
  for (size_t g = 0; g < c.groups.size(); ++g)
    for (size_t p = 0; p < c.groups[g].parts.size(); ++p) {
      if (c.groups[g].parts[p].a.empty()) continue;
      check_gradient("A", cc.groups[g].parts[p].a, grads[g][p].da, loss);
      check_gradient("B", cc.groups[g].parts[p].b, grads[g][p].db, loss);
    }
  // ds itself: the gradient of the expand with respect to s.
  auto sc = lift(s);
  check_gradient("s", sc, ds, [&] {
    Matrix<Complex> y(rows, 12);
    lora_expand(cc, sc, y);
    return weighted_sum(y, dy);
  });
}

TEST(dropout_keeps_the_expected_share_and_differs_between_parts) {
  LoraCase<double> c;
  c.site = 3;
  c.row_keys = {generator()(), generator()()};
  const LoraGroupOf<double> group{0, 2, {}, 0.3};
  int kept = 0, same = 0;
  double total = 0;
  constexpr int kColumns = 20000;
  for (int64_t i = 0; i < kColumns; ++i) {
    const double first = c.mask(group, 0, 0, i), second = c.mask(group, 0, 1, i), other_row = c.mask(group, 1, 0, i);
    CHECK(first == 0 || std::fabs(first - 1 / 0.7) < 1e-12);
    kept += first != 0;
    same += (first != 0) == (second != 0);
    total += (first != 0) == (other_row != 0);
  }
  // Five standard deviations of a binomial around p = 0.7, and around 0.7^2 + 0.3^2 = 0.58 for two independent masks.
  CHECK_NEAR(kept, 0.7 * kColumns, 5 * std::sqrt(0.21 * kColumns));
  CHECK_NEAR(same, 0.58 * kColumns, 5 * std::sqrt(0.58 * 0.42 * kColumns));
  CHECK_NEAR(total, 0.58 * kColumns, 5 * std::sqrt(0.58 * 0.42 * kColumns));
}

TEST(rms_norm) {
  const auto x = random(4, 9), w = random(1, 9), dy = random(4, 9);
  auto xc = lift(x);
  check_gradient("x", xc, rms_norm_backward(x, w, 1e-5, dy),
                 [&] { return weighted_sum(reference::rms_norm(xc, lift(w), 1e-5), dy); });
}

TEST(rope_with_and_without_norms) {
  const AttentionShape shape{4, 2, 6, 0};
  const std::vector<int32_t> positions = {0, 3, 1000, 77};
  const auto table = rope_table(positions, {1.0f, 0.1f, 0.01f}, 1.2);
  const auto raw = random(4, 8 * 6), dy = random(4, 8 * 6);
  for (const bool norms : {false, true}) {
    const auto q_norm = norms ? random(1, 6) : Matrix<double>(), k_norm = norms ? random(1, 6) : Matrix<double>();
    auto rawc = lift(raw);
    auto d = dy;
    reference::rope_backward(d, shape, table, q_norm, k_norm, 1e-6, raw);
    check_gradient("qkv", rawc, d, [&] {
      auto y = rawc;
      reference::rope(y, shape, table, lift(q_norm), lift(k_norm), 1e-6);
      return weighted_sum(y, dy);
    });
  }
}

TEST(attention_of_packed_sequences_and_grouped_heads) {
  const AttentionShape shape{4, 2, 3, 0.6f};
  const std::vector<Sequence> sequences = {{0, 4, 0, 4}, {4, 1, 4, 1}, {5, 3, 5, 3}};
  const auto q = random(8, 12), k = random(8, 6), v = random(8, 6), dout = random(8, 12);
  Matrix<double> dq(8, 12), dk(8, 6), dv(8, 6);
  reference::attention_backward(q, k, v, dout, sequences, shape, dq, dk, dv);
  auto qc = lift(q), kc = lift(k), vc = lift(v);
  const auto loss = [&] {
    Matrix<Complex> out(8, 12), lse(8, 4);
    attention(qc, kc, vc, sequences, shape, out, lse);
    return weighted_sum(out, dout);
  };
  check_gradient("q", qc, dq, loss);
  check_gradient("k", kc, dk, loss);
  check_gradient("v", vc, dv, loss);
}

TEST(attention_is_causal_and_aligned_at_the_end) {
  // Two query rows over five keys: the first sees four of them. With equal keys the output is the mean of the values seen.
  const AttentionShape shape{1, 1, 1, 1.0f};
  Matrix<double> q(2, 1), k(5, 1), v(5, 1), out(2, 1), lse(2, 1);
  for (int64_t i = 0; i < 5; ++i) v(i, 0) = static_cast<double>(i);
  attention(q, k, v, {{0, 2, 0, 5}}, shape, out, lse);
  CHECK_NEAR(out(0, 0), 1.5, 1e-15);
  CHECK_NEAR(out(1, 0), 2.0, 1e-15);
  CHECK_NEAR(lse(0, 0), std::log(4.0), 1e-15);
}

TEST(swiglu) {
  const auto gate_up = random(3, 10), dy = random(3, 5);
  auto gc = lift(gate_up);
  check_gradient("gate_up", gc, reference::swiglu_backward(gate_up, dy), [&] { return weighted_sum(reference::swiglu(gc), dy); });
}

TEST(token_losses_of_every_kind) {
  const auto logits = random(8, 11, 2.0);
  std::vector<LossRow> rows(8);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].target = static_cast<int32_t>(generator()() % 11);
    rows[i].weight = 0.25f + static_cast<float>(i);
  }
  rows[1].kind = LossKind::weighted_logprob;
  rows[1].weight = -0.7f;
  rows[2].kind = LossKind::importance_sampling;
  // ppo on each side of the clip, with either sign of the advantage; the clipped ones have no gradient.
  const double offsets[] = {0, 0, 0.1, 0.05, 1.0, 1.0, -1.0, -1.0};
  for (size_t i = 2; i < rows.size(); ++i) {
    if (i > 2) rows[i].kind = LossKind::ppo;
    rows[i].advantage = i % 2 == 0 ? 1.3f : -0.8f;
    const double p = log_softmax(logits, static_cast<int64_t>(i))[static_cast<size_t>(rows[i].target)];
    rows[i].old_logprob = static_cast<float>(p - offsets[i]);
  }
  auto lc = lift(logits);
  check_gradient("logits", lc, token_loss_gradient(logits, rows), [&] {
    Complex total{};
    for (int64_t i = 0; i < lc.rows; ++i) {
      const LossRow& row = rows[static_cast<size_t>(i)];
      total += reference::token_loss(row, log_softmax(lc, i)[static_cast<size_t>(row.target)]);
    }
    return total;
  });
  const auto d = token_loss_gradient(logits, rows);
  for (int64_t j = 0; j < d.cols; ++j) {
    CHECK_EQ(d(4, j), 0.0);  // ratio e above the clip, advantage > 0
    CHECK_EQ(d(7, j), 0.0);  // ratio 1/e below it, advantage < 0
  }
}

TEST(adamw_against_its_formula) {
  // One parameter, three steps, written out with the quantities of the paper.
  AdamState s{{0.5}, {0}, {0}, {0}};
  AdamJob job;
  job.beta1 = 0.5f;
  job.beta2 = 0.75f;
  job.eps = 0.125f;
  job.weight_decay = 0.25f;
  job.max_grad_norm = 1.0f;
  double theta = 0.5, m = 0, v = 0;
  const double gradients[] = {0.5, -4.0, 2.0}, lr = 0.1;
  for (int step = 1; step <= 3; ++step) {
    s.grad[0] = gradients[step - 1];
    const double norm = std::fabs(gradients[step - 1]);
    job.bias_correction1 = static_cast<float>(1 - std::pow(0.5, step));
    job.bias_correction2 = static_cast<float>(1 - std::pow(0.75, step));
    reference::adamw(s, job, lr, norm);
    const double g = norm > 1 ? gradients[step - 1] / (norm + 1e-6) : gradients[step - 1];
    m = 0.5 * m + 0.5 * g;
    v = 0.75 * v + 0.25 * g * g;
    theta =
        theta - lr * 0.25 * theta -
        lr * (m / static_cast<double>(job.bias_correction1)) / (std::sqrt(v / static_cast<double>(job.bias_correction2)) + 0.125);
    CHECK_NEAR(s.master[0], theta, 1e-15);
    CHECK_EQ(s.grad[0], 0.0);
  }
  const AdamState before = s;
  s.grad[0] = 1;
  reference::adamw(s, job, lr, std::numeric_limits<double>::quiet_NaN());
  CHECK_EQ(s.master[0], before.master[0]);
  CHECK_EQ(s.m[0], before.m[0]);
  CHECK_EQ(s.grad[0], 0.0);
}

TEST(sampling_keeps_what_it_should) {
  const std::vector<double> x = {std::log(0.1), std::log(0.4), std::log(0.3), std::log(0.1), std::log(0.1)};
  SampleRow row;
  row.temperature = 1;
  using Ids = std::vector<int32_t>;
  CHECK_EQ(kept_tokens(x, row), (Ids{1, 2, 0, 3, 4}));
  row.top_k = 3;
  CHECK_EQ(kept_tokens(x, row), (Ids{1, 2, 0}));  // lower id first on ties
  row.top_p = 0.85f;                              // of 0.8: 0.4 + 0.3 is enough for 0.68
  CHECK_EQ(kept_tokens(x, row), (Ids{1, 2}));
  row.top_p = 1e-6f;
  CHECK_EQ(kept_tokens(x, row), (Ids{1}));
  row.top_p = 1;
  row.top_k = 0;
  row.min_p = 0.5f;
  CHECK_EQ(kept_tokens(x, row), (Ids{1, 2}));
}
