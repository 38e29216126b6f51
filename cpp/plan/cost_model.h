// Predicts the seconds of a step from what is in it, and learns from measured steps.
//
// Seconds are linear in features that are not linear in the work. One pass over the layers with n rows costs what streaming the
// weights costs until the products of n rows cost more: a convex function of n, kept as a sum of hinges max(0, n - knot) with
// coefficients >= 0. So is a pass of backward. A device whose products come in tiles has steps in it, which no such sum has: where
// the products of passes were measured (DeviceRates::by_rows), they are one more feature, and the hinges are what lies beside
// them. Beside these: attention by keys read or (query, key) pairs, vocabulary rows, bytes of adapters, bytes of optimizer state, a
// fixed part of each step and of each slice.
//
// The prior is a roofline (device rates and the model's shape). Fitting is recursive least squares on relative error with
// forgetting: the normal equations decay, and what the measurements do not excite stays where it is (in the beginning: at the
// prior, times the one factor that the measurements did show). Residuals are clipped (Huber) so that an outlier moves little, and
// the first step of each shape is left out because it pays for warming up. Host arithmetic only; the same observations give the
// same model.
#pragma once

#include <array>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace loquetier {

// What one step does, as sums: works of parts of a step add up.
class StepWork {
 public:
  static constexpr std::array<double, 8> kForwardKnots = {8, 32, 64, 128, 256, 512, 1024, 2048};  // rows of one pass
  static constexpr std::array<double, 4> kBackwardKnots = {64, 256, 512, 1024};
  static constexpr int kPassRows = 64;  // rows that a pass may have more without becoming longer, at least on some device
  static constexpr int kPassSizes = 36;

  // `share` of the layers in one pass of `rows` rows: all of them is 1, one of L layers 1 / L. Zero rows add nothing.
  void add_forward(double rows, double share = 1);
  void add_backward(double rows, double share = 1);  // a slice: share of the whole backward's products, per row
  StepWork& operator+=(const StepWork& other);

  bool steps = false;  // some work: the fixed part of a step counts
  double slices = 0;   // launched apart from the unified forward
  double decode_rows = 0;
  double decode_context = 0;   // keys that decodes read, summed over rows
  double prefill_pairs = 0;    // (query, key) pairs of prompt chunks
  double train_pairs = 0;      // of training and evaluation forward
  double backward_pairs = 0;   // times the share of the layers
  double head_passes = 0;      // vocabulary products launched (chunks of head rows)
  double head_rows = 0;        // sampled, or with a loss
  double train_head_rows = 0;  // of these, with a gradient
  double adapter_bytes = 0;    // of distinct adapters
  double update_bytes = 0;     // of optimizer steps
  // [0] passes (shares), [1] rows, [2 + i] hinge at knot i, each times the share.
  std::array<double, 2 + kForwardKnots.size()> forward = {};
  std::array<double, 2 + kBackwardKnots.size()> backward = {};
  // Shares of forward passes by size: [i] of up to (i + 1) * kPassRows rows; a longer one counts as several of the last size.
  std::array<double, kPassSizes> passes = {};
};

// What the prior is made from.
struct DeviceRates {
  double bytes_per_second = 1e10;
  double flops_per_second = 5e10;
  double launch_seconds = 5e-6;  // of a layer's ops, or a slice
  double step_seconds = 1e-4;    // fixed part of a step
  // (rows, operations a second) of passes with so many rows, in ascending order; one with other rows takes what the next longer one
  // takes. Empty: flops_per_second.
  std::vector<std::pair<double, double>> by_rows = {};
};
struct ModelShape {
  double layer_parameters = 0;  // of the linears of all layers
  double vocabulary_parameters = 0;
  double hidden = 0;
  double layers = 0;
  double q_columns = 0;   // Q D
  double kv_columns = 0;  // 2 K D
  double bytes_per_value = 4;
};

class CostModel {
 public:
  CostModel(const ModelShape& shape, const DeviceRates& rates);

  double predict(const StepWork& work) const;  // seconds, >= 0; 0 for no work
  // `extra` on top of `work`.
  double marginal(const StepWork& work, const StepWork& extra) const;
  // The largest n in [0, most] with predict(of(n)) <= seconds. `of(n)` is the whole step's work with n more rows (or slices) and
  // must not fall with n.
  template <class F>
  int64_t fits(double seconds, int64_t most, F of) const {
    int64_t low = 0, high = most;
    if (most > 0 && predict(of(most)) <= seconds) return most;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (predict(of(middle)) <= seconds) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  // A step was measured. False: left out (first of its shape, not finite, or not positive).
  bool observe(const StepWork& work, double seconds);

  // Relative errors |predicted - measured| / measured of the last kWindow observed steps, each predicted before it was learned.
  static constexpr size_t kWindow = 512;
  double error_quantile(double q) const;  // NaN without observations
  int64_t observations() const { return observations_; }

  // Text of one line; load() throws FormatError and changes nothing when it is not of a model like this one.
  std::string save() const;
  void load(const std::string& text);

  static constexpr size_t kFeatures = 12 + 10 + 6 + 1;
  using Features = std::array<double, kFeatures>;
  Features coefficients() const;  // seconds per unit of each feature

 private:
  Features features(const StepWork& work) const;
  void rescale(const Features& f, double seconds);
  void solve();

  std::array<double, StepWork::kPassSizes> pass_seconds_ = {};  // of the products of passes by their size; 0: not measured
  Features scale_ = {};                          // seconds per unit that theta counts in, > 0; moves in the first observations
  Features prior_ = {};                          // theta as the prior says
  Features theta_ = {};                          // >= 0
  std::array<Features, kFeatures> normal_ = {};  // sum of w x x^T, x = feature * scale / measured seconds
  Features target_ = {};                         // sum of w x
  double spread_ = 1;                            // of log(measured / predicted), slow mean
  int64_t observations_ = 0;
  std::set<uint64_t> seen_;    // shapes
  std::vector<float> errors_;  // the last kWindow, a ring
  size_t next_error_ = 0;
};

}  // namespace loquetier
