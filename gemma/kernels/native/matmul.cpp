// SPDX-License-Identifier: Apache-2.0
// Products over the thread pool: activations are rounded once, rows of the weights are handed out in small lots.
//
// Which thread computes a row changes nothing in it. Kernels are in matmul_int.h and matmul_float.h; whole decoders in
// model.cpp.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace gk {
namespace {

bool is_float(int type) { return type == GK_F32 || type == GK_F16 || type == GK_BF16 || type == GK_SFP8; }
int64_t blocks_of(int64_t cols) { return (cols + kBlock - 1) / kBlock; }
size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

// Elements and bytes of a block, or {0, 0} for a type that is not known.
struct Layout { int64_t elements, bytes; };
Layout layout(int type) {
  switch (type) {
    case GK_F32: return {1, 4};
    case GK_F16: case GK_BF16: return {1, 2};
    case GK_SFP8: case GK_INT8: return {1, 1};
    case GK_INT4: return {32, 16};
    case GK_Q4_0: return {32, 18};
    case GK_Q4_1: return {32, 20};
    case GK_Q5_0: return {32, 22};
    case GK_Q5_1: return {32, 24};
    case GK_Q8_0: return {32, 34};
    case GK_Q2_K: return {256, 84};
    case GK_Q3_K: return {256, 110};
    case GK_Q4_K: return {256, 144};
    case GK_Q5_K: return {256, 176};
    case GK_Q6_K: return {256, 210};
  }
  return {0, 0};
}

struct Job {
  gk_context* context;
  const Product* products;
  int count;
  const float* x;
  int64_t m, ldx, cols;
  bool integers, floats;
  QuantizedRow* q;       // [m]
  const float** rows;    // [m]
  uint8_t* scratch;      // one part for each thread
  size_t scratch_bytes;
  int64_t lot, lots[8];  // row groups handed out at a time; of each product
  std::atomic<int64_t> next_row, next_lot;
  // Of an adapter: the narrow products z [m, R] come first, in parts of one row group and some rows of x.
  const LowRank* low;
  float* z;
  int64_t narrow_groups, narrow_parts;
  std::atomic<int64_t> next_narrow, narrow_done;
};

constexpr int64_t kNarrowRows = 48;  // of x in a part: whole tiles of every instruction set

void round_rows(void* arg, int, int) {
  Job& job = *(Job*)arg;
  for (int64_t t; (t = job.next_row.fetch_add(1, std::memory_order_relaxed)) < job.m;)
    job.context->kernels->quantize(job.x + t * job.ldx, job.cols, job.q[t]);
}

void narrow_rows(Job& job) {
  const Kernels* k = job.context->kernels;
  const Panels& a = job.low->a;
  for (int64_t i; (i = job.next_narrow.fetch_add(1, std::memory_order_relaxed)) < job.narrow_parts;) {
    const int64_t r0 = i % job.narrow_groups * k->row_group, r1 = r0 + k->row_group < a.rows ? r0 + k->row_group : a.rows;
    const int64_t t0 = i / job.narrow_groups * kNarrowRows, m = job.m - t0 < kNarrowRows ? job.m - t0 : kNarrowRows;
    k->low_rank(&a, r0, r1, job.x + t0 * job.ldx, job.ldx, m, job.low->factor, job.z + t0 * a.rows, a.rows);
    job.narrow_done.fetch_add(1, std::memory_order_release);
  }
}

// y += b z for rows of a product, as soon as z is whole: who took its last part is still at work on it.
void widen_rows(Job& job, int p, int64_t r0, int64_t r1) {
  const Panels& b = job.low->b[p];
  if (!b.rows) return;
  for (int spin = 0; job.narrow_done.load(std::memory_order_acquire) < job.narrow_parts; ++spin) pool_wait(spin);
  job.context->kernels->low_rank(&b, r0, r1, job.z + job.low->at[p], job.low->a.rows, job.m, nullptr, job.products[p].y,
                                 job.products[p].ldy);
}

void multiply_rows(void* arg, int thread, int) {
  Job& job = *(Job*)arg;
  const Kernels* k = job.context->kernels;
  if (job.low) narrow_rows(job);
  for (int64_t lot;;) {
    lot = job.next_lot.fetch_add(1, std::memory_order_relaxed);
    int p = 0;
    while (p < job.count && lot >= job.lots[p]) lot -= job.lots[p++];
    if (p == job.count) return;
    const Product& product = job.products[p];
    const int64_t r0 = lot * job.lot, end = r0 + job.lot;
    const int64_t r1 = end < product.weight->rows ? end : product.weight->rows;
    k->matmul(product.weight, r0, r1, job.q, job.rows, job.m, product.y, product.ldy,
              job.scratch + thread * job.scratch_bytes);
    if (job.low) widen_rows(job, p, r0, r1);
  }
}

bool reserve(gk_context* context, size_t bytes) {
  if (bytes <= context->workspace_bytes) return true;
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, bytes + bytes / 4)) {
    set_error("no memory for a workspace of %zu bytes", bytes);
    return false;
  }
  free(context->workspace);
  context->workspace = (uint8_t*)fresh, context->workspace_bytes = bytes + bytes / 4;
  return true;
}

