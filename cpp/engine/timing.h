// Where the cost model begins: the speed of the device, measured at start, and the model's shape.
#pragma once

#include "model/base_weights.h"
#include "ops/ops.h"
#include "plan/cost_model.h"

namespace loquetier {

// Runs a few products of one layer: rows enough for the rate, one row for the bandwidth. A few milliseconds.
DeviceRates measure_rates(Ops& ops, const ModelWeights& weights);
ModelShape shape_of(const ModelConfig& config, DType dtype);
double mlp_share(const ModelConfig& config);  // of a layer's products: o, gate and up, down

// Rows of a piece of training whose part of a layer takes about a millisecond, a power of two in 32 .. 1024, at most max_rows.
int32_t slice_rows_for(const ModelShape& shape, const DeviceRates& rates, int64_t max_rows);

}  // namespace loquetier
