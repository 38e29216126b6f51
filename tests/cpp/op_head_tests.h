// Losses, sampling, optimizer, bad shapes, and the thread pool under the CPU backend. Included once, by op_tests.cpp.
#pragma once

#include <atomic>
#include <numeric>
#include <stdexcept>

#include "core/parallel.h"
#include "op_harness.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

std::vector<float> download_floats(Rig& rig, ArrayOnDevice<float>& array, size_t n) {
  std::vector<float> values(n);
  if (n > 0) rig.device().copy_to_host(values.data(), array.data(), n * sizeof(float));
  return values;
}

Host as_host(const std::vector<float>& values) {
  Host host(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), host.values.begin());
  return host;
}

}  // namespace

TEST(token_loss_of_every_kind_with_and_without_gradient) {
  for_each_rig([](Rig& rig) {
    for (const int64_t rows : {0, 1, 33})
      for (const int64_t vocabulary : {1, 8, 31, 33, 1000, 5000, 33000}) {
        Host logits = rig.random(rows, vocabulary, 4.0);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < vocabulary; ++j) logits(i, j) += i % 3 == 0 ? 80 : i % 3 == 1 ? -300 : 0;  // stable far from zero
        std::vector<LossRow> table;
        OnDevice dlogits(rig, logits, DType::f32);
        Host want_p(1, rows), want_loss(1, rows);
        for (int64_t i = 0; i < rows; ++i) {
          LossRow row;
          row.target = static_cast<int32_t>(rig.random_int(vocabulary));
          row.kind = static_cast<LossKind>(i % 4);
          row.weight = 0.25f * static_cast<float>(1 + i % 5) * (row.kind == LossKind::weighted_logprob ? -1.0f : 1.0f);
          const double p = reference::log_softmax(logits, i)[static_cast<size_t>(row.target)];
          row.old_logprob = static_cast<float>(p + (i % 8 < 4 ? 0.05 : i % 8 == 5 ? 0.7 : -0.7));
          row.advantage = i % 3 == 0 ? -1.5f : 0.75f;
          table.push_back(row);
          want_p(0, i) = p;
          want_loss(0, i) = reference::token_loss(row, p);
        }
        ArrayOnDevice<LossRow> dtable(rig, table);
        ArrayOnDevice<float> p(rig, std::vector<float>(static_cast<size_t>(rows), NAN)),
            loss(rig, std::vector<float>(static_cast<size_t>(rows), NAN));
        OnDevice gradient(rig, rows, vocabulary);
        run_twice({&dlogits}, [&] { rig.ops().token_loss(dlogits, dtable.data(), {}, p.data(), loss.data()); });
        const auto p_alone = download_floats(rig, p, static_cast<size_t>(rows));
        dlogits.upload();
        rig.ops().token_loss(dlogits, dtable.data(), gradient, p.data(), loss.data());
        CHECK(gradient.guards_intact());
        CHECK(download_floats(rig, p, static_cast<size_t>(rows)) == p_alone);
        expect("token_loss logprob", as_host(p_alone), want_p, 3e-7);
        expect("token_loss loss", as_host(download_floats(rig, loss, static_cast<size_t>(rows))), want_loss, 5e-6);
        expect("token_loss gradient", gradient.get(), reference::token_loss_gradient(logits, table), rig.bound(3e-6));
        if (rig.exact()) {  // the gradient in place of the logits
          dlogits.upload();
          rig.ops().token_loss(dlogits, dtable.data(), dlogits, p.data(), loss.data());
          CHECK(dlogits.get().values == gradient.get().values);
        }
      }
  });
}

