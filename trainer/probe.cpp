#include "trainer/probe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <filesystem>
#include <limits>

#include "data/error.h"
#include "data/safetensors.h"
#include "trainer/checkpoint/weight_source.h"
#include "trainer/initialise.h"
#include "trainer/optimizer.h"

namespace dsa {
namespace {

// A source whose indexer tensors come from a safetensors file.
class WithIndexer : public WeightSource {
 public:
  WithIndexer(std::shared_ptr<const WeightSource> base, const std::string& file) : base_(std::move(base)), file_(file) {}
  const ModelConfig& config() const override { return base_->config(); }
  bool has(const std::string& name) const override { return entry(name) || base_->has(name); }
  std::vector<int64_t> shape(const std::string& name) const override {
    return entry(name) ? entry(name)->shape : base_->shape(name);
  }
  void read(const ShardSpec& box, Dtype dtype, void* out) const override;
  std::string describe() const override { return base_->describe() + " with the indexer of " + file_.path(); }
  std::string path() const override { return base_->path(); }
  std::string digest() const override { return base_->digest(); }
  std::string hf_folder() const override { return base_->hf_folder(); }
  std::string tokenizer_sha256() const override { return base_->tokenizer_sha256(); }
  void check() const override { base_->check(); }
  const HfFolder* raw(const std::string& name) const override { return entry(name) ? nullptr : base_->raw(name); }

 private:
  const TensorEntry* entry(const std::string& name) const {
    return is_indexer_tensor(name) ? file_.find(name) : nullptr;
  }
  std::shared_ptr<const WeightSource> base_;
  SafetensorsFile file_;
};

at::ScalarType scalar_type(Dtype dtype, const std::string& what) {
  switch (dtype) {
    case Dtype::F32: return at::kFloat;
    case Dtype::F64: return at::kDouble;
    case Dtype::BF16: return at::kBFloat16;
    case Dtype::I32: return at::kInt;
    case Dtype::I64: return at::kLong;
    default: throw InputError("cannot use " + what, "its dtype is " + name(dtype), "store it as F32, BF16, F64 or I32");
  }
}

at::Tensor read_tensor(const SafetensorsFile& file, const std::string& tensor_name) {
  const TensorEntry* e = file.find(tensor_name);
  if (!e) throw InputError("no tensor " + tensor_name + " in " + file.path(), "it is needed", "write it there");
  at::Tensor t = at::empty(e->shape, at::TensorOptions().dtype(scalar_type(e->dtype, tensor_name + " of " + file.path())));
  file.read(*e, 0, e->bytes(), t.data_ptr());
  return t;
}

void WithIndexer::read(const ShardSpec& box, Dtype dtype, void* out) const {
  if (!entry(box.name)) return base_->read(box, dtype, out);
  at::Tensor t = read_tensor(file_, box.name);
  if (t.sizes().vec() != box.global_shape)
    throw InputError("cannot use " + box.name + " of " + file_.path(), "its shape is not the model's",
                     "give the indexer's heads and head dim as in the file");
  for (size_t d = 0; d < box.extent.size(); ++d) t = t.narrow(static_cast<int64_t>(d), box.offset[d], box.extent[d]);
  t = t.to(dtype == Dtype::F64 ? at::kDouble : at::kFloat).contiguous();
  std::memcpy(out, t.data_ptr(), t.nbytes());
}

std::vector<Sample> read_samples(const std::string& path, int64_t vocabulary) {
  const SafetensorsFile file(path);
  const at::Tensor ids = read_tensor(file, "input_ids").to(at::kLong).contiguous();
  if (ids.dim() != 2 || ids.numel() == 0)
    throw InputError("cannot use input_ids of " + path, "it is not [batch, time] with at least one token", "write it so");
  const int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  if (low < 0 || high >= vocabulary)
    throw InputError("cannot use input_ids of " + path,
                     "ids " + std::to_string(low) + " .. " + std::to_string(high) + " leave the vocabulary of " +
                         std::to_string(vocabulary), "tokenise with the model's tokenizer");
  std::vector<Sample> samples(ids.size(0));
  for (int64_t b = 0; b < ids.size(0); ++b) {
    const int64_t* row = ids.data_ptr<int64_t>() + b * ids.size(1);
    samples[b].tokens.assign(row, row + ids.size(1));
    samples[b].tokens.push_back(-1);  // nothing follows the last token
    samples[b].document_start.assign(ids.size(1), 0);
  }
  return samples;
}

ModelConfig probe_config(const ProbeOptions& o, const WeightSource& source) {
  ModelConfig config = source.config();
  if (!config.indexer && !o.indexer_from.empty()) {
    const SafetensorsFile file(o.indexer_from);
    const TensorEntry* wk = file.find("model.layers.0.self_attn.indexer.wk.weight");
    const TensorEntry* w = file.find("model.layers.0.self_attn.indexer.weights_proj.weight");
    if (!wk || !w)
      throw InputError("no indexer in " + o.indexer_from, "model.layers.0.self_attn.indexer.* is not there",
                       "give a file with the released names");
    config.indexer = IndexerConfig{};
    config.indexer->heads = w->shape.at(0);
    config.indexer->head_dim = wk->shape.at(0);
  } else if (!config.indexer && o.indexer_seed) {
    config.indexer = IndexerConfig{};
  }
  if (config.indexer) {
    if (o.indexer_heads) config.indexer->heads = *o.indexer_heads;
    if (o.indexer_head_dim) config.indexer->head_dim = *o.indexer_head_dim;
    if (o.top_k) config.indexer->top_k = *o.top_k;
    config.validate(o.model);
  }
  if (!config.indexer && o.attention == AttentionMode::SPARSE)
    throw InputError("cannot run sparse attention on " + o.model, "it has no indexer",
                     "give one with --indexer-from FILE.safetensors or --indexer-seed N");
  return config;
}

// Collects named results in natural order and writes them from rank 0.
class Results {
 public:
  Results(const TokenBatch& batch, int64_t tokens, Mesh& mesh) : b_(batch), tokens_(tokens), mesh_(mesh) {}

