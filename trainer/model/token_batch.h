// One microbatch as the model sees it. B sequences of T positions are one packed stream of S = B*T keys; row r of the
// stream sees keys start[r] <= s < end[r]: causality, the batch and packed documents are all this one range.
//
//   S  stream rows (all context ranks)      T  rows of this context rank, as a gather over TENSOR orders them
//   N  rows this rank owns (T / tensor: the residual stream is sequence-parallel inside a tensor group)
//   A  the T rows in the stream's order
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "data/model_config.h"
#include "data/token_dataset.h"
#include "kernels/rope/rope.h"
#include "parallel/mesh.h"
#include "trainer/model/row_order.h"

namespace dsa {

constexpr int64_t kNoTarget = -100;
constexpr int64_t kSampleRows = 32;  // of a sequence, for what is too dear to measure on all of them

struct TokenBatch {
  int64_t sequences = 0;  // B
  int64_t length = 0;     // T of the text above: positions per sequence, padding included
  int64_t mtp_depth = 0;

  // What each query row may see, in stream numbers, and where it stands; int64.
  at::Tensor start_A, end_A, start_N, end_N;
  at::Tensor stream_row_N;  // which stream row each own row is
  at::Tensor real_N;        // 1 for tokens, 0 for padding, in the statistics dtype
  // Of each sequence, those of its evenly spaced sample rows that this rank owns (numbers of own rows, int64; perhaps none).
  // Their positions do not depend on the mesh.
  std::vector<at::Tensor> sample_rows_B;
  RowOrder to_stream;       // of rows gathered over SEQUENCE: into the stream's order
  RowOrder to_ascending;    // of rows gathered over TENSOR: T -> A
  RopeTable rope_A, rope_N;

  // Depth 0 is the model itself: inputs t_i, targets t_{i+1}. Depth d is MTP module d: inputs t_{i+d}, targets
  // t_{i+d+1}. A target is kNoTarget at the end of a sequence and, with a document mask, of a document.
  std::vector<at::Tensor> inputs_T, targets_T;

  void move_to(at::Device device);
};

// Targets of each depth in the whole of `samples` (for normalisation; the same arithmetic as make_batch's).
std::vector<int64_t> count_targets(const std::vector<Sample>& samples, int64_t mtp_depth);

// `samples`: the B sequences of this data rank's microbatch, each `length`+1 tokens (the last only a target, or -1: none).
// Sequences are padded at their end to a multiple of 2*context*tensor where they are split. dtype: the model's.
TokenBatch make_batch(const std::vector<Sample>& samples, const ModelConfig& config, Mesh& mesh, at::ScalarType dtype);

}  // namespace dsa
