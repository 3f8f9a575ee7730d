#include "tests/kernels/cuda/indexer_backward_reference.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"

namespace dsa::test {
namespace {

constexpr int kDim = 128;  // and threads of a block

struct Inputs {
  const __nv_bfloat16* q;
  int64_t q_stride;
  const __nv_bfloat16* k;
  int64_t k_stride;
  const float* w;
  int64_t w_stride;
  int heads;
  int64_t queries, keys;

  __device__ double value(const __nv_bfloat16* x) const { return __bfloat162float(*x); }
  __device__ double dot(const double* a, const __nv_bfloat16* b) const {
    double x = 0;
    for (int c = 0; c < kDim; ++c) x += a[c] * value(b + c);
    return x;
  }
};

struct Dense {
  const float* d;
  int64_t stride, keys;
  const int32_t *start, *end;

  __device__ int64_t first(int64_t t) const { return start ? max(start[t], 0) : 0; }
  __device__ int64_t last(int64_t t) const { return end ? min(int64_t{end[t]}, keys) : keys; }
  __device__ int64_t key(int64_t, int64_t i) const { return i; }
  __device__ double gradient(int64_t t, int64_t i) const { return d[t * stride + i]; }
};

struct Selected {
  const double* d;  // [T,K]
  const int32_t* indices;
  int64_t stride, keys;
  const int32_t* lengths;
  int k;

