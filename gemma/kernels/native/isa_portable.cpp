// SPDX-License-Identifier: Apache-2.0
// The kernels compiled for portable; without that instruction set in the compiler's flags the table is absent.
#include "kernels.h"

#if 1
#define GK_NS portable
#define GK_NAME "portable"
#define GK_VF 4
#define GK_PORTABLE 1
#include "all_kernels.h"
namespace gk {
const Kernels* portable_kernels() { return &portable::table; }
}  // namespace gk
#else
namespace gk {
const Kernels* portable_kernels() { return nullptr; }
}  // namespace gk
#endif
