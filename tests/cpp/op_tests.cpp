// One test per operation of ops.h: a backend against the reference, forward and backward, over ugly sizes. See op_harness.h for
// what every run is checked for, op_head_tests are at the end (losses, sampling, optimizer), batch invariance in
// op_invariance_tests.h.
//   op_tests [filter] [--backend cpu|cuda] [--dtype bf16|f16|f32] [--seed N] [--errors yes]
// Bounds of f32 are two to three times the largest error measured over ten seeds and all instruction sets.
#include "op_cases_attention.h"
#include "op_cases_lora.h"
#include "op_harness.h"
#include "op_invariance_tests.h"

using namespace loquetier;
using namespace loquetier::test;

TEST(rows_embedding_gather_scatter_add) {
  for_each_rig([](Rig& rig) {
    for (const int64_t n : {0, 1, 31, 33}) {
      Host table = rig.random(50, 40), y = rig.random(50, 40), x = rig.random(n, 40);
      std::vector<int32_t> ids, distinct;
      for (int32_t i = 0; i < n; ++i) {
        ids.push_back(static_cast<int32_t>(rig.random_int(50)));
        distinct.push_back(49 - i);
      }
      OnDevice dtable(rig, table), dx(rig, x), out(rig, n, 40), gathered(rig, n, 40), sum(rig, y);
      ArrayOnDevice<int32_t> dids(rig, ids), ddistinct(rig, distinct);
      run_twice({&out}, [&] { rig.ops().embedding(dids.data(), dtable, out); });
      run_twice({&gathered}, [&] { rig.ops().gather_rows(dtable, dids.data(), gathered); });
      run_twice({&sum}, [&] { rig.ops().scatter_add_rows(dx, ddistinct.data(), sum); });
      Host want(n, 40);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < 40; ++j) {
          want(i, j) = table(ids[static_cast<size_t>(i)], j);
          y(distinct[static_cast<size_t>(i)], j) += x(i, j);
        }
      expect("embedding", out.get(), want, 0);
      expect("gather_rows", gathered.get(), want, 0);
      expect("scatter_add_rows", sum.get(), y, rig.bound(1e-7));
    }
  });
}

TEST(take_tokens) {
  for_each_rig([](Rig& rig) {
    for (const int64_t n : {0, 1, 300}) {
      std::vector<int32_t> tokens, index, ids;
      for (int32_t i = 0; i < n; ++i) {
        tokens.push_back(1000 + i);
        index.push_back(static_cast<int32_t>(rig.random_int(n + 1)) - 1);
        ids.push_back(i);
      }
      ArrayOnDevice<int32_t> dtokens(rig, tokens), dids(rig, ids);
      std::vector<const int32_t*> from;
      for (const int32_t i : index) from.push_back(i < 0 ? nullptr : dtokens.data() + i);
      ArrayOnDevice<const int32_t*> dfrom(rig, from);
      rig.ops().take_tokens(dfrom.data(), dids.data(), n);
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = index[i] < 0 ? ids[i] : tokens[static_cast<size_t>(index[i])];
      std::vector<int32_t> got(ids.size());
      rig.device().copy_to_host(got.data(), dids.data(), got.size() * sizeof(int32_t));
      CHECK(got == ids);
    }
  });
}

TEST(convert_between_all_float_dtypes) {
  for_each_rig([](Rig& rig) {
    // Every f16 value, and what lies between two of them and on the ties.
    Host all(64, 1024);
    for (int64_t i = 0; i < all.rows * all.cols; ++i) {
      const float value = f16_value(static_cast<uint16_t>(i));
      all.values[static_cast<size_t>(i)] = std::isfinite(value) ? static_cast<double>(value) : 0.0;
    }
    Host between = all;
    for (size_t i = 0; i + 1 < between.values.size(); ++i) between.values[i] = (between.values[i] + between.values[i + 1]) / 2;
    Host wide = rig.random(33, 31);
    for (double& x : wide.values) x *= std::exp2(static_cast<double>(rig.random_int(200) - 100));
    for (Host* source : {&all, &between, &wide})
      for (const DType from : {DType::f32, DType::f16, DType::bf16})
        for (const DType to : {DType::f32, DType::f16, DType::bf16}) {
          Host host = *source;
          OnDevice src(rig, host, from), dst(rig, host.rows, host.cols, to);
          run_twice({&dst}, [&] { rig.ops().convert(src, dst); });
          Host want = host;
          for (double& x : want.values) {
            const float f = static_cast<float>(x);
            x = static_cast<double>(to == DType::f32 ? f : to == DType::bf16 ? round_bf16(f) : f16_value(f16_bits(f)));
          }
          CHECK(dst.get().values == want.values);
        }
  });
}

