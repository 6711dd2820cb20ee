// SPDX-License-Identifier: Apache-2.0
// Caches of keys and values: a ring of the window on local layers, the whole context on global ones.
//
// Position p of a slot stands at p % capacity. A chunk is attended to where it was computed (Fresh) and then written, so
// a ring needs no more room than its window. Scored tokens stay there until it is known how many of them are kept.
#include <string.h>

#include "model.h"

namespace gk {

int64_t value_bytes(int32_t cache_type) {
  return cache_type == GK_CACHE_F32 ? 4 : cache_type == GK_CACHE_BF16 ? 2 : 1;
}

bool make_caches(gk_model* m, int32_t slots, int64_t max_len, int32_t cache_type, int64_t chunk) {
  for (LayerCache& c : m->caches) c.k.release(), c.v.release(), c.k_scale.release(), c.v_scale.release();
  m->slots.assign(slots, Slot{});
  m->pending = Pending{};
  m->max_len = max_len, m->chunk = chunk, m->cache_type = cache_type, m->cache_bytes = 0;
  for (size_t i = 0; i < m->layers.size(); ++i) {
    const gk_layer& layer = m->layers[i];
    LayerCache& cache = m->caches[i];
    cache.capacity = layer.window && layer.window < max_len ? layer.window : max_len;
    const size_t vectors = (size_t)slots * layer.num_kv_heads * cache.capacity;
    const size_t bytes = vectors * layer.head_dim * value_bytes(cache_type);
    if (!cache.k.reserve(bytes) || !cache.v.reserve(bytes)) return false;
    m->cache_bytes += 2 * bytes;
    if (cache_type == GK_CACHE_INT8) {
      if (!cache.k_scale.reserve(vectors * 4) || !cache.v_scale.reserve(vectors * 4)) return false;
      m->cache_bytes += 2 * vectors * 4;
    }
  }
  return m->logits.reserve((size_t)slots * m->config.vocab_size * sizeof(float));
}

bool reserve_fresh(gk_model* m, Fresh& fresh, int layer, int64_t rows) {
  const gk_layer& l = m->layers[layer];
  const size_t vectors = (size_t)l.num_kv_heads * rows, bytes = vectors * l.head_dim * value_bytes(m->cache_type);
  return fresh.k.reserve(bytes) && fresh.v.reserve(bytes) && fresh.k_scale.reserve(vectors * 4) &&
         fresh.v_scale.reserve(vectors * 4);
}

namespace {

struct Part {  // of a cache: one slot's
  uint8_t *k, *v;
  float *k_scale, *v_scale;
};
Part part_of(const gk_model* m, int layer, int32_t slot) {
  const gk_layer& l = m->layers[layer];
  const LayerCache& c = m->caches[layer];
  const size_t vectors = (size_t)slot * l.num_kv_heads * c.capacity, bytes = vectors * l.head_dim * value_bytes(m->cache_type);
  const bool scaled = m->cache_type == GK_CACHE_INT8;
  return {c.k.as<uint8_t>() + bytes, c.v.as<uint8_t>() + bytes, scaled ? c.k_scale.as<float>() + vectors : nullptr,
          scaled ? c.v_scale.as<float>() + vectors : nullptr};
}

// Tokens t0..t1 of a chunk [K, stride, H] to positions first + t of a slot.
void put(gk_model* m, int layer, int32_t slot, const Part& from, int64_t stride, int64_t first, int64_t t0, int64_t t1) {
  const gk_layer& l = m->layers[layer];
  const int64_t capacity = m->caches[layer].capacity, bytes = l.head_dim * value_bytes(m->cache_type);
  const Part to = part_of(m, layer, slot);
  if (t1 - t0 > capacity) t0 = t1 - capacity;  // a ring keeps the last ones
  for (int head = 0; head < l.num_kv_heads; ++head)
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t at = head * capacity + (first + t) % capacity, source = head * stride + t;
      memcpy(to.k + at * bytes, from.k + source * bytes, bytes);
      memcpy(to.v + at * bytes, from.v + source * bytes, bytes);
      if (to.k_scale) to.k_scale[at] = from.k_scale[source], to.v_scale[at] = from.v_scale[source];
    }
}
Part part_of(const gk_model* m, const Fresh& fresh, int layer, int64_t vectors) {
  const int64_t bytes = vectors * m->layers[layer].head_dim * value_bytes(m->cache_type);
  return {fresh.k.as<uint8_t>() + bytes, fresh.v.as<uint8_t>() + bytes, fresh.k_scale.as<float>() + vectors,
          fresh.v_scale.as<float>() + vectors};
}

}  // namespace

