// Legend: N tokens here, K experts a token, S (token, destination rank) rows sent, R such rows received, P (token,
// expert) pairs sent, M pairs received = rows computed here, H row width.
//
//   dispatch   x_NH --select--> S --all_to_all--> R --select--> M        (sorted by expert)
//   combine    y_MH --weighted sum per received row--> R --all_to_all--> S --sum per token--> out_NH
//
// Backward is the same road the other way. Weights travel as one number per pair.
#include "parallel/expert_dispatch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace dsa {

namespace {

at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor index_tensor(const std::vector<int64_t>& values, c10::Device device) {
  at::Tensor t = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(at::kLong));
  if (!values.empty()) std::memcpy(t.data_ptr(), values.data(), values.size() * sizeof(int64_t));
  return t.to(device);
}

/// target_j = sum of the sources i with target_of[i] == j, in ascending i. Pass p adds the p-th source of every
/// target: inside a pass no target occurs twice, so the result is deterministic on every device.
class SegmentSum {
 public:
  SegmentSum() = default;
  SegmentSum(const std::vector<int64_t>& target_of, int64_t targets, c10::Device device) : targets_(targets) {
    std::vector<size_t> seen(targets, 0);
    std::vector<std::vector<int64_t>> to, from;
    for (size_t i = 0; i < target_of.size(); ++i) {
      const size_t pass = seen[target_of[i]]++;
      if (pass == to.size()) to.emplace_back(), from.emplace_back();
      to[pass].push_back(target_of[i]);
      from[pass].push_back(static_cast<int64_t>(i));
    }
    for (size_t p = 0; p < to.size(); ++p)
      passes_.push_back({index_tensor(to[p], device), index_tensor(from[p], device)});
  }

  /// source [sources, H], weight [sources] or undefined -> [targets, H] in source's accumulation type.
  at::Tensor operator()(const at::Tensor& source, const at::Tensor& weight = {}) const {
    const auto type = accumulation_type(source);
    at::Tensor sum = at::zeros({targets_, source.size(1)}, source.options().dtype(type));
    for (const Pass& pass : passes_) {
      at::Tensor rows = source.index_select(0, pass.from).to(type);
      if (weight.defined()) rows = rows.mul(weight.index_select(0, pass.from).to(type).unsqueeze(1));
      sum.index_add_(0, pass.to, rows);
    }
    return sum;
  }

 private:
  struct Pass {
    at::Tensor to, from;
  };
  int64_t targets_ = 0;
  std::vector<Pass> passes_;
};

[[noreturn]] void refuse(const std::string& why, const std::string& suggestion) {
  throw std::invalid_argument("cannot dispatch tokens to experts (" + why + ") " + suggestion);
}

}  // namespace

struct ExpertRouting : torch::CustomClassHolder {
  Communicator* group = nullptr;
  int64_t tokens = 0, choices = 0;                   // N, K
  std::vector<int64_t> sent_tokens, received_tokens;  // rows per rank; sums S, R
  std::vector<int64_t> sent_pairs, received_pairs;    // pairs per rank; sums P, M
  at::Tensor token_of_sent;    // [S]
  at::Tensor choice_of_pair;   // [P] n*K + k
  at::Tensor received_of_row;  // [M]
  at::Tensor pair_of_row;      // [M] index among the received pairs
  at::Tensor row_of_pair;      // [M] the inverse
  SegmentSum to_tokens;        // S -> N
  SegmentSum to_received;      // M -> R
  std::vector<int64_t> rows_per_expert;

  at::Tensor there(const at::Tensor& x) const { return move(x, sent_tokens, received_tokens); }
  at::Tensor back(const at::Tensor& x) const { return move(x, received_tokens, sent_tokens); }
  at::Tensor pairs_there(const at::Tensor& x) const { return move(x, sent_pairs, received_pairs); }
  at::Tensor pairs_back(const at::Tensor& x) const { return move(x, received_pairs, sent_pairs); }

 private:
  at::Tensor move(const at::Tensor& x, const std::vector<int64_t>& send, const std::vector<int64_t>& recv) const {
    return group->size() == 1 ? x : group->all_to_all(x, send, recv);
  }
};

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using RoutingPtr = c10::intrusive_ptr<ExpertRouting>;

RoutingPtr routing_of(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<ExpertRouting>(ctx->saved_data["routing"].toCapsule());
}

struct Dispatch : torch::autograd::Function<Dispatch> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x_NH, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    const at::Tensor x_RH = routing->there(x_NH.index_select(0, routing->token_of_sent));
    return {x_RH.index_select(0, routing->received_of_row), at::empty({0}, x_NH.options())};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const RoutingPtr routing = routing_of(ctx);
    const auto dtype = grads[0].scalar_type();
    const at::Tensor grad_SH = routing->back(routing->to_received(grads[0]).to(dtype));
    return {routing->to_tokens(grad_SH).to(dtype), {}};
  }
};