  void put(const std::string& name, const at::Tensor& t) { tensors_[name] = t.detach().cpu().contiguous(); }
  // Local rows over `axis` -> [B, T, ...], padding dropped.
  at::Tensor natural(const at::Tensor& rows, Axis axis) {
    const at::Tensor all = b_.to_stream.apply(mesh_.along(axis).all_gather(rows.detach()));
    std::vector<int64_t> shape{b_.sequences, b_.length};
    for (int64_t d = 1; d < rows.dim(); ++d) shape.push_back(rows.size(d));
    return all.view(shape).narrow(1, 0, tokens_);
  }
  void write(const std::string& path) const {
    if (mesh_.rank() != 0) return;
    std::vector<TensorInfo> infos;
    for (const auto& [name, t] : tensors_) infos.push_back({name, dtype_of(t), t.sizes().vec()});
    SafetensorsWriter writer(path, infos);
    for (const auto& [name, t] : tensors_) writer.write(name, t.data_ptr());
    writer.commit();
  }

 private:
  static Dtype dtype_of(const at::Tensor& t) {
    switch (t.scalar_type()) {
      case at::kDouble: return Dtype::F64;
      case at::kInt: return Dtype::I32;
      case at::kByte: return Dtype::U8;
      default: return Dtype::F32;
    }
  }
  const TokenBatch& b_;
  int64_t tokens_;
  Mesh& mesh_;
  std::map<std::string, at::Tensor> tensors_;
};

bool is_router_experts(const std::string& name) { return name.starts_with("router.") && name.ends_with(".experts"); }

// [B,T,S] scores over the stream -> [B,T,T] over each row's own sequence.
at::Tensor own_sequence(const at::Tensor& scores_BTS, int64_t length, int64_t tokens) {
  at::Tensor out = at::empty({scores_BTS.size(0), tokens, tokens}, scores_BTS.options());
  for (int64_t b = 0; b < out.size(0); ++b) out[b].copy_(scores_BTS[b].narrow(1, b * length, tokens));
  return out;
}

at::Tensor mask_of(const at::Tensor& topk_BTK, int64_t length, int64_t tokens) {
  at::Tensor mask = at::zeros({topk_BTK.size(0), tokens, tokens + 1}, topk_BTK.options().dtype(at::kByte));
  for (int64_t b = 0; b < mask.size(0); ++b) {
    const at::Tensor keys = topk_BTK[b].to(at::kLong);
    mask[b].scatter_(1, (keys - b * length).masked_fill(keys < 0, tokens), 1);  // the last column takes what is none
  }
  return mask.narrow(2, 0, tokens).contiguous();
}

}  // namespace

void probe(const ProbeOptions& o, Mesh& mesh) {
  if (std::filesystem::exists(o.out))
    throw InputError("cannot write " + o.out, "it exists", "remove it or give another name");
  std::shared_ptr<const WeightSource> source = open_weights(o.model);
  const ModelConfig config = probe_config(o, *source);
  if (!o.indexer_from.empty()) source = std::make_shared<WithIndexer>(source, o.indexer_from);
  const std::vector<Sample> samples = read_samples(o.tokens, config.vocab_size);
  const int64_t tokens = static_cast<int64_t>(samples[0].document_start.size());

  Transformer model(config, o.model_options, mesh);
  ParameterList& list = model.parameters();
  const bool has_indexer = config.indexer.has_value();
  list.set_trainable(ParameterGroup::BACKBONE, o.gradients);
  list.set_trainable(ParameterGroup::INDEXER, o.gradients && has_indexer);
  const InitialWeights weights(source, o.indexer_seed.has_value(), config.initializer_range, o.indexer_seed.value_or(0));
  weights.fill(list, /*frozen_only=*/false);
  ShardedAdamW gradients(list, mesh, {});

  const TokenBatch batch = make_batch(samples, config, mesh, o.model_options.dtype);
  const std::vector<int64_t> targets = count_targets(samples, config.num_nextn_predict_layers);
  const double copies = mesh.layout().degrees().data;  // every data rank runs the same tokens
  StagePlan plan;
  plan.attention = o.attention;
  plan.train_backbone = o.gradients;
  plan.indexer_loss = has_indexer;
  plan.train_indexer = o.gradients && has_indexer;
  plan.query_block = o.query_block;
  plan.lm_scale = 1 / (static_cast<double>(targets[0]) * copies);
  plan.kl_scale = 1 / copies;
  ModelReport report = model.report();
  Recorder recorder;
  const at::Tensor loss = model.forward({batch, plan, report, &recorder});
  if (o.gradients) {
    loss.backward();  // before anything is looked at: the indexers' losses may come with it
    gradients.accumulate();
    gradients.reduce();
  }

  Results results(batch, tokens, mesh);
  const auto number = o.model_options.dtype == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& [name, rows] : recorder.rows_N) {
    const at::Tensor t = results.natural(rows, Axis::SEQUENCE);
    if (name.starts_with("indexer."))
      results.put(name, own_sequence(t, batch.length, tokens).to(number));
    else if (name.starts_with("router."))
      results.put(name, t.flatten(0, 1).to(is_router_experts(name) ? at::kInt : number));
    else
      results.put(name, t.to(number));
  }
  for (const auto& [name, rows] : recorder.context_rows_T) {
    const at::Tensor t = results.natural(rows, Axis::CONTEXT);
    if (name.ends_with(".topk"))
      results.put(name + "_mask", mask_of(t, batch.length, tokens));
    else
      results.put(name, (name == "mtp.logits" ? t.narrow(1, 0, tokens - 1) : t).to(number));
  }
  const at::Tensor sums = mesh.along(Axis::CONTEXT).all_reduce(
      at::full({1}, report.lm_loss, at::kDouble));
  results.put("lm_loss", (sums / static_cast<double>(targets[0])).to(number));
  if (config.num_nextn_predict_layers > 0) {
    const at::Tensor mtp = mesh.along(Axis::CONTEXT).all_reduce(at::full({1}, report.mtp_loss, at::kDouble));
    results.put("mtp.loss_mean", (mtp / static_cast<double>(targets[1])).to(number));
  }
  if (o.gradients) {
    const std::string set = o.attention == AttentionMode::DENSE ? "warmup." : "sparse.";
    for (const auto& [parameter, gradient] : gradients.gradients())
      for (const auto& [name, whole] : gather_whole(*parameter, gradient, mesh)) {
        const std::string front = "model.layers.", middle = ".self_attn.indexer.";
        const size_t at = name.find(middle);
        if (at == std::string::npos)
          results.put("grad." + name, whole.to(number));
        else
          results.put(set + name.substr(front.size(), at - front.size()) + ".grad." + name.substr(at + middle.size()),
                      whole.to(number));
      }
  }
  results.write(o.out);
  mesh.along(Axis::WORLD).barrier();
}

}  // namespace dsa
