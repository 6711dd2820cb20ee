// SPDX-License-Identifier: Apache-2.0
// One pass through the decoder: embedding, layers, head. It reads top to bottom like the model's definition.
//
// Rows are activations: the tokens of a chunk, or one token of each of several slots. Small steps run on the calling
// thread for a few rows and over the pool for many; a row's numbers are the same either way.
#include <math.h>
#include <string.h>

#include <atomic>

#include "model.h"

namespace gk {
namespace {

// f(row) for every row, over the pool where there are enough of them.
template <class F>
void for_rows(gk_model* m, int64_t rows, F f) {
  if (rows < 4) {
    for (int64_t r = 0; r < rows; ++r) f(r);
    return;
  }
  struct Work { F* f; std::atomic<int64_t> next; int64_t rows; } work{&f, {0}, rows};
  pool_run(m->context->pool, [](void* arg, int, int) {
    Work& w = *(Work*)arg;
    constexpr int64_t kLot = 8;
    for (int64_t r; (r = w.next.fetch_add(kLot, std::memory_order_relaxed)) < w.rows;)
      for (int64_t i = r; i < r + kLot && i < w.rows; ++i) (*w.f)(i);
  }, &work);
}

int64_t position(const gk_model* m, const Pass& pass, int64_t row) {
  return pass.chunk ? pass.first + row : m->slots[pass.slots[row]].length;
}

// rope [rows, kinds, 2, H/2]: cosines and sines; angles in float32, as the frameworks have them.
void rope_angles(gk_model* m, const Pass& pass, int64_t row) {
  const int64_t half = m->widest_head / 2;
  for (size_t kind = 0; kind < m->rope_bases.size(); ++kind) {
    float* out = m->rope.as<float>() + (row * m->rope_bases.size() + kind) * 2 * half;
    const float at = (float)position(m, pass, row) / m->rope_scales[kind];
    for (int64_t i = 0; i < half; ++i) {
      const float timescale = powf(m->rope_bases[kind], 2.0f * (float)i / (float)m->widest_head);
      const float angle = at / timescale;
      out[i] = cosf(angle), out[half + i] = sinf(angle);
    }
  }
}

// Norms, rotates and scales a row's queries; norms, rotates and stores its keys; stores its values.
void finish_heads(gk_model* m, int layer, const Fresh& fresh, const Pass& pass, int64_t row) {
  const Kernels* k = m->context->kernels;
  const gk_layer& l = m->layers[layer];
  const int64_t H = l.head_dim, half = m->widest_head / 2;
  const float* cos = m->rope.as<float>() + (row * m->rope_bases.size() + m->rope_of[layer]) * 2 * half;
  float* q = m->q.as<float>() + row * l.num_heads * H;
  float* key = m->k.as<float>() + row * l.num_kv_heads * H;
  const float* value = m->v.as<float>() + row * l.num_kv_heads * H;
  for (int n = 0; l.q_norm && n < l.num_heads; ++n) k->rms_norm(q + n * H, l.q_norm, m->config.norm_eps, H, q + n * H);
  for (int n = 0; l.k_norm && n < l.num_kv_heads; ++n)
    k->rms_norm(key + n * H, l.k_norm, m->config.norm_eps, H, key + n * H);
  k->rope(q, l.num_heads, H, cos, cos + half);
  k->rope(key, l.num_kv_heads, H, cos, cos + half);
  k->scale(q, l.num_heads * H, l.query_scale);
  const int64_t bytes = H * value_bytes(m->cache_type);
  for (int n = 0; n < l.num_kv_heads; ++n) {
    const int64_t at = pass.chunk ? n * pass.rows + row : row * l.num_kv_heads + n;
    k->store_cache(key + n * H, H, m->cache_type, fresh.k.as<uint8_t>() + at * bytes, fresh.k_scale.as<float>() + at);
    k->store_cache(value + n * H, H, m->cache_type, fresh.v.as<uint8_t>() + at * bytes, fresh.v_scale.as<float>() + at);
  }
}

bool attend_rows(gk_model* m, int layer, const Fresh& fresh, const Pass& pass) {
  const int64_t n = pass.chunk ? 1 : pass.rows;
  AttendArgs* items = m->items.as<AttendArgs>();
  int64_t end = 0;
  for (int64_t i = 0; i < n; ++i) {
    items[i] = attend_args(m, layer, fresh, pass, i);
    if (items[i].first_pos + items[i].tokens > end) end = items[i].first_pos + items[i].tokens;
  }
  if (!m->scratch.reserve(attend_parallel_scratch(m->context, &items[0], end) )) return false;
  if (n == 1) attend_parallel(m->context, &items[0], m->scratch.as<void>());
  else attend_batch_parallel(m->context, items, (int)n, m->scratch.as<void>());
  return true;
}

// x += norm(result), or x += result where the model has no norm there.
void add_result(gk_model* m, const float* result, const float* norm, int64_t row) {
  const Kernels* k = m->context->kernels;
  const int64_t D = m->config.hidden_size;
  float* x = m->x.as<float>() + row * D;
  if (norm) k->add_rms_norm(x, result + row * D, norm, m->config.norm_eps, D);
  else k->add(x, result + row * D, D);
}

bool run_layer(gk_model* m, int layer, const Pass& pass) {
  gk_context* c = m->context;
  const Kernels* k = c->kernels;
  const gk_layer& l = m->layers[layer];
  const int64_t D = m->config.hidden_size, NH = (int64_t)l.num_heads * l.head_dim, KH = (int64_t)l.num_kv_heads * l.head_dim;
  const int64_t F = l.gate.rows, T = pass.rows;
  const float eps = m->config.norm_eps;
  Fresh& fresh = m->fresh[pass.keep_pending ? layer : 0];
  if (!reserve_fresh(m, fresh, layer, T)) return false;
  float *x = m->x.as<float>(), *h = m->h.as<float>(), *gate = m->gate.as<float>(), *up = m->up.as<float>();

  for_rows(m, T, [&](int64_t r) { k->rms_norm(x + r * D, l.attn_norm, eps, D, h + r * D); });
  const Product heads[] = {{&l.q, m->q.as<float>(), NH}, {&l.k, m->k.as<float>(), KH}, {&l.v, m->v.as<float>(), KH}};
  if (!multiply(c, heads, 3, h, T, D, low_of(m, layer, &LayerAdapter::heads))) return false;
  for_rows(m, T, [&](int64_t r) { finish_heads(m, layer, fresh, pass, r); });
  if (!attend_rows(m, layer, fresh, pass)) return false;
  if (!pass.keep_pending) write_caches(m, layer, fresh, pass);
  const Product out[] = {{&l.o, gate, D}};  // h holds the attention's result, gate is free
  if (!multiply(c, out, 1, h, T, NH, low_of(m, layer, &LayerAdapter::out))) return false;
  for_rows(m, T, [&](int64_t r) {
    add_result(m, gate, l.post_attn_norm, r);
    k->rms_norm(x + r * D, l.mlp_norm, eps, D, h + r * D);
  });

  const Product wide[] = {{&l.gate, gate, F}, {&l.up, up, F}};
  if (!multiply(c, wide, 2, h, T, D, low_of(m, layer, &LayerAdapter::wide))) return false;
  for_rows(m, T, [&](int64_t r) { k->gelu_mul(gate + r * F, up + r * F, F, gate + r * F); });
  const Product down[] = {{&l.down, h, D}};
  if (!multiply(c, down, 1, gate, T, F, low_of(m, layer, &LayerAdapter::down))) return false;
  for_rows(m, T, [&](int64_t r) { add_result(m, h, l.post_mlp_norm, r); });
  return true;
}

bool reserve_rows(gk_model* m, int64_t rows) {
  const int64_t D = m->config.hidden_size, wide = m->widest_mlp > D ? m->widest_mlp : D;
  const size_t row = rows * sizeof(float), h = m->widest_q > D ? m->widest_q : D;
  return m->x.reserve(row * D) && m->h.reserve(row * h) && m->q.reserve(row * m->widest_q) &&
         m->k.reserve(row * m->widest_kv) && m->v.reserve(row * m->widest_kv) && m->gate.reserve(row * wide) &&
         m->up.reserve(row * wide) && m->rope.reserve(row * m->rope_bases.size() * m->widest_head) &&
         m->items.reserve(rows * sizeof(AttendArgs));
}

}  // namespace

bool run_layers(gk_model* m, const Pass& pass) {
  if (!reserve_rows(m, pass.rows)) return false;
  const Kernels* k = m->context->kernels;
  const int64_t D = m->config.hidden_size;
  for_rows(m, pass.rows, [&](int64_t r) {
    float* x = m->x.as<float>() + r * D;
    k->rows(&m->config.embedding, pass.tokens + r, 1, x);
    k->scale(x, D, m->config.embed_scale);
    rope_angles(m, pass, r);
  });
  for (int layer = 0; layer < (int)m->layers.size(); ++layer)
    if (!run_layer(m, layer, pass)) return false;
  return true;
}

bool run_head(gk_model* m, int64_t row, int64_t rows, float* out, int64_t stride) {
  const Kernels* k = m->context->kernels;
  const int64_t D = m->config.hidden_size, V = m->config.vocab_size;
  float *x = m->x.as<float>() + row * D, *h = m->h.as<float>();
  for_rows(m, rows, [&](int64_t r) { k->rms_norm(x + r * D, m->config.final_norm, m->config.norm_eps, D, h + r * D); });
  const Product head[] = {{&m->config.head, out, stride}};
  if (!multiply(m->context, head, 1, h, rows, D)) return false;
  if (m->config.final_softcap == 0) return true;
  struct Work { const Kernels* k; float* out; int64_t rows, stride, V, lot; float cap; std::atomic<int64_t> next; };
  Work work{k, out, rows, stride, V, 8192, m->config.final_softcap, {0}};
  pool_run(m->context->pool, [](void* arg, int, int) {
    Work& w = *(Work*)arg;
    const int64_t lots = (w.V + w.lot - 1) / w.lot;
    for (int64_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < lots * w.rows;) {
      const int64_t at = i % lots * w.lot, n = w.V - at < w.lot ? w.V - at : w.lot;
      w.k->softcap(w.out + i / lots * w.stride + at, n, w.cap);
    }
  }, &work);
  return true;
}

}  // namespace gk
