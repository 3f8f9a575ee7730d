#include "kernels/native.h"

#include <ATen/ops/mm.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <set>

#include "kernels/packed/packed.h"

namespace dsa {
namespace {

std::mutex mutex;
std::set<std::pair<std::string, std::string>>& record() {
  static std::set<std::pair<std::string, std::string>> instance;
  return instance;
}

}  // namespace

CUstream_st* current_stream(const at::Tensor& x) {
  const auto* guard = c10::impl::getDeviceGuardImpl(x.device().type());
  return static_cast<CUstream_st*>(guard->getStreamNativeHandle(guard->getStream(x.device())));
}

at::Tensor wide_mm(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_cuda() && a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16) return at::mm(a, b, at::kFloat);
  const auto acc = accumulation_type(a);
  return at::mm(a.to(acc), b.to(acc));
}

void ran(const char* op, const std::string& implementation) {
  const std::lock_guard lock(mutex);
  record().emplace(op, implementation);
}

std::vector<std::pair<std::string, std::string>> implementations_that_ran() {
  const std::lock_guard lock(mutex);
  return {record().begin(), record().end()};
}

}  // namespace dsa
