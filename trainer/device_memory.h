// What a rank's device memory holds, and what to say when it does not suffice.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

#include "recipes/recipe.h"
#include "trainer/run_failure.h"

namespace dsa {

// The most that this process has held so far: LibTorch's tensors on a GPU, everything on a CPU.
int64_t peak_memory_bytes(at::Device device);

// What an allocation failed amid.
struct MemoryUse {
  std::string activity;         // "step 12", "the held-out evaluation", ...
  int64_t parameter_bytes = 0;  // the model's, on the device
  int64_t optimizer_bytes = 0;  // gradient sums, master weights and moments, on the device
  int64_t peak_bytes = 0;
};

// Exit code 4: what was asked for (LibTorch's `message`), what is known to be there, and two settings of this recipe
// that need less.
RunFailure out_of_memory(const std::string& message, const MemoryUse& use, const Recipe& recipe);

}  // namespace dsa
