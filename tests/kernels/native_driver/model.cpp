// SPDX-License-Identifier: Apache-2.0
// A whole tiny decoder with random weights: no bit of its logits depends on chunks, steps, batches, threads or the slot.
//
// Sizes are odd where the types permit: head size 24, 77 tokens of vocabulary, windows of 5 beside full attention, soft
// caps, query norms, Q8_0, Q4_0, BF16 and F32 weights. Between instruction sets logits agree to a few thousandths.
#include "driver.h"

namespace driver {

namespace {

constexpr int64_t kWidth = 96, kHidden = 160, kVocabulary = 77, kHeads = 4, kKvHeads = 2, kHead = 24, kLayers = 3;

struct Model {
  Random random{4};
  std::vector<Buffer<uint8_t>> bytes;
  std::vector<Buffer<float>> floats;
  gk_layer layers[kLayers] = {};
  gk_model_config config = {};

  gk_weight weight(int32_t type, int64_t rows, int64_t cols) {
    const int64_t row_bytes = gk_row_bytes(type, cols), block = type == GK_Q8_0 ? 34 : 18;
    bytes.emplace_back(rows * row_bytes, type == GK_F32 ? 0 : 1 + (int)(bytes.size() % 3));
    uint8_t* data = bytes.back().data;
    for (int64_t i = 0; i < rows * row_bytes; ++i) data[i] = (uint8_t)random.bits();
    if (type == GK_F32 || type == GK_BF16)
      for (int64_t i = 0; i < rows * cols; ++i) {
        const float value = random.normal() * 0.1f;
        if (type == GK_F32) memcpy(data + 4 * i, &value, 4);
        else memcpy(data + 2 * i, (const uint8_t*)&value + 2, 2);
      }
    else  // a factor in fp16: 2^-10 for codes up to 127, 2^-6 for codes up to 8
      for (int64_t i = 0; i < rows * row_bytes; i += block) data[i] = 0, data[i + 1] = type == GK_Q8_0 ? 0x14 : 0x24;
    return {type, rows, cols, data, row_bytes, nullptr};
  }
  const float* norm(int64_t n) {
    floats.emplace_back(n);
    for (int64_t i = 0; i < n; ++i) floats.back()[i] = random.uniform(0.5f, 1.5f);
    return floats.back().data;
  }
  explicit Model(bool tied) {
    const int32_t types[] = {GK_Q8_0, GK_Q4_0, GK_BF16};
    for (int i = 0; i < kLayers; ++i) {
      gk_layer& l = layers[i];
      l.attn_norm = norm(kWidth), l.mlp_norm = norm(kWidth);
      if (tied) l.post_attn_norm = norm(kWidth), l.post_mlp_norm = norm(kWidth), l.q_norm = norm(kHead), l.k_norm = norm(kHead);
      l.q = weight(types[i], kHeads * kHead, kWidth), l.k = weight(types[i], kKvHeads * kHead, kWidth);
      l.v = weight(types[i], kKvHeads * kHead, kWidth), l.o = weight(types[i], kWidth, kHeads * kHead);
      l.gate = weight(types[i], kHidden, kWidth), l.up = weight(types[i], kHidden, kWidth);
      l.down = weight(types[i], kWidth, kHidden);
      l.num_heads = kHeads, l.num_kv_heads = kKvHeads, l.head_dim = kHead;
      l.window = i == 1 ? 0 : 5, l.query_scale = 0.2f, l.attn_softcap = tied ? 0.0f : 50.0f;
      l.rope_base = i == 1 ? 1e6f : 1e4f, l.rope_scale = i == 1 ? 8.0f : 1.0f;
    }
    config.vocab_size = kVocabulary, config.hidden_size = kWidth, config.num_layers = kLayers;
    config.norm_eps = 1e-6f, config.final_softcap = tied ? 0.0f : 30.0f, config.embed_scale = std::sqrt((float)kWidth);
    config.embedding = weight(GK_Q8_0, kVocabulary, kWidth);
    config.head = tied ? config.embedding : weight(GK_F32, kVocabulary, kWidth);
    config.final_norm = norm(kWidth);
  }
};

// Random factors for every product of every layer but those of layer 1's attention; ranks differ, so that the panels of
// joined products end in the middle.
struct Adapter {
  std::vector<Buffer<uint8_t>> bytes;
  Random random{9};
  gk_layer_adapter layers[kLayers] = {};
  int32_t type;

