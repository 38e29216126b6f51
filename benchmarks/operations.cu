// Operations of the CUDA backend one by one, in an 8B Llama's shape (H 4096, F 14336, 32 query and 8 key heads of 128, V 128,256).
//   operations [--rank R] [mode ...]   prints a table a mode (without one: all of them) and, as its last line, JSON
//     decode_layer  a layer of decodes without its attention, with adapters of rank R; then with launches left out
//     lora          at 8192 rows shrink, ds with dB, and dA of each linear, with ranks 16 and 64
//     vocabulary    losses and sampling
//     elementwise   norms, rope and swiglu at 8192 rows
//     linears       at 8192 rows the products with one adapter of rank R, and swiglu in them
// R: a multiple of 8 up to 128, 16 unless given. Built and run as bench.cuh says.
// Method: medians of CUDA graphs replayed in turn, each of several launches, over their number. Weights and rows come from memory,
// but what the launch in front has written: between two readings of the same bytes more pass than the L2 holds. Data is random. The
// ceiling of bytes is a kernel's copy of 4 GiB in the same run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "bench.cuh"

using namespace loquetier;
using namespace loquetier::bench;

namespace {

struct Settings {
  int rank = 16;
  double copy_gbs = 0;
};

constexpr AttentionShape kHeads = {32, 8, 128, 0.08838835f};
constexpr int64_t kRows = 8192;  // of all modes but decode_layer and vocabulary
constexpr float kEps = 1e-5f;

// Work of a graph, of equal launches.
struct Timed {
  std::string name;
  int launches = 1;
  double amount = 0;  // bytes or operations of a launch
  std::function<void()> work;
};

// A line for each: us a launch, the rate in 10^12 a second, and what part of `ceiling` that is, unless it is 0.
void table(Bench& b, const std::string& title, const std::vector<Timed>& all, double budget_ms, const std::string& unit,
           double ceiling, Json& add) {
  std::printf("%-28s | %9s | %8s%s\n", title.c_str(), "us", unit.c_str(), ceiling > 0 ? " | of copy" : "");
  std::vector<std::function<void()>> works;
  for (const Timed& one : all) works.push_back(one.work);
  const std::vector<double> times = b.measure(works, budget_ms);
  for (size_t i = 0; i < all.size(); ++i) {
    const double us = times[i] / all[i].launches, rate = all[i].amount / us / 1e6;
    std::printf("%-28s | %9.1f | %8.2f", all[i].name.c_str(), us, rate);
    if (ceiling > 0) std::printf(" | %6.1f%%", 100 * rate / ceiling);
    std::printf("\n");
    add(all[i].name + "_us", us);
    add(all[i].name + (unit == "TB/s" ? "_tbs" : "_tflops"), rate);
  }
}

// rope's angles [positions, D].
TensorView angles(Bench& b, const std::vector<int32_t>& positions) {
  std::vector<float> inv_freq;
  for (int i = 0; i < kHeads.head_size / 2; ++i)
    inv_freq.push_back(static_cast<float>(std::pow(500000.0, -2.0 * i / kHeads.head_size)));
  const TensorView cos_sin = b.zeros(DType::f32, std::ssize(positions), kHeads.head_size);
  b.ops->rope_table(b.upload(positions), b.upload(inv_freq), 1.0f, cos_sin);
  return cos_sin;
}

// ---------------------------------------------------------------- decode_layer

// Layers of a decode step as model/forward.cpp launches them. Without attention: o reads q where rope leaves it.
struct DecodeLayers {
  static constexpr int kLayers = 6, kPage = 16;

  DecodeLayers(int64_t rows, int adapters, int rank) {
    make_batch(b, batch, rows, adapters, rank, kLayers, false);
    for (int l = 0; l < kLayers; ++l) {
      for (const LoraLinear& linear : kLinears) w.push_back(b.random(columns(linear), linear.in, 0.02f));
      for (int i = 0; i < 2; ++i) norms.push_back(b.random(1, kHidden));
      const auto pages = [&] { return b.random(rows * kPage, kHeads.kv_heads * kHeads.head_size).data; };  // one for each row
      kv.push_back({pages(), pages()});
    }
    std::vector<int32_t> slots;
    for (int64_t i = 0; i < rows; ++i) slots.push_back(static_cast<int32_t>(i * kPage));
    kv_slots = b.upload(slots);
    kv_shape = {rows, kPage, kHeads.kv_heads, kHeads.head_size};
    cos_sin = angles(b, std::vector<int32_t>(static_cast<size_t>(rows), 512));
    x = b.random(rows, kHidden);
    norm = b.random(rows, kHidden);
    qkv = b.random(rows, columns(kLinears[0]));
    gate_up = b.random(rows, 2 * kFeed);
    h = b.random(rows, kFeed);
    delta = b.random(rows, kHidden);
    for (TensorView& one : s) one = b.random(rows, 3 * rank);
  }

