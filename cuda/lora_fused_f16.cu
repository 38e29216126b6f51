// The fused product in f16: an instantiation for each kind.
#include "lora_fused.cuh"

namespace loquetier::cuda {

int fused_clusters_f16(FusedKind kind) { return fused::clusters<f16>(kind); }

void fused_product_f16(const FusedArgs& args, FusedKind kind, int clusters, bool overlap, cudaStream_t stream) {
  fused::product<f16>(args, kind, clusters, overlap, stream);
}

}  // namespace loquetier::cuda
