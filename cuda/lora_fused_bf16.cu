// The fused product in bf16: two instantiations, forward and backward.
#include "lora_fused.cuh"

namespace loquetier::cuda {

int fused_clusters_bf16(bool backward) { return backward ? fused::clusters<bf16, true>() : fused::clusters<bf16, false>(); }

void fused_product_bf16(const FusedArgs& args, bool backward, int clusters, bool packed, cudaStream_t stream) {
  fused::product<bf16>(args, backward, clusters, packed, stream);
}

}  // namespace loquetier::cuda
