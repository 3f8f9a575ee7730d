// mpirun -np N collectives_bench [--cpu] [--quick] [--json FILE]
//
// Time and bandwidth of the collectives of a training step, through the communicators that the step uses, with the
// sizes of one layer of the 671B model (hidden 7168, latent 512 + 64, indexer key 128; bf16) for a sequence of 131,072
// and of 8,192 tokens split over the ranks, and of a gradient bucket.
//
//   bandwidth = bytes that one rank receives from the others / time        (an all-reduce moves its data twice)
//
// Beside them the time of the shared expert's first two products alone and while tokens travel to their experts.
//
// The peer's figures are NCCL's own, measured on two H200: 151 MB gathered in an all-gather, 1 GiB in an all-to-all and
// in an all-reduce.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel/mesh.h"
#include "tests/parallel/devices.h"

namespace dsa {
namespace {

struct Measurement {
  std::string name;
  double microseconds;
  double gigabytes_per_second;  // 0: not of interest
  double peer;                  // GB/s; 0: none
};

class Bench {
 public:
  Bench(Communicator& group, at::Device device, bool quick) : group_(group), device_(device), quick_(quick) {}

  at::Tensor tensor(std::vector<int64_t> shape, at::ScalarType dtype = at::kBFloat16) const {
    return at::empty(shape, at::TensorOptions(dtype).device(device_)).normal_();
  }

  /// received: bytes from the others; peer: GB/s on two GPUs. The median over samples of ten calls each, of the slowest rank.
  void measure(const std::string& name, double received, const std::function<void()>& call, double peer = 0) {
    if (quick_ && received > 64e6) return;
    constexpr int kCalls = 10, kSamples = 5;
    for (int i = 0; i < 3; ++i) call();
    std::vector<double> times;
    for (int s = 0; s < kSamples; ++s) {
      wait();
      group_.barrier();
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < kCalls; ++i) call();
      wait();
      double mine = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / kCalls, slowest = 0;
      MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      times.push_back(slowest);
    }
    std::sort(times.begin(), times.end());
    const double seconds = times[kSamples / 2];
    const Measurement m{name, seconds * 1e6, received / seconds / 1e9, group_.size() == 2 ? peer : 0};
    if (group_.rank() == 0) {
      std::printf("%-62s %9.1f us", m.name.c_str(), m.microseconds);
      if (received > 0) std::printf(" %8.1f GB/s", m.gigabytes_per_second);
      if (peer > 0) std::printf("   (NCCL's own: %.0f)", peer);
      std::printf("\n");
      std::fflush(stdout);
    }
    results.push_back(m);
  }

  std::vector<Measurement> results;

