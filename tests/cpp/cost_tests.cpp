// The cost model against machines whose truth is known: a roofline that no knot of the model lies on, with noise, outliers and
// drift. And the prior, the queries, the text form, and how the backward of a layer is cut.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <random>

#include "check.h"
#include "loquetier/error.h"
#include "plan/cost_model.h"
#include "plan/slices.h"

using namespace loquetier;

namespace {

constexpr double kLayers = 32;

ModelShape llama_8b() { return {6.98e9, 128256.0 * 4096, 4096, kLayers, 4096, 2048, 2}; }
DeviceRates gpu() { return {4.2e12, 7e14, 3e-6, 1e-4}; }

// A machine: seconds of what add() was told of.
struct Machine {
  double stream, row, key, pair, head, head_row, slice, fixed, byte;
  double pass(double rows) const { return rows <= 0 ? 0 : std::max(stream, rows * row) + 0.1 * std::min(stream, rows * row); }
};

Machine fast() { return {3.7e-3, 2.1e-5, 3.1e-8, 6e-10, 2.6e-4, 1.9e-6, 8e-6, 3e-4, 4e-13}; }
Machine slow() { return {3e-4, 9e-4, 1e-6, 3e-7, 2e-4, 3e-5, 1e-6, 5e-5, 1e-10}; }  // products dominate from the first rows

struct Sample {
  StepWork work;
  double seconds = 0;
};

// A mixed workload: decodes, prompts, chunks of training, slices of backward.
Sample sample(std::mt19937& random, const Machine& m) {
  const auto pick = [&](int low, int high) { return static_cast<double>(std::uniform_int_distribution<int>(low, high)(random)); };
  Sample s;
  StepWork& w = s.work;
  const double decodes = random() % 5 ? pick(1, 64) : 0, prompts = random() % 3 ? 0 : pick(16, 1500);
  const double train = random() % 2 ? pick(32, 1024) : 0, slices = random() % 2 ? pick(1, 40) : 0;
  const double rows = decodes + prompts + train;
  if (rows + slices == 0) return sample(random, m);
  s.seconds = m.fixed;
  w.add_forward(rows);
  s.seconds += m.pass(rows);
  w.decode_rows = decodes;
  w.decode_context = decodes * pick(100, 2000);
  w.prefill_pairs = prompts * pick(100, 1500);
  w.train_pairs = train * pick(50, 1000);
  s.seconds += w.decode_context * m.key + (w.prefill_pairs + w.train_pairs) * m.pair;
  w.head_rows = decodes + (prompts > 0 ? 1 : 0) + train;
  w.train_head_rows = train;
  w.head_passes = std::ceil(w.head_rows / 256);
  s.seconds += w.head_passes * m.head + (w.head_rows + 2 * train) * m.head_row;
  w.adapter_bytes = pick(1, 8) * 8e7;
  s.seconds += w.adapter_bytes * m.byte;
  for (int i = 0; i < static_cast<int>(slices); ++i) {
    const double block = random() % 4 ? 1024 : pick(1, 1024), share = (random() % 2 ? 0.85 : 0.1) / kLayers;
    w.add_backward(block, share);
    w.slices += 1;
    s.seconds += share * m.pass(block) * 1.1 + m.slice;
  }
  return s;
}

struct Noise {
  double sigma = 0.03, outliers = 0.02, drift = 0;  // drift: by the last step, as a share
};

CostModel learn(std::mt19937& random, const Machine& machine, CostModel model, int steps, const Noise& noise) {
  std::normal_distribution<double> normal(0, noise.sigma);
  for (int i = 0; i < steps; ++i) {
    const Sample s = sample(random, machine);
    double measured = s.seconds * std::exp(normal(random)) * (1 + noise.drift * i / steps);
    if (std::uniform_real_distribution<double>(0, 1)(random) < noise.outliers) measured *= 2 + random() % 20;
    model.observe(s.work, measured);
  }
  return model;
}

// Against the truth, on fresh samples.
std::pair<double, double> errors(std::mt19937& random, const Machine& machine, const CostModel& model, double scale = 1) {
  std::vector<double> list;
  for (int i = 0; i < 2000; ++i) {
    const Sample s = sample(random, machine);
    list.push_back(std::abs(model.predict(s.work) / (s.seconds * scale) - 1));
  }
  std::sort(list.begin(), list.end());
  return {list[list.size() / 2], list[list.size() * 95 / 100]};
}

uint32_t seed_option() {
  const auto seed = static_cast<uint32_t>(std::strtoul(test::option("--seed", "5").c_str(), nullptr, 10));
  std::cout << "seed " << seed << "\n";
  return seed;
}

}  // namespace