TEST(token_loss_of_a_bad_row_is_not_finite_and_poisons_its_gradient) {
  for_each_rig([](Rig& rig) {
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      Host logits = rig.random(2, 40);
      logits(1, 17) = bad;
      OnDevice dlogits(rig, logits, DType::f32);
      ArrayOnDevice<LossRow> rows(rig, std::vector<LossRow>(2));
      ArrayOnDevice<float> p(rig, std::vector<float>(2)), loss(rig, std::vector<float>(2));
      rig.ops().token_loss(dlogits, rows.data(), {}, p.data(), loss.data());
      const auto values = download_floats(rig, loss, 2);
      CHECK(std::isfinite(values[0]));
      CHECK(!std::isfinite(values[1]));
    }
    // A target with probability 0: the loss is infinite though softmax, and so the plain gradient, is finite.
    Host logits = rig.random(2, 40);
    logits(1, 0) = -std::numeric_limits<double>::infinity();
    OnDevice dlogits(rig, logits, DType::f32), gradient(rig, 2, 40);
    ArrayOnDevice<LossRow> rows(rig, std::vector<LossRow>(2));
    ArrayOnDevice<float> p(rig, std::vector<float>(2)), loss(rig, std::vector<float>(2));
    rig.ops().token_loss(dlogits, rows.data(), gradient, p.data(), loss.data());
    CHECK(std::isinf(download_floats(rig, loss, 2)[1]));
    const Host got = gradient.get();
    for (int64_t c = 0; c < 40; ++c) {
      CHECK(std::isfinite(got(0, c)));
      CHECK(std::isnan(got(1, c)));
    }
  });
}

TEST(token_loss_beside_logits_of_minus_infinity) {
  for_each_rig([](Rig& rig) {
    for (const int64_t vocabulary : {40, 33000, 33001}) {
      Host logits = rig.random(3, vocabulary, 4.0);
      for (int64_t j = 0; j < vocabulary; ++j) {
        if (j % (vocabulary / 2) > 10) logits(1, j) = -std::numeric_limits<double>::infinity();
        if (j != vocabulary / 3) logits(2, j) = -std::numeric_limits<double>::infinity();
      }
      std::vector<LossRow> table(3);
      table[1].target = 7, table[2].target = static_cast<int32_t>(vocabulary / 3);
      OnDevice dlogits(rig, logits, DType::f32), gradient(rig, 3, vocabulary);
      ArrayOnDevice<LossRow> rows(rig, table);
      ArrayOnDevice<float> p(rig, std::vector<float>(3)), loss(rig, std::vector<float>(3));
      rig.ops().token_loss(dlogits, rows.data(), {}, p.data(), loss.data());
      const auto p_alone = download_floats(rig, p, 3);
      dlogits.upload();
      rig.ops().token_loss(dlogits, rows.data(), gradient, p.data(), loss.data());
      CHECK(download_floats(rig, p, 3) == p_alone);
      Host want(1, 3);
      for (int64_t i = 0; i < 3; ++i)
        want(0, i) = reference::log_softmax(logits, i)[static_cast<size_t>(table[static_cast<size_t>(i)].target)];
      expect("token_loss logprob, minus infinity", as_host(p_alone), want, 3e-7);
      expect("token_loss gradient, minus infinity", gradient.get(), reference::token_loss_gradient(logits, table), rig.bound(3e-6));
    }
  });
}