 private:
  void wait() const {
    if (!device_.is_cpu()) c10::impl::getDeviceGuardImpl(device_.type())->synchronizeDevice(device_.index());
  }
  Communicator& group_;
  at::Device device_;
  bool quick_;
};

void run(Bench& bench, Communicator& group, bool small) {
  const int64_t ranks = group.size();
  const double others = static_cast<double>(ranks - 1) / static_cast<double>(ranks);
  const auto bytes = [](const at::Tensor& x) { return static_cast<double>(x.nbytes()); };
  const std::vector<int64_t> lengths = small ? std::vector<int64_t>{1024} : std::vector<int64_t>{131072, 8192};
  for (const int64_t tokens : lengths) {
    const std::string of = " of " + std::to_string(tokens) + " tokens";
    const int64_t own = tokens / ranks;
    for (const auto& [what, width] : {std::pair<const char*, int64_t>{"indexer keys", 128}, {"latents", 576}, {"hidden rows", 7168}}) {
      const at::Tensor x = bench.tensor({own, width});
      bench.measure(std::string("all_gather ") + what + of, bytes(x) * (ranks - 1), [&] { group.all_gather(x); },
                    width == 576 && tokens == 131072 ? 245 : 0);
    }
    const at::Tensor whole = bench.tensor({tokens, 7168});
    bench.measure("reduce_scatter hidden rows" + of, bytes(whole) * others, [&] { group.reduce_scatter(whole); });
    // With top-8 of 256 experts nearly every token has one on each of few ranks.
    const at::Tensor sent = bench.tensor({own * ranks, 7168});
    const std::vector<int64_t> counts(ranks, own);
    bench.measure("all_to_all hidden rows to experts" + of, bytes(sent) * others, [&] { group.all_to_all(sent, counts, counts); },
                  tokens == 131072 ? 331 : 0);
    const at::Tensor rows = sent.narrow(0, 0, own), gate_and_up = bench.tensor({7168, 2 * 2048});
    bench.measure("shared expert, gate and up" + of, 0, [&] { at::mm(rows, gate_and_up); });
    bench.measure("shared expert, gate and up, beside the all_to_all" + of, 0, [&] {
      Transfer travelling = group.start_all_to_all(sent, counts, counts);
      at::mm(rows, gate_and_up);
      travelling.wait();
    });
  }
  const at::Tensor gradients = bench.tensor({small ? int64_t{1} << 20 : int64_t{1} << 28}, at::kFloat);
  bench.measure("reduce_scatter fp32 gradients, " + std::to_string(gradients.nbytes() >> 20) + " MiB", bytes(gradients) * others,
                [&] { group.reduce_scatter(gradients); });
  bench.measure("all_reduce fp32 gradients, " + std::to_string(gradients.nbytes() >> 20) + " MiB", 2 * bytes(gradients) * others,
                [&] { group.all_reduce(gradients); }, 333);
  const at::Tensor little = bench.tensor({1024}, at::kFloat), number = at::empty({1}, at::TensorOptions(at::kDouble)).zero_();
  bench.measure("all_reduce of 4 KiB", bytes(little) * (ranks - 1), [&] { group.all_reduce(little); });
  bench.measure("all_reduce of one host number", 8.0 * (ranks - 1), [&] { group.all_reduce(number); });
}

void write_json(const std::string& path, const std::string& device, int ranks, const std::vector<Measurement>& results) {
  FILE* f = std::fopen(path.c_str(), "w");
  if (!f) throw std::runtime_error("cannot write " + path + " (it cannot be opened) choose another --json");
  std::fprintf(f, "{\"device\": \"%s\", \"ranks\": %d, \"measurements\": [", device.c_str(), ranks);
  for (size_t i = 0; i < results.size(); ++i)
    std::fprintf(f, "%s\n  {\"name\": \"%s\", \"us\": %.5g, \"value\": %.5g, \"unit\": \"GB/s\", \"peer\": %g}", i ? "," : "",
                 results[i].name.c_str(), results[i].microseconds, results[i].gigabytes_per_second, results[i].peer);
  std::fprintf(f, "\n]}\n");
  std::fclose(f);
}

}  // namespace
}  // namespace dsa

int main(int argc, char** argv) try {
  dsa::MpiSession mpi(&argc, &argv);
  bool cpu = false, quick = false;
  std::string json;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--cpu")) cpu = true;
    else if (!std::strcmp(argv[i], "--quick")) quick = true;
    else if (!std::strcmp(argv[i], "--json") && i + 1 < argc) json = argv[++i];
    else throw std::invalid_argument("unknown argument (usage: mpirun -np N collectives_bench [--cpu] [--quick] [--json FILE])");
  }
  at::Device device = at::kCPU;
  std::string name = "CPU";
  if (!cpu) {
    const auto gpu = dsa::test::gpu_of_rank();
    if (!gpu || mpi.size() < 2) {
      if (mpi.rank() == 0) std::puts("no CUDA device for every one of two ranks or more");
      return 0;
    }
    device = *gpu;
    name = dsa::describe_gpu(device) + ", NCCL " + dsa::nccl_version();
  }
  const dsa::Mesh mesh({.data = mpi.size()}, /*check_calls=*/false, device);
  dsa::Communicator& group = mesh.along(dsa::Axis::WORLD);
  if (mpi.rank() == 0) std::printf("%d ranks, %s\n", mpi.size(), name.c_str());
  dsa::Bench bench(group, device, quick);
  dsa::run(bench, group, cpu);
  if (mpi.rank() == 0 && !json.empty()) dsa::write_json(json, name, mpi.size(), bench.results);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "collectives_bench: %s\n", e.what());
  return 1;
}
