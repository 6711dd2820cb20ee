// SPDX-License-Identifier: Apache-2.0
// Norms, rotary embedding, GELU, soft-cap, cache stores, attention and logits, against plain loops in double.
#include "driver.h"

namespace driver {

namespace {

constexpr int64_t kSizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130};

struct Aligned {  // scratch as the library allocates it, ending with its last byte
  void* get = nullptr;
  explicit Aligned(size_t bytes) {
    if (posix_memalign(&get, 64, bytes ? bytes : 1)) exit(2);
  }
  ~Aligned() { free(get); }
};

Buffer<float> copy(const Buffer<float>& x) {
  Buffer<float> y(x.size);
  memcpy(y.data, x.data, x.size * sizeof(float));
  return y;
}

void norms(const gk::Kernels& k, int64_t n, Random& random) {
  Buffer<float> x(n), weight(n), y(n), residual(n);
  random.fill(x, 3), random.fill(weight), random.fill(residual);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += (double)x[i] * x[i];
  const double factor = 1 / std::sqrt(squares / n + 1e-6);
  Buffer<float> sum = copy(residual), in_place = copy(x), added = copy(residual);
  k.rms_norm(x.data, weight.data, 1e-6f, n, y.data);
  k.rms_norm(in_place.data, weight.data, 1e-6f, n, in_place.data);
  k.add_rms_norm(sum.data, x.data, weight.data, 1e-6f, n);
  k.add(added.data, x.data, n);
  for (int64_t i = 0; i < n; ++i) {
    const double expected = x[i] * factor * weight[i];
    CHECK(near(y[i], expected, 1e-6, 1e-30), "rms_norm of %lld", (long long)n);
    CHECK(near(sum[i], residual[i] + expected, 2e-6, 2e-6), "add_rms_norm of %lld", (long long)n);
    CHECK(added[i] == residual[i] + x[i], "add of %lld", (long long)n);
  }
  CHECK(same(y.data, in_place.data, n * sizeof(float)), "rms_norm in place");
}

// y = factor * w x and y += w x with panels of rows, in buffers that end with them; the same bits for any number of rows.
void narrow(const gk::Kernels& k, int64_t rows, int64_t cols, bool half, Random& random) {
  const int64_t group = k.row_group, m = 14, bytes = half ? 2 : 4, panels = (rows + group - 1) / group;
  Buffer<uint8_t> data(panels * group * cols * bytes);
  Buffer<float> w(rows * cols), x(m * cols), factor(rows), y(m * rows), sum(m * rows), one(rows);
  random.fill(w), random.fill(x), random.fill(factor), random.fill(sum);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      uint32_t bits;
      memcpy(&bits, &w[r * cols + c], 4);
      if (half) bits &= 0xFFFF0000u;
      memcpy(&w[r * cols + c], &bits, 4);
      memcpy(data.data + ((r / group * cols + c) * group + r % group) * bytes, (uint8_t*)&bits + (4 - bytes), bytes);
    }
  const gk::Panels weight = {half, rows, cols, data.data};
  const Buffer<float> before = copy(sum);
  for (int64_t r0 = 0; r0 < rows; r0 += group) {
    const int64_t r1 = r0 + group < rows ? r0 + group : rows;
    k.low_rank(&weight, r0, r1, x.data, cols, m, factor.data, y.data, rows);
  }
  k.low_rank(&weight, 0, rows, x.data, cols, m, nullptr, sum.data, rows);
  for (int64_t t = 0; t < m; ++t) {
    k.low_rank(&weight, 0, rows, x.data + t * cols, cols, 1, factor.data, one.data, rows);
    CHECK(same(one.data, &y[t * rows], rows * sizeof(float)), "narrow product [%lld, %lld] alone", (long long)rows, (long long)cols);
    for (int64_t r = 0; r < rows; ++r) {
      double expected = 0, size = 0;
      for (int64_t c = 0; c < cols; ++c)
        expected += (double)w[r * cols + c] * x[t * cols + c], size += std::fabs((double)w[r * cols + c] * x[t * cols + c]);
      CHECK(near(y[t * rows + r], factor[r] * expected, 0, 2e-6 * size * std::fabs(factor[r])), "narrow product of %lld", (long long)cols);
      CHECK(near(sum[t * rows + r], before[t * rows + r] + expected, 2e-7, 2e-6 * (size + std::fabs(before[t * rows + r]))), "added");
    }
  }
}

