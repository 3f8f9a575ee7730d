// Rows that a warp can hold, which sm90.cu leaves to sm90_narrow.cu.
#pragma once

#include "kernels/topk_select/params.h"

namespace dsa::topk_select_sm90 {

constexpr int kNarrow = 512;  // columns

/// As launch_topk_select_sm90, for 1 to kNarrow columns and at least one row.
void launch_narrow(const TopKSelectParams& p);

}  // namespace dsa::topk_select_sm90
