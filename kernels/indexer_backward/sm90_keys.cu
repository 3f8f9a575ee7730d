// Backward pass of the indexer on Hopper, the part that belongs to keys: dk.
//
// A CTA's own rows are 128 keys; it streams the queries that want any of them, four at a time. All tiles of keys together are
// cut into equal spans of such steps, one a multiprocessor: a tile that lies in two spans or more is summed in pieces, which
// are added in order by a last kernel.
#include "kernels/cuda/check.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa::indexer_backward_sm90 {
namespace {

constexpr int kStepQueries = 4;
constexpr int64_t kPieceFloats = kTile * kDim;

// The workspace. A CTA leaves at most two pieces: of a tile begun before its span, and of one that goes on after it.
struct Work {
  int2* plan;       // [tiles] {first step, steps}
  int* piece_tile;  // [CTAs][2], -1: none
  float* pieces;    // [CTAs][2][128][128]

  __host__ __device__ Work(void* memory, int64_t tiles, int ctas) {
    pieces = static_cast<float*>(memory);
    plan = reinterpret_cast<int2*>(pieces + 2 * ctas * kPieceFloats);
    piece_tile = reinterpret_cast<int*>(plan + tiles);
  }
};

struct Shared {
  alignas(1024) char own[kStageBytes];
  Tiles tiles;
  alignas(16) float w[kStages][kTile];  // in the order in which a lane reads them, see weight_place
  Range range[kStages][2];
  uint64_t full[kStages], free[kStages], own_full, own_free;
  int64_t warp_sums[kThreads / 32];
  int first_tile;
  int64_t skip;
};

// One block a tile: the steps whose queries want any of its keys.
__global__ void plan_steps(const Arguments a, int2* plan) {
  __shared__ int first, last;
  if (threadIdx.x == 0) first = a.queries, last = -1;
  __syncthreads();
  const int begin = blockIdx.x * kTile, end = begin + kTile;
  int from = a.queries, to = -1;
  for (int t = threadIdx.x; t < a.queries; t += blockDim.x) {
    const Range r = a.range(t);
    if (r.begin < end && r.end > begin) from = min(from, t), to = max(to, t);
  }
  atomicMin(&first, from);
  atomicMax(&last, to);
  __syncthreads();
  if (threadIdx.x == 0)
    plan[blockIdx.x] = last < 0 ? make_int2(0, 0) : make_int2(first / kStepQueries, last / kStepQueries - first / kStepQueries + 1);
}

// This CTA's span: its first tile and the steps of it that belong to others before. Returns its length.
__device__ int64_t find_span(const int2* plan, int tiles, Shared& s) {
  const int each = (tiles + kThreads - 1) / kThreads, from = min(each * static_cast<int>(threadIdx.x), tiles), to = min(from + each, tiles);
  int64_t own = 0;
  for (int i = from; i < to; ++i) own += plan[i].y;
  int64_t upto = own;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const int64_t other = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) s.warp_sums[warp] = upto;
  __syncthreads();
  int64_t total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) upto += s.warp_sums[i];
    total += s.warp_sums[i];
  }
  const int64_t rest = total % gridDim.x, first = total / gridDim.x * blockIdx.x + (blockIdx.x < rest ? blockIdx.x : rest);
  const int64_t count = total / gridDim.x + (blockIdx.x < rest);
  if (count > 0 && upto - own <= first && first < upto) {
    int64_t skip = first - (upto - own);
    int i = from;
    for (; skip >= plan[i].y; ++i) skip -= plan[i].y;
    s.first_tile = i;
    s.skip = skip;
  }
  __syncthreads();
  return count;
}

// Walks the pieces of a span.
struct Piece {
  const int2* plan;
  int64_t left;
  int tile, first_step, steps;
  bool begins, ends;  // the tile begins, ends in this piece

  __device__ __forceinline__ Piece(const int2* plan_, const Shared& s, int64_t span) : plan(plan_), left(span), tile(s.first_tile) {
    if (left > 0) take(static_cast<int>(s.skip));
  }
  __device__ __forceinline__ void take(int skip) {
    const int2 p = plan[tile];
    const int all = p.y - skip;
    steps = static_cast<int>(all < left ? all : left);
    first_step = p.x + skip;
    begins = skip == 0;
    ends = steps == all;
  }
  __device__ __forceinline__ void next() {
    left -= steps;
    ++tile;
    if (left <= 0) return;
    while (plan[tile].y == 0) ++tile;
    take(0);
  }
};

