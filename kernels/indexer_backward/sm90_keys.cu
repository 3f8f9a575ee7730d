// Backward pass of the indexer on Hopper, the part that belongs to keys: dk.
//
// A CTA owns a block of 256 keys, 128 a warpgroup, and streams the queries that want any of them, four at a time, with their dI
// and the bits that the kernel of the queries left. dI w under the bits is the left operand, in registers, of
// sums += (dI w)^T . q, and the only product: while the tensor core works on one query, the general cores prepare the next.
// All blocks of keys together are cut into equal spans of such steps, one a multiprocessor: a block that lies in two spans or
// more is summed in pieces, which are added in order by a last kernel.
#include "kernels/cuda/check.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa::indexer_backward_sm90 {
namespace {

constexpr int kStepQueries = 4;
constexpr int kBlock = 2 * kTile;  // keys of a CTA
constexpr int64_t kPieceFloats = kBlock * kDim;

// The workspace. A CTA leaves at most two pieces: of a block begun before its span, and of one that goes on after it.
struct Work {
  int2* plan;       // [blocks] {first step, steps}
  int* piece_block;  // [CTAs][2], -1: none
  float* pieces;    // [CTAs][2][256][128]

  __host__ __device__ Work(void* memory, int64_t blocks, int ctas) {
    pieces = static_cast<float*>(memory);
    plan = reinterpret_cast<int2*>(pieces + 2 * ctas * kPieceFloats);
    piece_block = reinterpret_cast<int*>(plan + blocks);
  }
};

struct Shared {
  alignas(1024) char tile[kStages][kTileBytes];         // two queries
  alignas(1024) char d[kStages][8 * 256];               // their dI: eight panels of 32 keys, two rows of 128 bytes
  alignas(16) uint32_t bits[kStages][2 * kPairWords];   // of two tiles of keys
  alignas(16) float w[kStages][kTile];                  // in the order in which a lane reads them, see weight_place
  Range range[kStages][2];
  uint64_t full[kStages], free[kStages];
  int64_t warp_sums[kThreads / 32];
  int first_block;
  int64_t skip;
};

// One CTA a block: the steps whose queries want any of its keys.
__global__ void plan_steps(const Arguments a, int2* plan) {
  __shared__ int first, last;
  if (threadIdx.x == 0) first = a.queries, last = -1;
  __syncthreads();
  const int begin = blockIdx.x * kBlock, end = begin + kBlock;
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

// This CTA's span: its first block and the steps of it that belong to others before. Returns its length.
__device__ int64_t find_span(const int2* plan, int blocks, Shared& s) {
  const int each = (blocks + kThreads - 1) / kThreads, from = min(each * static_cast<int>(threadIdx.x), blocks), to = min(from + each, blocks);
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
    s.first_block = i;
    s.skip = skip;
  }
  __syncthreads();
  return count;
}

// Walks the pieces of a span.
struct Piece {
  const int2* plan;
  int64_t left;
  int block, first_step, steps;
  bool begins, ends;  // the block begins, ends in this piece

  __device__ __forceinline__ Piece(const int2* plan_, const Shared& s, int64_t span) : plan(plan_), left(span), block(s.first_block) {
    if (left > 0) take(static_cast<int>(s.skip));
  }
  __device__ __forceinline__ void take(int skip) {
    const int2 p = plan[block];
    const int all = p.y - skip;
    steps = static_cast<int>(all < left ? all : left);
    first_step = p.x + skip;
    begins = skip == 0;
    ends = steps == all;
  }
  __device__ __forceinline__ void next() {
    left -= steps;
    ++block;
    if (left <= 0) return;
    while (plan[block].y == 0) ++block;
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
  for (Piece piece(plan, s, span); piece.left > 0; piece.next()) {
    const int key = piece.block * kBlock;
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
        const bool any = t < a.queries;  // past the last query there are no bits
        cuda::mbarrier_arrive_expect(full, kTileBytes + sizeof s.d[0] + (any ? sizeof s.bits[0] : 0));
        for (int p = 0; p < 2; ++p) cuda::tma_load_3d(s.tile[stage.index] + p * kPanelBytes, &maps.q, full, p * 64, 0, t);
#pragma unroll 1
        for (int p = 0; p < 8; ++p) cuda::tma_load_2d(s.d[stage.index] + p * 256, &maps.d, full, key + p * 32, t);
        if (any) cuda::bulk_load(s.bits[stage.index], a.bits_of(t / 2, 2 * piece.block), sizeof s.bits[0], full);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) s.w[stage.index][weight_place(lane + 32 * j)] = w[j];
      if (lane < 2) s.range[stage.index][lane] = range;
      cuda::mbarrier_arrive(full);
    }
  }
}

