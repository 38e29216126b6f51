#include "engine/timing.h"

#include <algorithm>
#include <chrono>

namespace loquetier {

namespace {

constexpr double kProbeFlops = 2e8;       // of the host's rate: some milliseconds
constexpr double kDeviceFlops = 2e11;     // of a device's: under a millisecond
constexpr double kSliceSeconds = 0.7e-3;  // of a slice, so that one is in any case under a millisecond
constexpr int64_t kSmallestSlice = 32, kLargestSlice = 1024;

double layer_parameters(const ModelConfig& c) {
  const double h = static_cast<double>(c.hidden_size), q = double{1} * c.num_heads * c.head_size;
  return h * static_cast<double>(c.qkv_columns()) + q * h + 3 * h * static_cast<double>(c.intermediate_size);
}

}  // namespace

DeviceRates measure_rates(Ops& ops, const ModelWeights& weights) {
  Device& device = ops.device();
  const TensorView w = weights.table.layers.front().gate_up.front().w;
  const DType dtype = ops.compute_dtype();
  const double per_row = 2.0 * static_cast<double>(w.size());
  const double flops = device.host_addressable() ? kProbeFlops : kDeviceFlops;
  const auto rows = std::clamp<int64_t>(static_cast<int64_t>(flops / per_row), 1, 4096);
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
  if (!device.host_addressable()) rates.launch_seconds = 2e-5;  // of a layer: some ten kernels
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

int32_t slice_rows_for(const ModelShape& shape, const DeviceRates& rates, int64_t max_rows) {
  const double row = 2 * shape.layer_parameters / shape.layers / rates.flops_per_second;
  int64_t rows = kSmallestSlice;
  while (rows < kLargestSlice && static_cast<double>(2 * rows) * row <= kSliceSeconds) rows *= 2;
  return static_cast<int32_t>(std::min(rows, max_rows));
}

}  // namespace loquetier
