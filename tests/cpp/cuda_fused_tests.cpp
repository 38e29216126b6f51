// What a backend fuses beyond the op table, against the reference and against its own single operations: linear_lora with one-row,
// small and large groups, rows without adapters, mixed ranks and dropout; linear_lora_backward likewise; what is one call with the
// norm, rope or attention behind a product. Same options as op_tests: --backend cpu|cuda, --dtype, --seed.
#include "op_cases_attention.h"
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

// Batches whose base product and LoRA a device runs as one product of 128 x 256 tiles, two tiles of rows at a time: groups that
// begin and end beside the edges of tiles, several in one tile, rows without adapter between and behind them, ranks from 8 to 256
// together, parts that an adapter leaves alone, sums and columns that are no multiple of a tile, more tiles than run at a time. Too
// large for the reference to be run for every variant of the CPU backend, which does not fuse.
std::vector<LoraShape> large_shapes() {
  std::vector<LoraShape> shapes;
  shapes.push_back({"one group, whole tiles", 512, 128, {256}, {{0, 512, {16}, 0}}});
  shapes.push_back({"one group, one row more", 513, 64, {264}, {{0, 513, {8}, 0}}});
  shapes.push_back({"one row less than a tile", 639, 136, {256, 72}, {{0, 639, {64, 40}, 0}}});
  shapes.push_back({"long sums", 520, 2056, {256}, {{0, 300, {16}, 0}, {300, 220, {40}, 0}}});
  shapes.push_back({"groups at the edges of tiles",
                    1300,
                    192,
                    {256, 512, 264},
                    {{0, 1, {8, 8, 8}, 0},
                     {1, 127, {16, 64, 8}, 0},
                     {128, 128, {64, 0, 40}, 0},
                     {256, 129, {128, 8, 16}, 0},
                     {385, 513, {0, 256, 24}, 0},
                     {1000, 200, {40, 16, 0}, 0}}});
  LoraShape narrow{"three and more groups in a tile", 700, 72, {256, 256}, {}};
  const int32_t ranks[] = {8, 16, 40, 64, 0, 24};
  for (int32_t g = 0; g < 9; ++g)
    narrow.groups.push_back({70 * g + 3, g == 8 ? 100 : 50 + g, {ranks[g % 6], ranks[(g + 2) % 6]}, 0});
  shapes.push_back(narrow);
  shapes.push_back(
      {"large ranks", 800, 320, {512, 320}, {{7, 393, {256, 128}, 0}, {400, 130, {64, 256}, 0}, {560, 200, {8, 0}, 0}}});
  shapes.push_back({"a whole tile without adapter", 1100, 64, {256}, {{0, 384, {16}, 0}, {660, 300, {8}, 0}}});
  LoraShape tail{"one-row groups behind", 680, 128, {256, 128}, {{0, 400, {16, 16}, 0}, {400, 250, {8, 0}, 0}}};
  for (int32_t g = 0; g < 20; ++g) tail.groups.push_back({650 + g, 1, {8 * (1 + g % 3), 16}, 0});
  shapes.push_back(tail);
  shapes.push_back({"dropout", 900, 128, {256}, {{0, 601, {16}, 0.25}, {601, 250, {8}, 0}}});
  LoraShape many{"more tiles than run at a time", 4100, 64, {768, 512}, {}};
  for (int32_t g = 0; g < 16; ++g) many.groups.push_back({256 * g + g % 2, 255, {8 + 8 * (g % 5), 16}, 0});
  shapes.push_back(many);
  LoraShape wide{"more tiles of dx than run at a time", 2100, 2056, {64}, {}};
  for (int32_t g = 0; g < 7; ++g) wide.groups.push_back({300 * g, 299, {g == 3 ? 72 : 8 + 8 * (g % 3)}, 0});
  shapes.push_back(wide);
  // Rows that are left over behind the last whole pair of tiles, and groups that end among them.
  for (const int64_t rest : {1, 63, 64, 65, 127, 128, 129, 191}) {
    LoraShape left{"left-over rows", 512 + rest, 136, {256, 512, 72}, {{0, 300, {16, 64, 8}, 0}}};
    const int64_t end = 512 + (rest + 1) / 2;
    left.groups.push_back({300, end - 300, {8, rest % 2 == 0 ? 40 : 256, 0}, 0});
    if (rest > 128) left.groups.push_back({end + 2, rest / 2 - 3, {24, 0, 136}, 0});
    shapes.push_back(left);
  }
  shapes.push_back({"many groups in the left-over rows",
                    703,
                    72,
                    {768},
                    {{0, 300, {16}, 0},
                     {300, 222, {8}, 0},
                     {522, 30, {256}, 0},
                     {552, 81, {24}, 0},
                     {640, 10, {0}, 0},
                     {650, 53, {136}, 0},
                     {703, 0, {8}, 0}}});
  LoraShape decodes{"small groups in the left-over rows", 576, 192, {256, 512, 256}, {{0, 512, {16, 8, 16}, 0}}};
  for (int32_t g = 0; g < 8; ++g) decodes.groups.push_back({512 + 8 * g, 8 - g % 3, {8 * (1 + g % 3), 16, g == 5 ? 0 : 72}, 0});
  shapes.push_back(decodes);
  shapes.push_back({"sums divided among many", 552, 2056, {256, 264}, {{0, 400, {16, 8}, 0}, {400, 152, {40, 128}, 0}}});
  // s and ds are taken as they are: whole tiles of one group or none, all with the same ranks.
  shapes.push_back({"whole tiles of several groups",
                    1101,
                    136,
                    {256, 512, 72},
                    {{0, 256, {16, 64, 80}, 0}, {256, 384, {16, 64, 80}, 0}, {768, 333, {16, 64, 80}, 0}}});
  shapes.push_back({"a part left alone by all", 640, 192, {256, 256, 264}, {{0, 128, {32, 0, 16}, 0}, {128, 512, {32, 0, 16}, 0}}});
  shapes.push_back({"one group to the last row", 740, 128, {512}, {{128, 612, {112}, 0}}});
  LoraShape behind{"whole tiles and small groups behind", 575, 192, {256, 256}, {{0, 512, {16, 16}, 0}}};
  for (int32_t g = 0; g < 7; ++g) behind.groups.push_back({512 + 9 * g, 9, {8 + 24 * g, 16}, 0});
  shapes.push_back(behind);
  return shapes;
}