  __device__ int64_t first(int64_t) const { return 0; }
  __device__ int64_t last(int64_t t) const { return lengths ? min(max(lengths[t], 0), k) : k; }
  __device__ int64_t key(int64_t t, int64_t i) const {
    const int32_t* row = indices + t * stride;
    return row[i] >= 0 && row[i] < keys && (i == 0 || row[i] > row[i - 1]) ? row[i] : -1;
  }
  __device__ double gradient(int64_t t, int64_t i) const { return d[t * k + i]; }
};

// One block a (query, head); with kKeys also dk by atomics.
template <bool kKeys, class Gradient>
__global__ void query_gradients(const Inputs in, const Gradient g, const ReferenceGradients out) {
  __shared__ double q[kDim], m[kDim], sums[kDim];
  __shared__ int64_t key[kDim];
  const int64_t t = blockIdx.x / in.heads;
  const int j = blockIdx.x % in.heads, c = threadIdx.x;
  const double w = in.w[t * in.w_stride + j];
  q[c] = in.value(in.q + t * in.q_stride + j * kDim + c);
  double dq = 0, dw = 0;
  const int64_t last = g.last(t);
  for (int64_t i = g.first(t); i < last; i += kDim) {
    __syncthreads();
    m[c] = 0, key[c] = -1;
    if (i + c < last) {
      const int64_t s = g.key(t, i + c);
      if (s >= 0) {
        const double score = in.dot(q, in.k + s * in.k_stride);
        key[c] = s;
        if (score > 0) m[c] = g.gradient(t, i + c), dw += m[c] * score;
      }
    }
    __syncthreads();
    for (int n = 0; n < kDim; ++n)
      if (key[n] >= 0) {
        dq += m[n] * in.value(in.k + key[n] * in.k_stride + c);
        if (kKeys && m[n] != 0) atomicAdd(out.dk + key[n] * kDim + c, m[n] * w * q[c]);
      }
  }
  out.dq[(t * in.heads + j) * kDim + c] = w * dq;
  sums[c] = dw;
  __syncthreads();
  if (c == 0) {
    double sum = 0;
    for (int n = 0; n < kDim; ++n) sum += sums[n];
    out.dw[t * in.heads + j] = sum;
  }
}

// One block a key.
__global__ void key_gradients(const Inputs in, const Dense g, double* dk) {
  __shared__ double k[kDim], m[kDim];
  const int64_t s = blockIdx.x;
  const int c = threadIdx.x;
  k[c] = in.value(in.k + s * in.k_stride + c);
  double sum = 0;
  for (int64_t i = 0; i < in.queries * in.heads; i += kDim) {
    __syncthreads();
    m[c] = 0;
    const int64_t t = (i + c) / in.heads, j = (i + c) % in.heads;
    if (t < in.queries && s >= g.first(t) && s < g.last(t) && in.dot(k, in.q + t * in.q_stride + j * kDim) > 0)
      m[c] = g.gradient(t, s) * in.w[t * in.w_stride + j];
    __syncthreads();
    for (int n = 0; n < kDim; ++n)
      if (m[n] != 0) sum += m[n] * in.value(in.q + (i + n) / in.heads * in.q_stride + (i + n) % in.heads * kDim + c);
  }
  dk[s * kDim + c] = sum;
}

// One block a row: I of the entries that count, NaN elsewhere.
__global__ void selected_scores(const IndexerKlSparseParams p, const Inputs in, const Selected g, float* scores) {
  const int64_t t = blockIdx.x, last = g.last(t);
  for (int64_t i = threadIdx.x; i < p.k; i += blockDim.x) {
    const int64_t s = i < last ? g.key(t, i) : -1;
    double score = 0;
    for (int j = 0; s >= 0 && j < p.heads; ++j) {
      double x = 0;
      for (int c = 0; c < kDim; ++c) x += in.value(in.q + t * in.q_stride + j * kDim + c) * in.value(in.k + s * in.k_stride + c);
      if (x > 0) score += x * in.w[t * in.w_stride + j];
    }
    scores[t * p.scores_stride + i] = s >= 0 ? static_cast<float>(score) : NAN;
  }
}

// One block a row: softmax, loss, dI.
__global__ void selected_loss(const IndexerKlSparseParams p, const Selected g, double* rows, double* d) {
  __shared__ double most, sum, total[3];
  __shared__ int counted;
  const int64_t t = blockIdx.x, last = g.last(t);
  double* row = d + t * p.k;
  for (int64_t i = threadIdx.x; i < p.k; i += blockDim.x) {
    row[i] = i < last && g.key(t, i) >= 0 ? p.scores[t * p.scores_stride + i] : 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    most = -INFINITY, sum = 0, counted = 0;
    for (int64_t i = 0; i < last; ++i)
      if (g.key(t, i) >= 0) most = fmax(most, row[i]), ++counted;
    for (int64_t i = 0; i < last; ++i)
      if (g.key(t, i) >= 0) sum += exp(row[i] - most);
    total[0] = total[1] = total[2] = 0;
    const double lse = most + log(sum), scale = double{p.loss_scale} * (p.row_weight ? p.row_weight[t] : 1);
    for (int64_t i = 0; i < last; ++i) {
      if (g.key(t, i) < 0) continue;
      const double target = p.p_sel[t * p.p_stride + i], log_pi = row[i] - lse, pi = exp(log_pi);
      if (counted < 2) {
        row[i] = 0;
        continue;
      }
      if (target > 0) total[0] += target * (log(target) - log_pi), total[1] -= target * log(target);
      total[2] -= pi * log_pi;
      row[i] = scale * (pi - target);
    }
    for (int i = 0; i < 3; ++i) rows[3 * t + i] = total[i];
  }
}

template <class P>
Inputs inputs_of(const P& p, const void* k) {
  return {static_cast<const __nv_bfloat16*>(p.q), p.q_stride, static_cast<const __nv_bfloat16*>(k), p.k_stride, p.w, p.w_stride,
          p.heads, p.queries, p.keys};
}

void finish(const char* what) {
  cuda::check(cudaGetLastError(), what);
  cuda::check(cudaDeviceSynchronize(), what);
}

}  // namespace

void reference_indexer_backward(const IndexerBackwardParams& p, const ReferenceGradients& out) {
  const Inputs in = inputs_of(p, p.k);
  const Dense g{p.d_logits, p.d_logits_stride, p.keys, p.start, p.end};
  query_gradients<false><<<static_cast<int>(p.queries * p.heads), kDim>>>(in, g, out);
  key_gradients<<<static_cast<int>(p.keys), kDim>>>(in, g, out.dk);
  finish("run the reference gradients");
}

void reference_indexer_scores(const IndexerKlSparseParams& p, float* scores) {
  selected_scores<<<static_cast<int>(p.queries), 256>>>(p, inputs_of(p, p.key), {nullptr, p.indices, p.indices_stride, p.keys, p.lengths, p.k},
                                                        scores);
  finish("run the reference scores");
}

void reference_indexer_kl_sparse(const IndexerKlSparseParams& p, const ReferenceGradients& out, double* rows, double* d) {
  const Inputs in = inputs_of(p, p.key);
  const Selected g{d, p.indices, p.indices_stride, p.keys, p.lengths, p.k};
  cuda::check(cudaMemset(out.dk, 0, p.keys * kDim * sizeof(double)), "clear the reference's dk");
  selected_loss<<<static_cast<int>(p.queries), 256>>>(p, g, rows, d);
  query_gradients<true><<<static_cast<int>(p.queries * p.heads), kDim>>>(in, g, out);
  finish("run the reference loss");
}

}  // namespace dsa::test
