// The attention's mass over all heads, tile by tile, and the loss on it, on Hopper's tensor cores; see params.h.
//
//   mass[t,s] = sum_h exp2(scale log2(e) S_h[t,s] - log2(e) lse[t,h])      S_h = Q_h [K_h ; K_rope]^T
//
// A block of threads owns 128 rows x 256 keys and walks the heads; the mass stays in the registers of two math warpgroups
// of 64 rows each (128 fp32 a thread). They take turns: while the tensor core multiplies for one (64 x 128, one half of
// the keys), the other exponentiates. Two blocks of a cluster hold neighbouring rows of the same keys: each copies one
// half of a head's keys to both. The rope part of the keys is one for all heads and is loaded once a tile.
#include <cuda.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/pace.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/indexer_kl/sm90_kl.cuh"

namespace dsa {
namespace indexer_kl_sm90 {

constexpr int kHeadDim = 192, kOwnDim = 128;
constexpr int kPanelRowBytes = 128;                          // 64 columns
constexpr int kQueryPanel = kTileRows * kPanelRowBytes;      // three of them
constexpr int kKeyPanel = kTileKeys / 2 * kPanelRowBytes;    // half of the tile's keys
constexpr int kQueryBytes = 3 * kQueryPanel, kKeyBytes = 2 * kKeyPanel, kRopeBytes = 2 * kKeyPanel;
constexpr int kQueryStages = 2, kKeyStages = 3;
constexpr int kThreads = 384;
constexpr uint16_t kAllBlocks = (1 << kRowShare) - 1;

struct Arguments {
  int64_t queries;
  int keys, heads;
  float scale_log2;
  const float* lse;
  int64_t lse_stride, lse_head_stride;
  const int32_t *start, *end;
  const int* tile_count;
  const Tile* tiles;
  int* pace;
  // the loss
  float inverse_heads, loss_scale;
  const float* logits;
  int64_t logits_stride;
  const RowScores* scores;
  const float* row_weight;
  Sums* partial_sums;
  int64_t key_tiles;
  float* dI;
  int64_t dI_stride;
  // or the mass alone
  float* mass;
  int64_t mass_stride;
};

struct Shared {
  alignas(1024) char q[kQueryStages][kQueryBytes];
  alignas(1024) char k[kKeyStages][kKeyBytes];
  alignas(1024) char rope[kRopeBytes];
  uint64_t q_full[kQueryStages], q_empty[kQueryStages], k_full[kKeyStages], k_empty[kKeyStages], rope_full, rope_empty;
};

__device__ __forceinline__ int cluster_index() { return blockIdx.x / kRowShare; }
__device__ __forceinline__ int clusters() { return gridDim.x / kRowShare; }

// Clusters that run together read the same queries and keys: as long as they keep pace, all but the first find them in the
// L2 cache.
constexpr int kPaceHeads = 4;  // of a step

// One thread fills the rings.
template <bool kLoss>
__device__ void copy_tiles(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_rope, const Arguments& a, Shared& s) {
  const int rank = cuda::cluster_rank(), count = *a.tile_count;
  constexpr int kKeyShare = kTileKeys / 2 / kRowShare;  // keys of a half that this block copies
  cuda::Stage<kQueryStages> q;
  cuda::Stage<kKeyStages> k;
  uint32_t rope_phase = 1;
  cuda::Pace pace{a.pace};
  const int together = count / clusters() * clusters();  // tiles of rounds in which every cluster has one
  for (int i = cluster_index(); i < count; i += clusters()) {
    const Tile tile = a.tiles[i];
    const int row = tile.x * kClusterRows + rank * kTileRows, key = tile.y * kTileKeys;
    cuda::mbarrier_wait(&s.rope_empty, rope_phase);
    rope_phase ^= 1;
    cuda::mbarrier_arrive_expect(&s.rope_full, kRopeBytes);
    for (int half = 0; half < 2; ++half)
      cuda::tma_load_2d(s.rope + half * kKeyPanel + rank * kKeyShare * kPanelRowBytes, map_rope, &s.rope_full, 0,
                        key + half * (kTileKeys / 2) + rank * kKeyShare, kAllBlocks);
    for (int h = 0; h < a.heads; ++h) {
      if (rank == 0 && h % kPaceHeads == 0 && i < together) pace.begin_step(clusters());
      cuda::mbarrier_wait(&s.q_empty[q.index], q.parity ^ 1);
      cuda::mbarrier_arrive_expect(&s.q_full[q.index], kQueryBytes);
      for (int panel = 0; panel < 3; ++panel)
        cuda::tma_load_3d(s.q[q.index] + panel * kQueryPanel, map_q, &s.q_full[q.index], panel * 64, h, row);
      q.next();
      for (int half = 0; half < 2; ++half) {
        cuda::mbarrier_wait(&s.k_empty[k.index], k.parity ^ 1);
        cuda::mbarrier_arrive_expect(&s.k_full[k.index], kKeyBytes);
        for (int panel = 0; panel < 2; ++panel)
          cuda::tma_load_3d(s.k[k.index] + panel * kKeyPanel + rank * kKeyShare * kPanelRowBytes, map_k, &s.k_full[k.index],
                            panel * 64, h, key + half * (kTileKeys / 2) + rank * kKeyShare, kAllBlocks);
        k.next();
      }
      if constexpr (kLoss) {  // the scores of some rows of the tile, which the last head's step will read
        for (int r = h * kTileRows / a.heads; r < (h + 1) * kTileRows / a.heads && row + r < a.queries; ++r) {
          const int bytes = min(a.keys - key, kTileKeys) * 4 & ~15;
          if (bytes > 0)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.logits + (row + r) * a.logits_stride + key), "r"(bytes));
        }
      }
    }
  }
}

