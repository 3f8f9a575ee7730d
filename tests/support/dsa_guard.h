// Every test of sparse attention calls this first: with a sequence not longer than top-k nothing is sparse, and
// mistakes in the scores or in the rotation cannot show.
#pragma once

#include <gtest/gtest.h>

#define DSA_GUARD(sequence, top_k)                 \
  ASSERT_GT(static_cast<int64_t>(sequence), static_cast<int64_t>(top_k)) \
      << "a test of sparse attention needs a sequence longer than top-k"