TEST(sample_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const int32_t vocabulary : {1, 33, 300, 3000, 20011}) {
      constexpr int32_t kRows = 48;
      Host logits = rig.random(kRows, vocabulary, 3.0);
      for (int32_t j = 0; j + 3 < vocabulary; j += 5) logits(7, j) = logits(7, j + 3);  // ties
      OnDevice dlogits(rig, logits, DType::f32);
      std::vector<SampleRow> rows(kRows);
      std::vector<int32_t> history, bias_ids, forbidden;
      std::vector<float> bias_values;
      const auto pick = [&] { return static_cast<int32_t>(rig.random_int(vocabulary)); };
      for (int32_t i = 0; i < kRows; ++i) {
        SampleRow& row = rows[static_cast<size_t>(i)];
        row.temperature = i % 3 == 0 ? 0 : 0.4f * static_cast<float>(i % 5 + 1);
        row.top_p = i % 4 == 1 ? 0.7f : 1.0f;
        row.top_k = i % 5 == 2 ? 1 + i % 7 : 0;
        row.min_p = i % 7 == 3 ? 0.1f : 0;
        row.seed = rig.random_word();
        row.index = i;
        row.top_logprobs = std::min<int32_t>(i % 6, vocabulary);
        row.history_begin = static_cast<int32_t>(history.size());
        if (i % 2 == 1) {
          row.repetition_penalty = 1.3f, row.presence_penalty = 0.4f, row.frequency_penalty = 0.2f;
          row.prompt_length = 7, row.output_length = 9;
          for (int32_t j = 0; j < 16; ++j) history.push_back(pick());
        }
        row.bias_begin = static_cast<int32_t>(bias_ids.size());
        row.bias_count = i % 4 == 0 ? 3 : 0;
        for (int32_t j = 0; j < row.bias_count; ++j)
          bias_ids.push_back(pick()), bias_values.push_back(static_cast<float>(j) * 2 - 1);
        row.forbidden_begin = static_cast<int32_t>(forbidden.size());
        row.forbidden_count = vocabulary > 1 && i % 5 == 0 ? 1 : 0;
        for (int32_t j = 0; j < row.forbidden_count; ++j) forbidden.push_back(pick());
      }
      ArrayOnDevice<SampleRow> drows(rig, rows);
      ArrayOnDevice<int32_t> dhistory(rig, history), dbias_ids(rig, bias_ids), dforbidden(rig, forbidden);
      ArrayOnDevice<float> dbias(rig, bias_values);
      const SampleBatch batch{drows.data(), rows.data(), kRows, dhistory.data(), dbias_ids.data(), dbias.data(), dforbidden.data()};
      ArrayOnDevice<int32_t> ids(rig, std::vector<int32_t>(kRows, -1));
      ArrayOnDevice<float> logprob(rig, std::vector<float>(kRows, NAN));
      OnDevice top_ids(rig, kRows, 5, DType::i32), top_logprobs(rig, kRows, 5, DType::f32);
      run_twice({&top_ids, &top_logprobs}, [&] {
        dlogits.upload();
        rig.ops().sample(dlogits, batch, ids.data(), logprob.data(), top_ids, top_logprobs);
      });
      CHECK(dlogits.guards_intact());
      std::vector<int32_t> got(kRows);
      rig.device().copy_to_host(got.data(), ids.data(), got.size() * sizeof(int32_t));
      Host want_p(1, kRows), want_top_ids(kRows, 5, -1), want_top(kRows, 5, kUntouched);
      int different = 0;
      for (int32_t i = 0; i < kRows; ++i) {
        const SampleRow& row = rows[static_cast<size_t>(i)];
        const auto p = reference::log_softmax(logits, i);
        std::vector<double> x(static_cast<size_t>(vocabulary));
        for (int32_t j = 0; j < vocabulary; ++j) x[static_cast<size_t>(j)] = logits(i, j);
        const auto adjusted =
            reference::adjusted_logits(x, row, history.data(), bias_ids.data(), bias_values.data(), forbidden.data());
        const int32_t id = got[static_cast<size_t>(i)];
        CHECK(id >= 0 && id < vocabulary);
        if (id < 0 || id >= vocabulary) continue;
        different += id != reference::sample(adjusted, row);
        want_p(0, i) = p[static_cast<size_t>(id)];
        std::vector<int32_t> order(static_cast<size_t>(vocabulary));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
        for (int32_t j = 0; j < row.top_logprobs; ++j) {
          want_top_ids(i, j) = order[static_cast<size_t>(j)];
          want_top(i, j) = p[static_cast<size_t>(order[static_cast<size_t>(j)])];
        }
      }
      // Rounding to f32 could turn a choice only where two tokens are within 1e-6 of each other: not in these rows.
      CHECK_EQ(different, 0);
      expect("sample logprob", as_host(download_floats(rig, logprob, kRows)), want_p, 3e-7);
      CHECK(top_ids.get().values == want_top_ids.values);
      expect("sample top_logprobs", top_logprobs.get(), want_top, 3e-7);
    }
  });
}

