// What this build can do, for bug reports and for `python -m loquetier_core`.
#include <sstream>
#include <thread>

#include "loquetier/engine.h"
#include "ops/cuda_loader.h"
#include "ops/ops.h"

namespace loquetier {

namespace {

std::string cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  std::string features = "x86-64";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) features += " avx2 fma";
  if (__builtin_cpu_supports("avx512f")) features += " avx512f";
  return features;
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

}  // namespace

std::string build_report() {
  std::ostringstream out;
  out << "loquetier-core " << LOQUETIER_VERSION << "\n";
  out << "compiler:  " << __VERSION__ << "\n";
  out << "cpu:       " << cpu_features() << ", " << std::thread::hardware_concurrency() << " processors\n";
  out << "cuda:      " << probe_cuda().detail << "\n";
  return out.str();
}

}  // namespace loquetier