void pointwise(const gk::Kernels& k, int64_t n, Random& random) {
  Buffer<float> x(n), up(n), y(n);
  random.fill(x, 4), random.fill(up);
  x[0] = -90;
  k.gelu_mul(x.data, up.data, n, y.data);
  Buffer<float> in_place = copy(x), capped = copy(x), scaled = copy(x);
  k.gelu_mul(in_place.data, up.data, n, in_place.data);
  k.softcap(capped.data, n, 5.0f);
  k.scale(scaled.data, n, 0.37f);
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i], u = 0.7978845608028654 * (v + 0.044715 * v * v * v), gelu = v / 2 * (1 + std::tanh(u));
    CHECK(near(y[i], gelu * up[i], 4e-6, 1e-6), "gelu_mul(%g) = %g", v, y[i]);
    CHECK(near(capped[i], 5 * std::tanh(v / 5), 2e-6, 1e-7), "softcap(%g) = %g", v, capped[i]);
    CHECK(scaled[i] == x[i] * 0.37f, "scale");
  }
  CHECK(same(y.data, in_place.data, n * sizeof(float)), "gelu_mul in place");
}

void rope(const gk::Kernels& k, int64_t half, Random& random) {
  const int64_t heads = 3, size = 2 * half;
  Buffer<float> x(heads * size), cosine(half), sine(half);
  random.fill(x);
  for (int64_t i = 0; i < half; ++i) cosine[i] = std::cos(i + 0.5f), sine[i] = std::sin(i + 0.5f);
  Buffer<float> y = copy(x);
  k.rope(y.data, heads, size, cosine.data, sine.data);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[h * size + i], b = x[h * size + half + i];
      CHECK(near(y[h * size + i], (double)a * cosine[i] - (double)b * sine[i], 1e-6, 1e-6), "rope, half %lld", (long long)half);
      CHECK(near(y[h * size + half + i], (double)b * cosine[i] + (double)a * sine[i], 1e-6, 1e-6), "rope");
    }
}

int64_t cache_width(int32_t type) { return type == GK_CACHE_F32 ? 4 : type == GK_CACHE_BF16 ? 2 : 1; }

double cached(const uint8_t* data, const float* scale, int32_t type, int64_t i) {
  if (type == GK_CACHE_INT8) return (double)(int8_t)data[i] * *scale;
  float value;
  uint32_t bits = 0;
  if (type == GK_CACHE_F32) memcpy(&bits, data + 4 * i, 4);
  else memcpy((uint8_t*)&bits + 2, data + 2 * i, 2);
  memcpy(&value, &bits, 4);
  return value;
}

void stores(const gk::Kernels& k, int64_t n, Random& random) {
  Buffer<float> x(n), wide(n);
  random.fill(x);
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::fmax(most, std::fabs(x[i]));
  for (int32_t type : {GK_CACHE_F32, GK_CACHE_BF16, GK_CACHE_INT8}) {
    Buffer<uint8_t> out(n * cache_width(type));
    Buffer<float> scale(1);
    k.store_cache(x.data, n, type, out.data, scale.data);
    const double limit = type == GK_CACHE_F32 ? 0 : type == GK_CACHE_BF16 ? most / 256 : most / 253;
    for (int64_t i = 0; i < n; ++i)
      CHECK(near(cached(out.data, scale.data, type, i), x[i], 0, limit), "store_cache of type %d", type);
  }
  Buffer<uint16_t> half(n);
  k.f32_to_bf16(x.data, n, half.data);
  k.bf16_to_f32(half.data, n, wide.data);
  for (int64_t i = 0; i < n; ++i) CHECK(near(wide[i], x[i], 0x1p-8, 0), "bfloat16 of %g is %g", x[i], wide[i]);
}

// ---- attention -------------------------------------------------------------------------------------------------

