// Legend: N tokens here, K experts a token, S (token, destination rank) rows sent, R such rows received, P (token,
// expert) pairs sent, M pairs received = rows computed here, H row width.
//
//   dispatch   x_NH --select--> S --all_to_all--> R --select--> M        (sorted by expert)
//   combine    y_MH --weighted sum per received row--> R --all_to_all--> S --sum per token--> out_NH
//
// Backward is the same road the other way. Each journey of rows is two nodes, its start and its end; what the caller
// computes between them, and its gradients in the backward pass, need not wait for the rows. Weights travel as one
// number per pair. The permutations are made where the tensors lie; the host sees counts only, once: it needs them as
// sizes.
#include "parallel/expert_dispatch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "parallel/row_sums.h"

namespace dsa {

namespace {

int64_t total(const std::vector<int64_t>& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

[[noreturn]] void refuse(const std::string& why, const std::string& suggestion) {
  throw std::invalid_argument("cannot dispatch tokens to experts (" + why + ") " + suggestion);
}

/// Names the first choice that is out of range or made twice.
[[noreturn]] void refuse_choices(const at::Tensor& experts_NK, int64_t num_experts) {
  const at::Tensor host = experts_NK.cpu().contiguous();
  const int64_t K = host.size(1), *expert = host.data_ptr<int64_t>();
  for (int64_t i = 0; i < host.numel(); ++i) {
    if (expert[i] < 0 || expert[i] >= num_experts)
      refuse("expert " + std::to_string(expert[i]) + " of token " + std::to_string(i / K),
             "experts count from 0 to " + std::to_string(num_experts - 1));
    if (std::find(expert + i / K * K, expert + i, expert[i]) != expert + i)
      refuse("token " + std::to_string(i / K) + " chose expert " + std::to_string(expert[i]) + " twice",
             "the choices of a token are distinct");
  }
  throw std::logic_error("choices counted wrongly (each is legal) this is a mistake of the program");
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
  at::Tensor first_of_token, sent_of_token;       // [N+1], [S] the sent rows of each token, by rank
  at::Tensor first_of_received;                   // [R+1] the received pairs of each received row, by expert
  std::vector<int64_t> rows_per_expert;

  Transfer rows;               // on the road; at most one at a time

  at::Tensor to_tokens(const at::Tensor& x_SH) const { return row_sums(x_SH, first_of_token, sent_of_token); }
  at::Tensor to_received(const at::Tensor& x_MH, const at::Tensor& weights_M = {}) const {
    return row_sums(x_MH, first_of_received, row_of_pair, weights_M);
  }
  Transfer there(const at::Tensor& x) const { return move(x, sent_tokens, received_tokens); }
  Transfer back(const at::Tensor& x) const { return move(x, received_tokens, sent_tokens); }
  at::Tensor pairs_there(const at::Tensor& x) const { return move(x, sent_pairs, received_pairs).wait(); }
  at::Tensor pairs_back(const at::Tensor& x) const { return move(x, received_pairs, sent_pairs).wait(); }

 private:
  Transfer move(const at::Tensor& x, const std::vector<int64_t>& send, const std::vector<int64_t>& recv) const {
    return group->size() == 1 ? Transfer(x, x, nullptr) : group->start_all_to_all(x, send, recv);
  }
};

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using RoutingPtr = c10::intrusive_ptr<ExpertRouting>;

RoutingPtr routing_of(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<ExpertRouting>(ctx->saved_data["routing"].toCapsule());
}

// The rows leave. In the backward pass their gradients have come back. Between this node and its end stands a tensor
// of the rows' shape: forward the rows still coming, backward the gradients still going. Nobody reads it.
struct StartDispatch : torch::autograd::Function<StartDispatch> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_NH, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    routing->rows = routing->there(x_NH.index_select(0, routing->token_of_sent));
    return routing->rows.result();
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    const RoutingPtr routing = routing_of(ctx);
    const at::Tensor grad_SH = routing->rows.wait();
    return {routing->to_tokens(grad_SH), {}};
  }
};

struct EndDispatch : torch::autograd::Function<EndDispatch> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& coming_RH, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    const at::Tensor x_RH = routing->rows.wait();
    return {x_RH.index_select(0, routing->received_of_row), at::empty({0}, coming_RH.options())};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const RoutingPtr routing = routing_of(ctx);
    const at::Tensor grad_RH = routing->to_received(grads[0]);
    routing->rows = routing->back(grad_RH);
    return {grad_RH, {}};
  }
};

