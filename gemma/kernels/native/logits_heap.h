// SPDX-License-Identifier: Apache-2.0
// A heap of the k likeliest tokens with the worst of them on top, for logits.h and logits.cpp. The order is total (the
// greater logit first, the lower id among equals), so what it ends up with does not depend on the order of arrival.
#pragma once
#include <stdint.h>

namespace gk {

static inline bool ranks_after(float value, int32_t id, float other, int32_t other_id) {
  return value < other || (value == other && id > other_id);
}

// Puts (value, id) where the hole at `at` is, letting worse children of the heap rise into it.
static inline void heap_sink(int32_t* ids, float* values, int64_t held, int64_t at, float value, int32_t id) {
  for (int64_t child; (child = 2 * at + 1) < held; at = child) {
    if (child + 1 < held && ranks_after(values[child + 1], ids[child + 1], values[child], ids[child])) ++child;
    if (!ranks_after(values[child], ids[child], value, id)) break;
    values[at] = values[child];
    ids[at] = ids[child];
  }
  values[at] = value;
  ids[at] = id;
}

// Offers a token to a heap that holds `held` of at most k; returns how many it holds then.
static inline int64_t heap_offer(int32_t* ids, float* values, int64_t held, int64_t k, float value, int32_t id) {
  if (held == k) {
    if (ranks_after(values[0], ids[0], value, id)) heap_sink(ids, values, held, 0, value, id);
    return held;
  }
  int64_t at = held;
  for (int64_t parent; at > 0; at = parent) {
    parent = (at - 1) / 2;
    if (!ranks_after(value, id, values[parent], ids[parent])) break;
    values[at] = values[parent];
    ids[at] = ids[parent];
  }
  values[at] = value;
  ids[at] = id;
  return held + 1;
}

// Sorts the heap in place, the likeliest first.
static inline void heap_sort(int32_t* ids, float* values, int64_t held) {
  while (held > 1) {
    const float value = values[--held], worst = values[0];
    const int32_t id = ids[held], worst_id = ids[0];
    heap_sink(ids, values, held, 0, value, id);
    values[held] = worst;
    ids[held] = worst_id;
  }
}

}  // namespace gk
