// Samples of a fixed length from the concatenated streams of several token sources.
//   sample i = tokens [i T, i T + T + 1)        T inputs; the last token is only a target
//   the last `hold_out` samples are never trained on
//   training order: epoch e visits samples permute(0..n-1; seed, e), so sample(global_index) is a pure function
//   and global_index = step * global_batch + slot means the same data at any data-parallel size.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/token_source.h"

namespace dsa {

struct Sample {
  std::vector<int32_t> tokens;          // [T + 1]
  std::vector<int32_t> document_start;  // [T]: where, in this sample, the document of input t starts; all 0 without document_mask
};

// A bijection of [0, n): Feistel network on the next even power of two, walked until it falls inside.
uint64_t permute(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch);

class TokenDataset {
 public:
  struct HoldOut {
    int64_t count = 0;  // samples
  };
  // Throws InputError when nothing is left to train on, or when the sources' tokenizers differ.
  TokenDataset(std::vector<std::shared_ptr<TokenSource>> sources, int64_t sequence_length, uint64_t seed,
               bool document_mask, HoldOut hold_out);

  int64_t samples() const { return total_samples_ - held_out_; }  // of one training epoch
  int64_t held_out_samples() const { return held_out_; }
  int64_t tokens() const { return total_tokens_; }

  Sample sample(int64_t global_index) const;        // any index >= 0; epochs follow one another
  Sample held_out(int64_t i) const;                 // 0 <= i < held_out_samples()
  int64_t stream_index(int64_t global_index) const;  // which sample of the stream that is

  std::string tokenizer_sha256() const;  // of the sources; empty: they do not say
  std::string digest() const;  // of all sources, the length and the hold-out: what a resumed run must find again

 private:
  Sample read(int64_t index) const;

  std::vector<std::shared_ptr<TokenSource>> sources_;
  std::vector<int64_t> source_begin_;  // [sources + 1], tokens
  int64_t sequence_length_, total_tokens_ = 0, total_samples_ = 0, held_out_;
  uint64_t seed_;
  bool document_mask_;
};

}  // namespace dsa