TEST(linear) {
  for_each_rig([](Rig& rig) {
    struct Shape {
      int64_t t, n, k;
    };
    std::vector<Shape> shapes = {{0, 64, 64},  {1, 64, 64},    {2, 96, 1040},  {3, 64, 32},  {4, 128, 64},
                                 {5, 32, 96},  {31, 64, 96},   {33, 128, 64},  {47, 64, 64}, {48, 160, 528},
                                 {49, 64, 64}, {96, 96, 2064}, {130, 136, 72}, {481, 32, 16}};
    if (rig.exact())
      for (const int64_t t : {1, 2, 3, 4, 6, 33, 49, 61})
        for (const int64_t n : {1, 3, 5, 31, 33, 97, 129})
          for (const int64_t k : {1, 15, 17, 33}) shapes.push_back({t, n, k});
    else  // few rows on a device: shares of k, several tiles a block, tiles and k that end early
      for (const Shape& s : std::vector<Shape>{{1, 512, 4096},
                                               {16, 4096, 1024},
                                               {17, 6144, 520},
                                               {64, 40000, 64},
                                               {64, 7168, 512},
                                               {63, 264, 2056},
                                               {65, 1000, 1096},
                                               {128, 520, 2048},
                                               {100, 17000, 128},
                                               {2061, 328, 136},
                                               {2300, 1000, 72}})
        shapes.push_back(s);
    for (const Shape& s : shapes)
      for (const bool with_bias : {false, true}) {
        Host x = rig.random(s.t, s.k), w = rig.random(s.n, s.k), bias = rig.random(1, s.n), none;
        OnDevice dx(rig, x), dw(rig, w), dbias(rig, bias), y(rig, s.t, s.n);
        run_twice({&y}, [&] { rig.ops().linear(dx, dw, with_bias ? dbias.view() : TensorView{}, y); });
        expect("linear", y.get(), reference::linear(x, w, with_bias ? bias : none), rig.bound(1e-6),
               std::sqrt(static_cast<double>(s.k)) / 2);  // a single output may cancel; this is how large one is
      }
    std::vector<Shape> of_logits = {{9, 200, 64}};
    if (!rig.exact())  // one tile a block and several, the last one cut off, every number of rows, shares of k that are not taken
      for (const Shape& s : std::vector<Shape>{{1, 40, 520}, {16, 36872, 64}, {31, 264, 2056}, {64, 70008, 136}, {65, 1000, 72}})
        of_logits.push_back(s);
    for (const Shape& s : of_logits) {
      Host x = rig.random(s.t, s.k), w = rig.random(s.n, s.k), none;
      OnDevice dx(rig, x), dw(rig, w), logits(rig, s.t, s.n, DType::f32);
      run_twice({&logits}, [&] { rig.ops().linear(dx, dw, {}, logits); });
      expect("linear f32 logits", logits.get(), reference::linear(x, w, none), rig.bound(5e-7, 3e-6));
    }
  });
}

TEST(linear_backward) {
  for_each_rig([](Rig& rig) {
    struct Shape {
      int64_t t, n, k;
    };
    std::vector<Shape> shapes = {{0, 64, 64}, {1, 64, 64}, {33, 96, 64}, {130, 1040, 136}, {481, 16, 32}};
    if (!rig.exact()) shapes.push_back({2061, 328, 136}), shapes.push_back({2300, 72, 1000});
    if (rig.exact())
      for (const int64_t t : {1, 5, 11, 12, 13, 31})
        for (const int64_t n : {1, 17, 33})
          for (const int64_t k : {1, 15, 16, 31, 33, 129}) shapes.push_back({t, n, k});
    for (const Shape& s : shapes)
      for (const bool accumulate : {false, true}) {
        Host dy = rig.random(s.t, s.n), w = rig.random(s.n, s.k), start = rig.random(s.t, s.k);
        OnDevice ddy(rig, dy), dw(rig, w), added(rig, start), plain(rig, s.t, s.k);
        OnDevice& dx = accumulate ? added : plain;
        run_twice({&dx}, [&] { rig.ops().linear_backward(ddy, dw, dx, accumulate); });
        Host want = reference::linear_backward(dy, w);
        if (accumulate)
          for (size_t i = 0; i < want.values.size(); ++i) want.values[i] += start.values[i];
        expect("linear_backward", dx.get(), want, rig.bound(1e-6), std::sqrt(static_cast<double>(s.n)) / 2);
      }
  });
}

