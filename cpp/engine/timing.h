// Where the cost model begins: the speed of the device, measured at start, and the model's shape.
#pragma once

#include "model/base_weights.h"
#include "ops/ops.h"
#include "plan/cost_model.h"

namespace loquetier {

// Runs a few products of one layer: rows enough for the rate, one row for the bandwidth; on a device of its own also passes of many
// sizes up to max_rows. A few milliseconds on the host, 0.12 s on an H200 at an 8B shape.
DeviceRates measure_rates(Ops& ops, const ModelWeights& weights, int64_t max_rows);
ModelShape shape_of(const ModelConfig& config, DType dtype);
double mlp_share(const ModelConfig& config);  // of a layer's products: o, gate and up, down

// How long a piece of training may take, as an arrival waits for it: under a millisecond on a device of its own. The host, where
// rows so few cost much more each (a third more time at 32 than at 128 rows, measured), has a tenth of the target per token, if
// that is more.
double slice_seconds(bool host_addressable, double tpot_seconds);
// Rows of a piece of training whose part of a layer takes no longer, a power of two in this range, at most max_rows.
constexpr int64_t kSmallestSlice = 32, kLargestSlice = 1024;
int32_t slice_rows_for(const ModelShape& shape, const DeviceRates& rates, double seconds, int64_t max_rows);
// Rows of requests that may share a step with a chunk of training.
int32_t slack_rows_for(int64_t max_batch_tokens, int64_t max_sequences);

}  // namespace loquetier
