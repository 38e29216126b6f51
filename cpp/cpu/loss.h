// Log-softmax of one row of logits, shared by losses and sampling.
#pragma once

#include "cpu/kernels.h"

namespace loquetier::cpu {

// log of the sum of exp(logits), stable; sums of exponentials in double. NaN when a logit is NaN or +inf.
double log_partition(const Kernels& kernels, const float* logits, int64_t n);
float log_probability(float logit, double partition);

}  // namespace loquetier::cpu
