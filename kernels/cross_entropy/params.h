// What a device kernel needs to know of a tile of logits: B rows, X words of the shard, x[b,c] the logit of word first + c;
// no LibTorch, no CUDA header.
//
//   statistics   m' = max(m, max_c x);  s' = s exp(m - m') + sum_c exp(x - m');  t' = t + x[target - first]
//   gradient     d = bf16( (exp(x - lse) - [first + c = target]) g )
//
// fp32 inside. A target outside of the tile, or below 0, has no part in it.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsa {

struct VocabTileParams {
  int64_t rows = 0, words = 0;
  const float* logits = nullptr;       ///< fp32 [B,X] contiguous, 16-byte aligned
  const int64_t* target = nullptr;     ///< [B], global words
  int64_t first = 0;                   ///< global word of column 0

  float* max = nullptr;                ///< statistics: fp32 [B], read and written
  float* sum_exp = nullptr;
  float* target_logit = nullptr;

  const float* lse = nullptr;          ///< gradient: fp32 [B]
  const float* grad = nullptr;         ///< fp32 [B]
  void* d = nullptr;                   ///< bf16 [B,X] contiguous, 16-byte aligned

  CUstream_st* stream = nullptr;
};

/// Enqueue a kernel. Throw std::runtime_error when CUDA reports an error.
void launch_vocab_tile_statistics(const VocabTileParams& p);
void launch_vocab_tile_gradient(const VocabTileParams& p);

}  // namespace dsa
