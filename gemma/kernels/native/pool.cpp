// SPDX-License-Identifier: Apache-2.0
// The thread pool: workers spin for a moment after each job, since the next one follows in microseconds, then park.
//
// A job is one function that hands out its own parts, run by the caller, thread 0, and by each worker that comes while
// there is something left: one that the system runs late, on a busy machine, is not waited for. Jobs do not nest. In a
// process that was forked from the one that made the pool there are no workers: the caller runs alone.
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "kernels.h"

namespace gk {
namespace {

constexpr int kSpins = 20000;  // some 50 to 100 microseconds

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void pool_wait(int spin) {
  if (spin < kSpins) relax();
  else sched_yield();
}

class Pool {
 public:
  explicit Pool(int threads) : size_(threads), process_(getpid()) {}

  bool start() {
    workers_ = new (std::nothrow) std::thread[size_];
    if (!workers_) return false;
    for (int i = 1; i < size_; ++i) {
      try {
        workers_[i] = std::thread([this, i] { work(i); });
      } catch (...) {
        size_ = i;
        return false;
      }
    }
    return true;
  }

  ~Pool() {
    if (getpid() != process_) return;  // the threads and their state belong to the parent process
    {
      std::lock_guard<std::mutex> guard(mutex_);
      stop_ = true;
      gate_.store(next_job(), std::memory_order_release);
    }
    wake_.notify_all();
    for (int i = 1; i < size_; ++i)
      if (workers_[i].joinable()) workers_[i].join();
    delete[] workers_;
  }

  int size() const { return getpid() == process_ ? size_ : 1; }

  void run(void (*f)(void*, int, int), void* arg) {
    const int threads = size();
    if (threads == 1) return f(arg, 0, 1);
    job_ = f, arg_ = arg;
    gate_.store(next_job(), std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> guard(mutex_);  // a worker about to park has seen the new job or waits already
      wake_.notify_all();
    }
    f(arg, 0, threads);
    gate_.fetch_or(kClosed, std::memory_order_acq_rel);  // nothing is left: who has not come need not
    for (int spin = 0; gate_.load(std::memory_order_acquire) & kInside; ++spin) pool_wait(spin);
  }

 private:
  // The gate of a job: its number above, whether it is closed, and how many workers are inside.
  static constexpr uint64_t kInside = 0xffff, kClosed = 0x10000, kJob = 0x20000;

  uint64_t next_job() const { return (gate_.load(std::memory_order_relaxed) / kJob + 1) * kJob; }

  void work(int number) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t gate = wait(seen);
      seen = gate / kJob;
      if (stop_) return;
      while (gate / kJob == seen && !(gate & kClosed))
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          job_(arg_, number, size_);
          gate_.fetch_sub(1, std::memory_order_release);
          break;
        }
    }
  }

  uint64_t wait(uint64_t seen) {
    uint64_t gate = 0;
    for (int spin = 0; spin < kSpins; ++spin) {
      if ((gate = gate_.load(std::memory_order_acquire)) / kJob != seen) return gate;
      relax();
    }
    std::unique_lock<std::mutex> guard(mutex_);
    parked_.fetch_add(1, std::memory_order_seq_cst);
    while ((gate = gate_.load(std::memory_order_seq_cst)) / kJob == seen) wake_.wait(guard);
    parked_.fetch_sub(1, std::memory_order_seq_cst);
    return gate;
  }

  int size_;
  const pid_t process_;
  std::thread* workers_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> gate_{0};
  std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  void (*job_)(void*, int, int) = nullptr;
  void* arg_ = nullptr;
};

Pool* pool_new(int threads) {
  Pool* pool = new (std::nothrow) Pool(threads);
  if (pool && !pool->start()) {
    delete pool;
    return nullptr;
  }
  return pool;
}
void pool_free(Pool* pool) { delete pool; }
int pool_size(const Pool* pool) { return pool->size(); }
void pool_run(Pool* pool, void (*f)(void*, int, int), void* arg) { pool->run(f, arg); }

}  // namespace gk