__device__ __forceinline__ void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void turn_pass(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group ^ 1)) : "memory"); }

// s = Q_h [K_h ; K_rope]^T for 64 rows and 128 keys, while it is this group's turn. The other's begins when all but the
// last kQueued instructions are done, so that the tensor core does not run dry.
constexpr int kQueued = 2;

__device__ __forceinline__ void multiply(float (&s)[64], uint32_t q, uint32_t k, uint32_t rope, int group) {
  turn_wait(group);
  cuda::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 12; ++i) {
    const uint32_t a = q + i / 4 * (kQueryPanel / 16) + i % 4 * 2;
    const uint32_t b = i < 8 ? k + i / 4 * (kKeyPanel / 16) + i % 4 * 2 : rope + i % 4 * 2;
    if (i == 0) cuda::wgmma_bf16_first(s, a, b);
    else cuda::wgmma_bf16(s, a, b);
    if (i == 11 - kQueued) cuda::wgmma_commit();
  }
  cuda::wgmma_commit();
  cuda::wgmma_wait<1>();
  turn_pass(group);
}

// The tile of 64 rows x 256 keys is complete: accumulator [half][4b + 2r + e] is row 8r + lane/4, key
// 128 half + 8b + 2(lane%4) + e.
template <bool kLoss>
__device__ __forceinline__ void finish(const float (&mass)[2][64], const Arguments& a, int64_t first_row, int first_key, int key_tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t t = first_row + 8 * r;
    const Range range = row_range(a.start, a.end, t, a.queries, a.keys);
    if constexpr (kLoss) {
      const Row row(a.scores, a.row_weight, a.loss_scale, range, t);
      const bool any = t < a.queries;
      Sums sums{};
      const float* logits = a.logits + t * a.logits_stride + first_key;
      float* dI = a.dI ? a.dI + t * a.dI_stride + first_key : nullptr;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b0 = 0; b0 < 16; b0 += 8) {
          float2 score[8];
#pragma unroll
          for (int b = 0; b < 8; ++b) {
            const int c = 128 * half + 8 * (b0 + b);
            score[b] = any && first_key + c < a.keys ? __ldcs(reinterpret_cast<const float2*>(logits + c)) : float2{0, 0};
          }
#pragma unroll
          for (int b = 0; b < 8; ++b) {
            const int c = 128 * half + 8 * (b0 + b), at = 4 * (b0 + b) + 2 * r, key = first_key + c;
            const float d0 = row.add(mass[half][at] * a.inverse_heads, score[b].x, key, sums);
            const float d1 = row.add(mass[half][at + 1] * a.inverse_heads, score[b].y, key + 1, sums);
            if (any && dI && key < a.keys) *reinterpret_cast<float2*>(dI + c) = make_float2(d0, d1);
          }
        }
#pragma unroll
      for (int d = 1; d < 4; d *= 2) {
        sums.kl += __shfl_xor_sync(~0u, sums.kl, d);
        sums.target += __shfl_xor_sync(~0u, sums.target, d);
        sums.prediction += __shfl_xor_sync(~0u, sums.prediction, d);
        sums.recall += __shfl_xor_sync(~0u, sums.recall, d);
      }
      if (any && lane % 4 == 0)
        *reinterpret_cast<float4*>(a.partial_sums + t * a.key_tiles + key_tile) = {sums.kl, sums.target, sums.prediction, sums.recall};
    } else {
      float* out = a.mass + t * a.mass_stride + first_key;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b = 0; b < 16; ++b) {
          const int c = 128 * half + 8 * b, at = 4 * b + 2 * r, key = first_key + c;
          if (key >= range.begin && key < range.end) __stcs(out + c, mass[half][at]);
          if (key + 1 >= range.begin && key + 1 < range.end) __stcs(out + c + 1, mass[half][at + 1]);
        }
    }
  }
}

