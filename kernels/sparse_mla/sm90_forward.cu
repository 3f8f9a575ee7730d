// Sparse attention in latent form on Hopper, forward; see params.h for the formula.
//
// A CTA attends with 64 heads of a query; the two halves of 128 heads run side by side, so that the second finds the
// gathered keys in L2. Four warpgroups share the work, each waiting for nothing but its inputs:
//   0  scores a tile of 64 keys, with five ninths of the queries in registers, turns the scores into weights
//   1, 2  add weights times values, 256 of the 512 output columns each
//   3  gathers tiles, three ahead
// The tensor core alternates between the scores of tile i + 1 and the values of tile i, whose weights come to be while
// the values of tile i - 1 are added: warpgroup 0 lets tile i go when the scores of tile i + 1 are nearly done.
//
// Queries in registers leave room for almost three tiles in shared memory: three buffers hold value panels 0 2 3 4 6
// and rope, two hold panels 1 5 7, which are needed last and free first: they come last too, and the copies of their
// neighbours have brought them into the L2 cache by then. A panel is 64 keys x 64 columns. Weights take the place of
// the rope panel. Ahead of an item's tiles the queries pass through a buffer of the ring on their way to registers.
//
// The maximum that weights refer to follows only when a weight passes 2^8: sums and outputs are then scaled once, and
// most tiles need no maximum at all.
//
// Letters: T query rows, S keys, H heads, K list entries. An item is a query and a half of the heads.
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_maps.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr float kNoMaximum = -1e30f;  // finite: differences of it are no NaN
constexpr float kLargest = 256;       // of the sum of a lane's weights in a row of a tile; beyond, the maximum follows
constexpr int kThreads = 512;
constexpr int kBuffers = 3;
constexpr int kPanelStep = kPanelBytes >> 4;  // in operand descriptors
constexpr int kTileBytes = 6 * kPanelBytes, kLateBytes = 3 * kPanelBytes;
constexpr int kRegisterPanels = 5;            // of the queries
__device__ constexpr int kPanelOf[6] = {0, 2, 3, 4, 6, 8}, kLatePanelOf[3] = {1, 5, 7};

struct Shared {
  alignas(1024) char tile[kBuffers][6][kPanelBytes];  // panels kPanelOf; the weights take the place of the last, rope
  alignas(1024) char late[2][3][kPanelBytes];         // panels kLatePanelOf of even and odd tiles
  alignas(1024) char q[4][kPanelBytes];               // rope and kLatePanelOf
  // Of a tile's heads: what the outputs so far, and at last, are scaled by.
  float factor[kBuffers][64], inverse[kBuffers][64];
  uint4 valid[kBuffers];     // byte r/4, bit r%4: entry r of the tile counts
  int rescale[kBuffers][4];  // whether a warp's factors are to be applied
  uint64_t full[kBuffers], free[kBuffers], go[kBuffers], full_late[2], free_late[2];
  uint64_t q_full;
};
static_assert(sizeof(Shared) <= 232448, "more shared memory than a block of a Hopper GPU can have");

struct Arguments {
  Lists lists;
  int items, heads, halves;
  const char* kv;
  int64_t kv_bytes;
  float scale_log2;
  __nv_bfloat16* o;  // [T,H,512]
  float* lse;        // [T,H]
  uint32_t* bad_entries;
};

// A ring's place, and the parity of its barriers there.
template <int n>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ int after() const { return at + 1 == n ? 0 : at + 1; }
  __device__ __forceinline__ uint32_t parity_after() const { return at + 1 == n ? parity ^ 1 : parity; }
  __device__ __forceinline__ void advance() {
    if (++at == n) at = 0, parity ^= 1;
  }
};

// Operand descriptors differ in their low word.
__device__ __forceinline__ uint32_t low(uint64_t descriptor) { return static_cast<uint32_t>(descriptor); }
__device__ __forceinline__ uint64_t whole(uint32_t low) { return 0x4000004000000000ull | low; }