TEST(lora_forward_and_backward) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : lora_shapes(!rig.exact())) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = std::max(lora.max_rank, 8);
      Host x = rig.random(shape.rows, shape.in), dy = rig.random(shape.rows, lora.columns);
      OnDevice dx_in(rig, x), ddy(rig, dy);

      OnDevice s(rig, shape.rows, rank);
      Host want_s(shape.rows, rank, kUntouched);
      run_twice({&s}, [&] { rig.ops().lora_shrink(lora.linear, lora.groups, dx_in, s); });
      reference::lora_shrink(lora.host, x, want_s);
      expect("lora_shrink" + label, s.get(), want_s, rig.bound(2e-6));

      Host s_in = rig.random(shape.rows, rank), y = rig.random(shape.rows, lora.columns);
      OnDevice ds_in(rig, s_in), dy_out(rig, y);
      run_twice({&dy_out}, [&] { rig.ops().lora_expand(lora.linear, lora.groups, ds_in, dy_out); });
      reference::lora_expand(lora.host, s_in, y);
      expect("lora_expand" + label, dy_out.get(), y, rig.bound(2e-6));
      Host wide = rig.random(shape.rows, lora.columns);
      OnDevice dwide(rig, wide, DType::f32);
      run_twice({&dwide}, [&] { rig.ops().lora_expand(lora.linear, lora.groups, ds_in, dwide); });
      reference::lora_expand(lora.host, s_in, wide);
      expect("lora_expand f32" + label, dwide.get(), wide, rig.bound(2e-6, 1e-5));

      OnDevice ds(rig, shape.rows, rank);
      Host want_ds(shape.rows, rank, kUntouched);
      run_twice({&ds}, [&] { rig.ops().lora_backward_s(lora.linear, lora.groups, ddy, ds); });
      reference::lora_backward_s(lora.host, dy, want_ds);
      expect("lora_backward_s" + label, ds.get(), want_ds, rig.bound(2e-6));

      Host dx = rig.random(shape.rows, shape.in);
      OnDevice ddx(rig, dx);
      run_twice({&ddx}, [&] { rig.ops().lora_backward_x(lora.linear, lora.groups, ds_in, ddx); });
      reference::lora_backward_x(lora.host, s_in, dx);
      expect("lora_backward_x" + label, ddx.get(), dx, rig.bound(2e-6));
      Host w = rig.random(lora.columns, shape.in);
      OnDevice dw(rig, w), all(rig, shape.rows, shape.in);
      run_twice({&all}, [&] { rig.ops().linear_lora_backward(ddy, dw, lora.linear, lora.groups, ds_in, all); });
      Host want_all = reference::linear_backward(dy, w);
      reference::lora_backward_x(lora.host, s_in, want_all);
      expect("linear_lora_backward" + label, all.get(), want_all, rig.bound(2e-6));

      // Gradients add: after two calls, twice one call's.
      Host ds2 = rig.random(shape.rows, rank);
      OnDevice dds2(rig, ds2);
      auto want = lora.gradients(rig);
      for (int i = 0; i < 2; ++i) {
        rig.ops().lora_backward_weights(lora.linear, lora.groups, dx_in, ds_in, ddy, dds2);
        reference::lora_backward_weights(lora.host, x, s_in, dy, ds2, want);
      }
      const auto got = lora.gradients(rig);
      for (size_t g = 0; g < want.size(); ++g)
        for (size_t p = 0; p < want[g].size(); ++p) {
          expect("lora_backward_weights dA" + label, got[g][p].da, want[g][p].da, rig.bound(2e-6, 1e-5));
          expect("lora_backward_weights dB" + label, got[g][p].db, want[g][p].db, rig.bound(2e-6, 1e-5));
        }
    }
  });
}