struct StartCombine : torch::autograd::Function<StartCombine> {
  // `link` is dispatch's second output: with it this node is an ancestor of dispatch's nodes even where no row
  // connects them, and backward visits them all on every rank.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y_MH, const at::Tensor& weights_NK,
                            const at::Tensor& link, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    const at::Tensor weights_P = weights_NK.reshape({-1}).index_select(0, routing->choice_of_pair);
    const at::Tensor weights_M = routing->pairs_there(weights_P).index_select(0, routing->pair_of_row);
    ctx->save_for_backward({y_MH, weights_M, link});
    routing->rows = routing->back(routing->to_received(y_MH, weights_M));
    return routing->rows.result();
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    const RoutingPtr routing = routing_of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &y_MH = saved[0], &weights_M = saved[1], &link = saved[2];
    const auto [grad_y_MH, grad_weights_M] = scaled_rows(routing->rows.wait(), routing->received_of_row, weights_M, y_MH);
    const at::Tensor grad_weights_P = routing->pairs_back(grad_weights_M.index_select(0, routing->row_of_pair));
    at::Tensor grad_weights_NK = at::empty({routing->tokens * routing->choices}, weights_M.options());
    grad_weights_NK.index_copy_(0, routing->choice_of_pair, grad_weights_P);  // every (n, k) is one pair
    return {grad_y_MH, grad_weights_NK.view({routing->tokens, routing->choices}), at::empty({0}, link.options()), {}};
  }
};

struct EndCombine : torch::autograd::Function<EndCombine> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor&, const RoutingPtr& routing) {
    ctx->saved_data["routing"] = c10::IValue::make_capsule(routing);
    return routing->to_tokens(routing->rows.wait());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const RoutingPtr routing = routing_of(ctx);
    const at::Tensor grad_SH = grads[0].index_select(0, routing->token_of_sent);
    routing->rows = routing->there(grad_SH);
    return {grad_SH, {}};
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
  ExpertRouting& r = *routing_;
  const int64_t N = experts_NK.size(0), K = experts_NK.size(1), per_rank = num_experts / ranks;
  r.group = &group;
  r.tokens = N;
  r.choices = K;
  const at::NoGradGuard no_grad;
  const at::TensorOptions options = experts_NK.options();
  const auto count_to = [&](int64_t end) { return at::arange(end, options); };
  const auto sorted = [](const at::Tensor& x, int64_t dim = 0) { return x.sort(/*stable=*/true, dim, /*descending=*/false); };

  // A token's experts ascending, hence by destination; `position` counts those of one destination: 0 begins a row.
  const auto [expert_NK, choice_NK] = sorted(experts_NK, 1);
  const at::Tensor to_NK = expert_NK.div(per_rank, "floor");
  const at::Tensor position_NK = count_to(K).sub(at::searchsorted(to_NK, to_NK));
  const at::Tensor expert_ends = at::searchsorted(std::get<0>(sorted(expert_NK.flatten())), count_to(num_experts + 1));

  // Sent pairs: by destination, token, expert. A row begins where the position is 0.
  const auto [to_P, pair_order] = sorted(to_NK.flatten());
  const auto in_order = [order = pair_order](const at::Tensor& x_NK) { return x_NK.flatten().index_select(0, order); };
  const at::Tensor rows_until_P = in_order(position_NK).eq(0).cumsum(0);
  const at::Tensor pairs_before = expert_ends.index_select(0, count_to(ranks + 1).mul(per_rank));
  const at::Tensor rows_before = at::cat({at::zeros({1}, options), rows_until_P}).index_select(0, pairs_before);
  const at::Tensor twice = expert_NK.narrow(1, 0, K - 1).eq(expert_NK.narrow(1, 1, K - 1)).sum().view({1});
  const at::Tensor counted = at::cat({expert_ends, rows_before, twice}).cpu();
  const int64_t *experts_before = counted.data_ptr<int64_t>(), *rows_sent = experts_before + num_experts + 1;
  if (experts_before[0] != 0 || experts_before[num_experts] != N * K || rows_sent[ranks + 1] != 0)
    refuse_choices(experts_NK, num_experts);