// Rows on which finding the kept tokens is hard: ties at the edge, many tokens within a little of each other, tokens so far below
// the largest that they have no mass, logits far from zero, hardly any token at all.
TEST(sample_of_odd_distributions) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  struct Odd {
    const char* name;
    int32_t vocabulary;
    std::function<double(double normal, int32_t token)> logit;
  };
  const std::vector<Odd> odds = {
      {"all equal", 40000, [](double, int32_t) { return 1.5; }},
      {"close together", 40000, [](double x, int32_t) { return 0.02 * std::tanh(x); }},
      {"rounded", 5000, [](double x, int32_t) { return std::round(4 * x) / 4; }},
      {"far apart", 5000, [](double x, int32_t) { return 60 * x; }},
      {"half impossible", 5000, [=](double x, int32_t token) { return token % 1000 < 500 ? -kInfinity : 3 * x; }},
      {"four tokens", 5001, [=](double x, int32_t token) { return token % 1250 == 7 ? x : -kInfinity; }},
      {"high", 5000, [](double x, int32_t) { return 700 + 3 * x; }},
      {"low", 4999, [](double x, int32_t) { return -700 + 3 * x; }},
      {"one above all", 5000, [](double x, int32_t token) { return token == 4321 ? 40 : x; }},
  };
  for_each_rig([&](Rig& rig) {
    constexpr int32_t kRows = 40;
    for (const Odd& odd : odds) {
      Host logits = rig.random(kRows, odd.vocabulary);
      for (int64_t i = 0; i < kRows; ++i)
        for (int32_t j = 0; j < odd.vocabulary; ++j) logits(i, j) = odd.logit(logits(i, j), j);
      OnDevice dlogits(rig, logits, DType::f32);
      const auto any_of = [&](auto... options) {
        const std::array all{options...};
        return all[static_cast<size_t>(rig.random_int(static_cast<int64_t>(all.size())))];
      };
      std::vector<SampleRow> rows(kRows);
      for (SampleRow& row : rows) {
        row.temperature = any_of(1.0f, 1.0f, 0.5f, 1.7f, 1e-3f, 0.0f);
        row.top_p = any_of(1.0f, 0.999f, 0.9f, 0.5f, 0.01f);
        row.top_k = any_of(0, 1, 3, 40, 2500, odd.vocabulary - 1, odd.vocabulary, odd.vocabulary + 5);
        row.min_p = any_of(0.0f, 0.0f, 1e-4f, 0.2f, 1.0f);
        row.top_logprobs = any_of(0, 5);
        row.seed = rig.random_word();
        row.index = rig.random_int(1000);
      }
      ArrayOnDevice<SampleRow> drows(rig, rows);
      ArrayOnDevice<int32_t> ids(rig, std::vector<int32_t>(kRows, -1));
      ArrayOnDevice<float> logprob(rig, std::vector<float>(kRows, NAN));
      OnDevice top_ids(rig, kRows, 5, DType::i32), top_logprobs(rig, kRows, 5, DType::f32);
      const SampleBatch batch{drows.data(), rows.data(), kRows, nullptr, nullptr, nullptr, nullptr};
      const auto sampled = [&] {
        rig.ops().sample(dlogits, batch, ids.data(), logprob.data(), top_ids, top_logprobs);
        std::vector<int32_t> got(kRows);
        rig.device().copy_to_host(got.data(), ids.data(), got.size() * sizeof(int32_t));
        return got;
      };
      const std::vector<int32_t> got = sampled();
      dlogits.upload();
      CHECK(sampled() == got);
      Host want_top_ids(kRows, 5, -1);
      for (int32_t i = 0; i < kRows; ++i) {
        const SampleRow& row = rows[static_cast<size_t>(i)];
        std::vector<double> x(static_cast<size_t>(odd.vocabulary));
        for (int32_t j = 0; j < odd.vocabulary; ++j) x[static_cast<size_t>(j)] = logits(i, j);
        const int32_t want = reference::sample(reference::adjusted_logits(x, row, nullptr, nullptr, nullptr, nullptr), row);
        if (got[static_cast<size_t>(i)] != want)
          std::printf("%s, row %d: temperature %g, top_p %g, top_k %d, min_p %g\n", odd.name, i,
                      static_cast<double>(row.temperature), static_cast<double>(row.top_p), row.top_k,
                      static_cast<double>(row.min_p));
        CHECK_EQ(got[static_cast<size_t>(i)], want);
        std::vector<int32_t> order(static_cast<size_t>(odd.vocabulary));
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + 5, order.end(), [&](int32_t a, int32_t b) {
          const double of_a = x[static_cast<size_t>(a)], of_b = x[static_cast<size_t>(b)];
          return of_a > of_b || (of_a == of_b && a < b);
        });
        for (int32_t j = 0; j < row.top_logprobs; ++j) want_top_ids(i, j) = order[static_cast<size_t>(j)];
      }
      CHECK(top_ids.get().values == want_top_ids.values);
    }
  });
}

