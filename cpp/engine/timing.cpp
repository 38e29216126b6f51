#include "engine/timing.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

namespace loquetier {

namespace {

constexpr double kProbeFlops = 2e8;       // of the host's rate: some milliseconds
constexpr double kDeviceFlops = 2e11;     // of a device's: under a millisecond
constexpr double kSliceSeconds = 0.8e-3;  // of a slice on a device, so that one is in any case under a millisecond
constexpr double kHostSliceShare = 0.1;   // of the target per token
constexpr int kProbeRank = 16;

double layer_parameters(const ModelConfig& c) {
  const double h = static_cast<double>(c.hidden_size), q = double{1} * c.num_heads * c.head_size;
  return h * static_cast<double>(c.qkv_columns()) + q * h + 3 * h * static_cast<double>(c.intermediate_size);
}

// Row counts to measure: every size up to where one more no longer matters much, then every fourth.
std::vector<int64_t> pass_sizes() {
  constexpr int64_t kEvery = 1280;
  std::vector<int64_t> sizes;
  for (int64_t rows = StepWork::kPassRows; rows <= StepWork::kPassRows * StepWork::kPassSizes;) {
    sizes.push_back(rows);
    rows += rows < kEvery ? StepWork::kPassRows : 4 * StepWork::kPassRows;
  }
  return sizes;
}

// What the products of one layer reach, with an adapter on every row: they are computed in tiles, and tiles in rounds over the
// processors, so their rate rises and falls with the rows. Some tens of milliseconds.
std::vector<std::pair<double, double>> rates_by_rows(Ops& ops, const ModelWeights& weights, int64_t max_rows) {
  const ModelConfig& config = weights.config;
  const LayerWeights& layer = weights.table.layers.front();
  const std::pair<LoraLinear, TensorView> linears[] = {{lora_linear(config, site_of(0, Site::qkv)), layer.qkv.front().w},
                                                       {lora_linear(config, site_of(0, Site::o)), layer.o.front().w},
                                                       {lora_linear(config, site_of(0, Site::gate_up)), layer.gate_up.front().w},
                                                       {lora_linear(config, site_of(0, Site::down)), layer.down.front().w}};
  Device& device = ops.device();
  const DType dtype = ops.compute_dtype();
  int64_t in = 0, out = 0, parts = 0;
  double per_row = 0;
  for (const auto& [linear, w] : linears) {
    in = std::max(in, w.cols);
    out = std::max(out, w.rows);
    parts = std::max<int64_t>(parts, linear.parts);
    per_row += 2.0 * static_cast<double>(w.size());
  }
  const int64_t columns = parts * kProbeRank;
  const std::vector<int64_t> sizes = pass_sizes();
  const size_t row_bytes = static_cast<size_t>(in + out + columns) * size_of(dtype);
  const int64_t most = std::min({sizes.back(), max_rows, static_cast<int64_t>(device.free_bytes() / 2 / row_bytes)});
  if (most < sizes.front()) return {};
  const Buffer x(device, static_cast<size_t>(most * in) * size_of(dtype)),
      y(device, static_cast<size_t>(most * out) * size_of(dtype)), s(device, static_cast<size_t>(most * columns) * size_of(dtype)),
      ab(device, static_cast<size_t>(columns * in + out * kProbeRank) * size_of(dtype));  // A of all parts, then B of all parts
  device.zero(x.data(), x.bytes());
  device.zero(ab.data(), ab.bytes());
  std::vector<LoraSite> sites(std::size(linears));
  for (const auto& [linear, w] : linears) {
    const TensorView a = ab.view(dtype, columns, linear.in);
    const TensorView b = ab.view(dtype, out, kProbeRank, static_cast<size_t>(columns * in) * size_of(dtype));
    int64_t column = 0;
    for (int p = 0; p < linear.parts; ++p) {
      sites[static_cast<size_t>(linear.site)].part[p] = {a.at(p * kProbeRank), b.at(column), kProbeRank, 1.0f};
      column += linear.out[p];
    }
  }
  const Buffer site_table(device, sites.size() * sizeof(LoraSite)), group_table(device, sizeof(LoraGroup));
  device.copy_to_device(site_table.data(), sites.data(), site_table.bytes());
  std::vector<std::pair<double, double>> rates;
  for (const int64_t rows : sizes) {
    if (rows > most) break;
    LoraGroup group;
    group.rows = static_cast<int32_t>(rows);
    group.sites = static_cast<const LoraSite*>(site_table.data());
    group.host_sites = sites.data();
    device.copy_to_device(group_table.data(), &group, sizeof(group));
    const LoraGroups groups{static_cast<const LoraGroup*>(group_table.data()), &group, 1, static_cast<int32_t>(columns), nullptr};
    const auto run = [&](int times) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < times; ++i) {
        for (const auto& [linear, w] : linears) {
          ops.linear_lora(x.view(dtype, rows, w.cols), w, {}, linear, groups, s.view(dtype, rows, columns),
                          y.view(dtype, rows, w.rows));
        }
      }
      device.synchronize();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / times;
    };
    run(1);
    rates.emplace_back(static_cast<double>(rows), per_row * static_cast<double>(rows) / std::max(1e-9, run(3)));
  }
  return rates;
}

}  // namespace