// Left operand of 2 x 64 keys and a query's 64 heads: dI w where the bit is set. row: of the first 64 keys, in the block.
__device__ __forceinline__ void select(const Shared& s, int stage, int query, int key, int row, uint32_t (&g)[2][4][4]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const Range range = s.range[stage][query];
  const uint32_t d_row = cuda::shared_address(s.d[stage]) + query * 128 + row / 32 * 256;
  const uint32_t d_at = (swizzled_row(d_row) ^ (row >> 2 & 7) << 4) + 4 * (row & 3);
  float d[2][2];
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = key + 64 * u + 8 * h;  // two panels, that is four rows, and two chunks further
      d[u][h] = at >= range.begin && at < range.end ? __uint_as_float(load32((d_at + 512 * u) ^ (64 * u + 32 * h))) : 0.f;
    }
  const uint2* bits = reinterpret_cast<const uint2*>(s.bits[stage] + row / kTile * kPairWords + query * kQueryWords + lane / 8 * 8) + quad;
  const float4* w_at = reinterpret_cast<const float4*>(s.w[stage] + query * kHeads) + quad;
  const int shift = 2 * (row % kTile / 8) + (lane / 4 & 1);
#pragma unroll
  for (int b = 0; b < 8; ++b) {  // of eight heads
    const uint2 two = bits[16 * b];
    const float4 w4 = w_at[b / 2 * 4];
    const float wx = b % 2 ? w4.z : w4.x, wy = b % 2 ? w4.w : w4.y;
    const uint32_t low = two.x << shift, high = two.y << shift;
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        g[u][b / 2][b % 2 * 2 + h] = pack(d[u][h] * wx, d[u][h] * wy) & signs(low << (16 * u + 2 * h), high << (16 * u + 2 * h));
  }
}

__device__ __forceinline__ void add_products(float (&sums)[2][64], const uint32_t (&g)[2][4][4], const char* tile, int query) {
  cuda::wgmma_fence();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint64_t q = cuda::operand_across_k(tile, kPanelBytes) + 128 * (4 * query + j);
    cuda::wgmma_bf16_n128<true>(sums[0], g[0][j], q);
    cuda::wgmma_bf16_n128<true>(sums[1], g[1][j], q);
  }
  cuda::wgmma_commit();
}

__device__ void sum_queries(const Arguments& a, Shared& s, const Work& work, int64_t span) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int row = group * kTile + threadIdx.x / 32 % 4 * 16 + lane / 4;
  Stage stage;
  for (Piece piece(work.plan, s, span); piece.left > 0; piece.next()) {
    const int key = piece.block * kBlock + row;
    float sums[2][64];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i / 64][i % 64] = 0;
    for (int i = 0; i < piece.steps; ++i) {
      uint32_t even[2][4][4], odd[2][4][4];
      const int first = stage.index;
      cuda::mbarrier_wait(&s.full[first], stage.parity);
      select(s, first, 0, key, row, even);
      add_products(sums, even, s.tile[first], 0);
      select(s, first, 1, key, row, odd);
      add_products(sums, odd, s.tile[first], 1);
      stage.next();
      const int second = stage.index;
      cuda::mbarrier_wait(&s.full[second], stage.parity);
      cuda::wgmma_wait<1>();
      select(s, second, 0, key, row, even);
      add_products(sums, even, s.tile[second], 0);
      cuda::wgmma_wait<1>();
      cuda::mbarrier_arrive(&s.free[first]);
      select(s, second, 1, key, row, odd);
      add_products(sums, odd, s.tile[second], 1);
      stage.next();
      cuda::wgmma_wait<0>();
      cuda::mbarrier_arrive(&s.free[second]);
      cuda::wgmma_settle(sums[0]);
      cuda::wgmma_settle(sums[1]);
    }
    const bool whole = piece.begins && piece.ends;
    const int which = piece.begins ? 1 : 0;
    float* to = whole ? a.dk + int64_t{key} * kDim : work.pieces + (2 * blockIdx.x + which) * kPieceFloats + row * kDim;
    to += 2 * (lane % 4);
    if (!whole && threadIdx.x == 0) work.piece_block[2 * blockIdx.x + which] = piece.block;
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int further = 64 * u + 8 * h;
        if (whole && key + further >= a.keys) continue;
