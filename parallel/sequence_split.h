// How B sequences of T positions are dealt to the R = context x tensor ranks that share them. Pure: no MPI, no tensors.
//
// Zigzag: each sequence is cut into 2R chunks, and rank r = context*tensor_degree + tensor owns chunks r and 2R-1-r. A causal
// query at position t has t+1 keys, so the pair costs the same for every r. A rank's own rows are [B, T/R] flattened,
// each sequence's positions ascending; a context rank's rows are those of its tensor ranks, one after the other
// (sequence parallelism). With R = 1 local order is natural order.
//
//   "natural" order:  row b*T + position, 0 <= row < B*T
//   "gathered" order: an all-gather of own rows over Axis::SEQUENCE (context major, tensor minor), which equals an
//                     all-gather of context rows over Axis::CONTEXT
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/shard.h"

namespace dsa {

class SequenceSplit {
 public:
  /// Throws std::invalid_argument unless R = 1 or 2R divides length; the message names what would be legal.
  SequenceSplit(int64_t batch, int64_t length, int context_degree, int tensor_degree);

  int64_t batch() const { return batch_; }
  int64_t length() const { return length_; }
  /// Rows of one context rank: batch*length/context.
  int64_t context_rows() const { return own_rows() * tensor_; }
  /// Rows of one (context, tensor) rank: batch*length/R.
  int64_t own_rows() const { return batch_ * length_ / ranks(); }
  /// Which of the context rank's rows tensor rank `tensor` owns.
  Rows own_range(int tensor) const { return {tensor * own_rows(), own_rows()}; }

  /// Natural row of each local row of context rank `context`: [context_rows()].
  std::vector<int64_t> natural_rows(int context) const;
  /// Natural row of each own row: [own_rows()].
  std::vector<int64_t> natural_rows(int context, int tensor) const;

  /// order[B*T] with natural = gathered[order]: gathered.index_select(0, order) is in natural order.
  std::vector<int64_t> natural_from_gathered() const;
  /// order[B*T] with gathered = natural[order], the inverse.
  std::vector<int64_t> gathered_from_natural() const;
  /// True when natural and gathered order are the same (R = 1): nothing to permute.
  bool is_identity() const { return ranks() == 1; }

 private:
  int ranks() const { return context_ * tensor_; }

  int64_t batch_, length_;
  int context_, tensor_;
};

}  // namespace dsa
