// SPDX-License-Identifier: Apache-2.0
// The kernels compiled for avx512; without that instruction set in the compiler's flags the table is absent.
#include "kernels.h"

#if defined(GK_EMULATE) || (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__))
#define GK_NS avx512
#define GK_NAME "avx512"
#define GK_VF 16
#define GK_AVX512 1
#include "all_kernels.h"
namespace gk {
const Kernels* avx512_kernels() { return &avx512::table; }
}  // namespace gk
#else
namespace gk {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace gk
#endif