  // What is left out is not launched, and what would read its output reads what was there. The product in front of it is then the
  // plain linear_lora, which adds up its own shares of k.
  void run(bool with_rope, bool with_norms, bool with_swiglu) {
    Ops& ops = *b.ops;
    for (int l = 0; l < kLayers; ++l) {
      const auto weight = [&](int i) { return w[static_cast<size_t>(l * 4 + i)]; };
      const auto plain = [&](int i, TensorView in, TensorView out) {
        ops.linear_lora(in, weight(i), {}, at_layer(i, l), batch.groups, s[i], out);
      };
      const auto into_stream = [&](int i, TensorView in, TensorView norm_weight) {
        if (!with_norms) return plain(i, in, delta);
        ops.linear_lora_add_rms_norm(in, weight(i), {}, at_layer(i, l), batch.groups, s[i], delta, x, norm_weight, kEps, x, norm);
      };
      const Rope rope = {kHeads, cos_sin, {}, {}, kEps, {}, kv_slots, kv[static_cast<size_t>(l)], kv_shape};
      if (with_rope) ops.linear_lora_rope(norm, weight(0), {}, at_layer(0, l), batch.groups, s[0], qkv, rope);
      else plain(0, norm, qkv);
      into_stream(1, qkv.slice_cols(0, kHidden), norms[static_cast<size_t>(l * 2)]);
      if (with_swiglu) ops.linear_lora_swiglu(norm, weight(2), at_layer(2, l), batch.groups, s[2], gate_up, h, false);
      else plain(2, norm, gate_up);
      into_stream(3, h, norms[static_cast<size_t>(l * 2 + 1)]);
    }
  }

