// The bf16 kernels of indexer_logits.
#include "kernels/indexer_logits/sm90_launch.cuh"

namespace dsa::indexer_logits_sm90 {

void launch_bf16(const Maps& maps, const Arguments& a, cudaStream_t stream) { launch_heads<false>(maps, a, stream); }

}  // namespace dsa::indexer_logits_sm90
