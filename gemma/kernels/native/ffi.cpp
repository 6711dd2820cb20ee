// SPDX-License-Identifier: Apache-2.0
// The XLA shim: custom calls through which JAX reaches the products of libgemmakit over packed weights, on a CPU.
//
// A library of its own, compiled against the headers of the jaxlib that is installed (gemma/kernels/_shim_jax.py), so
// that libgemmakit knows no framework. It holds no arithmetic: it finds libgemmakit's functions, checks the shapes once
// more, and passes XLA's buffers on by their pointers. XLA calls from threads of its own, several at a time; one context
// computes one product at a time, so a lock stands before it.
#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "gemmakit.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Library {
  decltype(&gk_abi_version) abi_version;
  decltype(&gk_last_error) last_error;
  decltype(&gk_row_bytes) row_bytes;
  decltype(&gk_matmul) matmul;
  decltype(&gk_matmul_bf16) matmul_bf16;
  decltype(&gk_matmul_grad) matmul_grad;
  decltype(&gk_rows) rows;
  gk_context* context;
};

Library library{};
std::mutex one_at_a_time;

ffi::Error wrong(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "gemmakit: " + what); }

ffi::Error result(int status) {
  if (status == GK_OK) return ffi::Error::Success();
  const char* words = library.last_error();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("gemmakit: ") + (words ? words : "unknown error"));
}

// The weight of a call: data uint8 [rows, row_bytes], and float32 scales where the type has some.
ffi::Error weight_of(ffi::AnyBuffer data, ffi::RemainingArgs more, int32_t type, int64_t cols, gk_weight* w) {
  auto shape = data.dimensions();
  if (!library.context) return wrong("the shim was called before gkx_open");
  if (data.element_type() != ffi::DataType::U8 || shape.size() != 2 || shape[1] != library.row_bytes(type, cols))
    return wrong("data: expected uint8 [rows, row bytes] of the type");
  const float* scale = nullptr;
  if (more.size() == 1) {
    auto given = more.get<ffi::AnyBuffer>(0);
    if (!given || given->element_type() != ffi::DataType::F32) return wrong("scale: expected float32");
    scale = given->typed_data<float>();
  }
  *w = gk_weight{type, shape[0], cols, static_cast<const uint8_t*>(data.untyped_data()), shape[1], scale};
  return ffi::Error::Success();
}

// Rows of a matrix whose leading axes may be any: [..., columns].
int64_t rows_of(ffi::Span<const int64_t> shape, int64_t columns) {
  if (shape.size() == 0 || shape.back() != columns) return -1;
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return rows;
}

// y [..., rows of the weight] = x [..., cols] @ W.T, float32 or bfloat16.
ffi::Error matmul(ffi::AnyBuffer x, ffi::AnyBuffer data, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> y,
                  int32_t type, int64_t cols) {
  gk_weight w;
  if (auto error = weight_of(data, more, type, cols, &w); error.failure()) return error;
  const int64_t m = rows_of(x.dimensions(), cols);
  if (m < 0 || m != rows_of(y->dimensions(), w.rows) || x.element_type() != y->element_type())
    return wrong("x and the result do not fit the weight");
  if (m == 0 || w.rows == 0) return ffi::Error::Success();
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (x.element_type() == ffi::DataType::F32)
    return result(library.matmul(library.context, &w, x.typed_data<float>(), m, cols, y->typed_data<float>(), w.rows));
  if (x.element_type() == ffi::DataType::BF16)
    return result(library.matmul_bf16(library.context, &w, static_cast<const uint16_t*>(x.untyped_data()), m, cols,
                                      static_cast<uint16_t*>(y->untyped_data()), w.rows));
  return wrong("x: expected float32 or bfloat16");
}

// dx [..., cols] = dy [..., rows of the weight] @ W, float32.
ffi::Error gradient(ffi::AnyBuffer dy, ffi::AnyBuffer data, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> dx,
                    int32_t type, int64_t cols) {
  gk_weight w;
  if (auto error = weight_of(data, more, type, cols, &w); error.failure()) return error;
  const int64_t m = rows_of(dy.dimensions(), w.rows);
  if (m < 0 || m != rows_of(dx->dimensions(), cols) || dy.element_type() != ffi::DataType::F32 ||
      dx->element_type() != ffi::DataType::F32)
    return wrong("dy and the result do not fit the weight");
  if (m == 0) return ffi::Error::Success();
  std::lock_guard<std::mutex> lock(one_at_a_time);
  return result(
      library.matmul_grad(library.context, &w, dy.typed_data<float>(), m, w.rows, dx->typed_data<float>(), cols));
}

// out [..., cols] = W[ids [...]], float32. As in jax.numpy's indexing, negative ids count from the end, and what is
// beyond an end is that end's row.
ffi::Error rows(ffi::AnyBuffer ids, ffi::AnyBuffer data, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out,
                int32_t type, int64_t cols) {
  gk_weight w;
  if (auto error = weight_of(data, more, type, cols, &w); error.failure()) return error;
  const int64_t n = static_cast<int64_t>(ids.element_count());
  if (ids.element_type() != ffi::DataType::S32 || out->element_type() != ffi::DataType::F32 ||
      n != rows_of(out->dimensions(), cols) || w.rows == 0)
    return wrong("ids: expected int32, and a weight with rows");
  if (n == 0) return ffi::Error::Success();
  const int32_t* given = ids.typed_data<int32_t>();
  std::vector<int32_t> fitted(given, given + n);
  for (int32_t& id : fitted) {
    const int64_t wanted = id < 0 ? id + w.rows : id;
    id = static_cast<int32_t>(std::clamp<int64_t>(wanted, 0, w.rows - 1));
  }
  std::lock_guard<std::mutex> lock(one_at_a_time);
  return result(library.rows(library.context, &w, fitted.data(), n, out->typed_data<float>()));
}

template <typename F>
bool find(void* handle, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(handle, name));
  return *function != nullptr;
}

}  // namespace

// Every call has the same operands: the activations (or ids), the weight's bytes, its scales if it has some.
#define GKX_HANDLER(NAME, FUNCTION)                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, FUNCTION,                      \
                                ffi::Ffi::Bind()                     \
                                    .Arg<ffi::AnyBuffer>()           \
                                    .Arg<ffi::AnyBuffer>()           \
                                    .RemainingArgs()                 \
                                    .Ret<ffi::AnyBuffer>()           \
                                    .Attr<int32_t>("type")           \
                                    .Attr<int64_t>("cols"))

#pragma GCC visibility push(default)
GKX_HANDLER(gkx_matmul, matmul);
GKX_HANDLER(gkx_matmul_grad, gradient);
GKX_HANDLER(gkx_rows, rows);
#pragma GCC visibility pop

// Before the first call, once: the path of libgemmakit and a context of it that nobody else computes with. Returns NULL,
// or what is wrong.
extern "C" GK_API const char* gkx_open(const char* path, gk_context* context) {
  Library found{};
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
  if (!find(handle, "gk_abi_version", &found.abi_version) || found.abi_version() != GK_ABI_VERSION)
    return "libgemmakit has another ABI version than this shim";
  if (!find(handle, "gk_last_error", &found.last_error) || !find(handle, "gk_row_bytes", &found.row_bytes) ||
      !find(handle, "gk_matmul", &found.matmul) || !find(handle, "gk_matmul_bf16", &found.matmul_bf16) ||
      !find(handle, "gk_matmul_grad", &found.matmul_grad) || !find(handle, "gk_rows", &found.rows))
    return "libgemmakit lacks a function that this shim calls";
  found.context = context;
  library = found;
  return nullptr;
}
