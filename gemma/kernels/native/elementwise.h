// SPDX-License-Identifier: Apache-2.0
// Kernels over single vectors: norms, residuals, rotary embedding, gated GELU, soft-cap, and what a cache stores.
// What they compute is spelled in reference.h; the products around them are in matmul_*.h.
#pragma once
#include "vector_math.h"

namespace gk::GK_NS {

// The sum of x[i]^2 in four vectors of lanes, in an order that depends on n alone.
static float sum_of_squares(const float* x, int64_t n) {
  vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * GK_VF <= n; i += 4 * GK_VF) {
    vf a = loadf(x + i), b = loadf(x + i + GK_VF), c = loadf(x + i + 2 * GK_VF), d = loadf(x + i + 3 * GK_VF);
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
    s2 = fma(c, c, s2);
    s3 = fma(d, d, s3);
  }
  for (; i < n; i += GK_VF) {
    vf a = n - i >= GK_VF ? loadf(x + i) : load_part(x + i, n - i);
    s0 = fma(a, a, s0);
  }
  return lane_sum((s0 + s1) + (s2 + s3));
}

// 1 / sqrt of the mean square, by a true root and a true division: the estimate instructions differ between machines.
GK_INLINE float inverse_rms(const float* x, float eps, int64_t n) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / (float)n + eps);
}

// f(i, lanes) is applied to whole vectors and, through copies padded with zeros, to what is left.
template <class F, class... Ps>
GK_INLINE void map(int64_t n, float* y, F f, const Ps*... x) {
  int64_t i = 0;
  for (; i + GK_VF <= n; i += GK_VF) store(y + i, f(loadf(x + i)...));
  if (i < n) store_part(y + i, f(load_part(x + i, n - i)...), n - i);
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const vf r = splat(inverse_rms(x, eps, n));
  map(n, y, [r](vf v, vf w) __attribute__((always_inline)) { return v * r * w; }, x, weight);
}

static void add_rms_norm(float* residual, const float* x, const float* weight, float eps, int64_t n) {
  const vf r = splat(inverse_rms(x, eps, n));
  map(n, residual, [r](vf v, vf w, vf old) __attribute__((always_inline)) { return old + v * r * w; }, x, weight,
      (const float*)residual);
}

static void add(float* residual, const float* x, int64_t n) {
  map(n, residual, [](vf v, vf old) __attribute__((always_inline)) { return old + v; }, x, (const float*)residual);
}

static void scale(float* x, int64_t n, float factor) {
  const vf f = splat(factor);
  map(n, x, [f](vf v) __attribute__((always_inline)) { return v * f; }, (const float*)x);
}

static void softcap(float* x, int64_t n, float cap) {
  const vf c = splat(cap);
  map(n, x, [c](vf v) __attribute__((always_inline)) { return vtanh(v / c) * c; }, (const float*)x);
}

// gelu(x) = x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u): one exp, and no
// cancellation where x is far below zero. -inf gives NaN, as the formula with tanh does.
static void gelu_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(
      n, y,
      [](vf x, vf v) __attribute__((always_inline)) {
        vf twice_u = x * fma(x * x, splat(0.044715f), splat(1.0f)) * 1.59576912f;
        return x / (vexp(-twice_u) + 1.0f) * v;
      },
      gate, up);
}

// (x1, x2), the halves of a head, become (x1 cos - x2 sin, x2 cos + x1 sin); cos and sin hold head_dim / 2 angles.
static void rope(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < heads; ++h) {
    float *a = x + h * head_dim, *b = a + half;
    int64_t i = 0;
    for (; i + GK_VF <= half; i += GK_VF) {
      vf p = loadf(a + i), q = loadf(b + i), c = loadf(cos + i), s = loadf(sin + i);
      gk::GK_NS::store(a + i, p * c - q * s);
      gk::GK_NS::store(b + i, q * c + p * s);
    }
    if (int64_t rest = half - i; rest > 0) {
      vf p = load_part(a + i, rest), q = load_part(b + i, rest);
      vf c = load_part(cos + i, rest), s = load_part(sin + i, rest);
      store_part(a + i, p * c - q * s, rest);
      store_part(b + i, q * c + p * s, rest);
    }
  }
}

static void bf16_to_f32(const uint16_t* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + GK_VF <= n; i += GK_VF) store(y + i, load_as_float(x + i));
  for (; i < n; ++i) {
    uint32_t bits = (uint32_t)x[i] << 16;
    memcpy(y + i, &bits, 4);
  }
}

static void f32_to_bf16(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + GK_VF <= n; i += GK_VF) store(y + i, to_bf16(loadf(x + i)));
  if (i < n) {
    vw last = to_bf16(load_part(x + i, n - i));
    memcpy(y + i, &last, (size_t)(n - i) * 2);
  }
}

// x ~ codes * scale with scale = max|x| / 127. Zeros, and what is so small that the scale is zero: scale 0, codes 0.
// What is not finite: scale NaN, codes 0, so that it is seen downstream as in the other caches.
static void store_int8(const float* x, int64_t n, int8_t* codes, float* scale) {
  vf top = {}, odd = {};  // odd: NaN where a value is not finite
  for (int64_t i = 0; i < n; i += GK_VF) {
    vf v = n - i >= GK_VF ? loadf(x + i) : load_part(x + i, n - i);
    top = vmax(vabs(v), top);
    odd += v * 0.0f;
  }
  const float unit = lane_max(top) / 127.0f, sum = lane_sum(odd);
  *scale = sum == 0.0f ? unit : __builtin_nanf("");
  if (sum != 0.0f || unit == 0.0f) {
    memset(codes, 0, (size_t)n);
    return;
  }
  for (int64_t i = 0; i < n; i += GK_VF) {
    vf v = (n - i >= GK_VF ? loadf(x + i) : load_part(x + i, n - i)) / unit;
    v = vmin(vmax(v, splat(-127.0f)), splat(127.0f));  // a subnormal unit is coarse
    vb c = __builtin_convertvector(round_to_int(v), vb);
    memcpy(codes + i, &c, (size_t)smaller(GK_VF, n - i));
  }
}

static void store_cache(const float* x, int64_t n, int32_t cache_type, void* out, float* scale) {
  if (cache_type == GK_CACHE_INT8) {
    store_int8(x, n, (int8_t*)out, scale);
  } else if (cache_type == GK_CACHE_BF16) {
    f32_to_bf16(x, n, (uint16_t*)out);
  } else {
    memcpy(out, x, (size_t)n * 4);
  }
}

}  // namespace gk::GK_NS
