// SPDX-License-Identifier: Apache-2.0
// Windowed grouped-query attention of one sequence over its cache and its own chunk, for any number of tokens.
//
// Keys are taken in blocks of 128 that begin at multiples of 128 of the absolute position. A block gives each query row
// (token t, head g; row t * G + g) its maximum m, its sum l of exp(s - m) and its values weighted so; blocks are merged
// in order. What a row does not see adds exact zeros. So the bits of a token are the same in any chunk, tile or ring
// position, and on any number of threads: blocks may be computed apart (attend_blocks) and merged after (attend_merge).
#pragma once
#include "attention_products.h"
#include "elementwise.h"

namespace gk::GK_NS {

// Tokens t0.. of one kv head, and the scratch they work in.
struct Tile {
  const AttendArgs* args;
  int64_t kv_head, t0, tokens, group, rows, width, lanes;  // lanes: head_dim in whole vectors
  float* q;               // [rows, width]
  float* scores;          // [rows, kScoreRow]
  float* staged;          // [kKeyBlock + 4, width + kRowSkip]
  float* part;            // maxima, sums, weighted values: see attend_part_floats
  float *total;           // [rows, width]
  float *max, *sum, *keep, *take;  // [padded rows]; of the blocks so far, and the factors of a merge
  const void **keys, **values;  // [kKeyBlock + 4]: where they stand
  float* key_scale;       // [kKeyBlock + 4], for int8
  float* value_scale;
};

GK_INLINE uintptr_t carve(uintptr_t* at, int64_t bytes) {
  const uintptr_t p = *at;
  *at += (uintptr_t)(bytes + 63) / 64 * 64;
  return p;
}

// Lays a tile of `tokens` out from address `at` on; returns the end.
static uintptr_t lay_out(Tile* tile, const AttendArgs* a, int64_t tokens, uintptr_t at) {
  at = (at + 63) / 64 * 64;
  tile->args = a;
  tile->group = attend_group(a);
  tile->width = attend_width(a);
  tile->lanes = (a->head_dim + GK_VF - 1) / GK_VF * GK_VF;
  const int64_t rows = tokens * tile->group, padded = padded_rows(rows) * 4;
  tile->keys = (const void**)carve(&at, (kKeyBlock + 4) * (int64_t)sizeof(void*));
  tile->values = (const void**)carve(&at, (kKeyBlock + 4) * (int64_t)sizeof(void*));
  tile->key_scale = (float*)carve(&at, (kKeyBlock + 4) * 4);
  tile->value_scale = (float*)carve(&at, (kKeyBlock + 4) * 4);
  tile->max = (float*)carve(&at, padded);
  tile->sum = (float*)carve(&at, padded);
  tile->keep = (float*)carve(&at, padded);
  tile->take = (float*)carve(&at, padded);
  tile->q = (float*)carve(&at, rows * tile->width * 4);
  tile->scores = (float*)carve(&at, rows * kScoreRow * 4);
  tile->total = (float*)carve(&at, rows * tile->width * 4);
  tile->part = (float*)carve(&at, attend_part_floats(a, rows) * 4);
  tile->staged = (float*)carve(&at, (kKeyBlock + 4) * (tile->width + kRowSkip) * 4);
  return at;
}

static size_t attend_scratch(const AttendArgs* a) {
  Tile tile;
  return (size_t)lay_out(&tile, a, attend_tile_tokens(a), 0) + 64;
}

// Points the tile at its tokens, copies its queries, and forgets what was merged.
static void begin_tile(Tile* tile, int64_t kv_head, int64_t t0, int64_t tokens) {
  const AttendArgs* a = tile->args;
  tile->kv_head = kv_head;
  tile->t0 = t0;
  tile->tokens = tokens;
  tile->rows = tokens * tile->group;
  for (int64_t r = 0; r < tile->rows; ++r) {
    int64_t t = t0 + r / tile->group, head = kv_head * tile->group + r % tile->group;
    float* q = tile->q + r * tile->width;
    memcpy(q, a->q + t * a->q_stride + head * a->head_dim, (size_t)a->head_dim * 4);
    memset(q + a->head_dim, 0, (size_t)(tile->width - a->head_dim) * 4);
  }
  memset(tile->total, 0, (size_t)(tile->rows * tile->width) * 4);
  for (int64_t r = 0; r < padded_rows(tile->rows); ++r) {
    tile->max[r] = -kInfinity;
    tile->sum[r] = 0.0f;
  }
}

// Where keys (or values) base + j0 .. base + j1 stand; the last pointer is repeated four times.
template <class T>
static const T* const* find(Tile* tile, bool values, int64_t base, int64_t j0, int64_t j1) {
  const AttendArgs* a = tile->args;
  const T* cache = (const T*)(values ? a->v : a->k) + tile->kv_head * a->capacity * a->head_dim;
  const T* chunk = (const T*)(values ? a->cv : a->ck) + tile->kv_head * a->chunk_capacity * a->head_dim;
  const T** at = (const T**)(values ? tile->values : tile->keys);
  int64_t slot = a->capacity > 0 ? (base + j0) % a->capacity : 0;
  for (int64_t j = j0; j < j1; ++j) {
    const int64_t token = base + j - a->first_pos;
    at[j] = token < 0 ? cache + slot * a->head_dim : chunk + token * a->head_dim;
    if (++slot == a->capacity) slot = 0;
  }
  for (int64_t j = j1; j < j1 + 4; ++j) at[j] = at[j1 - 1];
  return at;
}

// The scales of int8 keys and values base + j0 .. base + j1.
static void find_scales(Tile* tile, int64_t base, int64_t j0, int64_t j1) {
  const AttendArgs* a = tile->args;
  if (a->cache_type != GK_CACHE_INT8) return;
  for (int64_t j = j0; j < j1; ++j) {
    const bool own = base + j >= a->first_pos;
    const int64_t i = own ? tile->kv_head * a->chunk_capacity + base + j - a->first_pos
                          : tile->kv_head * a->capacity + (base + j) % a->capacity;
    tile->key_scale[j] = (own ? a->ck_scale : a->k_scale)[i];
    tile->value_scale[j] = (own ? a->cv_scale : a->v_scale)[i];
  }
}

// Copies rows j0..j1 as floats, padded with zeros to whole vectors, and points at the copies. False: one of them is not
// finite.
template <class T>
static bool stage(const Tile* tile, const void** rows, int64_t j0, int64_t j1) {
  const int64_t n = tile->args->head_dim, whole = n / GK_VF * GK_VF, stride = tile->width + kRowSkip;
  vf odd = {};
  for (int64_t j = j0; j < j1; ++j) {
    const T* from = (const T*)rows[j];
    float* to = tile->staged + j * stride;
    for (int64_t h = 0; h < whole; h += GK_VF) {
      vf v = load_as_float(from + h);
      odd = fma(v, vf{}, odd);
      gk::GK_NS::store(to + h, v);
    }
    if (whole < n) {
      T last[GK_VF] = {};
      memcpy(last, from + whole, (size_t)(n - whole) * sizeof(T));
      vf v = load_as_float(last);
      odd = fma(v, vf{}, odd);
      gk::GK_NS::store(to + whole, v);
    }
    rows[j] = to;
  }
  for (int64_t j = j1; j < j1 + 4; ++j) rows[j] = rows[j1 - 1];
  return !any(odd != odd);
}

// Which keys of the block at `base` row r sees: lo..hi within 0..kKeyBlock, perhaps none.
GK_INLINE void visible(const Tile* tile, int64_t r, int64_t base, int64_t* lo, int64_t* hi) {
  const int64_t t = tile->t0 + r / tile->group;
  *lo = larger(first_visible(tile->args, t) - base, 0);
  *hi = smaller(tile->args->first_pos + t + 1 - base, kKeyBlock);
}

// Turns a row of scores into weights of the values for lanes j0..j1, 0 outside lo..hi, and says its maximum and sum.
static void softmax_row(const Tile* tile, float* s, int64_t j0, int64_t j1, int64_t lo, int64_t hi, float* max,
                        float* sum) {
  const AttendArgs* a = tile->args;
  const bool scaled = a->cache_type == GK_CACHE_INT8;
  const vf cap = splat(a->softcap), none = splat(-kInfinity);
  vi lane;
  for (int i = 0; i < GK_VF; ++i) lane[i] = i;
  vf top = none, total = {};
  const int64_t begin = j0 / GK_VF * GK_VF;
  for (int64_t j = begin; j < j1; j += GK_VF) {
    vf x = loadf(s + j);
    if (scaled) x = x * loadf(tile->key_scale + j);
    if (a->softcap > 0.0f) x = vtanh(x / cap) * cap;
    vi at = lane + (int32_t)j;
    x = ((at >= (int32_t)lo) & (at < (int32_t)hi)) ? x : none;
    top = vmax(x, top);
    gk::GK_NS::store(s + j, x);
  }
  *max = lane_max(top);
  const vf shift = splat(*max == -kInfinity ? 0.0f : *max);
  for (int64_t j = begin; j < j1; j += GK_VF) {
    vf p = vexp(loadf(s + j) - shift);
    total = total + p;
    if (scaled) p = p == 0.0f ? vf{} : p * loadf(tile->value_scale + j);
    gk::GK_NS::store(s + j, p);
  }
  *sum = lane_sum(total);
}

GK_INLINE void fetch(const void* row, int64_t bytes) {  // a hint; any address will do
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i);
}

