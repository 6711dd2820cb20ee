// SPDX-License-Identifier: Apache-2.0
// Products of activations with packed integer weights, and the entry points of matmul.
//
// Activations are rounded to 15 bits with a scale for every 32 (quantize), so a block's sum of products is an exact
// integer: |code| <= 128, 32 products of at most 128 * 32767 stay under 2^31. Each block then adds, in order,
// fma(scale_w * scale_x, sum, acc) and, for types with a minimum, fma(-minimum, sum of x, acc). `few` streams rows
// where they lie, kLanes at a time; `many` unpacks a panel of rows once and multiplies it with every activation. Both
// give the same bits, since the integer sums are exact and the float steps the same.
#pragma once

namespace gk::GK_NS {

constexpr int kPanel = 2 * GK_VF;       // rows of a panel
constexpr int kRowGroup = kPanel;
constexpr int kTile = GK_VF == 16 ? 12 : 6;  // activations of a tile: accumulators, weights and one more fill the registers
constexpr int kDepth = 2048;            // columns of a panel: what stays in the second-level cache
constexpr int kFew = 3;                 // activations up to which streaming rows beats unpacking a panel (measured)

static void quantize(const float* x, int64_t cols, QuantizedRow out) {
  for (int64_t b = 0; b * kBlock < cols; ++b) {
    const int64_t n = cols - b * kBlock < kBlock ? cols - b * kBlock : kBlock;
    alignas(64) float v[kBlock] = {};
    alignas(64) int32_t t[kBlock];
    if (n == kBlock) memcpy(v, x + b * kBlock, sizeof v);
    else memcpy(v, x + b * kBlock, n * sizeof(float));
    uint32_t most = 0;
    for (int i = 0; i < kBlock; ++i) {
      uint32_t bits;
      memcpy(&bits, &v[i], 4);
      bits &= 0x7FFFFFFFu;
      most = bits > most ? bits : most;
    }
    float peak;
    memcpy(&peak, &most, 4);
    int16_t* codes = out.codes + b * kBlock;
    if (most >= 0x7F800000u || peak < 0x1p-110f) {  // not finite: everything it meets is NaN; next to nothing: zero
      memset(codes, 0, kBlock * sizeof(int16_t));
      out.scale[b] = out.sums[2 * b] = out.sums[2 * b + 1] = most >= 0x7F800000u ? __builtin_nanf("") : 0.0f;
      continue;
    }
    const float inverse = 32767.0f / peak, scale = peak / 32767.0f;
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kBlock; ++i) t[i] = (int32_t)__builtin_rintf(v[i] * inverse);
    for (int i = 0; i < 16; ++i) sums[0] += t[i], sums[1] += t[16 + i];
    for (int i = 0; i < 16; ++i) codes[i] = (int16_t)t[2 * i], codes[16 + i] = (int16_t)t[2 * i + 1];
    out.scale[b] = scale;
    for (int h = 0; h < 2; ++h) out.sums[2 * b + h] = scale * (float)sums[h];
  }
}

GK_INLINE Split load_split(const int16_t* p) {
  Split s;
  for (int i = 0; i < 2 * kParts; ++i) s.part[i] = load<dh>(p + i * 2 * kLanes);
  return s;
}

// ---- few activations -------------------------------------------------------------------------------------------

struct Sums {  // of one row's 32 products: lanes still to be added, kept apart by half
#if defined(GK_AVX2) || defined(GK_AVX512)
  di both;  // lanes 0..3: first half, 4..7: second
#else
  di half[2];
#endif
};
GK_INLINE Sums multiply(const Split& w, const Split& x) {
  Sums s;
#if defined(GK_AVX2) || defined(GK_AVX512)
  s.both = dot2(dot2(di{}, w.part[0], x.part[0]), w.part[1], x.part[1]);
#else
  for (int h = 0; h < 2; ++h) s.half[h] = dot2(dot2(di{}, w.part[h], x.part[h]), w.part[2 + h], x.part[2 + h]);
#endif
  return s;
}
#if defined(GK_AVX2) || defined(GK_AVX512)
GK_INLINE __m256i hadd(di a, di b) { return _mm256_hadd_epi32((__m256i)a, (__m256i)b); }
GK_INLINE void reduce(const Sums* s, di* first, di* second) {
  __m256i low = _mm256_hadd_epi32(hadd(s[0].both, s[1].both), hadd(s[2].both, s[3].both));
  __m256i high = _mm256_hadd_epi32(hadd(s[4].both, s[5].both), hadd(s[6].both, s[7].both));
  *first = (di)_mm256_permute2x128_si256(low, high, 0x20);
  *second = (di)_mm256_permute2x128_si256(low, high, 0x31);
}
#else
GK_INLINE di across(di a, di b, di c, di d) {  // lane i: the sum of vector i
#if defined(GK_NEON)
  return (di)vpaddq_s32(vpaddq_s32((int32x4_t)a, (int32x4_t)b), vpaddq_s32((int32x4_t)c, (int32x4_t)d));
#else
  return di{a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3], d[0] + d[1] + d[2] + d[3]};
