// splitmix64 (Steele, Lea, Flood 2014): a bijective mix of 64 bits, the source of every random order and weight.
#pragma once

#include <cstdint>

namespace dsa {

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace dsa