template <bool kLoss>
__device__ void sum_heads(const Arguments& a, Shared& s) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int rank = cuda::cluster_rank(), count = *a.tile_count;
  const uint32_t q_operand = cuda::keep(cuda::wgmma_operand(s.q[0] + group * 64 * kPanelRowBytes));
  const uint32_t k_operand = cuda::keep(cuda::wgmma_operand(s.k[0])), rope = cuda::keep(cuda::wgmma_operand(s.rope));
  const uint32_t barriers = cuda::keep(cuda::shared_address(s.q_full));
  const auto address = [&](const uint64_t* b) { return barriers + static_cast<uint32_t>(reinterpret_cast<const char*>(b) - reinterpret_cast<const char*>(s.q_full)); };
  const uint32_t q_full = address(s.q_full), q_empty = address(s.q_empty), k_full = address(s.k_full), k_empty = address(s.k_empty);
  cuda::Stage<kQueryStages> q;
  cuda::Stage<kKeyStages> k;
  uint32_t rope_phase = 0;
  if (group == 1) turn_pass(group);
  for (int i = cluster_index(); i < count; i += clusters()) {
    const Tile tile = a.tiles[i];
    const int64_t row = int64_t{tile.x} * kClusterRows + rank * kTileRows + group * 64 + warp * 16 + lane / 4;
    const float* lse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) lse[r] = a.lse + min(row + 8 * r, a.queries - 1) * a.lse_stride;
    float mass[2][64], bias[2] = {__ldg(lse[0]), __ldg(lse[1])};
#pragma unroll
    for (int j = 0; j < 64; ++j) mass[0][j] = mass[1][j] = 0.f;
    cuda::mbarrier_wait(&s.rope_full, rope_phase);
    rope_phase ^= 1;
    for (int h = 0; h < a.heads; ++h) {
      bias[0] *= -kLog2e, bias[1] *= -kLog2e;
      float next[2];
      cuda::mbarrier_wait(q_full + q.index * 8, q.parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float scores[64];
        cuda::mbarrier_wait(k_full + k.index * 8, k.parity);
        multiply(scores, q_operand + q.index * (kQueryBytes / 16), k_operand + k.index * (kKeyBytes / 16), rope + half * (kKeyPanel / 16), group);
        if (half == 1) {
          const int64_t other = min(h + 1, a.heads - 1) * a.lse_head_stride;
          next[0] = __ldg(lse[0] + other), next[1] = __ldg(lse[1] + other);
        }
        cuda::wgmma_wait<0>();
        if (lane < kRowShare) cuda::mbarrier_arrive_at(k_empty + k.index * 8, lane);
        if (half == 1) {
          if (lane == 0) cuda::mbarrier_arrive(q_empty + q.index * 8);
          if (h == a.heads - 1 && lane < kRowShare) cuda::mbarrier_arrive_at(address(&s.rope_empty), lane);
        }
        k.next();
        cuda::wgmma_settle(scores);
#pragma unroll
        for (int j = 0; j < 64; ++j) mass[half][j] += exp2_approx(fmaf(scores[j], a.scale_log2, bias[j / 2 % 2]));
      }
      q.next();
      bias[0] = next[0], bias[1] = next[1];
    }
    finish<kLoss>(mass, a, row, tile.y * kTileKeys + 2 * (lane % 4), tile.y);
  }
  if (group == 0) turn_wait(group);  // the other's last pass
}

template <bool kLoss>
__global__ void __cluster_dims__(kRowShare, 1, 1) __launch_bounds__(kThreads, 1)
    sum_tiles(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
              const __grid_constant__ CUtensorMap map_rope, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_k);
    cuda::tma_prefetch_map(&map_rope);
    constexpr int kWarps = 8;  // that multiply, in a block
    for (int i = 0; i < kQueryStages; ++i) cuda::mbarrier_init(&s.q_full[i], 1), cuda::mbarrier_init(&s.q_empty[i], kWarps);
    for (int i = 0; i < kKeyStages; ++i) cuda::mbarrier_init(&s.k_full[i], 1), cuda::mbarrier_init(&s.k_empty[i], kWarps * kRowShare);
    cuda::mbarrier_init(&s.rope_full, 1), cuda::mbarrier_init(&s.rope_empty, kWarps * kRowShare);
    cuda::mbarrier_init_fence();
  }
  cuda::cluster_sync();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<40>();
    if (threadIdx.x == 256) copy_tiles<kLoss>(&map_q, &map_k, &map_rope, a, s);
    __syncwarp();
  } else {
    cuda::more_registers<232>();
    sum_heads<kLoss>(a, s);
  }
  cuda::cluster_sync();  // nobody leaves while another may still write or arrive here
}