DeviceRates measure_rates(Ops& ops, const ModelWeights& weights, int64_t max_rows) {
  Device& device = ops.device();
  const TensorView w = weights.table.layers.front().gate_up.front().w;
  const DType dtype = ops.compute_dtype();
  const double per_row = 2.0 * static_cast<double>(w.size());
  const double flops = device.host_addressable() ? kProbeFlops : kDeviceFlops;
  // Takes at most half of what is free for the moment.
  const auto fit = static_cast<int64_t>(device.free_bytes() / 2 / (static_cast<size_t>(w.rows + w.cols) * size_of(dtype)));
  const auto rows = std::clamp<int64_t>(static_cast<int64_t>(flops / per_row), 1, std::clamp<int64_t>(fit, 1, 4096));
  const Buffer in(device, static_cast<size_t>(rows * w.cols) * size_of(dtype)),
      out(device, static_cast<size_t>(rows * w.rows) * size_of(dtype));
  device.zero(in.data(), in.bytes());
  const auto seconds = [&](int64_t n, int repeats) {
    const TensorView x = in.view(dtype, n, w.cols), y = out.view(dtype, n, w.rows);
    const auto run = [&](int times) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < times; ++i) ops.linear(x, w, {}, y);
      device.synchronize();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / times;
    };
    run(1);  // loads code, chooses an algorithm
    return std::max(1e-9, run(repeats));
  };
  DeviceRates rates;
  rates.flops_per_second = per_row * static_cast<double>(rows) / seconds(rows, 2);
  rates.bytes_per_second = static_cast<double>(w.size()) * static_cast<double>(size_of(dtype)) / seconds(1, 4);
  if (device.host_addressable()) return rates;
  rates.launch_seconds = 2e-5;  // of a layer: some ten kernels
  rates.by_rows = rates_by_rows(ops, weights, max_rows);
  return rates;
}

ModelShape shape_of(const ModelConfig& c, DType dtype) {
  ModelShape shape;
  shape.layers = static_cast<double>(c.num_layers);
  shape.layer_parameters = shape.layers * layer_parameters(c);
  shape.hidden = static_cast<double>(c.hidden_size);
  shape.vocabulary_parameters = shape.hidden * static_cast<double>(c.vocab_size);
  shape.q_columns = double{1} * c.num_heads * c.head_size;
  shape.kv_columns = 2.0 * c.num_kv_heads * c.head_size;
  shape.bytes_per_value = static_cast<double>(size_of(dtype));
  return shape;
}

double mlp_share(const ModelConfig& c) {
  return 1 - static_cast<double>(c.hidden_size) * static_cast<double>(c.qkv_columns()) / layer_parameters(c);
}

double slice_seconds(bool host_addressable, double tpot_seconds) {
  return host_addressable ? std::max(kSliceSeconds, kHostSliceShare * tpot_seconds) : kSliceSeconds;
}

int32_t slice_rows_for(const ModelShape& shape, const DeviceRates& rates, double seconds, int64_t max_rows) {
  const double row = 2 * shape.layer_parameters / shape.layers / rates.flops_per_second;
  int64_t rows = kSmallestSlice;
  while (rows < kLargestSlice && static_cast<double>(2 * rows) * row <= seconds) rows *= 2;
  return static_cast<int32_t>(std::min(rows, max_rows));
}

int32_t slack_rows_for(int64_t max_batch_tokens, int64_t max_sequences) {
  const int64_t slack = std::max(std::min<int64_t>(max_batch_tokens / 8, 1024), max_sequences + 64);
  return static_cast<int32_t>(std::min(slack, max_batch_tokens));
}

}  // namespace loquetier
