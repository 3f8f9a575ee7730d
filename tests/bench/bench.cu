#include "tests/bench/bench.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "kernels/cuda/check.h"
#include "tests/support/cuda_device.h"

namespace dsa::bench {
namespace {

constexpr int64_t kFlushWords = int64_t{192} << 20 >> 4;

__global__ void read_all(const uint4* from, int64_t n, uint32_t* sink) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{blockDim.x} * gridDim.x) sum ^= from[i].x;
  if (sum == 0xDEADBEEF) *sink = sum;
}

}  // namespace

void flush_l2() {
  static const test::DeviceArray<uint4> memory(kFlushWords);
  static const bool filled = (memory.fill_bytes(1), true);
  (void)filled;
  read_all<<<1056, 256>>>(memory.data(), kFlushWords, reinterpret_cast<uint32_t*>(memory.data()));
  cuda::check(cudaGetLastError(), "launch the cache flush");
}

double cold_milliseconds(const std::function<void()>& work, int repeats) {
  cudaEvent_t begin, end;
  cuda::check(cudaEventCreate(&begin), "create an event");
  cuda::check(cudaEventCreate(&end), "create an event");
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    flush_l2();
    cuda::check(cudaEventRecord(begin), "record an event");
    work();
    cuda::check(cudaEventRecord(end), "record an event");
    cuda::check(cudaEventSynchronize(end), "wait for the measured work");
    float ms;
    cuda::check(cudaEventElapsedTime(&ms, begin, end), "read an event");
    if (i >= 0) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void Report::add(const Measurement& m) {
  std::printf("%-58s %9.4f ms  %8.2f %-8s", m.name.c_str(), m.milliseconds, m.value, m.unit.c_str());
  if (m.floor > 0) std::printf("  floor %8.4f ms", m.floor);
  if (m.peer > 0) std::printf("  peer %7.2f", m.peer);
  if (m.goal > 0) std::printf("  goal %7.2f %s", m.goal, m.value >= m.goal ? "reached" : "MISSED");
  std::printf("\n");
  std::fflush(stdout);
  measurements_.push_back(m);
}

void Report::write_json(const std::string& path) const {
  cudaDeviceProp device;
  cuda::check(cudaGetDeviceProperties(&device, 0), "read the device's properties");
  FILE* f = std::fopen(path.c_str(), "w");
  if (!f) throw std::runtime_error("cannot write " + path + " (it cannot be opened) choose another --json");
  std::fprintf(f, "{\"device\": \"%s\", \"measurements\": [", device.name);
  for (size_t i = 0; i < measurements_.size(); ++i) {
    const Measurement& m = measurements_[i];
    std::fprintf(f, "%s\n  {\"name\": \"%s\", \"ms\": %.6g, \"value\": %.5g, \"unit\": \"%s\", \"floor_ms\": %.5g, \"peer\": %g, \"goal\": %g}",
                 i ? "," : "", m.name.c_str(), m.milliseconds, m.value, m.unit.c_str(), m.floor, m.peer, m.goal);
  }
  std::fprintf(f, "\n]}\n");
  std::fclose(f);
}

}  // namespace dsa::bench