#endif
}
GK_INLINE void reduce(const Sums* s, di* first, di* second) {
  *first = across(s[0].half[0], s[1].half[0], s[2].half[0], s[3].half[0]);
  *second = across(s[0].half[1], s[1].half[1], s[2].half[1], s[3].half[1]);
}
#endif
GK_INLINE df to_float(di x) { return __builtin_convertvector(x, df); }
// kLanes rows at one distance from each other: two registers reach eight of them.
struct Rows {
  const uint8_t *low, *high;
  int64_t stride;
  GK_INLINE const uint8_t* at(const Rows& r, int i) { return i < 4 ? r.low + i * r.stride : r.high + (i - 4) * r.stride; }
};
GK_INLINE Rows rows_at(const uint8_t* first, int64_t stride) { return {first, first + 4 * stride, stride}; }
GK_INLINE Rows moved(Rows r, int64_t bytes) { return {r.low + bytes, r.high + bytes, r.stride}; }

GK_INLINE df halves_at(const Rows& rows, int64_t offset) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  __m128i v = _mm_cvtsi32_si128(load<uint16_t>(Rows::at(rows, 0) + offset));
#define GK_INSERT(i) v = _mm_insert_epi16(v, load<uint16_t>(Rows::at(rows, i) + offset), i)
  GK_INSERT(1); GK_INSERT(2); GK_INSERT(3); GK_INSERT(4); GK_INSERT(5); GK_INSERT(6); GK_INSERT(7);
#undef GK_INSERT
  return (df)_mm256_cvtph_ps(v);
#else
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) memcpy(&h[i], Rows::at(rows, i) + offset, 2);
  return halves(h);
#endif
}

// The factors of kLanes rows' blocks, lane by row: [kElements / kWidth] scales and negated minima.
template <class F>
GK_INLINE void row_factors(const Rows& rows, df row_scale, df* scale, df* minus) {
  constexpr int n = F::kElements / F::kWidth;
  if constexpr (n == 1) {
    scale[0] = F::kRowScale ? row_scale : halves_at(rows, 0);
    if constexpr (F::kMinimum) minus[0] = halves_at(rows, 2);
  } else {
    Levels levels[kLanes];
    for (int i = 0; i < kLanes; ++i) levels[i] = F::levels(Rows::at(rows, i));
    const df d = halves_at(rows, F::kScaleAt);
    for (int g = 0; g < n; g += kLanes) {
      df lines[kLanes];
      for (int i = 0; i < kLanes; ++i)
        lines[i] = to_float(F::kSignedLevels ? widen_s8(levels[i].scale + g) : widen_u8(levels[i].scale + g));
      transpose(lines, scale + g);
      for (int i = 0; i < kLanes; ++i) scale[g + i] *= d;
    }
    if constexpr (F::kMinimum) {
      const df m = -halves_at(rows, F::kScaleAt + 2);
      for (int g = 0; g < n; g += kLanes) {
        df lines[kLanes];
        for (int i = 0; i < kLanes; ++i) lines[i] = to_float(widen_u8(levels[i].minimum + g));
        transpose(lines, minus + g);
        for (int i = 0; i < kLanes; ++i) minus[g + i] *= m;
      }
    }
  }
}

