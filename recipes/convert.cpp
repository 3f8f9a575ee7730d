#include "recipes/convert.h"

#include <google/protobuf/text_format.h>

#include <type_traits>

#include "recipe.pb.h"

namespace dsa {
namespace {

namespace pb = google::protobuf;

// visit(path, member) for every leaf of recipe.proto but `extends`.
template <class AnyRecipe, class Visitor>
void visit_fields(AnyRecipe& r, Visitor&& visit) {
  visit("stage", r.stage);
  visit("model.config", r.model.config);
  visit("model.indexer.heads", r.model.indexer.heads);
  visit("model.indexer.head_dim", r.model.indexer.head_dim);
  visit("model.indexer.top_k", r.model.indexer.top_k);
  visit("model.indexer.hadamard", r.model.indexer.hadamard);
  visit("init.from", r.init.from);
  visit("init.random", r.init.random);
  visit("init.std", r.init.std);
  visit("init.seed", r.init.seed);
  visit("data.tokens", r.data.tokens);
  visit("data.sequence_length", r.data.sequence_length);
  visit("data.document_mask", r.data.document_mask);
  visit("data.seed", r.data.seed);
  visit("data.held_out", r.data.held_out);
  visit("batch.sequences", r.batch.sequences);
  visit("batch.micro_sequences", r.batch.micro_sequences);
  visit("optimizer.lr", r.optimizer.lr);
  visit("optimizer.indexer_lr", r.optimizer.indexer_lr);
  visit("optimizer.beta1", r.optimizer.beta1);
  visit("optimizer.beta2", r.optimizer.beta2);
  visit("optimizer.eps", r.optimizer.eps);
  visit("optimizer.weight_decay", r.optimizer.weight_decay);
  visit("optimizer.decay_norms", r.optimizer.decay_norms);
  visit("optimizer.clip", r.optimizer.clip);
  visit("optimizer.moments", r.optimizer.moments);
  visit("optimizer.offload", r.optimizer.offload);
  visit("schedule.steps", r.schedule.steps);
  visit("schedule.warmup_steps", r.schedule.warmup_steps);
  visit("schedule.decay", r.schedule.decay);
  visit("schedule.final_lr", r.schedule.final_lr);
  visit("loss.kl_weight", r.loss.kl_weight);
  visit("loss.mtp_weight", r.loss.mtp_weight);
  visit("loss.balance_alpha", r.loss.balance_alpha);
  visit("loss.router_bias_speed", r.loss.router_bias_speed);
  visit("loss.mtp_hidden", r.loss.mtp_hidden);
  visit("parallel.tensor", r.parallel.tensor);
  visit("parallel.context", r.parallel.context);
  visit("parallel.expert", r.parallel.expert);
  visit("parallel.deadline", r.parallel.deadline);
  visit("compute.precision", r.compute.precision);
  visit("compute.recompute", r.compute.recompute);
  visit("compute.query_block", r.compute.query_block);
  visit("compute.threads", r.compute.threads);
  visit("compute.device", r.compute.device);
  visit("compute.offload_hidden", r.compute.offload_hidden);
  visit("checkpoint.every", r.checkpoint.every);
  visit("checkpoint.keep", r.checkpoint.keep);
  visit("run.folder", r.run.folder);
  visit("run.eval_every", r.run.eval_every);
  visit("run.eval_sequences", r.run.eval_sequences);
  visit("run.log_every", r.run.log_every);
}

struct Place {
  pb::Message* message;
  const pb::FieldDescriptor* field;
};

Place find(pb::Message& root, const std::string& path) {
  const size_t dot = path.find('.');
  const pb::FieldDescriptor* field = root.GetDescriptor()->FindFieldByName(path.substr(0, dot));
  if (dot == std::string::npos) return {&root, field};
  return find(*root.GetReflection()->MutableMessage(&root, field), path.substr(dot + 1));
}

template <class T>
T get(const Place& at) {
  const pb::Reflection& r = *at.message->GetReflection();
  if constexpr (std::is_same_v<T, std::string>) return r.GetString(*at.message, at.field);
  else if constexpr (std::is_same_v<T, bool>) return r.GetBool(*at.message, at.field);
  else if constexpr (std::is_same_v<T, double>) return r.GetDouble(*at.message, at.field);
  else if constexpr (std::is_same_v<T, int32_t>) return r.GetInt32(*at.message, at.field);
  else if constexpr (std::is_same_v<T, int64_t>) return r.GetInt64(*at.message, at.field);
  else if constexpr (std::is_same_v<T, uint64_t>) return r.GetUInt64(*at.message, at.field);
  else return static_cast<T>(r.GetEnumValue(*at.message, at.field));
}

template <class T>
void set(const Place& at, const T& value) {
  const pb::Reflection& r = *at.message->GetReflection();
  if constexpr (std::is_same_v<T, std::string>) r.SetString(at.message, at.field, value);
  else if constexpr (std::is_same_v<T, bool>) r.SetBool(at.message, at.field, value);
  else if constexpr (std::is_same_v<T, double>) r.SetDouble(at.message, at.field, value);
  else if constexpr (std::is_same_v<T, int32_t>) r.SetInt32(at.message, at.field, value);
  else if constexpr (std::is_same_v<T, int64_t>) r.SetInt64(at.message, at.field, value);
  else if constexpr (std::is_same_v<T, uint64_t>) r.SetUInt64(at.message, at.field, value);
  else r.SetEnumValue(at.message, at.field, static_cast<int>(value));
}

struct ReadField {
  proto::Recipe& message;