__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(cuda::shared_address(barrier)), "r"(parity) : "memory");
  return done;
}

// The length of an item's list, -1 past the last item.
__device__ __forceinline__ int length_of(const Arguments& a, int item) {
  return item < a.items ? a.lists.length(item / a.halves) : -1;
}

__device__ __forceinline__ bool valid_at(const uint4& v, int column) {
  const uint32_t w = column < 16 ? v.x : column < 32 ? v.y : column < 48 ? v.z : v.w;
  return w >> (column / 4 % 4 * 8 + column % 4) & 1;
}

__device__ void score_tiles(const CUtensorMap* map_q, const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, head_row = warp * 16 + lane / 4;
  const uint32_t fragment =
      (warp * 16 + lane % 16) * 128 + ((lane / 16 ^ (lane & 7)) << 4);  // of a panel, first k step
  Ring<kBuffers> tile_ring;
  Ring<2> late_ring;
  uint32_t q_parity = 0;
  uint32_t q[4 * kRegisterPanels][4];
  float d[32];
  bool complete = true, ready = false;  // every entry of the tile counts; the next tile is there
  int item = blockIdx.x;
  const auto fetch_q = [&](int item) {  // by one thread: what is not in registers
    cuda::mbarrier_arrive_expect(&s.q_full, 4 * kPanelBytes);
    cuda::tma_load_3d(s.q[0], map_q, &s.q_full, 512, item % a.halves * kHeadBlock, item / a.halves);
#pragma unroll
    for (int p = 0; p < 3; ++p)
      cuda::tma_load_3d(s.q[1 + p], map_q, &s.q_full, kLatePanelOf[p] * 64, item % a.halves * kHeadBlock,
                        item / a.halves);
  };
  // Scores the next tile; lets the values of the tile before be added when the last products are in the queue.
  const auto score = [&](bool go, int go_buffer, bool first, bool more) {
    if (!ready) {
      cuda::mbarrier_wait(&s.full[tile_ring.at], tile_ring.parity);
      cuda::fence_async_proxy();
    }
    const uint32_t b = low(cuda::operand_along_k(s.tile[tile_ring.at])), qs = low(cuda::operand_along_k(s.q));
    cuda::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * kRegisterPanels; ++i)
      cuda::wgmma_bf16_n64<false>(d, q[i], whole(b + i / 4 * kPanelStep + i % 4 * 2), i > 0);
    if (first) {
      cuda::mbarrier_wait(&s.q_full, q_parity);
      q_parity ^= 1;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      cuda::wgmma_bf16_n64<false, false>(d, whole(qs + 2 * i), whole(b + 5 * kPanelStep + 2 * i));
    cuda::mbarrier_wait(&s.full_late[late_ring.at], late_ring.parity);
    cuda::fence_async_proxy();  // also for the weights of the tile before
    const uint32_t bl = low(cuda::operand_along_k(s.late[late_ring.at]));
#pragma unroll
    for (int i = 0; i < 12; ++i) {
      if (i == 8) cuda::wgmma_commit();
      cuda::wgmma_bf16_n64<false, false>(d, whole(qs + (1 + i / 4) * kPanelStep + i % 4 * 2),
                                         whole(bl + i / 4 * kPanelStep + i % 4 * 2));
    }
    cuda::wgmma_commit();
    if (go) {
      cuda::wgmma_wait<1>();
      cuda::mbarrier_arrive(&s.go[go_buffer]);
    }
    const uint4 valid = s.valid[tile_ring.at];
    complete = (valid.x & valid.y & valid.z & valid.w) == 0x0F0F0F0Fu;
    ready = more && mbarrier_test(&s.full[tile_ring.after()], tile_ring.parity_after());
    if (ready) cuda::fence_async_proxy();
    cuda::wgmma_wait<0>();
    cuda::wgmma_settle(d);
  };
  const uint32_t weights = cuda::shared_address(s.tile[0][5]) + fragment;
  float maximum[2] = {}, sum[2];
  // Weights of the tile's scores by the maxima so far; returns the sums of this lane's columns.
  const auto weigh = [&](float (&by_row)[2]) {
    by_row[0] = by_row[1] = 0;
    const uint32_t to = weights + tile_ring.at * kTileBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float e[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        e[j] = exp2_approx(fmaf(d[8 * i + j], a.scale_log2, -maximum[j % 4 / 2]));
        by_row[j % 4 / 2] += e[j];
      }
      cuda::store_matrices(to ^ (i << 5), pack(e[0], e[1]), pack(e[2], e[3]), pack(e[4], e[5]), pack(e[6], e[7]));
    }
  };
  const auto soften = [&](bool first) {
    if (!complete) [[unlikely]] {
      const uint4 valid = s.valid[tile_ring.at];
      const int column = 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (!valid_at(valid, 8 * (i / 4) + column + i % 2)) d[i] = -INFINITY;
    }
    float by_row[2];
    bool grown = first;
    if (!first) [[likely]] {
      weigh(by_row);
      grown = __any_sync(~0u, by_row[0] > kLargest || by_row[1] > kLargest);
    }
    if (grown) [[unlikely]] {  // also when weights are infinite
      float greatest[2] = {d[0], d[2]};
#pragma unroll
      for (int i = 0; i < 32; ++i) greatest[i % 4 / 2] = fmaxf(greatest[i % 4 / 2], d[i]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        greatest[h] = fmaxf(greatest[h], __shfl_xor_sync(~0u, greatest[h], 1));
        greatest[h] = fmaxf(greatest[h], __shfl_xor_sync(~0u, greatest[h], 2)) * a.scale_log2;
        const float m = fmaxf(maximum[h], greatest[h]), by = exp2_approx(maximum[h] - m);
        maximum[h] = m;
        sum[h] *= by;
        if (lane % 4 == 0) s.factor[tile_ring.at][head_row + 8 * h] = by;
      }
      weigh(by_row);
    }
    if (lane == 0) s.rescale[tile_ring.at][warp] = grown;
    sum[0] += by_row[0], sum[1] += by_row[1];
  };
  const auto skip_empty = [&](int& item, int& length) {
    while (length == 0) {
      const int head = item % a.halves * kHeadBlock + head_row;
      if (lane % 4 == 0)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (head + 8 * h < a.heads) a.lse[int64_t{item / a.halves} * a.heads + head + 8 * h] = -INFINITY;
      item += gridDim.x;
      length = length_of(a, item);
    }
  };
  int length = length_of(a, item);
  skip_empty(item, length);
  if (item < a.items && threadIdx.x == 0) fetch_q(item);
  while (item < a.items) {
    const int tiles = tiles_of(length);
    int next = item + gridDim.x;
    length = length_of(a, next);
    cuda::mbarrier_wait(&s.full[tile_ring.at], tile_ring.parity);
    const uint32_t from = cuda::shared_address(s.tile[tile_ring.at]) + fragment;
#pragma unroll
    for (int i = 0; i < 4 * kRegisterPanels; ++i)
      cuda::load_matrices(q[i], (from + i / 4 * kPanelBytes) ^ (i % 4 << 5));
    for (int i = 0; i < 2; ++i) cuda::mbarrier_arrive(&s.free[tile_ring.at]);  // for both warpgroups
    cuda::mbarrier_arrive(&s.go[tile_ring.at]);
    tile_ring.advance();
    maximum[0] = maximum[1] = kNoMaximum;
    sum[0] = sum[1] = 0;
    ready = false;
    score(false, 0, true, tiles > 1);
#pragma unroll 1
    for (int tile = 1; tile < tiles; ++tile) {
      soften(tile == 1);
      const int go = tile_ring.at;
      tile_ring.advance();
      late_ring.advance();
      score(true, go, false, tile + 1 < tiles);
    }
    cuda::barrier_sync<1, 128>();  // all are done with q
    skip_empty(next, length);
    if (next < a.items && threadIdx.x == 0) fetch_q(next);
    soften(tiles == 1);
    cuda::fence_async_proxy();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      if (lane % 4 == 0) s.inverse[tile_ring.at][head_row + 8 * h] = sum[h] == 0 ? 0 : 1 / sum[h];
    }
    cuda::mbarrier_arrive(&s.go[tile_ring.at]);
    tile_ring.advance();
    late_ring.advance();
    const int head = item % a.halves * kHeadBlock + head_row;
    if (lane % 4 == 0)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (head + 8 * h < a.heads)
          a.lse[int64_t{item / a.halves} * a.heads + head + 8 * h] =
              sum[h] == 0 ? -INFINITY : (maximum[h] + log2f(sum[h])) * 0.6931471805599453f;
    item = next;
  }
}

