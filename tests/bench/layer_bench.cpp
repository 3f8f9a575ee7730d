// [mpirun -np N] dsa_bench layer [--json FILE] [--lengths 4096,8192,...] [--modes dense,warmup,sparse] [--repeats N]
//                                [--kernels N] [--split context|tensor] [--ffn dense|experts]
//
// One decoder layer of the 671B model (hidden 7168, 128 heads; dense FFN 18432, or 256 experts of 2048, 8 and a shared one a
// token), batch 1, bf16, on one GPU, or its rows (--split tensor: its heads and matrices), and its experts, dealt to N GPUs:
// forward and backward of the product's own layer code. Prints milliseconds (median, wall clock, device synchronised),
// tokens/s, peak memory and model TFLOP/s. FLOPs counted, T tokens, P matrix parameters that a token meets, H heads,
// causal pairs = T (T + 1) / 2, selected pairs = sum_t min(t + 1, 2048):
//   dense   6 P T + 2 pairs H ((192 + 128) + (3*192 + 2*128))
//   warmup  2 P T + 2 pairs H (192 + 128) + 2 pairs H 192 (the target) + 3 * 2 pairs 64*128 (scores, gradients)
//   sparse  6 P T + 2 selected H ((576 + 512) + (3*576 + 2*512)) + 2 pairs 64*128 + 3 * 2 selected 64*128
// Recomputation is not counted as work. --kernels N: also the N kernels that take most of a step.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "kernels/native.h"
#include "parallel/device.h"
#include "tests/bench/kernel_times.h"
#include "tests/bench/layer_bench.h"
#include "tools/launch.h"
#include "trainer/model/decoder_layer.h"

namespace dsa::bench {
namespace {

constexpr int64_t kVocabulary = 129280;

ModelConfig layer_of_671b(bool experts) {
  ModelConfig config = ModelConfig::from_json(R"({"model_type": "deepseek_v32", "vocab_size": 129280, "hidden_size": 7168,
    "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": true,
    "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0}, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1})",
                                              "the 671B layer");
  if (experts) config.first_k_dense_replace = 0;
  return config;
}

struct Result {
  std::string mode;
  int64_t tokens;
  double milliseconds, peak_gib, teraflops;
  std::vector<KernelTime> kernels;
};

double floating_point_operations(const std::string& mode, const ModelConfig& c, double T, double parameters) {
  const double H = static_cast<double>(c.num_attention_heads), K = static_cast<double>(c.indexer->top_k);
  const double pairs = T * (T + 1) / 2, selected = T <= K ? pairs : K * (K + 1) / 2 + (T - K) * K;
  const double dense_forward = 2 * pairs * H * (192 + 128), indexer = 2.0 * 64 * 128;
  if (mode == "dense") return 6 * parameters * T + dense_forward + 2 * pairs * H * (3 * 192 + 2 * 128);
  if (mode == "warmup") return 2 * parameters * T + dense_forward + 2 * pairs * H * 192 + 3 * pairs * indexer;
  return 6 * parameters * T + 2 * selected * H * ((576 + 512) + (3 * 576 + 2 * 512)) + (pairs + 3 * selected) * indexer;
}

class LayerBench {
 public:
  LayerBench(Mesh mesh, const std::string& mode, bool experts)
      : mesh_(std::move(mesh)), mode_(mode), config_(layer_of_671b(experts)) {
    const ModelBuilder builder{config_, mesh_, at::kBFloat16, list_};
    layer_.emplace(builder, 0, /*hadamard=*/false);
    for (Parameter& p : list_.parameters) {
      if (p.decay) p.value.normal_(0, 0.02);
      else p.value.fill_(p.shards[0].name.ends_with("bias") ? 0 : 1);
      if (!p.decay || p.group != ParameterGroup::BACKBONE) continue;
      const double share = p.stacked ? static_cast<double>(config_.num_experts_per_tok) : 1;
      parameters_ += share * static_cast<double>(numel(p.shards[0].global_shape));
    }
    for (Buffer& b : list_.buffers) b.value.zero_();  // the router's correction bias
    list_.set_trainable(ParameterGroup::BACKBONE, mode != "warmup");
    list_.set_trainable(ParameterGroup::INDEXER, mode != "dense");
    plan_.attention = mode == "sparse" ? AttentionMode::SPARSE : AttentionMode::DENSE;
    plan_.train_backbone = mode != "warmup";
    plan_.indexer_loss = plan_.train_indexer = mode != "dense";
    plan_.query_block = 512;
  }

