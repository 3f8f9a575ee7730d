// Where a key's 576 columns stand among the 192 words of its row of dkv_sum (kernels/cuda/packed_sums.cuh).
//
// A row has four parts of 48 words, each of 128 latent columns and 16 of rope; four lanes own a part's columns as they
// hold accumulators: lane q the columns 8b + 2q and the next, b = 0 to 15 latent, 16 and 17 rope. Word j of lane q
// stands at 4j + q.
#pragma once

#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {

struct SumLayout {
  static constexpr int kRowWords = 192, kColumns = kDim, kPartWords = 48;

  static __device__ __forceinline__ int owner(int word) { return word / kPartWords * 4 + word % 4; }
  static __device__ __forceinline__ int first(int word) { return word % kPartWords / 4 * 3; }
  static __device__ __forceinline__ int column(int owner, int n) {
    const int part = owner / 4, block = n / 2, in_block = owner % 4 * 2 + n % 2;
    return (block < 16 ? part * 128 + block * 8 : kLatent + part * 16 + (block - 16) * 8) + in_block;
  }
};

}  // namespace dsa::sparse_mla_sm90
