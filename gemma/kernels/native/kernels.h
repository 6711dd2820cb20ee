// SPDX-License-Identifier: Apache-2.0
// What the parts of the library share: the table of kernels that each instruction set fills, and the thread pool.
//
// Every instruction set compiles the same sources (all_kernels.h) in a namespace and with flags of its own; the table is
// the only way in. A kernel runs on the calling thread; model.cpp and matmul split work over the pool. Rule: the bits of
// an output depend on its own inputs only, not on the tile, chunk or batch it is computed in, so each output has one
// fixed order of float operations. Nothing is contracted by the compiler (-ffp-contract=off); fused steps are spelled.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <mutex>

#include "gemmakit.h"

namespace gk {

constexpr int kBlock = 32;  // activations that share a scale

// Activations of one row as integers: x[i] ~ codes[i] * scale[i / 32]. Padded with zeros to whole blocks.
struct QuantizedRow {
  int16_t* codes;   // [blocks * 32]
  float* scale;     // [blocks]
  float* sums;      // [blocks * 2]: scale times the sum of codes, of each half block
};

// One query head group's attention over a slot's cache; see attention.h.
struct AttendArgs {
  // Queries of T consecutive positions first_pos.. of one sequence: float32 [T, N, H] with rows of q_stride floats,
  // already normed, rotated and scaled. Output the same way.
  const float* q; float* out; int64_t q_stride, out_stride;
  int64_t tokens, first_pos;
  // The slot's cache of one layer: [K, capacity, H] values of cache_type; position p stands at p % capacity.
  // Positions max(0, first_pos - capacity) .. first_pos - 1 are valid.
  const void *k, *v; const float *k_scale, *v_scale;  // scales [K, capacity] for int8, else NULL
  int64_t capacity;
  // The chunk's own keys and values, [K, chunk_capacity, H], stored as the cache would: token t at index t.
  const void *ck, *cv; const float *ck_scale, *cv_scale; int64_t chunk_capacity;
  int32_t cache_type, num_heads, num_kv_heads, head_dim, window;  // window 0: all
  float softcap;
};

// A float matrix [rows, cols] in panels of row_group rows: [panels, cols, row_group] of bfloat16 or float32, zeros after
// the last row. The factors of adapters lie so: they are small, and read with every token.
struct Panels {
  bool half;  // bfloat16
  int64_t rows, cols;
  const uint8_t* data;
};

// What an adapter adds to products that share x: y += b (factor * a x).
struct LowRank {
  Panels a;             // [R, cols]: the ranks of the products, one after the other
  const float* factor;  // [R]
  Panels b[3];          // of each product [rows, rank]; no rows: it has none
  int64_t at[3];        // where its rank begins in R
};

struct Kernels {
  const char* name;
  int row_group;   // weight rows that a product works on at a time
  // matmul.h ---------------------------------------------------------------------------------------------------
  void (*quantize)(const float* x, int64_t cols, QuantizedRow out);
  // y[i, r] for rows r0..r1 of w (r0 a multiple of row_group). Integer types take q (m rows), float types take x.
  void (*matmul)(const gk_weight* w, int64_t r0, int64_t r1, const QuantizedRow* q, const float* const* x, int64_t m,
                 float* y, int64_t ldy, void* scratch);
  size_t (*matmul_scratch)(const gk_weight* w, int64_t m);  // bytes a thread needs
  void (*rows)(const gk_weight* w, const int32_t* ids, int64_t n, float* out);
  void (*matmul_grad)(const gk_weight* w, const float* dy, int64_t m, int64_t lddy, int64_t c0, int64_t c1, float* dx,
                      int64_t lddx, void* scratch);
  // elementwise.h ----------------------------------------------------------------------------------------------
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);  // y may be x
  void (*add_rms_norm)(float* residual, const float* x, const float* weight, float eps, int64_t n);  // += norm(x)
  void (*add)(float* residual, const float* x, int64_t n);
  void (*rope)(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin);  // halves rotate
  void (*gelu_mul)(const float* gate, const float* up, int64_t n, float* y);  // gelu_tanh(gate) * up; y may be gate
  void (*softcap)(float* x, int64_t n, float cap);                            // tanh(x / cap) * cap
  void (*scale)(float* x, int64_t n, float factor);
  // One head's vector into a cache of the type; scale is for int8.
  void (*store_cache)(const float* x, int64_t n, int32_t cache_type, void* out, float* scale);
  void (*bf16_to_f32)(const uint16_t* x, int64_t n, float* y);
  void (*f32_to_bf16)(const float* x, int64_t n, uint16_t* y);  // to nearest even
  // attention.h ------------------------------------------------------------------------------------------------
  size_t (*attend_scratch)(const AttendArgs*);
  // Query tokens t0..t1 and kv heads k0..k1 of args.
  void (*attend)(const AttendArgs*, int64_t t0, int64_t t1, int64_t k0, int64_t k1, void* scratch);
  // logits.h ---------------------------------------------------------------------------------------------------
  int64_t (*argmax)(const float* x, int64_t n);  // -1: NaN, or nothing finite
  // Keeps the k largest of x (ids from `first` on) in (ids, values), an unordered heap of `held` so far; returns held.
  int64_t (*top_k)(const float* x, int64_t n, int64_t first, int64_t k, int32_t* ids, float* values, int64_t held);
  double (*sum_exp)(const float* x, int64_t n, float shift);  // of x - shift
  // attention.h again: a long cache cut over threads. Parts of key blocks b0..b1 (absolute) for tokens t0..t1 of one
  // kv head go to `parts`, attend_part_floats each; merging all blocks from the first visible one gives attend's bits.
  void (*attend_blocks)(const AttendArgs*, int64_t t0, int64_t t1, int64_t kv_head, int64_t b0, int64_t b1,
                        float* parts, void* scratch);
  void (*attend_merge)(const AttendArgs*, int64_t t0, int64_t t1, int64_t kv_head, int64_t b0, int64_t b1,
                       const float* parts, void* scratch);
  // lowrank.h: y[t, r] = factor[r] * (w x)[t, r] for rows r0..r1 of w, r0 a multiple of row_group; without factors, +=.
  void (*low_rank)(const Panels* w, int64_t r0, int64_t r1, const float* x, int64_t ldx, int64_t m, const float* factor,
                   float* y, int64_t ldy);
};

