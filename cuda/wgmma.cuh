// Warpgroup products (wgmma m64nNk16, 16-bit operands in shared memory, f32 sums in registers) and the staging of their operands by
// cp.async. Used by the LoRA passes over many rows (lora_tall.cu, lora_wide.cu).
//
// Two kinds of operand, both either way round (the sum runs along the contiguous side, or across it):
// * A wide tile: panels [rows][64] of 128-byte rows, the 16-byte units of a row permuted by the row (unit u lies at u ^ (row & 7),
//   the 128-byte swizzle), a panel on 1024 bytes. As rows x k: the sum runs along the row. As k x columns: down the rows.
// * A thin matrix: unit (row, u), 8 elements, at (u * kRows + row) * 16 bytes; no swizzle.
// Sums of a warpgroup's 128 threads: thread t = 32 w + 4 g + q holds rows 16 w + g and 16 w + g + 8, columns 8 n + 2 q and + 1, as
// sum[4 n .. 4 n + 3] in that order.
//
// Order of memory: a thread that wrote operands waits for its copies and calls async_fence() before the barrier behind which
// any thread multiplies; stages are written again only behind a barrier after finish_products().
#pragma once

#include "async.cuh"
#include "cluster.cuh"

namespace loquetier::cuda {

constexpr int kWarpgroup = 128;

// ---------------------------------------------------------------- copies

// A wide tile of kRows rows and 64 kPanels columns, by kThreads threads; rows and columns past the end become zero.
template <int kRows, int kPanels, int kThreads>
__device__ inline void load_wide(uint32_t to, const void* from, int64_t ld, int rows, int columns) {
  constexpr int kUnits = 8 * kPanels, kRowsAtOnce = kThreads / kUnits;
  static_assert(kThreads % kUnits == 0 && kRows % kRowsAtOnce == 0);
  const int unit = static_cast<int>(threadIdx.x) % kUnits, first = static_cast<int>(threadIdx.x) / kUnits;
  const uint16_t* p = static_cast<const uint16_t*>(from) + first * ld + unit * 8;
  const bool column_real = unit * 8 < columns;
  const uint32_t panel = to + static_cast<uint32_t>(unit / 8 * (kRows * 128));
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    const bool real = column_real && row < rows;
    copy16(panel + static_cast<uint32_t>(row * 128 + ((unit % 8) ^ (row & 7)) * 16), real ? p + i * kRowsAtOnce * ld : from, real);
  }
}

// A thin matrix of kRows rows and kUnits units; `rows` and `units` are real, the others become zero. Neighbouring lanes take a few
// neighbouring units of a row: whole sectors of global memory, few bank conflicts.
template <int kRows, int kUnits, int kThreads>
__device__ inline void load_thin(uint32_t to, const void* from, int64_t ld, int rows, int units) {
  constexpr int kTogether = kUnits % 4 == 0 ? 4 : 2;
  static_assert(kUnits % kTogether == 0);
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kUnits; i += kThreads) {
    const int unit = i % kTogether + i / (kTogether * kRows) * kTogether, row = i / kTogether % kRows;
    const bool real = row < rows && unit < units;
    copy16(to + static_cast<uint32_t>((unit * kRows + row) * 16),
           real ? static_cast<const uint16_t*>(from) + row * ld + unit * 8 : from, real);
  }
}

// ---------------------------------------------------------------- operands

enum class Along { sum, across };  // whether the sum runs along the contiguous side of the operand

// Bits 0-13 start, 16-29 leading and 32-45 stride byte offset, all in 16 bytes; 62-63: 1 = 128-byte swizzle, 0 = none.
__device__ inline uint64_t operand(uint32_t start, uint32_t leading, uint32_t stride, uint32_t swizzle) {
  return static_cast<uint64_t>(start >> 4 & 0x3fffu) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}
// 64 rows x 16 columns (Along::sum) or 16 rows x 64 columns (Along::across) of a panel. `start`: a multiple of 8 rows into it, and
// for Along::sum 32 bytes for every 16 columns. 8 rows are 1024 bytes; the panel is as wide as the swizzle, so nothing else steps.
__device__ inline uint64_t wide_operand(uint32_t start) { return operand(start, 16, 1024, 1); }
// N x 16 of a thin matrix with kRows rows. Along::sum: N rows, 2 units. Along::across: 16 rows, N / 8 units.
template <int kRows, Along kAlong>
__device__ inline uint64_t thin_operand(uint32_t start) {
  return kAlong == Along::sum ? operand(start, kRows * 16, 128, 0) : operand(start, 128, kRows * 16, 0);
}

