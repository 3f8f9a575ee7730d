// cuTensorMapEncodeTiled, reached through the runtime so that nothing links against libcuda.
#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"

namespace dsa::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "look up cuTensorMapEncodeTiled in the driver");
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error("cannot describe a tensor to the copy engine (the driver lacks cuTensorMapEncodeTiled) install a driver of CUDA 12 or later");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const void* base, const TensorMapShape& s) {
  static const auto encode = encoder();
  const cuuint32_t ones[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(&map, s.type, s.rank, const_cast<void*>(base), s.size, s.stride_bytes, s.box, ones,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cannot describe a tensor to the copy engine (cuTensorMapEncodeTiled returned " +
                             std::to_string(status) + ") check alignment and strides");
  return map;
}

}  // namespace dsa::cuda