  Bench b;
  Batch batch;
  std::vector<TensorView> w, norms;  // of each layer: four [N, K]; two [H]
  std::vector<KvLayer> kv;           // pages [rows, P, K, D]
  KvShape kv_shape;
  const int32_t* kv_slots = nullptr;
  TensorView cos_sin;                // [T, D] f32
  TensorView x, norm, delta;         // [T, H]
  TensorView qkv, gate_up, h, s[4];  // [T, (Q + 2K) D], [T, 2F], [T, F], [T, 3R]
};

void decode_layer(const Settings& settings, Json& add) {
  std::printf("a layer of decodes, us\n%6s %9s | %7s | %7s %7s %8s | %6s %6s\n", "rows", "adapters", "layer", "no rope", "no norm",
              "linears", "bytes", "ratio");
  for (const auto& [rows, adapters] : {std::pair{64, 0}, {64, 1}, {64, 8}, {64, 64}, {16, 16}}) {
    DecodeLayers layers(rows, adapters, settings.rank);
    std::vector<double> t = layers.b.measure({[&] { layers.run(true, true, true); }, [&] { layers.run(false, true, true); },
                                              [&] { layers.run(true, false, true); }, [&] { layers.run(false, false, false); }},
                                             400);
    for (double& us : t) us /= DecodeLayers::kLayers;
    double elements = 0;
    for (const LoraLinear& l : kLinears) {
      const int64_t of_rank = l.parts * l.in + columns(l);  // elements of A and B
      elements += static_cast<double>(columns(l) * l.in + adapters * settings.rank * of_rank);
    }
    const double bytes_us = 2 * elements / settings.copy_gbs / 1e3;
    std::printf("%6d %9d | %7.1f | %7.1f %7.1f %8.1f | %6.1f %6.2f\n", rows, adapters, t[0], t[1], t[2], t[3], bytes_us,
                t[0] / bytes_us);
    const std::string name = std::to_string(rows) + "x" + std::to_string(adapters);
    add("decode_layer_us_" + name, t[0]);
    add("decode_layer_no_rope_us_" + name, t[1]);
    add("decode_layer_no_norms_us_" + name, t[2]);
    add("decode_layer_linears_us_" + name, t[3]);
    add("decode_layer_bytes_us_" + name, bytes_us);
  }
}

// ---------------------------------------------------------------- lora

// Each launch of a graph has x, dy, s, ds and an adapter's site of its own: x of 4096 columns would stay in the L2 in part.
void lora(const Settings& settings, Json& add) {
  constexpr int kLayers = 4;
  Bench b;
  Ops& ops = *b.ops;
  std::vector<TensorView> x, dy;
  double bytes_us[2] = {};  // of the inputs of a layer's linears, x and dy
  for (int l = 0; l < kLayers; ++l) {
    x.push_back(b.random(kRows, kFeed));
    dy.push_back(b.random(kRows, 2 * kFeed));
  }
  for (const LoraLinear& linear : kLinears) {
    bytes_us[0] += static_cast<double>(kRows * linear.in) * 2 / settings.copy_gbs / 1e3;
    bytes_us[1] += static_cast<double>(kRows * columns(linear)) * 2 / settings.copy_gbs / 1e3;
  }
  std::printf("LoRA at %lld rows, us; x once %.1f, dy once %.1f\n%6s %9s %-8s | %7s %7s %7s %7s | %7s\n",
              static_cast<long long>(kRows), bytes_us[0], bytes_us[1], "rank", "adapters", "", "qkv", "o", "gate_up", "down",
              "all");
  for (const auto& [rank, adapters] : {std::pair{16, 1}, {16, 16}, {64, 1}, {64, 16}}) {
    Batch batch;
    make_batch(b, batch, kRows, adapters, rank, kLayers, true);
    const LoraGroups& groups = batch.groups;
    std::vector<TensorView> s, ds;
    for (int l = 0; l < kLayers; ++l) {
      s.push_back(b.random(kRows, 3 * rank));
      ds.push_back(b.random(kRows, 3 * rank));
    }
    using Operation = std::function<void(const LoraLinear&, TensorView x, TensorView dy, TensorView s, TensorView ds)>;
    const std::pair<const char*, Operation> operations[] = {
        {"shrink", [&](auto& l, auto in, auto, auto to, auto) { ops.lora_shrink(l, groups, in, to); }},
        {"ds_db", [&](auto& l, auto, auto g, auto in, auto to) { ops.lora_backward(l, groups, {}, in, g, to); }},
        {"da", [&](auto& l, auto in, auto, auto, auto d) { ops.lora_backward_weights(l, groups, in, {}, {}, d); }}};
    std::vector<std::function<void()>> works;
    for (const auto& [name, operation] : operations) {
      for (int i = 0; i < 4; ++i) {
        works.push_back([&, i, f = operation] {
          for (int l = 0; l < kLayers; ++l) {
            const LoraLinear linear = at_layer(i, l);
            const size_t n = static_cast<size_t>(l);
            f(linear, matrix(x[n].data, DType::bf16, kRows, linear.in), matrix(dy[n].data, DType::bf16, kRows, columns(linear)),
              s[n], ds[n]);
          }
        });
      }
    }
    const std::vector<double> t = b.measure(works, 300);
    for (size_t k = 0; k < std::size(operations); ++k) {
      const std::string name = operations[k].first, of = "_us_" + std::to_string(adapters) + "_rank" + std::to_string(rank);
      std::printf("%6d %9d %-8s |", rank, adapters, name.c_str());
      double sum = 0;
      for (size_t i = 0; i < 4; ++i) {
        const double us = t[k * 4 + i] / kLayers;
        std::printf(" %7.1f", us);
        add(name + "_" + kNames[i] + of, us);
        sum += us;
      }
      std::printf(" | %7.1f\n", sum);
      add(name + of, sum);
    }
  }
}

// ---------------------------------------------------------------- vocabulary

// Logits are a product, as in a head. A graph of few rows goes through all of them, one launch after the other.
void vocabulary(const Settings& settings, Json& add) {
  constexpr int64_t kAllRows = 1024, kVocabulary = 128256;
  constexpr int kPrompt = 512, kOutput = 128, kTop = 5;  // of a row with all options
  Bench b;
  Ops& ops = *b.ops;
  const TensorView x = b.random(kAllRows, kHidden), w = b.random(kVocabulary, kHidden, 0.1f);
  const TensorView logits = b.zeros(DType::f32, kAllRows, kVocabulary), dlogits = b.zeros(DType::bf16, kAllRows, kVocabulary);
  ops.linear(x, w, {}, logits);  // near normal, with a deviation of 2

  std::vector<int32_t> tokens;  // of prompts and outputs, targets
  for (int64_t i = 0; i < kAllRows * (kPrompt + kOutput); ++i)
    tokens.push_back(static_cast<int32_t>(static_cast<uint32_t>(i) * 2654435761u % kVocabulary));
  const int32_t* const history = b.upload(tokens);
  std::vector<LossRow> host_targets(kAllRows);
  for (size_t i = 0; i < host_targets.size(); ++i) host_targets[i] = {.target = tokens[i], .weight = 1.0f / kAllRows};
  const LossRow* const targets = b.upload(host_targets);
  const TensorView logprob = b.zeros(DType::f32, 1, kAllRows), loss = b.zeros(DType::f32, 1, kAllRows),
                   ids = b.zeros(DType::i32, 1, kAllRows);

  // f(first row, logits from there on), at least four times.
  const auto timed = [&](const std::string& name, int64_t rows, double bytes, auto f) -> Timed {
    const int64_t places = kAllRows / rows, launches = std::max<int64_t>(places, 4);
    return {name + "_" + std::to_string(rows), static_cast<int>(launches), bytes * static_cast<double>(rows * kVocabulary),
            [&, rows, places, launches, f] {
              for (int64_t i = 0; i < launches; ++i) f(i % places * rows, logits.slice_rows(i % places * rows, rows));
            }};
  };
  const auto lose = [&](TensorView gradient) {
    return [&, gradient](int64_t first, TensorView of) {
      const TensorView d = gradient.empty() ? TensorView{} : gradient.slice_rows(first, of.rows);
      ops.token_loss(of, targets + first, d, logprob.as<float>(), loss.as<float>());
    };
  };
  table(b, "losses over 128,256",
        {timed("loss_gradient", kAllRows, 6, lose(dlogits)), timed("loss", kAllRows, 4, lose({})), timed("loss", 7, 4, lose({}))},
        300, "TB/s", settings.copy_gbs / 1e3, add);

  const std::vector<int32_t> bias_ids = {17, 1234, 50000, 128000}, forbidden = {128001, 128009};
  const std::vector<float> bias_values(4);  // nothing: logits are changed in place, by every launch again
  const SampleBatch tables = {
      .history = history, .bias_ids = b.upload(bias_ids), .bias_values = b.upload(bias_values), .forbidden = b.upload(forbidden)};
  const TensorView top_ids = b.zeros(DType::i32, kAllRows, kTop), top_logprobs = b.zeros(DType::f32, kAllRows, kTop);
  struct Case {
    const char* name;
    int64_t rows;
    SampleRow row;
  };
  const SampleRow all = {.temperature = 0.8f,
                         .top_p = 0.9f,
                         .min_p = 0.001f,
                         .top_k = 50,
                         .repetition_penalty = 1.1f,
                         .presence_penalty = 0.1f,
                         .frequency_penalty = 0.1f,
                         .top_logprobs = kTop,
                         .prompt_length = kPrompt,
                         .output_length = kOutput,
                         .bias_count = 4,
                         .forbidden_count = 2};
  const Case cases[] = {{"greedy", 64, {}},
                        {"greedy", 256, {}},
                        {"temperature", 64, {.temperature = 0.8f}},
                        {"top_k", 64, {.temperature = 0.8f, .top_k = 50}},
                        {"top_p", 64, {.temperature = 0.8f, .top_p = 0.9f}},
                        {"top_p", 256, {.temperature = 0.8f, .top_p = 0.9f}},
                        {"top_k_top_p", 64, {.temperature = 0.8f, .top_p = 0.9f, .top_k = 50}},
                        {"min_p", 64, {.temperature = 0.8f, .min_p = 0.05f}},
                        {"top_logprobs", 64, {.top_logprobs = kTop}},
                        {"all_options", 64, all}};
  std::vector<std::vector<SampleRow>> host_rows;  // an outer vector that grows moves the inner ones, whose rows stay
  std::vector<Timed> samples;
  for (const Case& c : cases) {
    std::vector<SampleRow>& rows = host_rows.emplace_back(static_cast<size_t>(c.rows), c.row);
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].seed = i;
      rows[i].history_begin = static_cast<int32_t>(i) * (kPrompt + kOutput);
    }
    SampleBatch batch = tables;
    batch.rows = b.upload(rows);
    batch.host_rows = rows.data();
    batch.count = static_cast<int32_t>(c.rows);
    const bool top = c.row.top_logprobs > 0;
    samples.push_back(timed(std::string("sample_") + c.name, c.rows, 4, [&, batch, top](int64_t, TensorView of) {
      ops.sample(of, batch, ids.as<int32_t>(), logprob.as<float>(), top ? top_ids.slice_rows(0, of.rows) : TensorView{},
                 top ? top_logprobs.slice_rows(0, of.rows) : TensorView{});
    }));
  }
  table(b, "sampling over 128,256", samples, 500, "TB/s", settings.copy_gbs / 1e3, add);
}