// Products whose last items are divided among several processors, forward or backward: in up to four parts, with helpers that have
// parts of several items, left-over strips beside them, tiles of 64 rows alone.
std::vector<LoraShape> divided_shapes() {
  std::vector<LoraShape> shapes;
  shapes.push_back({"a turn and a little", 801, 1536, {4096, 1792}, {{0, 400, {16, 8}, 0}, {400, 390, {8, 128}, 0}}});
  shapes.push_back({"helpers of several items", 1280, 2560, {1536, 512}, {{0, 1000, {16, 256}, 0}, {1000, 280, {8, 0}, 0}}});
  shapes.push_back({"half tiles divided", 1088, 2048, {4096}, {{0, 600, {16}, 0}, {600, 430, {40}, 0}, {1030, 58, {8}, 0}}});
  shapes.push_back({"few tiles, long sums", 832, 8200, {512, 72}, {{0, 700, {16, 16}, 0}, {700, 130, {40, 8}, 0}}});
  shapes.push_back({"both left-over strips", 2240, 2048, {1536}, {{0, 2048, {16}, 0}, {2048, 100, {256}, 0}}});
  return shapes;
}

// Batches of decode steps, which a device runs as one launch: tiles of 128 or 256 columns, shares of k, tasks of 8 rows by 16
// ranks, more tiles than run at a time. One-row groups and groups at odd places, base rows between them, empty groups, mixed ranks
// up to 256, parts that an adapter leaves alone, sums and columns that are no multiple of a tile or piece.
std::vector<LoraShape> decode_shapes() {
  std::vector<LoraShape> shapes;
  shapes.push_back({"decode, one row", 1, 264, {384}, {{0, 1, {8}, 0}}});
  shapes.push_back({"decode, one group", 64, 520, {512}, {{0, 64, {16}, 0}}});
  LoraShape each{"decode, every row another", 64, 584, {256, 256, 136}, {}};
  const int32_t ranks[] = {16, 8, 0, 24, 64, 40};
  for (int32_t t = 0; t < 64; ++t) each.groups.push_back({t, 1, {ranks[t % 6], ranks[t % 5], ranks[t % 3]}, 0});
  shapes.push_back(each);
  LoraShape splits{"decode, shares of k", 16, 2104, {512}, {}};
  for (int32_t t = 0; t < 16; ++t) splits.groups.push_back({t, 1, {16}, 0});
  shapes.push_back(splits);
  shapes.push_back({"decode, rows without adapter",
                    61,
                    328,
                    {256, 264},
                    {{1, 2, {24, 8}, 0},
                     {3, 7, {128, 16}, 0},
                     {10, 0, {8, 8}, 0},
                     {10, 4, {}, 0},
                     {14, 9, {8, 0}, 0},
                     {25, 17, {0, 56}, 0},
                     {50, 1, {16, 16}, 0},
                     {52, 1, {40, 72}, 0},
                     {53, 7, {0, 0}, 0}}});
  shapes.push_back(
      {"decode, large ranks", 35, 648, {512, 256}, {{0, 9, {256, 8}, 0}, {9, 1, {136, 200}, 0}, {11, 24, {16, 256}, 0}}});
  shapes.push_back({"decode, large ranks, few rows", 11, 600, {1024}, {{0, 3, {256}, 0}, {3, 1, {8}, 0}, {4, 7, {72}, 0}}});
  LoraShape tiles{"decode, more tiles than run at a time", 9, 40, {256, 33792, 264}, {}};
  for (int32_t g = 0; g < 2; ++g) tiles.groups.push_back({5 * g, 3, {8, 8 * (g + 1), 16}, 0});
  shapes.push_back(tiles);
  return shapes;
}

