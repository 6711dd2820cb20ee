// SPDX-License-Identifier: Apache-2.0
// gk_argmax and gk_top_k: the kernels of logits.h over stretches of the vocabulary, shared out over the pool.
//
// Stretches depend on the size of the vocabulary alone and their results are joined in order, or by a total order, so
// the answer is the same for any number of threads. Nothing is allocated.
#include <math.h>

#include <atomic>
#include <mutex>

#include "kernels.h"
#include "logits_heap.h"

namespace gk {
namespace {

constexpr int64_t kStretch = 8192;       // logits of a stretch, or a multiple of it where the vocabulary is huge
constexpr int64_t kMaxStretches = 512;
constexpr int64_t kThreadHeap = 512;     // above this many, one thread picks them, in the caller's memory

struct Best {
  float value;
  int64_t id;    // -1: no logit in the stretch
  bool nan, finite;
};

struct Job {
  const Kernels* kernels;
  const float* logits;
  int64_t v, stretch, stretches;
  std::atomic<int64_t> next;
  // argmax
  Best best[kMaxStretches];
  // top_k
  float shift;
  double sums[kMaxStretches];
  std::mutex lock;
  int64_t k, held;
  int32_t* ids;
  float* values;

  int64_t begin(int64_t s) const { return s * stretch; }
  int64_t size(int64_t s) const { return s * stretch + stretch < v ? stretch : v - s * stretch; }
};

void prepare(Job* job, gk_context* context, const float* logits, int64_t v) {
  job->kernels = context->kernels;
  job->logits = logits;
  job->v = v;
  const int64_t each = (v + kMaxStretches - 1) / kMaxStretches;
  job->stretch = (each + kStretch - 1) / kStretch * kStretch;
  job->stretches = (v + job->stretch - 1) / job->stretch;
  job->next = 0;
}

void run(gk_context* context, Job* job, void (*f)(void*, int, int)) {
  job->next = 0;
  if (job->stretches < 2) return f(job, 0, 1);
  pool_run(context->pool, f, job);
}

// What a stretch holds that its kernel calls -1: a NaN, or infinities only.
Best without_finite(const float* x, int64_t n, int64_t first) {
  Best best = {-INFINITY, n > 0 ? first : -1, false, false};
  for (int64_t i = n - 1; i >= 0; --i) {
    if (isnan(x[i])) best.nan = true;
    if (x[i] >= best.value) best.value = x[i], best.id = first + i;
  }
  return best;
}

void find_best(void* arg, int, int) {
  Job& job = *(Job*)arg;
  for (int64_t s; (s = job.next.fetch_add(1, std::memory_order_relaxed)) < job.stretches;) {
    const float* x = job.logits + job.begin(s);
    const int64_t i = job.kernels->argmax(x, job.size(s));
    job.best[s] = i < 0 ? without_finite(x, job.size(s), job.begin(s)) : Best{x[i], job.begin(s) + i, false, true};
  }
}

Best best_of(gk_context* context, Job* job) {
  run(context, job, find_best);
  Best best = {-INFINITY, -1, false, false};
  for (int64_t s = 0; s < job->stretches; ++s) {
    const Best& b = job->best[s];
    best.nan |= b.nan;
    best.finite |= b.finite;
    if (best.id < 0 || b.value > best.value) best.value = b.value, best.id = b.id;
  }
  return best;
}

void add_exponentials(Job& job, int64_t s) {
  job.sums[s] = job.kernels->sum_exp(job.logits + job.begin(s), job.size(s), job.shift);
}

void find_top(void* arg, int, int) {
  Job& job = *(Job*)arg;
  int32_t ids[kThreadHeap];
  float values[kThreadHeap];
  int64_t held = 0;
  for (int64_t s; (s = job.next.fetch_add(1, std::memory_order_relaxed)) < job.stretches;) {
    held = job.kernels->top_k(job.logits + job.begin(s), job.size(s), job.begin(s), job.k, ids, values, held);
    add_exponentials(job, s);
  }
  std::lock_guard<std::mutex> guard(job.lock);
  for (int64_t i = 0; i < held; ++i) job.held = heap_offer(job.ids, job.values, job.held, job.k, values[i], ids[i]);
}

void add_all_exponentials(void* arg, int, int) {
  Job& job = *(Job*)arg;
  for (int64_t s; (s = job.next.fetch_add(1, std::memory_order_relaxed)) < job.stretches;) add_exponentials(job, s);
}

bool bad_vocabulary(const char* what, const float* logits, int64_t v) {
  if (logits && v > 0 && v <= INT32_MAX) return false;
  set_error("%s: expected 1..%d logits, got %lld%s", what, INT32_MAX, (long long)v, logits ? "" : " at address 0");
  return true;
}

}  // namespace
}  // namespace gk

extern "C" {

int64_t gk_argmax(gk_context* context, const float* logits, int64_t v) {
  if (gk::bad_vocabulary("gk_argmax", logits, v)) return -1;
  std::lock_guard<std::mutex> guard(context->lock);
  gk::Job job;
  gk::prepare(&job, context, logits, v);
  const gk::Best best = gk::best_of(context, &job);
  if (!best.nan && best.finite) return best.id;
  gk::set_error("gk_argmax: %s", best.nan ? "a logit is NaN" : "no logit is finite");
  return -1;
}

int64_t gk_top_k(gk_context* context, const float* logits, int64_t v, int64_t k, int32_t* ids, float* values,
                 double* log_sum_exp) {
  if (gk::bad_vocabulary("gk_top_k", logits, v)) return GK_BAD_ARGUMENT;
  if (k < 0 || (k > 0 && (!ids || !values))) {
    gk::set_error("gk_top_k: expected k >= 0 and room for k ids and values, got k %lld", (long long)k);
    return GK_BAD_ARGUMENT;
  }
  std::lock_guard<std::mutex> guard(context->lock);
  gk::Job job;
  gk::prepare(&job, context, logits, v);
  const gk::Best best = gk::best_of(context, &job);
  if (best.nan || !best.finite) {
    gk::set_error("gk_top_k: %s", best.nan ? "a logit is NaN" : "no logit is finite");
    return GK_NOT_FINITE;
  }
  job.shift = best.value, job.k = k < v ? k : v, job.held = 0, job.ids = ids, job.values = values;
  if (job.k > 0 && job.k <= gk::kThreadHeap) {
    gk::run(context, &job, gk::find_top);
  } else {
    gk::run(context, &job, gk::add_all_exponentials);
    if (job.k > 0) job.held = job.kernels->top_k(logits, v, 0, job.k, ids, values, 0);
  }
  gk::heap_sort(ids, values, job.held);
  if (log_sum_exp) {
    double total = 0.0;
    for (int64_t s = 0; s < job.stretches; ++s) total += job.sums[s];
    *log_sum_exp = isinf(best.value) ? INFINITY : (double)best.value + log(total);
  }
  return job.held;
}

}  // extern "C"