// ---------------------------------------------------------------- elementwise

// Two sets of buffers in turn, together far larger than the L2. Bytes: every tensor once for each time it must be read or written.
void elementwise(const Settings& settings, Json& add) {
  struct Set {
    TensorView x, delta, sum, y;   // [T, H]
    TensorView qkv;                // [T, (Q + 2K) D]
    TensorView gate_up, dgate_up;  // [T, 2F]
    TensorView h, dh;              // [T, F]
  };
  Bench b;
  Ops& ops = *b.ops;
  std::vector<Set> sets;
  for (int i = 0; i < 2; ++i) {
    const auto rows_of = [&](int64_t cols) { return b.random(kRows, cols); };
    sets.push_back({rows_of(kHidden), rows_of(kHidden), rows_of(kHidden), rows_of(kHidden), rows_of(columns(kLinears[0])),
                    rows_of(2 * kFeed), rows_of(2 * kFeed), rows_of(kFeed), rows_of(kFeed)});
  }
  const TensorView w = b.random(1, kHidden);
  std::vector<int32_t> positions;
  for (int32_t i = 0; i < kRows; ++i) positions.push_back(i % 2048);
  const TensorView cos_sin = angles(b, positions);
  const Rope rope = {kHeads, cos_sin, {}, {}, kEps, {}, nullptr, {}, {}};

  const double hidden = 2.0 * kRows * kHidden, feed = 2.0 * kRows * kFeed,
               rotated = 2.0 * kRows * (kHeads.q_heads + kHeads.kv_heads) * kHeads.head_size,
               table_bytes = 4.0 * kRows * kHeads.head_size;
  const auto timed = [&](const char* name, double bytes, auto f) -> Timed {
    return {name, 4, bytes, [&, f] {
              for (size_t i = 0; i < 4; ++i) f(sets[i % 2]);
            }};
  };
  table(b, "elementwise, 8192 rows",
        {timed("add_rms_norm", 4 * hidden, [&](const Set& t) { ops.add_rms_norm(t.x, t.delta, w, kEps, t.sum, t.y); }),
         timed("rms_norm_backward", 4 * hidden, [&](const Set& t) { ops.rms_norm_backward(t.x, w, kEps, t.delta, t.sum); }),
         timed("rms_norm_and_backward", 5 * hidden,
               [&](const Set& t) { ops.rms_norm_and_backward(t.x, w, kEps, t.delta, t.sum, t.y); }),
         timed("rope", 2 * rotated + table_bytes, [&](const Set& t) { ops.rope(t.qkv, rope); }),
         timed("rope_backward", 2 * rotated + table_bytes,
               [&](const Set& t) { ops.rope_backward(t.qkv, kHeads, cos_sin, {}, {}, kEps, {}); }),
         timed("swiglu", 3 * feed, [&](const Set& t) { ops.swiglu(t.gate_up, t.h); }),
         timed("swiglu_backward", 5 * feed, [&](const Set& t) { ops.swiglu_backward(t.gate_up, t.dh, t.dgate_up); }),
         timed("swiglu_and_backward", 6 * feed, [&](const Set& t) { ops.swiglu_and_backward(t.gate_up, t.dh, t.dgate_up, t.h); })},
        500, "TB/s", settings.copy_gbs / 1e3, add);
}

