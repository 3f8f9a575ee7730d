// Radix selection: scores become unsigned keys of the same order; 11 bits at a time, a histogram finds the digit
// in which the k-th largest key lies, until one key value, the threshold, is left. One pass in index order then takes
// every key above the threshold and the first ones equal to it: O(S), exact, ascending.
#include "kernels/topk_select/reference.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/check.h"

namespace dsa::reference {
namespace {

template <typename scalar_t>
using KeyOf = std::conditional_t<std::is_same_v<scalar_t, double>, uint64_t, uint32_t>;

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

// Monotone: a < b <=> key(a) < key(b), with -0 == +0. Key 0 stands for -inf (no finite number maps to it).
template <typename scalar_t>
KeyOf<scalar_t> order_key(scalar_t x) {
  using Key = KeyOf<scalar_t>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (x == -std::numeric_limits<scalar_t>::infinity()) return 0;
  const Key bits = std::bit_cast<Key>(x == 0 ? scalar_t{0} : x);
  return bits & kSign ? ~bits : bits | kSign;
}

// The value of the k-th largest of the candidates (k >= 1, at least k of them) and how many of that value belong
// to the k. Consumes the candidates.
template <typename Key>
std::pair<Key, int64_t> kth_largest(std::vector<Key>& candidates, int64_t k) {
  int shift = 8 * sizeof(Key);
  Key threshold = 0;
  while (shift > 0) {
    const int bits = std::min(shift, kDigitBits);
    shift -= bits;
    uint32_t histogram[kBins] = {};
    const Key mask = (Key{1} << bits) - 1;
    for (const Key key : candidates) ++histogram[key >> shift & mask];
    Key digit = mask;
    while (histogram[digit] < k) k -= histogram[digit--];
    threshold |= digit << shift;
    size_t kept = 0;
    for (const Key key : candidates) {
      candidates[kept] = key;
      kept += (key >> shift & mask) == digit;
    }
    candidates.resize(kept);
    if (kept == 1) return {candidates[0], k};
  }
  return {threshold, k};
}

// Returns the number of selected keys, or -1 for a NaN.
template <typename scalar_t>
int64_t select_row(const scalar_t* scores, int64_t stride, int64_t S, int64_t k, std::vector<KeyOf<scalar_t>>& keys,
                   std::vector<KeyOf<scalar_t>>& candidates, int32_t* indices) {
  using Key = KeyOf<scalar_t>;
  int64_t finite = 0;
  bool nan = false;
  for (int64_t s = 0; s < S; ++s) {
    const scalar_t x = scores[s * stride];
    nan |= x != x;
    keys[s] = order_key(x);
    finite += keys[s] != 0;
  }
  if (nan) return -1;
  Key threshold = 0;
  int64_t ties = 0;  // keys equal to the threshold that still belong to the selection
  if (finite > k) {
    candidates.assign(keys.begin(), keys.begin() + S);
    std::tie(threshold, ties) = kth_largest(candidates, k);
  }
  int64_t n = 0;
  for (int64_t s = 0; s < S && n < k; ++s) {
    if (keys[s] > threshold) {
      indices[n++] = static_cast<int32_t>(s);
    } else if (keys[s] == threshold && ties > 0) {
      indices[n++] = static_cast<int32_t>(s);
      --ties;
    }
  }
  std::fill(indices + n, indices + k, -1);
  return n;
}

template <typename scalar_t>
int64_t select_rows(const at::Tensor& logits, int64_t k, int32_t* indices, int32_t* lengths) {
  const int64_t T = logits.size(0), S = logits.size(1);
  const scalar_t* scores = logits.const_data_ptr<scalar_t>();
  std::atomic<int64_t> bad_row{T};
  at::parallel_for(0, T, std::max<int64_t>(1, 16384 / std::max<int64_t>(S, 1)), [&](int64_t begin, int64_t end) {
    std::vector<KeyOf<scalar_t>> keys(S), candidates;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = select_row(scores + t * logits.stride(0), logits.stride(1), S, k, keys, candidates, indices + t * k);
      if (n < 0) {
        int64_t seen = bad_row;
        while (t < seen && !bad_row.compare_exchange_weak(seen, t)) {
        }
        return;
      }
      lengths[t] = static_cast<int32_t>(n);
    }
  });
  return bad_row;
}

TopK sorted_selection(const at::Tensor& logits, int64_t k) {
  const int64_t S = logits.size(1);
  const at::Tensor nan_rows = logits.isnan().any(1).nonzero();
  require(nan_rows.numel() == 0, "topk_select: row {} holds NaN (a score is not a number) look for overflow before it",
          nan_rows.numel() ? nan_rows[0].item<int64_t>() : 0);
  const auto [value, index] = at::sort(logits + 0.0, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const int64_t n = std::min(k, S);
  const at::Tensor missing = value.narrow(1, 0, n).isneginf();
  at::Tensor chosen = index.narrow(1, 0, n).masked_fill(missing, S);
  chosen = std::get<0>(chosen.sort(1));
  at::Tensor indices = at::full({logits.size(0), k}, -1, logits.options().dtype(at::kInt));
  indices.narrow(1, 0, n).copy_(chosen.masked_fill(chosen == S, -1));
  return {indices, missing.logical_not().sum(1).to(at::kInt), {}};
}

}  // namespace

TopK topk_select(const at::Tensor& logits_TS, int64_t k) {
  if (!logits_TS.is_cpu()) return sorted_selection(logits_TS, k);
  const int64_t T = logits_TS.size(0);
  TopK out{at::empty({T, k}, at::kInt), at::empty({T}, at::kInt), {}};
  int32_t* indices = out.indices_TK.data_ptr<int32_t>();
  int32_t* lengths = out.lengths_T.data_ptr<int32_t>();
  const int64_t bad_row = logits_TS.scalar_type() == at::kDouble ? select_rows<double>(logits_TS, k, indices, lengths)
                                                                 : select_rows<float>(logits_TS, k, indices, lengths);
  require(bad_row == T, "topk_select: row {} holds NaN (a score is not a number) look for overflow before it", bad_row);
  return out;
}

}  // namespace dsa::reference