constexpr int64_t kKeyBlock = 128;  // keys of one softmax block; block b holds positions b * 128 .. b * 128 + 127

// attention.cpp. The whole attention of one layer over the pool; called outside pool_run, the same bits as attend.
// The scratch serves every call with the heads, head_dim and window of `shape` that ends at a position <= positions.
size_t attend_parallel_scratch(const gk_context*, const AttendArgs* shape, int64_t positions);
void attend_parallel(gk_context*, const AttendArgs*, void* scratch);
void attend_batch_parallel(gk_context*, const AttendArgs* items, int n, void* scratch);  // sequences of one layer

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // NULL where this build does not hold them
const Kernels* avx512_kernels();  // AVX-512 F, BW, DQ, VL, VNNI
const Kernels* neon_kernels();

// Runs f(thread) on the caller, thread 0, and on the workers that come in time; returns when all of these are done. So f
// hands out its parts from a counter, and ends when none is left.
class Pool;
Pool* pool_new(int threads);
void pool_free(Pool*);
int pool_size(const Pool*);
void pool_run(Pool*, void (*f)(void* arg, int thread, int threads), void* arg);
void pool_wait(int spin);  // a moment, in a loop that counts spins: for what another thread is finishing right now

void set_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace gk

struct gk_context {
  const gk::Kernels* kernels;
  gk::Pool* pool;
  int threads;
  std::mutex lock;  // held by every entry point that uses the pool or the workspace
  uint8_t* workspace; size_t workspace_bytes;
};

namespace gk {

// y = x @ W.T for several weights that share the activations x [m, cols].
struct Product {
  const gk_weight* weight;
  float* y;
  int64_t ldy;
};
// The lock must be held. False: no memory (the error is set). `low` is for up to three products.
bool multiply(gk_context*, const Product* products, int n, const float* x, int64_t m, int64_t ldx,
              const LowRank* low = nullptr);
bool valid_weight(const gk_weight*);  // sets the error

}  // namespace gk
