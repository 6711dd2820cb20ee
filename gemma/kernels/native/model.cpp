// SPDX-License-Identifier: Apache-2.0
// The C face of a decoder: arguments are checked here, once; forward.cpp and cache.cpp trust them.
#include <string.h>

#include <new>

#include "model.h"

namespace gk {
namespace {

bool fits(const char* name, int layer, const gk_weight& w, int64_t rows, int64_t cols) {
  if (w.rows == rows && w.cols == cols) return valid_weight(&w);
  set_error("layer %d, %s: expected [%ld, %ld], got [%ld, %ld]", layer, name, (long)rows, (long)cols, (long)w.rows,
            (long)w.cols);
  return false;
}

bool valid_layer(const gk_model_config& c, const gk_layer& l, int i) {
  const int64_t D = c.hidden_size, NH = (int64_t)l.num_heads * l.head_dim, KH = (int64_t)l.num_kv_heads * l.head_dim;
  if (l.num_kv_heads < 1 || l.num_heads < 1 || l.num_heads % l.num_kv_heads || l.head_dim < 2 || l.head_dim % 2 ||
      l.window < 0 || !(l.rope_base > 0) || !(l.rope_scale > 0) || !l.attn_norm || !l.mlp_norm)
    return set_error("layer %d: heads, head_dim, window, rope or norms are not those of a Gemma", i), false;
  return fits("q", i, l.q, NH, D) && fits("k", i, l.k, KH, D) && fits("v", i, l.v, KH, D) && fits("o", i, l.o, D, NH) &&
         fits("gate", i, l.gate, l.gate.rows, D) && fits("up", i, l.up, l.gate.rows, D) &&
         fits("down", i, l.down, D, l.gate.rows);
}

void widen(int64_t& most, int64_t value) {
  if (value > most) most = value;
}

int rope_kind(gk_model* m, const gk_layer& l) {
  for (size_t i = 0; i < m->rope_bases.size(); ++i)
    if (m->rope_bases[i] == l.rope_base && m->rope_scales[i] == l.rope_scale) return (int)i;
  m->rope_bases.push_back(l.rope_base), m->rope_scales.push_back(l.rope_scale);
  return (int)m->rope_bases.size() - 1;
}

bool valid_slot(const gk_model* m, int32_t slot) {
  if (slot >= 0 && slot < (int64_t)m->slots.size()) return true;
  return set_error("slot: expected 0..%ld, got %d", (long)m->slots.size() - 1, slot), false;
}
bool valid_ids(const gk_model* m, const int32_t* ids, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= m->config.vocab_size)
      return set_error("ids: expected 0..%ld, got %d", (long)m->config.vocab_size - 1, ids[i]), false;
  return true;
}
bool has_room(const gk_model* m, int32_t slot, int64_t n) {
  const int64_t length = m->slots[slot].length;
  if (length + n <= m->max_len) return true;
  return set_error("slot %d: holds %ld of %ld tokens, no room for %ld more", slot, (long)length, (long)m->max_len, (long)n),
         false;
}
float* logits_of(gk_model* m, int32_t slot) { return m->logits.as<float>() + slot * m->config.vocab_size; }

}  // namespace
}  // namespace gk

using namespace gk;