// Gathers: warp w copies rows 16w to 16w + 15 of each panel, four at a time. The late panels of a tile come one tile
// later. Ahead of an item's tiles a buffer holds the queries on their way to registers.
__device__ void gather_tiles(const CUtensorMap* map_q, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const uint32_t to = cuda::shared_address(s.tile) + warp * 2048 + lane / 8 * 128 + ((lane % 8 ^ lane / 8) << 4);
  Ring<kBuffers> tile_ring;
  Ring<2> late_ring;
  int key[4], next[4], edge, edge_next = -1;  // entries of rows 16w + lane/8 + 4j, and the one before row 16w
  bool pending = false;                       // late panels of the tile whose entries are in key
  const auto load = [&](int item, int first, int length) {
    const int32_t* list = a.lists.indices + item / a.halves * a.lists.stride;
    const int row = first + warp * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) next[j] = row + lane / 8 + 4 * j < length ? __ldg(list + row + lane / 8 + 4 * j) : -1;
    edge_next = row > 0 && row < length ? __ldg(list + row - 1) : -1;
  };
  const auto finish_late = [&] {
    cuda::mbarrier_wait(&s.free_late[late_ring.at], late_ring.parity ^ 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool read = key[j] >= 0 && key[j] < a.lists.keys;
      const char* from = a.kv + (read ? key[j] * a.kv_bytes : 0) + lane % 8 * 16;
#pragma unroll
      for (int p = 0; p < 3; ++p)
        cuda::copy16_or_zero(
            (to ^ (j & 1) << 6) + kBuffers * kTileBytes + late_ring.at * kLateBytes + p * kPanelBytes + j * 512,
            from + kLatePanelOf[p] * 128, read);
    }
    cuda::mbarrier_arrive_after_copies(&s.full_late[late_ring.at]);
    late_ring.advance();
    pending = false;
  };
  int item = blockIdx.x, length = length_of(a, item);
  while (length == 0) item += gridDim.x, length = length_of(a, item);
  if (item < a.items) load(item, 0, length);
  while (item < a.items) {
    int ahead = item + gridDim.x, ahead_length = length_of(a, ahead);
    if (pending) finish_late();
    cuda::mbarrier_wait(&s.free[tile_ring.at], tile_ring.parity ^ 1);
    if (thread == 0) {
      cuda::fence_async_proxy();
      cuda::mbarrier_arrive_expect(&s.full[tile_ring.at], kRegisterPanels * kPanelBytes);
#pragma unroll
      for (int p = 0; p < kRegisterPanels; ++p)
        cuda::tma_load_3d(s.tile[tile_ring.at][p], map_q, &s.full[tile_ring.at], kPanelOf[p] * 64,
                          item % a.halves * kHeadBlock, item / a.halves);
    } else {
      cuda::mbarrier_arrive(&s.full[tile_ring.at]);
    }
    if (lane == 0) cuda::mbarrier_arrive(&s.full[tile_ring.at]);
    tile_ring.advance();
    int good = 0;
#pragma unroll 1
    for (int first = 0; first < length; first += kTile) {
      if (pending) finish_late();
#pragma unroll
      for (int j = 0; j < 4; ++j) key[j] = next[j];
      edge = edge_next;
      if (first + kTile < length) {
        load(item, first + kTile, length);
      } else {
        while (ahead_length == 0) ahead += gridDim.x, ahead_length = length_of(a, ahead);
        if (ahead < a.items) load(ahead, 0, ahead_length);
      }
      cuda::mbarrier_wait(&s.free[tile_ring.at], tile_ring.parity ^ 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool read = key[j] >= 0 && key[j] < a.lists.keys;
        const char* from = a.kv + (read ? key[j] * a.kv_bytes : 0) + lane % 8 * 16;
#pragma unroll
        for (int p = 0; p < 6; ++p) {
          const uint32_t into = (to ^ (j & 1) << 6) + tile_ring.at * kTileBytes + p * kPanelBytes + j * 512;
          if (kPanelOf[p] % 2) cuda::copy16_or_zero(into, from + kPanelOf[p] * 128, read);
          else cuda::copy16_or_zero_and_256(into, from + kPanelOf[p] * 128, read);
        }
      }
      cuda::mbarrier_arrive_after_copies(&s.full[tile_ring.at]);
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int before = __shfl_up_sync(~0u, key[j], 8);
        const int above = j ? __shfl_sync(~0u, key[j ? j - 1 : 0], lane | 24) : edge;
        if (lane < 8) before = above;
        const uint32_t counts = __ballot_sync(~0u, a.lists.counting(key[j], before) >= 0) & 0x01010101u;
        good += __popc(counts);
        word |= (counts * 0x10204080u >> 28) << (8 * j);
      }
      if (lane == 0) {
        reinterpret_cast<uint32_t*>(&s.valid[tile_ring.at])[warp] = word;
        cuda::mbarrier_arrive(&s.full[tile_ring.at]);
      }
      tile_ring.advance();
      pending = true;
    }
    const int mine = length / 64 * 16 + min(max(length % 64 - 16 * warp, 0), 16);
    if (item % a.halves == 0 && a.bad_entries && lane == 0 && good < mine) atomicAdd(a.bad_entries, mine - good);
    item = ahead, length = ahead_length;
  }
  if (pending) finish_late();
}

