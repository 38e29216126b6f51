// The products of LoRA over many rows, forward and backward, against the reference: what the CUDA backend does by tensor-core
// passes of their own (cuda/lora_tall.cu, lora_wide.cu), at the edges of their tiles: groups of 1, 15, 127, 128, 129 and 1000 rows
// with rows of no adapter between them, ranks of 8 to 256 and mixed, parts of one and of several clusters, untrained groups,
// dropout, and a layout that those passes refuse. Rows and columns that no adapter owns are NaN. Options as op_tests: --backend
// cpu|cuda, --dtype,
// --seed.
#include "op_cases_lora.h"
#include "op_harness.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

std::vector<LoraShape> large_shapes(bool large) {
  const std::vector<int32_t> none;
  std::vector<LoraShape> shapes = {
      {"every size of a group",
       1420,
       264,
       {1096, 72},
       {{1, 1, {16, 8}},
        {2, 15, {8, 16}},
        {20, 127, {16, 16}},
        {150, 128, {0, 16}},
        {278, 129, {16, 0}},
        {407, 2, none},
        {410, 1000, {16, 16}}}},
      {"three parts", 520, 136, {264, 256, 520}, {{0, 300, {16, 16, 16}}, {300, 219, {16, 0, 8}}}},
      {"untrained between", 700, 96, {520}, {{0, 200, {16}}, {200, 300, {32}, 0, false}, {505, 190, {8}}}},
      {"dropout between", 640, 96, {264, 64}, {{0, 200, {16, 8}}, {200, 300, {16, 16}, 0.2}, {500, 140, {24, 0}}}},
      {"rank 40 and 8", 460, 328, {1288}, {{0, 129, {40}}, {131, 329, {8}}}},
      {"rank 64", 385, 128, {1056, 64}, {{0, 256, {64, 64}}, {256, 129, {48, 64}}}},
      {"rank 128", 390, 200, {312}, {{3, 385, {128}}}},
      {"ranks of 256 and 16", 600, 264, {264, 80}, {{0, 300, {256, 16}}, {300, 290, {16, 256}}}},
      {"three of 256", 256, 64, {64, 64, 72}, {{0, 256, {256, 256, 256}}}},
      {"narrow columns", 300, 8, {8, 16}, {{0, 299, {8, 8}}}},
      {"rank 4: not the layout", 300, 64, {72, 64}, {{0, 140, {4, 16}}, {140, 150, {16, 16}}}},
  };
  if (large) shapes.push_back({"ranges of rows", 3000, 1032, {2184}, {{0, 2700, {16}}, {2700, 300, {32}}}});
  return shapes;
}

// NaN in every row that no group with an adapter owns.
void poison_rows(const LoraRig& lora, Host& m) {
  std::vector<bool> owned(static_cast<size_t>(m.rows));
  for (const auto& group : lora.host.groups)
    for (int64_t t = 0; t < group.rows && !group.parts.empty(); ++t) owned[static_cast<size_t>(group.row_begin + t)] = true;
  for (int64_t t = 0; t < m.rows; ++t)
    for (int64_t i = 0; i < m.cols && !owned[static_cast<size_t>(t)]; ++i) m(t, i) = kUntouched;
}

// NaN also in the columns of s or ds that a row's group does not own.
void poison_ranks(const LoraRig& lora, Host& s) {
  poison_rows(lora, s);
  for (const auto& group : lora.host.groups) {
    int64_t ranks = 0;
    for (const auto& part : group.parts) ranks += part.a.rows;
    for (int64_t t = group.row_begin; t < group.row_begin + group.rows; ++t)
      for (int64_t r = ranks; r < s.cols; ++r) s(t, r) = kUntouched;
  }
}

using Gradients = std::vector<std::vector<reference::LoraGradOf<double>>>;

bool same_bits(const Gradients& a, const Gradients& b) {
  for (size_t g = 0; g < a.size(); ++g)
    for (size_t p = 0; p < a[g].size(); ++p)
      if (a[g][p].da.values != b[g][p].da.values || a[g][p].db.values != b[g][p].db.values) return false;
  return true;
}

}  // namespace

