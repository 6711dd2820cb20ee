// SPDX-License-Identifier: Apache-2.0
// What the float kernels compute, one value after the other, with sums in double: to be read, and to be tested against.
// The fast ones are in elementwise.h, attention.h and logits.h; test_hooks.cpp lets tests call both.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace gk::reference {

static double inverse_rms(const float* x, float eps, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += (double)x[i] * x[i];
  return 1.0 / sqrt(sum / (double)n + eps);
}
static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const double r = inverse_rms(x, eps, n);
  for (int64_t i = 0; i < n; ++i) y[i] = (float)(x[i] * r * weight[i]);
}
static void add_rms_norm(float* residual, const float* x, const float* weight, float eps, int64_t n) {
  const double r = inverse_rms(x, eps, n);
  for (int64_t i = 0; i < n; ++i) residual[i] = (float)(residual[i] + x[i] * r * weight[i]);
}
static void add(float* residual, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) residual[i] += x[i];
}
static void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
static void softcap(float* x, int64_t n, float cap) {
  for (int64_t i = 0; i < n; ++i) x[i] = (float)(tanh((double)x[i] / cap) * cap);
}
static void gelu_mul(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = gate[i], u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    y[i] = (float)(x / (1.0 + exp(-2.0 * u)) * up[i]);  // x / 2 (1 + tanh u)
  }
}
static void rope(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin) {
  for (int64_t h = 0; h < heads; ++h) {
    float *a = x + h * head_dim, *b = a + head_dim / 2;
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      const double p = a[i], q = b[i];
      a[i] = (float)(p * cos[i] - q * sin[i]);
      b[i] = (float)(q * cos[i] + p * sin[i]);
    }
  }
}

static void bf16_to_f32(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = (uint32_t)x[i] << 16;
    memcpy(y + i, &bits, 4);
  }
}
static void f32_to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    if (isnan(x[i])) y[i] = (uint16_t)((bits >> 16 & 0x8000u) | 0x7FC0u);
    else y[i] = (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}
static void store_cache(const float* x, int64_t n, int32_t cache_type, void* out, float* scale) {
  if (cache_type == GK_CACHE_F32) memcpy(out, x, (size_t)n * 4);
  if (cache_type == GK_CACHE_BF16) f32_to_bf16(x, n, (uint16_t*)out);
  if (cache_type != GK_CACHE_INT8) return;
  float top = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && isfinite(x[i]);
    top = fmaxf(top, fabsf(x[i]));
  }
  *scale = finite ? top / 127.0f : NAN;
  for (int64_t i = 0; i < n; ++i) {
    const float code = *scale > 0.0f ? rintf(fmaxf(-127.0f, fminf(127.0f, x[i] / *scale))) : 0.0f;
    ((int8_t*)out)[i] = (int8_t)code;
  }
}

// ---- Attention -------------------------------------------------------------------------------------------------

// Element h of the key (or value) at an absolute position.
static double stored(const AttendArgs* a, bool value, int64_t kv_head, int64_t position, int64_t h) {
  const bool own = position >= a->first_pos;
  const int64_t row = own ? kv_head * a->chunk_capacity + position - a->first_pos
                          : kv_head * a->capacity + position % a->capacity;
  const void* data = value ? (own ? a->cv : a->v) : (own ? a->ck : a->k);
  const float* scale = value ? (own ? a->cv_scale : a->v_scale) : (own ? a->ck_scale : a->k_scale);
  const int64_t i = row * a->head_dim + h;
  if (a->cache_type == GK_CACHE_INT8) return (double)((const int8_t*)data)[i] * scale[row];
  if (a->cache_type == GK_CACHE_F32) return ((const float*)data)[i];
  float x;
  bf16_to_f32((const uint16_t*)data + i, 1, &x);
  return x;
}

static double score(const AttendArgs* a, int64_t t, int64_t head, int64_t position) {
  const int64_t kv_head = head / (a->num_heads / a->num_kv_heads);
  const float* q = a->q + t * a->q_stride + head * a->head_dim;
  double s = 0.0;
  for (int64_t h = 0; h < a->head_dim; ++h) s += q[h] * stored(a, false, kv_head, position, h);
  return a->softcap > 0.0f ? tanh(s / a->softcap) * a->softcap : s;
}

// Softmax over the positions that token t sees, and the values weighted by it: twice over the keys, nothing kept.
static void attend_token(const AttendArgs* a, int64_t t, int64_t head) {
  const int64_t last = a->first_pos + t, kv_head = head / (a->num_heads / a->num_kv_heads);
  int64_t first = a->window > 0 ? last - a->window + 1 : 0;
  if (first < a->first_pos - a->capacity) first = a->first_pos - a->capacity;
  if (first < 0) first = 0;
  double top = -INFINITY, sum = 0.0;
  for (int64_t p = first; p <= last; ++p) top = fmax(top, score(a, t, head, p));
  float* out = a->out + t * a->out_stride + head * a->head_dim;
  constexpr int64_t kMost = 1024;
  double total[kMost] = {};
  for (int64_t p = first; p <= last; ++p) {
    const double weight = exp(score(a, t, head, p) - top);
    sum += weight;
    for (int64_t h = 0; h < a->head_dim && h < kMost; ++h) total[h] += weight * stored(a, true, kv_head, p, h);
  }
  for (int64_t h = 0; h < a->head_dim && h < kMost; ++h) out[h] = (float)(total[h] / sum);
}

static size_t attend_scratch(const AttendArgs*) { return 1; }
static void attend(const AttendArgs* a, int64_t t0, int64_t t1, int64_t k0, int64_t k1, void*) {
  const int64_t group = a->num_heads / a->num_kv_heads;
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t head = k0 * group; head < k1 * group; ++head) attend_token(a, t, head);
  }
}

// ---- Logits ----------------------------------------------------------------------------------------------------

static int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  bool finite = false;
  for (int64_t i = 0; i < n; ++i) {
    if (isnan(x[i])) return -1;
    finite = finite || isfinite(x[i]);
    if (x[i] > x[best]) best = i;
  }
  return finite ? best : -1;
}
static int64_t top_k(const float* x, int64_t n, int64_t first, int64_t k, int32_t* ids, float* values, int64_t held) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t at = held;  // a free place, or else that of the worst
    if (held == k) {
      at = 0;
      for (int64_t j = 1; j < held; ++j)
        if (values[j] < values[at] || (values[j] == values[at] && ids[j] > ids[at])) at = j;
      if (x[i] <= values[at]) continue;
    } else {
      ++held;
    }
    values[at] = x[i], ids[at] = (int32_t)(first + i);
  }
  return held;
}
static double sum_exp(const float* x, int64_t n, float shift) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += exp((double)x[i] - shift);
  return sum;
}

}  // namespace gk::reference