TEST(rms_norm_and_residual_add) {
  for_each_rig([](Rig& rig) {
    for (const int64_t rows : {0, 1, 31, 33})
      for (const int64_t cols : rig.exact() ? std::vector<int64_t>{1, 15, 33, 64, 1000}
                                            : std::vector<int64_t>{8, 63, 64, 1000, 1500, 4096, 9000, 16392}) {
        Host x = rig.random(rows, cols), w = rig.random(1, cols), delta = rig.random(rows, cols), dy = rig.random(rows, cols);
        OnDevice dx_in(rig, x), dw(rig, w), ddelta(rig, delta), y(rig, rows, cols), sum(rig, rows, cols), y2(rig, rows, cols);
        const float eps = 1e-5f;
        run_twice({&y}, [&] { rig.ops().rms_norm(dx_in, dw, eps, y); });
        expect("rms_norm", y.get(), reference::rms_norm(x, w, static_cast<double>(eps)), rig.bound(5e-7));

        run_twice({&sum, &y2}, [&] { rig.ops().add_rms_norm(dx_in, ddelta, dw, eps, sum, y2); });
        Host total = x;
        for (size_t i = 0; i < total.values.size(); ++i) total.values[i] += delta.values[i];
        expect("add_rms_norm sum", sum.get(), total, rig.bound(1e-7));
        expect("add_rms_norm", y2.get(), reference::rms_norm(total, w, static_cast<double>(eps)), rig.bound(5e-7));
        Host x2 = x;
        OnDevice in_place(rig, x2), y3(rig, rows, cols);
        run_twice({&in_place, &y3}, [&] { rig.ops().add_rms_norm(in_place, ddelta, dw, eps, in_place, y3); });
        CHECK(in_place.get().values == sum.get().values);
        CHECK(y3.get().values == y2.get().values);

        Host start = rig.random(rows, cols);
        OnDevice ddy(rig, dy), ddx(rig, start);
        Host dx = start;
        run_twice({&ddx}, [&] { rig.ops().rms_norm_backward(dx_in, dw, eps, ddy, ddx); });
        const Host gradient = reference::rms_norm_backward(x, w, static_cast<double>(eps), dy);
        for (size_t i = 0; i < dx.values.size(); ++i) dx.values[i] += gradient.values[i];
        double scale = 0;  // with one column the two terms cancel
        for (size_t i = 0; i < x.values.size() && cols == 1; ++i)
          scale = std::max(scale, std::fabs(w(0, 0) * dy.values[i] / x.values[i]));
        expect("rms_norm_backward", ddx.get(), dx, rig.bound(6e-7), scale);
        OnDevice apart(rig, start), both(rig, start), y4(rig, rows, cols), over(rig, dy);
        run_twice({&apart, &y4}, [&] { rig.ops().rms_norm_and_backward(dx_in, dw, eps, ddy, apart, y4); });
        run_twice({&both, &over}, [&] { rig.ops().rms_norm_and_backward(dx_in, dw, eps, over, both, over); });
        for (const OnDevice* sum_of : {&apart, &both}) CHECK(sum_of->get().values == ddx.get().values);
        for (const OnDevice* again : {&y4, &over}) CHECK(again->get().values == y.get().values);
      }
  });
}

