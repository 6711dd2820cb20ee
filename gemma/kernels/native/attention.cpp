// SPDX-License-Identifier: Apache-2.0
// The attention of one layer over the thread pool: several sequences, prompts or single tokens, in one job.
//
// Work is cut into units: some tokens of one sequence and one kv head. Where single tokens are too few for the threads
// to share evenly, a unit is cut further along its keys, into whole key blocks; the thread that ends a unit's last
// piece merges its blocks in order. attention.h keeps the bits of all these ways equal, so the choice is one of speed only.
#include <atomic>

#include "attention_layout.h"

namespace gk {
namespace {

constexpr int64_t kUnitsPerThread = 4;              // enough that threads end together
constexpr int64_t kPartBytesPerThread = 4 << 20;    // for the parts of units that are cut
constexpr int64_t kSmall = 1 << 16;                 // multiply-adds below which waking the pool costs more

int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t blocks_of(const AttendArgs& a, int64_t t0, int64_t t1) {
  return attend_end_block(&a, t1) - attend_first_block(&a, t0);
}

// A unit that is cut: where its parts stand, and how many of its pieces are not done.
struct Cut {
  float* parts;
  int64_t left;
};

struct Job {
  const Kernels* kernels;
  const AttendArgs* items;
  int n;
  int64_t tile, pieces, units;   // tokens of a unit; pieces of a unit, 1: not cut
  std::atomic<int64_t> next;
  Cut* cuts;
  char* scratch;
  int64_t scratch_bytes;         // of a thread
};

struct Unit {
  const AttendArgs* args;
  int64_t t0, t1, kv_head;
};

int64_t units_of(const AttendArgs& a, int64_t tile) { return (a.tokens + tile - 1) / tile * a.num_kv_heads; }

// Later tokens see more keys: they come first, so that no thread is left with a long unit at the end.
Unit unit_at(const Job& job, int64_t index) {
  int i = 0;
  for (int64_t here; index >= (here = units_of(job.items[i], job.tile)); ++i) index -= here;
  const AttendArgs& a = job.items[i];
  const int64_t tiles = (a.tokens + job.tile - 1) / job.tile, t0 = (tiles - 1 - index / a.num_kv_heads) * job.tile;
  return {&a, t0, t0 + job.tile < a.tokens ? t0 + job.tile : a.tokens, index % a.num_kv_heads};
}

void run_whole(const Job& job, int64_t index, void* scratch) {
  const Unit u = unit_at(job, index);
  job.kernels->attend(u.args, u.t0, u.t1, u.kv_head, u.kv_head + 1, scratch);
}

void run_piece(const Job& job, int64_t index, void* scratch) {
  const Unit u = unit_at(job, index / job.pieces);
  Cut& cut = job.cuts[index / job.pieces];
  const int64_t first = attend_first_block(u.args, u.t0), end = attend_end_block(u.args, u.t1);
  const int64_t each = (end - first + job.pieces - 1) / job.pieces, b0 = first + index % job.pieces * each;
  const int64_t b1 = b0 + each < end ? b0 + each : end;
  if (b0 < b1) {
    float* parts = cut.parts + (b0 - first) * attend_part_floats(u.args, (u.t1 - u.t0) * attend_group(u.args));
    job.kernels->attend_blocks(u.args, u.t0, u.t1, u.kv_head, b0, b1, parts, scratch);
  }
  if (std::atomic_ref<int64_t>(cut.left).fetch_sub(1, std::memory_order_acq_rel) == 1) {
    job.kernels->attend_merge(u.args, u.t0, u.t1, u.kv_head, first, end, cut.parts, scratch);
  }
}

void work(void* arg, int thread, int) {
  Job& job = *(Job*)arg;
  void* scratch = job.scratch + thread * job.scratch_bytes;
  const int64_t all = job.units * job.pieces;
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < all;) {
    job.pieces > 1 ? run_piece(job, i, scratch) : run_whole(job, i, scratch);
  }
}

int64_t most_part_bytes(const gk_context* context, const AttendArgs* shape, int64_t positions) {
  const int64_t seen = shape->window > 0 && shape->window < positions ? shape->window : positions;
  const int64_t blocks = (seen + kKeyBlock - 1) / kKeyBlock + 1;
  const int64_t each = up(attend_part_floats(shape, attend_group(shape)) * 4) * blocks;
  const int64_t want = kUnitsPerThread * context->threads * each, most = kPartBytesPerThread * context->threads;
  return want < most ? want : most;
}

// Cuts single tokens along their keys where there are too few of them; the parts go to `at`.
void cut_units(Job* job, int threads, char* at) {
  const int64_t want = kUnitsPerThread * threads;
  job->pieces = 1;
  if (job->tile > 1 || job->units >= want || threads < 2) return;
  int64_t total = 0, longest = 1;
  for (int64_t u = 0; u < job->units; ++u) {
    const Unit unit = unit_at(*job, u);
    const int64_t blocks = blocks_of(*unit.args, unit.t0, unit.t1);
    if (blocks > longest) longest = blocks;
    job->cuts[u].parts = (float*)(at + total);
    total += up(blocks * attend_part_floats(unit.args, attend_group(unit.args)) * 4);
  }
  if (total > kPartBytesPerThread * threads) return;
  const int64_t pieces = (want + job->units - 1) / job->units;
  job->pieces = pieces < longest ? pieces : longest;
  for (int64_t u = 0; u < job->units; ++u) job->cuts[u].left = job->pieces;
}

}  // namespace

