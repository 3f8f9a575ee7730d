// `dsatrain inspect PATH`: what a path holds, and whether it is sound.
#pragma once

#include <string>

namespace dsa {

struct Inspection {
  std::string text;     ///< for people, several lines
  bool healthy = true;  ///< false when a problem was found; the text names it
};

/// HF folder, native checkpoint, run folder, HDF5 token file, Megatron .idx / .bin: its kind, parameters, tensors and
/// bytes per dtype, steps, health. Hashes every byte of a native checkpoint. Throws InputError when it is none of these.
Inspection inspect(const std::string& path);

}  // namespace dsa
