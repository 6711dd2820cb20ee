// SPDX-License-Identifier: Apache-2.0
// Kernels over a stretch of logits: the likeliest, the k likeliest, and the sum of exponentials. logits.cpp runs them
// over stretches of the vocabulary, which are the same for any number of threads.
#pragma once
#include "logits_heap.h"
#include "vector_math.h"

namespace gk::GK_NS {

constexpr int64_t kLogitGroup = 4 * GK_VF;

// The first index of the greatest; -1 where one is NaN or none is finite.
static int64_t argmax(const float* x, int64_t n) {
  constexpr int64_t kStretch = 64 * kLogitGroup;
  float best = -kInfinity;
  int64_t where = 0;  // the stretch that first reached `best`
  vi odd = {};
  for (int64_t start = 0; start < n; start += kStretch) {
    const int64_t end = smaller(start + kStretch, n);
    vf top = splat(-kInfinity);
    int64_t i = start;
    for (; i + GK_VF <= end; i += GK_VF) {
      vf v = loadf(x + i);
      odd |= v != v;
      top = vmax(v, top);
    }
    float m = lane_max(top);
    for (; i < end; ++i) {
      if (x[i] != x[i]) return -1;
      m = x[i] > m ? x[i] : m;
    }
    if (m > best) best = m, where = start;
  }
  if (any(odd) || best == -kInfinity) return -1;
  if (best == kInfinity) {
    bool finite = false;
    for (int64_t i = 0; i < n && !finite; ++i) finite = x[i] < kInfinity && x[i] > -kInfinity;
    if (!finite) return -1;
  }
  while (x[where] != best) ++where;
  return where;
}

// NaN is passed over; the caller has looked for it.
static int64_t top_k(const float* x, int64_t n, int64_t first, int64_t k, int32_t* ids, float* values, int64_t held) {
  int64_t i = 0;
  while (i < n) {
    if (held == k && n - i >= kLogitGroup) {  // most groups have nothing above the worst that is held
      const vf bar = splat(values[0]);
      vi above = loadf(x + i) >= bar;
      for (int64_t j = GK_VF; j < kLogitGroup; j += GK_VF) above |= loadf(x + i + j) >= bar;
      if (!any(above)) {
        i += kLogitGroup;
        continue;
      }
    }
    for (int64_t end = smaller(i + kLogitGroup, n); i < end; ++i) {
      if (x[i] == x[i]) held = heap_offer(ids, values, held, k, x[i], (int32_t)(first + i));
    }
  }
  return held;
}

// The sum of exp(x - shift): floats over 64 vectors, doubles over those.
static double sum_exp(const float* x, int64_t n, float shift) {
  const vf by = splat(shift);
  double total = 0.0;
  for (int64_t start = 0; start < n; start += 64 * GK_VF) {
    const int64_t end = smaller(start + 64 * GK_VF, n);
    vf sum = {};
    int64_t i = start;
    for (; i + GK_VF <= end; i += GK_VF) sum = sum + vexp(loadf(x + i) - by);
    if (i < end) {
      float last[GK_VF];
      for (int64_t j = 0; j < GK_VF; ++j) last[j] = i + j < end ? x[i + j] : -kInfinity;
      sum = sum + vexp(loadf(last) - by);
    }
    for (int j = 0; j < GK_VF; ++j) total += (double)sum[j];
  }
  return total;
}

}  // namespace gk::GK_NS
