#include "tests/bench/kernel_times.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <map>
#include <set>

namespace dsa::bench {
namespace {

// "void at::native::elementwise_kernel<128, 4, ...>(int, ...)" -> "elementwise_kernel", with what tells such kernels apart.
std::string shortened(std::string name) {
  for (const char* mark : {"sm90", "nvjet", "cudnn", "gemm", "Memcpy", "Memset"})
    if (name.find(mark) != std::string::npos) return name.substr(0, 90);
  for (const char* head : {"void ", "at::native::", "(anonymous namespace)::"})
    for (size_t at; (at = name.find(head)) != std::string::npos;) name.erase(at, std::string(head).size());
  return name.substr(0, 90);
}

}  // namespace

std::vector<KernelTime> kernel_times(const std::function<void()>& work) {
  namespace profiler = torch::autograd::profiler;
  using torch::profiler::impl::ActivityType;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set<ActivityType> activities{ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  work();
  const auto result = profiler::disableProfiler();
  std::map<std::string, KernelTime> by_name;
  for (const auto& event : result->events()) {
    if (event.deviceType() != c10::DeviceType::CUDA) continue;
    KernelTime& t = by_name[shortened(event.name())];
    t.milliseconds += static_cast<double>(event.durationNs()) * 1e-6;
    ++t.launches;
  }
  std::vector<KernelTime> times;
  for (auto& [name, t] : by_name) {
    t.name = name;
    times.push_back(t);
  }
  std::sort(times.begin(), times.end(), [](const auto& a, const auto& b) { return a.milliseconds > b.milliseconds; });
  return times;
}

}  // namespace dsa::bench