  Result measure(int64_t tokens, int repeats, size_t kernels) {
    std::mt19937_64 random(tokens);
    Sample sample{std::vector<int32_t>(tokens + 1), std::vector<int32_t>(tokens, 0)};
    for (int32_t& t : sample.tokens) t = static_cast<int32_t>(random() % kVocabulary);
    const TokenBatch batch = make_batch({sample}, config_, mesh_, at::kBFloat16);
    const auto options = at::TensorOptions().dtype(at::kBFloat16).device(mesh_.device());
    const int64_t own = batch.stream_row_N.size(0);
    at::Tensor x = at::randn({own, config_.hidden_size}, options);
    const at::Tensor dy = at::randn({own, config_.hidden_size}, options);
    plan_.kl_scale = 1.0 / static_cast<double>(tokens);
    at::getDeviceAllocator(mesh_.device().type())->resetPeakStats(mesh_.device().index());
    std::vector<double> milliseconds;
    for (int i = 0; i <= repeats; ++i) {
      mesh_.along(Axis::WORLD).barrier();
      const double begin = now();
      step(x, dy, batch);
      mesh_.along(Axis::WORLD).barrier();  // the slowest rank counts
      if (i > 0) milliseconds.push_back((now() - begin) * 1e3);
    }
    std::vector<KernelTime> times;
    if (kernels > 0) times = kernel_times([&] { step(x, dy, batch); });
    std::sort(milliseconds.begin(), milliseconds.end());
    const double median = milliseconds[milliseconds.size() / 2];
    const auto stats = at::getDeviceAllocator(mesh_.device().type())->getDeviceStats(mesh_.device().index());
    return {mode_, tokens, median, static_cast<double>(stats.allocated_bytes[0].peak) / (1 << 30),
            floating_point_operations(mode_, config_, static_cast<double>(tokens), parameters_) / median * 1e-9,
            std::move(times)};
  }