// One block of each of kLanes rows times M activations; `at` counts groups of 32 columns.
template <class F, int M>
GK_INLINE void few_blocks(const Rows& rows, df row_scale, int64_t at, const QuantizedRow* q, df* acc) {
  constexpr int n = F::kElements / F::kWidth, groups = F::kElements / kBlock;
  df scale[n], minus[n];
  row_factors<F>(rows, row_scale, scale, minus);
#pragma GCC unroll 8
  for (int g = 0; g < groups; ++g) {
    Sums sums[M][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const Split s = split<F::kSigned>(F::codes(Rows::at(rows, i), g));
      for (int t = 0; t < M; ++t) sums[t][i] = multiply(s, load_split(q[t].codes + (at + g) * kBlock));
    }
    for (int t = 0; t < M; ++t) {
      di half[2];
      reduce(sums[t], &half[0], &half[1]);
      const df x_scale = splatd(q[t].scale[at + g]);
      const float* x_sums = q[t].sums + 2 * (at + g);
      if constexpr (F::kWidth == kBlock) {
        acc[t] = fma(scale[g] * x_scale, to_float(half[0] + half[1]), acc[t]);
        if constexpr (F::kMinimum) acc[t] = fma(minus[g], splatd(x_sums[0] + x_sums[1]), acc[t]);
      } else {
        for (int h = 0; h < 2; ++h) {
          acc[t] = fma(scale[2 * g + h] * x_scale, to_float(half[h]), acc[t]);
          if constexpr (F::kMinimum) acc[t] = fma(minus[2 * g + h], splatd(x_sums[h]), acc[t]);
        }
      }
    }
  }
}

// kLanes rows, or the first `count` of them: then every lane reads the same row, one after the other.
template <class F, int M>
GK_INLINE void few_rows(const gk_weight* w, int64_t r, int64_t stride, const QuantizedRow* q, df* acc) {
  const int64_t blocks = w->cols / F::kElements, rest = w->cols % F::kElements;
  const Rows rows = rows_at(w->data + r * w->row_bytes, stride);
  const uint8_t* ahead = w->data + (r + kLanes) * w->row_bytes;  // the next rows, read ahead as one stream
  df row_scale = {};
  if constexpr (F::kRowScale)
    for (int i = 0; i < kLanes; ++i) row_scale[i] = w->scale[stride ? r + i : r];
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t p = 0; p < kLanes * F::kBytes; p += 64) __builtin_prefetch(ahead + b * kLanes * F::kBytes + p);
    few_blocks<F, M>(moved(rows, b * F::kBytes), row_scale, b * (F::kElements / kBlock), q, acc);
  }
  if constexpr (F::kRowScale && F::kBytes == kBlock) {
    if (!rest) return;  // INT8 rows of any length: the end of each, padded
    uint8_t tail[kLanes * kBlock] = {};
    for (int i = 0; i < kLanes; ++i) memcpy(tail + i * kBlock, Rows::at(rows, i) + blocks * kBlock, rest);
    few_blocks<F, M>(rows_at(tail, kBlock), row_scale, blocks, q, acc);
  }
}

template <class F, int M>
static void few(const gk_weight* w, int64_t r0, int64_t r1, const QuantizedRow* q, float* y, int64_t ldy) {
  int64_t r = r0;
  for (; r + kLanes <= r1; r += kLanes) {
    df acc[M] = {};
    few_rows<F, M>(w, r, w->row_bytes, q, acc);
    for (int t = 0; t < M; ++t) store(y + t * ldy + r, acc[t]);
  }
  for (; r < r1; ++r) {
    df acc[M] = {};
    few_rows<F, M>(w, r, 0, q, acc);
    for (int t = 0; t < M; ++t) y[t * ldy + r] = acc[t][0];
  }
}

// ---- many activations ------------------------------------------------------------------------------------------

struct Panel {
  int32_t* pairs;      // [columns / 2, kPanel]: two int16 codes, in split order
  float *scale, *minus;  // [columns / kWidth, kPanel]
};

#if defined(GK_AVX2) || defined(GK_AVX512)
// pairs[j * stride + i] = lane j of row[i]: an 8 x 8 transpose.
GK_INLINE void put_pairs(const dh* row, int32_t* pairs, int64_t stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)row[i], (__m256i)row[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)row[i], (__m256i)row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    store(pairs + j * stride, _mm256_permute2x128_si256(b[j], b[j + 4], 0x20));
    store(pairs + (j + 4) * stride, _mm256_permute2x128_si256(b[j], b[j + 4], 0x31));
  }
}
#else
GK_INLINE void put_pairs(const dh* row, int32_t* pairs, int64_t stride) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) pairs[j * stride + i] = ((di)row[i])[j];
}
#endif

