// The sparse stage of one layer over one sequence of 131,072 tokens, 128 heads, 64 indexer heads, k = 2048, by blocks of 4096
// query rows: e4m3 scores and selection, attention forward, delta and backward, the indexer's loss with all gradients; the ends
// of the two sums once. Selection runs on the scores of random queries and keys; what follows takes the lists of a pattern.
// Quantising and projections are not part of it. The value is layers a second; peer: the best public pieces added up, 1.60 s
// random, 1.31 s local, 0.96 s shared; goal 0.95 s random, 0.62 s shared. Floor: 0.46 s of 787 and 1436 TFLOP/s and 3.02 TB/s.
#include <algorithm>
#include <string>

#include "kernels/indexer_kl/sparse_params.h"
#include "kernels/indexer_topk/params.h"
#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"
#include "tests/bench/bench.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

using test::DeviceArray;

constexpr int64_t kTokens = 131072, kBlock = 4096, kWorkspaceRows = 1024;  // rows of a workspace: as the model
constexpr int kHeads = 128, kIndexerHeads = 64, kTopK = 2048;

enum Part { SELECT, FORWARD, BACKWARD, LOSS, ENDS, kParts };
constexpr const char* kPartNames[kParts] = {"scores and selection", "attention forward", "attention backward", "indexer loss",
                                            "ends of sums"};

// Milliseconds of each part, summed over the blocks, by events between them.
class Clock {
 public:
  ~Clock() {
    for (const auto& [event, part] : marks_) cudaEventDestroy(event);
  }
  /// What was enqueued since the last mark belongs to `part`; -1: to none.
  void mark(int part) {
    cudaEvent_t event;
    cuda::check(cudaEventCreate(&event), "create an event");
    marks_.push_back({event, part});
    cuda::check(cudaEventRecord(event), "record an event");
  }
  std::vector<double> read() const {
    cuda::check(cudaEventSynchronize(marks_.back().first), "wait for the measured work");
    std::vector<double> out(kParts);
    for (size_t i = 1; i < marks_.size(); ++i) {
      float ms;
      cuda::check(cudaEventElapsedTime(&ms, marks_[i - 1].first, marks_[i].first), "read an event");
      out[marks_[i].second] += ms;
    }
    return out;
  }

 private:
  std::vector<std::pair<cudaEvent_t, int>> marks_;
};

// One block's queries serve all blocks; keys, lists and sums are those of the whole sequence.
struct Layer {
  DeviceArray<uint16_t> q, kv, o, d_o, dq, dkv, index_q, index_k, index_dq, index_dk;
  DeviceArray<uint8_t> code_q, code_k;
  DeviceArray<float> w, key_scale, lse, delta, p_sel, scores, kl, dw;
  DeviceArray<uint64_t> dkv_sum, index_dk_sum;
  DeviceArray<QuantumReport> report;
  DeviceArray<int32_t> indices, lengths, selected, selected_lengths, end;
  DeviceArray<uint8_t> select_workspace, backward_workspace, loss_workspace;
  float quantum = 1, index_quantum = 1;

  static std::vector<int32_t> ends() {
    std::vector<int32_t> out(kTokens);
    for (int64_t t = 0; t < kTokens; ++t) out[t] = static_cast<int32_t>(t + 1);
    return out;
  }

