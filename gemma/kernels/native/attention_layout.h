// SPDX-License-Identifier: Apache-2.0
// Facts about the shape of an attention that attention.h (each instruction set) and attention.cpp (the pool) share:
// which keys a query sees, how its tokens are tiled, and how much room it takes. All of it is integers.
#pragma once
#include "kernels.h"

namespace gk {

constexpr int64_t kScoreRow = 144;   // floats of a row of scores: a key block, and room for a group that starts in it
constexpr int64_t kRowSkip = 16;     // floats after a staged key, so that rows do not fall into the same cache sets

static inline int64_t attend_group(const AttendArgs* a) { return a->num_heads / a->num_kv_heads; }
static inline int64_t attend_width(const AttendArgs* a) { return (a->head_dim + 15) / 16 * 16; }
static inline int64_t attend_tile_tokens(const AttendArgs* a) {
  // Rows (tokens x G) that share one pass over the keys: as many as leave their scratch in the second cache.
  const int64_t rows = attend_width(a) <= 128 ? 96 : attend_width(a) <= 256 ? 72 : 48;
  const int64_t tokens = rows / attend_group(a);
  return tokens > 0 ? tokens : 1;
}
static inline int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

// The first position that token t of the chunk sees; the last is its own.
static inline int64_t first_visible(const AttendArgs* a, int64_t t) {
  int64_t pos = a->first_pos + t, first = a->window > 0 ? pos - a->window + 1 : 0;
  if (first < a->first_pos - a->capacity) first = a->first_pos - a->capacity;
  return first > 0 ? first : 0;
}
// The key blocks that tokens t0..t1 see.
static inline int64_t attend_first_block(const AttendArgs* a, int64_t t0) { return first_visible(a, t0) / kKeyBlock; }
static inline int64_t attend_end_block(const AttendArgs* a, int64_t t1) {
  return (a->first_pos + t1 - 1) / kKeyBlock + 1;
}

// What a key block gives to `rows` query rows: their maxima, their sums, and their weighted values [rows, width].
static inline int64_t attend_part_floats(const AttendArgs* a, int64_t rows) {
  return 2 * padded_rows(rows) + rows * attend_width(a);
}

}  // namespace gk
