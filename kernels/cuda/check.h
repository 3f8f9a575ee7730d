// Turns CUDA's status codes into exceptions: "problem (why) suggestion".
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dsa::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("cannot ") + what + " (CUDA says " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status) + ") an earlier kernel may have failed; run under compute-sanitizer");
}

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "ask for the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "ask for the number of multiprocessors");
  return count;
}

/// Whether the current device runs sm_90a code.
inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return major == 9 && minor == 0;
}

}  // namespace dsa::cuda