// Unpacks columns c0..c1 (whole blocks, or to the end) of kLanes rows into lanes of a panel.
template <class F>
GK_INLINE void fill_lanes(const gk_weight* w, Rows rows, df row_scale, int64_t c0, int64_t c1, int first, Panel panel) {
  constexpr int groups = F::kElements / kBlock, n = F::kElements / F::kWidth;
  uint8_t tail[kLanes * kBlock] = {};
  for (int64_t c = c0, at = 0; c < c1; c += F::kElements, ++at) {
    Rows here = moved(rows, c / F::kElements * F::kBytes);
    if (F::kRowScale && c + kBlock > w->cols) {
      for (int i = 0; i < kLanes; ++i) memcpy(tail + i * kBlock, Rows::at(here, i), w->cols - c);
      here = rows_at(tail, kBlock);
    }
    df scale[n], minus[n];
    row_factors<F>(here, row_scale, scale, minus);
    for (int g = 0; g < n; ++g) {
      store(panel.scale + (at * n + g) * kPanel + first, scale[g]);
      if constexpr (F::kMinimum) store(panel.minus + (at * n + g) * kPanel + first, minus[g]);
    }
    for (int g = 0; g < groups; ++g) {
      Split s[kLanes];
      for (int i = 0; i < kLanes; ++i) s[i] = split<F::kSigned>(F::codes(Rows::at(here, i), g));
      for (int p = 0; p < 2 * kParts; ++p) {
        dh column[kLanes];
        for (int i = 0; i < kLanes; ++i) column[i] = s[i].part[p];
        put_pairs(column, panel.pairs + ((at * groups + g) * 16 + p * kLanes) * kPanel + first, kPanel);
      }
    }
  }
}

// The rows r0..r1 of a panel; where fewer than kPanel are left, the last lanes repeat a row that nobody reads.
template <class F>
static void fill_panel(const gk_weight* w, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Panel panel) {
  // From the right, since lane by lane fills what lies to the right of a lane, and wraps into the panel's next line.
  for (int first = kPanel - kLanes; first >= 0; first -= kLanes) {
    int64_t r = r0 + first, stride = w->row_bytes;
    if (r + kLanes > r1) {  // fewer are left: lane by lane, with the same row in all the lanes to its right
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = r + i < r1 ? r + i : r1 - 1;
        const df scale = F::kRowScale ? splatd(w->scale[row]) : df{};
        Panel shifted = panel;
        shifted.pairs += i, shifted.scale += i, shifted.minus += i;
        fill_lanes<F>(w, rows_at(w->data + row * w->row_bytes, 0), scale, c0, c1, first, shifted);
      }
      continue;
    }
    df scale = {};
    if constexpr (F::kRowScale)
      for (int i = 0; i < kLanes; ++i) scale[i] = w->scale[r + i];
    fill_lanes<F>(w, rows_at(w->data + r * w->row_bytes, stride), scale, c0, c1, first, panel);
  }
}

// One step of a tile's float accumulators: acc[t][n] = fma(scale_w * scale_x, sum, acc), and the minimum.
template <bool Minimum, int M>
GK_INLINE void flush(vi (&sum)[M][2], float* acc, const float* scale, const float* minus, const QuantizedRow* q,
                     int64_t group, int half) {
  for (int t = 0; t < M; ++t) {
    const vf x_scale = splat(q[t].scale[group]);
    const float x_sum = half < 0 ? q[t].sums[2 * group] + q[t].sums[2 * group + 1] : q[t].sums[2 * group + (half & 1)];
    for (int n = 0; n < 2; ++n) {
      float* at = acc + t * kPanel + n * GK_VF;
      vf a = fma(loadf(scale + n * GK_VF) * x_scale, __builtin_convertvector(sum[t][n], vf), loadf(at));
      if constexpr (Minimum) a = fma(loadf(minus + n * GK_VF), splat(x_sum), a);
      store(at, a);
      sum[t][n] = vi{};
    }
  }
}