// Places for the rounded activations of a job in the workspace.
bool lay_out(Job& job) {
  const int64_t blocks = blocks_of(job.cols);
  const size_t codes = aligned(blocks * kBlock * sizeof(int16_t)), scale = aligned(blocks * sizeof(float));
  const size_t sums = aligned(2 * blocks * sizeof(float));
  const size_t row = job.integers ? codes + scale + sums : 0;
  const size_t tables = aligned(job.m * sizeof(QuantizedRow)) + aligned(job.m * sizeof(float*));
  job.scratch_bytes = aligned(job.context->kernels->matmul_scratch(job.products[0].weight, job.m));
  const size_t narrow = job.low ? aligned(job.m * job.low->a.rows * sizeof(float)) : 0;
  if (!reserve(job.context, tables + narrow + job.m * row + job.scratch_bytes * job.context->threads)) return false;
  uint8_t* at = job.context->workspace;
  job.scratch = at, at += job.scratch_bytes * job.context->threads;
  job.q = (QuantizedRow*)at, at += aligned(job.m * sizeof(QuantizedRow));
  job.rows = (const float**)at, at += aligned(job.m * sizeof(float*));
  job.z = (float*)at, at += narrow;
  for (int64_t t = 0; t < job.m; ++t, at += row) {
    job.rows[t] = job.x + t * job.ldx;
    job.q[t] = {(int16_t*)at, (float*)(at + codes), (float*)(at + codes + scale)};
  }
  return true;
}

}  // namespace

bool valid_weight(const gk_weight* w) {
  const Layout block = layout(w->type);
  if (!block.elements) return set_error("weight: unknown type %d", w->type), false;
  if (w->rows < 1 || w->cols < 1 || w->cols % block.elements)
    return set_error("weight: expected rows of one or more whole blocks of %ld, got [%ld, %ld]", (long)block.elements,
                     (long)w->rows, (long)w->cols), false;
  if (!w->data || w->row_bytes < w->cols / block.elements * block.bytes)
    return set_error("weight: expected rows of at least %ld bytes, got %ld", (long)(w->cols / block.elements * block.bytes),
                     (long)w->row_bytes), false;
  const bool scaled = w->type == GK_SFP8 || w->type == GK_INT8 || w->type == GK_INT4;
  if (scaled != (w->scale != nullptr))
    return set_error("weight: type %d %s a scale", w->type, scaled ? "needs" : "has no use for"), false;
  return true;
}

bool multiply(gk_context* context, const Product* products, int n, const float* x, int64_t m, int64_t ldx,
              const LowRank* low) {
  Job job{};
  job.low = low && low->a.rows ? low : nullptr;
  job.context = context, job.products = products, job.count = n, job.x = x, job.m = m, job.ldx = ldx;
  job.cols = products[0].weight->cols;
  int64_t rows = 0;
  for (int i = 0; i < n; ++i) {
    (is_float(products[i].weight->type) ? job.floats : job.integers) = true;
    rows += products[i].weight->rows;
  }
  if (!lay_out(job)) return false;
  if (job.integers) {
    if (m < 4) round_rows(&job, 0, 1);
    else pool_run(context->pool, round_rows, &job);
  }
  // Lots: small enough that threads end together, large enough that handing out costs nothing.
  const int64_t group = context->kernels->row_group;
  if (job.low) {
    job.narrow_groups = (low->a.rows + group - 1) / group;
    job.narrow_parts = job.narrow_groups * ((m + kNarrowRows - 1) / kNarrowRows);
  }
  int64_t lot = rows / (context->threads * 8) / group * group;
  if (m > 8 && lot > 4 * group) lot = 4 * group;
  job.lot = lot < group ? group : lot;
  for (int i = 0; i < n; ++i) job.lots[i] = (products[i].weight->rows + job.lot - 1) / job.lot;
  pool_run(context->pool, multiply_rows, &job);
  return true;
}

