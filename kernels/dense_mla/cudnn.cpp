// Letters as in dense_mla.h; a part [1,H,rows,D] is a view of rows of [T,H,D].
#include "kernels/dense_mla/cudnn.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <optional>

#include "kernels/packed/packed.h"

namespace dsa::cudnn {
namespace {

struct Run {
  int64_t row, rows;         // of the query
  int64_t start, full;       // keys [start, start + full) are seen by all rows; row i sees i + 1 more
};

std::vector<Run> runs_of(const KeyRanges& ranges) {
  std::vector<Run> runs;
  const int64_t T = static_cast<int64_t>(ranges.start.size());
  for (int64_t t = 0; t < T;) {
    int64_t last = t + 1;
    if (ranges.start[t] < ranges.end[t]) {
      while (last < T && ranges.start[last] == ranges.start[t] && ranges.end[last] == ranges.end[last - 1] + 1) ++last;
      runs.push_back({t, last - t, ranges.start[t], ranges.end[t] - 1 - ranges.start[t]});
    }
    t = last;
  }
  return runs;
}

at::Tensor rows_of(const at::Tensor& x_NHW, int64_t first, int64_t count) {
  return x_NHW.narrow(0, first, count).transpose(0, 1).unsqueeze(0);
}

struct Part {
  at::Tensor o_1HNV, lse_1HN;
};

Part attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, double scale) {
  const auto out = at::_scaled_dot_product_cudnn_attention(q, k, v, std::nullopt, /*compute_log_sumexp=*/true, 0.0, causal,
                                                           false, scale);
  return {std::get<0>(out), std::get<1>(out).view({1, q.size(1), q.size(2)})};
}

}  // namespace

DenseMlaOutput dense_mla_forward(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                                 const at::Tensor& start_T, const at::Tensor& end_T, double scale) {
  const int64_t T = q_THD.size(0), H = q_THD.size(1), V = v_SHV.size(2);
  const auto runs = runs_of(KeyRanges(start_T, end_T, T, k_SHD.size(0)));
  const auto fp32 = q_THD.options().dtype(at::kFloat);
  if (runs.size() == 1 && runs[0].rows == T && runs[0].full == 0) {
    const Part p = attend(rows_of(q_THD, 0, T), rows_of(k_SHD, runs[0].start, T), rows_of(v_SHV, runs[0].start, T), true, scale);
    return {p.o_1HNV.squeeze(0).transpose(0, 1).contiguous(), p.lse_1HN.squeeze(0).t().contiguous()};
  }
  DenseMlaOutput out{at::zeros({T, H, V}, q_THD.options()),
                     at::empty({T, H}, fp32).fill_(-std::numeric_limits<double>::infinity())};
  for (const Run& r : runs) {
    const at::Tensor q = rows_of(q_THD, r.row, r.rows);
    const int64_t diagonal = r.start + r.full;
    Part p = attend(q, rows_of(k_SHD, diagonal, r.rows), rows_of(v_SHV, diagonal, r.rows), true, scale);
    if (r.full > 0) {
      const Part f = attend(q, rows_of(k_SHD, r.start, r.full), rows_of(v_SHV, r.start, r.full), false, scale);
      const at::Tensor lse = at::logaddexp(p.lse_1HN, f.lse_1HN);
      p.o_1HNV = p.o_1HNV * (p.lse_1HN - lse).exp_().unsqueeze(3) + f.o_1HNV * (f.lse_1HN - lse).exp_().unsqueeze(3);
      p.lse_1HN = lse;
    }
    rows_of(out.o_THV, r.row, r.rows).copy_(p.o_1HNV);
    out.lse_TH.narrow(0, r.row, r.rows).copy_(p.lse_1HN.squeeze(0).t());
  }
  return out;
}

}  // namespace dsa::cudnn
