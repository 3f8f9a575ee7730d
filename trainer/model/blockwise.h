// A function evaluated block by block, forward and backward, so that what it needs inside exists for one block alone:
//
//   y = join_b f(x1 or its part of block b, x2 ..., )        over rows (tokens) or heads
//
// The forward pass keeps the inputs and y. The backward pass runs f again, block after block in order, with gradients,
// and adds the gradients of inputs that all blocks share in fp32 (fp64). A single block is simply f, kept whole.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace dsa {

struct BlockInput {
  at::Tensor value;
  int64_t cut = -1;   // dimension that is cut into blocks; -1: every block gets the whole
  int64_t unit = 1;   // its elements for each row or head of a block
};

struct Block {
  int64_t index, begin, count;  // rows or heads [begin, begin + count)
  at::Tensor known;             // this block of y in the second run; undefined in the first
};

using BlockFunction = std::function<at::Tensor(const Block&, const std::vector<at::Tensor>&)>;

// `count` rows or heads in blocks of at most `block`; y's blocks are joined along dimension `joined`. f must give the same
// y in both runs, and outlive the backward pass with all it refers to.
at::Tensor blockwise(std::vector<BlockInput> inputs, int64_t count, int64_t block, int64_t joined, BlockFunction f);

// y = x w^T as the last operation of a block, x [N,I], w [O,I]: in the second run y is known, and only its gradients are formed.
at::Tensor last_linear(const Block& block, const at::Tensor& x_NI, const at::Tensor& w_OI);

}  // namespace dsa
