// SPDX-License-Identifier: Apache-2.0
// The C interface of gemmakit's CPU kernels: everything that Python, the XLA shim and the test driver may call.
//
// Plain C, no exception crosses it. Functions that can fail return 0, or a negative code with the words in
// gk_last_error(), which is per thread. Matrices are row-major float32 unless named otherwise; a weight [rows, cols]
// keeps the bytes of its file, blocks along cols, the contracting axis. Axis letters are those of docs/axes.md.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GK_ABI_VERSION 2
#define GK_API __attribute__((visibility("default")))

// How a weight is stored: ggml's numbers, and the types of gemma/quants.py that are not ggml's.
enum gk_type {
  GK_F32 = 0, GK_F16 = 1, GK_Q4_0 = 2, GK_Q4_1 = 3, GK_Q5_0 = 6, GK_Q5_1 = 7, GK_Q8_0 = 8,
  GK_Q2_K = 10, GK_Q3_K = 11, GK_Q4_K = 12, GK_Q5_K = 13, GK_Q6_K = 14, GK_BF16 = 30,
  GK_SFP8 = 1000, GK_INT8 = 1001, GK_INT4 = 1002,
};

enum gk_status { GK_OK = 0, GK_BAD_ARGUMENT = -1, GK_NO_MEMORY = -2, GK_UNSUPPORTED = -3, GK_NOT_FINITE = -4 };

typedef struct gk_context gk_context;  // a set of kernels (one instruction set) and a pool of threads

typedef struct gk_weight {
  int32_t type;         // enum gk_type
  int64_t rows, cols;   // outputs, inputs
  const uint8_t* data;  // not owned; any alignment
  int64_t row_bytes;    // from one row to the next
  const float* scale;   // INT8, INT4: [rows]; SFP8: [1]; else NULL
} gk_weight;

GK_API int gk_abi_version(void);
GK_API const char* gk_last_error(void);
// Names of the instruction sets that this library holds and this CPU has, best first, separated by spaces.
GK_API const char* gk_instruction_sets(void);
// threads: 1..number of processors of this process. isa: one of gk_instruction_sets(), or NULL for the best.
GK_API gk_context* gk_context_new(int threads, const char* isa);
GK_API void gk_context_free(gk_context*);
GK_API const char* gk_context_isa(const gk_context*);
GK_API int gk_context_threads(const gk_context*);
// Bytes of a row of a type, or negative where cols is not whole blocks.
GK_API int64_t gk_row_bytes(int32_t type, int64_t cols);

// y[m, rows] = x[m, cols] @ W.T. The bits of a row of y do not depend on m, on the threads or on the other rows.
// ldx and ldy are in elements. x and y may not overlap. `workspace` is inside the context: one call at a time.
GK_API int gk_matmul(gk_context*, const gk_weight* w, const float* x, int64_t m, int64_t ldx, float* y, int64_t ldy);
// The same with bfloat16 (as uint16) activations in and out, rounded once.
GK_API int gk_matmul_bf16(gk_context*, const gk_weight* w, const uint16_t* x, int64_t m, int64_t ldx, uint16_t* y,
                          int64_t ldy);
// dx[m, cols] = dy[m, rows] @ W: the gradient of gk_matmul with respect to x.
GK_API int gk_matmul_grad(gk_context*, const gk_weight* w, const float* dy, int64_t m, int64_t lddy, float* dx,
                          int64_t lddx);
// Rows `ids` of W as float32 [n, cols]; equal to gemma.quants bit for bit.
GK_API int gk_rows(gk_context*, const gk_weight* w, const int32_t* ids, int64_t n, float* out);

// ---- A whole decoder (Gemma 1, 2, 3 text) ----------------------------------------------------------------------

enum gk_cache_type { GK_CACHE_F32 = 0, GK_CACHE_BF16 = 1, GK_CACHE_INT8 = 2 };

