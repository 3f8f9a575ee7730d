#include "trainer/optimizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

namespace dsa {
namespace {

constexpr int64_t kChunk = int64_t{1} << 23;  // elements that are widened at a time

// Calls body(first, count) for consecutive parts of n elements.
template <class Body>
void in_chunks(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += kChunk) body(i, std::min(kChunk, n - i));
}

// `fill` writes a flat tensor through host memory of the accumulation dtype; on a CPU that is mostly the tensor itself.
template <class Fill>
void through_host(at::Tensor& flat, const Fill& fill) {
  const auto wide = flat.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool direct = flat.is_cpu() && flat.scalar_type() == wide;
  const at::Tensor host = direct ? flat : at::zeros(flat.sizes(), at::TensorOptions().dtype(wide));
  fill(host);
  if (!direct) flat.copy_(host);
}

}  // namespace

bool GradientNorms::finite() const { return std::isfinite(backbone) && std::isfinite(indexer); }

ShardedAdamW::ShardedAdamW(ParameterList& parameters, Mesh& mesh, const AdamOptions& options)
    : mesh_(mesh), options_(options) {
  const c10::NoGradGuard no_grad;
  std::map<std::tuple<Axis, ParameterGroup, at::ScalarType>, Bucket> buckets;
  for (const bool decay : {true, false})
    for (const Parameter& p : parameters.parameters) {
      if (!p.value.requires_grad() || (p.decay || options.decay_norms) != decay) continue;
      const Axis axis = gradient_axis(p.shards[0].split);
      Bucket& bucket = buckets[{axis, p.group, p.value.scalar_type()}];
      bucket.group = &mesh.along(axis);
      bucket.kind = p.group;
      bucket.dtype = p.value.scalar_type();
      for (size_t i = 0; i < p.shards.size(); ++i) {
        const std::vector<int64_t>& extent = p.shards[i].extent;
        Piece piece{&p, i, {}, {}, numel(extent) / std::max<int64_t>(extent[0], 1)};
        for (int r = 0; r < bucket.group->size(); ++r) piece.rows.push_back(rows_of(extent[0], bucket.group->size(), r));
        bucket.pieces.push_back(std::move(piece));
      }
    }
  for (auto& [key, bucket] : buckets) {
    const int ranks = bucket.group->size();
    std::vector<int64_t> end(ranks, 0);
    for (Piece& piece : bucket.pieces) {
      for (int r = 0; r < ranks; ++r) {
        piece.offset.push_back(end[r]);
        end[r] += piece.rows[r].extent * piece.row_elements;
      }
      if (piece.parameter->decay || options.decay_norms) bucket.decayed = end[bucket.group->rank()];
    }
    bucket.length = *std::max_element(end.begin(), end.end());
    const auto flat = at::TensorOptions().dtype(bucket.dtype == at::kDouble ? at::kDouble : at::kFloat).device(mesh.device());
    const auto state = options.offload ? flat.device(at::kCPU) : flat;
    bucket.sum = at::zeros({ranks * bucket.length}, flat);
    bucket.master = at::zeros({bucket.length}, state);
    const auto moment = options.bf16_moments ? state.dtype(at::kBFloat16) : state;
    for (at::Tensor* t : {&bucket.moment1, &bucket.moment2}) *t = at::zeros({bucket.length}, moment);
    buckets_.push_back(std::move(bucket));
  }
}

// Calls body(parameter's part, flat part): parameters and a flat tensor of [ranks * length] elements, part by part. A
// rank that is alone in its group has whole parameters in a row.
template <class Body>
void ShardedAdamW::for_each_part(const Bucket& bucket, const Body& body) {
  for (const Piece& piece : bucket.pieces) {
    if (bucket.group->size() == 1) {
      if (piece.index == 0) body(*piece.parameter, [](const at::Tensor& whole) { return whole; }, piece.offset[0]);
      continue;
    }
    for (int r = 0; r < bucket.group->size(); ++r)
      body(*piece.parameter, [&](const at::Tensor& whole) {
        return piece.parameter->piece(whole, piece.index).narrow(0, piece.rows[r].offset, piece.rows[r].extent);
      }, r * bucket.length + piece.offset[r]);
  }
}

