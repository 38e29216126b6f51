// Kernels for AVX2 and FMA (x86-64 since 2013). Empty on other architectures.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#include "cpu/kernels_target.h"

#define LOQUETIER_ISA avx2
#define LOQUETIER_LANES 8
#define LOQUETIER_REGS 16
LOQUETIER_BEGIN_TARGET("avx2,fma")
#include "cpu/kernels_impl.h"
LOQUETIER_END_TARGET

namespace loquetier::cpu {

const Kernels* kernels_avx2() {
  static constexpr Kernels kTable = avx2::make_table("avx2");
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? &kTable : nullptr;
}

}  // namespace loquetier::cpu

#else

namespace loquetier::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace loquetier::cpu

#endif
