#include "parallel/sequence_split.h"

#include <stdexcept>
#include <string>

namespace dsa {

SequenceSplit::SequenceSplit(int64_t batch, int64_t length, int context_degree, int tensor_degree)
    : batch_(batch), length_(length), context_(context_degree), tensor_(tensor_degree) {
  if (batch < 1 || length < 1 || context_degree < 1 || tensor_degree < 1)
    throw std::invalid_argument("cannot split " + std::to_string(batch) + " sequences of " + std::to_string(length) +
                                " positions over context " + std::to_string(context_degree) + " x tensor " +
                                std::to_string(tensor_degree) + " (each is 1 or more) correct the recipe");
  const int64_t unit = 2 * ranks();
  if (ranks() > 1 && length_ % unit != 0) {
    const int64_t lower = length_ / unit * unit;
    throw std::invalid_argument("cannot split sequences of " + std::to_string(length_) + " over context " +
                                std::to_string(context_) + " x tensor " + std::to_string(tensor_) +
                                " (each rank owns 2 of " + std::to_string(unit) + " equal chunks) use a length of " +
                                (lower > 0 ? std::to_string(lower) + " or " : "") + std::to_string(lower + unit) +
                                ", or other degrees");
  }
}

std::vector<int64_t> SequenceSplit::natural_rows(int context, int tensor) const {
  std::vector<int64_t> rows;
  rows.reserve(own_rows());
  const int64_t rank = int64_t{context} * tensor_ + tensor, mirror = 2 * ranks() - 1 - rank, chunk = length_ / (2 * ranks());
  for (int64_t b = 0; b < batch_; ++b) {
    const auto append = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) rows.push_back(b * length_ + t);
    };
    if (ranks() == 1) {
      append(0, length_);
    } else {
      append(rank * chunk, (rank + 1) * chunk);
      append(mirror * chunk, (mirror + 1) * chunk);
    }
  }
  return rows;
}

std::vector<int64_t> SequenceSplit::natural_rows(int context) const {
  std::vector<int64_t> rows;
  rows.reserve(context_rows());
  for (int t = 0; t < tensor_; ++t) {
    const std::vector<int64_t> own = natural_rows(context, t);
    rows.insert(rows.end(), own.begin(), own.end());
  }
  return rows;
}

std::vector<int64_t> SequenceSplit::gathered_from_natural() const {
  std::vector<int64_t> order;
  order.reserve(batch_ * length_);
  for (int c = 0; c < context_; ++c) {
    const std::vector<int64_t> rows = natural_rows(c);
    order.insert(order.end(), rows.begin(), rows.end());
  }
  return order;
}

std::vector<int64_t> SequenceSplit::natural_from_gathered() const {
  const std::vector<int64_t> natural = gathered_from_natural();
  std::vector<int64_t> order(natural.size());
  for (size_t gathered = 0; gathered < natural.size(); ++gathered) order[natural[gathered]] = gathered;
  return order;
}

}  // namespace dsa