TEST(sample_at_a_temperature_next_to_zero_is_greedy) {
  for_each_rig([](Rig& rig) {
    Host logits = rig.random(8, 3000, 3.0);
    OnDevice dlogits(rig, logits, DType::f32);
    std::vector<SampleRow> rows(8);
    for (size_t i = 0; i < rows.size(); ++i)
      rows[i].temperature = std::array{1e-5f, 1e-6f, 1e-30f, 1e-45f}[i % 4], rows[i].seed = i;
    ArrayOnDevice<SampleRow> drows(rig, rows);
    ArrayOnDevice<int32_t> ids(rig, std::vector<int32_t>(8, -1));
    ArrayOnDevice<float> logprob(rig, std::vector<float>(8));
    rig.ops().sample(dlogits, {drows.data(), rows.data(), 8, nullptr, nullptr, nullptr, nullptr}, ids.data(), logprob.data(), {},
                     {});
    std::vector<int32_t> got(8);
    rig.device().copy_to_host(got.data(), ids.data(), got.size() * sizeof(int32_t));
    for (int64_t i = 0; i < 8; ++i) {
      const auto row = logits.values.begin() + i * 3000;
      CHECK_EQ(got[static_cast<size_t>(i)], static_cast<int32_t>(std::max_element(row, row + 3000) - row));
    }
  });
}

TEST(sample_draws_from_the_distribution) {
  for_each_rig([](Rig& rig) {
    // Four tokens of known probability, and a penalty-free row each with another index: counts within five standard deviations.
    constexpr int32_t kRows = 4000;
    const double probability[] = {0.5, 0.3, 0.15, 0.05};
    Host logits(kRows, 4);
    for (int32_t i = 0; i < kRows; ++i)
      for (int32_t j = 0; j < 4; ++j) logits(i, j) = std::log(probability[j]);
    OnDevice dlogits(rig, logits, DType::f32);
    std::vector<SampleRow> rows(kRows);
    for (int32_t i = 0; i < kRows; ++i)
      rows[static_cast<size_t>(i)].temperature = 1, rows[static_cast<size_t>(i)].seed = 11, rows[static_cast<size_t>(i)].index = i;
    ArrayOnDevice<SampleRow> drows(rig, rows);
    const SampleBatch batch{drows.data(), rows.data(), kRows, nullptr, nullptr, nullptr, nullptr};
    ArrayOnDevice<int32_t> ids(rig, std::vector<int32_t>(kRows, -1));
    ArrayOnDevice<float> logprob(rig, std::vector<float>(kRows));
    rig.ops().sample(dlogits, batch, ids.data(), logprob.data(), {}, {});
    std::vector<int32_t> got(kRows);
    rig.device().copy_to_host(got.data(), ids.data(), got.size() * sizeof(int32_t));
    for (int32_t j = 0; j < 4; ++j) {
      const double n = static_cast<double>(std::count(got.begin(), got.end(), j)), p = probability[j];
      CHECK_NEAR(n, kRows * p, 5 * std::sqrt(kRows * p * (1 - p)));
    }
  });
}

TEST(sampled_logprob_equals_trained_logprob) {
  for_each_rig([](Rig& rig) {
    for (const int64_t vocabulary : {777, 40, 5000, 33000, 128256, 420004}) {
      Host logits = rig.random(20, vocabulary, 3.0);
      for (int64_t j = 0; j < vocabulary / 2; ++j) logits(3, j) = -std::numeric_limits<double>::infinity();
      OnDevice a(rig, logits, DType::f32), b(rig, logits, DType::f32);
      std::vector<SampleRow> rows(20);
      for (size_t i = 0; i < rows.size(); ++i) rows[i].temperature = 0.8f, rows[i].seed = i;
      ArrayOnDevice<SampleRow> drows(rig, rows);
      ArrayOnDevice<int32_t> ids(rig, std::vector<int32_t>(20));
      ArrayOnDevice<float> sampled(rig, std::vector<float>(20)), trained(rig, std::vector<float>(20)),
          loss(rig, std::vector<float>(20));
      rig.ops().sample(a, {drows.data(), rows.data(), 20, nullptr, nullptr, nullptr, nullptr}, ids.data(), sampled.data(), {}, {});
      std::vector<int32_t> got(20);
      rig.device().copy_to_host(got.data(), ids.data(), got.size() * sizeof(int32_t));
      std::vector<LossRow> targets(20);
      for (size_t i = 0; i < targets.size(); ++i) targets[i].target = got[i];
      ArrayOnDevice<LossRow> dtargets(rig, targets);
      rig.ops().token_loss(b, dtargets.data(), {}, trained.data(), loss.data());
      CHECK(download_floats(rig, sampled, 20) == download_floats(rig, trained, 20));
    }
  });
}

