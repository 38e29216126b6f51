// What a backend fuses beyond the op table, against the reference and against its own single operations: linear_lora with one-row,
// small and large groups, rows without adapters, mixed ranks and dropout. Same options as op_tests: --backend cpu|cuda, --dtype,
// --seed.
#include "op_cases_lora.h"
#include "op_harness.h"

using namespace loquetier;
using namespace loquetier::test;

namespace {

std::vector<LoraShape> fused_shapes() {
  std::vector<LoraShape> shapes = lora_shapes(true);
  shapes.push_back({"one group of 64", 64, 512, {256, 64, 64}, {{0, 64, {16, 16, 16}, 0}}});
  shapes.push_back({"small groups with gaps",
                    70,
                    1040,
                    {192, 128},
                    {{2, 9, {16, 16}, 0}, {11, 33, {8, 0}, 0}, {50, 1, {4, 12}, 0}, {60, 8, {1, 3}, 0}}});
  shapes.push_back({"rank 64", 40, 256, {1536}, {{0, 17, {64}, 0}, {17, 23, {48}, 0}}});
  shapes.push_back({"large groups with gaps", 1200, 128, {64, 136}, {{5, 700, {16, 8}, 0}, {800, 390, {0, 24}, 0}}});
  shapes.push_back(
      {"large and one-row groups", 900, 128, {72}, {{0, 600, {16}, 0.1}, {600, 290, {8}, 0}, {890, 1, {8}, 0}, {891, 1, {32}, 0}}});
  return shapes;
}

}  // namespace

TEST(linear_lora_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : fused_shapes()) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = std::max(lora.max_rank, 8);
      Host x = rig.random(shape.rows, shape.in), w = rig.random(lora.columns, shape.in), bias = rig.random(1, lora.columns), none;
      OnDevice dx(rig, x), dw(rig, w), dbias(rig, bias);
      for (const bool with_bias : {false, true}) {
        OnDevice s(rig, shape.rows, rank), y(rig, shape.rows, lora.columns);
        run_twice({&s, &y},
                  [&] { rig.ops().linear_lora(dx, dw, with_bias ? dbias.view() : TensorView{}, lora.linear, lora.groups, s, y); });
        Host want_s(shape.rows, rank, kUntouched), want = reference::linear(x, w, with_bias ? bias : none);
        reference::lora_shrink(lora.host, x, want_s);
        expect("linear_lora s" + label, s.get(), want_s, rig.bound(3e-6));
        for (double& value : want_s.values) value = std::isnan(value) ? 0 : value;
        reference::lora_expand(lora.host, want_s, want);
        expect("linear_lora y" + label, y.get(), want, rig.bound(6e-6));

        OnDevice s2(rig, shape.rows, rank), y2(rig, shape.rows, lora.columns);
        rig.ops().linear(dx, dw, with_bias ? dbias.view() : TensorView{}, y2);
        rig.ops().lora_shrink(lora.linear, lora.groups, dx, s2);
        rig.ops().lora_expand(lora.linear, lora.groups, s2, y2);
        if (rig.deterministic()) {
          CHECK(s.download() == s2.download());
          CHECK(y.download() == y2.download());
        } else {
          expect("linear_lora and its parts" + label, y.get(), y2.get(), rig.bound(6e-6));
        }
      }
    }
  });
}

TEST(linear_lora_refuses_bad_shapes) {
  for_each_rig([](Rig& rig) {
    LoraRig lora(rig, 4, 64, {32}, {{0, 4, {8}, 0}});
    Host x = rig.random(4, 64), w = rig.random(32, 64);
    OnDevice dx(rig, x), dw(rig, w), s(rig, 4, 8), narrow(rig, 4, 7), y(rig, 4, 31);
    const auto before = y.download();
    CHECK_THROWS(InvalidArgument, "y: expected [4, 32]", rig.ops().linear_lora(dx, dw, {}, lora.linear, lora.groups, s, y));
    OnDevice good(rig, 4, 32);
    CHECK_THROWS(InvalidArgument, "s: expected at least 8 columns",
                 rig.ops().linear_lora(dx, dw, {}, lora.linear, lora.groups, narrow, good));
    CHECK(y.download() == before);
  });
}