void ShardedAdamW::accumulate() {
  const c10::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_) {
    if (!bucket.sum.defined()) bucket.sum = std::exchange(bucket.gradient, {}).zero_();
    for_each_part(bucket, [&](const Parameter& p, const auto& part, int64_t at) {
      const at::Tensor& whole = p.value.grad();
      if (!whole.defined()) return;
      const at::Tensor mine = part(whole);
      bucket.sum.narrow(0, at, mine.numel()).add_(mine.reshape({-1}));
    });
  }
  for (Bucket& bucket : buckets_)
    for (const Piece& piece : bucket.pieces) piece.parameter->value.mutable_grad().reset();
}

GradientNorms ShardedAdamW::reduce() {
  const c10::NoGradGuard no_grad;
  at::Tensor squares = at::zeros({2}, at::TensorOptions().dtype(at::kDouble).device(mesh_.device()));
  for (Bucket& bucket : buckets_) {
    if (bucket.group->size() == 1) {
      bucket.gradient = std::exchange(bucket.sum, {});
    } else {
      bucket.gradient = bucket.group->reduce_scatter(bucket.sum);
      bucket.sum.zero_();
    }
    const at::Tensor square = squares[bucket.kind == ParameterGroup::INDEXER];
    in_chunks(bucket.length, [&](int64_t first, int64_t count) {
      square.add_(bucket.gradient.narrow(0, first, count).to(at::kDouble).square().sum());
    });
  }
  // Every element of every parameter lies on exactly one rank now.
  squares = mesh_.along(Axis::WORLD).all_reduce(squares.cpu());
  return {std::sqrt(squares[0].item<double>()), std::sqrt(squares[1].item<double>())};
}

void ShardedAdamW::step(const GradientNorms& norms, double lr, double indexer_lr) {
  const c10::NoGradGuard no_grad;
  ++steps_;
  for (Bucket& b : buckets_) {
    const bool indexer = b.kind == ParameterGroup::INDEXER;
    const double norm = indexer ? norms.indexer : norms.backbone, rate = indexer ? indexer_lr : lr;
    if (options_.clip > 0 && norm > options_.clip) b.gradient.mul_(options_.clip / norm);
    update(b, 0, b.decayed, options_.weight_decay, rate);
    update(b, b.decayed, b.length - b.decayed, 0, rate);
    publish(b);
  }
}

// LibTorch's fused kernel is the formula at the top of the header, in this order: decay, moments, corrected step. It
// wants gradient, moments and weights of one dtype in one memory.
void ShardedAdamW::update(Bucket& b, int64_t first, int64_t count, double decay, double rate) const {
  if (count == 0) return;
  const auto fused = [&](at::Tensor master, at::Tensor gradient, at::Tensor moment1, at::Tensor moment2) {
    const at::Tensor step = at::full({}, static_cast<double>(steps_), master.options().dtype(at::kFloat));
    at::_fused_adamw_({master}, {gradient}, {moment1}, {moment2}, {}, {step}, rate, options_.beta1, options_.beta2, decay,
                      options_.eps, /*amsgrad=*/false, /*maximize=*/false);
  };
  const auto part = [&](const at::Tensor& flat) { return flat.narrow(0, first, count); };
  const at::Tensor gradient = part(b.gradient).to(b.master.device());
  if (!options_.bf16_moments) {
    fused(part(b.master), gradient, part(b.moment1), part(b.moment2));
    return;
  }
  in_chunks(count, [&](int64_t i, int64_t n) {
    const at::Tensor narrow1 = b.moment1.narrow(0, first + i, n), narrow2 = b.moment2.narrow(0, first + i, n);
    const at::Tensor moment1 = narrow1.to(at::kFloat), moment2 = narrow2.to(at::kFloat);
    fused(b.master.narrow(0, first + i, n), gradient.narrow(0, i, n), moment1, moment2);
    narrow1.copy_(moment1);
    narrow2.copy_(moment2);
  });
}