std::vector<LoraShape> all_shapes(const Rig& rig, bool decode = false) {
  std::vector<LoraShape> shapes = fused_shapes();
  if (rig.exact()) return shapes;
  if (decode)
    for (LoraShape& shape : decode_shapes()) shapes.push_back(std::move(shape));
  for (LoraShape& shape : large_shapes()) shapes.push_back(std::move(shape));
  return shapes;
}

void check_backward(Rig& rig, const LoraShape& shape) {
  const std::string label = std::string(" (") + shape.name + ")";
  LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
  const int64_t rank = std::max(lora.max_rank, 8);
  Host dy = rig.random(shape.rows, lora.columns), w = rig.random(lora.columns, shape.in), ds = rig.random(shape.rows, rank, 4);
  OnDevice ddy(rig, dy), dw(rig, w), dds(rig, ds), dx(rig, shape.rows, shape.in), apart(rig, shape.rows, shape.in);
  run_twice({&dx}, [&] { rig.ops().linear_lora_backward(ddy, dw, lora.linear, lora.groups, dds, dx); });
  Host want = reference::linear_backward(dy, w);
  reference::lora_backward_x(lora.host, ds, want);
  expect("linear_lora_backward" + label, dx.get(), want, rig.bound(6e-6));

  rig.ops().linear_backward(ddy, dw, apart, false);
  rig.ops().lora_backward_x(lora.linear, lora.groups, dds, apart);
  if (rig.deterministic()) CHECK(dx.download() == apart.download());
  else expect("linear_lora_backward and its parts" + label, dx.get(), apart.get(), rig.bound(6e-6));
}

// The shape's first part as gate and, with the second part's ranks, as up.
LoraShape of_gate_and_up(LoraShape shape) {
  const bool both = shape.out.size() > 1;
  shape.out = {shape.out[0], shape.out[0]};
  for (GroupSpec& group : shape.groups) {
    if (group.ranks.empty()) continue;
    group.ranks = {group.ranks[0], both ? group.ranks[1] : group.ranks[0] / 2 / 8 * 8};
  }
  return shape;
}

