// SPDX-License-Identifier: Apache-2.0
// Products with float weights (F32, F16, BF16, SFP8), rows as floats, the gradient, and the table's `matmul`.
//
// An output is the sum, in order, of partial sums over 256 columns, each a chain of fma in the order of columns. `few`
// transposes small squares of rows in registers, so that lanes are rows and a stream of rows keeps that order; `many`
// widens a panel once. SFP8 is multiplied by its one scale at the end.
#pragma once

namespace gk::GK_NS {

constexpr int kSpan = 256;  // columns of a partial sum

template <int Type>
constexpr int kBytesOf = Type == GK_F32 ? 4 : Type == GK_SFP8 ? 1 : 2;

GK_INLINE df sfp8(di code) {
  const di low = code & 127, large = low >= 64;  // -1 where the mantissa has three bits
  di bits = (large & ((low << 20) + (112 << 23))) | (~large & ((low << 21) + (104 << 23)));
  bits = (bits | ((code & 128) << 24)) & ~(low == 0);
  return (df)bits;
}
template <int Type>
GK_INLINE df load_floats(const uint8_t* p) {  // kLanes of them
  if constexpr (Type == GK_F32) return load<df>(p);
  if constexpr (Type == GK_F16) {
    uint16_t h[kLanes];
    memcpy(h, p, sizeof h);
    return halves(h);
  }
  if constexpr (Type == GK_BF16) return (df)(widen_u16(p) << 16);
  return sfp8(widen_u8(p));
}
template <int Type>
GK_INLINE df load_some(const uint8_t* p, int64_t n) {  // n of them, then zeros
  uint8_t padded[kLanes * 4] = {};
  memcpy(padded, p, n * kBytesOf<Type>);
  return load_floats<Type>(padded);
}

template <int Type>
GK_INLINE void load_square(const uint8_t* const* rows, int64_t offset, int64_t n, df* columns) {
  df lines[kLanes];
  if (n >= kLanes)
    for (int i = 0; i < kLanes; ++i) lines[i] = load_floats<Type>(rows[i] + offset);
  else
    for (int i = 0; i < kLanes; ++i) lines[i] = load_some<Type>(rows[i] + offset, n);
  transpose(lines, columns);
}

template <int Type, int M>
static void few_floats(const gk_weight* w, int64_t r0, int64_t r1, const float* const* x, float* y, int64_t ldy) {
  constexpr int kRows = 2 * kLanes;
  for (int64_t r = r0; r < r1; r += kRows) {
    const uint8_t* rows[kRows];
    const int64_t count = r1 - r < kRows ? r1 - r : kRows;
    for (int i = 0; i < kRows; ++i) rows[i] = w->data + (i < count ? r + i : r) * w->row_bytes;
    df total[M][2] = {};
    for (int64_t c0 = 0; c0 < w->cols; c0 += kSpan) {
      const int64_t c1 = c0 + kSpan < w->cols ? c0 + kSpan : w->cols;
      df acc[M][2] = {};
      for (int64_t c = c0; c < c1; c += kLanes) {
        df columns[2][kLanes];
        for (int n = 0; n < 2; ++n) {
          load_square<Type>(rows + n * kLanes, c * kBytesOf<Type>, c1 - c, columns[n]);
          if (c * kBytesOf<Type> % 64 == 0)
            for (int i = 0; i < kLanes; ++i)
              __builtin_prefetch(rows[n * kLanes + i] + kRows * w->row_bytes + c * kBytesOf<Type>);
        }
        const int64_t left = c1 - c < kLanes ? c1 - c : kLanes;
        for (int j = 0; j < left; ++j)
          for (int t = 0; t < M; ++t)
            for (int n = 0; n < 2; ++n) acc[t][n] = fma(columns[n][j], splatd(x[t][c + j]), acc[t][n]);
      }
      for (int t = 0; t < M; ++t)
        for (int n = 0; n < 2; ++n) total[t][n] += acc[t][n];
    }
    const float factor = Type == GK_SFP8 ? w->scale[0] : 1.0f;
    for (int t = 0; t < M; ++t)
      for (int i = 0; i < count; ++i) y[t * ldy + r + i] = total[t][i / kLanes][i % kLanes] * factor;
  }
}

template <int M>
static __attribute__((noinline)) void float_tile(const float* panel, int64_t c0, int64_t c1, const float* const* x,
                                                 float* total) {
  vf acc[M][2] = {};
  for (int64_t c = c0; c < c1; ++c, panel += kPanel) {
    const vf w0 = loadf(panel), w1 = loadf(panel + GK_VF);
    for (int t = 0; t < M; ++t) {
      const vf v = splat(x[t][c]);
      acc[t][0] = fma(w0, v, acc[t][0]), acc[t][1] = fma(w1, v, acc[t][1]);
    }
  }
  for (int t = 0; t < M; ++t)
    for (int n = 0; n < 2; ++n) store(total + t * kPanel + n * GK_VF, loadf(total + t * kPanel + n * GK_VF) + acc[t][n]);
}
template <int M = kTile>
static void float_tiles(int count, const float* panel, int64_t c0, int64_t c1, const float* const* x, float* total) {
  if (count == M) return float_tile<M>(panel, c0, c1, x, total);
  if constexpr (M > 1) float_tiles<M - 1>(count, panel, c0, c1, x, total);
}

template <int Type>
static void many_floats(const gk_weight* w, int64_t r0, int64_t r1, const float* const* x, int64_t m, float* y,
                        int64_t ldy, float* panel) {
  const float factor = Type == GK_SFP8 ? w->scale[0] : 1.0f;
  for (int64_t r = r0; r < r1; r += kPanel) {
    const int64_t count = r1 - r < kPanel ? r1 - r : kPanel;
    for (int64_t c0 = 0; c0 < w->cols; c0 += kSpan) {
      const int64_t c1 = c0 + kSpan < w->cols ? c0 + kSpan : w->cols;
      for (int first = 0; first < kPanel; first += kLanes) {
        const uint8_t* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = w->data + (first + i < count ? r + first + i : r) * w->row_bytes;
        for (int64_t c = c0; c < c1; c += kLanes) {
          df columns[kLanes];
          load_square<Type>(rows, c * kBytesOf<Type>, c1 - c, columns);
          for (int j = 0; j < kLanes && c + j < c1; ++j) store(panel + (c - c0 + j) * kPanel + first, columns[j]);
        }
      }
      for (int64_t t = 0; t < m; t += kTile) {
        const int size = m - t < kTile ? (int)(m - t) : kTile;
        alignas(64) float total[kTile * kPanel] = {};
        if (c0)
          for (int i = 0; i < size; ++i) memcpy(total + i * kPanel, y + (t + i) * ldy + r, count * sizeof(float));
        float_tiles(size, panel, c0, c1, x + t, total);
        if (c1 == w->cols)
          for (int i = 0; i < size * kPanel; ++i) total[i] *= factor;
        for (int i = 0; i < size; ++i) memcpy(y + (t + i) * ldy + r, total + i * kPanel, count * sizeof(float));
      }
    }
  }
}

template <int Type>
static void float_product(const gk_weight* w, int64_t r0, int64_t r1, const float* const* x, int64_t m, float* y,
                          int64_t ldy, void* scratch) {
  switch (m) {
    case 1: return few_floats<Type, 1>(w, r0, r1, x, y, ldy);
    case 2: return few_floats<Type, 2>(w, r0, r1, x, y, ldy);
    case 3: return few_floats<Type, 3>(w, r0, r1, x, y, ldy);
    case 4: return few_floats<Type, 4>(w, r0, r1, x, y, ldy);
    default: return many_floats<Type>(w, r0, r1, x, m, y, ldy, (float*)scratch);
  }
}

// ---- the table's entries ---------------------------------------------------------------------------------------

static void matmul(const gk_weight* w, int64_t r0, int64_t r1, const QuantizedRow* q, const float* const* x, int64_t m,
                   float* y, int64_t ldy, void* scratch) {
  switch (w->type) {
    case GK_F32: return float_product<GK_F32>(w, r0, r1, x, m, y, ldy, scratch);
    case GK_F16: return float_product<GK_F16>(w, r0, r1, x, m, y, ldy, scratch);
    case GK_BF16: return float_product<GK_BF16>(w, r0, r1, x, m, y, ldy, scratch);
    case GK_SFP8: return float_product<GK_SFP8>(w, r0, r1, x, m, y, ldy, scratch);
  }
  with_format(w->type, [&](auto format) {
    integer_product<decltype(format)>(w, r0, r1, q, m, y, ldy, scratch);
  });
}
static size_t matmul_scratch(const gk_weight*, int64_t) {
  const size_t pairs = (size_t)kDepth / 2 * kPanel * 4, factors = 2 * (size_t)kDepth / 16 * kPanel * 4;
  const size_t gradient = 64 * (size_t)kSpan * 4, floats = (size_t)kSpan * kPanel * 4;
  const size_t panel = pairs + factors + 64;  // the last lanes of a panel are stored past its end, see fill_panel
  const size_t most = panel > gradient ? panel : gradient;
  return most > floats ? most : floats;
}

template <int Type>
static void widen(const uint8_t* row, int64_t c0, int64_t c1, float* out) {
  constexpr int size = kBytesOf<Type>;
  int64_t c = c0;
  for (; c + kLanes <= c1; c += kLanes) store(out + c - c0, load_floats<Type>(row + c * size));
  if (c < c1) {
    const df rest = load_some<Type>(row + c * size, c1 - c);
    memcpy(out + c - c0, &rest, (c1 - c) * sizeof(float));
  }
}

// Columns c0..c1 of a row as floats, c0 a multiple of 256; equal to gemma.quants bit for bit.
static void row_floats(const gk_weight* w, int64_t row, int64_t c0, int64_t c1, float* out) {
  const uint8_t* data = w->data + row * w->row_bytes;
  switch (w->type) {
    case GK_F32: return widen<GK_F32>(data, c0, c1, out);
    case GK_F16: return widen<GK_F16>(data, c0, c1, out);
    case GK_BF16: return widen<GK_BF16>(data, c0, c1, out);
    case GK_SFP8:
      widen<GK_SFP8>(data, c0, c1, out);
      for (int64_t c = 0; c < c1 - c0; ++c) out[c] *= w->scale[0];
      return;
  }
  with_format(w->type, [&](auto format) {
    using F = decltype(format);
    constexpr int n = F::kElements / F::kWidth;
    for (int64_t c = c0; c < c1; c += F::kElements) {
      const uint8_t* block = data + c / F::kElements * F::kBytes;
      uint8_t padded[kBlock] = {};
      if (F::kBytes == 32 && c + kBlock > w->cols) memcpy(padded, block, w->cols - c), block = padded;
      float scale[n], minimum[n] = {};
      F::factors(block, w->scale ? w->scale[row] : 0.0f, scale, minimum);
      for (int g = 0; g < F::kElements / kBlock; ++g) {
        const Codes codes = F::codes(block, g);
        uint8_t bytes[kBlock];
        memcpy(bytes, &codes, kBlock);
        for (int i = 0; i < kBlock && c + g * kBlock + i < c1; ++i) {
          const float value = F::kSigned ? (float)(int8_t)bytes[i] : (float)bytes[i];
          const int at = (g * kBlock + i) / F::kWidth;
          out[c - c0 + g * kBlock + i] = F::kMinimum ? value * scale[at] - minimum[at] : value * scale[at];
        }
      }
    }
  });
}
static void rows(const gk_weight* w, const int32_t* ids, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) row_floats(w, ids[i], 0, w->cols, out + i * w->cols);
}