namespace {

struct Gradient {
  gk_context* context;
  const gk_weight* w;
  const float* dy;
  float* dx;
  int64_t m, lddy, lddx, tokens, parts, columns;  // tokens and columns of a part; parts of the tokens
  std::atomic<int64_t> next;
};
void gradient_parts(void* arg, int thread, int) {
  Gradient& g = *(Gradient*)arg;
  const size_t bytes = aligned(g.context->kernels->matmul_scratch(g.w, g.m));
  for (;;) {
    const int64_t i = g.next.fetch_add(1, std::memory_order_relaxed), c0 = i / g.parts * g.columns;
    if (c0 >= g.w->cols) return;
    const int64_t t0 = i % g.parts * g.tokens, c1 = c0 + g.columns < g.w->cols ? c0 + g.columns : g.w->cols;
    const int64_t count = g.m - t0 < g.tokens ? g.m - t0 : g.tokens;
    g.context->kernels->matmul_grad(g.w, g.dy + t0 * g.lddy, count, g.lddy, c0, c1, g.dx + t0 * g.lddx, g.lddx,
                                    g.context->workspace + thread * bytes);
  }
}

bool valid_call(const gk_context* context, const gk_weight* w, const void* x, int64_t m, int64_t ldx, int64_t least_x,
                const void* y, int64_t ldy, int64_t least_y) {
  if (!context || !w || !valid_weight(w)) return false;
  if (m < 1 || !x || !y || ldx < least_x || ldy < least_y)
    return set_error("product: expected one or more rows of at least %ld and %ld elements, got %ld rows of %ld and %ld",
                     (long)least_x, (long)least_y, (long)m, (long)ldx, (long)ldy), false;
  return true;
}

}  // namespace
}  // namespace gk

extern "C" {

int64_t gk_row_bytes(int32_t type, int64_t cols) {
  const gk::Layout block = gk::layout(type);
  return block.elements && cols > 0 && cols % block.elements == 0 ? cols / block.elements * block.bytes : -1;
}

int gk_matmul(gk_context* context, const gk_weight* w, const float* x, int64_t m, int64_t ldx, float* y, int64_t ldy) {
  if (!context || !w || !gk::valid_call(context, w, x, m, ldx, w->cols, y, ldy, w->rows)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(context->lock);
  const gk::Product product = {w, y, ldy};
  return gk::multiply(context, &product, 1, x, m, ldx) ? GK_OK : GK_NO_MEMORY;
}

int gk_matmul_bf16(gk_context* context, const gk_weight* w, const uint16_t* x, int64_t m, int64_t ldx, uint16_t* y,
                   int64_t ldy) {
  if (!context || !w || !gk::valid_call(context, w, x, m, ldx, w->cols, y, ldy, w->rows)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(context->lock);
  float* wide = (float*)malloc(((size_t)w->cols + w->rows) * m * sizeof(float));
  if (!wide) return gk::set_error("no memory for %ld rows of activations", (long)m), GK_NO_MEMORY;
  float* out = wide + w->cols * m;
  for (int64_t t = 0; t < m; ++t) context->kernels->bf16_to_f32(x + t * ldx, w->cols, wide + t * w->cols);
  const gk::Product product = {w, out, w->rows};
  const bool done = gk::multiply(context, &product, 1, wide, m, w->cols);
  for (int64_t t = 0; done && t < m; ++t) context->kernels->f32_to_bf16(out + t * w->rows, w->rows, y + t * ldy);
  free(wide);
  return done ? GK_OK : GK_NO_MEMORY;
}

int gk_matmul_grad(gk_context* context, const gk_weight* w, const float* dy, int64_t m, int64_t lddy, float* dx,
                   int64_t lddx) {
  if (!context || !w || !gk::valid_call(context, w, dy, m, lddy, w->rows, dx, lddx, w->cols)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(context->lock);
  if (!gk::reserve(context, gk::aligned(context->kernels->matmul_scratch(w, m)) * context->threads)) return GK_NO_MEMORY;
  gk::Gradient g{};
  g.context = context, g.w = w, g.dy = dy, g.dx = dx, g.m = m, g.lddy = lddy, g.lddx = lddx;
  // Unpacking a row costs as much as some ten tokens: tokens are shared out where there are many of them.
  g.columns = m < 32 ? 256 : w->cols;
  g.tokens = m < 32 ? m : (m + context->threads - 1) / context->threads;
  g.parts = (m + g.tokens - 1) / g.tokens;
  gk::pool_run(context->pool, gk::gradient_parts, &g);
  return GK_OK;
}

int gk_rows(gk_context* context, const gk_weight* w, const int32_t* ids, int64_t n, float* out) {
  if (!context || !w || !gk::valid_weight(w)) return GK_BAD_ARGUMENT;
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= w->rows)
      return gk::set_error("rows: expected ids in 0..%ld, got %d", (long)w->rows - 1, ids[i]), GK_BAD_ARGUMENT;
  context->kernels->rows(w, ids, n, out);
  return GK_OK;
}

}  // extern "C"
