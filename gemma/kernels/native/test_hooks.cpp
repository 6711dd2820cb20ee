// SPDX-License-Identifier: Apache-2.0
// Plain C functions through which tests call one kernel of one instruction set, or its scalar reference. No part of the
// library uses them, and they are no part of gemmakit.h. `kernels` is what gk_test_kernels returned.
#include <stdlib.h>
#include <string.h>

#include "attention_layout.h"
#include "kernels.h"
#include "reference.h"

namespace gk {
namespace {

const Kernels* reference_kernels() {
  static const Kernels table = [] {
    Kernels k = {};
    k.name = "reference";
    k.rms_norm = reference::rms_norm, k.add_rms_norm = reference::add_rms_norm, k.add = reference::add;
    k.rope = reference::rope, k.gelu_mul = reference::gelu_mul, k.softcap = reference::softcap;
    k.scale = reference::scale, k.store_cache = reference::store_cache;
    k.bf16_to_f32 = reference::bf16_to_f32, k.f32_to_bf16 = reference::f32_to_bf16;
    k.attend_scratch = reference::attend_scratch, k.attend = reference::attend;
    k.argmax = reference::argmax, k.top_k = reference::top_k, k.sum_exp = reference::sum_exp;
    return k;
  }();
  return &table;
}

bool usable(const char* isa) {  // gk_instruction_sets are words between spaces
  const size_t n = strlen(isa);
  for (const char* at = gk_instruction_sets(); *at; at += *at == ' ') {
    const size_t word = strcspn(at, " ");
    if (word == n && !memcmp(at, isa, n)) return true;
    at += word;
  }
  return false;
}

// Memory that is full of NaN, so that a kernel which reads what it has not written is noticed.
void* scratch_of(size_t bytes) {
  void* p = malloc(bytes);
  if (p) memset(p, 0xFF, bytes);
  return p;
}

const Kernels* of(const void* kernels) { return (const Kernels*)kernels; }

}  // namespace
}  // namespace gk

using gk::AttendArgs;

extern "C" {

// isa: one of gk_instruction_sets(), or "reference". NULL: not here.
GK_API const void* gk_test_kernels(const char* isa) {
  if (!strcmp(isa, "reference")) return gk::reference_kernels();
  if (!gk::usable(isa)) return nullptr;
  const gk::Kernels* all[] = {gk::avx512_kernels(), gk::avx2_kernels(), gk::neon_kernels(), gk::portable_kernels()};
  for (const gk::Kernels* k : all)
    if (k && !strcmp(k->name, isa)) return k;
  return nullptr;
}
GK_API const void* gk_test_context_kernels(const gk_context* context) { return context->kernels; }

GK_API void gk_test_rms_norm(const void* k, const float* x, const float* w, float eps, int64_t n, float* y) {
  gk::of(k)->rms_norm(x, w, eps, n, y);
}
GK_API void gk_test_add_rms_norm(const void* k, float* y, const float* x, const float* w, float eps, int64_t n) {
  gk::of(k)->add_rms_norm(y, x, w, eps, n);
}
GK_API void gk_test_add(const void* k, float* y, const float* x, int64_t n) { gk::of(k)->add(y, x, n); }
GK_API void gk_test_rope(const void* k, float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin) {
  gk::of(k)->rope(x, heads, head_dim, cos, sin);
}
GK_API void gk_test_gelu_mul(const void* k, const float* gate, const float* up, int64_t n, float* y) {
  gk::of(k)->gelu_mul(gate, up, n, y);
}
GK_API void gk_test_softcap(const void* k, float* x, int64_t n, float cap) { gk::of(k)->softcap(x, n, cap); }
GK_API void gk_test_scale(const void* k, float* x, int64_t n, float factor) { gk::of(k)->scale(x, n, factor); }
GK_API void gk_test_store(const void* k, const float* x, int64_t n, int32_t type, void* out, float* scale) {
  gk::of(k)->store_cache(x, n, type, out, scale);
}
GK_API void gk_test_bf16_to_f32(const void* k, const uint16_t* x, int64_t n, float* y) {
  gk::of(k)->bf16_to_f32(x, n, y);
}
GK_API void gk_test_f32_to_bf16(const void* k, const float* x, int64_t n, uint16_t* y) {
  gk::of(k)->f32_to_bf16(x, n, y);
}
GK_API int64_t gk_test_argmax(const void* k, const float* x, int64_t n) { return gk::of(k)->argmax(x, n); }
GK_API int64_t gk_test_top_k(const void* k, const float* x, int64_t n, int64_t first, int64_t most, int32_t* ids,
                             float* values, int64_t held) {
  return gk::of(k)->top_k(x, n, first, most, ids, values, held);
}
GK_API double gk_test_sum_exp(const void* k, const float* x, int64_t n, float shift) {
  return gk::of(k)->sum_exp(x, n, shift);
}
// y[i] = e^x[i], each by itself.
GK_API void gk_test_exp(const void* k, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = (float)gk::of(k)->sum_exp(x + i, 1, 0.0f);
}

GK_API int64_t gk_test_attend_args_bytes(void) { return (int64_t)sizeof(AttendArgs); }
GK_API int gk_test_attend(const void* k, const AttendArgs* args, int64_t t0, int64_t t1, int64_t k0, int64_t k1) {
  void* scratch = gk::scratch_of(gk::of(k)->attend_scratch(args));
  if (!scratch) return GK_NO_MEMORY;
  gk::of(k)->attend(args, t0, t1, k0, k1, scratch);
  free(scratch);
  return GK_OK;
}
// The same by key blocks computed apart, the last first, and merged.
GK_API int gk_test_attend_blocks(const void* k, const AttendArgs* args, int64_t t0, int64_t t1, int64_t kv_head) {
  const int64_t first = gk::attend_first_block(args, t0), end = gk::attend_end_block(args, t1);
  const int64_t each = gk::attend_part_floats(args, (t1 - t0) * gk::attend_group(args));
  void* scratch = gk::scratch_of(gk::of(k)->attend_scratch(args));
  float* parts = (float*)gk::scratch_of((size_t)((end - first) * each) * sizeof(float));
  const bool room = scratch && parts;
  for (int64_t b = end - 1; room && b >= first; --b) {
    gk::of(k)->attend_blocks(args, t0, t1, kv_head, b, b + 1, parts + (b - first) * each, scratch);
  }
  if (room) gk::of(k)->attend_merge(args, t0, t1, kv_head, first, end, parts, scratch);
  free(scratch);
  free(parts);
  return room ? GK_OK : GK_NO_MEMORY;
}
// attend_batch_parallel with scratch for `positions`; the last bytes of the scratch must stay as they were.
GK_API int gk_test_attend_parallel(gk_context* context, const AttendArgs* items, int32_t n, int64_t positions) {
  const size_t bytes = gk::attend_parallel_scratch(context, items, positions);
  unsigned char* scratch = (unsigned char*)gk::scratch_of(bytes + 64);
  if (!scratch) return GK_NO_MEMORY;
  {
    std::lock_guard<std::mutex> guard(context->lock);
    gk::attend_batch_parallel(context, items, n, scratch);
  }
  bool kept = true;
  for (int i = 0; i < 64; ++i) kept = kept && scratch[bytes + i] == 0xFF;
  free(scratch);
  return kept ? GK_OK : GK_BAD_ARGUMENT;
}

}  // extern "C"
