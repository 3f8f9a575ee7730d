// Which device a rank computes on: one rank per GPU, in the order of the ranks of a machine.
//
// LibTorch's CUDA half is loaded when a GPU is opened, not when the program starts: one binary serves machines with
// and without GPUs, and the CPU-only installation.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace dsa {

/// GPUs that the driver shows this process; 0 without a driver, or with a program built without CUDA.
int visible_gpus();

/// GPU number `local_rank` of this machine. Makes it current and checks that it runs these kernels.
/// Throws std::invalid_argument: no GPU or driver, a driver older than CUDA 13, more ranks than GPUs, not a Hopper
/// GPU, LibTorch without CUDA.
at::Device open_gpu(int local_rank, int local_size);

/// "NVIDIA H100 80GB HBM3, 79.2 GiB, driver for CUDA 13.0" of an opened device.
std::string describe_gpu(at::Device device);

/// "2.28.9", of the NCCL that connects the GPUs of several ranks. Throws std::invalid_argument when it does not load or
/// this program was built without it.
std::string nccl_version();

}  // namespace dsa