TEST(lora_backward_over_many_rows) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : large_shapes(!rig.exact())) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = lora.max_rank + 8;
      Host x = rig.random(shape.rows, shape.in), dy = rig.random(shape.rows, lora.columns), s = rig.random(shape.rows, rank);
      poison_rows(lora, x), poison_rows(lora, dy), poison_ranks(lora, s);
      OnDevice dx(rig, x), ddy(rig, dy), ds_in(rig, s), ds(rig, shape.rows, rank);
      Gradients start = lora.gradients(rig);
      for (auto& group : start)
        for (auto& part : group) {
          part.da = rig.random(part.da.rows, part.da.cols);
          part.db = rig.random(part.db.rows, part.db.cols);
        }
      Gradients first;
      int calls = 0;
      run_twice({&ds}, [&] {
        lora.set_gradients(rig, start);
        rig.ops().lora_backward(lora.linear, lora.groups, dx, ds_in, ddy, ds);
        const Gradients now = lora.gradients(rig);
        if (calls++ == 0) first = now;
        else CHECK(same_bits(now, first));
      });

      Host want_ds(shape.rows, rank, kUntouched);
      reference::lora_backward_s(lora.host, dy, want_ds);
      expect("lora_backward ds" + label, ds.get(), want_ds, rig.bound(2e-6));
      Gradients want = start;
      reference::lora_backward_weights(lora.host, x, s, dy, ds.get(), want);
      for (size_t g = 0; g < want.size(); ++g)
        for (size_t p = 0; p < want[g].size(); ++p) {
          if (!shape.groups[g].trained) {
            CHECK(first[g][p].da.values == start[g][p].da.values);
            CHECK(first[g][p].db.values == start[g][p].db.values);
            continue;
          }
          expect("lora_backward dA" + label, first[g][p].da, want[g][p].da, rig.bound(2e-6, 1e-5));
          expect("lora_backward dB" + label, first[g][p].db, want[g][p].db, rig.bound(2e-6, 1e-5));
        }

      // The same in pieces: ds and dB, then dA when x is there.
      OnDevice ds2(rig, shape.rows, rank);
      lora.set_gradients(rig, start);
      rig.ops().lora_backward(lora.linear, lora.groups, {}, ds_in, ddy, ds2);
      const Gradients half = lora.gradients(rig);
      rig.ops().lora_backward_weights(lora.linear, lora.groups, dx, {}, {}, ds2);
      CHECK(ds2.download() == ds.download());
      CHECK(same_bits(lora.gradients(rig), first));
      for (size_t g = 0; g < want.size(); ++g)
        for (size_t p = 0; p < want[g].size(); ++p) CHECK(half[g][p].da.values == start[g][p].da.values);
    }
  });
}

TEST(lora_shrink_and_backward_s_over_many_rows) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : large_shapes(!rig.exact())) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = lora.max_rank + 8;
      Host x = rig.random(shape.rows, shape.in), dy = rig.random(shape.rows, lora.columns);
      poison_rows(lora, x), poison_rows(lora, dy);
      OnDevice dx(rig, x), ddy(rig, dy), s(rig, shape.rows, rank), ds(rig, shape.rows, rank);
      Host want_s(shape.rows, rank, kUntouched), want_ds = want_s;
      run_twice({&s}, [&] { rig.ops().lora_shrink(lora.linear, lora.groups, dx, s); });
      reference::lora_shrink(lora.host, x, want_s);
      expect("lora_shrink" + label, s.get(), want_s, rig.bound(2e-6));
      run_twice({&ds}, [&] { rig.ops().lora_backward_s(lora.linear, lora.groups, ddy, ds); });
      reference::lora_backward_s(lora.host, dy, want_ds);
      expect("lora_backward_s" + label, ds.get(), want_ds, rig.bound(2e-6));
    }
  });
}

