// SPDX-License-Identifier: Apache-2.0
// The kernels compiled for neon; without that instruction set in the compiler's flags the table is absent.
#include "kernels.h"

#if defined(__aarch64__)
#define GK_NS neon
#define GK_NAME "neon"
#define GK_VF 4
#define GK_NEON 1
#include "all_kernels.h"
namespace gk {
const Kernels* neon_kernels() { return &neon::table; }
}  // namespace gk
#else
namespace gk {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace gk
#endif
