// Attention of decodes beside cuDNN's, and LoRA kernels of the CUDA backend beside the base products of one layer of an 8B Llama
// shape (H 4096, F 14336, 32 query and 8 key heads of 128).
//   kernels [rank]                 prints tables and, as its last line, JSON
//   kernels attention              the first of them alone
//   kernels rank rows[+decodes] ...  the products at these numbers of rows, and a layer with one adapter; the decodes have eight
// Built and run as bench.cuh says.
// Method: CUDA graphs of several layers with weights of their own (so the L2 is cold), one without and one with adapters, replayed
// in turn; the LoRA figure is the difference of the medians. Ceilings (copy bandwidth, a large product) are measured in the same
// run. Data is random. "filled": the way of linear_lora that large batches take when base and LoRA cannot be one product; "1 GEMM":
// the kernel of that one product without adapters, less the base products.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench.cuh"

using namespace loquetier;
using namespace loquetier::bench;

namespace {

// Microseconds of a linear's product without adapters: through cuBLASLt and through the kernel that takes LoRA in, forward, then
// dX. A graph has `repeats` of them, with weights of their own; `times` replays.
std::vector<double> product_times(int index, int64_t rows, int repeats, int times) {
  Bench b;
  auto& ops = static_cast<cuda::CudaOps&>(*b.ops);
  const LoraLinear& linear = kLinears[index];
  const TensorView x = b.random(rows, linear.in), y = b.random(rows, columns(linear));
  std::vector<TensorView> w;
  for (int r = 0; r < repeats; ++r) w.push_back(b.random(columns(linear), linear.in, 0.02f));
  const auto each = [&](const std::function<void(TensorView)>& f) {
    return b.capture([&] { std::for_each(w.begin(), w.end(), f); });
  };
  std::vector<double> t = b.time({each([&](TensorView m) { ops.linear(x, m, {}, y); }),
                                  each([&](TensorView m) { must(ops.linear_lora_fused(x, m, {}, linear, {}, {}, y)); }),
                                  each([&](TensorView m) { ops.linear_backward(y, m, x, false); }),
                                  each([&](TensorView m) { must(ops.linear_lora_backward_fused(y, m, linear, {}, {}, x)); })},
                                 times);
  for (double& us : t) us /= repeats;
  return t;
}

// Each linear's product at 8192 rows, without adapters: cuBLASLt beside the kernel that takes LoRA in.
void products(Json& add) {
  const int64_t rows = 8192;
  std::printf("8192 rows, TFLOP/s of %-8s | %9s %9s | %9s %9s\n", "linear", "cuBLASLt", "1 GEMM", "dX", "1 GEMM");
  for (int i = 0; i < 4; ++i) {
    const LoraLinear& linear = kLinears[i];
    const std::vector<double> t = product_times(i, rows, 8, 300);
    const double work = 2.0 * static_cast<double>(rows * linear.in * columns(linear)) / 1e6;
    std::printf("%-27s | %9.0f %9.0f | %9.0f %9.0f\n", kNames[i], work / t[0], work / t[1], work / t[2], work / t[3]);
    add(std::string("tflops_") + kNames[i], work / t[0]);
    add(std::string("one_product_tflops_") + kNames[i], work / t[1]);
    add(std::string("dx_tflops_") + kNames[i], work / t[2]);
    add(std::string("dx_one_product_tflops_") + kNames[i], work / t[3]);
  }
}

// Attention of decodes in bf16, this kernel beside cuDNN: sequences over random pages of 16 of a pool that is many times the L2,
// every launch of a graph with pages of its own.
void decode_attention(Json& add) {
  struct Case {
    const char* name;
    int q_heads, kv_heads, head_size;
    std::vector<int> lengths;
  };
  const auto even = [](int sequences, int keys) { return std::vector<int>(static_cast<size_t>(sequences), keys); };
  std::vector<int> mixed, one_long = even(63, 512);
  for (int i = 0; i < 64; ++i) mixed.push_back(1 + (i * 2654435761u >> 7) % 4096);
  one_long.push_back(8192);
  std::vector<Case> cases;
  for (const auto& [sequences, keys] : std::vector<std::pair<int, int>>{{1, 512},
                                                                        {1, 8192},
                                                                        {1, 131072},
                                                                        {4, 2048},
                                                                        {8, 512},
                                                                        {8, 8192},
                                                                        {8, 32768},
                                                                        {16, 512},
                                                                        {16, 2048},
                                                                        {32, 512},
                                                                        {64, 64},
                                                                        {64, 512},
                                                                        {64, 2048},
                                                                        {64, 8192},
                                                                        {128, 512},
                                                                        {256, 512},
                                                                        {256, 2048}})
    cases.push_back({"", 32, 8, 128, even(sequences, keys)});
  cases.push_back({"1 .. 4096 keys", 32, 8, 128, mixed});
  cases.push_back({"63 x 512, 8192", 32, 8, 128, one_long});
  cases.push_back({"", 28, 4, 128, even(64, 2048)});
  cases.push_back({"", 32, 32, 128, even(64, 512)});
  cases.push_back({"", 32, 2, 128, even(64, 2048)});
  cases.push_back({"", 14, 2, 64, even(64, 2048)});
  cases.push_back({"", 32, 8, 64, even(64, 2048)});
  std::printf("attention of decodes, us | %9s %6s | %9s %6s\n", "ours", "GB/s", "cuDNN", "GB/s");
  Bench b;
  auto& ops = static_cast<cuda::CudaOps&>(*b.ops);
  const int page_size = 16, launches = 6;
  const int64_t elements = int64_t{1} << 30;
  const KvLayer kv = {b.random(elements >> 16, 1 << 16).data, b.random(elements >> 16, 1 << 16).data};
  for (const Case& c : cases) {
    const AttentionShape shape = {c.q_heads, c.kv_heads, c.head_size, 1 / std::sqrt(static_cast<float>(c.head_size))};
    const int64_t width = int64_t{c.kv_heads} * c.head_size, pool = elements / (page_size * width);
    const KvShape kv_shape = {pool, page_size, c.kv_heads, c.head_size};
    const auto sequences = static_cast<int64_t>(c.lengths.size());
    const TensorView q = b.random(sequences, int64_t{c.q_heads} * c.head_size),
                     out = b.random(sequences, int64_t{c.q_heads} * c.head_size);
    std::vector<int32_t> order(static_cast<size_t>(pool)), begin, rows(c.lengths.size(), 1),
        keys(c.lengths.begin(), c.lengths.end());
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(1);
    std::shuffle(order.begin(), order.end(), random);
    for (int32_t i = 0; i < sequences; ++i) begin.push_back(i);
    PagedBatch batch;
    batch.sequences = batch.decodes = static_cast<int32_t>(sequences);
    batch.max_pages = (*std::max_element(keys.begin(), keys.end()) + page_size - 1) / page_size;
    batch.row_begin = b.upload(begin), batch.rows = b.upload(rows), batch.kv_len = b.upload(keys);
    batch.host_row_begin = begin.data(), batch.host_rows = rows.data(), batch.host_kv_len = keys.data();
    std::vector<PagedBatch> batches(launches, batch);
    size_t next = 0;
    for (PagedBatch& one : batches) {
      std::vector<int32_t> table(c.lengths.size() * static_cast<size_t>(batch.max_pages));
      for (int32_t& page : table) page = order[next++ % order.size()];
      one.page_table = b.upload(table);
    }
    const auto ours_graph = b.capture([&] {
      for (const PagedBatch& one : batches) ops.attention_paged(q, kv, kv_shape, one, shape, out);
    });
    const auto cudnn_graph = b.capture([&] {
      for (const PagedBatch& one : batches) ops.attention_paged_by_cudnn(q, kv, kv_shape, one, shape, out);
    });
    const std::vector<double> t = b.time({ours_graph, cudnn_graph}, 20);
    const double bytes = 4.0 * static_cast<double>(width) * std::accumulate(c.lengths.begin(), c.lengths.end(), 0.0);
    char name[64];
    if (c.name[0] != '\0') std::snprintf(name, sizeof(name), "%s", c.name);
    else std::snprintf(name, sizeof(name), "%dx%d", static_cast<int>(sequences), c.lengths[0]);
    char heads[32] = "";
    if (c.q_heads != 32 || c.kv_heads != 8 || c.head_size != 128)
      std::snprintf(heads, sizeof(heads), " %d/%d/%d", c.q_heads, c.kv_heads, c.head_size);
    const double ours = t[0] / launches, cudnn = t[1] / launches;
    std::printf("%-24s | %9.1f %6.0f | %9.1f %6.0f\n", (std::string(name) + heads).c_str(), ours, bytes / ours / 1e3, cudnn,
                bytes / cudnn / 1e3);
    add("attention_us_" + (std::string(name) + heads), ours);
    add("attention_cudnn_us_" + (std::string(name) + heads), cudnn);
  }
}

// Microseconds at a number of rows: each linear's product through cuBLASLt and through the kernel that takes LoRA in, forward and
// dX; then all four with LoRA, one adapter on all rows but the last `decodes`, which belong to eight others.
void at_rows(int64_t rows, int decodes, int rank, Json& add) {
  const std::string suffix = "_us_" + std::to_string(rows);
  std::printf("%5lld", static_cast<long long>(rows));
  double sums[4] = {};
  for (int i = 0; i < 4; ++i) {
    const std::vector<double> t = product_times(i, rows, 3, 20);
    const char* ways[] = {"", "one_product_", "dx_", "dx_one_product_"};
    std::printf(" |");
    for (int way = 0; way < 4; ++way) {
      std::printf(" %5.0f", t[static_cast<size_t>(way)]);
      add(ways[way] + std::string(kNames[i]) + suffix, t[static_cast<size_t>(way)]);
      sums[way] += t[static_cast<size_t>(way)];
    }
  }
  Bench b;
  Batch batch;
  make_batch(b, batch, rows, decodes > 0 ? 9 : 1, rank, 1, false);
  if (decodes > 0) {
    for (int g = 0; g < 9; ++g) {
      LoraGroup& group = batch.host[static_cast<size_t>(g)];
      const int64_t first = rows - decodes + int64_t{decodes} * (g - 1) / 8, next = rows - decodes + int64_t{decodes} * g / 8;
      group.row_begin = static_cast<int32_t>(g == 0 ? 0 : first);
      group.rows = static_cast<int32_t>(g == 0 ? rows - decodes : next - first);
    }
    batch.groups.groups = b.upload(batch.host);
  }
  const TensorView x = b.random(rows, kHidden), wide_x = b.random(rows, kFeed), y = b.random(rows, 2 * kFeed),
                   s = b.random(rows, 3 * rank);
  std::vector<TensorView> w;
  for (const LoraLinear& linear : kLinears) w.push_back(b.random(columns(linear), linear.in, 0.02f));
  const auto each = [&](const std::function<void(const LoraLinear&, TensorView, TensorView, TensorView)>& f) {
    for (int i = 0; i < 4; ++i)
      f(at_layer(i, 0), i == 3 ? wide_x : x, w[static_cast<size_t>(i)], matrix(y.data, DType::bf16, rows, columns(kLinears[i])));
  };
  const auto layer = [&] {
    each([&](const LoraLinear& l, TensorView in, TensorView m, TensorView out) {
      b.ops->linear_lora(in, m, {}, l, batch.groups, s, out);
    });
  };
  const auto base = [&] {
    each([&](const LoraLinear&, TensorView in, TensorView m, TensorView out) { b.ops->linear(in, m, {}, out); });
  };
  const auto shrink = [&] {
    each([&](const LoraLinear& l, TensorView in, TensorView, TensorView) { b.ops->lora_shrink(l, batch.groups, in, s); });
  };
  const std::vector<double> t = b.time({b.capture(base), b.capture(layer), b.capture(shrink)}, 30);
  // Launches one by one: what the host needs.
  const int times = 10;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) layer();
  const double host = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() * 1e6 / times;
  b.ops->device().synchronize();
  std::printf(" | %6.0f %6.0f %6.0f %6.0f | %6.0f %6.0f %6.0f | %5.0f\n", sums[0], sums[1], sums[2], sums[3], t[0], t[1], t[2],
              host);
  const std::string mixed = decodes > 0 ? "mixed_" : "";
  add(mixed + "layer_base" + suffix, t[0]);
  add(mixed + "layer_lora" + suffix, t[1]);
  add(mixed + "layer_shrink" + suffix, t[2]);
  add(mixed + "layer_host" + suffix, host);
}

}  // namespace

