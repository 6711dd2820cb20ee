// SPDX-License-Identifier: Apache-2.0
// The thread pool: workers spin for a moment after each job, since the next one follows in microseconds, then park.
//
// A job is one function that every thread runs with its own number; the caller is thread 0. Jobs do not nest. In a
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
      epoch_.fetch_add(1, std::memory_order_release);
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
    left_.store(threads - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> guard(mutex_);  // a worker about to park has seen the new epoch or waits already
      wake_.notify_all();
    }
    f(arg, 0, threads);
    for (int spin = 0; left_.load(std::memory_order_acquire); ++spin) {
      if (spin < kSpins) relax();
      else sched_yield();
    }
  }

 private:
  void work(int number) {
    uint32_t seen = 0;
    for (;;) {
      wait(seen);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      job_(arg_, number, size_);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait(uint32_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    std::unique_lock<std::mutex> guard(mutex_);
    parked_.fetch_add(1, std::memory_order_seq_cst);
    while (epoch_.load(std::memory_order_seq_cst) == seen) wake_.wait(guard);
    parked_.fetch_sub(1, std::memory_order_seq_cst);
  }

  int size_;
  const pid_t process_;
  std::thread* workers_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> parked_{0}, left_{0};
  bool stop_ = false;
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