TEST(rope_norms_pages_and_backward) {
  for_each_rig([](Rig& rig) {
    for (const int32_t d : {8, 64, 6, 34}) {
      if (!rig.exact() && d % 8 != 0) continue;
      for (const int64_t rows : {0, 1, 33}) {
        for (const bool norms : {false, true}) {
          const AttentionShape shape{4, 2, d, 0};
          const KvShape kv_shape{5, 8, 2, d};
          std::vector<int32_t> positions, slots;
          std::vector<float> inv_freq;
          for (int32_t t = 0; t < rows; ++t) {
            positions.push_back(static_cast<int32_t>(rig.random_int(5000)));
            slots.push_back(t % 3 == 0 ? -1 : t);
          }
          for (int32_t i = 0; i < d / 2; ++i) inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / d)));
          ArrayOnDevice<int32_t> dpositions(rig, positions), dslots(rig, slots);
          ArrayOnDevice<float> dfreq(rig, inv_freq);
          OnDevice table(rig, rows, d, DType::f32);
          run_twice({&table}, [&] { rig.ops().rope_table(dpositions.data(), dfreq.data(), 1.25f, table); });
          Host cos_sin = reference::rope_table(positions, inv_freq, 1.25);
          expect("rope_table", table.get(), cos_sin, 3e-7);
          cos_sin = table.get();  // what follows is compared on the same angles

          Host qkv = rig.random(rows, 8 * d), q_norm = rig.random(1, d), k_norm = rig.random(1, d);
          const int64_t kept = rows - rows / 4;
          OnDevice dqkv(rig, qkv), dq_norm(rig, q_norm), dk_norm(rig, k_norm), raw(rig, kept, 6 * d);
          Host pages(2 * 5 * 8, 2 * d, kUntouched);  // keys, then values
          Buffer kv(rig.device(), static_cast<size_t>(2 * 5 * 8 * 2 * d) * size_of(rig.dtype()));
          std::vector<unsigned char> fill(kv.bytes(), 0xFF);
          rig.device().copy_to_device(kv.data(), fill.data(), fill.size());
          const KvLayer layer{kv.data(), static_cast<std::byte*>(kv.data()) + kv.bytes() / 2};
          if (!norms) q_norm = k_norm = Host();
          run_twice({&dqkv, &raw}, [&] {
            rig.ops().rope(dqkv, {shape, table, norms ? dq_norm.view() : TensorView{}, norms ? dk_norm.view() : TensorView{}, 1e-6f,
                                  raw, dslots.data(), layer, kv_shape});
          });
          CHECK(raw.get().values ==
                [&] {
                  Host part(kept, 6 * d);
                  for (int64_t t = 0; t < kept; ++t)
                    for (int64_t i = 0; i < 6 * d; ++i) part(t, i) = qkv(t, i);
                  return part;
                }()
                    .values);
          const Host before = qkv;
          reference::rope(qkv, shape, cos_sin, q_norm, k_norm, static_cast<double>(1e-6f));
          const Host got = dqkv.get();
          expect("rope", got, qkv, rig.bound(5e-7));
          // Pages hold exactly the rows that were written.
          std::vector<unsigned char> bytes(kv.bytes());
          rig.device().copy_to_host(bytes.data(), kv.data(), bytes.size());
          Host after = pages;
          for (int64_t i = 0; i < after.rows * after.cols; ++i) {
            if (rig.exact()) {
              float value;
              std::memcpy(&value, &bytes[static_cast<size_t>(i) * 4], 4);
              after.values[static_cast<size_t>(i)] = static_cast<double>(value);
            } else {
              uint16_t value;
              std::memcpy(&value, &bytes[static_cast<size_t>(i) * 2], 2);
              after.values[static_cast<size_t>(i)] = static_cast<double>(
                  rig.dtype() == DType::f16 ? f16_value(value) : std::bit_cast<float>(static_cast<uint32_t>(value) << 16));
            }
          }
          for (int32_t t = 0; t < rows; ++t) {
            const int32_t slot = slots[static_cast<size_t>(t)];
            for (int32_t i = 0; slot >= 0 && i < 2 * d; ++i) {
              pages(slot, i) = got(t, 4 * d + i);
              pages(40 + slot, i) = got(t, 6 * d + i);
            }
          }
          expect("rope pages", after, pages, 0);

          Host dy = rig.random(rows, 8 * d), raw_host(rows, 6 * d);
          for (int64_t t = 0; t < rows; ++t)
            for (int64_t i = 0; i < 6 * d; ++i) raw_host(t, i) = before(t, i);
          OnDevice ddy(rig, dy), draw(rig, raw_host);
          run_twice({&ddy}, [&] {
            rig.ops().rope_backward(ddy, shape, table, norms ? dq_norm.view() : TensorView{}, norms ? dk_norm.view() : TensorView{},
                                    1e-6f, norms ? draw.view() : TensorView{});
          });
          reference::rope_backward(dy, shape, cos_sin, q_norm, k_norm, static_cast<double>(1e-6f), raw_host);
          expect("rope_backward", ddy.get(), dy, rig.bound(6e-7));
        }
      }
    }
  });
}