size_t attend_parallel_scratch(const gk_context* context, const AttendArgs* shape, int64_t positions) {
  const int64_t cuts = up(kUnitsPerThread * context->threads * (int64_t)sizeof(Cut));
  const int64_t each = up((int64_t)context->kernels->attend_scratch(shape));
  return (size_t)(64 + cuts + context->threads * each + most_part_bytes(context, shape, positions));
}

void attend_batch_parallel(gk_context* context, const AttendArgs* items, int n, void* scratch) {
  if (n < 1) return;
  const int threads = pool_size(context->pool);
  int64_t tokens = 0, work_size = 0;
  for (int i = 0; i < n; ++i) {
    const AttendArgs& a = items[i];
    tokens += a.tokens;
    if (a.tokens < 1) continue;
    const int64_t blocks = blocks_of(a, 0, a.tokens) * kKeyBlock, all = a.first_pos + a.tokens;
    work_size += 2 * a.tokens * a.num_heads * a.head_dim * (blocks < all ? blocks : all);
  }
  if (tokens < 1) return;
  Job job;
  job.kernels = context->kernels;
  job.items = items;
  job.n = n;
  job.next = 0;
  char* at = (char*)(((uintptr_t)scratch + 63) / 64 * 64);
  job.cuts = (Cut*)at;
  at += up(kUnitsPerThread * context->threads * (int64_t)sizeof(Cut));
  job.scratch = at;
  job.scratch_bytes = up((int64_t)context->kernels->attend_scratch(&items[0]));
  at += context->threads * job.scratch_bytes;
  job.tile = attend_tile_tokens(&items[0]);
  const int64_t fair = tokens * items[0].num_kv_heads / (2 * threads);  // two units for each thread
  if (threads > 1 && fair < job.tile) job.tile = fair > 0 ? fair : 1;
  job.units = 0;
  for (int i = 0; i < n; ++i) job.units += units_of(items[i], job.tile);
  if (threads == 1 || work_size < kSmall) {
    job.pieces = 1;
    return work(&job, 0, 1);
  }
  cut_units(&job, threads, at);
  pool_run(context->pool, work, &job);
}

void attend_parallel(gk_context* context, const AttendArgs* args, void* scratch) {
  attend_batch_parallel(context, args, 1, scratch);
}

}  // namespace gk