template <int M>
static __attribute__((noinline)) void grad_tile(const float* square, int64_t rows, int64_t width, const float* dy,
                                                int64_t lddy, float* dx, int64_t lddx) {
  int64_t c = 0;
  for (; c + 2 * GK_VF <= width; c += 2 * GK_VF) {
    vf acc[M][2];
    for (int t = 0; t < M; ++t)
      for (int n = 0; n < 2; ++n) acc[t][n] = loadf(dx + t * lddx + c + n * GK_VF);
    for (int64_t r = 0; r < rows; ++r) {
      const vf w0 = loadf(square + r * kSpan + c), w1 = loadf(square + r * kSpan + c + GK_VF);
      for (int t = 0; t < M; ++t) {
        const vf v = splat(dy[t * lddy + r]);
        acc[t][0] = fma(w0, v, acc[t][0]), acc[t][1] = fma(w1, v, acc[t][1]);
      }
    }
    for (int t = 0; t < M; ++t)
      for (int n = 0; n < 2; ++n) store(dx + t * lddx + c + n * GK_VF, acc[t][n]);
  }
  for (; c < width; ++c)
    for (int t = 0; t < M; ++t) {
      float sum = dx[t * lddx + c];
      for (int64_t r = 0; r < rows; ++r) sum = __builtin_fmaf(square[r * kSpan + c], dy[t * lddy + r], sum);
      dx[t * lddx + c] = sum;
    }
}
template <int M = 6>
static void grad_tiles(int count, const float* square, int64_t rows, int64_t width, const float* dy, int64_t lddy,
                       float* dx, int64_t lddx) {
  if (count == M) return grad_tile<M>(square, rows, width, dy, lddy, dx, lddx);
  if constexpr (M > 1) grad_tiles<M - 1>(count, square, rows, width, dy, lddy, dx, lddx);
}

// dx[:, c0..c1] = dy @ W[:, c0..c1]; c0 a multiple of 256.
static void matmul_grad(const gk_weight* w, const float* dy, int64_t m, int64_t lddy, int64_t c0, int64_t c1, float* dx,
                        int64_t lddx, void* scratch) {
  constexpr int kRows = 64;
  float* square = (float*)scratch;
  for (int64_t t = 0; t < m; ++t) memset(dx + t * lddx + c0, 0, (c1 - c0) * sizeof(float));
  for (int64_t c = c0; c < c1; c += kSpan) {
    const int64_t width = c1 - c < kSpan ? c1 - c : kSpan;
    for (int64_t r = 0; r < w->rows; r += kRows) {
      const int64_t n = w->rows - r < kRows ? w->rows - r : kRows;
      for (int64_t i = 0; i < n; ++i) row_floats(w, r + i, c, c + width, square + i * kSpan);
      for (int64_t t = 0; t < m; t += 6)
        grad_tiles(m - t < 6 ? (int)(m - t) : 6, square, n, width, dy + t * lddy + r, lddy, dx + t * lddx + c, lddx);
    }
  }
}

}  // namespace gk::GK_NS