// Against the reference, or where that would take too long against the single operations.
void check_swiglu(Rig& rig, const LoraShape& shape, bool parts) {
  const std::string label = std::string(" (") + shape.name + ")";
  LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
  const int64_t rank = std::max(lora.max_rank, 8), columns = shape.out[0];
  // gate and up of about 4, in the first row of about 40: saturated either way, and h still fits in f16.
  Host x = rig.random(shape.rows, shape.in, 3 / std::sqrt(static_cast<double>(shape.in))), w = rig.random(lora.columns, shape.in);
  if (shape.rows > 0)
    for (int64_t j = 0; j < shape.in; ++j) x(0, j) *= 10;
  OnDevice dx(rig, x), dw(rig, w), s(rig, shape.rows, rank), gate_up(rig, shape.rows, lora.columns), h(rig, shape.rows, columns);
  run_twice({&s, &gate_up, &h}, [&] { rig.ops().linear_lora_swiglu(dx, dw, lora.linear, lora.groups, s, gate_up, h, true); });
  Host want;
  if (parts) {
    OnDevice s2(rig, shape.rows, rank), apart(rig, shape.rows, lora.columns);
    rig.ops().linear_lora(dx, dw, {}, lora.linear, lora.groups, s2, apart);
    want = apart.get();
  } else {
    Host want_s(shape.rows, rank);
    want = reference::linear(x, w, Host());
    reference::lora_shrink(lora.host, x, want_s);
    reference::lora_expand(lora.host, want_s, want);
  }
  expect("linear_lora_swiglu gate_up" + label, gate_up.get(), want, rig.bound(6e-6));
  expect("linear_lora_swiglu h" + label, h.get(), reference::swiglu(gate_up.get()), rig.bound(5e-7));
  // Where h alone is wanted gate_up may never be written; of few rows the sums then have another order.
  OnDevice alone(rig, shape.rows, columns), s3(rig, shape.rows, rank), unused(rig, shape.rows, lora.columns);
  run_twice({&s3, &alone}, [&] { rig.ops().linear_lora_swiglu(dx, dw, lora.linear, lora.groups, s3, unused, alone, false); });
  // (gate and up may then each round to their neighbour, an ulp: up to 2^-7 in bf16; h itself by half of one)
  expect("linear_lora_swiglu h alone" + label, alone.get(), reference::swiglu(gate_up.get()), rig.bound(6e-6, 2.5 / 128));
  if (lora.max_rank > 0) expect("linear_lora_swiglu s" + label, s3.get(), s.get(), rig.bound(1e-6));
  if (shape.rows > 64) CHECK(alone.download() == h.download());
}

void check_swiglu_backward(Rig& rig, const LoraShape& shape, bool parts) {
  const std::string label = std::string(" (") + shape.name + ")";
  LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
  const int64_t rank = std::max(lora.max_rank, 8);
  Host dy = rig.random(shape.rows, lora.columns), w = rig.random(lora.columns, shape.in), ds = rig.random(shape.rows, rank, 4);
  Host gate_up = rig.random(shape.rows, 2 * shape.in, 3.0);
  if (shape.rows > 0) gate_up(0, 0) = -200, gate_up(shape.rows - 1, shape.in - 1) = 120;  // saturated either way
  OnDevice ddy(rig, dy), dw(rig, w), dds(rig, ds), dgate_up(rig, gate_up), h(rig, shape.rows, shape.in);
  OnDevice again(rig, gate_up), h_again(rig, shape.rows, shape.in);
  rig.ops().linear_lora_swiglu_backward(ddy, dw, lora.linear, lora.groups, dds, dgate_up, h);
  rig.ops().linear_lora_swiglu_backward(ddy, dw, lora.linear, lora.groups, dds, again, h_again);
  CHECK(dgate_up.download() == again.download());
  CHECK(h.download() == h_again.download());
  Host want_h, want;
  if (parts) {
    OnDevice apart(rig, gate_up), both(rig, shape.rows, shape.in);
    rig.ops().linear_lora_backward(ddy, dw, lora.linear, lora.groups, dds, both);
    rig.ops().swiglu_and_backward(apart, both, apart, both);
    want_h = both.get(), want = apart.get();
  } else {
    Host dh = reference::linear_backward(dy, w);
    reference::lora_backward_x(lora.host, ds, dh);
    want_h = reference::swiglu(gate_up), want = reference::swiglu_backward(gate_up, dh);
  }
  expect("linear_lora_swiglu_backward h" + label, h.get(), want_h, rig.bound(5e-7));
  expect("linear_lora_swiglu_backward" + label, dgate_up.get(), want, rig.bound(6e-6));
}

}  // namespace

