// What must hold of the model by itself, fp64, one process: packed documents are separate runs, top-k over everything is
// dense attention, the warm-up leaves the backbone alone.
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/support/dsa_guard.h"
#include "tests/support/tensors.h"
#include "trainer/checkpoint/weight_source.h"
#include "trainer/initialise.h"
#include "trainer/model/transformer.h"

namespace dsa {
namespace {

const std::string kModel = std::string(DSA_GOLDEN) + "/hf_v32_tiny";
constexpr int64_t kTopK = 16;

Sample random_sample(int64_t tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  Sample s;
  for (int64_t i = 0; i < tokens; ++i) s.tokens.push_back(static_cast<int32_t>(random() % 512));
  s.tokens.push_back(-1);
  s.document_start.assign(tokens, 0);
  return s;
}

struct Passed {
  Recorder recorder;
  ModelReport report;
  std::map<std::string, at::Tensor> gradients;
};

class ModelTest : public testing::Test {
 protected:
  ModelTest() : source_(open_weights(kModel)), mesh_(Mesh::single()) {}

  Passed pass(const std::vector<Sample>& samples, AttentionMode attention, bool train_backbone, int64_t top_k = kTopK,
              at::ScalarType dtype = at::kDouble, bool indexer_loss = true, int64_t block_bytes = int64_t{1} << 40) {
    ModelConfig config = source_->config();
    config.indexer->top_k = top_k;
    Transformer model(config, {dtype, false, false}, mesh_);
    model.parameters().set_trainable(ParameterGroup::BACKBONE, train_backbone);
    model.parameters().set_trainable(ParameterGroup::INDEXER, true);
    InitialWeights(source_, false, 0, 0).fill(model.parameters(), false);
    const TokenBatch batch = make_batch(samples, config, mesh_, dtype);
    StagePlan plan;
    plan.attention = attention;
    plan.train_backbone = train_backbone;
    plan.indexer_loss = plan.train_indexer = indexer_loss;
    plan.block_bytes = block_bytes;
    plan.kl_scale = 1;
    plan.query_block = 24;
    Passed out;
    out.report = model.report();
    const at::Tensor loss = model.forward({batch, plan, out.report, &out.recorder});
    if (loss.defined()) loss.backward();
    for (const Parameter& p : model.parameters().parameters)
      for (const ShardSpec& s : p.shards)
        if (p.value.grad().defined()) out.gradients[s.name] = p.value.grad().clone();
    return out;
  }

