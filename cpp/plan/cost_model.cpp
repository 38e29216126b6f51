#include "plan/cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "core/check.h"

namespace loquetier {

namespace {

constexpr double kForget = 0.995;     // of the normal equations, per observation: half of the weight is on the last 140
constexpr double kHold = 0.02;        // pull towards where a coefficient is, beside sums of squared shares of a step
constexpr int64_t kFirst = 32;        // observations during which that is the prior times the measured factor
constexpr double kSpreadRate = 0.05;  // of the slow mean of residuals
constexpr double kClip = 2.5;         // residuals beyond so many spreads count less
constexpr int kSweeps = 24;           // of coordinate descent, from the former solution
constexpr double kSmallestSpread = 5e-3;
constexpr double kBesideProducts = 0.1;  // of a row's products: norms, rope, activations

template <size_t K>
void add_pass(std::array<double, 2 + K>& sums, const std::array<double, K>& knots, double rows, double share) {
  if (rows <= 0 || share <= 0) return;
  sums[0] += share;
  sums[1] += share * rows;
  for (size_t i = 0; i < K; ++i) sums[2 + i] += share * std::max(0.0, rows - knots[i]);
}

// Coefficients of the convex piecewise linear function through `f` at 0 and at the knots, with the slope `last` behind the last
// one.
template <size_t K, class F>
std::array<double, 2 + K> interpolate(const std::array<double, K>& knots, F f, double last) {
  std::array<double, 2 + K> out = {};
  out[0] = f(0.0);
  double at = 0, slope = 0;
  for (size_t i = 0; i <= K; ++i) {
    const double next = i == K ? last : (f(knots[i]) - f(at)) / (knots[i] - at);
    out[1 + i] = std::max(0.0, next - slope);
    slope = std::max(slope, next);
    if (i < K) at = knots[i];
  }
  return out;
}

// Of the products of passes by their size: never less than of a shorter one.
std::array<double, StepWork::kPassSizes> pass_seconds(const ModelShape& m, const DeviceRates& d) {
  std::array<double, StepWork::kPassSizes> seconds = {};
  double before = 0;
  for (const auto& [rows, rate] : d.by_rows) {
    require(rows > before && rate > 0, "[cost model] by_rows: expected ascending rows > 0 and rates > 0, got ", rows, " rows and ",
            rate, " operations a second");
    before = rows;
  }
  if (d.by_rows.empty()) return seconds;
  double longest = 0;
  auto measured = d.by_rows.begin();
  for (size_t i = 0; i < seconds.size(); ++i) {
    const double rows = static_cast<double>((i + 1) * StepWork::kPassRows);
    while (measured->first < rows && std::next(measured) != d.by_rows.end()) ++measured;
    seconds[i] = longest = std::max(longest, 2 * m.layer_parameters * std::max(rows, measured->first) / measured->second);
  }
  return seconds;
}

int bucket(double n) { return n <= 0 ? 0 : 1 + std::max(0, std::ilogb(n)); }

}  // namespace

// ---------------------------------------------------------------- work

void StepWork::add_forward(double rows, double share) {
  steps |= rows > 0;
  add_pass(forward, kForwardKnots, rows, share);
  if (rows <= 0 || share <= 0) return;
  const double sizes = std::max(1.0, rows / (kPassSizes * kPassRows));
  const double size = std::min(std::ceil(rows / kPassRows), double{kPassSizes});
  passes[static_cast<size_t>(size) - 1] += share * sizes;
}

void StepWork::add_backward(double rows, double share) {
  steps |= rows > 0;
  add_pass(backward, kBackwardKnots, rows, share);
}

StepWork& StepWork::operator+=(const StepWork& other) {
  steps |= other.steps;
  for (double StepWork::* field : {&StepWork::slices, &StepWork::decode_rows, &StepWork::decode_context, &StepWork::prefill_pairs,
                                   &StepWork::train_pairs, &StepWork::backward_pairs, &StepWork::head_passes, &StepWork::head_rows,
                                   &StepWork::train_head_rows, &StepWork::adapter_bytes, &StepWork::update_bytes}) {
    this->*field += other.*field;
  }
  for (size_t i = 0; i < forward.size(); ++i) forward[i] += other.forward[i];
  for (size_t i = 0; i < backward.size(); ++i) backward[i] += other.backward[i];
  for (size_t i = 0; i < passes.size(); ++i) passes[i] += other.passes[i];
  return *this;
}

CostModel::Features CostModel::features(const StepWork& w) const {
  Features f = {w.steps ? 1.0 : 0.0, w.slices,      w.decode_rows, w.decode_context,  w.prefill_pairs, w.train_pairs,
                w.backward_pairs,    w.head_passes, w.head_rows,   w.train_head_rows, w.adapter_bytes, w.update_bytes};
  std::copy(w.forward.begin(), w.forward.end(), f.begin() + 12);
  std::copy(w.backward.begin(), w.backward.end(), f.begin() + 12 + w.forward.size());
  for (size_t i = 0; i < w.passes.size(); ++i) f.back() += w.passes[i] * pass_seconds_[i];
  return f;
}

// ---------------------------------------------------------------- prior

CostModel::CostModel(const ModelShape& m, const DeviceRates& d) {
  require(d.bytes_per_second > 0 && d.flops_per_second > 0, "[cost model] rates: expected > 0, got ", d.bytes_per_second,
          " bytes and ", d.flops_per_second, " operations a second");
  const double tiny = 1e-12;  // a scale must not be 0: what the shape says is free can still turn out to cost
  const double stream = m.layer_parameters * m.bytes_per_value / d.bytes_per_second + m.layers * d.launch_seconds;
  const double row = 2 * m.layer_parameters / d.flops_per_second + tiny;
  const double pair = 4 * m.q_columns * m.layers / d.flops_per_second + tiny;
  const double launch = d.launch_seconds + tiny;
  const double byte = 1 / d.bytes_per_second;
  const double vocabulary = 2 * m.vocabulary_parameters / d.flops_per_second + tiny;

  const Features direct = {d.step_seconds + tiny,
                           launch,
                           launch,
                           m.kv_columns * m.layers * m.bytes_per_value * byte + tiny,
                           pair,
                           pair,
                           2.5 * pair,
                           m.vocabulary_parameters * m.bytes_per_value * byte + launch,
                           vocabulary,
                           vocabulary,
                           2 * byte,
                           2 * byte};
  std::copy(direct.begin(), direct.end(), scale_.begin());
  prior_.fill(1);
  prior_[2] = 0;  // a decode costs its row and its keys, until measured otherwise
  const auto put = [&](size_t begin, const auto& coefficients, double pass) {
    for (size_t i = 0; i < coefficients.size(); ++i) {
      scale_[begin + i] = i == 0 ? pass + tiny : row;
      prior_[begin + i] = coefficients[i] / scale_[begin + i];
    }
  };
  const auto roof = [&](double rows) { return std::max(stream, rows * row); };
  // Beside measured products: launches, and what is done row by row.
  const auto beside = [&](double rows) { return m.layers * d.launch_seconds + kBesideProducts * rows * row; };
  pass_seconds_ = pass_seconds(m, d);
  const bool measured = !d.by_rows.empty();
  if (measured) put(12, interpolate(StepWork::kForwardKnots, beside, kBesideProducts * row), stream);
  else put(12, interpolate(StepWork::kForwardKnots, roof, row), stream);
  put(12 + StepWork{}.forward.size(), interpolate(StepWork::kBackwardKnots, roof, row), stream);
  scale_.back() = 1;
  prior_.back() = measured ? 1 : 0;
  theta_ = prior_;
}

double CostModel::predict(const StepWork& work) const {
  const Features f = features(work);
  double seconds = 0;
  for (size_t i = 0; i < kFeatures; ++i) seconds += f[i] * scale_[i] * theta_[i];
  return seconds;
}

double CostModel::marginal(const StepWork& work, const StepWork& extra) const {
  StepWork both = work;
  both += extra;
  return predict(both) - predict(work);
}

CostModel::Features CostModel::coefficients() const {
  Features out;
  for (size_t i = 0; i < kFeatures; ++i) out[i] = scale_[i] * theta_[i];
  return out;
}

// ---------------------------------------------------------------- learning

bool CostModel::observe(const StepWork& work, double seconds) {
  if (!std::isfinite(seconds) || seconds <= 0 || !work.steps) return false;
  const uint64_t shape[] = {static_cast<uint64_t>(bucket(work.forward[1])),
                            static_cast<uint64_t>(bucket(work.backward[1]) / 2),
                            work.decode_rows > 0,
                            work.prefill_pairs > 0,
                            work.train_pairs > 0,
                            work.update_bytes > 0};
  uint64_t key = 0;
  for (const uint64_t part : shape) key = key * 64 + part;
  if (seen_.insert(key).second) return false;

  const Features f = features(work);
  const double predicted = std::max(predict(work), 1e-12);
  const auto error = static_cast<float>(std::abs(predicted - seconds) / seconds);
  if (errors_.size() < kWindow) errors_.push_back(error);
  else errors_[next_error_] = error;
  next_error_ = (next_error_ + 1) % kWindow;

  const double residual = std::log(seconds / predicted), size = std::abs(residual);
  const double weight = std::min(1.0, kClip * spread_ / std::max(size, 1e-12));
  spread_ = std::max(kSmallestSpread, spread_ + kSpreadRate * (std::min(size, 3 * spread_) - spread_));
  if (observations_ < kFirst) rescale(f, seconds);
  ++observations_;

  Features x;
  for (size_t i = 0; i < kFeatures; ++i) x[i] = f[i] * scale_[i] / seconds;
  for (size_t i = 0; i < kFeatures; ++i) {
    target_[i] = kForget * target_[i] + weight * x[i];
    for (size_t j = 0; j < kFeatures; ++j) normal_[i][j] = kForget * normal_[i][j] + weight * x[i] * x[j];
  }
  solve();
  return true;
}

// In the beginning: moves the unit of every coefficient by the mean factor that the measurements show over the prior. So what was
// not measured yet follows what was, and the hold on coefficients is as strong on a machine that the prior misjudged.
void CostModel::rescale(const Features& f, double seconds) {
  double by_prior = 0;
  for (size_t i = 0; i < kFeatures; ++i) by_prior += f[i] * scale_[i] * prior_[i];
  const double step = std::log(seconds / std::max(by_prior, 1e-12)) / static_cast<double>(observations_ + 1);
  const double by = std::exp(step);
  for (size_t i = 0; i < kFeatures; ++i) {
    scale_[i] *= by;
    theta_[i] /= by;
    target_[i] *= by;
    for (double& n : normal_[i]) n *= by * by;
  }
}

// Non-negative least squares: (normal + hold) theta = target + hold * center, by coordinate descent. What is left of the right side
// is kept up to date with each coordinate, a row of the symmetric matrix at a time: no sum has to wait for its own terms.
void CostModel::solve() {
  const Features& center = observations_ <= kFirst ? prior_ : theta_;
  Features left;
  for (size_t i = 0; i < kFeatures; ++i) left[i] = target_[i] + kHold * center[i];
  for (size_t j = 0; j < kFeatures; ++j) {
    for (size_t i = 0; i < kFeatures; ++i) left[i] -= normal_[j][i] * theta_[j];
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (size_t i = 0; i < kFeatures; ++i) {
      const double own = normal_[i][i], next = std::max(0.0, (left[i] + own * theta_[i]) / (own + kHold)), by = next - theta_[i];
      if (by == 0) continue;
      theta_[i] = next;
      for (size_t j = 0; j < kFeatures; ++j) left[j] -= by * normal_[i][j];
    }
  }
}

double CostModel::error_quantile(double q) const {
  if (errors_.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<float> sorted = errors_;
  const auto at = static_cast<std::ptrdiff_t>(std::clamp(q, 0.0, 1.0) * static_cast<double>(sorted.size() - 1) + 0.5);
  std::nth_element(sorted.begin(), sorted.begin() + at, sorted.end());
  return sorted[static_cast<size_t>(at)];
}

// ---------------------------------------------------------------- text

namespace {

constexpr const char* kMark = "loquetier-cost-model-2";

}  // namespace

std::string CostModel::save() const {
  std::ostringstream out;
  out.precision(9);
  out << kMark << " " << kFeatures << " " << observations_ << " " << spread_;
  for (const double c : coefficients()) out << " " << c;
  for (const double c : pass_seconds_) out << " " << c;
  return out.str();
}

void CostModel::load(const std::string& text) {
  std::istringstream in(text);
  std::string mark;
  size_t count = 0;
  int64_t observations = 0;
  double spread = 0;
  in >> mark >> count >> observations >> spread;
  require<FormatError>(in && mark == kMark && count == kFeatures, "[cost model] text: expected \"", kMark, " ", kFeatures,
                       " …\", got \"", text.substr(0, 40), "\"");
  require<FormatError>(observations >= 0 && std::isfinite(spread) && spread >= 0,
                       "[cost model] text: expected observations and a spread >= 0, got ", observations, " and ", spread);
  Features loaded;
  for (size_t i = 0; i < kFeatures; ++i) {
    in >> loaded[i];
    require<FormatError>(in && std::isfinite(loaded[i]) && loaded[i] >= 0, "[cost model] text: expected a coefficient >= 0 at ", i,
                         " of ", kFeatures);
  }
  std::array<double, StepWork::kPassSizes> passes;
  for (size_t i = 0; i < passes.size(); ++i) {
    in >> passes[i];
    require<FormatError>(in && std::isfinite(passes[i]) && passes[i] >= (i == 0 ? 0 : passes[i - 1]),
                         "[cost model] text: expected seconds of passes that do not fall, at ", i, " of ", passes.size());
  }
  pass_seconds_ = passes;
  for (size_t i = 0; i < kFeatures; ++i) theta_[i] = loaded[i] / scale_[i];
  normal_ = {};
  target_ = {};
  observations_ = std::max(observations, kFirst);  // the prior has no say any more
  spread_ = std::max(spread, kSmallestSpread);
}

}  // namespace loquetier
