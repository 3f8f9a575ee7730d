// The implementation for the CPU (per-row radix selection) and, by a stable sort, for any other device: the oracle.
#pragma once

#include "kernels/topk_select/topk_select.h"

namespace dsa::reference {

TopK topk_select(const at::Tensor& logits_TS, int64_t k);

}  // namespace dsa::reference
