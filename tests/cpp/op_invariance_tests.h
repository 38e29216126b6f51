// What the deterministic mode promises, bit for bit: a row computed alone equals the row computed in a batch, and paged attention
// equals packed attention. Also that results do not depend on the number of threads. Included once, by op_tests.cpp.
#pragma once

#include "op_cases_attention.h"
#include "op_cases_lora.h"
#include "op_harness.h"

namespace loquetier::test {

// y of all rows against y of each run of rows alone.
inline void check_rows_alone(Rig& rig, const char* what, const Host& x, int64_t out_cols,
                             const std::function<void(TensorView, TensorView)>& f) {
  Host all = x;
  OnDevice dx(rig, all), y(rig, x.rows, out_cols);
  f(dx, y);
  const Host together = y.get();
  for (const int64_t n : {1, 2, 3, 5, 40}) {
    for (int64_t begin = 0; begin < x.rows; begin += n) {
      const int64_t rows = std::min(n, x.rows - begin);
      Host part = rows_of(all, begin, rows);
      OnDevice dpart(rig, part), out(rig, rows, out_cols);
      f(dpart, out);
      const bool same = out.get().values == rows_of(together, begin, rows).values;
      if (!same)
        std::printf("  %s: %lld rows from %lld differ from the batch\n", what, static_cast<long long>(rows),
                    static_cast<long long>(begin));
      CHECK(same);
    }
  }
}

}  // namespace loquetier::test

using namespace loquetier;
using namespace loquetier::test;

TEST(deterministic_rows_do_not_depend_on_the_batch) {
  for_each_rig([](Rig& rig) {
    if (!rig.deterministic()) return;
    const Host x = rig.random(67, 1056);
    Host w = rig.random(72, 1056), bias = rig.random(1, 72), norm = rig.random(1, 1056);
    OnDevice dw(rig, w), dbias(rig, bias), dnorm(rig, norm);
    check_rows_alone(rig, "linear", x, 72, [&](TensorView in, TensorView out) { rig.ops().linear(in, dw, dbias, out); });
    check_rows_alone(rig, "rms_norm", x, 1056, [&](TensorView in, TensorView out) { rig.ops().rms_norm(in, dnorm, 1e-6f, out); });
    check_rows_alone(rig, "swiglu", x, 528, [&](TensorView in, TensorView out) { rig.ops().swiglu(in, out); });
    check_rows_alone(rig, "linear_backward", rig.random(67, 72), 1056,
                     [&](TensorView in, TensorView out) { rig.ops().linear_backward(in, dw, out, false); });
  });
}

TEST(deterministic_lora_rows_do_not_depend_on_the_batch) {
  for_each_rig([](Rig& rig) {
    if (!rig.deterministic()) return;
    constexpr int64_t kRows = 70;
    LoraRig lora(rig, kRows, 96, {64, 72}, {{0, kRows, {16, 24}, 0}});
    Host x = rig.random(kRows, 96), y = rig.random(kRows, 136);
    OnDevice dx(rig, x), s(rig, kRows, 40), dy(rig, y);
    rig.ops().lora_shrink(lora.linear, lora.groups, dx, s);
    rig.ops().lora_expand(lora.linear, lora.groups, s, dy);
    const Host together_s = s.get(), together_y = dy.get();
    for (int64_t t = 0; t < kRows; t += 7) {
      LoraGroup one = lora.groups.host_groups[0];
      one.rows = 1;
      ArrayOnDevice<LoraGroup> done(rig, {one});
      const LoraGroups groups{done.data(), &one, 1, lora.max_rank, nullptr};
      Host x1 = rows_of(x, t, 1), y1 = rows_of(y, t, 1);
      OnDevice dx1(rig, x1), s1(rig, 1, 40), dy1(rig, y1);
      rig.ops().lora_shrink(lora.linear, groups, dx1, s1);
      rig.ops().lora_expand(lora.linear, groups, s1, dy1);
      CHECK(s1.get().values == rows_of(together_s, t, 1).values);
      CHECK(dy1.get().values == rows_of(together_y, t, 1).values);
    }
  });
}

