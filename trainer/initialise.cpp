#include "trainer/initialise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <numbers>

#include "data/error.h"
#include "data/splitmix64.h"

namespace dsa {
namespace {

constexpr int64_t kGrain = 4096;  // elements that are worth a thread

uint64_t hash(uint64_t seed, const std::string& name) {
  uint64_t h = splitmix64(seed);
  for (const unsigned char c : name) h = splitmix64(h ^ c);
  return h;
}

double uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; }  // in (0, 1)

// Box-Muller from two counters; element i of a tensor depends on (key, i) alone.
double normal(uint64_t key, uint64_t i) {
  const double radius = std::sqrt(-2 * std::log(uniform(splitmix64(key ^ splitmix64(2 * i)))));
  return radius * std::cos(2 * std::numbers::pi * uniform(splitmix64(key ^ splitmix64(2 * i + 1))));
}

template <typename T>
void fill_box(const ShardSpec& box, T* out, auto&& value_at) {
  // Boxes have one or two dims; element numbers are those of the whole tensor.
  const bool vector = box.extent.size() == 1;
  const int64_t rows = vector ? 1 : box.extent[0], columns = box.extent.back();
  const int64_t row0 = vector ? 0 : box.offset[0], column0 = box.offset.back(), stride = box.global_shape.back();
  at::parallel_for(0, rows * columns, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = static_cast<T>(value_at((row0 + i / columns) * stride + column0 + i % columns));
  });
}

bool ends_with(const std::string& s, const std::string& tail) { return s.size() >= tail.size() && s.ends_with(tail); }

}  // namespace

bool is_indexer_tensor(const std::string& name) { return name.find(".self_attn.indexer.") != std::string::npos; }

InitialWeights::InitialWeights(std::shared_ptr<const WeightSource> source, bool random_indexer, double std, uint64_t seed,
                               std::function<void(int64_t)> progress)
    : source_(std::move(source)), random_indexer_(random_indexer), std_(std), seed_(seed), progress_(std::move(progress)) {}

void InitialWeights::read(const ShardSpec& box, Dtype dtype, void* out) const {
  if (progress_) progress_(numel(box) * bits(dtype) / 8);
  if (source_ && source_->has(box.name)) {
    source_->read(box, dtype, out);
    return;
  }
  if (source_ && !(random_indexer_ && is_indexer_tensor(box.name)))
    throw InputError("no tensor " + box.name + " in " + source_->describe(), "the model needs it",
                     "start from a complete checkpoint of this architecture");
  const bool one = ends_with(box.name, "norm.weight");
  const bool zero = ends_with(box.name, ".bias") || ends_with(box.name, "e_score_correction_bias");
  const uint64_t key = hash(seed_, box.name);
  const auto value = [&](int64_t i) { return one ? 1.0 : zero ? 0.0 : std_ * normal(key, static_cast<uint64_t>(i)); };
  if (dtype == Dtype::F64)
    fill_box(box, static_cast<double*>(out), value);
  else
    fill_box(box, static_cast<float*>(out), value);
}

void InitialWeights::fill(ParameterList& list, bool frozen_only) const {
  const c10::NoGradGuard no_grad;
  const auto fill_tensor = [&](const ShardSpec& box, at::Tensor value) {
    const bool wide = value.scalar_type() == at::kDouble;
    at::Tensor host = at::empty(box.extent, at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat));
    read(box, wide ? Dtype::F64 : Dtype::F32, host.data_ptr());
    value.detach().copy_(host);
  };
  for (const Parameter& p : list.parameters) {
    if (frozen_only && p.value.requires_grad()) continue;
    for (size_t i = 0; i < p.shards.size(); ++i) fill_tensor(p.shards[i], p.piece(p.value, i));
  }
  for (const Buffer& b : list.buffers) fill_tensor(whole(b.name, {b.value.numel()}), b.value);
}

}  // namespace dsa