// ---------------------------------------------------------------- linears

// TFLOP/s by the base product's operations; a forward's time has its shrink in it, dX's has not its ds. The graphs of one linear
// take turns for a third of a second each, which is long enough for the card to come to its power limit. (gate_up fades where it
// becomes its own gradient again and again; what the products read stays.)
void linears(const Settings& settings, Json& add) {
  constexpr int kLayers = 4;
  Bench b;
  auto& ops = static_cast<cuda::CudaOps&>(*b.ops);
  Batch batch;
  make_batch(b, batch, kRows, 1, settings.rank, kLayers, false);
  const LoraGroups& groups = batch.groups;
  const TensorView in = b.random(kRows, kFeed), out = b.random(kRows, 2 * kFeed), dy = b.random(kRows, 2 * kFeed),
                   dx = b.random(kRows, kFeed), gate_up = b.random(kRows, 2 * kFeed), h = b.random(kRows, kFeed),
                   s = b.random(kRows, 3 * settings.rank), ds = b.random(kRows, 3 * settings.rank);
  for (int i = 0; i < 4; ++i) {
    const LoraLinear& shape = kLinears[i];
    std::vector<TensorView> w;
    for (int l = 0; l < kLayers; ++l) w.push_back(b.random(columns(shape), shape.in, 0.02f));
    const auto narrow = [](TensorView t, int64_t cols) { return matrix(t.data, DType::bf16, kRows, cols); };
    const TensorView x = narrow(in, shape.in), y = narrow(out, columns(shape)), g = narrow(dy, columns(shape)),
                     to = narrow(dx, shape.in);
    must(ops.linear_lora_fused(x, w[0], {}, shape, groups, s, y));
    must(ops.linear_lora_backward_fused(g, w[0], shape, groups, ds, to));

    std::vector<Timed> all;
    const auto timed = [&](const char* suffix, auto f) {
      const double operations = 2.0 * static_cast<double>(kRows * shape.in * columns(shape));
      all.push_back({std::string("linear_") + kNames[i] + suffix, kLayers, operations, [&, f] {
                       for (int l = 0; l < kLayers; ++l) f(at_layer(i, l), w[static_cast<size_t>(l)]);
                     }});
    };
    timed("", [&](const LoraLinear& l, TensorView m) { ops.linear_lora(x, m, {}, l, groups, s, y); });
    timed("_dx", [&](const LoraLinear& l, TensorView m) { ops.linear_lora_backward(g, m, l, groups, ds, to); });
    if (i == 2) {
      timed("_swiglu", [&](const LoraLinear& l, TensorView m) { ops.linear_lora_swiglu(x, m, l, groups, s, y, h, true); });
      timed("_then_swiglu", [&](const LoraLinear& l, TensorView m) {
        ops.linear_lora(x, m, {}, l, groups, s, y);
        ops.swiglu(y, h);
      });
    }
    if (i == 3) {
      timed("_dx_swiglu",
            [&](const LoraLinear& l, TensorView m) { ops.linear_lora_swiglu_backward(g, m, l, groups, ds, gate_up, h); });
      timed("_dx_then_swiglu", [&](const LoraLinear& l, TensorView m) {
        ops.linear_lora_backward(g, m, l, groups, ds, h);
        ops.swiglu_and_backward(gate_up, h, gate_up, h);
      });
    }
    table(b, std::string("products of ") + kNames[i] + ", 8192 rows", all, 350.0 * static_cast<double>(all.size()), "TFLOP/s", 0,
          add);
  }
}

