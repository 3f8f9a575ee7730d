// dsatrain probe: run a model over given tokens and write down everything that another implementation can be
// compared with (trainer/probe.h).
#include <CLI/CLI.hpp>

#include <filesystem>
#include <map>
#include <memory>

#include "data/error.h"
#include "parallel/device.h"
#include "parallel/mesh.h"
#include "tools/commands.h"
#include "tools/launch.h"
#include "trainer/probe.h"

namespace dsa {
namespace {

struct Arguments {
  ProbeOptions options;
  std::string attention, dtype, device = "cpu";
  Degrees degrees;
};

int run_probe(Arguments a, int* argc, char*** argv) {
  a.options.attention = a.attention == "sparse" ? AttentionMode::SPARSE : AttentionMode::DENSE;
  a.options.model_options.dtype = a.dtype == "fp64" ? at::kDouble : a.dtype == "bf16" ? at::kBFloat16 : at::kFloat;
  std::unique_ptr<MpiSession> mpi;
  if (launched_size() > 1 || a.degrees.tensor * a.degrees.context * a.degrees.expert > 1)
    mpi = std::make_unique<MpiSession>(argc, argv);
  const auto work = [&] {
    const auto folder = std::filesystem::absolute(a.options.out).parent_path();
    if (!std::filesystem::is_directory(folder))
      throw InputError("cannot write " + a.options.out, "there is no folder " + folder.string(), "create it first");
    const int world = mpi ? mpi->size() : 1, sequence = a.degrees.tensor * a.degrees.context;
    a.degrees.data = std::max(world / sequence, 1);
    const at::Device device = a.device == "gpu" ? open_gpu(launched_local_rank(), launched_local_size()) : at::kCPU;
    Mesh mesh(a.degrees, /*check_calls=*/false, device);
    probe(a.options, mesh);
    if (mesh.rank() == 0) std::printf("wrote %s\n", a.options.out.c_str());
    return 0;
  };
  return mpi ? report_errors_under_mpi(mpi->rank(), work) : report_errors(work);
}

}  // namespace

void add_probe_command(CLI::App& app, std::function<int()>& run, int* argc, char*** argv) {
  CLI::App* c = app.add_subcommand("probe", "Run a model over given tokens and write its inner values, to compare a port");
  auto a = std::make_shared<Arguments>();
  ProbeOptions& o = a->options;
  c->add_option("--model", o.model, "HF folder, native checkpoint or run folder")->required();
  c->add_option("--tokens", o.tokens, "safetensors file with input_ids, int32 [batch, time]")->required();
  c->add_option("--attention", a->attention, "dense or sparse")->required()->check(CLI::IsMember({"dense", "sparse"}));
  c->add_option("--dtype", a->dtype, "fp64, fp32 or bf16")->required()->check(CLI::IsMember({"fp64", "fp32", "bf16"}));
  c->add_option("--out", o.out, "safetensors file to write; must not exist")->required();
  c->add_flag("--gradients", o.gradients, "also the gradients of the LM loss and of the indexer's loss");
  c->add_option("--device", a->device, "cpu (default) or gpu, one rank a GPU")->check(CLI::IsMember({"cpu", "gpu"}));
  c->add_option("--tensor", a->degrees.tensor, "tensor-parallel degree (under mpirun)");
  c->add_option("--context", a->degrees.context, "context-parallel degree (under mpirun)");
  c->add_option("--expert", a->degrees.expert, "expert-parallel degree (under mpirun)");
  c->add_option("--indexer-from", o.indexer_from, "safetensors file with indexer tensors under their released names");
  c->add_option("--indexer-seed", o.indexer_seed, "a random indexer where the model has none");
  c->add_option("--indexer-heads", o.indexer_heads, "heads of that indexer (default: the file's, or 64)");
  c->add_option("--indexer-head-dim", o.indexer_head_dim, "its head dim (default: the file's, or 128)");
  c->add_option("--top-k", o.top_k, "keys selected per query (default: the model's, or 2048)");
  c->add_option("--query-block", o.query_block, "query rows of one score tile")->check(CLI::PositiveNumber);
  c->add_flag("--hadamard", o.model_options.hadamard, "rotate the indexer's queries and keys");
  c->add_flag("--mtp-pre-norm", o.model_options.mtp_pre_norm, "feed MTP the hidden state before the final norm");
  c->footer(
      "Examples:\n"
      "  dsatrain probe --model DeepSeek-V3.2 --tokens ids.safetensors --attention sparse --dtype fp64 --out ours.safetensors\n"
      "  mpirun -np 4 dsatrain probe --tensor 2 --context 2 ...                    the same from four ranks\n"
      "Writes logits, hidden.I, final_norm, lm_loss, router.L.*, indexer.L.*, warmup|sparse.L.rows (the indexer's KL),\n"
      "mtp.*; with --gradients also grad.NAME and warmup|sparse.L.grad.NAME.");
  c->callback([a, &run, argc, argv] { run = [a, argc, argv] { return run_probe(*a, argc, argv); }; });
}

}  // namespace dsa
