// Checking CUDA, cuBLASLt and arguments. A failed call becomes a DeviceError (out of memory: OutOfMemory) that quotes the call and
// its place. With the environment variable LOQUETIER_CUDA_SYNC set, every launch is followed by a synchronisation, so that an error
// inside a kernel is reported at its own launch.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <source_location>

#include "core/tensor.h"

namespace loquetier::cuda {

void check(cudaError_t status, const char* call, std::source_location where = std::source_location::current());
void check(cublasStatus_t status, const char* call, std::source_location where = std::source_location::current());
void check_launch(cudaStream_t stream, std::source_location where);
bool launches_are_synchronized();  // LOQUETIER_CUDA_SYNC is set

// "[op] tensor: expected [rows, cols] dtype, got …". A negative number accepts anything; zero rows need no data.
void expect(const char* op, const char* tensor, const TensorView& view, DType dtype, int64_t rows, int64_t cols);
// The same for a [n] vector that may be given as one row; empty() is accepted when `optional`.
void expect_vector(const char* op, const char* tensor, const TensorView& view, DType dtype, int64_t n, bool optional = false);

}  // namespace loquetier::cuda
