// SPDX-License-Identifier: Apache-2.0
// Included before everything where the AVX-512 text is compiled for a machine without it: SIMDe's portable intrinsics,
// and in plain vectors the few that it lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

static inline __m512 gk_int_to_float(__m512i x) {
  typedef int v16 __attribute__((vector_size(64)));
  typedef float f16 __attribute__((vector_size(64)));
  return (__m512)__builtin_convertvector((v16)x, f16);
}
static inline __m512i gk_bytes_to_int(__m128i x) {
  typedef signed char b16 __attribute__((vector_size(16)));
  typedef int v16 __attribute__((vector_size(64)));
  return (__m512i)__builtin_convertvector((b16)x, v16);
}
#define _mm512_cvtepi32_ps gk_int_to_float
#define _mm512_cvtepi8_epi32 gk_bytes_to_int
#define _IMMINTRIN_H_INCLUDED  // the compiler's own header would declare the same names again