template <int side>
__device__ void add_values(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, head_row = warp * 16 + lane / 4;
  const uint32_t fragment =
      cuda::shared_address(s.tile[0][5]) + (warp * 16 + lane % 16) * 128 + ((lane / 16 ^ (lane & 7)) << 4);
  Ring<kBuffers> tile_ring;
  Ring<2> late_ring;
  int length = length_of(a, blockIdx.x);
  for (int item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int tiles = tiles_of(length);
    length = length_of(a, item + gridDim.x);
    if (tiles > 0) {  // the queries' buffer
      cuda::mbarrier_wait(&s.go[tile_ring.at], tile_ring.parity);
      tile_ring.advance();
    }
    float o[2][64];  // columns of the panels added first, and second
    float inverse[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i / 64][i % 64] = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int at = tile_ring.at;
      cuda::mbarrier_wait(&s.go[at], tile_ring.parity);
      if (tile > 0 && s.rescale[at][warp]) [[unlikely]] {
        const float by[2] = {s.factor[at][head_row], s.factor[at][head_row + 8]};
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= by[i % 4 / 2];
      }
      uint32_t v[2];
      if (side == 0) {
        v[0] = low(cuda::operand_across_k(s.tile[at][0], s.late[late_ring.at][0] - s.tile[at][0]));
        v[1] = low(cuda::operand_across_k(s.tile[at][1], kPanelBytes));
      } else {
        v[0] = low(cuda::operand_across_k(s.late[late_ring.at][1], kPanelBytes));
        v[1] = low(cuda::operand_across_k(s.tile[at][3], kPanelBytes));
      }
      const uint32_t p = low(cuda::operand_along_k(s.tile[at][5]));
      cuda::wgmma_fence();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          cuda::wgmma_bf16_n128<false, true>(o[c], whole(p + 2 * i), whole(v[c] + 128 * i), tile > 0 || i > 0);
        cuda::wgmma_commit();
      }
      if (tile + 1 == tiles) inverse[0] = s.inverse[at][head_row], inverse[1] = s.inverse[at][head_row + 8];
      cuda::wgmma_wait<1>();
      cuda::mbarrier_arrive(&s.free_late[late_ring.at]);
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(o[0]);
      cuda::wgmma_settle(o[1]);
      cuda::mbarrier_arrive(&s.free[at]);
      tile_ring.advance();
      late_ring.advance();
    }
    const int head = item % a.halves * kHeadBlock + head_row;
    __nv_bfloat16* row = a.o + (int64_t{item / a.halves} * a.heads + head) * kLatent + side * 256 + 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int panel = side ? 1 - i / 4 + i % 4 / 2 * 2 : i / 2, column = panel * 64 + i % 2 * 32;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int e = i % 4 * 16 + 4 * j + 2 * h;
          w[j] = pack(o[i / 4][e] * inverse[h], o[i / 4][e + 1] * inverse[h]);
        }
        const uint4 out = transpose_quad(w[0], w[1], w[2], w[3]);
        if (head + 8 * h < a.heads)
          __stcs(reinterpret_cast<uint4*>(row + h * (8 * kLatent) + column), out);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ CUtensorMap map_q, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    for (int b = 0; b < kBuffers; ++b) {
      cuda::mbarrier_init(&s.full[b], 132);
      cuda::mbarrier_init(&s.free[b], 256);
      cuda::mbarrier_init(&s.go[b], 128);
    }
    for (int b = 0; b < 2; ++b) {
      cuda::mbarrier_init(&s.full_late[b], 128);
      cuda::mbarrier_init(&s.free_late[b], 256);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 3) {
    cuda::fewer_registers<32>();
    gather_tiles(&map_q, a, s);
  } else if (group == 0) {
    cuda::more_registers<160>();
    score_tiles(&map_q, a, s);
  } else {
    cuda::more_registers<160>();
    if (group == 1) add_values<0>(a, s);
    else add_values<1>(a, s);
  }
}

}  // namespace

