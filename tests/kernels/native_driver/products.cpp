// SPDX-License-Identifier: Apache-2.0
// Products, rows and gradients of the cases in a file, against the numbers and bounds that the file holds.
//
// A case: int64 type, rows, cols, row_bytes, scales, m; then bytes [rows, row_bytes], float32 scale, float32 x [m, cols],
// float32 decoded [rows, cols], float64 y and its bound [m, rows], float32 dy [m, rows], float64 dx and its bound [m, cols].
#include "driver.h"

namespace driver {

namespace {

struct Reader {
  FILE* file;
  template <class T>
  Buffer<T> take(int64_t n, int offset = 0) {
    Buffer<T> out(n, offset);
    if (fread(out.data, sizeof(T), n, file) != (size_t)n) {
      fprintf(stderr, "the file of cases ends early\n");
      exit(2);
    }
    return out;
  }
};

struct Case {
  gk_weight weight;
  int64_t m;
  Buffer<uint8_t> data;
  Buffer<float> scale, x, decoded;
  Buffer<double> y, y_bound;
  Buffer<float> dy;
  Buffer<double> dx, dx_bound;
};

Case read_case(Reader& in, const Buffer<int64_t>& head, int offset) {
  const int64_t rows = head[1], cols = head[2], row_bytes = head[3], m = head[5];
  Case c{{(int32_t)head[0], rows, cols, nullptr, row_bytes, nullptr}, m,
         in.take<uint8_t>(rows * row_bytes, offset), in.take<float>(head[4]), in.take<float>(m * cols),
         in.take<float>(rows * cols), in.take<double>(m * rows), in.take<double>(m * rows),
         in.take<float>(m * rows), in.take<double>(m * cols), in.take<double>(m * cols)};
  c.weight.data = c.data.data;
  c.weight.scale = head[4] ? c.scale.data : nullptr;
  return c;
}

void check_product(const Context& context, const Case& c, int64_t m) {
  const gk_weight& w = c.weight;
  Buffer<float> x(m * w.cols), y(m * w.rows);
  memcpy(x.data, c.x.data, x.size * sizeof(float));
  const int status = gk_matmul(context.get, &w, x.data, m, w.cols, y.data, w.rows);
  CHECK(status == GK_OK, "type %d: %s", w.type, gk_last_error());
  int64_t bad = 0;
  for (int64_t i = 0; i < y.size; ++i) bad += !near(y[i], c.y[i], 0, c.y_bound[i]);
  CHECK(bad == 0, "%s, type %d [%lld, %lld], m %lld: %lld products beyond their bound", gk_context_isa(context.get), w.type,
        (long long)w.rows, (long long)w.cols, (long long)m, (long long)bad);
}

void check_bf16(const Context& context, const Case& c, int64_t m) {
  const gk_weight& w = c.weight;
  Buffer<uint16_t> x(m * w.cols), y(m * w.rows), expected(m * w.rows);
  Buffer<float> wide(m * w.cols), product(m * w.rows);
  memcpy(wide.data, c.x.data, wide.size * sizeof(float));
  context.kernels().f32_to_bf16(wide.data, wide.size, x.data);
  context.kernels().bf16_to_f32(x.data, x.size, wide.data);
  CHECK(gk_matmul_bf16(context.get, &w, x.data, m, w.cols, y.data, w.rows) == GK_OK, "%s", gk_last_error());
  CHECK(gk_matmul(context.get, &w, wide.data, m, w.cols, product.data, w.rows) == GK_OK, "%s", gk_last_error());
  context.kernels().f32_to_bf16(product.data, product.size, expected.data);
  CHECK(same(y.data, expected.data, y.size * 2), "type %d: bfloat16 is not the float32 product rounded", w.type);
}

void check_rows_and_gradient(const Context& context, const Case& c) {
  const gk_weight& w = c.weight;
  Buffer<int32_t> ids(w.rows);
  for (int64_t i = 0; i < w.rows; ++i) ids[i] = (int32_t)(w.rows - 1 - i);
  Buffer<float> out(w.rows * w.cols);
  CHECK(gk_rows(context.get, &w, ids.data, ids.size, out.data) == GK_OK, "%s", gk_last_error());
  bool equal = true;
  for (int64_t i = 0; i < w.rows; ++i)
    equal &= same(out.data + i * w.cols, c.decoded.data + ids[i] * w.cols, w.cols * sizeof(float));
  CHECK(equal, "%s, type %d [%lld, %lld]: rows differ from the decoder's", gk_context_isa(context.get), w.type,
        (long long)w.rows, (long long)w.cols);
  Buffer<float> dx(c.m * w.cols);
  CHECK(gk_matmul_grad(context.get, &w, c.dy.data, c.m, w.rows, dx.data, w.cols) == GK_OK, "%s", gk_last_error());
  int64_t bad = 0;
  for (int64_t i = 0; i < dx.size; ++i) bad += !near(dx[i], c.dx[i], 0, c.dx_bound[i]);
  CHECK(bad == 0, "%s, type %d: %lld gradients beyond their bound", gk_context_isa(context.get), w.type, (long long)bad);
}

}  // namespace

void products(const char* cases, const char* isa) {
  FILE* file = fopen(cases, "rb");
  if (!file) {
    fprintf(stderr, "%s cannot be read\n", cases);
    exit(2);
  }
  Reader in{file};
  const int64_t count = in.take<int64_t>(1)[0];
  const Context one(1, isa), all(2, isa);
  for (int64_t i = 0; i < count; ++i) {
    const Buffer<int64_t> head = in.take<int64_t>(6);
    const Case c = read_case(in, head, (int)(i % 3));
    for (int64_t m = 1; m <= c.m; m = m < 3 ? m + 1 : m == 3 ? 9 : m == 9 ? c.m : c.m + 1)
      check_product(i & 1 ? all : one, c, m > c.m ? c.m : m);
    check_bf16(one, c, c.m < 3 ? c.m : 3);
    check_rows_and_gradient(i & 1 ? one : all, c);
  }
  CHECK(fgetc(file) == EOF, "the file of cases goes on");
  fclose(file);
}

void bad_arguments() {
  CHECK(gk_abi_version() == GK_ABI_VERSION, "library %d, header %d", gk_abi_version(), GK_ABI_VERSION);
  for (int threads : {0, -1, 1 << 20}) {
    CHECK(gk_context_new(threads, nullptr) == nullptr, "%d threads", threads);
    CHECK(strlen(gk_last_error()) > 0, "%d threads: no words", threads);
  }
  CHECK(gk_context_new(1, "abacus") == nullptr, "an unknown instruction set");
  const Context context(1, nullptr);
  Buffer<uint8_t> data(34 * 3);
  Buffer<float> x(32), y(3);
  Buffer<int32_t> ids(1);
  const gk_weight good{GK_Q8_0, 3, 32, data.data, 34, nullptr};
  CHECK(gk_matmul(context.get, &good, x.data, 0, 32, y.data, 3) < 0, "an empty batch");
  std::vector<gk_weight> bad(6, good);
  bad[0].type = 9, bad[1].cols = 33, bad[2].rows = -1, bad[3].data = nullptr, bad[4].row_bytes = 33;
  bad[5] = gk_weight{GK_INT8, 3, 32, data.data, 34, nullptr};  // no scale
  for (size_t i = 0; i < bad.size(); ++i) {
    CHECK(gk_matmul(context.get, &bad[i], x.data, 1, 32, y.data, 3) < 0, "weight %zu was accepted", i);
    CHECK(gk_rows(context.get, &bad[i], ids.data, 1, x.data) < 0, "rows of weight %zu were accepted", i);
  }
  CHECK(gk_matmul(context.get, &good, x.data, -1, 32, y.data, 3) < 0, "a negative count");
  for (int32_t id : {-1, 3}) {
    ids[0] = id;
    CHECK(gk_rows(context.get, &good, ids.data, 1, x.data) < 0, "row %d of 3", id);
  }
}

}  // namespace driver