typedef struct gk_layer {
  // Norms are float32 [D] (or [H]) and already hold 1 + w. NULL: the model has none there.
  const float *attn_norm, *post_attn_norm, *mlp_norm, *post_mlp_norm, *q_norm, *k_norm;
  gk_weight q, k, v, o, gate, up, down;  // [N*H, D], [K*H, D] twice, [D, N*H], [F, D] twice, [D, F]
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t window;      // keys a query may see, itself included; 0: all
  float query_scale, attn_softcap;  // softcap 0: none
  float rope_base, rope_scale;      // positions are divided by rope_scale
} gk_layer;

typedef struct gk_model_config {
  int64_t vocab_size, hidden_size;
  int32_t num_layers;
  float norm_eps, final_softcap;  // 0: none
  float embed_scale;
  gk_weight embedding, head;      // head equals embedding where they are tied
  const float* final_norm;        // float32 [D], holds 1 + w
} gk_model_config;

typedef struct gk_model gk_model;

// Weights and norms stay with the caller and must outlive the model; the structs are copied.
GK_API gk_model* gk_model_new(gk_context*, const gk_model_config*, const gk_layer* layers);
GK_API void gk_model_free(gk_model*);
// Makes room for slots x max_len tokens, each slot empty. May be called again.
GK_API int gk_model_open(gk_model*, int32_t slots, int64_t max_len, int32_t cache_type, int64_t chunk);
GK_API int64_t gk_model_cache_bytes(const gk_model*);
// Reads n ids after what the slot holds, in chunks; the last one's logits are kept.
GK_API int gk_model_prefill(gk_model*, int32_t slot, const int32_t* ids, int64_t n);
// One token for each of n different slots, together.
GK_API int gk_model_step(gk_model*, int32_t n, const int32_t* slots, const int32_t* tokens);
// Several tokens after what a slot holds, keeping the logits of every one: for speculation and scoring. [n, V] follow
// in gk_model_chunk_logits. n may not be above the chunk of gk_model_open.
GK_API int gk_model_score(gk_model*, int32_t slot, const int32_t* ids, int64_t n);
GK_API const float* gk_model_chunk_logits(gk_model*);
// float32 [V], after the slot's last token. NULL: the slot is empty.
GK_API const float* gk_model_logits(gk_model*, int32_t slot);
GK_API int64_t gk_model_length(const gk_model*, int32_t slot);
// Forgets all but the first n tokens of a slot; GK_UNSUPPORTED where a ring has already overwritten what that needs.
GK_API int gk_model_truncate(gk_model*, int32_t slot, int64_t n);
GK_API int gk_model_copy(gk_model*, int32_t src, int32_t dst, int64_t n);

// Low-rank changes of a layer's products: y += scale * (x @ a.T) @ b.T. Factors are row-major, without gaps.
typedef struct gk_low_rank {
  const void *a, *b;  // [rank, cols], [rows, rank] of the weight that they change; float32, or bfloat16 as uint16
  int32_t rank;       // 0: the weight is not changed
  float scale;
} gk_low_rank;
typedef struct gk_layer_adapter {
  gk_low_rank q, k, v, o, gate, up, down;
} gk_layer_adapter;

// Puts an adapter on a model instead of the one it has; `layers` NULL: none. The factors, all of `type` GK_F32 or GK_BF16,
// are copied. `scale` multiplies every layer's own, 0 turns the adapter off. Every slot is empty afterwards: what it held
// was computed without. After an error nothing has changed.
GK_API int gk_model_set_adapter(gk_model*, const gk_layer_adapter* layers, int32_t type, float scale);
// The adapter that is there with another scale; every slot is empty afterwards.
GK_API int gk_model_scale_adapter(gk_model*, float scale);

// ---- Picking a token -------------------------------------------------------------------------------------------

// The likeliest id, the first of equals; -1 where no logit is finite or one is NaN.
GK_API int64_t gk_argmax(gk_context*, const float* logits, int64_t v);
// The k likeliest, in order, the lower id first among equals, and log sum exp of all of them. Returns how many.
GK_API int64_t gk_top_k(gk_context*, const float* logits, int64_t v, int64_t k, int32_t* ids, float* values,
                        double* log_sum_exp);

#ifdef __cplusplus
}
#endif
