// Whether the CUDA backend can be used in this process, asked without throwing: for device = "auto" and for build_report().
// make_cuda_ops() itself is declared in ops/ops.h. Implemented by cpp/ops/cuda_loader.cpp, or cuda/no_cuda.cpp in a build without
// CUDA.
#pragma once

#include <string>

namespace loquetier {

struct CudaProbe {
  bool built = false;  // this build has a CUDA library
  int devices = 0;     // usable ones; 0 when the library, the driver or a device is missing
  std::string detail;  // one line: what was found, or what is missing
};

CudaProbe probe_cuda();

}  // namespace loquetier
