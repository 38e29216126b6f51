// Kernels for AVX-512. Empty on other architectures.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#include "cpu/kernels_target.h"

#define LOQUETIER_ISA avx512
#define LOQUETIER_LANES 16
#define LOQUETIER_REGS 32
LOQUETIER_BEGIN_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#include "cpu/kernels_impl.h"
LOQUETIER_END_TARGET

namespace loquetier::cpu {

const Kernels* kernels_avx512() {
  static constexpr Kernels kTable = avx512::make_table("avx512");
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  return supported ? &kTable : nullptr;
}

}  // namespace loquetier::cpu

#else

namespace loquetier::cpu {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace loquetier::cpu

#endif
