// Which sequences a data rank trains on in a step: slot j of step n is sample (n-1) * batch + j of the dataset's order,
// and data rank r takes the r-th contiguous part of the slots. So the order of samples depends neither on the mesh nor
// on resumes.
#pragma once

#include "data/token_dataset.h"
#include "parallel/layout.h"
#include "recipes/recipe.h"

namespace dsa {

using Microbatches = std::vector<std::vector<Sample>>;

class BatchLoader {
 public:
  BatchLoader(const TokenDataset& dataset, const Recipe& recipe, int data_rank, int data_degree);

  Microbatches training(int64_t step) const;  // step counts from 1
  // The first `sequences` held-out samples shared out over the data ranks; a rank that has fewer than the others gets
  // empty ones (no targets, no real tokens), so that all ranks run the same number of microbatches.
  Microbatches held_out(int64_t sequences) const;

 private:
  const TokenDataset& dataset_;
  int64_t batch_, micro_, length_;
  int data_rank_, data_degree_;
};

}  // namespace dsa