extern "C" {

gk_model* gk_model_new(gk_context* context, const gk_model_config* config, const gk_layer* layers) try {
  if (!context || !config || !layers || config->num_layers < 1 || config->hidden_size < 1 || !config->final_norm) {
    set_error("model: expected a context, at least one layer and a final norm");
    return nullptr;
  }
  if (!fits("embedding", -1, config->embedding, config->vocab_size, config->hidden_size) ||
      !fits("head", -1, config->head, config->vocab_size, config->hidden_size))
    return nullptr;
  for (int i = 0; i < config->num_layers; ++i) {
    if (!valid_layer(*config, layers[i], i)) return nullptr;
    if (layers[i].head_dim != layers[0].head_dim) {
      set_error("layer %d: head_dim %d differs from layer 0's %d", i, layers[i].head_dim, layers[0].head_dim);
      return nullptr;
    }
  }
  gk_model* m = new gk_model{};
  m->context = context, m->config = *config;
  m->layers.assign(layers, layers + config->num_layers);
  m->caches.resize(config->num_layers);
  m->fresh.resize(config->num_layers);
  for (const gk_layer& l : m->layers) {
    widen(m->widest_q, (int64_t)l.num_heads * l.head_dim);
    widen(m->widest_kv, (int64_t)l.num_kv_heads * l.head_dim);
    widen(m->widest_mlp, l.gate.rows);
    widen(m->widest_head, l.head_dim);
    m->rope_of.push_back(rope_kind(m, l));
  }
  return m;
} catch (const std::bad_alloc&) {
  set_error("no memory for a model");
  return nullptr;
}

void gk_model_free(gk_model* m) { delete m; }
int64_t gk_model_cache_bytes(const gk_model* m) { return m->cache_bytes; }

int gk_model_open(gk_model* m, int32_t slots, int64_t max_len, int32_t cache_type, int64_t chunk) try {
  if (slots < 1 || max_len < 1 || chunk < 1 || cache_type < GK_CACHE_F32 || cache_type > GK_CACHE_INT8)
    return set_error("open: expected 1 or more slots, tokens and tokens of a chunk, got %d, %ld, %ld, cache type %d", slots,
                     (long)max_len, (long)chunk, cache_type), GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  if (make_caches(m, slots, max_len, cache_type, chunk)) return GK_OK;
  m->slots.clear();
  return GK_NO_MEMORY;
} catch (const std::bad_alloc&) {
  return set_error("no memory for %d slots", slots), GK_NO_MEMORY;
}

int gk_model_prefill(gk_model* m, int32_t slot, const int32_t* ids, int64_t n) {
  if (!valid_slot(m, slot) || !valid_ids(m, ids, n)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  settle(m);
  if (n < 1 || !has_room(m, slot, n)) return GK_BAD_ARGUMENT;
  m->slots[slot].current = false;
  for (int64_t at = 0; at < n; at += m->chunk) {
    const int64_t rows = n - at < m->chunk ? n - at : m->chunk;
    const Pass pass = {ids + at, &slot, rows, m->slots[slot].length, true, false};
    if (!run_layers(m, pass)) return GK_NO_MEMORY;
    m->slots[slot].length += rows, m->slots[slot].took(m->slots[slot].length);
    if (at + rows == n && !run_head(m, rows - 1, 1, logits_of(m, slot), m->config.vocab_size)) return GK_NO_MEMORY;
  }
  m->slots[slot].current = true;
  return GK_OK;
}

int gk_model_step(gk_model* m, int32_t n, const int32_t* slots, const int32_t* tokens) {
  if (n < 1 || !valid_ids(m, tokens, n)) return n < 1 ? set_error("step: an empty batch"), GK_BAD_ARGUMENT : GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  settle(m);
  bool in_order = true;
  for (int32_t i = 0; i < n; ++i) {
    if (!valid_slot(m, slots[i]) || !has_room(m, slots[i], 1)) return GK_BAD_ARGUMENT;
    for (int32_t j = 0; j < i; ++j)
      if (slots[j] == slots[i]) return set_error("step: slot %d twice in a batch", slots[i]), GK_BAD_ARGUMENT;
    in_order = in_order && slots[i] == slots[0] + i;
  }
  const Pass pass = {tokens, slots, n, 0, false, false};
  const int64_t V = m->config.vocab_size;
  if (!in_order && !m->scored.reserve((size_t)n * V * sizeof(float))) return GK_NO_MEMORY;
  for (int32_t i = 0; i < n; ++i) m->slots[slots[i]].current = false;
  if (!run_layers(m, pass)) return GK_NO_MEMORY;
  if (!run_head(m, 0, n, in_order ? logits_of(m, slots[0]) : m->scored.as<float>(), V)) return GK_NO_MEMORY;
  for (int32_t i = 0; i < n; ++i) {
    if (!in_order) memcpy(logits_of(m, slots[i]), m->scored.as<float>() + i * V, V * sizeof(float));
    m->slots[slots[i]].length += 1, m->slots[slots[i]].current = true;
    m->slots[slots[i]].took(m->slots[slots[i]].length);
  }
  return GK_OK;
}

int gk_model_score(gk_model* m, int32_t slot, const int32_t* ids, int64_t n) {
  if (!valid_slot(m, slot) || !valid_ids(m, ids, n)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  settle(m);
  if (n < 1 || n > m->chunk)
    return set_error("score: expected 1..%ld tokens, got %ld", (long)m->chunk, (long)n), GK_BAD_ARGUMENT;
  if (!has_room(m, slot, n)) return GK_BAD_ARGUMENT;
  const int64_t V = m->config.vocab_size, first = m->slots[slot].length;
  if (!m->scored.reserve((size_t)n * V * sizeof(float))) return GK_NO_MEMORY;
  m->slots[slot].current = false;
  const Pass pass = {ids, &slot, n, first, true, true};
  if (!run_layers(m, pass) || !run_head(m, 0, n, m->scored.as<float>(), V)) return GK_NO_MEMORY;
  memcpy(logits_of(m, slot), m->scored.as<float>() + (n - 1) * V, V * sizeof(float));
  m->slots[slot].length += n, m->slots[slot].current = true;
  m->pending = {slot, first, n, n};
  return GK_OK;
}

const float* gk_model_chunk_logits(gk_model* m) { return m->scored.as<float>(); }
const float* gk_model_logits(gk_model* m, int32_t slot) {
  return valid_slot(m, slot) && m->slots[slot].current ? logits_of(m, slot) : nullptr;
}
int64_t gk_model_length(const gk_model* m, int32_t slot) { return valid_slot(m, slot) ? m->slots[slot].length : -1; }

int gk_model_truncate(gk_model* m, int32_t slot, int64_t n) {
  if (!valid_slot(m, slot)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  Slot& s = m->slots[slot];
  Pending& p = m->pending;
  if (n < 0 || n > s.length)
    return set_error("truncate: expected 0..%ld, got %ld", (long)s.length, (long)n), GK_BAD_ARGUMENT;
  if (p.slot == slot && n >= p.first) {  // scored tokens are given back before any ring has taken them
    const int64_t V = m->config.vocab_size;
    p.kept = n - p.first, s.length = n, s.current = p.kept > 0;
    if (p.kept) memcpy(logits_of(m, slot), m->scored.as<float>() + (p.kept - 1) * V, V * sizeof(float));
    return GK_OK;
  }
  settle(m);
  if (!can_shorten(m, s, n))
    return set_error("slot %d: a window's ring no longer holds what %ld tokens need", slot, (long)n), GK_UNSUPPORTED;
  s.current = s.current && n == s.length;
  s.length = n, s.written = n ? s.written : 0;
  return GK_OK;
}

int gk_model_copy(gk_model* m, int32_t src, int32_t dst, int64_t n) {
  if (!valid_slot(m, src) || !valid_slot(m, dst)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  settle(m);
  const Slot from = m->slots[src];
  if (n < 0 || n > from.length)
    return set_error("copy: expected 0..%ld, got %ld", (long)from.length, (long)n), GK_BAD_ARGUMENT;
  if (src != dst && !copy_slot(m, src, dst, n))
    return set_error("slot %d: a window's ring no longer holds what %ld tokens need", src, (long)n), GK_UNSUPPORTED;
  if (src == dst && !can_shorten(m, from, n)) return set_error("slot %d: cannot be shortened", src), GK_UNSUPPORTED;
  m->slots[dst] = {n, from.current && n == from.length && n > 0, n ? from.written : 0};
  if (m->slots[dst].current && src != dst)
    memcpy(logits_of(m, dst), logits_of(m, src), m->config.vocab_size * sizeof(float));
  return GK_OK;
}

}  // extern "C"