TEST(attention_packed_and_backward) {
  for_each_rig([](Rig& rig) {
    for (const AttentionSpec& spec : attention_specs(rig.exact())) {
      PackedRig packed(rig, spec, true);
      const AttentionShape& shape = packed.shape;
      Host q = rig.random(packed.q_rows, shape.q_heads * shape.head_size),
           k = rig.random(packed.kv_rows, shape.kv_heads * shape.head_size);
      Host v = rig.random(packed.kv_rows, k.cols), dout = rig.random(packed.q_rows, q.cols);
      OnDevice dq_in(rig, q), dk_in(rig, k), dv_in(rig, v), ddout(rig, dout), out(rig, q.rows, q.cols),
          lse(rig, q.rows, shape.q_heads, DType::f32);
      run_twice({&out, &lse}, [&] { rig.ops().attention_packed(dq_in, dk_in, dv_in, packed.batch, shape, out, lse); });
      Host want(q.rows, q.cols), want_lse(q.rows, shape.q_heads);
      reference::attention(q, k, v, packed.sequences, shape, want, want_lse);
      expect("attention_packed", out.get(), want, rig.bound(1.5e-6));
      expect("attention_packed lse", lse.get(), want_lse, rig.bound(1.5e-6));
      OnDevice without(rig, q.rows, q.cols);
      rig.ops().attention_packed(dq_in, dk_in, dv_in, packed.batch, shape, without, {});
      CHECK(without.get().values == out.get().values);

      // Backward from the exact forward, rounded, so that only its own error shows.
      Host out_in = want, lse_in = want_lse;
      OnDevice dout_in(rig, out_in), dlse_in(rig, lse_in, DType::f32);
      OnDevice dq(rig, q.rows, q.cols), dk(rig, k.rows, k.cols), dv(rig, v.rows, v.cols);
      run_twice({&dq, &dk, &dv}, [&] {
        rig.ops().attention_backward(dq_in, dk_in, dv_in, dout_in, dlse_in, ddout, packed.batch, shape, dq, dk, dv);
      });
      Host want_dq(q.rows, q.cols), want_dk(k.rows, k.cols), want_dv(v.rows, v.cols);
      reference::attention_backward(q, k, v, dout, packed.sequences, shape, want_dq, want_dk, want_dv);
      constexpr double kScale = 0.5;  // with one key dq and dk are exactly zero; elsewhere they are about this large
      expect("attention_backward dq", dq.get(), want_dq, rig.bound(5e-6, 2e-2), kScale);
      expect("attention_backward dk", dk.get(), want_dk, rig.bound(5e-6, 2e-2), kScale);
      expect("attention_backward dv", dv.get(), want_dv, rig.bound(5e-6, 2e-2), kScale);
    }
  });
}

TEST(attention_packed_with_more_keys_than_queries) {
  for_each_rig([](Rig& rig) {
    for (const AttentionSpec& spec : attention_specs(rig.exact())) {
      PackedRig packed(rig, spec, false);
      const AttentionShape& shape = packed.shape;
      Host q = rig.random(packed.q_rows, shape.q_heads * shape.head_size),
           k = rig.random(packed.kv_rows, shape.kv_heads * shape.head_size);
      Host v = rig.random(packed.kv_rows, k.cols), want(q.rows, q.cols), lse(q.rows, shape.q_heads);
      OnDevice dq(rig, q), dk(rig, k), dv(rig, v), out(rig, q.rows, q.cols);
      run_twice({&out}, [&] { rig.ops().attention_packed(dq, dk, dv, packed.batch, shape, out, {}); });
      reference::attention(q, k, v, packed.sequences, shape, want, lse);
      expect("attention_packed, more keys", out.get(), want, rig.bound(1.5e-6));
    }
  });
}

static void check_paged(Rig& rig, PagedRig paged, const char* what) {
  Host want(paged.q.rows, paged.q.cols), lse(paged.q.rows, paged.shape.q_heads);
  OnDevice dq(rig, paged.q), out(rig, paged.q.rows, paged.q.cols);
  run_twice({&out}, [&] { rig.ops().attention_paged(dq, paged.layer, paged.kv_shape, paged.batch, paged.shape, out); });
  reference::attention(paged.q, paged.k, paged.v, paged.sequences, paged.shape, want, lse);
  expect(what, out.get(), want, rig.bound(1.5e-6));
}

TEST(attention_paged) {
  for_each_rig([](Rig& rig) {
    for (const AttentionSpec& spec : attention_specs(rig.exact()))
      for (const int32_t page_size : rig.exact() ? std::vector<int32_t>{1, 16, 64, 256} : std::vector<int32_t>{16, 64, 256}) {
        check_paged(rig, PagedRig(rig, spec, page_size), "attention_paged");
      }
  });
}

TEST(attention_paged_of_decodes) {
  for_each_rig([](Rig& rig) {
    for (const AttentionSpec& spec : decode_specs())
      for (const int32_t page_size : {1, 16, 256}) {
        check_paged(rig, PagedRig(rig, spec, page_size), "attention_paged of decodes");
      }
  });
}

