// Backward of sparse attention in latent form on Hopper: chunks of rows through the two kernels, delta, and the end of
// the sums.
//
// The kernel of the queries waits for gathered keys and the tensor cores, the kernel of the keys for the caches that
// add up its contributions: they run side by side, each on multiprocessors of its own, the second one chunk behind the
// first.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/packed_sums.cuh"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_maps.h"
#include "kernels/sparse_mla/sm90_sum_layout.cuh"

namespace dsa {
namespace sparse_mla_sm90 {
namespace {

// One warp a (query, head): 16 columns a lane.
__global__ void row_products(const __nv_bfloat16* o, const __nv_bfloat16* d_o, int64_t d_o_stride, int heads,
                             int64_t rows, float* delta) {
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const auto* x = reinterpret_cast<const uint4*>(o + row * 512);
  const auto* y = reinterpret_cast<const uint4*>(d_o + row / heads * d_o_stride + row % heads * 512);
  float sum = 0;
  for (int i = lane; i < 64; i += 32) {
    const uint4 a = x[i], b = y[i];
    const auto* u = reinterpret_cast<const __nv_bfloat162*>(&a);
    const auto* v = reinterpret_cast<const __nv_bfloat162*>(&b);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 p = __bfloat1622float2(u[j]), q = __bfloat1622float2(v[j]);
      sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
    }
  }
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  if (lane == 0) delta[row] = sum;
}

// Queries of a CTA.
int group_of(const SparseMlaParams& p) { return kHeadBlock >> row_shift(p.heads); }

// Whether contributions may go by way of the workspace.
bool may_go_by_key(const SparseMlaBackwardParams& p) { return p.keys > p.cached_keys; }

// Whether it matters how many keys the lists name.
bool counts_named(const SparseMlaBackwardParams& p) { return p.keys > std::min(p.cached_keys, kHalvesFrom); }

// Whether pairs of groups may go through the kernel of the keys together.
bool may_pair(const SparseMlaParams& p) { return p.heads <= kHeadBlock; }

// Chunks are multiples of this many groups, so that what is paired does not depend on them.
int64_t at_once(const SparseMlaParams& p) { return may_pair(p) ? 2 : 1; }

// How a workspace for `lists` CTAs' worth of queries at a time is divided.
struct Workspace {
  struct Half {
    char* weights;
    Union lists, pairs;
  } half[2];
  __nv_bfloat16* contributions = nullptr;
  Mentions mentions;
  int64_t bytes = 0;

  Workspace(const SparseMlaBackwardParams& p, int64_t lists, void* base) {
    // lists: a multiple of at_once.
    const int64_t group = group_of(p), entries = lists * group * p.k, words = (p.keys + 31) / 32;
    const auto take = [&](auto*& pointer, int64_t size) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(base) + bytes);
      bytes += (size + 255) / 256 * 256;
    };
    for (Half& h : half) {
      take(h.weights, entries / kTile * ((p.heads + kHeadBlock - 1) / kHeadBlock) * kWeightBytes);
      const auto take_union = [&](Union& of, int64_t size, int64_t k, int64_t count) {
        of.group = static_cast<int>(size), of.k = static_cast<int>(k);
        take(of.keys, entries * 4);
        take(of.places, entries * size * 2);
        take(of.lengths, count * 4);
      };
      if (group > 1) take_union(h.lists, group, p.k, lists);
      if (may_pair(p)) take_union(h.pairs, 2, group * p.k, lists / 2);
    }
    if (!counts_named(p)) return;
    take(mentions.marks, words * 4);
    take(mentions.named, 4);
    if (!may_go_by_key(p)) return;
    take(contributions, entries * kDim * 2);
    mentions.stride = static_cast<int>(lists);
    take(mentions.bits, words * lists * 4);
    take(mentions.places, words * lists * 2);
    take(mentions.searched, lists);
  }
};

// The most lists at a time that the workspace has room for.
int64_t most_lists(const SparseMlaBackwardParams& p) {
  int64_t fit = 0;
  for (int64_t step = kMostLists; step >= at_once(p); step /= 2)
    if (fit + step <= kMostLists && Workspace(p, fit + step, nullptr).bytes <= static_cast<int64_t>(p.workspace_bytes))
      fit += step;
  return fit;
}

// Whether either kernel takes all multiprocessors, one after the other. A chunk of few heads is few long items: on a
// share of the multiprocessors the last of them would leave many idle.
bool in_turn(const SparseMlaParams& p) { return group_of(p) > 2; }

// Multiprocessors, of 132, for the kernel of the keys while both run; measured. Its work depends less on the heads.
int key_share(const SparseMlaParams& p) { return may_pair(p) ? 68 : 54; }

// Streams beside the caller's and the events between them, for the time of one launch. Lists are united on a stream of
// their own: wherever the other kernels leave multiprocessors idle.
struct SideStreams {
  cudaStream_t keys = nullptr, lists = nullptr;
  cudaEvent_t begun = nullptr, listed = nullptr, ready = nullptr, end = nullptr;
  cudaEvent_t used[2] = {};  // the halves of the workspace

  SideStreams() {
    for (cudaStream_t* s : {&keys, &lists})
      cuda::check(cudaStreamCreateWithFlags(s, cudaStreamNonBlocking), "create a stream");
    for (cudaEvent_t* e : {&begun, &listed, &ready, &end, &used[0], &used[1]})
      cuda::check(cudaEventCreateWithFlags(e, cudaEventDisableTiming), "create an event");
  }
  ~SideStreams() {  // CUDA frees them once the enqueued work is done
    for (cudaEvent_t e : {begun, listed, ready, end, used[0], used[1]}) cudaEventDestroy(e);
    for (cudaStream_t s : {keys, lists}) cudaStreamDestroy(s);
  }
};