TEST(deterministic_paged_attention_equals_packed_and_decode_equals_prefill) {
  for_each_rig([](Rig& rig) {
    if (!rig.deterministic()) return;
    for (const AttentionSpec& spec : attention_specs(rig.exact())) {
      PagedRig paged(rig, spec, 16);
      OnDevice dq(rig, paged.q), dk(rig, paged.k), dv(rig, paged.v), out(rig, paged.q.rows, paged.q.cols),
          packed_out(rig, paged.q.rows, paged.q.cols);
      rig.ops().attention_paged(dq, paged.layer, paged.kv_shape, paged.batch, paged.shape, out);
      // Packed, every sequence as it is; then every row alone, as a decode over the keys it sees.
      const auto run_packed = [&](const std::vector<reference::Sequence>& sequences, TensorView to) {
        std::vector<int32_t> table[4];
        PackedBatch batch;
        batch.sequences = static_cast<int32_t>(sequences.size());
        for (const reference::Sequence& s : sequences) {
          table[0].push_back(static_cast<int32_t>(s.q_begin));
          table[1].push_back(static_cast<int32_t>(s.q_rows));
          table[2].push_back(static_cast<int32_t>(s.kv_begin));
          table[3].push_back(static_cast<int32_t>(s.kv_rows));
          batch.max_rows = std::max(batch.max_rows, static_cast<int32_t>(s.kv_rows));
        }
        ArrayOnDevice<int32_t> a(rig, table[0]), b(rig, table[1]), c(rig, table[2]), d(rig, table[3]);
        batch.q_begin = a.data(), batch.q_rows = b.data(), batch.kv_begin = c.data(), batch.kv_rows = d.data();
        batch.host_q_begin = table[0].data(), batch.host_q_rows = table[1].data();
        batch.host_kv_begin = table[2].data(), batch.host_kv_rows = table[3].data();
        rig.ops().attention_packed(dq, dk, dv, batch, paged.shape, to, {});
        rig.device().synchronize();
      };
      run_packed(paged.sequences, packed_out);
      CHECK(packed_out.get().values == out.get().values);
      std::vector<reference::Sequence> rows;
      for (const reference::Sequence& s : paged.sequences)
        for (int64_t i = 0; i < s.q_rows; ++i) rows.push_back({s.q_begin + i, 1, s.kv_begin, s.kv_rows - s.q_rows + i + 1});
      OnDevice alone(rig, paged.q.rows, paged.q.cols);
      run_packed(rows, alone);
      CHECK(alone.get().values == out.get().values);
    }
  });
}

TEST(cpu_results_do_not_depend_on_the_number_of_threads) {
  if (option("--backend", "cpu") != "cpu") {
    CHECK(true);
    return;
  }
  std::vector<double> first;
  for (const int threads : {1, 2, 5}) {
    Rig rig(make_cpu_ops(threads, false), "cpu", false, 7);
    LoraRig lora(rig, 150, 96, {64, 72}, {{0, 100, {16, 24}, 0.2}, {100, 50, {8, 8}, 0}});
    Host x = rig.random(150, 96), w = rig.random(136, 96), s = rig.random(150, 40), dy = rig.random(150, 136);
    OnDevice dx(rig, x), dw(rig, w), ds(rig, s), ddy(rig, dy), y(rig, 150, 136);
    rig.ops().linear(dx, dw, {}, y);
    rig.ops().lora_expand(lora.linear, lora.groups, ds, y);
    rig.ops().lora_backward_weights(lora.linear, lora.groups, dx, ds, ddy, ds);
    std::vector<double> all = y.get().values;
    for (const auto& group : lora.gradients(rig))
      for (const auto& grad : group) {
        all.insert(all.end(), grad.da.values.begin(), grad.da.values.end());
        all.insert(all.end(), grad.db.values.begin(), grad.db.values.end());
      }
    if (first.empty()) first = all;
    CHECK(all == first);
  }
}
