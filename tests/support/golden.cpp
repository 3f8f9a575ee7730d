#include "tests/support/golden.h"

#include <ATen/ops/empty.h>

#include <stdexcept>

#include "data/safetensors.h"

namespace dsa {
namespace {

at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::BOOL: return at::kBool;
    case Dtype::U8: return at::kByte;
    case Dtype::I8: return at::kChar;
    case Dtype::I32: return at::kInt;
    case Dtype::I64: return at::kLong;
    case Dtype::F8_E4M3: return at::kFloat8_e4m3fn;
    case Dtype::F16: return at::kHalf;
    case Dtype::BF16: return at::kBFloat16;
    case Dtype::F32: return at::kFloat;
    case Dtype::F64: return at::kDouble;
    default: throw std::invalid_argument("golden tensor of dtype " + name(dtype) + " (no test uses it) add it here");
  }
}

std::string path_of(const std::string& name) {
  return name.ends_with(".safetensors") ? name : std::string(DSA_GOLDEN) + "/" + name + ".safetensors";
}

}  // namespace

Golden::Golden(const std::string& name) : file_(std::make_unique<SafetensorsFile>(path_of(name))) {}
Golden::~Golden() = default;

bool Golden::has(const std::string& tensor) const { return file_->find(tensor) != nullptr; }

at::Tensor Golden::operator[](const std::string& tensor) const {
  const TensorEntry* entry = file_->find(tensor);
  if (!entry) throw std::invalid_argument("no tensor " + tensor + " in " + file_->path() + " (see the script that made it)");
  at::Tensor out = at::empty(entry->shape, scalar_type(entry->dtype));
  if (entry->bytes() > 0) file_->read(*entry, 0, entry->bytes(), out.data_ptr());
  return out;
}

}  // namespace dsa
