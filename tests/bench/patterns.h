// Distributions of scores that selection is measured on.
#pragma once

#include <cstdint>
#include <vector>

namespace dsa::bench {

struct Pattern {
  const char* name;
  int kind;
};

/// The first is random; the others are ties and narrow bands.
const std::vector<Pattern>& patterns();

/// out [rows][columns], on the device.
void fill(const Pattern& pattern, float* out, int64_t rows, int64_t columns, uint64_t seed);

}  // namespace dsa::bench