// A head's chunk: few rows, very many columns.
TEST(lora_backward_of_a_wide_head) {
  for_each_rig([](Rig& rig) {
    LoraRig lora(rig, 256, 64, {5000}, {{0, 130, {16}}, {130, 126, {8}}});
    Host x = rig.random(256, 64), dy = rig.random(256, 5000), s = rig.random(256, 16);
    poison_ranks(lora, s);
    OnDevice dx(rig, x), ddy(rig, dy), ds_in(rig, s), ds(rig, 256, 16);
    rig.ops().lora_backward(lora.linear, lora.groups, dx, ds_in, ddy, ds);
    Host want_ds(256, 16, kUntouched);
    reference::lora_backward_s(lora.host, dy, want_ds);
    expect("head ds", ds.get(), want_ds, rig.bound(2e-6));
    Gradients got = lora.gradients(rig), want = got;
    for (auto& group : want)
      for (auto& part : group) part = {Host(part.da.rows, part.da.cols), Host(part.db.rows, part.db.cols)};
    reference::lora_backward_weights(lora.host, x, s, dy, ds.get(), want);
    for (size_t g = 0; g < want.size(); ++g) {
      expect("head dA", got[g][0].da, want[g][0].da, rig.bound(2e-6, 1e-5));
      expect("head dB", got[g][0].db, want[g][0].db, rig.bound(2e-6, 1e-5));
    }
  });
}

// A gradient that is not finite stays with its own adapter.
TEST(lora_backward_keeps_what_is_not_finite_to_its_group) {
  for_each_rig([](Rig& rig) {
    LoraRig lora(rig, 400, 64, {264}, {{0, 150, {16}}, {150, 100, {16}}, {250, 150, {16}}});
    Host x = rig.random(400, 64), dy = rig.random(400, 264), s = rig.random(400, 16);
    for (int64_t t = 150; t < 250; ++t)
      for (int64_t n = 0; n < 264; ++n) dy(t, n) = kUntouched;
    OnDevice dx(rig, x), ddy(rig, dy), ds_in(rig, s), ds(rig, 400, 16);
    rig.ops().lora_backward(lora.linear, lora.groups, dx, ds_in, ddy, ds);
    const Gradients got = lora.gradients(rig);
    for (const size_t g : {0, 1, 2})
      for (const double value : got[g][0].db.values) CHECK(std::isfinite(value) == (g != 1));
    for (const size_t g : {0, 1, 2})
      for (const double value : got[g][0].da.values) CHECK(std::isfinite(value) == (g != 1));
  });
}

TEST(lora_backward_refuses_bad_shapes) {
  for_each_rig([](Rig& rig) {
    LoraRig lora(rig, 4, 64, {32}, {{0, 4, {8}}});
    Host x = rig.random(4, 64), dy = rig.random(4, 32), narrow_dy = rig.random(4, 31), s = rig.random(4, 8);
    OnDevice dx(rig, x), ddy(rig, dy), dnarrow(rig, narrow_dy), ds_in(rig, s), ds(rig, 4, 8), narrow(rig, 4, 7);
    const auto before = ds.download();
    CHECK_THROWS(InvalidArgument, "dy: expected [", rig.ops().lora_backward(lora.linear, lora.groups, dx, ds_in, dnarrow, ds));
    CHECK_THROWS(InvalidArgument, "x: expected [4, 64]", rig.ops().lora_backward(lora.linear, lora.groups, ddy, ds_in, ddy, ds));
    CHECK_THROWS(InvalidArgument, "ds: expected at least 8 columns",
                 rig.ops().lora_backward(lora.linear, lora.groups, dx, ds_in, ddy, narrow));
    CHECK_THROWS(InvalidArgument, "s: expected at least 8 columns",
                 rig.ops().lora_backward(lora.linear, lora.groups, dx, narrow, ddy, ds));
    CHECK(ds.download() == before);
    const Gradients after = lora.gradients(rig);
    for (const double value : after[0][0].db.values) CHECK_EQ(value, 0);
  });
}
