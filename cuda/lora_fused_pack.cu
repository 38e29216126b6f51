// E of the fused product (lora_fused.h) from s or ds: 16 bytes a thread. s is read once per part and tile, E is written whole,
// zeros included.
#include "lora.cuh"
#include "lora_fused.h"

namespace loquetier::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kLoraThreads) pack_kernel(const __grid_constant__ FusedPackArgs a) {
  // The product may begin once every block is here: then all that came before this launch is done, of which only E is missing.
  wait_for_previous();
  let_next_start();
  const FusedTable& table = a.table;
  const int vectors = table.parts * table.width / 8;  // of a row of E
  const int index = static_cast<int>(blockIdx.x) * kLoraThreads + static_cast<int>(threadIdx.x);
  const int e_row = index / vectors, column = (index - e_row * vectors) * 8;
  const int block = e_row / kFusedRows, slot = block / kFusedPair, tile = block % kFusedPair;
  if (slot >= table.slots) return;
  const int row = table.row(table.slot_strip[slot]) + tile * kFusedRows + e_row % kFusedRows;
  const int group = table.slot_group[slot][tile];
  uint4 to = {0, 0, 0, 0};
  if (group >= 0 && row >= a.row_begin[group] && row < a.row_end[group]) {
    int s_column = 0;
    for (int part = 0; part < kMaxParts; ++part) {
      const int at = column - a.column[group][part], rank = a.rank[group][part];
      if (0 <= at && at < rank) {
        const uint4 from = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.s) + row * a.ld_s + s_column + at);
        const float scale = a.scale[group][part];
        const auto scaled = [&](uint32_t pair) { return pack2<T>(low_float<T>(pair) * scale, high_float<T>(pair) * scale); };
        to = {scaled(from.x), scaled(from.y), scaled(from.z), scaled(from.w)};
      }
      s_column += rank;
    }
  }
  static_cast<uint4*>(a.e)[index] = to;
}

}  // namespace

void fused_pack(DType dtype, const FusedPackArgs& args, cudaStream_t stream) {
  const int64_t vectors = int64_t{args.table.slots} * kFusedPair * kFusedRows * args.table.parts * args.table.width / 8;
  Launch launch{dim3(static_cast<unsigned>(ceil_div(vectors, kLoraThreads))), dim3(kLoraThreads), 0, stream};
  launch.overlap = true;
  dispatch_half(dtype, [&]<class T>() { launch(pack_kernel<T>, args); });
}

}  // namespace loquetier::cuda