void record(cudaEvent_t event, cudaStream_t stream) { cuda::check(cudaEventRecord(event, stream), "record an event"); }
void wait(cudaStream_t stream, cudaEvent_t event) {
  cuda::check(cudaStreamWaitEvent(stream, event, 0), "wait for an event");
}

}  // namespace
}  // namespace sparse_mla_sm90

size_t sparse_mla_workspace_bytes(const SparseMlaBackwardParams& p, int64_t rows) {
  using namespace sparse_mla_sm90;
  const int64_t multiple = at_once(p), unit = group_of(p) * multiple;
  return static_cast<size_t>(Workspace(p, (rows + unit - 1) / unit * multiple, nullptr).bytes);
}

int64_t sparse_mla_sum_bytes(int64_t keys) { return cuda::packed_sums_bytes<sparse_mla_sm90::SumLayout>(keys); }

void launch_sparse_mla_delta_sm90(const SparseMlaBackwardParams& p, const void* o, float* delta) {
  const int64_t rows = p.queries * p.heads;
  if (rows == 0) return;
  sparse_mla_sm90::row_products<<<static_cast<unsigned>((rows + 7) / 8), 256, 0, p.stream>>>(
      static_cast<const __nv_bfloat16*>(o), static_cast<const __nv_bfloat16*>(p.d_o), p.d_o_stride, p.heads, rows,
      delta);
  cuda::check(cudaGetLastError(), "launch sparse_mla delta");
}

void launch_sparse_mla_finish_sm90(const uint64_t* dkv_sum, int64_t keys, float quantum, void* dkv, bool bf16,
                                   QuantumReport* report, cudaStream_t stream) {
  cuda::launch_finish_packed_sums<sparse_mla_sm90::SumLayout>(dkv_sum, keys, quantum, dkv, bf16, report, stream);
}

void launch_sparse_mla_backward_sm90(const SparseMlaBackwardParams& p) {
  using namespace sparse_mla_sm90;
  require_supported(p, "sparse_mla backward");
  if (p.d_o_stride % 8 || reinterpret_cast<uintptr_t>(p.d_o) % 16 || reinterpret_cast<uintptr_t>(p.dkv_sum) % 128 ||
      reinterpret_cast<uintptr_t>(p.dq) % 16 || reinterpret_cast<uintptr_t>(p.workspace) % 16)
    throw std::runtime_error(
        "cannot run sparse_mla backward for Hopper (d_o, dq or the workspace is not 16-byte aligned, or dkv_sum not "
        "128-byte) choose another implementation");
  int exponent;
  if (!(p.quantum > 0) || std::frexp(p.quantum, &exponent) != 0.5f)
    throw std::runtime_error(
        "cannot run sparse_mla backward (the quantum is no power of two) take it from QuantumGuess");
  if (p.queries == 0) return;
  const int64_t group = group_of(p), lists = most_lists(p), rows = lists * group;
  if (rows < 1)
    throw std::runtime_error("cannot run sparse_mla backward (the workspace of " + std::to_string(p.workspace_bytes) +
                             " bytes is too small) give at least sparse_mla_workspace_bytes(p, 1)");
  const uint32_t query_rows = 1u << row_shift(p.heads);
  const auto map = [&](const void* base, int64_t stride, int columns, uint32_t box_rows) {
    return cuda::make_tensor_map(base, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                        {uint64_t(columns), uint64_t(p.heads), uint64_t(p.queries)},
                                        {uint64_t(columns) * 2, uint64_t(stride) * 2},
                                        {64, std::min(query_rows, box_rows), std::max(box_rows / query_rows, 1u)}});
  };
  const CUtensorMap query_q = map(p.q, p.q_stride, 576, 32), query_g = map(p.d_o, p.d_o_stride, 512, 32);
  const CUtensorMap key_q = map(p.q, p.q_stride, 576, 64), key_g = map(p.d_o, p.d_o_stride, 512, 64);
  cuda::check(cudaMemsetAsync(p.p_sel, 0, sizeof(float) * p.queries * p.k, p.stream), "clear p_sel");
  const SideStreams side;
  const Workspace workspace(p, lists, p.workspace);
  if (counts_named(p)) launch_count_named(p, workspace.mentions);
  record(side.begun, p.stream);
  wait(side.lists, side.begun);
  const int all = cuda::multiprocessors(), for_keys = in_turn(p) ? all : all * key_share(p) / 132,
            for_queries = in_turn(p) ? all : all - for_keys;
  const int64_t chunks = (p.queries + rows - 1) / rows;
  for (int64_t i = 0; i < chunks; ++i) {
    const Workspace::Half& half = workspace.half[i % 2];
    Chunk chunk{i * rows, std::min(rows, p.queries - i * rows), half.weights, i == 0 ? all : for_queries, half.lists,
                half.pairs, workspace.contributions, workspace.mentions};
    if (i >= 2) wait(side.lists, side.used[i % 2]);
    if (group > 1) launch_unite(p, chunk, side.lists);
    if (may_pair(p)) launch_pair(p, chunk, side.lists);
    record(side.listed, side.lists);
    wait(p.stream, side.listed);
    wait(side.keys, side.listed);
    if (may_go_by_key(p)) launch_mentions(p, chunk, side.keys);
    launch_queries(p, query_q, query_g, chunk, p.stream);
    record(side.ready, p.stream);
    wait(side.keys, side.ready);
    chunk.multiprocessors = i + 1 == chunks ? all : for_keys;
    launch_keys(p, key_q, key_g, chunk, side.keys);
    if (may_go_by_key(p)) launch_sums(p, chunk, side.keys);
    record(side.used[i % 2], side.keys);
  }
  record(side.end, side.keys);
  wait(p.stream, side.end);
}

}  // namespace dsa
