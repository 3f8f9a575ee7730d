// The k best scores of rows of at most kNarrow columns (an MoE router's), a warp a row; see params.h for the order.
//
// A lane holds columns lane + 32 i as keys, unsigned numbers of the scores' order, 0 for what is never selected. The edge,
// the greatest key that at least k others reach or pass, comes bit by bit from the top; as soon as exactly k keys reach
// it nothing is left to decide. Of keys equal to the edge those of lowest index are taken.
#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/topk_select/sm90_key.cuh"
#include "kernels/topk_select/sm90_narrow.h"

namespace dsa::topk_select_sm90 {
namespace {

constexpr int kWarps = 8;
constexpr uint32_t kAllLanes = ~0u;

template <int kEach>  // scores a lane holds
__global__ void __launch_bounds__(32 * kWarps) select_narrow(const TopKSelectParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (t >= p.rows) return;
  const int columns = static_cast<int>(p.columns);
  const int begin = p.start ? max(p.start[t], 0) : 0, end = p.end ? min(p.end[t], columns) : columns;
  const float* row = p.logits + t * p.logits_stride;
  uint32_t key[kEach];
  int nans = 0, selectable = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int column = 32 * i + lane;
    const float x = begin <= column && column < end ? __ldg(row + column) : -INFINITY;
    key[i] = x > -INFINITY ? key_of(x) : 0;
    nans += __popc(__ballot_sync(kAllLanes, x != x));
    selectable += __popc(__ballot_sync(kAllLanes, key[i] != 0));
  }
  const auto count = [&](auto holds) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) n += __popc(__ballot_sync(kAllLanes, holds(key[i])));
    return n;
  };
  const int wanted = min(p.k, selectable);
  uint32_t edge = 1;  // keys that reach it are taken, all of them or the first `ties` of those equal to it
  int reach = selectable;
  if (selectable > wanted) {
    edge = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      const uint32_t higher = edge | bit;
      const int n = count([&](uint32_t k) { return k >= higher; });
      if (n < wanted) continue;
      edge = higher, reach = n;
      if (n == wanted) break;
    }
  }
  int ties = count([&](uint32_t k) { return k == edge; }) - (reach - wanted);
  int done = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t before = (1u << lane) - 1, equal = __ballot_sync(kAllLanes, key[i] == edge);
    const bool takes = key[i] > edge || (key[i] == edge && __popc(equal & before) < ties);
    const uint32_t taken = __ballot_sync(kAllLanes, takes);
    if (takes) {
      const int place = done + __popc(taken & before), column = 32 * i + lane;
      p.indices[t * p.indices_stride + place] = column;
      if (p.scores) p.scores[t * p.scores_stride + place] = __ldg(row + column);
    }
    ties -= __popc(equal), done += __popc(taken);
  }
  for (int i = done + lane; i < p.k; i += 32) p.indices[t * p.indices_stride + i] = -1;
  if (lane == 0) {
    p.lengths[t] = done;
    if (p.nan_counts) p.nan_counts[t] = nans;
  }
}

template <int kEach>
void launch(const TopKSelectParams& p) {
  select_narrow<kEach><<<static_cast<unsigned>((p.rows + kWarps - 1) / kWarps), 32 * kWarps, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "launch topk_select of narrow rows");
}

}  // namespace

void launch_narrow(const TopKSelectParams& p) {
  if (p.columns <= 32) launch<1>(p);
  else if (p.columns <= 256) launch<8>(p);
  else launch<kNarrow / 32>(p);
}

}  // namespace dsa::topk_select_sm90