// Column c = 8b + 2q + e of a tile, read by lane q (mod 4): the two column pairs of blocks 2i and 2i+1 side by side.
__device__ __forceinline__ int weight_place(int c) {
  const int b = c >> 3, q = (c >> 1) & 3, e = c & 1;
  return (b >> 1) * 16 + q * 4 + (b & 1) * 2 + e;
}

__device__ void load_tiles(const Maps& maps, const Arguments& a, Shared& s, const int2* plan, int64_t span) {
  const int lane = threadIdx.x % 32;
  Stage stage;
  uint32_t own_parity = 0;
  for (Piece piece(plan, s, span); piece.left > 0; piece.next()) {
    const int key = piece.tile * kTile;
    cuda::mbarrier_wait(&s.own_free, own_parity ^ 1);
    own_parity ^= 1;
    if (lane == 0) {
      cuda::mbarrier_arrive_expect(&s.own_full, sizeof s.own);
      for (int p = 0; p < 2; ++p) cuda::tma_load_2d(s.own + p * kPanelBytes, &maps.k, &s.own_full, p * 64, key);
    }
    for (int i = 0; i < 2 * piece.steps; ++i, stage.next()) {
      const int t = piece.first_step * kStepQueries + 2 * i;
      float w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = lane + 32 * j, head = c % kHeads, query = t + c / kHeads;
        w[j] = query < a.queries && head < a.heads ? __ldg(a.w + query * a.w_stride + head) : 0.f;
      }
      Range range{0, 0};
      if (lane < 2) range = a.range(t + lane);
      cuda::mbarrier_wait(&s.free[stage.index], stage.parity ^ 1);
      uint64_t* full = &s.full[stage.index];
      if (lane == 0) {
        cuda::mbarrier_arrive_expect(full, kStageBytes + 512);
        for (int p = 0; p < 2; ++p) {
          cuda::tma_load_3d(s.tiles.tile[stage.index] + p * kPanelBytes, &maps.q, full, p * 64, 0, t);
          cuda::tma_load_2d(s.tiles.d[stage.index] + p * 256, &maps.d, full, key + p * 64, t);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) s.w[stage.index][weight_place(lane + 32 * j)] = w[j];
      if (lane < 2) s.range[stage.index][lane] = range;
      cuda::mbarrier_arrive(full);
    }
  }
}

