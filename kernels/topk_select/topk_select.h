// Exact selection of the k best keys of every row under a total order: score descending, then index ascending.
// -0 equals +0; -inf is never selected; NaN is an error.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct TopK {
  at::Tensor indices_TK;  ///< int32 [T,k], ascending, -1 after the last
  at::Tensor lengths_T;   ///< int32 [T], number of selected keys (fewer than k where fewer scores are finite)
  at::Tensor scores_TK;   ///< [T,k] the logits of the indices, anything after the last; undefined unless asked for
};

/// logits_TS fp32 or fp64 [T,S] (rows may be strided), k >= 1. Throws on NaN and names the row.
TopK topk_select(const at::Tensor& logits_TS, int64_t k);

}  // namespace dsa