struct Combine : torch::autograd::Function<Combine> {
  // `link` is dispatch's second output: with it this node is an ancestor of dispatch's node even where no row
  // connects them, and backward visits both on every rank.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y_MH, const at::Tensor& weights_NK,
                            const at::Tensor& link, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    const at::Tensor weights_P = weights_NK.reshape({-1}).index_select(0, routing->choice_of_pair);
    const at::Tensor weights_M = routing->pairs_there(weights_P).index_select(0, routing->pair_of_row);
    ctx->save_for_backward({y_MH, weights_M, link});
    const at::Tensor partial_SH = routing->back(routing->to_received(y_MH, weights_M).to(y_MH.scalar_type()));
    return routing->to_tokens(partial_SH).to(y_MH.scalar_type());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const RoutingPtr routing = routing_of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &y_MH = saved[0], &weights_M = saved[1], &link = saved[2];
    const auto type = accumulation_type(y_MH);
    const at::Tensor grad_RH = routing->there(grads[0].index_select(0, routing->token_of_sent));
    const at::Tensor grad_MH = grad_RH.index_select(0, routing->received_of_row).to(type);
    const at::Tensor grad_y_MH = grad_MH.mul(weights_M.to(type).unsqueeze(1)).to(y_MH.scalar_type());
    const at::Tensor grad_weights_M = grad_MH.mul(y_MH.to(type)).sum(1).to(weights_M.scalar_type());
    const at::Tensor grad_weights_P = routing->pairs_back(grad_weights_M.index_select(0, routing->row_of_pair));
    at::Tensor grad_weights_NK = at::empty({routing->tokens * routing->choices}, weights_M.options());
    grad_weights_NK.index_copy_(0, routing->choice_of_pair, grad_weights_P);  // every (n, k) is one pair
    return {grad_y_MH, grad_weights_NK.view({routing->tokens, routing->choices}), at::empty({0}, link.options()), {}};
  }
};

}  // namespace

