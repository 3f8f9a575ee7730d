#include "trainer/model/token_batch.h"

#include <ATen/ops/argsort.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "parallel/sequence_split.h"

namespace dsa {
namespace {

at::Tensor int64_tensor(std::vector<int64_t> values) {
  return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::TensorOptions().dtype(at::kLong)).clone();
}

// t_{i+shift} of a sample, or kNoTarget where the sequence or (with a document mask) the document of i ends.
int64_t token_after(const Sample& sample, int64_t i, int64_t shift) {
  const int64_t length = static_cast<int64_t>(sample.document_start.size());
  if (i >= length || i + shift > length || sample.tokens[i + shift] < 0) return kNoTarget;
  for (int64_t j = i + 1; j <= std::min(i + shift, length - 1); ++j)
    if (sample.document_start[j] > i) return kNoTarget;
  return sample.tokens[i + shift];
}

int64_t padded_length(int64_t length, const Degrees& degrees) {
  const int64_t ranks = int64_t{degrees.context} * degrees.tensor, unit = ranks > 1 ? 2 * ranks : 1;
  return (length + unit - 1) / unit * unit;
}

// Whether position i is the last of one of kSampleRows equal stretches of a sequence.
bool is_sampled(int64_t i, int64_t tokens) {
  return i < tokens && (i + 1) * kSampleRows / tokens > i * kSampleRows / tokens;
}

}  // namespace

// Built on the host, used on the device.
void TokenBatch::move_to(at::Device device) {
  for (at::Tensor* t : {&start_A, &end_A, &start_N, &end_N, &stream_row_N, &real_N, &rope_A.cos_TR2, &rope_A.sin_TR2,
                        &rope_N.cos_TR2, &rope_N.sin_TR2})
    if (t->defined()) *t = t->to(device);
  for (auto* list : {&inputs_T, &targets_T, &sample_rows_B})
    for (at::Tensor& t : *list) t = t.to(device);
  for (RowOrder* order : {&to_stream, &to_ascending}) order->move_to(device);
}

std::vector<int64_t> count_targets(const std::vector<Sample>& samples, int64_t mtp_depth) {
  std::vector<int64_t> counts(mtp_depth + 1, 0);
  for (const Sample& sample : samples)
    for (int64_t i = 0; i < static_cast<int64_t>(sample.document_start.size()); ++i)
      for (int64_t d = 0; d <= mtp_depth; ++d) counts[d] += token_after(sample, i, d + 1) != kNoTarget;
  return counts;
}

TokenBatch make_batch(const std::vector<Sample>& samples, const ModelConfig& config, Mesh& mesh, at::ScalarType dtype) {
  const Degrees& degrees = mesh.layout().degrees();
  const Coordinates& me = mesh.coordinates();
  TokenBatch b;
  b.sequences = static_cast<int64_t>(samples.size());
  const int64_t tokens = static_cast<int64_t>(samples.at(0).document_start.size());
  b.length = padded_length(tokens, degrees);
  b.mtp_depth = config.num_nextn_predict_layers;
  const SequenceSplit split(b.sequences, b.length, degrees.context, degrees.tensor);
  const std::vector<int64_t> rows = split.natural_rows(me.context);
  const Rows own = split.own_range(me.tensor);

  std::vector<int64_t> start, end, position;
  std::vector<double> real;
  std::vector<std::vector<int64_t>> inputs(b.mtp_depth + 1), targets(b.mtp_depth + 1);
  for (const int64_t row : rows) {
    const int64_t sequence = row / b.length, i = row % b.length;
    const Sample& sample = samples[sequence];
    const bool padding = i >= tokens;
    const int64_t document = padding ? 0 : sample.document_start[i];
    start.push_back(sequence * b.length + document);
    end.push_back(row + 1);
    position.push_back(i - document);
    real.push_back(padding ? 0 : 1);
    for (int64_t d = 0; d <= b.mtp_depth; ++d) {
      const int64_t input = d == 0 ? (padding ? 0 : sample.tokens[i]) : token_after(sample, i, d);
      inputs[d].push_back(std::max<int64_t>(input, 0));
      targets[d].push_back(padding ? kNoTarget : token_after(sample, i, d + 1));
    }
  }
  std::vector<std::vector<int64_t>> sample_rows(b.sequences);
  for (int64_t n = 0; n < own.extent; ++n) {
    const int64_t row = rows[own.offset + n];
    if (is_sampled(row % b.length, tokens)) sample_rows[row / b.length].push_back(n);
  }
  for (const std::vector<int64_t>& numbers : sample_rows) b.sample_rows_B.push_back(int64_tensor(numbers));
  const auto own_part = [&](const at::Tensor& x_T) { return x_T.narrow(0, own.offset, own.extent); };
  const at::Tensor start_T = int64_tensor(start), end_T = int64_tensor(end);
  b.start_N = own_part(start_T);
  b.end_N = own_part(end_T);
  b.stream_row_N = own_part(int64_tensor(rows));
  if (!split.is_identity()) b.to_stream = RowOrder(int64_tensor(split.natural_from_gathered()));
  if (degrees.tensor > 1) b.to_ascending = RowOrder(at::argsort(int64_tensor(rows)));
  b.start_A = b.to_ascending.apply(start_T);
  b.end_A = b.to_ascending.apply(end_T);
  const auto statistics = dtype == at::kDouble ? at::kDouble : at::kFloat;
  b.real_N = at::from_blob(real.data(), {static_cast<int64_t>(real.size())}, at::TensorOptions().dtype(at::kDouble))
                 .narrow(0, own.offset, own.extent).to(statistics, /*non_blocking=*/false, /*copy=*/true);
  for (int64_t d = 0; d <= b.mtp_depth; ++d) {
    b.inputs_T.push_back(int64_tensor(inputs[d]));
    b.targets_T.push_back(int64_tensor(targets[d]));
  }
  const RopeScaling& r = config.rope;
  const RopeParameters rope{r.theta, r.factor, static_cast<double>(r.original_max_position), r.beta_fast, r.beta_slow,
                            r.yarn, config.qk_rope_head_dim};
  const RopeTable rope_T = rope_table(int64_tensor(position), rope, dtype);
  b.rope_N = {own_part(rope_T.cos_TR2), own_part(rope_T.sin_TR2)};
  b.rope_A = {b.to_ascending.apply(rope_T.cos_TR2), b.to_ascending.apply(rope_T.sin_TR2)};
  b.move_to(mesh.device());
  return b;
}

}  // namespace dsa
