// Where a GPU's time goes: device time of every kernel that `work` launches, by LibTorch's profiler.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace dsa::bench {

struct KernelTime {
  std::string name;        ///< the kernel's, without template arguments and namespaces that all share
  double milliseconds = 0; ///< sum over its launches
  int64_t launches = 0;
};

/// Longest first. `work` must leave nothing running on the device.
std::vector<KernelTime> kernel_times(const std::function<void()>& work);

}  // namespace dsa::bench