TEST(the_prior_is_a_roofline) {
  const CostModel model(llama_8b(), gpu());
  StepWork decode, batch, chunk, backward;
  decode.add_forward(1);
  batch.add_forward(64);
  chunk.add_forward(2048);
  backward.add_backward(2048);
  CHECK_NEAR(model.predict(decode), 13.96e9 / 4.2e12 + 32 * 3e-6 + 1e-4, 1e-6);  // the weights' bytes
  CHECK_NEAR(model.predict(batch), model.predict(decode), 1e-3 * model.predict(decode));
  CHECK_NEAR(model.predict(chunk), 2 * 6.98e9 * 2048 / 7e14 + 1e-4, 2e-3);  // the products
  CHECK_NEAR(model.predict(backward), model.predict(chunk), 0.1 * model.predict(chunk));
  CHECK_EQ(model.predict({}), 0);
  CHECK(std::isnan(model.error_quantile(0.5)));
  CHECK_THROWS(InvalidArgument, "rates", CostModel(llama_8b(), {0, 1, 0, 0}));
  double before = 0;
  for (int rows = 1; rows <= 8192; rows *= 2) {  // never falls, and never faster than the rows
    StepWork w;
    w.add_forward(rows);
    CHECK(model.predict(w) >= before);
    CHECK(before == 0 || model.predict(w) <= 2 * before + 1e-9);
    before = model.predict(w);
  }
}

// Products in tiles of 256 rows, four tiles at a time.
double stairs(double rows) { return rows <= 0 ? 0 : 4e-3 + 2.5e-3 * std::ceil(rows / 256) + 9e-3 * std::floor((rows - 1) / 1024); }

DeviceRates tiled_gpu() {
  DeviceRates rates = gpu();
  for (double rows = 64; rows <= 2304; rows += 64) rates.by_rows.emplace_back(rows, 2 * 6.98e9 * rows / stairs(rows));
  return rates;
}

TEST(measured_passes_are_the_prior_where_there_are_some) {
  const CostModel model(llama_8b(), tiled_gpu());
  const auto seconds = [&](double rows, double share = 1) {
    StepWork w;
    w.add_forward(rows, share);
    return model.predict(w);
  };
  const double row = 2 * 6.98e9 / 7e14;  // beside its products a row has a tenth of them, and a pass its launches
  for (const double rows : {1.0, 64.0, 200.0, 256.0, 257.0, 1024.0, 1025.0, 2304.0}) {
    CHECK_NEAR(seconds(rows), stairs(64 * std::ceil(rows / 64)) + 0.1 * row * rows + 32 * 3e-6 + 1e-4, 1e-6);
  }
  CHECK(seconds(1025) > seconds(1024) + 9e-3);
  CHECK_NEAR(seconds(4608), 2 * stairs(2304) + 0.1 * row * 4608 + 32 * 3e-6 + 1e-4, 1e-6);
  CHECK_NEAR(seconds(1024, 0.5) - 1e-4, (seconds(1024) - 1e-4) / 2, 1e-9);
  DeviceRates few = gpu(), falling = gpu();
  few.by_rows = {{100, 1e14}, {500, 1e14}};  // up to the next size that was measured
  StepWork w;
  w.add_forward(120);
  CHECK(CostModel(llama_8b(), few).predict(w) > 2 * 6.98e9 * 500 / 1e14);
  falling.by_rows = {{64, 1e13}, {128, 1e15}};  // noise: more rows never take less
  StepWork more;
  more.add_forward(128);
  CHECK(CostModel(llama_8b(), falling).predict(more) >= 2 * 6.98e9 * 64 / 1e13);
  for (const auto& wrong : {std::vector<std::pair<double, double>>{{64, 1e14}, {64, 1e14}}, {{0, 1e14}}, {{64, 0}}}) {
    DeviceRates rates = gpu();
    rates.by_rows = wrong;
    CHECK_THROWS(InvalidArgument, "by_rows", CostModel(llama_8b(), rates));
  }
}