  std::shared_ptr<const WeightSource> source_;
  Mesh mesh_;
};

TEST_F(ModelTest, PackedDocumentsAreSeparateRuns) {
  const std::vector<Sample> documents{random_sample(40, 1), random_sample(25, 2), random_sample(31, 3)};
  for (const Sample& d : documents) DSA_GUARD(d.document_start.size(), kTopK);
  Sample packed;
  for (const Sample& d : documents) {
    const auto start = static_cast<int32_t>(packed.tokens.size());
    packed.tokens.insert(packed.tokens.end(), d.tokens.begin(), d.tokens.end() - 1);
    packed.document_start.insert(packed.document_start.end(), d.document_start.size(), start);
  }
  packed.tokens.push_back(-1);
  for (const AttentionMode attention : {AttentionMode::DENSE, AttentionMode::SPARSE}) {
    const Passed together = pass({packed}, attention, true);
    std::vector<Passed> apart;
    for (const Sample& d : documents) apart.push_back(pass({d}, attention, true));
    const std::string set = attention == AttentionMode::DENSE ? "warmup." : "sparse.";
    for (const std::string& name : {std::string("hidden.4"), set + "0.rows", set + "3.rows"}) {
      std::vector<at::Tensor> rows;
      for (const Passed& p : apart) rows.push_back(p.recorder.rows_N.at(name));
      EXPECT_LT(relative_distance(together.recorder.rows_N.at(name), at::cat(rows)), 1e-11) << name;
    }
    double loss = 0;
    for (const Passed& p : apart) loss += p.report.lm_loss;
    EXPECT_NEAR(together.report.lm_loss, loss, 1e-10 * loss);
    for (const auto& [name, gradient] : together.gradients) {
      at::Tensor sum = apart[0].gradients.at(name) + apart[1].gradients.at(name) + apart[2].gradients.at(name);
      EXPECT_LT(relative_distance(gradient, sum), 1e-10) << name;
    }
  }
}

TEST_F(ModelTest, SelectingEverythingIsDenseAttention) {
  const std::vector<Sample> samples{random_sample(60, 4), random_sample(60, 5)};
  DSA_GUARD(60, kTopK);
  const Passed dense = pass(samples, AttentionMode::DENSE, true), all = pass(samples, AttentionMode::SPARSE, true, 64),
               few = pass(samples, AttentionMode::SPARSE, true);
  for (const auto& [name, gradient] : dense.gradients)
    EXPECT_LT(relative_distance(all.gradients.at(name), gradient), 1e-9) << name;
  EXPECT_NEAR(all.report.lm_loss, dense.report.lm_loss, 1e-10 * dense.report.lm_loss);
  EXPECT_GT(std::abs(few.report.lm_loss - dense.report.lm_loss), 1e-6);
}

TEST_F(ModelTest, EachLossTrainsItsOwnHalf) {
  const std::vector<Sample> samples{random_sample(60, 6)};
  DSA_GUARD(60, kTopK);
  const Passed warmup = pass(samples, AttentionMode::DENSE, false), sparse = pass(samples, AttentionMode::SPARSE, true);
  EXPECT_EQ(warmup.gradients.size(), 4u * 5u);
  for (const auto& [name, gradient] : warmup.gradients) EXPECT_TRUE(is_indexer_tensor(name)) << name;
  // The indexer's gradient is that of the KL alone: it does not change when the LM loss is there or not.
  const Passed both = pass(samples, AttentionMode::DENSE, true);
  for (const auto& [name, gradient] : warmup.gradients) EXPECT_TRUE(at::equal(gradient, both.gradients.at(name))) << name;
  // And the backbone's that of the LM loss alone.
  for (const auto& [name, gradient] : sparse.gradients) EXPECT_GT(gradient.abs().max().item<double>(), 0) << name;
}

// Attention by a few rows or heads at a time and FFNs by a few rows: the same sums in another order.
TEST_F(ModelTest, BlocksChangeNothing) {
  const std::vector<Sample> samples{random_sample(60, 9), random_sample(60, 10)};
  DSA_GUARD(60, kTopK);
  for (const auto& [attention, indexer_loss] : {std::pair(AttentionMode::DENSE, false), std::pair(AttentionMode::SPARSE, true)}) {
    const Passed whole = pass(samples, attention, true, kTopK, at::kDouble, indexer_loss);
    const Passed blocks = pass(samples, attention, true, kTopK, at::kDouble, indexer_loss, 100 << 10);
    EXPECT_NEAR(blocks.report.lm_loss, whole.report.lm_loss, 1e-12 * whole.report.lm_loss);
    EXPECT_NEAR(blocks.report.layers[1].kl, whole.report.layers[1].kl, 1e-12 * whole.report.layers[1].kl);
    EXPECT_NEAR(blocks.report.layers[1].recall, whole.report.layers[1].recall, 1e-12);
    ASSERT_EQ(blocks.gradients.size(), whole.gradients.size());
    for (const auto& [name, gradient] : whole.gradients)
      EXPECT_LT(relative_distance(blocks.gradients.at(name), gradient), 1e-11) << name;
  }
}

// bf16 has 2^-8 of relative rounding; dense, because a flipped key changes everything after it. The weights are bf16
// numbers, so only activations and gradients are rounded.
TEST(RowOrder, UndoesItselfForwardAndBackward) {
  const RowOrder order(at::tensor(at::ArrayRef<int64_t>({2, 0, 3, 1})));
  const at::Tensor x = random_tensor({4, 3}, 5).requires_grad_(true), g = random_tensor({4, 3}, 6);
  const at::Tensor y = order.apply(x);
  EXPECT_TRUE(y[0].equal(x[2]));
  EXPECT_TRUE(y[3].equal(x[1]));
  EXPECT_TRUE(order.undo(y).equal(x));
  y.backward(g);  // the transpose of a permutation is its inverse
  EXPECT_TRUE(x.grad().equal(order.undo(g)));
  EXPECT_TRUE(RowOrder().apply(x).is_same(x));
}

TEST_F(ModelTest, Bfloat16StaysNearDouble) {
  const std::vector<Sample> samples{random_sample(60, 7), random_sample(60, 8)};
  const Passed wide = pass(samples, AttentionMode::DENSE, true), narrow = pass(samples, AttentionMode::DENSE, true, kTopK, at::kBFloat16);
  EXPECT_NEAR(narrow.report.lm_loss, wide.report.lm_loss, 0.02 * wide.report.lm_loss);
  EXPECT_NEAR(narrow.report.layers[0].kl, wide.report.layers[0].kl, 0.05 * wide.report.layers[0].kl);
  ASSERT_EQ(narrow.gradients.size(), wide.gradients.size());
  double inside = 0, wide_square = 0, narrow_square = 0;
  for (const auto& [name, gradient] : wide.gradients) {
    if (is_indexer_tensor(name)) continue;
    const at::Tensor g = narrow.gradients.at(name).to(at::kDouble);
    inside += (g * gradient).sum().item<double>();
    wide_square += gradient.square().sum().item<double>();
    narrow_square += g.square().sum().item<double>();
  }
  EXPECT_GT(inside / std::sqrt(wide_square * narrow_square), 0.97);
}

}  // namespace
}  // namespace dsa
