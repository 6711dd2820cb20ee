// SPDX-License-Identifier: Apache-2.0
// What the parts of the driver share: exact buffers, random numbers, checks, and the list of instruction sets.
//
// The driver runs every kernel on small inputs of odd sizes whose buffers end with their last byte, so that the address
// sanitizer sees any read or write past them; it also compares numbers, so that it tests kernels where no Python runs
// (emulated instruction sets, other processors). Expected products come from a file that tests/kernels writes.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "gemmakit.h"
#include "kernels.h"

namespace driver {

// n values on the heap, nothing behind them. `offset` bytes before the first one spoil its alignment (bytes only).
template <class T>
struct Buffer {
  std::unique_ptr<uint8_t[]> memory;
  T* data;
  int64_t size;
  explicit Buffer(int64_t n, int offset = 0)
      : memory(new uint8_t[n * sizeof(T) + offset]), data((T*)(memory.get() + offset)), size(n) {
    memset(memory.get(), 0, n * sizeof(T) + offset);
  }
  Buffer(Buffer&&) = default;
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

struct Random {  // xorshift; the same numbers everywhere
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  int64_t below(int64_t n) { return (int64_t)(bits() >> 11) % n; }
  float uniform(float low, float high) { return low + (high - low) * (float)((bits() >> 40) * 0x1p-24); }
  float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform(0, 1);
    return sum - 6;
  }
  void fill(Buffer<float>& x, float scale = 1) {
    for (int64_t i = 0; i < x.size; ++i) x[i] = normal() * scale;
  }
};

inline int failures = 0, checks = 0;

#define CHECK(condition, ...)                                  \
  do {                                                         \
    ++driver::checks;                                          \
    if (!(condition)) {                                        \
      ++driver::failures;                                      \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                            \
      fputc('\n', stderr);                                     \
    }                                                          \
  } while (0)

inline bool near(double got, double expected, double relative, double absolute) {
  return std::fabs(got - expected) <= relative * std::fabs(expected) + absolute;  // false for NaN
}
inline bool same(const void* a, const void* b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

std::vector<std::string> instruction_sets();  // those of this library and CPU, or the one that was asked for

void products(const char* cases, const char* isa);
void elementwise(const char* isa);
void attention(const char* isa);
void logits(const char* isa);
void model(const char* isa);
void bad_arguments();

struct Context {  // closed at the end of its block
  gk_context* get;
  Context(int threads, const char* isa) : get(gk_context_new(threads, isa)) {
    if (!get) {
      fprintf(stderr, "no context of %d threads for %s: %s\n", threads, isa, gk_last_error());
      exit(2);
    }
  }
  ~Context() { gk_context_free(get); }
  const gk::Kernels& kernels() const { return *get->kernels; }
};

}  // namespace driver
