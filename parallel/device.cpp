#include "parallel/device.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <stdexcept>
#include <type_traits>

#ifdef DSA_HAVE_NCCL
#include "parallel/nccl_api.h"
#endif

namespace dsa {
namespace {

constexpr int kOldestDriver = 13000;  // CUDA 13.0, what the kernels are compiled for

// The driver's own interface, so that nothing of CUDA has to be installed where there is no GPU.
struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*version)(int*) = nullptr;
  int (*count)(int*) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*name)(char*, int, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  int (*memory)(size_t*, int) = nullptr;
  bool ready = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return;
    const auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      return function != nullptr;
    };
    ready = find(init, "cuInit") && find(version, "cuDriverGetVersion") && find(count, "cuDeviceGetCount") &&
            find(get, "cuDeviceGet") && find(name, "cuDeviceGetName") && find(attribute, "cuDeviceGetAttribute") &&
            find(memory, "cuDeviceTotalMem_v2") && init(0) == 0;
  }
};

const Driver& driver() {
  static const Driver instance;
  return instance;
}

std::string cuda_version(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

int driver_version() {
  int version = 0;
  if (driver().ready) driver().version(&version);
  return version;
}

int attribute_of(int device, int which) {
  int handle = 0, value = 0;
  driver().get(&handle, device);
  driver().attribute(&value, which, handle);
  return value;
}

}  // namespace

int visible_gpus() {
#ifdef DSA_HAVE_CUDA
  int count = 0;
  if (driver().ready) driver().count(&count);
  return count;
#else
  return 0;
#endif
}

at::Device open_gpu(int local_rank, int local_size) {
#ifndef DSA_HAVE_CUDA
  throw std::invalid_argument("cannot use a GPU (this dsatrain was built without CUDA) build it where nvcc is found, or set "
                           "compute.device: CPU");
#endif
  const int count = visible_gpus();
  if (count == 0)
    throw std::invalid_argument("cannot use a GPU (the driver shows none to this process) look at nvidia-smi and "
                             "CUDA_VISIBLE_DEVICES, or set compute.device: CPU");
  if (driver_version() < kOldestDriver)
    throw std::invalid_argument("cannot use the GPU (its driver serves CUDA " + cuda_version(driver_version()) +
                             ", this program needs " + cuda_version(kOldestDriver) + ") update the driver");
  if (local_size > count)
    throw std::invalid_argument("cannot give every rank a GPU of its own (" + std::to_string(local_size) + " ranks and " +
                             std::to_string(count) + " GPUs on this machine) start " + std::to_string(count) +
                             " ranks a machine, or set compute.device: CPU");
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  const int major = attribute_of(local_rank, kMajor), minor = attribute_of(local_rank, kMinor);
  if (major != 9 || minor != 0)
    throw std::invalid_argument("cannot use GPU " + std::to_string(local_rank) + " (it has compute capability " +
                             std::to_string(major) + "." + std::to_string(minor) +
                             ", the kernels are written for 9.0) use an H100 or H200, or set compute.device: CPU");
  if (!dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL))
    throw std::invalid_argument(std::string("cannot use the GPU (LibTorch's CUDA half does not load: ") + dlerror() +
                             ") install it with tools/setup.sh --cuda and build again");
  const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(local_rank));
  c10::impl::getDeviceGuardImpl(at::kCUDA)->setDevice(device);
  return device;
}

std::string describe_gpu(at::Device device) {
  int handle = 0;
  char name[128] = "";
  size_t bytes = 0;
  driver().get(&handle, device.index());
  driver().name(name, sizeof name, handle);
  driver().memory(&bytes, handle);
  char size[32];
  std::snprintf(size, sizeof size, "%.1f GiB", static_cast<double>(bytes) / (1 << 30));
  return std::string(name) + ", " + size + ", driver for CUDA " + cuda_version(driver_version());
}

std::string nccl_version() {
#ifdef DSA_HAVE_NCCL
  int version = 0;
  nccl_api().get_version(&version);  // 22809 is 2.28.9
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
#else
  throw std::invalid_argument("cannot connect GPUs (this dsatrain was built without NCCL) build it where nccl.h is "
                              "found, or run one rank");
#endif
}

}  // namespace dsa
