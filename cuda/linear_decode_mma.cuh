// Instructions of the product of decode steps (linear_decode.cu): wgmma with W on the left, and its sums' way through shared
// memory.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace loquetier::cuda {

// c += W x^T of one 16-wide step, m 64 by n kN; both from shared memory, k contiguous, 128-byte swizzle.
template <class T, int kN>
__device__ inline void multiply_async(float (&c)[kN / 2], uint64_t w, uint64_t x) {
#define LOQUETIER_WGMMA(type, n, regs, wd, xd) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " regs ", %" #wd ", %" #xd ", 1, 1, 1, 0, 0;\n"
#define LOQUETIER_C8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kN == 16 && kBf16) {
    LOQUETIER_WGMMA("bf16", 16, "{%0,%1,%2,%3,%4,%5,%6,%7}", 8, 9) : LOQUETIER_C8(0) : "l"(w), "l"(x));
  } else if constexpr (kN == 16) {
    LOQUETIER_WGMMA("f16", 16, "{%0,%1,%2,%3,%4,%5,%6,%7}", 8, 9) : LOQUETIER_C8(0) : "l"(w), "l"(x));
  } else if constexpr (kN == 32 && kBf16) {
    LOQUETIER_WGMMA("bf16", 32, "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}", 16, 17)
        : LOQUETIER_C8(0), LOQUETIER_C8(8) : "l"(w), "l"(x));
  } else if constexpr (kN == 32) {
    LOQUETIER_WGMMA("f16", 32, "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}", 16, 17)
        : LOQUETIER_C8(0), LOQUETIER_C8(8) : "l"(w), "l"(x));
  } else if constexpr (kBf16) {
    static_assert(kN == 64);
    LOQUETIER_WGMMA("bf16", 64,
                    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                    "%29,%30,%31}", 32, 33)
        : LOQUETIER_C8(0), LOQUETIER_C8(8), LOQUETIER_C8(16), LOQUETIER_C8(24) : "l"(w), "l"(x));
  } else {
    static_assert(kN == 64);
    LOQUETIER_WGMMA("f16", 64,
                    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                    "%29,%30,%31}", 32, 33)
        : LOQUETIER_C8(0), LOQUETIER_C8(8), LOQUETIER_C8(16), LOQUETIER_C8(24) : "l"(w), "l"(x));
  }
#undef LOQUETIER_WGMMA
#undef LOQUETIER_C8
}

// Four 8 x 8 blocks of pairs along the columns, stored transposed: lane 8 b + i gives the address of column i of block b.
__device__ inline void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

}  // namespace loquetier::cuda
