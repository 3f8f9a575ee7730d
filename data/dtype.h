// The element types of safetensors, in the format's own ascending order (a writer sorts by it, descending).
#pragma once

#include <optional>
#include <string>

namespace dsa {

enum class Dtype {
  BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ,
  I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64
};

int bits(Dtype dtype);                                    // per element: 4, 6, 8, 16, 32, 64
const std::string& name(Dtype dtype);                     // "BF16"
std::optional<Dtype> parse_dtype(const std::string& name);  // upper case only, as the format has it

}  // namespace dsa