  const void* factor(int64_t n, float size) {
    const int64_t each = type == GK_F32 ? 4 : 2;
    bytes.emplace_back(n * each);
    for (int64_t i = 0; i < n; ++i) {
      const float value = random.normal() * size;
      memcpy(bytes.back().data + each * i, (const uint8_t*)&value + (4 - each), each);
    }
    return bytes.back().data;
  }
  gk_low_rank low(const gk_weight& w, int32_t rank) {
    const void* a = factor(rank * w.cols, 0.1f);
    return {a, factor(w.rows * rank, 0.2f), rank, 0.5f};
  }
  Adapter(const Model& m, int32_t kind) : type(kind) {
    for (int i = 0; i < kLayers; ++i) {
      const gk_layer& l = m.layers[i];
      gk_layer_adapter& a = layers[i];
      if (i != 1) a.q = low(l.q, 7), a.v = low(l.v, 9), a.o = low(l.o, 3);
      a.gate = low(l.gate, 5), a.up = low(l.up, 16), a.down = low(l.down, 1);
    }
  }
};

using Logits = std::vector<float>;

struct Session {
  Context context;
  gk_model* get;
  Session(const Model& m, const char* isa, int threads, int32_t slots, int32_t cache, int64_t chunk,
          const Adapter* adapter = nullptr)
      : context(threads, isa) {
    get = gk_model_new(context.get, &m.config, m.layers);
    if (!get) fprintf(stderr, "gk_model_new: %s\n", gk_last_error()), exit(2);
    CHECK(gk_model_open(get, slots, 64, cache, chunk) == GK_OK, "gk_model_open: %s", gk_last_error());
    CHECK(gk_model_cache_bytes(get) > 0, "bytes of the cache");
    if (adapter) set(adapter);
  }
  ~Session() { gk_model_free(get); }
  void set(const Adapter* a, float scale = 1) {
    const int status = gk_model_set_adapter(get, a ? a->layers : nullptr, a ? a->type : GK_F32, scale);
    CHECK(status == GK_OK, "gk_model_set_adapter: %s", gk_last_error());
  }
  void prefill(int32_t slot, const std::vector<int32_t>& ids, size_t from, size_t to) {
    Buffer<int32_t> exact((int64_t)(to - from));
    memcpy(exact.data, ids.data() + from, (to - from) * sizeof(int32_t));
    CHECK(gk_model_prefill(get, slot, exact.data, exact.size) == GK_OK, "gk_model_prefill: %s", gk_last_error());
  }
  void step(const std::vector<int32_t>& slots, const std::vector<int32_t>& tokens) {
    CHECK(gk_model_step(get, (int32_t)slots.size(), slots.data(), tokens.data()) == GK_OK, "gk_model_step: %s", gk_last_error());
  }
  Logits logits(int32_t slot) {
    const float* x = gk_model_logits(get, slot);
    CHECK(x != nullptr, "no logits of slot %d", slot);
    return x ? Logits(x, x + kVocabulary) : Logits(kVocabulary);
  }
};

bool equal(const Logits& a, const Logits& b) { return same(a.data(), b.data(), a.size() * sizeof(float)); }

Logits whole(const Model& m, const char* isa, int32_t cache, const std::vector<int32_t>& ids,
             const Adapter* adapter = nullptr) {
  Session s(m, isa, 1, 1, cache, 32, adapter);
  s.prefill(0, ids, 0, ids.size());
  return s.logits(0);
}

void invariance(const Model& m, const char* isa, int32_t cache, const std::vector<int32_t>& ids,
                const Adapter* adapter = nullptr) {
  const Logits expected = whole(m, isa, cache, ids, adapter);
  const size_t n = ids.size();
  for (int threads : {1, 2})
    for (int64_t chunk : {1, 3, 8}) {
      if ((threads == 2) != (chunk == 3)) continue;  // waiting threads spin, and an emulator makes that dear
      Session s(m, isa, threads, 3, cache, chunk, adapter);
      s.prefill(1, ids, 0, n);
      CHECK(equal(s.logits(1), expected), "%s: chunks of %lld and %d threads change the logits", isa, (long long)chunk, threads);
      s.prefill(0, ids, 0, 2), s.prefill(2, ids, 0, n - 3);
      for (size_t i = 0; i < 3; ++i) {  // two sequences at different positions, together
        s.step({2, 0}, {ids[n - 3 + i], ids[2 + i]});
        CHECK(gk_model_length(s.get, 2) == (int64_t)(n - 2 + i), "a length");
      }
      CHECK(equal(s.logits(2), expected), "%s: steps in a batch change the logits", isa);
      for (size_t i = 5; i < n; ++i) s.step({0}, {ids[i]});
      CHECK(equal(s.logits(0), expected), "%s: steps alone change the logits", isa);
      CHECK(gk_model_copy(s.get, 0, 1, (int64_t)n) == GK_OK, "gk_model_copy: %s", gk_last_error());
      s.step({0, 1}, {7, 7});
      CHECK(equal(s.logits(0), s.logits(1)), "%s: a copied slot goes on differently", isa);
      if (gk_model_truncate(s.get, 1, (int64_t)n - 1) == GK_OK) {
        s.step({1}, {ids[n - 1]});
        CHECK(equal(s.logits(1), expected), "%s: logits after a cut", isa);
      }
      CHECK(gk_model_truncate(s.get, 1, 0) == GK_OK && gk_model_length(s.get, 1) == 0, "an emptied slot");
      CHECK(gk_model_logits(s.get, 1) == nullptr, "logits of an empty slot");
    }
  Session s(m, isa, 2, 1, cache, 8, adapter);
  s.prefill(0, ids, 0, n - 5);
  CHECK(gk_model_score(s.get, 0, ids.data() + n - 5, 5) == GK_OK, "gk_model_score: %s", gk_last_error());
  const float* scored = gk_model_chunk_logits(s.get);
  CHECK(scored && same(scored + 4 * kVocabulary, expected.data(), kVocabulary * sizeof(float)), "%s: scored logits", isa);
}

// An adapter changes logits, alike in both types of factors and on every instruction set; without it they are as before.
void adapters(const Model& m, const char* isa, const std::vector<int32_t>& ids) {
  const Adapter half(m, GK_BF16), wide(m, GK_F32);
  const Logits plain = whole(m, isa, GK_CACHE_F32, ids), there = whole(m, "portable", GK_CACHE_F32, ids, &half);
  Session s(m, isa, 2, 1, GK_CACHE_F32, 32, &half);
  s.prefill(0, ids, 0, ids.size());
  const Logits here = s.logits(0);
  double most = 0, off = 0, moved = 0;
  for (int64_t i = 0; i < kVocabulary; ++i) {
    most = std::fmax(most, std::fabs(there[i])), moved = std::fmax(moved, std::fabs(here[i] - plain[i]));
    off = std::fmax(off, std::isfinite(here[i]) ? std::fabs(here[i] - there[i]) : INFINITY);
  }
  CHECK(off < 0.01 * most && moved > 0.1 * most, "%s: an adapter: off %g, moved %g, of %g", isa, off, moved, most);
  const auto again = [&](const Logits& expected, const char* what) {
    CHECK(gk_model_length(s.get, 0) == 0 && !gk_model_logits(s.get, 0), "%s: %s leaves a slot as it was", isa, what);
    s.prefill(0, ids, 0, ids.size());
    CHECK(equal(s.logits(0), expected), "%s: logits after %s", isa, what);
  };
  s.set(&wide), again(whole(m, isa, GK_CACHE_F32, ids, &wide), "another adapter");
  CHECK(gk_model_scale_adapter(s.get, 0) == GK_OK, "a scale of 0");
  again(plain, "a scale of 0");
  s.set(&half, 3);
  CHECK(gk_model_scale_adapter(s.get, 1) == GK_OK, "a scale");
  again(here, "a scale there and back");
  gk_layer_adapter broken[kLayers];
  memcpy(broken, half.layers, sizeof broken);
  broken[2].down.rank = 1000;
  CHECK(gk_model_set_adapter(s.get, broken, GK_BF16, 1) < 0 && equal(s.logits(0), here), "a rank above the weight's");
  broken[2].down = half.layers[2].down, broken[0].q.b = nullptr;
  CHECK(gk_model_set_adapter(s.get, broken, GK_BF16, 1) < 0, "a factor that is not there");
  CHECK(gk_model_set_adapter(s.get, half.layers, GK_Q8_0, 1) < 0, "packed factors");
  CHECK(gk_model_scale_adapter(s.get, INFINITY) < 0 && equal(s.logits(0), here), "an infinite scale");
  s.set(nullptr), again(plain, "taking the adapter away");
}

void refusals(const Model& m, const char* isa) {
  Session s(m, isa, 1, 2, GK_CACHE_BF16, 4);
  const int32_t ids[] = {1, 2, (int32_t)kVocabulary, -1};
  CHECK(gk_model_prefill(s.get, 2, ids, 1) < 0, "a slot that is not there");
  CHECK(gk_model_prefill(s.get, 0, ids, 3) < 0 && gk_model_prefill(s.get, 0, ids + 3, 1) < 0, "ids out of range");
  CHECK(gk_model_length(s.get, 0) == 0, "what was refused left nothing");
  const std::vector<int32_t> many(65, 1), twice{0, 0};
  CHECK(gk_model_prefill(s.get, 0, many.data(), 65) < 0, "more tokens than there is room for");
  s.prefill(0, many, 0, 64);
  CHECK(gk_model_step(s.get, 1, twice.data(), ids) < 0, "one more token than there is room for");
  CHECK(gk_model_step(s.get, 2, twice.data(), ids) < 0, "a slot twice");
  CHECK(gk_model_open(s.get, 0, 64, GK_CACHE_F32, 4) < 0 && gk_model_open(s.get, 1, 0, GK_CACHE_F32, 4) < 0, "no room");
  CHECK(gk_model_open(s.get, 1, 64, 9, 4) < 0, "an unknown type of cache");
}

}  // namespace

void model(const char* isa) {
  for (bool tied : {true, false}) {
    const Model m(tied);
    Random random(5);
    std::vector<int32_t> ids;
    for (int i = 0; i < 19; ++i) ids.push_back((int32_t)random.below(kVocabulary));
    for (int32_t cache : {GK_CACHE_F32, GK_CACHE_BF16, GK_CACHE_INT8}) {
      const Logits here = whole(m, isa, cache, ids), portable = whole(m, "portable", cache, ids);
      double most = 0, off = 0;
      for (int64_t i = 0; i < kVocabulary; ++i) {
        most = std::fmax(most, std::fabs(portable[i]));
        off = std::fmax(off, std::isfinite(here[i]) ? std::fabs(here[i] - portable[i]) : INFINITY);
      }
      CHECK(most > 0.1 && off < 0.01 * most, "%s: logits differ from portable code by %g, they are up to %g", isa, off, most);
      if (tied || cache == GK_CACHE_BF16) invariance(m, isa, cache, ids);
    }
    const Adapter adapter(m, tied ? GK_BF16 : GK_F32);
    invariance(m, isa, GK_CACHE_BF16, ids, &adapter);
    adapters(m, isa, ids);
    refusals(m, isa);
  }
}

}  // namespace driver