__device__ void sum_queries(const Arguments& a, Shared& s, const Work& work, int64_t span) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const char* own = s.own + group * kGroupBytes;
  Stage stage;
  uint32_t own_parity = 0;
  for (Piece piece(work.plan, s, span); piece.left > 0; piece.next()) {
    const int key = piece.tile * kTile + group * 64 + row;
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0;
    cuda::mbarrier_wait(&s.own_full, own_parity);
    own_parity ^= 1;
    for (int i = 0; i < piece.steps; ++i)
      two_tiles(sums, own, s.tiles, s.full, s.free, stage, [&](const float(&score)[64], int index, int, uint32_t(&selected)[8][4]) {
        const uint32_t d_at = cuda::shared_address(s.tiles.d[index]) + group * 256;
        float d[2][2];  // [query][row half]
#pragma unroll
        for (int query = 0; query < 2; ++query) {
          const Range range = s.range[index][query];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int column = row + 8 * h, at = key + 8 * h;
            const float x = load_bf16((swizzled_row(d_at + query * 128) ^ (column >> 3) << 4) + 2 * (column & 7));
            d[query][h] = at >= range.begin && at < range.end ? x : 0.f;
          }
        }
        const uint32_t w_at = cuda::shared_address(s.w[index]) + (lane % 4) * 16;
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // blocks 2i and 2i + 1 of eight heads
          const float4 w = load_float4(w_at + 64 * i);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = d[i / 4][h];
            selected[i][h] = pack(x * w.x, x * w.y) & signs(score[8 * i + 2 * h], score[8 * i + 2 * h + 1]);
            selected[i][2 + h] = pack(x * w.z, x * w.w) & signs(score[8 * i + 4 + 2 * h], score[8 * i + 4 + 2 * h + 1]);
          }
        }
      });
    arrive_once_a_warp(&s.own_free);
    const bool whole = piece.begins && piece.ends;
    const int which = piece.begins ? 1 : 0;
    float* to = whole ? a.dk + int64_t{key} * kDim : work.pieces + (2 * blockIdx.x + which) * kPieceFloats + (group * 64 + row) * kDim;
    to += 2 * (lane % 4);
    if (!whole && threadIdx.x == 0) work.piece_tile[2 * blockIdx.x + which] = piece.tile;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (whole && key + 8 * h >= a.keys) continue;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        float2* place = reinterpret_cast<float2*>(to + 8 * h * kDim + 8 * b);
        float2 x = make_float2(sums[4 * b + 2 * h], sums[4 * b + 2 * h + 1]);
        if (whole) {
          const float2 before = *place;
          x.x += before.x, x.y += before.y;
        }
        *place = x;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) backward_keys(const __grid_constant__ Maps maps, const Arguments a, const Work work, int tiles) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::mbarrier_init(&s.full[i], 1 + 32);  // the copy and the lanes that write beside it
      cuda::mbarrier_init(&s.free[i], 8);
    }
    cuda::mbarrier_init(&s.own_full, 1);
    cuda::mbarrier_init(&s.own_free, 8);
    cuda::mbarrier_init_fence();
  }
  if (threadIdx.x < 2) work.piece_tile[2 * blockIdx.x + threadIdx.x] = -1;
  const int64_t span = find_span(work.plan, tiles, s);
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<40>();
    if (threadIdx.x / 32 == 8) load_tiles(maps, a, s, work.plan, span);
  } else {
    cuda::more_registers<232>();
    sum_queries(a, s, work, span);
  }
}

// Adds the pieces of a tile that several CTAs worked on: the CTA with its first one does.
__global__ void add_pieces(const Arguments a, const Work work, int ctas) {
  const int tile = work.piece_tile[2 * blockIdx.x + 1];
  if (tile < 0) return;
  float4* const to = reinterpret_cast<float4*>(a.dk + int64_t{tile} * kPieceFloats);
  const int n = min(kTile, a.keys - tile * kTile) * kDim / 4;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const auto piece = [&](int c) { return reinterpret_cast<const float4*>(work.pieces + c * kPieceFloats)[i]; };
    float4 x = piece(2 * blockIdx.x + 1);
    for (int c = blockIdx.x + 1; c < ctas && work.piece_tile[2 * c] == tile; ++c) {
      const float4 y = piece(2 * c);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const float4 y = to[i];
    to[i] = make_float4(y.x + x.x, y.y + x.y, y.z + x.z, y.w + x.w);
  }
}

int64_t tiles_of(int64_t keys) { return (keys + kTile - 1) / kTile; }

}  // namespace

size_t keys_workspace_bytes(int64_t keys, int multiprocessors) {
  return 2 * multiprocessors * (kPieceFloats * sizeof(float) + sizeof(int)) + tiles_of(keys) * sizeof(int2);
}

void launch_keys(const Maps& maps, const Arguments& a, void* workspace, cudaStream_t stream) {
  const int ctas = cuda::multiprocessors(), tiles = static_cast<int>(tiles_of(a.keys));
  const Work work(workspace, tiles, ctas);
  cuda::check(cudaFuncSetAttribute(backward_keys, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for indexer_backward");
  plan_steps<<<tiles, 256, 0, stream>>>(a, work.plan);
  cuda::check(cudaGetLastError(), "launch the plan of indexer_backward");
  backward_keys<<<ctas, kThreads, sizeof(Shared), stream>>>(maps, a, work, tiles);
  cuda::check(cudaGetLastError(), "launch the key gradients of indexer_backward");
  add_pieces<<<ctas, 256, 0, stream>>>(a, work, ctas);
  cuda::check(cudaGetLastError(), "launch the last sums of indexer_backward");
}

}  // namespace dsa::indexer_backward_sm90
