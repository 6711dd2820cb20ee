// SPDX-License-Identifier: Apache-2.0
// The state of one decoder: its layers, caches and buffers. forward.cpp computes, cache.cpp keeps, adapter.cpp holds what
// is added to weights, model.cpp is the face.
#pragma once
#include <stdlib.h>

#include <vector>

#include "kernels.h"

namespace gk {

// Memory for one purpose, 64-byte aligned; grown, never shrunk, freed with its owner. Growing forgets the contents.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  ~Buffer() { free(data_); }
  bool reserve(size_t bytes) {
    if (bytes <= bytes_) return true;
    free(data_);
    data_ = nullptr, bytes_ = 0;
    if (posix_memalign(&data_, 64, bytes)) {
      data_ = nullptr;
      set_error("no memory for a buffer of %zu bytes", bytes);
      return false;
    }
    bytes_ = bytes;
    return true;
  }
  void release() { free(data_), data_ = nullptr, bytes_ = 0; }
  template <class T>
  T* as() const { return (T*)data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// One layer's keys and values: [slots, K, capacity, H] of the cache type; int8 has a scale for each vector.
struct LayerCache {
  int64_t capacity = 0;
  Buffer k, v, k_scale, v_scale;
};
// The newest tokens of a layer, not yet in its cache: [rows or K, ..] as AttendArgs.ck says.
struct Fresh {
  Buffer k, v, k_scale, v_scale;
};

// Tokens that were scored and may still be taken back: they enter the caches when something else is asked of the model.
struct Pending {
  int32_t slot = -1;
  int64_t first = 0, count = 0, kept = 0;
};

// An adapter on the products of one input.
struct AdapterGroup {
  LowRank low = {};
  Buffer a, b[3], factor;
  std::vector<float> scales;  // [R], of the adapter itself; `factor` holds them times the scale of the call
};
struct LayerAdapter {
  AdapterGroup heads, out, wide, down;  // q k v; o; gate up; down
};

struct Slot {
  int64_t length = 0;
  bool current = false;  // its row of `logits` is that of its last token
  int64_t written = 0;   // tokens that its rings have taken since it was empty: a shortened slot lacks what they replaced

  void took(int64_t tokens) { written = tokens > written ? tokens : written; }
};

}  // namespace gk

struct gk_model {
  gk_context* context;
  gk_model_config config;
  std::vector<gk_layer> layers;
  std::vector<gk::LayerCache> caches;
  std::vector<gk::Fresh> fresh;  // one where a chunk is written at once, one for each layer where it stays pending
  std::vector<gk::Slot> slots;
  std::vector<float> rope_bases, rope_scales;  // the distinct pairs
  std::vector<int> rope_of;                    // of each layer
  gk::Pending pending;
  std::vector<gk::LayerAdapter> adapter;  // of each layer, or empty
  float adapter_scale = 0;
  int64_t max_len = 0, chunk = 0, cache_bytes = 0;
  int32_t cache_type = GK_CACHE_F32;
  int64_t widest_q = 0, widest_kv = 0, widest_mlp = 0, widest_head = 0;
  gk::Buffer x, h, q, k, v, gate, up, rope, logits, scored, scratch, items;
};

namespace gk {

// Rows of activations that go through the layers together: a chunk of one slot, or one token of each of several.
struct Pass {
  const int32_t* tokens;
  const int32_t* slots;    // [rows], or one where `chunk`
  int64_t rows, first;     // first: the chunk's first position
  bool chunk, keep_pending;
};

int64_t value_bytes(int32_t cache_type);
bool run_layers(gk_model*, const Pass&);                                 // x [rows, D] afterwards
bool run_head(gk_model*, int64_t row, int64_t rows, float* out, int64_t stride);  // logits of rows of x
// Of `head` in a slot's cache.
AttendArgs attend_args(gk_model*, int layer, const Fresh&, const Pass&, int64_t row);
void write_caches(gk_model*, int layer, const Fresh&, const Pass&);
void settle(gk_model*);  // pending tokens enter the caches
bool make_caches(gk_model*, int32_t slots, int64_t max_len, int32_t cache_type, int64_t chunk);
bool copy_slot(gk_model*, int32_t src, int32_t dst, int64_t n);
bool can_shorten(const gk_model*, const Slot&, int64_t n);
bool reserve_fresh(gk_model*, Fresh&, int layer, int64_t rows);
// What an adapter adds to a group of a layer's products; NULL: nothing.
inline const LowRank* low_of(const gk_model* m, int layer, AdapterGroup LayerAdapter::*group) {
  return m->adapter.empty() || m->adapter_scale == 0 ? nullptr : &(m->adapter[layer].*group).low;
}

}  // namespace gk
