// The e4m3 kernels of indexer_logits (compiled apart from bf16: one file takes long enough).
#include "kernels/indexer_logits/sm90_launch.cuh"

namespace dsa::indexer_logits_sm90 {

void launch_e4m3(const Maps& maps, const Arguments& a, cudaStream_t stream) { launch_heads<true>(maps, a, stream); }

}  // namespace dsa::indexer_logits_sm90
