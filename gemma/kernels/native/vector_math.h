// SPDX-License-Identifier: Apache-2.0
// Small float operations that elementwise.h, attention.h and logits.h share: sums of lanes in a fixed order, partial
// loads, conversions, exp and tanh. Loads and products are in simd.h; the scalar references are in reference.h.
#pragma once
#include "simd.h"

namespace gk::GK_NS {

typedef uint16_t vw __attribute__((vector_size(GK_VF * 2)));  // as many bfloat16 as vf has floats
typedef int8_t vb __attribute__((vector_size(GK_VF)));
typedef float quad __attribute__((vector_size(16)));

constexpr float kInfinity = __builtin_inff();

GK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

GK_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where one is NaN
GK_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
GK_INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7FFFFFFFu); }
GK_INLINE vu splatu(uint32_t x) { return x - vu{}; }
GK_INLINE vi splati(int32_t x) { return x - vi{}; }

// The first n lanes from memory, the others zero; and back.
GK_INLINE vf load_part(const float* p, int64_t n) {
  vf v = {};
  memcpy(&v, p, (size_t)n * 4);
  return v;
}
GK_INLINE void store_part(float* p, vf v, int64_t n) { memcpy(p, &v, (size_t)n * 4); }

#if GK_VF == 16
typedef float octet __attribute__((vector_size(32)));
GK_INLINE octet fold_once(vf v) {
  octet a, b;
  memcpy(&a, &v, 32);
  memcpy(&b, (const char*)&v + 32, 32);
  return a + b;
}
#else
typedef vf octet;
GK_INLINE octet fold_once(vf v) { return v; }
#endif
GK_INLINE quad fold(vf v) {  // halves added until four lanes are left
  octet o = fold_once(v);
  quad a, b = {};
  memcpy(&a, &o, 16);
  if constexpr (sizeof o == 32) {
    memcpy(&b, (const char*)&o + 16, 16);
    a = a + b;
  }
  return a;
}
GK_INLINE float lane_sum(vf v) {
  quad q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
GK_INLINE float lane_max(vf v) {
  float m = v[0];
  for (int i = 1; i < GK_VF; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
GK_INLINE bool any(vi mask) {
#if defined(GK_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(GK_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(GK_NEON)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < GK_VF; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// The sums of the lanes of four vectors. One order for each instruction set, whichever of the four a sum comes from.
GK_INLINE quad lane_sums(vf a, vf b, vf c, vf d) {
#if defined(GK_AVX512) || defined(GK_AVX2)
  __m256 p = (__m256)fold_once(a), q = (__m256)fold_once(b), r = (__m256)fold_once(c), s = (__m256)fold_once(d);
  __m256 pq = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
  __m256 rs = _mm256_add_ps(_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
  __m256 t = _mm256_add_ps(_mm256_shuffle_ps(pq, rs, 0x44), _mm256_shuffle_ps(pq, rs, 0xEE));
  return (quad)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif defined(GK_NEON)
  float32x4_t pq = vpaddq_f32((float32x4_t)a, (float32x4_t)b), rs = vpaddq_f32((float32x4_t)c, (float32x4_t)d);
  return (quad)vpaddq_f32(pq, rs);
#else
  quad x = fold(a), y = fold(b), z = fold(c), w = fold(d);
  return quad{(x[0] + x[2]) + (x[1] + x[3]), (y[0] + y[2]) + (y[1] + y[3]), (z[0] + z[2]) + (z[1] + z[3]),
              (w[0] + w[2]) + (w[1] + w[3])};
#endif
}

// ---- Stored types ----------------------------------------------------------------------------------------------

GK_INLINE vf load_as_float(const float* p) { return loadf(p); }
GK_INLINE vf load_as_float(const uint16_t* p) {
#if defined(GK_AVX512) && !defined(GK_EMULATE)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(GK_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(load<vw>(p), vu) << 16);
#endif
}
GK_INLINE vf load_as_float(const int8_t* p) {
#if defined(GK_AVX512) && !defined(GK_EMULATE)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(GK_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<vb>(p), vi), vf);
#endif
}

// To nearest even; a NaN keeps its sign and becomes the quiet one.
GK_INLINE vw to_bf16(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  vu nan = ((bits >> 16) & 0x8000u) | 0x7FC0u;
  return __builtin_convertvector(x != x ? nan : rounded, vw);
}

// To the nearest integer, ties to even, as a float and as an int; |x| below 2^22.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it keeps no fraction
GK_INLINE vi round_to_int(vf x) { return (vi)(x + splat(kRound)) - (vi)splat(kRound); }

// ---- exp and tanh ----------------------------------------------------------------------------------------------

// e^x, within 1.5 units in the last place, results below 2^-126 included; exp(0) is 1 exactly. x = n ln 2 + r with
// |r| <= ln 2 / 2, then 1 + r + r^2 p(r), where p was fitted for the least relative error (3.1e-9), then 2^n in two
// factors, so that neither overflows and a subnormal result is rounded once.
GK_INLINE vf vexp(vf x) {
  vf y = x < -105.0f ? splat(-105.0f) : x;  // NaN passes both
  y = y > 90.0f ? splat(90.0f) : y;
  vf shifted = fma(y, splat(1.44269504f), splat(kRound));
  vf n = shifted - kRound;
  vf r = fma(n, splat(-0.693359375f), y);    // ln 2 to ten bits, so that the product is exact,
  r = fma(n, splat(2.12194440e-4f), r);      // and what those bits lack
  vf p = splat(1.3814323e-3f);
  p = fma(p, r, splat(8.368850997e-3f));
  p = fma(p, r, splat(4.166840103e-2f));
  p = fma(p, r, splat(0.1666651952f));
  p = fma(p, r, splat(0.4999999337f));
  p = fma(p * r, r, r) + 1.0f;
  vi whole = (vi)shifted - (vi)splat(kRound), half = whole >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
}

// tanh x within 2 units in the last place. Below 0.625: x + x^3 p(x^2), p fitted for the least relative error
// (4.2e-9); from there on 1 - 2 / (e^2|x| + 1), where the subtraction loses at most one bit.
GK_INLINE vf vtanh(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = splat(-5.717049664e-3f);
  p = fma(p, z, splat(2.065059195e-2f));
  p = fma(p, z, splat(-5.374349974e-2f));
  p = fma(p, z, splat(0.1333149131f));
  p = fma(p, z, splat(-0.3333328393f));
  vf small = fma(p * z, a, a), big = 1.0f - 2.0f / (vexp(a + a) + 1.0f);
  vf y = a < 0.625f ? small : big;
  return (vf)((vu)y | ((vu)x & 0x80000000u));
}

}  // namespace gk::GK_NS