struct Cache {  // [heads, capacity, size] with everything that attention may read filled, the rest NaN
  int64_t heads, capacity, size;
  int32_t type;
  Buffer<uint8_t> data;
  Buffer<float> scale;
  Cache(const gk::Kernels& k, int64_t heads, int64_t capacity, int64_t size, int32_t type, int64_t filled, Random& random)
      : heads(heads), capacity(capacity), size(size), type(type), data(heads * capacity * size * cache_width(type)),
        scale(type == GK_CACHE_INT8 ? heads * capacity : 0) {
    memset(data.data, 0xFF, data.size);
    Buffer<float> x(size);
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t at = 0; at < filled; ++at) {
        random.fill(x);
        k.store_cache(x.data, size, type, row(i, at), factor(i, at));
      }
  }
  uint8_t* row(int64_t head, int64_t at) { return data.data + (head * capacity + at) * size * cache_width(type); }
  float* factor(int64_t head, int64_t at) { return scale.size ? scale.data + head * capacity + at : nullptr; }
  const float* scales() const { return scale.size ? scale.data : nullptr; }
};

struct Attention {
  int64_t heads, groups, size, tokens, first, capacity, window;
  int32_t type;
  float softcap;
};

void reference(const Attention& a, const Buffer<float>& q, Cache& k, Cache& v, Cache& ck, Cache& cv, Buffer<double>& out) {
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t n = 0; n < a.heads * a.groups; ++n) {
      const int64_t position = a.first + t, head = n / a.groups;
      const int64_t low = a.window ? std::fmax(0, position - a.window + 1) : 0;
      std::vector<double> weights, values(a.size, 0.0);
      double most = -1e300, total = 0;
      const auto place = [&](Cache& old, Cache& fresh, int64_t p, int64_t i) {
        Cache& from = p < a.first ? old : fresh;
        const int64_t at = p < a.first ? p % a.capacity : p - a.first;
        return cached(from.row(head, at), from.factor(head, at), a.type, i);
      };
      for (int64_t p = low; p <= position; ++p) {
        double score = 0;
        for (int64_t i = 0; i < a.size; ++i) score += q[(t * a.heads * a.groups + n) * a.size + i] * place(k, ck, p, i);
        if (a.softcap) score = a.softcap * std::tanh(score / a.softcap);
        weights.push_back(score), most = std::fmax(most, score);
      }
      for (double& w : weights) total += w = std::exp(w - most);
      for (int64_t p = low; p <= position; ++p)
        for (int64_t i = 0; i < a.size; ++i) values[i] += weights[p - low] / total * place(v, cv, p, i);
      for (int64_t i = 0; i < a.size; ++i) out[(t * a.heads * a.groups + n) * a.size + i] = values[i];
    }
}

void attend_case(const Context& context, const Attention& a, Random& random) {
  const gk::Kernels& k = context.kernels();
  const int64_t heads = a.heads * a.groups, held = a.first < a.capacity ? a.first : a.capacity, room = a.tokens + 2;
  const int64_t stride = heads * a.size;
  Cache keys(k, a.heads, a.capacity, a.size, a.type, held, random), values(k, a.heads, a.capacity, a.size, a.type, held, random);
  Cache own_keys(k, a.heads, room, a.size, a.type, a.tokens, random);
  Cache own_values(k, a.heads, room, a.size, a.type, a.tokens, random);
  Buffer<float> q(a.tokens * stride), out(a.tokens * stride), split(a.tokens * stride);
  random.fill(q, 1 / std::sqrt((float)a.size));
  gk::AttendArgs args{};
  args.q = q.data, args.out = out.data, args.q_stride = args.out_stride = stride;
  args.tokens = a.tokens, args.first_pos = a.first;
  args.k = keys.data.data, args.v = values.data.data, args.k_scale = keys.scales(), args.v_scale = values.scales();
  args.capacity = a.capacity, args.chunk_capacity = room;
  args.ck = own_keys.data.data, args.cv = own_values.data.data;
  args.ck_scale = own_keys.scales(), args.cv_scale = own_values.scales();
  args.cache_type = a.type, args.num_heads = (int32_t)heads, args.num_kv_heads = (int32_t)a.heads;
  args.head_dim = (int32_t)a.size, args.window = (int32_t)a.window, args.softcap = a.softcap;
  {
    const Aligned scratch(k.attend_scratch(&args));
    k.attend(&args, 0, a.tokens, 0, a.heads, scratch.get);
  }
  Buffer<double> expected(a.tokens * stride);
  reference(a, q, keys, values, own_keys, own_values, expected);
  for (int64_t i = 0; i < out.size; ++i)
    CHECK(near(out[i], expected[i], 1e-5, 1e-5), "attend: first %lld, tokens %lld, window %lld, type %d, head size %lld: %g, not %g",
          (long long)a.first, (long long)a.tokens, (long long)a.window, a.type, (long long)a.size, out[i], expected[i]);
  args.out = split.data;
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t h = 0; h < a.heads; ++h) {
      const Aligned scratch(k.attend_scratch(&args));
      k.attend(&args, t, t + 1, h, h + 1, scratch.get);
    }
  CHECK(same(out.data, split.data, out.size * sizeof(float)), "attend: a part has other bits than the whole");
  Buffer<float> parallel(a.tokens * stride);
  args.out = parallel.data;
  {
    const Aligned scratch(gk::attend_parallel_scratch(context.get, &args, a.first + a.tokens));
    gk::attend_parallel(context.get, &args, scratch.get);
  }
  CHECK(same(out.data, parallel.data, out.size * sizeof(float)), "attend_parallel: other bits than attend's");
}

}  // namespace

