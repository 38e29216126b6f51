// The fused product in bf16: an instantiation for each kind.
#include "lora_fused.cuh"

namespace loquetier::cuda {

int fused_clusters_bf16(FusedKind kind) { return fused::clusters<bf16>(kind); }

void fused_product_bf16(const FusedArgs& args, FusedKind kind, int clusters, bool overlap, cudaStream_t stream) {
  fused::product<bf16>(args, kind, clusters, overlap, stream);
}

}  // namespace loquetier::cuda