TEST(grad_norm_and_adamw) {
  for_each_rig([](Rig& rig) {
    // Three jobs: clipped, not clipped, and one with a gradient that is not finite; tensors of ugly sizes, an empty one among them.
    const std::vector<std::vector<int64_t>> sizes = {{1, 33, 40000}, {16384, 0, 16385}, {100}};
    std::vector<AdamJob> jobs(3);
    for (size_t j = 0; j < 3; ++j) {
      jobs[j].weight_decay = j == 0 ? 0.1f : 0;
      jobs[j].max_grad_norm = j == 0 ? 0.5f : 0;
      jobs[j].bias_correction1 = 1 - std::pow(jobs[j].beta1, 3.0f);
      jobs[j].bias_correction2 = 1 - std::pow(jobs[j].beta2, 3.0f);
    }
    struct Held {
      Host master, grad, m, v;
      std::vector<std::unique_ptr<OnDevice>> arrays;
    };
    std::vector<Held> held;
    std::vector<AdamTensor> tensors;
    for (size_t j = 0; j < sizes.size(); ++j)
      for (const int64_t n : sizes[j]) {
        Held h{rig.random(1, n), rig.random(1, n, 0.1), rig.random(1, n, 0.01), rig.random(1, n, 0.01), {}};
        for (double& v : h.v.values) v = std::fabs(v);
        if (j == 2) h.grad(0, 42) = std::numeric_limits<double>::infinity();
        for (Host* x : {&h.master, &h.grad, &h.m, &h.v}) h.arrays.push_back(std::make_unique<OnDevice>(rig, *x, DType::f32));
        Host weight = h.master;
        h.arrays.push_back(std::make_unique<OnDevice>(rig, weight));
        const auto at = [&](size_t i) { return h.arrays[i]->view().data; };
        tensors.push_back({static_cast<float*>(at(0)), static_cast<float*>(at(1)), static_cast<float*>(at(2)),
                           static_cast<float*>(at(3)), at(4), n, static_cast<int32_t>(j), 1e-2f});
        held.push_back(std::move(h));
      }
    ArrayOnDevice<AdamTensor> dtensors(rig, tensors);
    ArrayOnDevice<AdamJob> djobs(rig, jobs);
    const AdamBatch batch{dtensors.data(), tensors.data(), static_cast<int32_t>(tensors.size()), djobs.data(), jobs.data(), 3};
    ArrayOnDevice<float> norm(rig, std::vector<float>(3, NAN));
    rig.ops().grad_norm(batch, norm.data());
    const auto got_norm = download_floats(rig, norm, 3);
    rig.ops().grad_norm(batch, norm.data());
    CHECK(download_floats(rig, norm, 3) == got_norm);
    CHECK(!std::isfinite(got_norm[2]));
    rig.ops().adamw(batch, norm.data());
    rig.device().synchronize();
    for (size_t j = 0; j < 3; ++j) {
      std::vector<const std::vector<double>*> grads;
      for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors[i].job == static_cast<int32_t>(j)) grads.push_back(&held[i].grad.values);
      const double want_norm = reference::grad_norm(grads);
      if (j < 2) CHECK_NEAR(static_cast<double>(got_norm[j]), want_norm, 1e-6 * want_norm);
      for (size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i].job != static_cast<int32_t>(j)) continue;
        Held& h = held[i];
        reference::AdamState s{h.master.values, h.grad.values, h.m.values, h.v.values};
        reference::adamw(s, jobs[j], static_cast<double>(tensors[i].lr), j == 2 ? static_cast<double>(NAN) : want_norm);
        const auto as_matrix = [&](const std::vector<double>& values) {
          Host x(1, static_cast<int64_t>(values.size()));
          x.values = values;
          return x;
        };
        expect("adamw master", h.arrays[0]->get(), as_matrix(s.master), 1e-6);
        expect("adamw m", h.arrays[2]->get(), as_matrix(s.m), 1e-6);
        expect("adamw v", h.arrays[3]->get(), as_matrix(s.v), 1e-6);
        Host rounded = h.arrays[0]->get();
        OnDevice weight(rig, rounded);  // rounds the master as the operation should
        CHECK(h.arrays[4]->get().values == rounded.values);
        for (double g : h.arrays[1]->get().values) CHECK_EQ(g, 0.0);
        for (const auto& array : h.arrays) CHECK(array->guards_intact());
      }
    }
  });
}

