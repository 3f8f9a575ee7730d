// See tiles.h. Written with 32-byte vectors and compiled for several instruction sets; the program picks one when it
// starts. A tile keeps 8 to 12 accumulators in registers: enough to hide the latency of the multiply-adds.
#include "kernels/gathered_rows/tiles.h"

#if defined(__x86_64__)
#define DSA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DSA_CLONES
#endif
#define DSA_INLINE inline __attribute__((always_inline))

namespace dsa::tiles {
namespace {

template <typename T>
struct Vector {
  static constexpr int64_t kLanes = 32 / sizeof(T);
  typedef T Type __attribute__((vector_size(32)));
  typedef T Loose __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));  // at any element
};

template <typename T>
DSA_INLINE void load(typename Vector<T>::Type& v, const T* from) {
  v = *reinterpret_cast<const typename Vector<T>::Loose*>(from);
}

// M heads x N list entries: M*N running vectors over the width, added up across lanes at the end.
template <int M, int N, typename T>
DSA_INLINE void dot_tile(const T* left, int64_t left_stride, const T* table, const List& list, int64_t i, int64_t width,
                         T* out, int64_t out_stride) {
  using V = Vector<T>;
  typename V::Type sum[M][N] = {}, a, b[N];
  const int64_t whole = width / V::kLanes * V::kLanes;
  for (int64_t c = 0; c < whole; c += V::kLanes) {
    for (int n = 0; n < N; ++n) load<T>(b[n], table + list.offset[i + n] + c);
    for (int m = 0; m < M; ++m) {
      load<T>(a, left + m * left_stride + c);
      for (int n = 0; n < N; ++n) sum[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      T total = 0;
      for (int64_t lane = 0; lane < V::kLanes; ++lane) total += sum[m][n][lane];
      for (int64_t c = whole; c < width; ++c) total += left[m * left_stride + c] * table[list.offset[i + n] + c];
      out[m * out_stride + list.place[i + n]] = total;
    }
  }
}

template <int N, typename T>
DSA_INLINE void dot_heads(const T* left, int64_t left_stride, int64_t heads, const T* table, const List& list, int64_t i,
                          int64_t width, T* out, int64_t out_stride) {
  int64_t m = 0;
  for (; m + 4 <= heads; m += 4) dot_tile<4, N>(left + m * left_stride, left_stride, table, list, i, width, out + m * out_stride, out_stride);
  for (; m < heads; ++m) dot_tile<1, N>(left + m * left_stride, left_stride, table, list, i, width, out + m * out_stride, out_stride);
}

// All heads for a few rows at a time: a row comes from memory once.
template <typename T>
DSA_INLINE void all_dots(const T* left, int64_t left_stride, int64_t heads, const T* table, const List& list,
                         int64_t width, T* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 3 <= list.n; i += 3) dot_heads<3>(left, left_stride, heads, table, list, i, width, out, out_stride);
  for (; i < list.n; ++i) dot_heads<1>(left, left_stride, heads, table, list, i, width, out, out_stride);
}

// M heads x N vectors of columns, over the list.
template <int M, int N, typename T>
DSA_INLINE void sum_tile(const T* weight, int64_t weight_stride, const T* table, const List& list, T* out,
                         int64_t out_stride) {
  using V = Vector<T>;
  typename V::Type sum[M][N] = {}, b[N];
  for (int64_t i = 0; i < list.n; ++i) {
    for (int n = 0; n < N; ++n) load<T>(b[n], table + list.offset[i] + n * V::kLanes);
    for (int m = 0; m < M; ++m) {
      const T w = weight[m * weight_stride + list.place[i]];
      for (int n = 0; n < N; ++n) sum[m][n] += w * b[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) *reinterpret_cast<typename V::Loose*>(out + m * out_stride + n * V::kLanes) = sum[m][n];
}

template <int N, typename T>
DSA_INLINE void sum_columns(const T* weight, int64_t weight_stride, int64_t heads, const T* table, const List& list,
                            T* out, int64_t out_stride) {
  int64_t m = 0;
  for (; m + 4 <= heads; m += 4) sum_tile<4, N>(weight + m * weight_stride, weight_stride, table, list, out + m * out_stride, out_stride);
  for (; m < heads; ++m) sum_tile<1, N>(weight + m * weight_stride, weight_stride, table, list, out + m * out_stride, out_stride);
}

template <typename T>
DSA_INLINE void all_sums(const T* weight, int64_t weight_stride, int64_t heads, const T* table, const List& list,
                         int64_t width, T* out, int64_t out_stride) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) sum_columns<2>(weight, weight_stride, heads, table + c, list, out + c, out_stride);
  for (; c + kLanes <= width; c += kLanes) sum_columns<1>(weight, weight_stride, heads, table + c, list, out + c, out_stride);
  for (; c < width; ++c) {
    for (int64_t m = 0; m < heads; ++m) {
      T total = 0;
      for (int64_t i = 0; i < list.n; ++i) total += weight[m * weight_stride + list.place[i]] * table[list.offset[i] + c];
      out[m * out_stride + c] = total;
    }
  }
}

