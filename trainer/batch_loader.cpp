#include "trainer/batch_loader.h"

namespace dsa {

BatchLoader::BatchLoader(const TokenDataset& dataset, const Recipe& recipe, int data_rank, int data_degree)
    : dataset_(dataset),
      batch_(recipe.batch.sequences),
      micro_(recipe.batch.micro_sequences),
      length_(recipe.data.sequence_length),
      data_rank_(data_rank),
      data_degree_(data_degree) {}

Microbatches BatchLoader::training(int64_t step) const {
  const int64_t mine = batch_ / data_degree_, first = (step - 1) * batch_ + data_rank_ * mine;
  Microbatches batches(mine / micro_);
  for (int64_t i = 0; i < mine; ++i) batches[i / micro_].push_back(dataset_.sample(first + i));
  return batches;
}

Microbatches BatchLoader::held_out(int64_t sequences) const {
  const int64_t per_pass = micro_ * data_degree_;
  Microbatches batches((sequences + per_pass - 1) / per_pass);
  for (size_t b = 0; b < batches.size(); ++b)
    for (int64_t i = 0; i < micro_; ++i) {
      const int64_t index = static_cast<int64_t>(b) * per_pass + data_rank_ * micro_ + i;
      Sample empty{std::vector<int32_t>(length_ + 1, -1), std::vector<int32_t>(length_, 0)};
      batches[b].push_back(index < sequences ? dataset_.held_out(index) : std::move(empty));
    }
  return batches;
}

}  // namespace dsa
