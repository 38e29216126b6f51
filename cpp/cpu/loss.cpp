// Token losses and their gradient, and the log-probability that sampling reports: both through log_partition(), so they agree bit
// for bit.
#include "cpu/loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/cpu_ops.h"

namespace loquetier::cpu {

double log_partition(const Kernels& kernels, const float* logits, int64_t n) {
  const float top = kernels.max(logits, n);
  return static_cast<double>(top) + std::log(kernels.exp_sum(logits, n, top, nullptr));
}

float log_probability(float logit, double partition) { return static_cast<float>(static_cast<double>(logit) - partition); }

namespace {

struct Loss {
  double value;
  double slope;  // d value / d log-probability
};

Loss token_loss_of(const LossRow& row, double p) {
  const double w = static_cast<double>(row.weight), advantage = static_cast<double>(row.advantage);
  switch (row.kind) {
    case LossKind::cross_entropy:
    case LossKind::weighted_logprob:
      return {-w * p, -w};
    case LossKind::importance_sampling: {
      const double ratio = std::exp(p - static_cast<double>(row.old_logprob));
      return {-w * ratio * advantage, -w * ratio * advantage};
    }
    case LossKind::ppo: {
      const double ratio = std::exp(p - static_cast<double>(row.old_logprob));
      const double clipped =
          std::clamp(ratio, 1.0 - static_cast<double>(row.clip_low), 1.0 + static_cast<double>(row.clip_high)) * advantage;
      // The clipped branch is constant in p.
      if (ratio * advantage <= clipped) return {-w * ratio * advantage, -w * ratio * advantage};
      return {-w * clipped, 0.0};
    }
  }
  return {0, 0};
}

}  // namespace

void CpuOps::token_loss(TensorView logits, const LossRow* rows, TensorView dlogits, float* logprob, float* loss) {
  check_matrix("token_loss", "logits", logits, -1, -1);
  const bool gradient = dlogits.data != nullptr;
  if (gradient) check_matrix("token_loss", "dlogits", dlogits, logits.rows, logits.cols);
  for (int64_t i = 0; i < logits.rows; ++i) {
    require(rows[i].target >= 0 && rows[i].target < logits.cols, "[token_loss] rows[", i, "].target: expected 0 to ",
            logits.cols - 1, ", got ", rows[i].target);
    require(rows[i].kind >= LossKind::cross_entropy && rows[i].kind <= LossKind::weighted_logprob, "[token_loss] rows[", i,
            "].kind: expected a loss kind, got ", static_cast<int32_t>(rows[i].kind));
  }
  parallel(logits.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* x = static_cast<const float*>(logits.at(i));
      const LossRow& row = rows[i];
      // With a gradient, the exponentials of the partition are kept where the gradient goes (which may be the logits).
      float* dx = gradient ? static_cast<float*>(dlogits.at(i)) : nullptr;
      const float target = x[row.target], top = kernels_.max(x, logits.cols);
      const double sum = kernels_.exp_sum(x, logits.cols, top, dx);
      const float p = log_probability(target, static_cast<double>(top) + std::log(sum));
      const Loss result = token_loss_of(row, static_cast<double>(p));
      logprob[i] = p;
      loss[i] = static_cast<float>(result.value);
      if (!gradient) continue;
      if (!std::isfinite(loss[i])) {
        std::fill_n(dx, logits.cols, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      kernels_.scale(static_cast<float>(-result.slope / sum), dx, dx, logits.cols);
      dx[row.target] += static_cast<float>(result.slope);
    }
  });
}

}  // namespace loquetier::cpu
