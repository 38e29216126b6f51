// Kernels for what the compiler targets by default (SSE2 on x86-64, NEON on aarch64), and the choice between all of them.
#include "cpu/kernels.h"
#include "cpu/kernels_target.h"

#define LOQUETIER_ISA baseline
#define LOQUETIER_LANES 4
#if defined(__aarch64__)
#define LOQUETIER_REGS 32
#else
#define LOQUETIER_REGS 16
#endif
#include "cpu/kernels_impl.h"

namespace loquetier::cpu {

const Kernels* kernels_baseline() {
  static constexpr Kernels kTable = baseline::make_table("baseline");
  return &kTable;
}

const Kernels& select_kernels() {
  if (const Kernels* best = kernels_avx512()) return *best;
  if (const Kernels* next = kernels_avx2()) return *next;
  return *kernels_baseline();
}

}  // namespace loquetier::cpu
