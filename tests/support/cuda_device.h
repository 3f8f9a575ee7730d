// Device memory for tests and benchmarks, freed at the end of its scope.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/cuda/check.h"

namespace dsa::test {

inline bool have_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && cuda::is_hopper();
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t n) : size_(n) {
    cuda::check(cudaMalloc(&data_, (n > 0 ? n : 1) * sizeof(T)), "allocate device memory");
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(static_cast<int64_t>(from.size())) {
    if (!from.empty())
      cuda::check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  }
  DeviceArray(DeviceArray&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  void fill_bytes(int value) const { cuda::check(cudaMemset(data_, value, size_ * sizeof(T)), "fill device memory"); }
  std::vector<T> host() const {
    std::vector<T> to(size_);
    if (size_ > 0) cuda::check(cudaMemcpy(to.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
    return to;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace dsa::test
