// Register tiles of the three products of gathered_rows.h for one query row, on raw pointers.
// A list holds the table rows (as element offsets) and the list places that are in use.
#pragma once

#include <cstdint>

namespace dsa::tiles {

struct List {
  const int64_t* offset;  ///< [n] first element of the row in the table
  const int64_t* place;   ///< [n] its place in the index list
  int64_t n;
};

/// out[m * out_stride + place[i]] = left[m * left_stride + :] . table[offset[i] + :], width elements.
void dots(const float* left, int64_t left_stride, int64_t heads, const float* table, const List& list, int64_t width,
          float* out, int64_t out_stride);
void dots(const double* left, int64_t left_stride, int64_t heads, const double* table, const List& list, int64_t width,
          double* out, int64_t out_stride);

/// out[m * out_stride + c] = sum_i weight[m * weight_stride + place[i]] * table[offset[i] + c], c < width.
void sums(const float* weight, int64_t weight_stride, int64_t heads, const float* table, const List& list, int64_t width,
          float* out, int64_t out_stride);
void sums(const double* weight, int64_t weight_stride, int64_t heads, const double* table, const List& list,
          int64_t width, double* out, int64_t out_stride);

/// table[offset[i] + c] += sum_m left[m * left_stride + place[i]] * right[m * right_stride + c], c < width.
void updates(const float* left, int64_t left_stride, int64_t heads, const float* right, int64_t right_stride,
             const List& list, int64_t width, float* table);
void updates(const double* left, int64_t left_stride, int64_t heads, const double* right, int64_t right_stride,
             const List& list, int64_t width, double* table);

}  // namespace dsa::tiles