TEST(steps_of_tiles_are_learned_only_from_measured_passes) {
  std::mt19937 random(seed_option());
  const auto step = [&](double scale) {
    Sample s;
    const double rows = static_cast<double>(std::uniform_int_distribution<int>(1, 2304)(random));
    s.work.add_forward(rows);
    s.seconds = scale * (stairs(rows) + 2e-6 * rows + 3e-4);
    return s;
  };
  DeviceRates fast_clock = tiled_gpu();  // measured while the device was cool
  for (auto& [rows, rate] : fast_clock.by_rows) rate *= 1.2;
  double error[2] = {};
  for (const bool measured : {false, true}) {
    CostModel model(llama_8b(), measured ? fast_clock : gpu());
    std::normal_distribution<double> noise(0, 0.02);
    for (int i = 0; i < 600; ++i) {
      const Sample s = step(1);
      model.observe(s.work, s.seconds * std::exp(noise(random)));
    }
    std::vector<double> list;
    for (int i = 0; i < 1000; ++i) {
      const Sample s = step(1);
      list.push_back(std::abs(model.predict(s.work) / s.seconds - 1));
    }
    std::sort(list.begin(), list.end());
    error[measured] = list[950];
  }
  std::cout << "a pass, error at p95: " << error[0] << " by hinges, " << error[1] << " with measured passes\n";
  CHECK(error[1] <= 0.05);
  CHECK(error[0] > 2 * error[1]);
}

TEST(learns_a_mixed_workload_on_both_kinds_of_machine) {
  std::mt19937 random(seed_option());
  for (const Machine& machine : {fast(), slow()}) {
    for (const double rates : {1.0, 0.2, 5.0}) {  // the prior may be far off
      DeviceRates prior = gpu();
      prior.bytes_per_second *= rates;
      prior.flops_per_second *= rates;
      const CostModel early = learn(random, machine, CostModel(llama_8b(), prior), 150, {});
      const CostModel model = learn(random, machine, early, 1500, {});
      const auto [median_early, p95_early] = errors(random, machine, early);
      const auto [median, p95] = errors(random, machine, model);
      std::cout << "rates x" << rates << ": after 150 steps " << median_early << " " << p95_early << ", after 1650 " << median
                << " " << p95 << ", as the model counts itself " << model.error_quantile(0.5) << " " << model.error_quantile(0.95)
                << "\n";
      CHECK(median_early <= 0.10);
      CHECK(median <= 0.05);
      CHECK(p95 <= 0.15);
      CHECK(model.error_quantile(0.5) <= 0.05);
      for (const double c : model.coefficients()) CHECK(c >= 0);
    }
  }
}

TEST(follows_drift) {
  std::mt19937 random(seed_option());
  const CostModel model = learn(random, fast(), CostModel(llama_8b(), gpu()), 3000, {.drift = 0.5});
  const auto [median, p95] = errors(random, fast(), model, 1.5);
  std::cout << "after a drift of 50 % in 3000 steps: " << median << " " << p95 << "\n";
  CHECK(median <= 0.05);
  CHECK(p95 <= 0.15);
}

TEST(one_sort_of_step_for_long_does_not_unlearn_the_others) {
  std::mt19937 random(seed_option());
  CostModel model = learn(random, fast(), CostModel(llama_8b(), gpu()), 1500, {});
  const Machine m = fast();
  std::normal_distribution<double> normal(0, 0.03);
  for (int i = 0; i < 5000; ++i) {
    StepWork w;
    w.add_forward(32);
    w.decode_rows = w.head_rows = 32;
    w.decode_context = 32 * 500;
    w.head_passes = 1;
    model.observe(w, (m.fixed + m.pass(32) + w.decode_context * m.key + m.head + 32 * m.head_row) * std::exp(normal(random)));
  }
  const auto [median, p95] = errors(random, fast(), model);
  std::cout << "after 5000 decode steps: " << median << " " << p95 << "\n";
  CHECK(median <= 0.08);
  CHECK(p95 <= 0.25);
}

TEST(an_observation_takes_microseconds) {
  std::mt19937 random(seed_option());
  CostModel model(llama_8b(), gpu());
  std::vector<Sample> samples;
  for (int i = 0; i < 2000; ++i) samples.push_back(sample(random, fast()));
  const auto begin = std::chrono::steady_clock::now();
  for (const Sample& s : samples) model.observe(s.work, s.seconds);
  const double each = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / 2000;
  std::cout << each * 1e6 << " us an observation\n";
  CHECK(each < 1e-3);  // far above what it takes; sanitizers and debug builds are slow
}

TEST(first_steps_of_a_shape_and_nonsense_are_left_out) {
  CostModel model(llama_8b(), gpu());
  StepWork w;
  w.add_forward(16);
  w.decode_rows = 16;
  CHECK(!model.observe(w, 30.0));  // includes loading kernels
  CHECK_EQ(model.observations(), 0);
  CHECK(model.observe(w, 0.004));
  CHECK(!model.observe(w, 0));
  CHECK(!model.observe(w, -1));
  CHECK(!model.observe(w, std::nan("")));
  CHECK(!model.observe({}, 1));
  CHECK_EQ(model.observations(), 1);
  CHECK(model.error_quantile(0.5) < 1);
}