  // To each rank: how many rows, and how many pairs of each of its experts.
  at::Tensor counts = at::empty({ranks, 1 + per_rank}, at::TensorOptions(at::kLong));
  for (int to = 0; to < ranks; ++to) {
    const int64_t rows = rows_sent[to + 1] - rows_sent[to], *pairs = experts_before + to * per_rank;
    int64_t* out = counts.data_ptr<int64_t>() + to * (1 + per_rank);
    out[0] = rows;
    for (int64_t e = 0; e < per_rank; ++e) out[1 + e] = pairs[e + 1] - pairs[e];
    r.sent_tokens.push_back(rows);
    r.sent_pairs.push_back(pairs[per_rank] - pairs[0]);
  }
  const std::vector<int64_t> ones(ranks, 1);
  const at::Tensor counts_here = group.all_to_all(counts, ones, ones);
  r.rows_per_expert.assign(per_rank, 0);
  for (int from = 0; from < ranks; ++from) {
    const int64_t* in = counts_here.data_ptr<int64_t>() + from * (1 + per_rank);
    r.received_tokens.push_back(in[0]);
    r.received_pairs.push_back(std::accumulate(in + 1, in + 1 + per_rank, int64_t{0}));
    for (int64_t e = 0; e < per_rank; ++e) r.rows_per_expert[e] += in[1 + e];
  }

  const int64_t S = total(r.sent_tokens), R = total(r.received_tokens), M = total(r.received_pairs);
  const at::Tensor token_P = pair_order.div(K, "floor");
  const at::Tensor sent_row_P = rows_until_P.sub(1);
  r.choice_of_pair = in_order(choice_NK).add(token_P, K);
  r.token_of_sent = token_P.index_select(0, at::searchsorted(sent_row_P, count_to(S)));
  const auto [token_of_row, sent_of_token] = sorted(r.token_of_sent);
  r.first_of_token = at::searchsorted(token_of_row, count_to(N + 1));
  r.sent_of_token = sent_of_token;
  const at::Tensor first_row_to = rows_before.narrow(0, 0, ranks);
  const at::Tensor pairs_here = r.pairs_there(
      at::stack({sent_row_P.sub(first_row_to.index_select(0, to_P)), in_order(expert_NK).remainder(per_rank)}, 1));

  // Computed rows: pairs by expert; pairs arrive by (source, token), and a stable sort keeps that.
  at::Tensor sources = at::empty({2, ranks}, at::TensorOptions(at::kLong));
  for (int64_t from = 0, first_row = 0; from < ranks; first_row += r.received_tokens[from++]) {
    sources.data_ptr<int64_t>()[from] = first_row;
    sources.data_ptr<int64_t>()[ranks + from] = r.received_pairs[from];
  }
  sources = sources.to(options.device());
  const at::Tensor received_of_pair = pairs_here.select(1, 0).add(at::repeat_interleave(sources[0], sources[1], 0, M));
  r.pair_of_row = std::get<1>(sorted(pairs_here.select(1, 1)));
  r.row_of_pair = at::empty_like(r.pair_of_row).scatter_(0, r.pair_of_row, count_to(M));
  r.received_of_row = received_of_pair.index_select(0, r.pair_of_row);
  r.first_of_received = at::searchsorted(received_of_pair, count_to(R + 1));
}

ExpertDispatch::~ExpertDispatch() = default;

const std::vector<int64_t>& ExpertDispatch::rows_per_expert() const { return routing_->rows_per_expert; }

at::Tensor ExpertDispatch::dispatch(const at::Tensor& x_NH, const std::function<void()>& meanwhile) {
  if (link_.defined()) throw std::logic_error("dispatch called twice (one ExpertDispatch serves one batch) make another");
  if (x_NH.dim() != 2 || x_NH.size(0) != routing_->tokens)
    refuse("x is not [" + std::to_string(routing_->tokens) + ", H]", "give one row per routed token");
  const at::Tensor coming_RH = StartDispatch::apply(x_NH, routing_);
  if (meanwhile) meanwhile();
  const variable_list out = EndDispatch::apply(coming_RH, routing_);
  link_ = out[1];
  // Whether y or the weights require grad can differ between ranks (no rows, no experts run); the link makes
  // combine's node exist on all of them alike.
  if (at::GradMode::is_enabled() && !link_.requires_grad()) link_.requires_grad_(true);
  return out[0];
}

at::Tensor ExpertDispatch::combine(const at::Tensor& y_MH, const std::function<void()>& meanwhile) {
  if (!link_.defined()) throw std::logic_error("combine called before dispatch (rows come from there) call it first");
  const int64_t M = routing_->received_of_row.size(0);
  if (y_MH.dim() != 2 || y_MH.size(0) != M)
    refuse("y is not [" + std::to_string(M) + ", H]", "give one row per dispatched row, in its order");
  const at::Tensor coming_SH = StartCombine::apply(y_MH, weights_NK_, link_, routing_);
  if (meanwhile) meanwhile();
  return EndCombine::apply(coming_SH, routing_);
}

}  // namespace dsa
