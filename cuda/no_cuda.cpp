// The CUDA backend of a build without one: every entry says so. CMake compiles this file instead of cpp/ops/cuda_loader.cpp.
#include "ops/cuda_loader.h"
#include "ops/ops.h"

namespace loquetier {

namespace {
constexpr const char* kNoCuda =
    "this build has no CUDA backend; build it with the CUDA toolkit 12.8 or newer installed (-DLOQUETIER_CUDA=ON), or use "
    "device=\"cpu\"";
}

CudaProbe probe_cuda() { return {false, 0, kNoCuda}; }

std::unique_ptr<Ops> make_cuda_ops(int, DType, bool) { throw DeviceError(kNoCuda); }

}  // namespace loquetier