TEST(fits_is_the_largest_that_fits) {
  const CostModel model(llama_8b(), gpu());
  const auto of = [&](int64_t n) {
    StepWork w;
    w.add_forward(8 + static_cast<double>(n));
    w.train_pairs = 100.0 * static_cast<double>(n);
    return w;
  };
  for (const double seconds : {0.0, 0.003, 0.004, 0.01, 0.03, 1.0}) {
    const int64_t n = model.fits(seconds, 4000, of);
    CHECK(n >= 0 && n <= 4000);
    CHECK(n == 0 || model.predict(of(n)) <= seconds);
    CHECK(n == 4000 || model.predict(of(n + 1)) > seconds);
  }
  CHECK_NEAR(model.marginal(of(0), {}), 0, 0);
}

TEST(text_comes_back_the_same_and_garbage_is_refused) {
  std::mt19937 random(seed_option());
  const CostModel model = learn(random, fast(), CostModel(llama_8b(), gpu()), 400, {});
  CostModel other(llama_8b(), {1e11, 1e12, 1e-5, 1e-4});
  const double before = other.predict(sample(random, fast()).work);
  for (const std::string text : {"", "nonsense", "loquetier-cost-model-1 29 5 0.1 1 1 1", "loquetier-cost-model-2 3 5 0.1 1 1 1",
                                 "loquetier-cost-model-2 29 5 0.1 1 1 1"}) {
    CHECK_THROWS(FormatError, "[cost model] text", other.load(text));
  }
  CHECK(before > 0);
  other.load(model.save());
  for (int i = 0; i < 50; ++i) {
    const StepWork w = sample(random, fast()).work;
    CHECK_NEAR(other.predict(w), model.predict(w), 1e-6 * model.predict(w));
  }
  CHECK_EQ(other.save().substr(0, 24), model.save().substr(0, 24));
  const CostModel tiled(llama_8b(), tiled_gpu());
  other.load(tiled.save());
  for (int i = 0; i < 50; ++i) {
    const StepWork w = sample(random, fast()).work;
    CHECK_NEAR(other.predict(w), tiled.predict(w), 1e-6 * tiled.predict(w));
  }
  const std::string saved = tiled.save();
  CHECK_THROWS(FormatError, "passes", other.load(saved.substr(0, saved.rfind(' ')) + " 0"));
}

TEST(a_layer_is_cut_without_gaps) {
  std::mt19937 random(seed_option());
  for (int round = 0; round < 300; ++round) {
    std::vector<int32_t> rows(1 + random() % 9);
    int32_t total = 0;
    for (int32_t& n : rows) total += n = static_cast<int32_t>(1 + random() % 50);
    const auto slice = static_cast<int32_t>(random() % 40);
    const bool rerun = random() % 2;
    const auto slices = cut_layer(rows, slice, rerun);
    if (slice == 0) {
      CHECK(slices.size() == 1 && slices[0].rows == total && slices[0].sequences == static_cast<int32_t>(rows.size()));
      continue;
    }
    std::vector<BackwardPart> order;
    int32_t row = 0, sequence = 0;
    for (const BackwardSlice& s : slices) {
      if (order.empty() || order.back() != s.part) {
        CHECK(order.empty() || row == total);
        order.push_back(s.part);
        row = sequence = 0;
      }
      CHECK_EQ(s.row_begin, row);
      CHECK(s.rows >= 1);
      row += s.rows;
      if (s.part == BackwardPart::mlp || s.part == BackwardPart::qkv) {
        CHECK(s.rows <= slice);
        continue;
      }
      CHECK_EQ(s.sequence_begin, sequence);
      CHECK(s.sequences >= 1 && (s.sequences == 1 || s.rows <= slice));
      int32_t inside = 0;
      for (int32_t i = 0; i < s.sequences; ++i) inside += rows[static_cast<size_t>(sequence + i)];
      CHECK_EQ(inside, s.rows);
      sequence += s.sequences;
    }
    CHECK_EQ(row, total);
    std::vector<BackwardPart> expected = {BackwardPart::mlp, BackwardPart::attention, BackwardPart::qkv};
    if (rerun) expected.insert(expected.begin(), BackwardPart::rerun);
    CHECK(order == expected);
  }
}
