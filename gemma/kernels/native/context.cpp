// SPDX-License-Identifier: Apache-2.0
// Contexts: which instruction set, how many threads; and the last error of each thread.
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <thread>

#include "kernels.h"

namespace gk {
namespace {

thread_local char last_error[512] = "";

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const int n = (int)std::thread::hardware_concurrency();
  return n > 0 ? n : 1;
}

bool cpu_has(const char* name) {
#if defined(GK_EMULATE)
  return true;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!strcmp(name, "avx2")) return avx2;
  if (!strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return !strcmp(name, "portable") || !strcmp(name, "neon");  // every 64-bit Arm has NEON
}

// Best first.
int usable(const Kernels** out) {
  const Kernels* all[] = {avx512_kernels(), avx2_kernels(), neon_kernels(), portable_kernels()};
  int n = 0;
  for (const Kernels* k : all)
    if (k && cpu_has(k->name)) out[n++] = k;
  return n;
}

}  // namespace

void set_error(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
}

}  // namespace gk

extern "C" {

int gk_abi_version(void) { return GK_ABI_VERSION; }
const char* gk_last_error(void) { return gk::last_error; }

const char* gk_instruction_sets(void) {
  static char names[64];
  static const bool once = [] {
    const gk::Kernels* found[4];
    const int n = gk::usable(found);
    for (int i = 0; i < n; ++i) {
      if (i) strcat(names, " ");
      strcat(names, found[i]->name);
    }
    return true;
  }();
  (void)once;
  return names;
}

gk_context* gk_context_new(int threads, const char* isa) {
  if (threads < 1 || threads > gk::processors()) {
    gk::set_error("threads: expected 1..%d, the processors of this process, got %d", gk::processors(), threads);
    return nullptr;
  }
  const gk::Kernels* found[4];
  const int n = gk::usable(found);
  const gk::Kernels* chosen = isa ? nullptr : found[0];
  for (int i = 0; isa && i < n; ++i)
    if (!strcmp(found[i]->name, isa)) chosen = found[i];
  if (!chosen) {
    gk::set_error("instruction set: expected one of \"%s\", which this CPU and this build have, got \"%.40s\"",
                  gk_instruction_sets(), isa);
    return nullptr;
  }
  gk_context* context = new (std::nothrow) gk_context{};
  if (context) context->pool = gk::pool_new(threads);
  if (!context || !context->pool) {
    gk::set_error("no memory, or no threads left, for a pool of %d threads", threads);
    delete context;
    return nullptr;
  }
  context->kernels = chosen, context->threads = threads;
  return context;
}

void gk_context_free(gk_context* context) {
  if (!context) return;
  gk::pool_free(context->pool);
  free(context->workspace);
  delete context;
}
const char* gk_context_isa(const gk_context* context) { return context->kernels->name; }
int gk_context_threads(const gk_context* context) { return context->threads; }

}  // extern "C"