  void operator()(const char* path, std::vector<std::string>& member) const {
    const Place at = find(message, path);
    const pb::Reflection& r = *at.message->GetReflection();
    for (int i = 0; i < r.FieldSize(*at.message, at.field); ++i) {
      member.push_back(r.GetRepeatedString(*at.message, at.field, i));
    }
  }
  template <class T>
  void operator()(const char* path, std::optional<T>& member) const {
    const Place at = find(message, path);
    if (at.message->GetReflection()->HasField(*at.message, at.field)) member = get<T>(at);
  }
  template <class T>
  void operator()(const char* path, T& member) const {
    const Place at = find(message, path);
    if (at.message->GetReflection()->HasField(*at.message, at.field)) member = get<T>(at);
  }
};

struct WriteField {
  proto::Recipe& message;

  void operator()(const char* path, const std::vector<std::string>& member) const {
    const Place at = find(message, path);
    for (const std::string& item : member) at.message->GetReflection()->AddString(at.message, at.field, item);
  }
  template <class T>
  void operator()(const char* path, const std::optional<T>& member) const {
    if (member) set(find(message, path), *member);
  }
  template <class T>
  void operator()(const char* path, const T& member) const {
    set(find(message, path), member);
  }
};

}  // namespace

// The C++ enums are the schema's, number for number.
static_assert(static_cast<int>(StageKind::SPARSE) == proto::Recipe::SPARSE);
static_assert(static_cast<int>(StageKind::WARMUP) == proto::Recipe::WARMUP);
static_assert(static_cast<int>(Precision::BF16) == proto::Compute::BF16);
static_assert(static_cast<int>(Precision::FP64) == proto::Compute::FP64);
static_assert(static_cast<int>(DeviceKind::CPU) == proto::Compute::CPU);
static_assert(static_cast<int>(DeviceKind::GPU) == proto::Compute::GPU);
static_assert(static_cast<int>(Recompute::LAYER) == proto::Compute::LAYER);
static_assert(static_cast<int>(Moments::BF16) == proto::Optimizer::BF16);
static_assert(static_cast<int>(MtpHidden::PRE_NORM) == proto::Loss::PRE_NORM);
static_assert(static_cast<int>(Decay::COSINE) == proto::Schedule::COSINE);
static_assert(static_cast<int>(Decay::LINEAR) == proto::Schedule::LINEAR);

Recipe to_recipe(const proto::Recipe& message) {
  proto::Recipe copy = message;  // find() opens sub-messages as it walks
  Recipe recipe;
  visit_fields(recipe, ReadField{copy});
  return recipe;
}

void to_message(const Recipe& recipe, proto::Recipe& message) { visit_fields(recipe, WriteField{message}); }

std::string to_text(const Recipe& recipe) {
  proto::Recipe message;
  to_message(recipe, message);
  pb::TextFormat::Printer printer;
  printer.SetUseUtf8StringEscaping(true);
  std::string text;
  printer.PrintToString(message, &text);
  return text;
}

}  // namespace dsa