TEST(bad_shapes_are_refused_before_anything_is_written) {
  for_each_rig([](Rig& rig) {
    Host x = rig.random(4, 64), w = rig.random(32, 64);
    OnDevice dx(rig, x), dw(rig, w), y(rig, 4, 32), narrow(rig, 4, 31), bias(rig, 1, 31);
    Ops& ops = rig.ops();
    const auto before = y.download();
    CHECK_THROWS(InvalidArgument, "[linear] y: expected [4, 32], got [4, 31]", ops.linear(dx, dw, {}, narrow));
    CHECK_THROWS(InvalidArgument, "[linear] bias: expected [32], got [1, 31]", ops.linear(dx, dw, bias, y));
    CHECK_THROWS(InvalidArgument, "[linear] w: expected", ops.linear(y, dw, {}, y));
    CHECK_THROWS(InvalidArgument, "[rms_norm] w: expected [64]", ops.rms_norm(dx, bias, 1e-6f, dx));
    CHECK_THROWS(InvalidArgument, "[swiglu] y: expected [4, 32]", ops.swiglu(dx, narrow));
    LoraRig lora(rig, 4, 64, {32}, {{0, 4, {8}, 0}});
    CHECK_THROWS(InvalidArgument, "[lora_shrink] s: expected at least 8 columns",
                 ops.lora_shrink(lora.linear, lora.groups, dx, y.view().slice_cols(0, 7)));
    LoraGroup beyond = lora.groups.host_groups[0];
    beyond.rows = 5;
    ArrayOnDevice<LoraGroup> dbeyond(rig, {beyond});
    const LoraGroups groups{dbeyond.data(), &beyond, 1, 8, nullptr};
    CHECK_THROWS(InvalidArgument, "[lora_expand] groups[0]: expected rows between 0 and 4, got 0 + 5",
                 ops.lora_expand(lora.linear, groups, dx, y));
    CHECK(y.download() == before);
  });
}

TEST(thread_pool_covers_every_index_once) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    CHECK_EQ(pool.threads(), threads);
    for (const int64_t n : {0, 1, 2, 7, 1000})
      for (const int64_t grain : {1, 3, 2000}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        for (const auto& hit : hits) CHECK_EQ(hit.load(), 1);
        CHECK(n >= 0);
      }
  }
}

TEST(thread_pool_nested_calls_exceptions_and_many_short_jobs) {
  ThreadPool pool(3);
  std::atomic<int64_t> total{0};
  pool.parallel_for(40, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pool.parallel_for(10, 1, [&](int64_t b, int64_t e) { total += e - b; });
  });
  CHECK_EQ(total.load(), 400);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS(std::runtime_error, "range 17", pool.parallel_for(64, 1, [](int64_t begin, int64_t end) {
      if (begin <= 17 && 17 < end) throw std::runtime_error("range 17");
    }));
  }
  total = 0;
  for (int i = 0; i < 20000; ++i)
    pool.parallel_for(6, 1, [&](int64_t b, int64_t e) { total.fetch_add(e - b, std::memory_order_relaxed); });
  CHECK_EQ(total.load(), 120000);
  CHECK_THROWS(InvalidArgument, "[thread pool] threads", ThreadPool(-1));
}

// Last: what --errors yes asked for.
TEST(report_of_measured_errors) {
  if (option("--errors", "no") == "yes")
    for (const auto& [label, error] : measured_errors()) std::printf("%-60s %.3g\n", label.c_str(), error);
  CHECK(true);
}