// K list entries x N vectors of columns, over the heads; then one addition to each row.
template <int K, int N, typename T>
DSA_INLINE void update_tile(const T* left, int64_t left_stride, int64_t heads, const T* right, int64_t right_stride,
                            const List& list, int64_t i, T* table) {
  using V = Vector<T>;
  typename V::Type sum[K][N] = {}, b[N];
  for (int64_t m = 0; m < heads; ++m) {
    for (int n = 0; n < N; ++n) load<T>(b[n], right + m * right_stride + n * V::kLanes);
    for (int k = 0; k < K; ++k) {
      const T w = left[m * left_stride + list.place[i + k]];
      for (int n = 0; n < N; ++n) sum[k][n] += w * b[n];
    }
  }
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) *reinterpret_cast<typename V::Loose*>(table + list.offset[i + k] + n * V::kLanes) += sum[k][n];
}

template <int N, typename T>
DSA_INLINE void update_columns(const T* left, int64_t left_stride, int64_t heads, const T* right, int64_t right_stride,
                               const List& list, T* table) {
  int64_t i = 0;
  for (; i + 4 <= list.n; i += 4) update_tile<4, N>(left, left_stride, heads, right, right_stride, list, i, table);
  for (; i < list.n; ++i) update_tile<1, N>(left, left_stride, heads, right, right_stride, list, i, table);
}

template <typename T>
DSA_INLINE void all_updates(const T* left, int64_t left_stride, int64_t heads, const T* right, int64_t right_stride,
                            const List& list, int64_t width, T* table) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) update_columns<2>(left, left_stride, heads, right + c, right_stride, list, table + c);
  for (; c + kLanes <= width; c += kLanes) update_columns<1>(left, left_stride, heads, right + c, right_stride, list, table + c);
  for (; c < width; ++c) {
    for (int64_t i = 0; i < list.n; ++i) {
      T total = 0;
      for (int64_t m = 0; m < heads; ++m) total += left[m * left_stride + list.place[i]] * right[m * right_stride + c];
      table[list.offset[i] + c] += total;
    }
  }
}

}  // namespace

DSA_CLONES void dots(const float* left, int64_t left_stride, int64_t heads, const float* table, const List& list,
                     int64_t width, float* out, int64_t out_stride) {
  all_dots(left, left_stride, heads, table, list, width, out, out_stride);
}
DSA_CLONES void dots(const double* left, int64_t left_stride, int64_t heads, const double* table, const List& list,
                     int64_t width, double* out, int64_t out_stride) {
  all_dots(left, left_stride, heads, table, list, width, out, out_stride);
}
DSA_CLONES void sums(const float* weight, int64_t weight_stride, int64_t heads, const float* table, const List& list,
                     int64_t width, float* out, int64_t out_stride) {
  all_sums(weight, weight_stride, heads, table, list, width, out, out_stride);
}
DSA_CLONES void sums(const double* weight, int64_t weight_stride, int64_t heads, const double* table, const List& list,
                     int64_t width, double* out, int64_t out_stride) {
  all_sums(weight, weight_stride, heads, table, list, width, out, out_stride);
}
DSA_CLONES void updates(const float* left, int64_t left_stride, int64_t heads, const float* right, int64_t right_stride,
                        const List& list, int64_t width, float* table) {
  all_updates(left, left_stride, heads, right, right_stride, list, width, table);
}
DSA_CLONES void updates(const double* left, int64_t left_stride, int64_t heads, const double* right,
                        int64_t right_stride, const List& list, int64_t width, double* table) {
  all_updates(left, left_stride, heads, right, right_stride, list, width, table);
}

}  // namespace dsa::tiles
