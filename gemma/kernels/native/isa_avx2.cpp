// SPDX-License-Identifier: Apache-2.0
// The kernels compiled for avx2; without that instruction set in the compiler's flags the table is absent.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GK_NS avx2
#define GK_NAME "avx2"
#define GK_VF 8
#define GK_AVX2 1
#include "all_kernels.h"
namespace gk {
const Kernels* avx2_kernels() { return &avx2::table; }
}  // namespace gk
#else
namespace gk {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace gk
#endif
