// The fused product in f16: two instantiations, forward and backward.
#include "lora_fused.cuh"

namespace loquetier::cuda {

int fused_clusters_f16(bool backward) { return backward ? fused::clusters<f16, true>() : fused::clusters<f16, false>(); }

void fused_product_f16(const FusedArgs& args, bool backward, int clusters, bool packed, cudaStream_t stream) {
  fused::product<f16>(args, backward, clusters, packed, stream);
}

}  // namespace loquetier::cuda