int main(int argc, char** argv) {
  const bool attention_alone = argc > 1 && std::string(argv[1]) == "attention";
  const int rank = argc > 1 && !attention_alone ? std::atoi(argv[1]) : 16;
  Json add(rank);
  const double copy_gbs = copy_bandwidth();
  {
    Bench b;
    const TensorView x = b.random(8192, 8192), w = b.random(8192, 8192), y = b.random(8192, 8192);
    const auto product = b.time({b.capture([&] { b.ops->linear(x, w, {}, y); })});
    const double tflops = 2.0 * 8192 * 8192 * 8192 / product[0] / 1e6;
    std::printf("%s: product %.0f TFLOP/s, copy %.0f GB/s; rank %d\n", add.gpu.c_str(), tflops, copy_gbs, rank);
    add("product_tflops", tflops);
    add("copy_gbs", copy_gbs);
  }

  if (argc > 2) {
    std::printf(
        "us: cuBLASLt, 1 GEMM, dX, 1 GEMM of qkv | o | gate_up | down | all four | a layer: cuBLASLt, LoRA, shrink | host\n");
    for (int i = 2; i < argc; ++i) {
      const std::string text = argv[i];  // rows, or rows+decodes
      const size_t plus = text.find('+');
      const int decodes = plus == std::string::npos ? 0 : std::atoi(text.c_str() + plus + 1);
      at_rows(std::atoi(text.c_str()) + decodes, decodes, rank, add);
    }
  } else {
    decode_attention(add);
  }
  if (argc > 2 || attention_alone) {
    add.print();
    return 0;
  }
  products(add);
  std::printf("%6s %9s | %9s %9s %7s | %9s %9s %9s %9s %9s\n", "rows", "adapters", "base us", "LoRA us", "%", "1 GEMM", "filled",
              "3 calls", "shrink", "expand");
  const int cases[][3] = {{64, 1, 4},   {64, 8, 4},   {64, 64, 4},  {16, 16, 4},  {256, 8, 4},
                          {2048, 4, 2}, {8192, 1, 2}, {8192, 4, 2}, {8192, 16, 2}};
  for (const auto& c : cases) {
    const int64_t rows = c[0];
    const int adapters = c[1], layers = c[2];
    Bench b;
    Batch batch;
    make_batch(b, batch, rows, adapters, rank, layers, false);
    std::vector<TensorView> w;
    for (int l = 0; l < layers; ++l) {
      for (const LoraLinear& linear : kLinears) w.push_back(b.random(columns(linear), linear.in, 0.02f));
    }
    const TensorView x = b.random(rows, kHidden), wide_x = b.random(rows, kFeed), y = b.random(rows, 2 * kFeed),
                     s = b.random(rows, 3 * rank);
    const auto each = [&](const std::function<void(const LoraLinear&, TensorView, TensorView, TensorView)>& f) {
      for (int l = 0; l < layers; ++l) {
        for (int i = 0; i < 4; ++i) {
          const LoraLinear linear = at_layer(i, l);
          f(linear, i == 3 ? wide_x : x, w[static_cast<size_t>(l * 4 + i)], matrix(y.data, DType::bf16, rows, columns(linear)));
        }
      }
    };
    Ops& ops = *b.ops;
    const auto base = b.capture(
        [&] { each([&](const LoraLinear&, TensorView in, TensorView m, TensorView out) { ops.linear(in, m, {}, out); }); });
    const auto fused = b.capture([&] {
      each([&](const LoraLinear& l, TensorView in, TensorView m, TensorView out) {
        ops.linear_lora(in, m, {}, l, batch.groups, s, out);
      });
    });
    const auto three = b.capture([&] {
      each([&](const LoraLinear& l, TensorView in, TensorView m, TensorView out) {
        ops.linear(in, m, {}, out);
        ops.lora_shrink(l, batch.groups, in, s);
        ops.lora_expand(l, batch.groups, s, out);
      });
    });
    const auto shrink = b.capture([&] {
      each([&](const LoraLinear& l, TensorView in, TensorView, TensorView) { ops.lora_shrink(l, batch.groups, in, s); });
    });
    const auto expand = b.capture([&] {
      each([&](const LoraLinear& l, TensorView, TensorView, TensorView out) { ops.lora_expand(l, batch.groups, s, out); });
    });
    std::vector<cudaGraphExec_t> graphs = {base, fused, three};
    if (rows >= 512) {
      auto& cuda_ops = static_cast<cuda::CudaOps&>(ops);
      graphs.push_back(b.capture([&] {
        each([&](const LoraLinear& l, TensorView in, TensorView m, TensorView out) {
          must(cuda_ops.linear_lora_fused(in, m, {}, l, {}, s, out));
        });
      }));
      graphs.push_back(b.capture([&] {
        each([&](const LoraLinear& l, TensorView in, TensorView m, TensorView out) {
          ops.lora_shrink(l, batch.groups, in, s);
          cuda_ops.linear_lora_filled(in, m, {}, l, batch.groups, s, out);
        });
      }));
    }
    std::vector<double> t = b.time(graphs);
    t.resize(5, t[0]);
    const std::vector<double> alone = b.time({shrink, expand}, 50);
    for (double& v : t) v /= layers;
    const double lora = t[1] - t[0];
    std::printf("%6lld %9d | %9.1f %9.1f %6.1f%% | %9.1f %9.1f %9.1f %9.1f %9.1f\n", static_cast<long long>(rows), adapters, t[0],
                lora, 100 * lora / t[0], t[3] - t[0], t[4] - t[0], t[2] - t[0], alone[0] / layers, alone[1] / layers);
    const std::string name = std::to_string(rows) + "x" + std::to_string(adapters);
    add("base_us_" + name, t[0]);
    add("lora_us_" + name, lora);
    add("three_calls_us_" + name, t[2] - t[0]);
    if (rows >= 512) {
      add("one_product_us_" + name, t[3] - t[0]);
      add("filled_us_" + name, t[4] - t[0]);
    }
  }

  // What ds with dB, and dA, must read, at the bandwidth of the copy: dy once, x once.
  double dy_us = 0, x_us = 0;
  for (const LoraLinear& linear : kLinears) {
    dy_us += 8192.0 * 2 * static_cast<double>(columns(linear)) / copy_gbs / 1e3;
    x_us += 8192.0 * 2 * static_cast<double>(linear.in) / copy_gbs / 1e3;
  }
  std::printf(
      "backward, 8192 rows, us a layer; dy once %.1f, x once %.1f (apart: dX of the base and of LoRA as two ops)\n"
      "%9s | %9s | %9s %9s %9s | %9s %6s | %9s %9s %9s\n",
      dy_us, x_us, "adapters", "base dX", "ds, dB", "dA", "dx", "LoRA", "%", "apart", "dX fused", "1 GEMM");
  for (const int adapters : {1, 4, 16}) {
    const int64_t rows = 8192;
    const int layers = 2;
    Bench b;
    Batch batch;
    make_batch(b, batch, rows, adapters, rank, layers, true);
    std::vector<TensorView> w;
    for (int l = 0; l < layers; ++l) {
      for (const LoraLinear& linear : kLinears) w.push_back(b.random(columns(linear), linear.in, 0.02f));
    }
    const TensorView x = b.random(rows, kFeed), dy = b.random(rows, 2 * kFeed), dx = b.random(rows, kFeed),
                     s = b.random(rows, 3 * rank), ds = b.random(rows, 3 * rank);
    Ops& ops = *b.ops;
    const auto each = [&](const std::function<void(const LoraLinear&, TensorView, TensorView, TensorView, TensorView)>& f) {
      for (int l = 0; l < layers; ++l) {
        for (int i = 0; i < 4; ++i) {
          const LoraLinear linear = at_layer(i, l);
          f(linear, matrix(x.data, DType::bf16, rows, linear.in), w[static_cast<size_t>(l * 4 + i)],
            matrix(dy.data, DType::bf16, rows, columns(linear)), matrix(dx.data, DType::bf16, rows, linear.in));
        }
      }
    };
    const auto base = b.capture([&] {
      each([&](auto&, TensorView, TensorView m, TensorView g, TensorView out) { ops.linear_backward(g, m, out, false); });
    });
    const auto all = b.capture([&] {
      each([&](auto& l, TensorView in, TensorView m, TensorView g, TensorView out) {
        ops.lora_backward(l, batch.groups, in, s, g, ds);
        ops.linear_lora_backward(g, m, l, batch.groups, ds, out);
      });
    });
    const auto apart = b.capture([&] {
      each([&](auto& l, TensorView in, TensorView m, TensorView g, TensorView out) {
        ops.lora_backward(l, batch.groups, in, s, g, ds);
        ops.linear_backward(g, m, out, false);
        ops.lora_backward_x(l, batch.groups, ds, out);
      });
    });
    auto& cuda_ops = static_cast<cuda::CudaOps&>(ops);
    const auto fused_dx = [&](const LoraGroups& groups) {
      return b.capture([&] {
        each([&](auto& l, TensorView, TensorView m, TensorView g, TensorView out) {
          must(cuda_ops.linear_lora_backward_fused(g, m, l, groups, ds, out));
        });
      });
    };
    const auto with_lora = fused_dx(batch.groups), without = fused_dx({});
    const auto only_sb = b.capture([&] {
      each([&](auto& l, TensorView, TensorView, TensorView g, TensorView) { ops.lora_backward(l, batch.groups, {}, s, g, ds); });
    });
    const auto only_a = b.capture([&] {
      each([&](auto& l, TensorView in, TensorView, TensorView, TensorView) {
        ops.lora_backward_weights(l, batch.groups, in, {}, {}, ds);
      });
    });
    const auto only_x = b.capture([&] {
      each([&](auto& l, TensorView, TensorView, TensorView, TensorView out) { ops.lora_backward_x(l, batch.groups, ds, out); });
    });
    std::vector<double> t = b.time({base, all, apart, with_lora, without}), alone = b.time({only_sb, only_a, only_x}, 60);
    for (double& v : t) v /= layers;
    for (double& v : alone) v /= layers;
    std::printf("%9d | %9.1f | %9.1f %9.1f %9.1f | %9.1f %5.1f%% | %9.1f %9.1f %9.1f\n", adapters, t[0], alone[0], alone[1],
                alone[2], t[1] - t[0], 100 * (t[1] - t[0]) / t[0], t[2] - t[0], t[3] - t[0], t[4] - t[0]);
    const std::string name = std::to_string(adapters);
    add("base_dx_us_" + name, t[0]);
    add("lora_backward_us_" + name, t[1] - t[0]);
    add("lora_backward_apart_us_" + name, t[2] - t[0]);
    add("dx_fused_us_" + name, t[3] - t[0]);
    add("dx_one_product_us_" + name, t[4] - t[0]);
    add("ds_db_us_" + name, alone[0]);
    add("da_us_" + name, alone[1]);
    add("dx_us_" + name, alone[2]);
  }
  add.print();
  return 0;
}