// ---------------------------------------------------------------- products

// Before the first product of a batch, and whenever registers of sums were touched otherwise.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ inline void finish_products() {
  commit_products();
  wait_products();
}
// Keeps the compiler from moving work on sums past the place of this call.
template <int kCount>
__device__ inline void pin(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

#define LOQUETIER_SUMS4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define LOQUETIER_SUMS8(i)                                                                                                  \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), "+f"(sum[i + 6]), \
      "+f"(sum[i + 7])
#define LOQUETIER_OPERANDS "l"(a), "l"(b), "r"(add), "n"(kAcrossA), "n"(kAcrossB)
#define LOQUETIER_WGMMA(shape, type, places, p_a, p_b, p_add, p_ta, p_tb)                                                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" p_add ", 0;\nwgmma.mma_async.sync.aligned.m64n" shape "k16.f32." type "." type " {" places \
  "}, %" p_a ", %" p_b ", p, 1, 1, %" p_ta ", %" p_tb ";\n}\n"
#define LOQUETIER_P4 "%0,%1,%2,%3"
#define LOQUETIER_P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LOQUETIER_P12 LOQUETIER_P8 ",%8,%9,%10,%11"
#define LOQUETIER_P16 LOQUETIER_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LOQUETIER_P24 LOQUETIER_P16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define LOQUETIER_P32 LOQUETIER_P24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define LOQUETIER_PRODUCT(type)                                                                     \
  if constexpr (N == 8) {                                                                           \
    asm volatile(LOQUETIER_WGMMA("8", type, LOQUETIER_P4, "4", "5", "6", "7", "8")                  \
                 : LOQUETIER_SUMS4(0)                                                               \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  } else if constexpr (N == 24) {                                                                   \
    asm volatile(LOQUETIER_WGMMA("24", type, LOQUETIER_P12, "12", "13", "14", "15", "16")           \
                 : LOQUETIER_SUMS8(0), LOQUETIER_SUMS4(8)                                           \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  } else if constexpr (N == 16) {                                                                   \
    asm volatile(LOQUETIER_WGMMA("16", type, LOQUETIER_P8, "8", "9", "10", "11", "12")              \
                 : LOQUETIER_SUMS8(0)                                                               \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  } else if constexpr (N == 32) {                                                                   \
    asm volatile(LOQUETIER_WGMMA("32", type, LOQUETIER_P16, "16", "17", "18", "19", "20")           \
                 : LOQUETIER_SUMS8(0), LOQUETIER_SUMS8(8)                                           \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  } else if constexpr (N == 48) {                                                                   \
    asm volatile(LOQUETIER_WGMMA("48", type, LOQUETIER_P24, "24", "25", "26", "27", "28")           \
                 : LOQUETIER_SUMS8(0), LOQUETIER_SUMS8(8), LOQUETIER_SUMS8(16)                      \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  } else {                                                                                          \
    static_assert(N == 64);                                                                         \
    asm volatile(LOQUETIER_WGMMA("64", type, LOQUETIER_P32, "32", "33", "34", "35", "36")           \
                 : LOQUETIER_SUMS8(0), LOQUETIER_SUMS8(8), LOQUETIER_SUMS8(16), LOQUETIER_SUMS8(24) \
                 : LOQUETIER_OPERANDS                                                               \
                 : "memory");                                                                       \
  }

// sum (+)= a b over 16 terms, asynchronously; add 0 overwrites. a: 64 x 16 (wide), b: N x 16 (thin).
template <class T, int N, Along kA, Along kB>
__device__ inline void multiply_async(float (&sum)[N / 2], uint64_t a, uint64_t b, int add) {
  constexpr int kAcrossA = kA == Along::across, kAcrossB = kB == Along::across;
  if constexpr (std::is_same_v<T, bf16>) {
    LOQUETIER_PRODUCT("bf16")
  } else {
    LOQUETIER_PRODUCT("f16")
  }
}

#undef LOQUETIER_SUMS4
#undef LOQUETIER_SUMS8
#undef LOQUETIER_OPERANDS
#undef LOQUETIER_WGMMA
#undef LOQUETIER_P4
#undef LOQUETIER_P8
#undef LOQUETIER_P12
#undef LOQUETIER_P16
#undef LOQUETIER_P24
#undef LOQUETIER_P32
#undef LOQUETIER_PRODUCT

}  // namespace loquetier::cuda