  Layer()
      : q(kBlock * kHeads * 576), kv(kTokens * 576), o(kBlock * kHeads * 512), d_o(o.size()), dq(q.size()), dkv(kv.size()),
        index_q(kBlock * kIndexerHeads * 128), index_k(kTokens * 128), index_dq(index_q.size()), index_dk(index_k.size()),
        code_q(index_q.size()), code_k(index_k.size()), w(kBlock * kIndexerHeads), key_scale(std::vector<float>(kTokens, 0x1p-6f)),
        lse(kBlock * kHeads), delta(lse.size()), p_sel(kBlock * kTopK), scores(p_sel.size()), kl(kBlock), dw(w.size()),
        dkv_sum(sparse_mla_sum_bytes(kTokens) / 8), index_dk_sum(indexer_kl_sparse_sum_bytes(kTokens) / 8), report(1),
        indices(kTokens * kTopK), lengths(kTokens), selected(kBlock * kTopK), selected_lengths(kBlock), end(ends()),
        select_workspace(static_cast<int64_t>(indexer_topk_workspace_sm90(kBlock, kTokens).enough)),
        backward_workspace(static_cast<int64_t>(sparse_mla_workspace_bytes(backward(0), kWorkspaceRows))),
        loss_workspace(static_cast<int64_t>(indexer_kl_sparse_workspace_bytes())) {
    test::fill_normal_bf16(q.data(), q.size(), 1, 0.5f);
    test::fill_normal_bf16(kv.data(), kv.size(), 2);
    test::fill_normal_bf16(d_o.data(), d_o.size(), 3);
    test::fill_normal_bf16(index_q.data(), index_q.size(), 4);
    test::fill_normal_bf16(index_k.data(), index_k.size(), 5);
    test::fill_normal_e4m3(code_q.data(), code_q.size(), 6);
    test::fill_normal_e4m3(code_k.data(), code_k.size(), 7);
    test::fill_normal_f32(w.data(), w.size(), 8, 0, 0.011f);
  }

  void draw_lists(test::Lists pattern) {
    std::vector<int32_t> entries, counts;
    for (int64_t t = 0; t < kTokens; t += kBlock) {
      test::make_lists(pattern, kBlock, t + kBlock, kTopK, 5, entries, counts);
      cuda::check(cudaMemcpy(indices.data() + t * kTopK, entries.data(), entries.size() * 4, cudaMemcpyHostToDevice), "copy lists");
      cuda::check(cudaMemcpy(lengths.data() + t, counts.data(), counts.size() * 4, cudaMemcpyHostToDevice), "copy lengths");
    }
  }

  SparseMlaParams attention(int64_t t) const {
    SparseMlaParams p;
    p.queries = kBlock, p.keys = t + kBlock, p.heads = kHeads, p.k = kTopK, p.scale = 0.1352337788608801f;
    p.q = q.data(), p.q_stride = kHeads * 576, p.kv = kv.data(), p.kv_stride = 576;
    p.indices = indices.data() + t * kTopK, p.indices_stride = kTopK, p.lengths = lengths.data() + t;
    return p;
  }
  SparseMlaBackwardParams backward(int64_t t) const {
    SparseMlaBackwardParams p;
    static_cast<SparseMlaParams&>(p) = attention(t);
    p.d_o = d_o.data(), p.d_o_stride = kHeads * 512, p.lse = lse.data(), p.delta = delta.data();
    p.dq = dq.data(), p.p_sel = p_sel.data(), p.dkv_sum = dkv_sum.data(), p.quantum = quantum;
    return p;
  }
  IndexerTopKParams selection(int64_t t) const {
    IndexerTopKParams p;
    p.scores.dtype = IndexerDtype::E4M3, p.scores.queries = kBlock, p.scores.keys = t + kBlock;
    p.scores.heads = kIndexerHeads, p.scores.dim = 128;
    p.scores.q = code_q.data(), p.scores.q_stride = kIndexerHeads * 128, p.scores.k = code_k.data(), p.scores.k_stride = 128;
    p.scores.w = w.data(), p.scores.w_stride = kIndexerHeads, p.scores.k_scale = key_scale.data(), p.scores.end = end.data() + t;
    p.k = kTopK, p.indices = selected.data(), p.indices_stride = kTopK;
    p.selected_scores = scores.data(), p.selected_scores_stride = kTopK, p.lengths = selected_lengths.data();
    p.workspace = select_workspace.data(), p.workspace_bytes = select_workspace.size();
    return p;
  }
  IndexerKlSparseParams loss(int64_t t) const {
    IndexerKlSparseParams p;
    p.queries = kBlock, p.keys = t + kBlock, p.heads = kIndexerHeads, p.dim = 128, p.k = kTopK;
    p.q = index_q.data(), p.q_stride = kIndexerHeads * 128, p.key = index_k.data(), p.k_stride = 128;
    p.w = w.data(), p.w_stride = kIndexerHeads;
    p.indices = indices.data() + t * kTopK, p.indices_stride = kTopK, p.lengths = lengths.data() + t;
    p.scores = scores.data(), p.scores_stride = kTopK, p.p_sel = p_sel.data(), p.p_stride = kTopK, p.loss_scale = 1.f / kTokens;
    p.kl = kl.data(), p.dq = index_dq.data(), p.dw = dw.data(), p.dk_sum = index_dk_sum.data(), p.quantum = index_quantum;
    p.workspace = loss_workspace.data(), p.workspace_bytes = loss_workspace.size();
    return p;
  }