TEST(linear_lora_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : all_shapes(rig, true)) {
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

TEST(linear_lora_backward_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : all_shapes(rig)) check_backward(rig, shape);
  });
}

TEST(linear_lora_swiglu_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : fused_shapes()) check_swiglu(rig, of_gate_and_up(shape), false);
    if (rig.exact()) return;
    for (const LoraShape& shape : decode_shapes()) check_swiglu(rig, of_gate_and_up(shape), false);
    // Tiles of any height, in one wave and in several, the last one cut off; ranks that one unit of a stage does not hold.
    for (const int64_t columns : {8, 24, 136, 2056, 14336, 34184}) {
      check_swiglu(rig, {"decode, gate and up, base rows alone", 23, 72, {columns, columns}, {}}, false);
      check_swiglu(
          rig, {"decode, gate and up", 30, 200, {columns, columns}, {{0, 3, {8, 16}, 0}, {5, 9, {64, 0}, 0}, {14, 1, {0, 24}, 0}}},
          false);
    }
    check_swiglu(rig, {"decode, gate and up, large ranks", 5, 136, {264, 264}, {{0, 3, {72, 64}, 0}, {3, 2, {256, 8}, 0}}}, false);
    for (const LoraShape& shape : large_shapes()) check_swiglu(rig, of_gate_and_up(shape), true);
    check_swiglu(rig, {"base rows alone", 2100, 520, {264, 264}, {}}, true);
    if (rig.deterministic()) return;
    for (const LoraShape& shape : divided_shapes()) check_swiglu(rig, of_gate_and_up(shape), true);
  });
}

// The norm and rope behind a product may be what adds up its shares of k.
TEST(linear_lora_add_rms_norm_against_its_parts) {
  for_each_rig([](Rig& rig) {
    std::vector<LoraShape> shapes = all_shapes(rig, true);
    for (const int64_t in : {72, 1032, 4096, 14336})
      for (const int64_t rows : {1, 16, 29, 64})
        if (!rig.exact() || in < 2000) shapes.push_back({"base rows alone", rows, in, {1032}, {}});
    if (!rig.exact()) {  // rows that the norm does not hold in registers, too
      shapes.push_back({"shares of k, wide rows", 40, 4096, {8200}, {{3, 9, {16}, 0}, {12, 28, {8}, 0}}});
      shapes.push_back({"shares of k", 64, 14336, {4096}, {{0, 8, {16}, 0}, {8, 1, {64}, 0}, {20, 44, {8}, 0}}});
    }
    for (const LoraShape& shape : shapes) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = std::max(lora.max_rank, 8), columns = lora.columns;
      Host x = rig.random(shape.rows, shape.in), w = rig.random(columns, shape.in, 1 / std::sqrt(double(shape.in)));
      Host residual = rig.random(shape.rows, columns), norm = rig.random(1, columns), bias = rig.random(1, columns);
      OnDevice dx(rig, x), dw(rig, w), dnorm(rig, norm), dbias(rig, bias), in(rig, residual), s(rig, shape.rows, rank),
          y(rig, shape.rows, columns), sum(rig, shape.rows, columns), z(rig, shape.rows, columns), s2(rig, shape.rows, rank),
          y2(rig, shape.rows, columns), sum2(rig, shape.rows, columns), z2(rig, shape.rows, columns);
      for (const bool with_bias : {false, true}) {
        const TensorView b = with_bias ? dbias.view() : TensorView{};
        run_twice({&sum, &z},
                  [&] { rig.ops().linear_lora_add_rms_norm(dx, dw, b, lora.linear, lora.groups, s, y, in, dnorm, 1e-5f, sum, z); });
        rig.ops().linear_lora(dx, dw, b, lora.linear, lora.groups, s2, y2);
        rig.ops().add_rms_norm(in, y2, dnorm, 1e-5f, sum2, z2);
        if (rig.deterministic() || shape.rows > 64) {
          CHECK(sum.download() == sum2.download());
          CHECK(z.download() == z2.download());
        }
        expect("linear_lora_add_rms_norm sum" + label, sum.get(), sum2.get(), rig.bound(1e-6));
        expect("linear_lora_add_rms_norm" + label, z.get(), z2.get(), rig.bound(1e-6));
      }
      OnDevice stream(rig, residual);  // in place
      rig.ops().linear_lora_add_rms_norm(dx, dw, {}, lora.linear, lora.groups, s, y, stream, dnorm, 1e-5f, stream, z2);
      rig.ops().linear_lora_add_rms_norm(dx, dw, {}, lora.linear, lora.groups, s, y, in, dnorm, 1e-5f, sum, z);
      CHECK(stream.download() == sum.download());
      CHECK(z2.download() == z.download());
    }
  });
}