ExpertDispatch::ExpertDispatch(const at::Tensor& experts_NK, const at::Tensor& weights_NK, int64_t num_experts,
                               Communicator& group)
    : routing_(c10::make_intrusive<ExpertRouting>()), weights_NK_(weights_NK) {
  const int ranks = group.size();
  if (num_experts < 1 || num_experts % ranks != 0)
    refuse(std::to_string(num_experts) + " experts over " + std::to_string(ranks) + " ranks",
           "the expert degree must divide the number of experts");
  if (experts_NK.dim() != 2 || experts_NK.scalar_type() != at::kLong)
    refuse("experts are not int64 [N, K]", "give the router's selection");
  if (weights_NK.sizes() != experts_NK.sizes() || !weights_NK.is_floating_point())
    refuse("weights are not floating [N, K] like the experts", "give the router's weights");
  const c10::Device device = weights_NK.device();
  const at::Tensor experts = experts_NK.cpu().contiguous();
  const int64_t* expert_of = experts.data_ptr<int64_t>();
  const int64_t N = experts.size(0), K = experts.size(1), per_rank = num_experts / ranks;

  ExpertRouting& r = *routing_;
  r.group = &group;
  r.tokens = N;
  r.choices = K;

  // What goes where: per destination the tokens in ascending order and, for each, its experts there ascending.
  std::vector<std::vector<int64_t>> tokens_to(ranks), choices_to(ranks), pairs_to(ranks);  // pairs: (row, expert)
  std::vector<int64_t> ks(K);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t* mine = expert_of + n * K;
    std::iota(ks.begin(), ks.end(), int64_t{0});
    std::sort(ks.begin(), ks.end(), [mine](int64_t a, int64_t b) { return mine[a] < mine[b]; });
    for (int64_t i = 0; i < K; ++i) {
      const int64_t expert = mine[ks[i]];
      if (expert < 0 || expert >= num_experts)
        refuse("expert " + std::to_string(expert) + " of token " + std::to_string(n),
               "experts count from 0 to " + std::to_string(num_experts - 1));
      if (i > 0 && mine[ks[i - 1]] == expert)
        refuse("token " + std::to_string(n) + " chose expert " + std::to_string(expert) + " twice",
               "the choices of a token are distinct");
      const int64_t to = expert / per_rank;
      if (tokens_to[to].empty() || tokens_to[to].back() != n) tokens_to[to].push_back(n);
      choices_to[to].push_back(n * K + ks[i]);
      pairs_to[to].push_back(static_cast<int64_t>(tokens_to[to].size()) - 1);
      pairs_to[to].push_back(expert % per_rank);
    }
  }
  std::vector<int64_t> counts, token_of_sent, choice_of_pair, pairs;
  for (int to = 0; to < ranks; ++to) {
    r.sent_tokens.push_back(static_cast<int64_t>(tokens_to[to].size()));
    r.sent_pairs.push_back(static_cast<int64_t>(choices_to[to].size()));
    counts.insert(counts.end(), {r.sent_tokens.back(), r.sent_pairs.back()});
    token_of_sent.insert(token_of_sent.end(), tokens_to[to].begin(), tokens_to[to].end());
    choice_of_pair.insert(choice_of_pair.end(), choices_to[to].begin(), choices_to[to].end());
    pairs.insert(pairs.end(), pairs_to[to].begin(), pairs_to[to].end());
  }
  r.token_of_sent = index_tensor(token_of_sent, device);
  r.choice_of_pair = index_tensor(choice_of_pair, device);
  r.to_tokens = SegmentSum(token_of_sent, N, device);

  // What comes: counts first, then the pairs.
  const std::vector<int64_t> ones(ranks, 1);
  const at::Tensor counts_here = group.all_to_all(index_tensor(counts, device).view({ranks, 2}), ones, ones).cpu();
  for (int from = 0; from < ranks; ++from) {
    r.received_tokens.push_back(counts_here.data_ptr<int64_t>()[2 * from]);
    r.received_pairs.push_back(counts_here.data_ptr<int64_t>()[2 * from + 1]);
  }
  const at::Tensor pairs_here =
      group.all_to_all(index_tensor(pairs, device).view({-1, 2}), r.sent_pairs, r.received_pairs).cpu();
  const int64_t M = pairs_here.size(0);
  std::vector<int64_t> received_of_pair(M), expert_of_pair(M);
  for (int64_t from = 0, pair = 0, first_row = 0; from < ranks; first_row += r.received_tokens[from++])
    for (int64_t i = 0; i < r.received_pairs[from]; ++i, ++pair) {
      received_of_pair[pair] = first_row + pairs_here.data_ptr<int64_t>()[2 * pair];
      expert_of_pair[pair] = pairs_here.data_ptr<int64_t>()[2 * pair + 1];
    }

  // Computed rows: pairs by expert; pairs arrive by (source, token), and a stable sort keeps that.
  std::vector<int64_t> pair_of_row(M), row_of_pair(M), received_of_row(M);
  std::iota(pair_of_row.begin(), pair_of_row.end(), int64_t{0});
  std::stable_sort(pair_of_row.begin(), pair_of_row.end(),
                   [&](int64_t a, int64_t b) { return expert_of_pair[a] < expert_of_pair[b]; });
  r.rows_per_expert.assign(per_rank, 0);
  for (int64_t row = 0; row < M; ++row) {
    row_of_pair[pair_of_row[row]] = row;
    received_of_row[row] = received_of_pair[pair_of_row[row]];
    ++r.rows_per_expert[expert_of_pair[pair_of_row[row]]];
  }
  r.pair_of_row = index_tensor(pair_of_row, device);
  r.row_of_pair = index_tensor(row_of_pair, device);
  r.received_of_row = index_tensor(received_of_row, device);
  const int64_t R = std::accumulate(r.received_tokens.begin(), r.received_tokens.end(), int64_t{0});
  r.to_received = SegmentSum(received_of_row, R, device);
}

ExpertDispatch::~ExpertDispatch() = default;

const std::vector<int64_t>& ExpertDispatch::rows_per_expert() const { return routing_->rows_per_expert; }

at::Tensor ExpertDispatch::dispatch(const at::Tensor& x_NH) {
  if (link_.defined()) throw std::logic_error("dispatch called twice (one ExpertDispatch serves one batch) make another");
  if (x_NH.dim() != 2 || x_NH.size(0) != routing_->tokens)
    refuse("x is not [" + std::to_string(routing_->tokens) + ", H]", "give one row per routed token");
  const variable_list out = Dispatch::apply(x_NH, routing_);
  link_ = out[1];
  // Whether y or the weights require grad can differ between ranks (no rows, no experts run); the link makes
  // combine's node exist on all of them alike.
  if (at::GradMode::is_enabled() && !link_.requires_grad()) link_.requires_grad_(true);
  return out[0];
}

at::Tensor ExpertDispatch::combine(const at::Tensor& y_MH) {
  if (!link_.defined()) throw std::logic_error("combine called before dispatch (rows come from there) call it first");
  const int64_t M = routing_->received_of_row.size(0);
  if (y_MH.dim() != 2 || y_MH.size(0) != M)
    refuse("y is not [" + std::to_string(M) + ", H]", "give one row per dispatched row, in its order");
  return Combine::apply(y_MH, weights_NK_, link_, routing_);
}

}  // namespace dsa