// One block of one token straight from the cache: every row sees the same keys, and each is read once. What the other
// half of the work will read is asked for meanwhile: values during the scores, the next block's keys during the sums.
template <class T>
static void block_of_token(Tile* tile, int64_t base, float* part) {
  constexpr int64_t kStep = 8;  // so few that whole rows of values stay near while all columns use them
  const int64_t n = tile->args->head_dim, rows = tile->rows, padded = padded_rows(rows), bytes = n * sizeof(T);
  int64_t lo, hi;
  visible(tile, 0, base, &lo, &hi);
  find_scales(tile, base, lo, hi);
  const T* const* keys = find<T>(tile, false, base, lo, hi);
  const T* const* values = find<T>(tile, true, base, lo, hi);
  for (int64_t j = lo; j < hi; j += kStep) {
    const int64_t end = smaller(j + kStep, hi);
    for (int64_t i = j; i < end; ++i) fetch(values[i], bytes);
    scores<T>(tile->q, rows, tile->width, keys, j, end, n, tile->scores);
  }
  for (int64_t r = 0; r < rows; ++r) {
    softmax_row(tile, tile->scores + r * kScoreRow, lo, hi, lo, hi, part + r, part + padded + r);
  }
  float* sums = part + 2 * padded;
  memset(sums, 0, (size_t)(rows * tile->width) * 4);
  for (int64_t j = lo; j < hi; j += kStep) {
    const int64_t end = smaller(j + kStep, hi);
    for (int64_t i = j; i < end; ++i) fetch((const void*)((uintptr_t)keys[i] + (uintptr_t)(kKeyBlock * bytes)), bytes);
    weighted_values<T>(tile->scores, rows, values, j, end, n, sums, tile->width);
  }
}