TEST(linear_lora_rope_against_its_parts) {
  for_each_rig([](Rig& rig) {
    for (const int32_t d : {64, 128, 16})
      for (const int64_t rows : {1, 16, 45, 64, 70})
        for (const bool with_lora : {false, true})
          for (const bool norms : {false, true}) {
            const int64_t in = rig.exact() ? 64 : 2056, columns = 8 * d;
            std::vector<GroupSpec> groups;
            if (with_lora)
              groups = {{0, static_cast<int32_t>(rows / 2), {16, 8, 0}, 0}, {static_cast<int32_t>(rows / 2), 1, {8, 8, 24}, 0}};
            LoraRig lora(rig, rows, in, {4 * d, 2 * d, 2 * d}, groups);
            const int64_t rank = std::max(lora.max_rank, 8);
            const AttentionShape shape{4, 2, d, 0};
            const KvShape kv_shape{10, 8, 2, d};
            std::vector<int32_t> slots;
            for (int32_t t = 0; t < rows; ++t) slots.push_back(t % 3 == 0 ? -1 : t);
            ArrayOnDevice<int32_t> dslots(rig, slots);
            Host x = rig.random(rows, in), w = rig.random(columns, in, 1 / std::sqrt(double(in)));
            Host bias = rig.random(1, columns), norm = rig.random(1, d), angles = rig.random(rows, d);
            OnDevice dx(rig, x), dw(rig, w), dbias(rig, bias), dnorm(rig, norm), s(rig, rows, rank), table(rig, angles, DType::f32);
            OnDevice pages(rig, 2 * 80, 2 * d), pages2(rig, 2 * 80, 2 * d), qkv(rig, rows, columns), qkv2(rig, rows, columns),
                raw(rig, rows, 6 * d), raw2(rig, rows, 6 * d);
            const auto rope_to = [&](OnDevice& kv, OnDevice& kept) {
              std::vector<unsigned char> zeros(static_cast<size_t>(2 * 80 * 2 * d) * size_of(rig.dtype()));
              rig.device().copy_to_device(kv.view().data, zeros.data(), zeros.size());
              const KvLayer layer{kv.view().data, kv.view().slice_rows(80, 80).data};
              const TensorView n = norms ? dnorm.view() : TensorView{};
              return Rope{shape, table, n, n, 1e-6f, kept, dslots.data(), layer, kv_shape};
            };
            rig.ops().linear_lora_rope(dx, dw, dbias, lora.linear, lora.groups, s, qkv, rope_to(pages, raw));
            rig.ops().linear_lora(dx, dw, dbias, lora.linear, lora.groups, s, qkv2);
            rig.ops().rope(qkv2, rope_to(pages2, raw2));
            expect("linear_lora_rope", qkv.get(), qkv2.get(), rig.bound(1e-6));
            expect("linear_lora_rope raw", raw.get(), raw2.get(), rig.bound(1e-6));
            expect("linear_lora_rope pages", pages.get(), pages2.get(), rig.bound(1e-6));
          }
  });
}

TEST(linear_lora_swiglu_backward_against_the_reference) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : fused_shapes()) check_swiglu_backward(rig, shape, false);
    if (rig.exact()) return;
    for (const LoraShape& shape : large_shapes()) check_swiglu_backward(rig, shape, true);
    if (rig.deterministic()) return;
    for (const LoraShape& shape : divided_shapes()) check_swiglu_backward(rig, shape, true);
  });
}