AttendArgs attend_args(gk_model* m, int layer, const Fresh& fresh, const Pass& pass, int64_t row) {
  const gk_layer& l = m->layers[layer];
  const int32_t slot = pass.slots[pass.chunk ? 0 : row];
  const Part cache = part_of(m, layer, slot);
  const Part mine = part_of(m, fresh, layer, pass.chunk ? 0 : row * l.num_kv_heads);
  const bool scaled = m->cache_type == GK_CACHE_INT8;
  const int64_t width = (int64_t)l.num_heads * l.head_dim;
  AttendArgs a{};
  a.q = m->q.as<float>() + row * width, a.out = m->h.as<float>() + row * width;
  a.q_stride = a.out_stride = width;
  a.tokens = pass.chunk ? pass.rows : 1;
  a.first_pos = pass.chunk ? pass.first : m->slots[slot].length;
  a.k = cache.k, a.v = cache.v, a.k_scale = cache.k_scale, a.v_scale = cache.v_scale;
  a.capacity = m->caches[layer].capacity;
  a.ck = mine.k, a.cv = mine.v;
  a.ck_scale = scaled ? mine.k_scale : nullptr, a.cv_scale = scaled ? mine.v_scale : nullptr;
  a.chunk_capacity = pass.chunk ? pass.rows : 1;
  a.cache_type = m->cache_type;
  a.num_heads = l.num_heads, a.num_kv_heads = l.num_kv_heads, a.head_dim = l.head_dim, a.window = l.window;
  a.softcap = l.attn_softcap;
  return a;
}

void write_caches(gk_model* m, int layer, const Fresh& fresh, const Pass& pass) {
  if (pass.chunk) {
    put(m, layer, pass.slots[0], part_of(m, fresh, layer, 0), pass.rows, pass.first, 0, pass.rows);
    return;
  }
  const int64_t heads = m->layers[layer].num_kv_heads;
  for (int64_t row = 0; row < pass.rows; ++row) {
    const int64_t length = m->slots[pass.slots[row]].length;
    put(m, layer, pass.slots[row], part_of(m, fresh, layer, row * heads), 1, length, 0, 1);
  }
}

void settle(gk_model* m) {
  const Pending p = m->pending;
  m->pending = Pending{};
  if (p.slot < 0) return;
  m->slots[p.slot].took(p.first + p.kept);
  for (int i = 0; i < (int)m->layers.size(); ++i)
    put(m, i, p.slot, part_of(m, m->fresh[i], i, 0), p.count, p.first, 0, p.kept);
}

bool can_shorten(const gk_model* m, const Slot& slot, int64_t n) {
  if (n == 0 || n == slot.length) return true;
  for (size_t i = 0; i < m->layers.size(); ++i) {
    // The next token stands at n and sees back to n - window + 1; the ring holds written - capacity and later.
    const int64_t capacity = m->caches[i].capacity, window = m->layers[i].window;
    const int64_t needed = window && n - window + 1 > 0 ? n - window + 1 : 0;
    if (slot.written - capacity > needed) return false;
  }
  return true;
}

bool copy_slot(gk_model* m, int32_t src, int32_t dst, int64_t n) {
  const int64_t length = m->slots[src].length;
  if (!can_shorten(m, m->slots[src], n)) return false;
  for (int i = 0; i < (int)m->layers.size() && n; ++i) {
    const gk_layer& l = m->layers[i];
    const int64_t capacity = m->caches[i].capacity, vector = l.head_dim * value_bytes(m->cache_type);
    const int64_t used = length < capacity ? length : capacity;
    const Part from = part_of(m, i, src), to = part_of(m, i, dst);
    for (int head = 0; head < l.num_kv_heads; ++head) {
      const int64_t at = head * capacity;
      memcpy(to.k + at * vector, from.k + at * vector, used * vector);
      memcpy(to.v + at * vector, from.v + at * vector, used * vector);
      if (!to.k_scale) continue;
      memcpy(to.k_scale + at, from.k_scale + at, used * sizeof(float));
      memcpy(to.v_scale + at, from.v_scale + at, used * sizeof(float));
    }
  }
  return true;
}

}  // namespace gk
