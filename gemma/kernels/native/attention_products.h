// SPDX-License-Identifier: Apache-2.0
// The two products inside attention, as register tiles over rows of pointers: scores = q k^T with lanes along H, and
// sums += p v with lanes along H. Which tile computes an output changes none of its bits: a score always adds the same
// lanes in the same order, a sum always takes its keys one after the other. attention.h puts them together.
#pragma once
#include "attention_layout.h"
#include "vector_math.h"

namespace gk::GK_NS {

#if defined(GK_AVX512) || defined(GK_NEON)
constexpr int kScoreRows = 4, kValueColumns = 4;  // 32 registers
#else
constexpr int kScoreRows = 3, kValueColumns = 2;  // 16 registers: 12 sums, what they are made of, and one more
#endif
constexpr int64_t kRowsNear = 12;  // query rows that stay in the first cache beside four keys

// s[r, c] = sum over h < n of q[r, h] k[c][h] for R rows and C keys; R x C is padded to whole quads.
template <class T, int R, int C>
static void score_tile(const float* q, int64_t width, const T* const* keys, int64_t n, float* s) {
  constexpr int kSums = (R * C + 3) / 4 * 4;
  const T* k[C];
  for (int c = 0; c < C; ++c) k[c] = keys[c];
  vf sum[kSums] = {};
  for (int64_t h = 0; h < n; h += GK_VF) {
    vf x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = loadf(q + r * width + h);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      vf y = load_as_float(k[c] + h);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * C + c] = fma(x[r], y, sum[r * C + c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) {
    quad four = lane_sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    if constexpr (C == 4) {
      memcpy(s + i / 4 * kScoreRow, &four, 16);
    } else {
      for (int j = 0; j < 4 && i + j < R * C; ++j) s[(i + j) / C * kScoreRow + (i + j) % C] = four[j];
    }
  }
}

// Four keys from `keys` on against rows 0..rows.
template <class T>
static void score_rows(const float* q, int64_t rows, int64_t width, const T* const* keys, int64_t n, float* s) {
  int64_t r = 0;
  for (; rows - r >= kScoreRows && rows - r != 4; r += kScoreRows) {
    score_tile<T, kScoreRows, 4>(q + r * width, width, keys, n, s + r * kScoreRow);
  }
  q += r * width;
  s += r * kScoreRow;
  if (rows - r == 1) score_tile<T, 1, 4>(q, width, keys, n, s);
  if (rows - r == 2) score_tile<T, 2, 4>(q, width, keys, n, s);
  if (rows - r == 3) score_tile<T, 3, 4>(q, width, keys, n, s);
  if (rows - r == 4) {
    if constexpr (kScoreRows == 4) {
      score_tile<T, 4, 4>(q, width, keys, n, s);
    } else {
      score_tile<T, 4, 2>(q, width, keys, n, s);
      score_tile<T, 4, 2>(q, width, keys + 2, n, s + 2);
    }
  }
}

// Scores of rows against keys j0..j1 (up to three more are computed, so `keys` must have them).
template <class T>
static void scores(const float* q, int64_t rows, int64_t width, const T* const* keys, int64_t j0, int64_t j1, int64_t n,
                   float* s) {
  for (int64_t r = 0; r < rows; r += kRowsNear) {
    for (int64_t j = j0; j < j1; j += 4) {
      score_rows(q + r * width, smaller(kRowsNear, rows - r), width, keys + j, n, s + r * kScoreRow + j);
    }
  }
}

// sums[r, h..] += sum over j of p[r, j] v[j][h..] for R rows and C vectors, in the order of j.
template <class T, int R, int C>
static void value_tile(const float* p, const T* const* values, int64_t j0, int64_t j1, int64_t h, float* sums,
                       int64_t width) {
  vf sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = loadf(sums + r * width + h + c * GK_VF);
  }
  for (int64_t j = j0; j < j1; ++j) {
    const T* v = values[j] + h;
    vf y[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[c] = load_as_float(v + c * GK_VF);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf x = splat(p[r * kScoreRow + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = fma(x, y[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) gk::GK_NS::store(sums + r * width + h + c * GK_VF, sum[r][c]);
  }
}

// R rows over all of n columns.
template <class T, int R>
static void value_rows(const float* p, const T* const* values, int64_t j0, int64_t j1, int64_t n, float* sums,
                       int64_t width) {
  constexpr int C = R == 1 ? 8 : R <= 3 ? 4 : kValueColumns;
  int64_t h = 0;
  for (; h + C * GK_VF <= n; h += C * GK_VF) value_tile<T, R, C>(p, values, j0, j1, h, sums, width);
  for (; h < n; h += GK_VF) value_tile<T, R, 1>(p, values, j0, j1, h, sums, width);
}

template <class T>
static void weighted_values(const float* p, int64_t rows, const T* const* values, int64_t j0, int64_t j1, int64_t n,
                            float* sums, int64_t width) {
  for (int64_t r = 0; r < rows;) {
    const float* x = p + r * kScoreRow;
    float* y = sums + r * width;
    int64_t left = rows - r, step = left == 8 ? 4 : smaller(left, 6);
    switch (step) {
      case 1: value_rows<T, 1>(x, values, j0, j1, n, y, width); break;
      case 2: value_rows<T, 2>(x, values, j0, j1, n, y, width); break;
      case 3: value_rows<T, 3>(x, values, j0, j1, n, y, width); break;
      case 4: value_rows<T, 4>(x, values, j0, j1, n, y, width); break;
      case 5: value_rows<T, 5>(x, values, j0, j1, n, y, width); break;
      default: value_rows<T, 6>(x, values, j0, j1, n, y, width); break;
    }
    r += step;
  }
}

}  // namespace gk::GK_NS