  void finish_attention() {
    launch_sparse_mla_finish_sm90(dkv_sum.data(), kTokens, quantum, dkv.data(), true, report.data(), nullptr);
  }
  void find_quantum(QuantumGuess& guess) {
    guess.run([&](float of) {
      quantum = of;
      run();
      finish_attention();
      return report.host()[0];
    });
  }
  void finish_loss() {
    launch_indexer_kl_sparse_finish_sm90(index_dk_sum.data(), kTokens, index_quantum, index_dk.data(), true, report.data(), nullptr);
  }
  /// On the target and the scores that the last run left.
  void find_index_quantum(QuantumGuess& guess) {
    guess.run([&](float quantum) {
      index_dk_sum.fill_bytes(0);
      index_quantum = quantum;
      for (int64_t t = 0; t < kTokens; t += kBlock) launch_indexer_kl_sparse_sm90(loss(t));
      finish_loss();
      return report.host()[0];
    });
  }

  std::vector<double> run() {
    Clock clock;
    clock.mark(ENDS);
    dkv_sum.fill_bytes(0), index_dk_sum.fill_bytes(0);
    clock.mark(ENDS);
    for (int64_t t = 0; t < kTokens; t += kBlock) {
      launch_indexer_topk_sm90(selection(t));
      clock.mark(SELECT);
      SparseMlaForwardParams f;
      static_cast<SparseMlaParams&>(f) = attention(t);
      f.o = o.data(), f.lse = lse.data();
      launch_sparse_mla_forward_sm90(f);
      clock.mark(FORWARD);
      SparseMlaBackwardParams b = backward(t);
      b.workspace = backward_workspace.data(), b.workspace_bytes = backward_workspace.size();
      launch_sparse_mla_delta_sm90(b, o.data(), delta.data());
      launch_sparse_mla_backward_sm90(b);
      clock.mark(BACKWARD);
      launch_indexer_kl_sparse_sm90(loss(t));
      clock.mark(LOSS);
    }
    finish_attention();
    finish_loss();
    clock.mark(ENDS);
    return clock.read();
  }
};

}  // namespace

void run_sparse_chain_suite(const Options& options, Report& report) {
  using test::Lists;
  struct Case {
    Lists lists;
    const char* name;
    double peer, goal;  // milliseconds; 0: none
  };
  Layer layer;
  QuantumGuess guess, index_guess;
  for (const Case& c : {Case{Lists::RANDOM, "random", 1600, 950}, Case{Lists::LOCAL, "local", 1310, 0},
                        Case{Lists::SHARED, "shared", 960, 620}}) {
    const std::string name = std::string("sparse chain of a layer, 131072 tokens, ") + c.name;
    if (name.find(options.only) == std::string::npos) continue;
    layer.draw_lists(c.lists);
    layer.find_quantum(guess);
    layer.find_index_quantum(index_guess);
    std::vector<std::vector<double>> runs;
    for (int i = 0; i < (options.quick ? 1 : 3); ++i) runs.push_back(layer.run());
    const auto sum = [](const std::vector<double>& parts) {
      double ms = 0;
      for (const double x : parts) ms += x;
      return ms;
    };
    std::sort(runs.begin(), runs.end(), [&](const auto& a, const auto& b) { return sum(a) < sum(b); });
    const std::vector<double>& median = runs[runs.size() / 2];
    const double ms = sum(median);
    report.add({name, ms, 1e3 / ms, "1/s", 460, 1e3 / c.peer, c.goal > 0 ? 1e3 / c.goal : 0});
    for (int part = 0; part < kParts; ++part)
      report.add({name + ", " + kPartNames[part], median[part], 1e3 / median[part], "1/s", 0, 0, 0});
  }
}

}  // namespace dsa::bench
