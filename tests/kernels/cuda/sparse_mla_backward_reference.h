// dkv of a few keys over all query rows of a long sequence, in fp64: what can be afforded where the whole table cannot.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sparse_mla/params.h"

namespace dsa::test {

/// An entry of a list: query t lists sampled key `sample` at index i.
struct ListedPair {
  int32_t t, key, sample;
};

/// out [samples][576] += ds q + [p do ; 0] of the pairs and all heads, from p.lse and p.delta; do contiguous.
void reference_dkv_of_pairs(const SparseMlaBackwardParams& p, const std::vector<ListedPair>& pairs, double* out);

/// How many of n 32-bit words on the device differ.
int64_t differing_words(const void* a, const void* b, int64_t n);

}  // namespace dsa::test