#pragma unroll
        for (int b = 0; b < 16; ++b) {
          float2* place = reinterpret_cast<float2*>(to + further * kDim + 8 * b);
          float2 x = make_float2(sums[u][4 * b + 2 * h], sums[u][4 * b + 2 * h + 1]);
          if (whole) {
            const float2 before = *place;
            x.x += before.x, x.y += before.y;
          }
          *place = x;
        }
      }
  }
}

__global__ void __launch_bounds__(kThreads, 1) backward_keys(const __grid_constant__ Maps maps, const Arguments a, const Work work, int blocks) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::mbarrier_init(&s.full[i], 1 + 32);  // the copy and the lanes that write beside it
      cuda::mbarrier_init(&s.free[i], kReaders);
    }
    cuda::mbarrier_init_fence();
  }
  if (threadIdx.x < 2) work.piece_block[2 * blockIdx.x + threadIdx.x] = -1;
  const int64_t span = find_span(work.plan, blocks, s);
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<24>();
    if (threadIdx.x / 32 == 8) load_tiles(maps, a, s, work.plan, span);
  } else {
    cuda::more_registers<240>();
    sum_queries(a, s, work, span);
  }
}

// Adds the pieces of a block that several CTAs worked on: the CTA with its first one does.
__global__ void add_pieces(const Arguments a, const Work work, int ctas) {
  const int block = work.piece_block[2 * blockIdx.x + 1];
  if (block < 0) return;
  float4* const to = reinterpret_cast<float4*>(a.dk + int64_t{block} * kPieceFloats);
  const int n = min(kBlock, a.keys - block * kBlock) * kDim / 4;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const auto piece = [&](int c) { return reinterpret_cast<const float4*>(work.pieces + c * kPieceFloats)[i]; };
    float4 x = piece(2 * blockIdx.x + 1);
    for (int c = blockIdx.x + 1; c < ctas && work.piece_block[2 * c] == block; ++c) {
      const float4 y = piece(2 * c);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const float4 y = to[i];
    to[i] = make_float4(y.x + x.x, y.y + x.y, y.z + x.z, y.w + x.w);
  }
}

int64_t blocks_of(int64_t keys) { return (keys + kBlock - 1) / kBlock; }

}  // namespace

size_t keys_workspace_bytes(int64_t keys, int multiprocessors) {
  return 2 * multiprocessors * (kPieceFloats * sizeof(float) + sizeof(int)) + blocks_of(keys) * sizeof(int2);
}

void launch_keys(const Maps& maps, const Arguments& a, void* workspace, cudaStream_t stream) {
  const int ctas = cuda::multiprocessors(), blocks = static_cast<int>(blocks_of(a.keys));
  const Work work(workspace, blocks, ctas);
  cuda::check(cudaFuncSetAttribute(backward_keys, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for indexer_backward");
  plan_steps<<<blocks, 256, 0, stream>>>(a, work.plan);
  cuda::check(cudaGetLastError(), "launch the plan of indexer_backward");
  backward_keys<<<ctas, kThreads, sizeof(Shared), stream>>>(maps, a, work, blocks);
  cuda::check(cudaGetLastError(), "launch the key gradients of indexer_backward");
  add_pieces<<<ctas, 256, 0, stream>>>(a, work, ctas);
  cuda::check(cudaGetLastError(), "launch the last sums of indexer_backward");
}

}  // namespace dsa::indexer_backward_sm90