// The same for all of up to kRowsNear rows from r on; returns how many there are.
GK_INLINE int64_t chunk_visible(const Tile* tile, int64_t r, int64_t base, int64_t* lo, int64_t* hi) {
  const int64_t some = smaller(kRowsNear, tile->rows - r);
  int64_t ignored;
  visible(tile, r, base, lo, &ignored);
  visible(tile, r + some - 1, base, &ignored, hi);
  return some;
}

// One block of several tokens, or of a head_dim that is not whole vectors: keys, then values, are staged as floats.
template <class T>
static void block_of_tile(Tile* tile, int64_t base, float* part) {
  const int64_t rows = tile->rows, padded = padded_rows(rows);
  int64_t lo, hi, first_hi, last_lo;
  visible(tile, 0, base, &lo, &first_hi);
  visible(tile, rows - 1, base, &last_lo, &hi);
  const bool edge = last_lo != lo || first_hi != hi;  // rows see different keys
  find_scales(tile, base, lo, hi);
  find<T>(tile, false, base, lo, hi);
  stage<T>(tile, tile->keys, lo, hi);
  for (int64_t r = 0; r < rows; r += kRowsNear) {
    int64_t j0, j1;
    const int64_t some = chunk_visible(tile, r, base, &j0, &j1);
    scores<float>(tile->q + r * tile->width, some, tile->width, (const float* const*)tile->keys, j0, j1, tile->lanes,
                  tile->scores + r * kScoreRow);
    for (int64_t i = r; i < r + some; ++i) {
      int64_t first, end;
      visible(tile, i, base, &first, &end);
      softmax_row(tile, tile->scores + i * kScoreRow, j0, j1, first, end, part + i, part + padded + i);
    }
  }
  find<T>(tile, true, base, lo, hi);
  const int64_t alone = stage<T>(tile, tile->values, lo, hi) || !edge ? kRowsNear : 1;  // 0 times infinity is not 0
  float* sums = part + 2 * padded;
  memset(sums, 0, (size_t)(rows * tile->width) * 4);
  for (int64_t r = 0; r < rows; r += alone) {
    int64_t j0, j1;
    const int64_t some = smaller(chunk_visible(tile, r, base, &j0, &j1), alone);
    if (alone == 1) visible(tile, r, base, &j0, &j1);
    weighted_values<float>(tile->scores + r * kScoreRow, some, (const float* const*)tile->values, j0, j1, tile->lanes,
                           sums + r * tile->width, tile->width);
  }
}

