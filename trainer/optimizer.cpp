#include "trainer/optimizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

namespace dsa {

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
    const auto flat = at::TensorOptions().dtype(bucket.dtype == at::kDouble ? at::kDouble : at::kFloat);
    bucket.sum = at::zeros({ranks * bucket.length}, flat);
    for (at::Tensor* t : {&bucket.master, &bucket.moment1, &bucket.moment2}) *t = at::zeros({bucket.length}, flat);
    buckets_.push_back(std::move(bucket));
  }
}

void ShardedAdamW::accumulate() {
  const c10::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_)
    for (const Piece& piece : bucket.pieces) {
      const at::Tensor& whole = piece.parameter->value.grad();
      if (!whole.defined()) continue;
      const at::Tensor grad = piece.parameter->piece(whole, piece.index);
      for (int r = 0; r < bucket.group->size(); ++r) {
        const Rows rows = piece.rows[r];
        bucket.sum.narrow(0, r * bucket.length + piece.offset[r], rows.extent * piece.row_elements)
            .add_(grad.narrow(0, rows.offset, rows.extent).reshape({-1}));
      }
    }
  for (Bucket& bucket : buckets_)
    for (const Piece& piece : bucket.pieces) piece.parameter->value.mutable_grad().reset();
}

GradientNorms ShardedAdamW::reduce() {
  const c10::NoGradGuard no_grad;
  at::Tensor squares = at::zeros({2}, at::TensorOptions().dtype(at::kDouble));
  for (Bucket& bucket : buckets_) {
    bucket.gradient = bucket.group->reduce_scatter(bucket.sum);
    bucket.sum.zero_();
    squares[bucket.kind == ParameterGroup::INDEXER] += bucket.gradient.to(at::kDouble).square().sum();
  }
  // Every element of every parameter lies on exactly one rank now.
  squares = mesh_.along(Axis::WORLD).all_reduce(squares);
  return {std::sqrt(squares[0].item<double>()), std::sqrt(squares[1].item<double>())};
}

void ShardedAdamW::step(const GradientNorms& norms, double lr, double indexer_lr) {
  const c10::NoGradGuard no_grad;
  ++steps_;
  const double correction1 = 1 - std::pow(options_.beta1, steps_), correction2 = 1 - std::pow(options_.beta2, steps_);
  for (Bucket& b : buckets_) {
    const bool indexer = b.kind == ParameterGroup::INDEXER;
    const double norm = indexer ? norms.indexer : norms.backbone, rate = indexer ? indexer_lr : lr;
    if (options_.clip > 0 && norm > options_.clip) b.gradient.mul_(options_.clip / norm);
    b.moment1.mul_(options_.beta1).add_(b.gradient, 1 - options_.beta1);
    b.moment2.mul_(options_.beta2).addcmul_(b.gradient, b.gradient, 1 - options_.beta2);
    const at::Tensor denominator = (b.moment2 / correction2).sqrt_().add_(options_.eps);
    b.master.narrow(0, 0, b.decayed).mul_(1 - rate * options_.weight_decay);
    b.master.addcdiv_(b.moment1, denominator, -rate / correction1);
    publish(b);
  }
}

void ShardedAdamW::publish(Bucket& bucket) const {
  const at::Tensor all = bucket.group->all_gather(bucket.master.to(bucket.dtype));
  for (const Piece& piece : bucket.pieces) {
    const at::Tensor value = piece.parameter->piece(piece.parameter->value, piece.index).detach();
    for (int r = 0; r < bucket.group->size(); ++r) {
      const Rows rows = piece.rows[r];
      at::Tensor part = value.narrow(0, rows.offset, rows.extent);
      part.copy_(all.narrow(0, r * bucket.length + piece.offset[r], rows.extent * piece.row_elements).view(part.sizes()));
    }
  }
}

StateShard ShardedAdamW::shard(const Bucket& bucket, const Piece& piece, Role role, const at::Tensor& flat) const {
  const int me = bucket.group->rank();
  ShardSpec box = piece.parameter->shards[piece.index];
  box.offset[0] += piece.rows[me].offset;
  box.extent[0] = piece.rows[me].extent;
  const bool wide = flat.scalar_type() == at::kDouble;
  return {role, box, wide ? Dtype::F64 : Dtype::F32,
          static_cast<char*>(flat.data_ptr()) + piece.offset[me] * static_cast<int64_t>(flat.element_size())};
}

std::vector<StateShard> ShardedAdamW::state() const {
  std::vector<StateShard> shards;
  for (const Bucket& bucket : buckets_)
    for (const Piece& piece : bucket.pieces) {
      shards.push_back(shard(bucket, piece, Role::PARAM, bucket.master));
      shards.push_back(shard(bucket, piece, Role::MOMENT1, bucket.moment1));
      shards.push_back(shard(bucket, piece, Role::MOMENT2, bucket.moment2));
    }
  return shards;
}

void ShardedAdamW::initialise(const InitialWeights& weights) {
  const c10::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_) {
    for (const Piece& piece : bucket.pieces) {
      const StateShard s = shard(bucket, piece, Role::PARAM, bucket.master);
      weights.read(s.box, s.dtype, s.data);
    }
    publish(bucket);
  }
}

void ShardedAdamW::load(const CheckpointReader& checkpoint, const std::function<void(int64_t)>& progress) {
  const c10::NoGradGuard no_grad;
  for (const StateShard& s : state()) {
    checkpoint.read(s.box, s.role, s.dtype, s.data);
    if (progress) progress(numel(s.box) * bits(s.dtype) / 8);
  }
  for (Bucket& bucket : buckets_) publish(bucket);
}

std::vector<std::pair<const Parameter*, at::Tensor>> ShardedAdamW::gradients() const {
  const c10::NoGradGuard no_grad;
  std::vector<std::pair<const Parameter*, at::Tensor>> gradients;
  for (const Bucket& bucket : buckets_) {
    const at::Tensor all = bucket.group->all_gather(bucket.gradient);
    for (const Piece& piece : bucket.pieces) {
      if (piece.index == 0) gradients.emplace_back(piece.parameter, at::zeros(piece.parameter->value.sizes(), all.options()));
      const at::Tensor& whole = gradients.back().second;
      const at::Tensor mine = piece.parameter->piece(whole, piece.index);
      for (int r = 0; r < bucket.group->size(); ++r) {
        at::Tensor part = mine.narrow(0, piece.rows[r].offset, piece.rows[r].extent);
        part.copy_(all.narrow(0, r * bucket.length + piece.offset[r], piece.rows[r].extent * piece.row_elements)
                       .view(part.sizes()));
      }
    }
  }
  return gradients;
}

}  // namespace dsa
