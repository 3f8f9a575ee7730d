// What the LibTorch side of a device kernel needs: the stream to enqueue on, products with fp32 results, and a record of
// which implementation ran each operation, so that a run can say so.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

struct CUstream_st;

namespace dsa {

/// The stream that LibTorch enqueues on now, on x's (CUDA) device.
CUstream_st* current_stream(const at::Tensor& x);

/// a [m,k] @ b [k,n], fp32 sums and fp32 (fp64 for fp64) result; bf16 stays bf16 on its way into the tensor cores.
at::Tensor wide_mm(const at::Tensor& a, const at::Tensor& b);

/// Remembers what ran `op`: "sm90", "cuDNN", "reference (why not faster)". Cheap; call it at every run.
void ran(const char* op, const std::string& implementation);
/// Every (op, implementation) that has run so far, sorted by op.
std::vector<std::pair<std::string, std::string>> implementations_that_ran();

}  // namespace dsa