static void compute_block(Tile* tile, int64_t block, float* part) {
  const AttendArgs* a = tile->args;
  const int64_t base = block * kKeyBlock;
  const bool one = tile->tokens == 1 && a->head_dim % GK_VF == 0;
  for (int64_t r = tile->rows; r < padded_rows(tile->rows); ++r) {  // rows that are not there, but merged along
    part[r] = -kInfinity;
    part[padded_rows(tile->rows) + r] = 0.0f;
  }
  if (a->cache_type == GK_CACHE_INT8) {
    one ? block_of_token<int8_t>(tile, base, part) : block_of_tile<int8_t>(tile, base, part);
  } else if (a->cache_type == GK_CACHE_BF16) {
    one ? block_of_token<uint16_t>(tile, base, part) : block_of_tile<uint16_t>(tile, base, part);
  } else {
    one ? block_of_token<float>(tile, base, part) : block_of_tile<float>(tile, base, part);
  }
}

static void merge(Tile* tile, const float* part) {
  const int64_t padded = padded_rows(tile->rows);
  for (int64_t r = 0; r < padded; r += GK_VF) {
    vf old = loadf(tile->max + r), now = loadf(part + r), top = vmax(old, now);
    vf shift = top == -kInfinity ? vf{} : top;
    vf keep = vexp(old - shift), take = vexp(now - shift);
    gk::GK_NS::store(tile->max + r, top);
    gk::GK_NS::store(tile->keep + r, keep);
    gk::GK_NS::store(tile->take + r, take);
    gk::GK_NS::store(tile->sum + r, loadf(tile->sum + r) * keep + loadf(part + padded + r) * take);
  }
  const float* sums = part + 2 * padded;
  for (int64_t r = 0; r < tile->rows; ++r) {
    const vf keep = splat(tile->keep[r]), take = splat(tile->take[r]);
    float* total = tile->total + r * tile->width;
    for (int64_t h = 0; h < tile->lanes; h += GK_VF) {
      gk::GK_NS::store(total + h, fma(loadf(sums + r * tile->width + h), take, loadf(total + h) * keep));
    }
  }
}

static void write_out(const Tile* tile) {
  const AttendArgs* a = tile->args;
  for (int64_t r = 0; r < tile->rows; ++r) {
    int64_t t = tile->t0 + r / tile->group, head = tile->kv_head * tile->group + r % tile->group;
    const float* total = tile->total + r * tile->width;
    const vf inverse = splat(1.0f / tile->sum[r]);
    map(a->head_dim, a->out + t * a->out_stride + head * a->head_dim,
        [inverse](vf x) __attribute__((always_inline)) { return x * inverse + 0.0f; },  // one sign for zero
        total);
  }
}

static void attend(const AttendArgs* a, int64_t t0, int64_t t1, int64_t k0, int64_t k1, void* scratch) {
  const int64_t step = attend_tile_tokens(a);
  Tile tile;
  lay_out(&tile, a, step, (uintptr_t)scratch);
  for (int64_t k = k0; k < k1; ++k) {
    for (int64_t t = t0; t < t1; t += step) {
      begin_tile(&tile, k, t, smaller(step, t1 - t));
      const int64_t end = attend_end_block(a, t + tile.tokens);
      for (int64_t b = attend_first_block(a, t); b < end; ++b) {
        compute_block(&tile, b, tile.part);
        merge(&tile, tile.part);
      }
      write_out(&tile);
    }
  }
}

static void attend_blocks(const AttendArgs* a, int64_t t0, int64_t t1, int64_t kv_head, int64_t b0, int64_t b1,
                          float* parts, void* scratch) {
  Tile tile;
  lay_out(&tile, a, attend_tile_tokens(a), (uintptr_t)scratch);
  begin_tile(&tile, kv_head, t0, t1 - t0);
  const int64_t each = attend_part_floats(a, tile.rows);
  for (int64_t b = b0; b < b1; ++b, parts += each) compute_block(&tile, b, parts);
}

static void attend_merge(const AttendArgs* a, int64_t t0, int64_t t1, int64_t kv_head, int64_t b0, int64_t b1,
                         const float* parts, void* scratch) {
  Tile tile;
  lay_out(&tile, a, attend_tile_tokens(a), (uintptr_t)scratch);
  begin_tile(&tile, kv_head, t0, t1 - t0);
  const int64_t each = attend_part_floats(a, tile.rows);
  for (int64_t b = b0; b < b1; ++b, parts += each) merge(&tile, parts);
  write_out(&tile);
}

}  // namespace gk::GK_NS
