// SPDX-License-Identifier: Apache-2.0
// Products with the narrow factors of an adapter, which lie in panels: [panels, cols, kPanel], lanes are rows.
//
// An output is a chain of fma in the order of columns; of more than 128 columns, the sum in order of four such chains over
// quarters of them, which one row of activations computes side by side and a tile of rows one after the other. So panels
// stream through once, nothing is transposed, and the bits are the same in any company.
#pragma once

namespace gk::GK_NS {

constexpr int64_t kChain = 128;  // columns of a sum that is one chain

GK_INLINE int64_t chain_of(int64_t cols) { return cols <= kChain ? cols : (cols + 3) / 4; }

template <bool Half>
GK_INLINE vf panel_floats(const uint8_t* panel, int64_t at) {  // at: in elements
  if constexpr (!Half) return loadf((const float*)panel + at);
  typedef uint16_t halves_of_vf __attribute__((vector_size(GK_VF * 2)));
  return (vf)(__builtin_convertvector(load<halves_of_vf>(panel + 2 * at), vu) << 16);
}

template <bool Half, int Chains>
GK_INLINE void chain_step(const uint8_t* panel, const float* x, int64_t chain, int64_t c, vf (&acc)[4][2]) {
  for (int i = 0; i < Chains; ++i) {
    const int64_t at = i * chain + c;
    const vf v = splat(x[at]);
    for (int n = 0; n < 2; ++n) acc[i][n] = fma(panel_floats<Half>(panel, at * kPanel + n * GK_VF), v, acc[i][n]);
  }
}

template <bool Half>
GK_INLINE void row_sums(const uint8_t* panel, int64_t cols, const float* x, float* total) {  // total [kPanel]
  const int64_t chain = chain_of(cols);
  vf acc[4][2] = {};
  if (chain == cols) {
    for (int64_t c = 0; c < cols; ++c) chain_step<Half, 1>(panel, x, 0, c, acc);
  } else {
    const int64_t last = cols - 3 * chain;  // of the fourth quarter, which may be shorter
    for (int64_t c = 0; c < last; ++c) chain_step<Half, 4>(panel, x, chain, c, acc);
    for (int64_t c = last; c < chain; ++c) chain_step<Half, 3>(panel, x, chain, c, acc);
    for (int n = 0; n < 2; ++n) acc[0][n] = ((acc[0][n] + acc[1][n]) + acc[2][n]) + acc[3][n];
  }
  for (int n = 0; n < 2; ++n) store(total + n * GK_VF, acc[0][n]);
}

template <bool Half, int M>
static __attribute__((noinline)) void tile_sums(const uint8_t* panel, int64_t cols, const float* x, int64_t ldx,
                                                float* total) {  // total [M, kPanel]
  const int64_t chain = chain_of(cols);
  for (int64_t c0 = 0; c0 < cols; c0 += chain) {
    const int64_t c1 = c0 + chain < cols ? c0 + chain : cols;
    vf acc[M][2] = {};
    for (int64_t c = c0; c < c1; ++c) {
      const vf w0 = panel_floats<Half>(panel, c * kPanel), w1 = panel_floats<Half>(panel, c * kPanel + GK_VF);
      for (int t = 0; t < M; ++t) {
        const vf v = splat(x[t * ldx + c]);
        acc[t][0] = fma(w0, v, acc[t][0]), acc[t][1] = fma(w1, v, acc[t][1]);
      }
    }
    for (int t = 0; t < M; ++t)
      for (int n = 0; n < 2; ++n) {
        float* at = total + t * kPanel + n * GK_VF;
        store(at, c0 ? loadf(at) + acc[t][n] : acc[t][n]);
      }
  }
}
template <bool Half, int M = kTile>
static void any_tile_sums(int count, const uint8_t* panel, int64_t cols, const float* x, int64_t ldx, float* total) {
  if (count == M) return tile_sums<Half, M>(panel, cols, x, ldx, total);
  if constexpr (M > 2) any_tile_sums<Half, M - 1>(count, panel, cols, x, ldx, total);
  else row_sums<Half>(panel, cols, x, total);
}

// y = factor * total, or y += total without factors.
GK_INLINE void put_sums(const float* total, const float* factor, int64_t count, float* y) {
  if (count == kPanel)
    for (int n = 0; n < kPanel; n += GK_VF)
      store(y + n, factor ? loadf(total + n) * loadf(factor + n) : loadf(y + n) + loadf(total + n));
  else
    for (int64_t i = 0; i < count; ++i) y[i] = factor ? total[i] * factor[i] : y[i] + total[i];
}

template <bool Half>
static void panel_product(const Panels* w, int64_t r0, int64_t r1, const float* x, int64_t ldx, int64_t m,
                          const float* factor, float* y, int64_t ldy) {
  for (int64_t r = r0; r < r1; r += kPanel) {
    const uint8_t* panel = w->data + r * w->cols * (Half ? 2 : 4);
    const int64_t count = r1 - r < kPanel ? r1 - r : kPanel;
    alignas(64) float total[kTile * kPanel];
    for (int64_t t = 0; t < m; t += kTile) {
      const int size = m - t < kTile ? (int)(m - t) : kTile;
      any_tile_sums<Half>(size, panel, w->cols, x + t * ldx, ldx, total);
      for (int i = 0; i < size; ++i)
        put_sums(total + i * kPanel, factor ? factor + r : nullptr, count, y + (t + i) * ldy + r);
    }
  }
}

static void low_rank(const Panels* w, int64_t r0, int64_t r1, const float* x, int64_t ldx, int64_t m,
                     const float* factor, float* y, int64_t ldy) {
  if (w->half) panel_product<true>(w, r0, r1, x, ldx, m, factor, y, ldy);
  else panel_product<false>(w, r0, r1, x, ldx, m, factor, y, ldy);
}

}  // namespace gk::GK_NS
