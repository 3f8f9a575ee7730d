// What one row needs beside the tiles of its mass: the log-sum-exp of its scores, the edge of its selection, the sum of its
// tiles' partial sums; the loss from a mass in memory; the list of tiles. See params.h.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/indexer_kl/sm90_kl.cuh"

namespace dsa {
namespace indexer_kl_sm90 {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr float kInfinity = __builtin_huge_valf();

// Log-sum-exp in parts: the sum of exp(x - most).
struct Exponentials {
  float most, sum;
  __device__ __forceinline__ void add(const Exponentials& b) {
    const float m = fmaxf(most, b.most);
    if (m == -kInfinity) return;
    sum = sum * exp2_approx((most - m) * kLog2e) + b.sum * exp2_approx((b.most - m) * kLog2e);
    most = m;
  }
};

// The least score of those given and, among equals, the greatest index.
struct Edge {
  float score;
  int index;
  __device__ __forceinline__ void add(const Edge& b) {
    if (b.score < score || (b.score == score && b.index > index)) *this = b;
  }
};

__global__ void __launch_bounds__(kRowThreads) score_rows(const AttentionMassParams p, const DenseKlRows rows, RowScores* out) {
  __shared__ Exponentials parts[kRowWarps];
  __shared__ Edge edges[kRowWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t t = blockIdx.x; t < p.queries; t += gridDim.x) {
    const Range range = row_range(p.start, p.end, t, p.queries, static_cast<int>(p.keys));
    const float* logits = rows.logits + t * rows.logits_stride;
    Exponentials own{-kInfinity, 0.f};
    constexpr int kWords = 4;  // of 16 bytes, in flight
    for (int first = (range.begin & ~3) + 4 * threadIdx.x; first < range.end; first += 4 * kWords * kRowThreads) {
      float4 x[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int s = first + 4 * kRowThreads * i;
        x[i] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        if (s >= range.begin && s + 4 <= range.end) {
          x[i] = __ldg(reinterpret_cast<const float4*>(logits + s));
        } else {
          if (s >= range.begin && s < range.end) x[i].x = logits[s];
          if (s + 1 >= range.begin && s + 1 < range.end) x[i].y = logits[s + 1];
          if (s + 2 >= range.begin && s + 2 < range.end) x[i].z = logits[s + 2];
          if (s + 3 >= range.begin && s + 3 < range.end) x[i].w = logits[s + 3];
        }
      }
      float most = own.most;
#pragma unroll
      for (int i = 0; i < kWords; ++i) most = fmaxf(most, fmaxf(fmaxf(x[i].x, x[i].y), fmaxf(x[i].z, x[i].w)));
      if (most == -kInfinity) continue;
      float sum = own.sum * exp2_approx((own.most - most) * kLog2e);
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        sum += (exp2_approx((x[i].x - most) * kLog2e) + exp2_approx((x[i].y - most) * kLog2e)) +
               (exp2_approx((x[i].z - most) * kLog2e) + exp2_approx((x[i].w - most) * kLog2e));
      own = {most, sum};
    }
    Edge edge{kInfinity, -1};
    if (rows.selected) {
      const int n = rows.selected_lengths[t];
      for (int i = threadIdx.x; i < n; i += kRowThreads) {
        const int s = rows.selected[t * rows.selected_stride + i];
        if (s >= range.begin && s < range.end) edge.add({logits[s], s});
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      own.add({__shfl_xor_sync(~0u, own.most, d), __shfl_xor_sync(~0u, own.sum, d)});
      edge.add({__shfl_xor_sync(~0u, edge.score, d), __shfl_xor_sync(~0u, edge.index, d)});
    }
    if (lane == 0) parts[warp] = own, edges[warp] = edge;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kRowWarps; ++i) own.add(parts[i]), edge.add(edges[i]);
      out[t] = {own.most + logf(own.sum), edge.score, edge.index, 0};
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void write_row(const DenseKlRows& rows, int64_t t, double kl, double target, double prediction, double recall) {
  if (rows.kl) rows.kl[t] = static_cast<float>(kl);
  if (rows.entropy_target) rows.entropy_target[t] = static_cast<float>(target);
  if (rows.entropy_prediction) rows.entropy_prediction[t] = static_cast<float>(prediction);
  if (rows.recall) rows.recall[t] = static_cast<float>(recall);
}

// One warp a row.
__global__ void sum_rows(const AttentionMassParams p, const DenseKlRows rows, const Sums* partial_sums, int64_t key_tiles) {
  const int lane = threadIdx.x % 32;
  const int64_t t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (t >= p.queries) return;
  const Range range = row_range(p.start, p.end, t, p.queries, static_cast<int>(p.keys));
  const int first = range.begin / kTileKeys, end = (range.end + kTileKeys - 1) / kTileKeys;
  double kl = 0, target = 0, prediction = 0, recall = 0;
  for (int i = first + lane; i < end; i += 32) {
    const float4 x = __ldcs(reinterpret_cast<const float4*>(partial_sums + t * key_tiles + i));
    kl += x.x, target += x.y, prediction += x.z, recall += x.w;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    kl += __shfl_xor_sync(~0u, kl, d), target += __shfl_xor_sync(~0u, target, d);
    prediction += __shfl_xor_sync(~0u, prediction, d), recall += __shfl_xor_sync(~0u, recall, d);
  }
  if (lane == 0) write_row(rows, t, kl, target, prediction, recall);
}

__global__ void __launch_bounds__(kRowThreads)
    kl_of_mass(const AttentionMassParams p, const DenseKlRows rows, const RowScores* scores, const float* mass, int64_t mass_stride) {
  __shared__ double parts[kRowWarps][4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float inverse_heads = 1.f / rows.all_heads;
  for (int64_t t = blockIdx.x; t < p.queries; t += gridDim.x) {
    const Range range = row_range(p.start, p.end, t, p.queries, static_cast<int>(p.keys));
    const Row row(scores, rows.row_weight, rows.loss_scale, range, t);
    const float *logits = rows.logits + t * rows.logits_stride, *of_row = mass + t * mass_stride;
    float* dI = rows.dI ? rows.dI + t * rows.dI_stride : nullptr;
    double total[4] = {};
    for (int s = (range.begin & ~1) + 2 * threadIdx.x; s < range.end; s += 2 * kRowThreads) {
      const float2 x = __ldcs(reinterpret_cast<const float2*>(logits + s)), m = __ldcs(reinterpret_cast<const float2*>(of_row + s));
      Sums sums{};
      const float d0 = row.add(m.x * inverse_heads, x.x, s, sums), d1 = row.add(m.y * inverse_heads, x.y, s + 1, sums);
      if (dI) *reinterpret_cast<float2*>(dI + s) = make_float2(d0, d1);
      total[0] += sums.kl, total[1] += sums.target, total[2] += sums.prediction, total[3] += sums.recall;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) total[j] += __shfl_xor_sync(~0u, total[j], d);
      if (lane == 0) parts[warp][j] = total[j];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kRowWarps; ++i)
        for (int j = 0; j < 4; ++j) total[j] += parts[i][j];
      write_row(rows, t, total[0], total[1], total[2], total[3]);
    }
    __syncthreads();
  }
}

// One block. Tiles of kListRows blocks of rows at a time, key by key: clusters that run together share queries and keys.
constexpr int kListThreads = 1024, kListRows = 8;

__global__ void __launch_bounds__(kListThreads) list_tiles(const AttentionMassParams p, int* count, Tile* tiles, int* pace) {
  __shared__ Range ranges[kListRows];
  __shared__ int sums[kListThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, keys = static_cast<int>(p.keys);
  const int64_t blocks = (p.queries + kClusterRows - 1) / kClusterRows;
  if (threadIdx.x < cuda::Pace::kCounters) pace[threadIdx.x] = 0;
  int done = 0;
  for (int64_t first = 0; first < blocks; first += kListRows) {
    __syncthreads();
    if (warp < kListRows) {  // the tiles that some row of the block wants
      Range all{keys, 0};
      for (int i = lane; i < kClusterRows; i += 32) {
        const Range r = row_range(p.start, p.end, (first + warp) * kClusterRows + i, p.queries, keys);
        if (r.begin < r.end) all = {min(all.begin, r.begin), max(all.end, r.end)};
      }
      all = {__reduce_min_sync(~0u, all.begin), __reduce_max_sync(~0u, all.end)};
      if (lane == 0) ranges[warp] = all.begin < all.end ? Range{all.begin / kTileKeys, (all.end + kTileKeys - 1) / kTileKeys} : Range{0, 0};
    }
    __syncthreads();
    Range all{keys, 0};
    for (int i = 0; i < kListRows; ++i)
      if (ranges[i].begin < ranges[i].end) all = {min(all.begin, ranges[i].begin), max(all.end, ranges[i].end)};
    for (int from = all.begin; from < all.end; from += kListThreads) {
      const int y = from + threadIdx.x;
      const auto wanted = [&](int i) { return y >= ranges[i].begin && y < ranges[i].end; };
      int own = 0;
      for (int i = 0; i < kListRows; ++i) own += wanted(i);
      int upto = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += other;
      }
      if (lane == 31) sums[warp] = upto;
      __syncthreads();
      int at = done + upto - own;
      for (int i = 0; i < kListThreads / 32; ++i) {
        if (i < warp) at += sums[i];
        done += sums[i];
      }
      for (int i = 0; i < kListRows; ++i)
        if (wanted(i)) tiles[at++] = {static_cast<int>(first) + i, y};
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) *count = done;
}

static unsigned row_grid(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, 65536)); }

void launch_row_scores(const AttentionMassParams& p, const DenseKlRows& rows, const Workspace& w) {
  score_rows<<<row_grid(p.queries), kRowThreads, 0, p.stream>>>(p, rows, w.scores);
  cuda::check(cudaGetLastError(), "launch the log-sum-exp of the scores");
}

void launch_row_sums(const AttentionMassParams& p, const DenseKlRows& rows, const Workspace& w) {
  sum_rows<<<static_cast<unsigned>((p.queries + 7) / 8), 256, 0, p.stream>>>(p, rows, w.partial_sums, w.key_tiles);
  cuda::check(cudaGetLastError(), "launch the sums of the loss");
}

void launch_tile_list(const AttentionMassParams& p, const Workspace& w) {
  list_tiles<<<1, kListThreads, 0, p.stream>>>(p, w.tile_count, w.tiles, w.pace);
  cuda::check(cudaGetLastError(), "launch the list of tiles");
}

void check_rows(const AttentionMassParams& p, const DenseKlRows& r) {
  const auto refuse = [](const char* why, const char* hint) {
    throw std::runtime_error(std::string("cannot compute the indexer's loss on Hopper (") + why + ") " + hint);
  };
  if (r.all_heads < 1) refuse("all_heads is below 1", "pass the number of heads that the mass sums over");
  if (reinterpret_cast<uintptr_t>(r.logits) % 16 || r.logits_stride % 4)
    refuse("the logits are not 16-byte aligned or their stride is not a multiple of 4", "pad the rows");
  if (reinterpret_cast<uintptr_t>(r.dI) % 8 || r.dI_stride % 2 || (r.dI && r.dI_stride < p.keys))
    refuse("dI is not 8-byte aligned or its stride is odd or less than the keys", "pad the rows");
}

void check_workspace(const AttentionMassParams& p) {
  const char* const hint = "pass what dense_kl_workspace_bytes names";
  if (p.workspace_bytes < dense_kl_workspace_bytes(p.queries, p.keys))
    throw std::runtime_error(std::string("cannot compute the indexer's loss on Hopper (the workspace is too small) ") + hint);
  if (reinterpret_cast<uintptr_t>(p.workspace) % 256)
    throw std::runtime_error(std::string("cannot compute the indexer's loss on Hopper (the workspace is not 256-byte aligned) ") + hint);
}

}  // namespace indexer_kl_sm90

size_t dense_kl_workspace_bytes(int64_t queries, int64_t keys) { return indexer_kl_sm90::Workspace(nullptr, queries, keys).bytes; }

void launch_dense_kl_of_mass_sm90(const AttentionMassParams& p, const float* mass, int64_t mass_stride, const DenseKlRows& rows) {
  using namespace indexer_kl_sm90;
  check_workspace(p);
  check_rows(p, rows);
  if (p.queries == 0) return;
  const Workspace w(p.workspace, p.queries, p.keys);
  launch_row_scores(p, rows, w);
  kl_of_mass<<<row_grid(p.queries), kRowThreads, 0, p.stream>>>(p, rows, w.scores, mass, mass_stride);
  cuda::check(cudaGetLastError(), "launch the loss of a mass");
}

}  // namespace dsa