 private:
  void step(at::Tensor x, const at::Tensor& dy, const TokenBatch& batch) {
    ModelReport report;
    report.layers.resize(1);
    const at::AutoGradMode grad(plan_.train_backbone);
    x = x.detach().requires_grad_(plan_.train_backbone);
    const FeedForwardOutput out = layer_->forward(x, {batch, plan_, report});
    if (plan_.train_backbone) torch::autograd::backward({out.y_NM}, {dy});
    for (Parameter& p : list_.parameters) p.value.mutable_grad().reset();
    x.mutable_grad().reset();
    synchronise();
    if (plan_.indexer_loss && !(report.layers[0].kl >= 0)) throw std::runtime_error("the indexer's loss is not a number");
  }
  void synchronise() const { at::ones({1}, at::TensorOptions().device(mesh_.device())).item<float>(); }
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  Mesh mesh_;
  std::string mode_;
  ModelConfig config_;
  ParameterList list_;
  std::optional<DecoderLayer> layer_;
  StagePlan plan_;
  double parameters_ = 0;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream in(text);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

int run_layer(int argc, char** argv) {
  std::string json, split_by = "context", ffn = "dense", lengths = "4096,8192,16384,32768,65536,131072", modes = "dense,warmup,sparse";
  int repeats = 3;
  size_t kernels = 0;
  for (int i = 0; i < argc; i += 2) {
    if (i + 1 == argc) throw std::invalid_argument(std::string("no value (") + argv[i] + " is the last argument) give one");
    if (!std::strcmp(argv[i], "--json")) json = argv[i + 1];
    else if (!std::strcmp(argv[i], "--lengths")) lengths = argv[i + 1];
    else if (!std::strcmp(argv[i], "--modes")) modes = argv[i + 1];
    else if (!std::strcmp(argv[i], "--repeats")) repeats = std::atoi(argv[i + 1]);
    else if (!std::strcmp(argv[i], "--split")) split_by = argv[i + 1];
    else if (!std::strcmp(argv[i], "--ffn")) ffn = argv[i + 1];
    else if (!std::strcmp(argv[i], "--kernels")) kernels = std::stoul(argv[i + 1]);
    else throw std::invalid_argument(std::string("unknown option (") + argv[i] + ") see the head of tests/bench/layer_bench.cpp");
  }
  if (split_by != "context" && split_by != "tensor")
    throw std::invalid_argument("unknown split (" + split_by + ") take context or tensor");
  if (ffn != "dense" && ffn != "experts") throw std::invalid_argument("unknown ffn (" + ffn + ") take dense or experts");
  if (visible_gpus() == 0) {
    std::puts("no CUDA device");
    return 0;
  }
  const int ranks = launched_size();
  std::unique_ptr<MpiSession> mpi;
  if (ranks > 1) mpi = std::make_unique<MpiSession>(&argc, &argv);
  const at::Device device = open_gpu(launched_local_rank(), launched_local_size());
  if (launched_rank() > 0 && !std::freopen("/dev/null", "w", stdout)) throw std::runtime_error("cannot silence this rank");
  std::printf("%d x %s\n%-7s %8s %10s %10s %9s %9s\n", ranks, describe_gpu(device).c_str(), "mode", "tokens", "ms", "tokens/s", "peak GiB",
              "TFLOP/s");
  nlohmann::json results = nlohmann::json::array();
  for (const std::string& mode : split(modes)) {
    const Degrees degrees = split_by == "tensor" ? Degrees{.tensor = ranks, .expert = ranks} : Degrees{.context = ranks, .expert = ranks};
    LayerBench bench(ranks > 1 ? Mesh(degrees, /*check_calls=*/false, device) : Mesh::single(device), mode, ffn == "experts");
    for (const std::string& length : split(lengths)) {
      try {
        const Result r = bench.measure(std::stoll(length), repeats, kernels);
        std::printf("%-7s %8ld %10.1f %10.0f %9.1f %9.0f\n", r.mode.c_str(), r.tokens, r.milliseconds,
                    static_cast<double>(r.tokens) / r.milliseconds * 1e3, r.peak_gib, r.teraflops);
        nlohmann::json longest = nlohmann::json::array();
        for (size_t k = 0; k < std::min(kernels, r.kernels.size()); ++k) {
          const KernelTime& t = r.kernels[k];
          std::printf("    %5.1f %%  %9.2f ms  %6ld x  %s\n", 100 * t.milliseconds / r.milliseconds, t.milliseconds, t.launches, t.name.c_str());
          longest.push_back({{"kernel", t.name}, {"ms", t.milliseconds}, {"launches", t.launches}});
        }
        results.push_back({{"kernels", longest}, {"mode", r.mode}, {"tokens", r.tokens}, {"ms", r.milliseconds}, {"peak_gib", r.peak_gib},
                           {"tflops", r.teraflops}});
      } catch (const std::exception& e) {
        std::printf("%-7s %8s failed: %.600s\n", mode.c_str(), length.c_str(), e.what());
      }
      std::fflush(stdout);
      at::getDeviceAllocator(device.type())->emptyCache({0, 0});
    }
  }
  for (const auto& [op, implementation] : implementations_that_ran()) std::printf("%-16s %s\n", op.c_str(), implementation.c_str());
  if (!json.empty() && launched_rank() == 0)
    std::ofstream(json) << nlohmann::json{{"device", describe_gpu(device)}, {"ranks", ranks}, {"split", split_by}, {"ffn", ffn},
                                          {"results", results}}.dump(1) << "\n";
  return 0;
}

}  // namespace dsa::bench
