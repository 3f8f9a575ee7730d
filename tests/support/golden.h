// Golden data of tests/golden as tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

namespace dsa {

class SafetensorsFile;

/// tests/golden/NAME.safetensors, or any path that ends in .safetensors. Its tensors by name, in their stored dtype
/// (BOOL, U8, I8, I32, I64, F8_E4M3, F16, BF16, F32, F64); throws when a name is absent.
class Golden {
 public:
  explicit Golden(const std::string& name);
  ~Golden();
  at::Tensor operator[](const std::string& tensor) const;
  bool has(const std::string& tensor) const;

 private:
  std::unique_ptr<SafetensorsFile> file_;
};

}  // namespace dsa
