// The devices that a parallel test runs on: the host always, a GPU per rank where the machine has that many.
#pragma once

#include <c10/core/Device.h>
#include <mpi.h>

#include <optional>
#include <string>

#include "parallel/device.h"

namespace dsa::test {

/// This rank's GPU, opened; nothing, on all ranks alike, when the machine has fewer GPUs than ranks.
inline std::optional<c10::Device> gpu_of_rank() {
  static const std::optional<c10::Device> gpu = []() -> std::optional<c10::Device> {
    MPI_Comm host = MPI_COMM_NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    int rank = 0, size = 1;
    MPI_Comm_rank(host, &rank);
    MPI_Comm_size(host, &size);
    MPI_Comm_free(&host);
    int enough = visible_gpus() >= size, all = 0;
    MPI_Allreduce(&enough, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (!all) return std::nullopt;
    return open_gpu(rank, size);
  }();
  return gpu;
}

inline const char* kNoGpus = "no CUDA device for every rank";

enum class On { HOST, GPU };

/// Where to test; nothing when ranks have no GPU. The GPU is opened for a test on the host, too: LibTorch looks for its
/// CUDA half once, at the latest when autograd first runs.
inline std::optional<c10::Device> device_for(On on) {
  const std::optional<c10::Device> gpu = gpu_of_rank();
  return on == On::GPU ? gpu : c10::Device(c10::DeviceType::CPU);
}

/// For INSTANTIATE_TEST_SUITE_P.
inline std::string label_of(On on) { return on == On::HOST ? "Host" : "Gpu"; }

}  // namespace dsa::test