void ShardedAdamW::publish(Bucket& bucket) const {
  at::Tensor all = bucket.master;
  if (bucket.group->size() > 1) all = bucket.group->all_gather(bucket.master.to(bucket.dtype).to(mesh_.device()));
  for_each_part(bucket, [&](const Parameter& p, const auto& part, int64_t at) {
    at::Tensor mine = part(p.value.detach());
    mine.copy_(all.narrow(0, at, mine.numel()).view(mine.sizes()));
  });
}

StateShard ShardedAdamW::shard(const Bucket& bucket, const Piece& piece, Role role, const at::Tensor& host) const {
  const int me = bucket.group->rank();
  ShardSpec box = piece.parameter->shards[piece.index];
  box.offset[0] += piece.rows[me].offset;
  box.extent[0] = piece.rows[me].extent;
  const at::ScalarType type = host.scalar_type();
  return {role, box, type == at::kDouble ? Dtype::F64 : type == at::kBFloat16 ? Dtype::BF16 : Dtype::F32,
          static_cast<char*>(host.data_ptr()) + piece.offset[me] * static_cast<int64_t>(host.element_size())};
}

OptimizerState ShardedAdamW::state() const {
  OptimizerState state;
  for (const Bucket& bucket : buckets_)
    for (const auto& [role, flat] : {std::pair(Role::PARAM, bucket.master), std::pair(Role::MOMENT1, bucket.moment1),
                                     std::pair(Role::MOMENT2, bucket.moment2)}) {
      state.memory.push_back(flat.cpu());
      for (const Piece& piece : bucket.pieces) state.shards.push_back(shard(bucket, piece, role, state.memory.back()));
    }
  return state;
}

int64_t ShardedAdamW::device_bytes() const {
  int64_t bytes = 0;
  for (const Bucket& b : buckets_)
    for (const at::Tensor* t : {&b.sum, &b.gradient, &b.master, &b.moment1, &b.moment2})
      if (t->defined() && t->device() == mesh_.device()) bytes += static_cast<int64_t>(t->nbytes());
  return bytes;
}

void ShardedAdamW::initialise(const InitialWeights& weights) {
  const c10::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_) {
    through_host(bucket.master, [&](const at::Tensor& host) {
      for (const Piece& piece : bucket.pieces) {
        const StateShard s = shard(bucket, piece, Role::PARAM, host);
        weights.read(s.box, s.dtype, s.data);
      }
    });
    publish(bucket);
  }
}

void ShardedAdamW::load(const CheckpointReader& checkpoint, const std::function<void(int64_t)>& progress) {
  const c10::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_) {
    const auto read = [&](Role role, at::Tensor& flat) {
      through_host(flat, [&](const at::Tensor& host) {
        for (const Piece& piece : bucket.pieces) {
          const StateShard s = shard(bucket, piece, role, host);
          checkpoint.read(s.box, s.role, s.dtype, s.data);
          if (progress) progress(numel(s.box) * bits(s.dtype) / 8);
        }
      });
    };
    read(Role::PARAM, bucket.master);
    read(Role::MOMENT1, bucket.moment1);
    read(Role::MOMENT2, bucket.moment2);
    publish(bucket);
  }
}

std::vector<std::pair<const Parameter*, at::Tensor>> ShardedAdamW::gradients() const {
  const c10::NoGradGuard no_grad;
  std::vector<std::pair<const Parameter*, at::Tensor>> gradients;
  for (const Bucket& bucket : buckets_) {
    const at::Tensor all = bucket.group->all_gather(bucket.gradient);
    for (const Piece& piece : bucket.pieces)
      if (piece.index == 0) gradients.emplace_back(piece.parameter, at::zeros(piece.parameter->value.sizes(), all.options()));
    std::map<const Parameter*, at::Tensor> whole;
    for (const auto& [parameter, gradient] : gradients) whole[parameter] = gradient;
    for_each_part(bucket, [&](const Parameter& p, const auto& part, int64_t at) {
      at::Tensor mine = part(whole.at(&p));
      mine.copy_(all.narrow(0, at, mine.numel()).view(mine.sizes()));
    });
  }
  return gradients;
}

}  // namespace dsa