struct Mode {
  const char* name;
  void (*run)(const Settings&, Json&);
};
constexpr Mode kModes[] = {
    {"decode_layer", decode_layer}, {"lora", lora}, {"vocabulary", vocabulary}, {"elementwise", elementwise}, {"linears", linears}};

int usage(const char* program) {
  std::fprintf(stderr, "usage: %s [--rank R] [mode ...]\n  R: a multiple of 8 up to 128; modes:", program);
  for (const Mode& mode : kModes) std::fprintf(stderr, " %s", mode.name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  std::vector<Mode> modes;
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    if (text == "--rank" && i + 1 < argc) {
      char* end = nullptr;
      const long rank = std::strtol(argv[++i], &end, 10);
      if (*end != '\0' || rank < 8 || rank > 128 || rank % 8 != 0) return usage(argv[0]);
      settings.rank = static_cast<int>(rank);
      continue;
    }
    const auto* mode = std::find_if(std::begin(kModes), std::end(kModes), [&](const Mode& m) { return text == m.name; });
    if (mode == std::end(kModes)) return usage(argv[0]);
    modes.push_back(*mode);
  }
  if (modes.empty()) modes.assign(std::begin(kModes), std::end(kModes));

  Json add(settings.rank);
  settings.copy_gbs = copy_bandwidth();
  std::printf("%s: copy %.0f GB/s; rank %d\n", add.gpu.c_str(), settings.copy_gbs, settings.rank);
  add("copy_gbs", settings.copy_gbs);
  for (const Mode& mode : modes) mode.run(settings, add);
  add.print();
  return 0;
}
