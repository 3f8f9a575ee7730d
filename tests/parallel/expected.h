// What collectives have to give, in plain C++.
#pragma once

#include <ATen/ops/empty.h>

#include <cstring>
#include <stdexcept>
#include <vector>

namespace dsa::test {

/// Same dtype, shape and bits (NaN equals NaN of the same bits).
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor x = a.cpu().contiguous(), y = b.cpu().contiguous();
  return x.nbytes() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}

/// The sum of the contract, element by element in plain C++.
template <typename T, typename Accumulator>
at::Tensor sum_in_rank_order(const std::vector<at::Tensor>& pieces) {
  at::Tensor out = at::empty(pieces[0].sizes(), pieces[0].options());
  for (int64_t i = 0; i < out.numel(); ++i) {
    Accumulator sum = static_cast<Accumulator>(pieces[0].data_ptr<T>()[i]);
    for (size_t r = 1; r < pieces.size(); ++r) sum = sum + static_cast<Accumulator>(pieces[r].data_ptr<T>()[i]);
    out.data_ptr<T>()[i] = static_cast<T>(sum);
  }
  return out;
}

inline at::Tensor expected_sum(const std::vector<at::Tensor>& pieces) {
  switch (pieces[0].scalar_type()) {
    case at::kBFloat16: return sum_in_rank_order<at::BFloat16, float>(pieces);
    case at::kHalf: return sum_in_rank_order<at::Half, float>(pieces);
    case at::kFloat: return sum_in_rank_order<float, float>(pieces);
    case at::kDouble: return sum_in_rank_order<double, double>(pieces);
    case at::kInt: return sum_in_rank_order<int32_t, int32_t>(pieces);
    case at::kLong: return sum_in_rank_order<int64_t, int64_t>(pieces);
    case at::kByte: return sum_in_rank_order<uint8_t, uint8_t>(pieces);
    default: throw std::logic_error("dtype without an expected sum");
  }
}

}  // namespace dsa::test