// Beside the single operations, where the reference would take too long.
TEST(large_products_equal_their_parts) {
  for_each_rig([](Rig& rig) {
    for (const LoraShape& shape : rig.exact() || rig.deterministic() ? fused_shapes() : divided_shapes()) {
      const std::string label = std::string(" (") + shape.name + ")";
      LoraRig lora(rig, shape.rows, shape.in, shape.out, shape.groups);
      const int64_t rank = std::max(lora.max_rank, 8);
      Host x = rig.random(shape.rows, shape.in), w = rig.random(lora.columns, shape.in), dy = rig.random(shape.rows, lora.columns),
           ds = rig.random(shape.rows, rank, 4);
      OnDevice dev_x(rig, x), dev_w(rig, w), dev_dy(rig, dy), dev_ds(rig, ds);
      OnDevice s(rig, shape.rows, rank), y(rig, shape.rows, lora.columns), parts_y(rig, shape.rows, lora.columns);
      OnDevice dx(rig, shape.rows, shape.in), parts_dx(rig, shape.rows, shape.in);
      run_twice({&s, &y, &dx}, [&] {
        rig.ops().linear_lora(dev_x, dev_w, {}, lora.linear, lora.groups, s, y);
        rig.ops().linear_lora_backward(dev_dy, dev_w, lora.linear, lora.groups, dev_ds, dx);
      });
      rig.ops().linear(dev_x, dev_w, {}, parts_y);
      rig.ops().lora_expand(lora.linear, lora.groups, s, parts_y);
      rig.ops().linear_backward(dev_dy, dev_w, parts_dx, false);
      rig.ops().lora_backward_x(lora.linear, lora.groups, dev_ds, parts_dx);
      expect("large linear_lora" + label, y.get(), parts_y.get(), rig.bound(6e-6));
      expect("large linear_lora_backward" + label, dx.get(), parts_dx.get(), rig.bound(6e-6));
    }
  });
}

// Groups of one tile take part in each other's steps with zeros; a row that is not finite must not reach its neighbours that way.
TEST(a_row_that_is_not_finite_stays_alone) {
  for_each_rig([](Rig& rig) {
    const int64_t rows = 640, in = 128, out = 256, bad = 130;
    LoraRig lora(rig, rows, in, {out}, {{0, 129, {16}, 0}, {129, 60, {8}, 0}, {200, 440, {40}, 0}});
    Host x = rig.random(rows, in), w = rig.random(out, in), dy = rig.random(rows, out), ds = rig.random(rows, 40);
    const auto poison = [&](Host& m) {
      for (int64_t j = 0; j < m.cols; ++j) m(bad, j) = j % 2 == 0 ? std::numeric_limits<double>::quiet_NaN() : HUGE_VAL;
    };
    for (Host* m : {&x, &dy, &ds}) poison(*m);
    OnDevice dev_x(rig, x), dev_w(rig, w), dev_dy(rig, dy), dev_ds(rig, ds), s(rig, rows, 40), y(rig, rows, out), dx(rig, rows, in);
    rig.ops().linear_lora(dev_x, dev_w, {}, lora.linear, lora.groups, s, y);
    rig.ops().linear_lora_backward(dev_dy, dev_w, lora.linear, lora.groups, dev_ds, dx);
    for (const OnDevice* t : {&y, &dx}) {
      const Host got = t->get();
      int64_t finite = 0;
      for (int64_t i = 0; i < rows; ++i) {
        if (i == bad) continue;
        for (int64_t j = 0; j < got.cols; ++j) finite += std::isfinite(got(i, j));
      }
      CHECK_EQ(finite, (rows - 1) * got.cols);
      CHECK(!std::isfinite(got(bad, 0)));
    }
  });
}