void elementwise(const char* isa) {
  const Context context(1, isa);
  Random random(1);
  for (int64_t n : kSizes) {
    norms(context.kernels(), n, random);
    pointwise(context.kernels(), n, random);
    rope(context.kernels(), n, random);
    stores(context.kernels(), n, random);
  }
  const int64_t shapes[][2] = {{1, 1}, {7, 5}, {33, 16}, {16, 128}, {24, 129}, {40, 131}, {9, 200}};  // {rows, columns}
  for (const auto& shape : shapes)
    for (bool half : {true, false}) narrow(context.kernels(), shape[0], shape[1], half, random);
}

void attention(const char* isa) {
  const Context one(1, isa), two(2, isa);
  Random random(2);
  int turn = 0;
  for (int32_t type : {GK_CACHE_F32, GK_CACHE_BF16, GK_CACHE_INT8})
    for (int64_t first : {0, 1, 6, 131, 300})
      for (int64_t tokens : {1, 5})
        for (int64_t window : {0, 4, 130}) {
          const int64_t capacity = window ? window + 1 : first + 1;
          const int64_t size = turn % 3 == 0 ? 8 : turn % 3 == 1 ? 24 : 18, groups = 1 + turn % 3;
          attend_case(turn & 1 ? one : two, {2, groups, size, tokens, first, capacity, window, type, turn % 4 ? 0.0f : 3.0f}, random);
          ++turn;
        }
}

void logits(const char* isa) {
  const Context context(2, isa);
  Random random(3);
  for (int64_t n : {1, 2, 5, 16, 17, 33, 100, 1000, 5003}) {
    Buffer<float> x(n);
    random.fill(x, 5);
    if (n > 40) x[31] = x[32];  // equals: the lower id first
    int64_t best = 0;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) best = x[i] > x[best] ? i : best;
    for (int64_t i = 0; i < n; ++i) total += std::exp((double)x[i] - x[best]);
    CHECK(gk_argmax(context.get, x.data, n) == best, "argmax of %lld", (long long)n);
    for (int64_t k : {(int64_t)1, (int64_t)3, (int64_t)64, n}) {
      const int64_t count = k < n ? k : n;
      Buffer<int32_t> ids(count);
      Buffer<float> values(count);
      double log_sum_exp = 0;
      CHECK(gk_top_k(context.get, x.data, n, count, ids.data, values.data, &log_sum_exp) == count, "%s", gk_last_error());
      CHECK(near(log_sum_exp, x[best] + std::log(total), 1e-5, 1e-5), "log_sum_exp of %lld", (long long)n);
      bool sorted = ids[0] == best;
      for (int64_t i = 0; i < count; ++i) {
        sorted &= values[i] == x[ids[i]];
        if (i) sorted &= values[i - 1] > values[i] || (values[i - 1] == values[i] && ids[i - 1] < ids[i]);
      }
      int64_t above = 0;
      for (int64_t i = 0; i < n; ++i) above += x[i] > values[count - 1];
      CHECK(sorted && above < count, "top %lld of %lld", (long long)count, (long long)n);
    }
    for (float bad : {NAN, -INFINITY}) {
      for (int64_t i = 0; i < n; ++i)
        if (bad < 0 || i == n / 2) x[i] = bad;
      CHECK(gk_argmax(context.get, x.data, n) == -1, "argmax where %g is", bad);
    }
  }
}

}  // namespace driver