void require_supported(const SparseMlaParams& p, const char* what) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run ") + what + " for Hopper (" + why +
                             ") choose another implementation");
}

}  // namespace dsa::sparse_mla_sm90

namespace dsa {

bool sm90_supports(const SparseMlaParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > 128) return no("the number of heads is not in 1 to 128");
  if (p.k < 64 || p.k > 4096 || p.k % 64) return no("the lists' width is not a multiple of 64 up to 4096");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 29)
    return no("more than 2^29 queries or 2^30 keys");
  if (p.q_stride % 8 || p.kv_stride % 8) return no("a stride of q or kv is not a multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(p.q) % 16 || reinterpret_cast<uintptr_t>(p.kv) % 16)
    return no("q or kv is not 16-byte aligned");
  return true;
}

void launch_sparse_mla_forward_sm90(const SparseMlaForwardParams& p) {
  using namespace sparse_mla_sm90;
  require_supported(p, "sparse_mla forward");
  if (reinterpret_cast<uintptr_t>(p.o) % 16)
    throw std::runtime_error(
        "cannot run sparse_mla forward for Hopper (o is not 16-byte aligned) choose another implementation");
  if (p.queries == 0) return;
  const int halves = (p.heads + kHeadBlock - 1) / kHeadBlock;
  const Arguments a{{p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)},
                    static_cast<int>(p.queries * halves),
                    p.heads,
                    halves,
                    static_cast<const char*>(p.kv),
                    p.kv_stride * 2,
                    p.scale * 1.4426950408889634f,
                    static_cast<__nv_bfloat16*>(p.o),
                    p.lse,
                    p.bad_entries};
  const CUtensorMap map_q = map_heads(p.q, p, p.q_stride, kDim);
  cuda::check(cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for sparse_mla forward");
  const int most = cuda::multiprocessors();
  forward<<<a.items < most ? a.items : most, kThreads, sizeof(Shared), p.stream>>>(map_q, a);
  cuda::check(cudaGetLastError(), "launch sparse_mla forward");
}

}  // namespace dsa