// Packed rows and rows over pages in one batch, as one op; in between the pages alone, which shares workspaces with it.
TEST(attention_mixed) {
  for_each_rig([](Rig& rig) {
    for (AttentionSpec spec : {decode_specs()[0], decode_specs()[2], attention_specs(false)[2]}) {
      const AttentionSpec whole = {spec.q_heads, spec.kv_heads, spec.head_size, {{200, 200}, {1, 1}, {130, 130}}};
      PackedRig packed(rig, whole, true);
      PagedRig paged(rig, spec, 16, 0, packed.q_rows);
      const AttentionShape& shape = paged.shape;
      Host k = rig.random(packed.kv_rows, shape.kv_heads * shape.head_size), v = rig.random(packed.kv_rows, k.cols);
      OnDevice dq(rig, paged.q), dk(rig, k), dv(rig, v), out(rig, paged.q.rows, paged.q.cols),
          apart(rig, out.view().rows, dq.view().cols), lse(rig, packed.q_rows, shape.q_heads, DType::f32);
      run_twice({&out, &lse}, [&] {
        rig.ops().attention_mixed(dq, dk, dv, packed.q_rows, packed.batch, paged.layer, paged.kv_shape, paged.batch, shape, out,
                                  lse);
        rig.ops().attention_paged(dq, paged.layer, paged.kv_shape, paged.batch, shape, apart);
      });
      Host want(paged.q.rows, paged.q.cols), want_lse(paged.q.rows, shape.q_heads), want_packed_lse(packed.q_rows, shape.q_heads);
      reference::attention(paged.q, k, v, packed.sequences, shape, want, want_lse);
      for (int64_t i = 0; i < packed.q_rows; ++i)
        for (int64_t h = 0; h < shape.q_heads; ++h) want_packed_lse(i, h) = want_lse(i, h);
      reference::attention(paged.q, paged.k, paged.v, paged.sequences, shape, want, want_lse);
      expect("attention_mixed", out.get(), want, rig.bound(1.5e-6));
      expect("attention_mixed lse", lse.get(), want_packed_lse, rig.bound(1.5e-6));
    }
  });
}

TEST(attention_paged_over_shared_pages) {
  for_each_rig([](Rig& rig) {
    const AttentionSpec spec = {8, 2, 128, {{1, 260}, {1, 203}, {1, 193}, {1, 900}}};
    check_paged(rig, PagedRig(rig, spec, 16, 192), "attention_paged over shared pages");
  });
}

TEST(swiglu_and_backward) {
  for_each_rig([](Rig& rig) {
    for (const int64_t rows : {0, 1, 31, 33})
      for (const int64_t n : rig.exact() ? std::vector<int64_t>{1, 15, 33, 64, 500} : std::vector<int64_t>{8, 64, 504}) {
        Host gate_up = rig.random(rows, 2 * n, 3.0), dy = rig.random(rows, n);
        if (rows > 0) gate_up(0, 0) = -200, gate_up(rows - 1, n - 1) = 120;  // saturated either way
        OnDevice dgate_up(rig, gate_up), ddy(rig, dy), y(rig, rows, n), d(rig, rows, 2 * n);
        run_twice({&y}, [&] { rig.ops().swiglu(dgate_up, y); });
        expect("swiglu", y.get(), reference::swiglu(gate_up), rig.bound(5e-7));
        run_twice({&d}, [&] { rig.ops().swiglu_backward(dgate_up, ddy, d); });
        expect("swiglu_backward", d.get(), reference::swiglu_backward(gate_up, dy), rig.bound(6e-7));
        run_twice({&dgate_up}, [&] { rig.ops().swiglu_backward(dgate_up, ddy, dgate_up); });
        CHECK(dgate_up.get().values == d.get().values);
        OnDevice again(rig, gate_up), both(rig, dy), apart(rig, rows, 2 * n), y2(rig, rows, n);
        run_twice({&apart, &y2}, [&] { rig.ops().swiglu_and_backward(again, ddy, apart, y2); });
        CHECK(apart.get().values == d.get().values);
        CHECK(y2.get().values == y.get().values);
        run_twice({&again, &both}, [&] { rig.ops().swiglu_and_backward(again, both, again, both); });
        CHECK(again.get().values == d.get().values);
        CHECK(both.get().values == y.get().values);
      }
  });
}

#include "op_head_tests.h"