// So must an adapter that is not finite: rows of other groups keep their bits.
TEST(an_adapter_that_is_not_finite_stays_alone) {
  for_each_rig([](Rig& rig) {
    const int64_t rows = 24, in = 256, out = 256;
    LoraRig lora(rig, rows, in, {out}, {{0, 5, {16}, 0}, {5, 4, {24}, 0}, {9, 1, {8}, 0}, {12, 12, {16}, 0}});
    Host x = rig.random(rows, in), w = rig.random(out, in);
    OnDevice dev_x(rig, x), dev_w(rig, w), s(rig, rows, 24), y(rig, rows, out), after(rig, rows, out);
    rig.ops().linear_lora(dev_x, dev_w, {}, lora.linear, lora.groups, s, y);
    const LoraPart& part = lora.groups.host_groups[1].host_sites[1].part[0];
    const std::vector<std::byte> bad(static_cast<size_t>(out) * 24 * size_of(rig.dtype()), std::byte{0xff});  // not a number
    rig.device().copy_to_device(const_cast<void*>(part.a), bad.data(), bad.size());
    rig.device().copy_to_device(const_cast<void*>(part.b), bad.data(), bad.size());
    rig.device().synchronize();
    rig.ops().linear_lora(dev_x, dev_w, {}, lora.linear, lora.groups, s, after);
    const Host want = y.get(), got = after.get();
    int64_t same = 0, spoilt = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < out; ++j) {
        if (i >= 5 && i < 9) spoilt += std::isnan(got(i, j));
        else same += got(i, j) == want(i, j);
      }
    }
    CHECK_EQ(same, (rows - 4) * out);
    CHECK_EQ(spoilt, 4 * out);
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

    OnDevice both_s(rig, 4, 16), uneven(rig, 4, 15);
    const auto as_made = uneven.download();
    LoraRig both(rig, 4, 64, {16, 16}, {{0, 4, {8, 8}, 0}});
    CHECK_THROWS(InvalidArgument, "expected [4, 16]",
                 rig.ops().linear_lora_swiglu(dx, dw, both.linear, both.groups, both_s, good, uneven, false));
    CHECK(uneven.download() == as_made);

    OnDevice norm(rig, 1, 32), sum(rig, 4, 32), z(rig, 4, 31);
    const auto sum_as_made = sum.download();
    CHECK_THROWS(InvalidArgument, "y: expected [4, 32]",
                 rig.ops().linear_lora_add_rms_norm(dx, dw, {}, lora.linear, lora.groups, s, good, good, norm, 1e-5f, sum, z));
    CHECK(sum.download() == sum_as_made);
    OnDevice angles(rig, 3, 4, DType::f32);
    const Rope rope = {{4, 2, 4, 0}, angles, {}, {}, 1e-5f, {}, nullptr, {}, {}};
    CHECK_THROWS(InvalidArgument, "cos_sin: expected",
                 rig.ops().linear_lora_rope(dx, dw, {}, lora.linear, lora.groups, s, sum, rope));
    const AttentionSpec decodes = {4, 2, 4, {{1, 9}, {1, 5}, {1, 3}, {1, 1}}};
    PagedRig paged(rig, decodes, 8);
    OnDevice turns(rig, 4, 4, DType::f32), attended(rig, 4, 15);
    const auto attended_as_made = attended.download();
    const auto attend = [&](TensorView cos_sin, TensorView to) {
      const Rope of = {paged.shape, cos_sin, {}, {}, 1e-5f, {}, nullptr, paged.layer, paged.kv_shape};
      rig.ops().linear_lora_rope_attention(dx, dw, {}, lora.linear, lora.groups, s, sum, of, paged.batch, to);
    };
    CHECK_THROWS(InvalidArgument, "cos_sin: expected", attend(angles, attended));
    CHECK_THROWS(InvalidArgument, "out: expected [4, 16]", attend(turns, attended));
    CHECK(attended.download() == attended_as_made);

    OnDevice dy(rig, 4, 32), ds(rig, 4, 8), wrong(rig, 4, 63);
    const auto untouched = wrong.download();
    CHECK_THROWS(InvalidArgument, "dx: expected [4, 64]",
                 rig.ops().linear_lora_backward(dy, dw, lora.linear, lora.groups, ds, wrong));
    CHECK(wrong.download() == untouched);
  });
}

#include "op_rope_attention_tests.h"