template <int M>
GK_INLINE void add_pairs(vi (&sum)[M][2], const int32_t* pairs, const int16_t* const (&x)[M], int64_t at, int from,
                         int to) {
#pragma GCC unroll 4
  for (int j = from; j < to; ++j) {
    const vh w0 = load<vh>(pairs + j * kPanel), w1 = load<vh>(pairs + j * kPanel + GK_VF);
    for (int t = 0; t < M; ++t) {
      const vh pair = splat_pair(x[t] + at + 2 * j);
      sum[t][0] = dot2(sum[t][0], w0, pair);
      sum[t][1] = dot2(sum[t][1], w1, pair);
    }
  }
}

// A panel's columns g0..g1 (in groups of 32) times M activations, added to acc [M, kPanel].
template <int Width, bool Minimum, int M>
static __attribute__((noinline)) void tile(Panel panel, int64_t g0, int64_t g1, const QuantizedRow* q, float* acc) {
  constexpr int halves = kBlock / Width;
  vi sum[M][2] = {};
  const int16_t* x[M];
  for (int t = 0; t < M; ++t) x[t] = q[t].codes;
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t at = g - g0;
    const int32_t* pairs = panel.pairs + at * 16 * kPanel;
    const float *scale = panel.scale + at * halves * kPanel, *minus = panel.minus + at * halves * kPanel;
    if constexpr (halves == 1) {
      add_pairs<M>(sum, pairs, x, g * kBlock, 0, 16);
      flush<Minimum, M>(sum, acc, scale, minus, q, g, -1);
    } else {
      for (int h = 0; h < 2; ++h) {
        add_pairs<M>(sum, pairs, x, g * kBlock, 4 * h, 4 * h + 4);
        add_pairs<M>(sum, pairs, x, g * kBlock, 8 + 4 * h, 12 + 4 * h);
        flush<Minimum, M>(sum, acc, scale + h * kPanel, minus + h * kPanel, q, g, h);
      }
    }
  }
}

template <int Width, bool Minimum, int M = kTile>
static void tiles(int count, Panel panel, int64_t g0, int64_t g1, const QuantizedRow* q, float* acc) {
  if (count == M) return tile<Width, Minimum, M>(panel, g0, g1, q, acc);
  if constexpr (M > 1) tiles<Width, Minimum, M - 1>(count, panel, g0, g1, q, acc);
}

template <class F>
static void many(const gk_weight* w, int64_t r0, int64_t r1, const QuantizedRow* q, int64_t m, float* y, int64_t ldy,
                 void* scratch) {
  Panel panel = {(int32_t*)scratch, nullptr, nullptr};
  panel.scale = (float*)(panel.pairs + kDepth / 2 * kPanel);
  panel.minus = panel.scale + kDepth / 16 * kPanel;
  for (int64_t r = r0; r < r1; r += kPanel) {
    const int64_t count = r1 - r < kPanel ? r1 - r : kPanel;
    for (int64_t c = 0; c < w->cols; c += kDepth) {
      const int64_t end = c + kDepth < w->cols ? c + kDepth : w->cols;
      fill_panel<F>(w, r, r1, c, end, panel);
      for (int64_t t = 0; t < m; t += kTile) {
        const int size = m - t < kTile ? (int)(m - t) : kTile;
        alignas(64) float acc[kTile * kPanel] = {};
        if (c)
          for (int i = 0; i < size; ++i) memcpy(acc + i * kPanel, y + (t + i) * ldy + r, count * sizeof(float));
        tiles<F::kWidth, F::kMinimum>(size, panel, c / kBlock, (end + kBlock - 1) / kBlock, q + t, acc);
        for (int i = 0; i < size; ++i) memcpy(y + (t + i) * ldy + r, acc + i * kPanel, count * sizeof(float));
      }
    }
  }
}

template <class F>
static void integer_product(const gk_weight* w, int64_t r0, int64_t r1, const QuantizedRow* q, int64_t m, float* y,
                            int64_t ldy, void* scratch) {
  switch (m) {
    case 1: return few<F, 1>(w, r0, r1, q, y, ldy);
    case 2: return few<F, 2>(w, r0, r1, q, y, ldy);
    case kFew: return few<F, kFew>(w, r0, r1, q, y, ldy);
    default: return many<F>(w, r0, r1, q, m, y, ldy, scratch);
  }
}

}  // namespace gk::GK_NS