template <bool kLoss>
void launch_tiles(const AttentionMassParams& p, const Arguments& a) {
  const auto bf16 = [](const void* base, int rank, std::initializer_list<uint64_t> size, std::initializer_list<uint64_t> strides, uint32_t rows) {
    cuda::TensorMapShape shape{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, {}, {}, {64, rank == 3 ? 1u : rows, rows}};
    std::copy(size.begin(), size.end(), shape.size);
    std::transform(strides.begin(), strides.end(), shape.stride_bytes, [](uint64_t s) { return 2 * s; });
    return cuda::make_tensor_map(base, shape);
  };
  const uint64_t rows = p.queries, keys = p.keys, heads = p.heads;
  const CUtensorMap map_q = bf16(p.q, 3, {kHeadDim, heads, rows}, {uint64_t(p.q_head_stride), uint64_t(p.q_stride)}, kTileRows);
  const CUtensorMap map_k = bf16(p.k, 3, {kOwnDim, heads, keys}, {uint64_t(p.k_head_stride), uint64_t(p.k_stride)}, kTileKeys / 2 / kRowShare);
  const CUtensorMap map_rope = bf16(p.k_rope, 2, {64, keys, 1}, {uint64_t(p.k_rope_stride)}, kTileKeys / 2 / kRowShare);
  constexpr int kBytes = sizeof(Shared);
  static_assert(kBytes <= 227 * 1024, "more than a Hopper block may have");
  const auto kernel = sum_tiles<kLoss>;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "reserve shared memory for the attention mass");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kRowShare, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = cuda::multiprocessors() / kRowShare * kRowShare, config.blockDim = kThreads, config.dynamicSmemBytes = kBytes;
  config.attrs = &cluster, config.numAttrs = 1;
  int resident = 0;
  cuda::check(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "ask how many clusters fit");
  kernel<<<resident * kRowShare, kThreads, kBytes, p.stream>>>(map_q, map_k, map_rope, a);
  cuda::check(cudaGetLastError(), "launch the attention mass");
}

Arguments arguments(const AttentionMassParams& p, const Workspace& w) {
  Arguments a{};
  a.queries = p.queries, a.keys = static_cast<int>(p.keys), a.heads = p.heads;
  a.scale_log2 = p.scale * kLog2e;
  a.lse = p.lse, a.lse_stride = p.lse_stride, a.lse_head_stride = p.lse_head_stride;
  a.start = p.start, a.end = p.end;
  a.tile_count = w.tile_count, a.tiles = w.tiles, a.pace = w.pace, a.key_tiles = w.key_tiles;
  return a;
}

}  // namespace indexer_kl_sm90

bool sm90_supports(const AttentionMassParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  const auto unaligned = [](const void* x, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(x) % bytes != 0; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > 65536) return no("the number of heads is not in 1 to 65536");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 30)
    return no("more than 2^30 queries or keys");
  if (p.q_stride % 8 || p.q_head_stride % 8 || p.k_stride % 8 || p.k_head_stride % 8 || p.k_rope_stride % 8)
    return no("a stride of q, k or k_rope is not a multiple of 8 elements");
  if (unaligned(p.q, 16) || unaligned(p.k, 16) || unaligned(p.k_rope, 16)) return no("q, k or k_rope is not 16-byte aligned");
  return true;
}

namespace {

void require_supported(const AttentionMassParams& p) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot sum the attention's mass on Hopper (") + why + ") choose another implementation");
  indexer_kl_sm90::check_workspace(p);
}

}  // namespace

void launch_dense_kl_sm90(const AttentionMassParams& p, const DenseKlRows& rows) {
  using namespace indexer_kl_sm90;
  require_supported(p);
  check_rows(p, rows);
  if (p.queries == 0) return;
  const Workspace w(p.workspace, p.queries, p.keys);
  if (p.keys > 0) {
    launch_tile_list(p, w);
    launch_row_scores(p, rows, w);
    Arguments a = arguments(p, w);
    a.inverse_heads = 1.f / rows.all_heads, a.loss_scale = rows.loss_scale;
    a.logits = rows.logits, a.logits_stride = rows.logits_stride;
    a.scores = w.scores, a.row_weight = rows.row_weight, a.partial_sums = w.partial_sums;
    a.dI = rows.dI, a.dI_stride = rows.dI_stride;
    launch_tiles<true>(p, a);
  }
  launch_row_sums(p, rows, w);
}

void launch_attention_mass_sm90(const AttentionMassParams& p, float* mass, int64_t mass_stride) {
  using namespace indexer_kl_sm90;
  require_supported(p);
  if (p.queries == 0 || p.keys == 0) return;
  const Workspace w(p.workspace, p.queries, p.keys);
  launch_tile_list(p, w);
  Arguments a = arguments(p, w);
  a.mass = mass, a.mass_stride = mass_stride;
  launch_tiles<false>(p, a);
}

}  // namespace dsa
