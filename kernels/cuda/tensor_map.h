// Host side of the bulk tensor copy engine: descriptors of a 2-D or 3-D array, boxes swizzled in 128-byte rows.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dsa::cuda {

struct TensorMapShape {
  CUtensorMapDataType type;
  int rank;                  ///< 2 or 3
  uint64_t size[3];          ///< elements, innermost first; places outside read as zero
  uint64_t stride_bytes[2];  ///< of dims 1 and 2; multiples of 16
  uint32_t box[3];           ///< elements; the innermost spans 128 bytes
};

/// base is 16-byte aligned. Throws std::runtime_error when the driver refuses.
CUtensorMap make_tensor_map(const void* base, const TensorMapShape& shape);

}  // namespace dsa::cuda
