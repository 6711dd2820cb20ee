// SPDX-License-Identifier: Apache-2.0
// The vector types and the few operations that differ between instruction sets; everything above is one text.
//
// Set by isa_*.cpp: GK_NS (namespace), GK_VF (floats in a vector of `vf`), and one of GK_AVX2, GK_AVX512, GK_NEON or
// none. `vf` serves float kernels and products of many rows. Products of few rows use `df`, `di`, `dh`: at most eight
// lanes, because they wait for memory, not for arithmetic. No standard library templates in kernels: an inline function
// compiled for AVX-512 could be the one the linker keeps for everybody.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(GK_AVX512) && defined(GK_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define GK_INLINE static inline __attribute__((always_inline))

namespace gk::GK_NS {

#define GK_VECTOR(type, bytes) type __attribute__((vector_size(bytes), aligned(4), may_alias))
typedef float vf __attribute__((vector_size(GK_VF * 4)));
typedef int32_t vi __attribute__((vector_size(GK_VF * 4)));
typedef uint32_t vu __attribute__((vector_size(GK_VF * 4)));
typedef int16_t vh __attribute__((vector_size(GK_VF * 4)));  // twice as many lanes

#if defined(GK_AVX2) || defined(GK_AVX512)
constexpr int kLanes = 8;  // of df
#else
constexpr int kLanes = 4;
#endif
typedef float df __attribute__((vector_size(kLanes * 4)));
typedef int32_t di __attribute__((vector_size(kLanes * 4)));
typedef int16_t dh __attribute__((vector_size(kLanes * 4)));
typedef uint16_t du __attribute__((vector_size(kLanes * 4)));
constexpr int kParts = 8 / kLanes;  // vectors of bytes in 32 codes

template <class V>
GK_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
GK_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
GK_INLINE vf loadf(const float* p) { return load<vf>(p); }
#if defined(GK_AVX512)
GK_INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
GK_INLINE df splatd(float x) { return (df)_mm256_set1_ps(x); }
#elif defined(GK_AVX2)
GK_INLINE vf splat(float x) { return (vf)_mm256_set1_ps(x); }
GK_INLINE df splatd(float x) { return (df)_mm256_set1_ps(x); }
#else
GK_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps NaN and the sign of -0
GK_INLINE df splatd(float x) { return x - df{}; }
#endif

#if defined(GK_AVX512)
GK_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
GK_INLINE vi dot2(vi acc, vh w, vh x) {
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
#elif defined(GK_AVX2)
GK_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(GK_NEON)
GK_INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
GK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif

// dot2: acc[i] + w[2i] * x[2i] + w[2i+1] * x[2i+1], exactly; what is added stays far below 2^31 (see matmul.h).
#if defined(GK_AVX2) || defined(GK_AVX512)
GK_INLINE di dot2(di acc, dh w, dh x) {
  return acc + (di)_mm256_madd_epi16((__m256i)w, (__m256i)x);
}
#elif defined(GK_NEON)
GK_INLINE di dot2(di acc, dh w, dh x) {
  int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
  return (di)vaddq_s32((int32x4_t)acc, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
#elif defined(__SSE2__)
GK_INLINE di dot2(di acc, dh w, dh x) { return acc + (di)_mm_madd_epi16((__m128i)w, (__m128i)x); }
#else
GK_INLINE di dot2(di acc, dh w, dh x) {
  di a = (di)w, b = (di)x;  // little-endian halves
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
#endif

#if defined(GK_AVX512)
GK_INLINE df fma(df a, df b, df c) { return (df)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

GK_INLINE df halves(const uint16_t* p) {  // fp16 to float32, exactly
#if defined(GK_AVX2) || defined(GK_AVX512)
  return (df)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (df)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  df out;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t h = p[i], sign = (h & 0x8000u) << 16, rest = h & 0x7FFFu, bits;
    float value;
    if (rest >= 0x7C00u) {
      bits = (rest << 13) | 0x7F800000u;
      memcpy(&value, &bits, 4);
    } else {
      bits = rest << 13;
      memcpy(&value, &bits, 4);
      value *= 0x1p112f;
    }
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    out[i] = value;
  }
  return out;
#endif
}
GK_INLINE float half_to_float(const uint8_t* p) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(load<uint16_t>(p))));
#else
  uint16_t h[kLanes] = {};
  memcpy(h, p, 2);
  return halves(h)[0];
#endif
}

// Two int16 in every pair of lanes.
GK_INLINE vh splat_pair(const int16_t* p) {
#if defined(GK_AVX512)
  return (vh)_mm512_set1_epi32(load<int32_t>(p));
#elif defined(GK_AVX2)
  return (vh)_mm256_set1_epi32(load<int32_t>(p));
#else
  return (vh)(load<int32_t>(p) - vi{});
#endif
}
// Narrow numbers, one to a lane.
GK_INLINE di widen_u8(const void* p) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  return (di)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef uint8_t b __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load<b>(p), di);
#endif
}
GK_INLINE di widen_s8(const void* p) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  return (di)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef int8_t b __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load<b>(p), di);
#endif
}
GK_INLINE di widen_u16(const void* p) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  return (di)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  typedef uint16_t b __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(load<b>(p), di);
#endif
}

// Lane i of out[j] becomes lane j of in[i].
GK_INLINE void transpose(const df* in, df* out) {
#if defined(GK_AVX2) || defined(GK_AVX512)
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32((__m256i)in[i], (__m256i)in[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32((__m256i)in[i], (__m256i)in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    out[j] = (df)_mm256_permute2x128_si256(b[j], b[j + 4], 0x20);
    out[j + 4] = (df)_mm256_permute2x128_si256(b[j], b[j + 4], 0x31);
  }
#else
  for (int j = 0; j < kLanes; ++j) out[j] = df{in[0][j], in[1][j], in[2][j], in[3][j]};
#endif
}

}  // namespace gk::GK_NS
