// SPDX-License-Identifier: Apache-2.0
// A low-rank adapter beside a decoder's weights: its factors are laid into panels once; matmul.cpp multiplies them.
//
// Products of one input (queries, keys and values; gate and up) have their `a` in one matrix, so that the input is read
// once. The weights stay as they are, packed or not. Keys and values of tokens depend on the adapter, so a change empties
// the slots.
#include <math.h>
#include <string.h>

#include <new>

#include "model.h"

namespace gk {
namespace {

// Rows of a factor [rows, cols] to rows at.. of panels.
void lay(const void* source, int64_t rows, int64_t cols, size_t bytes, int64_t group, int64_t at, uint8_t* panels) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t place = ((at + r) / group * cols + c) * group + (at + r) % group;
      memcpy(panels + place * bytes, (const uint8_t*)source + (r * cols + c) * bytes, bytes);
    }
}

bool make_panels(Buffer& buffer, Panels& panels, bool half, int64_t rows, int64_t cols, int64_t group) {
  const size_t bytes = (size_t)(rows + group - 1) / group * group * cols * (half ? 2 : 4);
  if (!buffer.reserve(bytes)) return false;
  memset(buffer.as<void>(), 0, bytes);
  panels = {half, rows, cols, buffer.as<const uint8_t>()};
  return true;
}

struct Change {
  const gk_weight* weight;
  const gk_low_rank* low;
};

bool fill(AdapterGroup& group, const Change* changes, int n, bool half, int64_t row_group) {
  int64_t total = 0;
  for (int i = 0; i < n; ++i) total += changes[i].low->rank;
  if (!total) return true;
  const size_t bytes = half ? 2 : 4;
  const int64_t cols = changes[0].weight->cols;
  if (!make_panels(group.a, group.low.a, half, total, cols, row_group)) return false;
  if (!group.factor.reserve(total * sizeof(float))) return false;
  group.low.factor = group.factor.as<float>();
  int64_t at = 0;
  for (int i = 0; i < n; ++i) {
    const gk_low_rank& low = *changes[i].low;
    if (!low.rank) continue;
    lay(low.a, low.rank, cols, bytes, row_group, at, group.a.as<uint8_t>());
    if (!make_panels(group.b[i], group.low.b[i], half, changes[i].weight->rows, low.rank, row_group)) return false;
    lay(low.b, changes[i].weight->rows, low.rank, bytes, row_group, 0, group.b[i].as<uint8_t>());
    group.low.at[i] = at, at += low.rank;
    group.scales.insert(group.scales.end(), low.rank, low.scale);
  }
  return true;
}

bool valid(const gk_low_rank& low, const gk_weight& weight, int layer, const char* name) {
  const int64_t most = weight.rows < weight.cols ? weight.rows : weight.cols;
  if (low.rank == 0) return true;
  if (low.rank > 0 && low.rank <= most && low.a && low.b && isfinite(low.scale)) return true;
  set_error("adapter of layer %d, %s: expected factors, a finite scale and a rank of 0..%ld, got rank %d and scale %g", layer,
            name, (long)most, low.rank, (double)low.scale);
  return false;
}

struct Changes {
  Change of[7];
  Changes(const gk_layer& l, const gk_layer_adapter& a)
      : of{{&l.q, &a.q}, {&l.k, &a.k}, {&l.v, &a.v}, {&l.o, &a.o}, {&l.gate, &a.gate}, {&l.up, &a.up}, {&l.down, &a.down}} {}
};

bool valid_layer(const Changes& changes, int layer) {
  const char* names[] = {"q", "k", "v", "o", "gate", "up", "down"};
  for (int n = 0; n < 7; ++n)
    if (!valid(*changes.of[n].low, *changes.of[n].weight, layer, names[n])) return false;
  return true;
}

bool fill_layer(LayerAdapter& to, const Changes& from, bool half, int64_t group) {
  const Change* changes = from.of;
  return fill(to.heads, changes, 3, half, group) && fill(to.out, changes + 3, 1, half, group) &&
         fill(to.wide, changes + 4, 2, half, group) && fill(to.down, changes + 6, 1, half, group);
}

void set_scale(gk_model* m, float scale) {
  m->adapter_scale = scale;
  for (LayerAdapter& layer : m->adapter)
    for (AdapterGroup* group : {&layer.heads, &layer.out, &layer.wide, &layer.down})
      for (size_t j = 0; j < group->scales.size(); ++j) group->factor.as<float>()[j] = group->scales[j] * scale;
  for (Slot& slot : m->slots) slot = Slot{};
  m->pending = Pending{};
}

bool valid_scale(float scale) {
  return isfinite(scale) || (set_error("adapter: expected a finite scale, got %g", (double)scale), false);
}

}  // namespace
}  // namespace gk

using namespace gk;

extern "C" {

int gk_model_set_adapter(gk_model* m, const gk_layer_adapter* layers, int32_t type, float scale) try {
  if (layers && type != GK_F32 && type != GK_BF16)
    return set_error("adapter: expected factors of type %d or %d, got %d", GK_F32, GK_BF16, type), GK_BAD_ARGUMENT;
  if (!valid_scale(scale)) return GK_BAD_ARGUMENT;
  std::vector<LayerAdapter> made(layers ? m->layers.size() : 0);
  for (size_t i = 0; i < made.size(); ++i)
    if (!valid_layer(Changes(m->layers[i], layers[i]), (int)i)) return GK_BAD_ARGUMENT;
  const int64_t group = m->context->kernels->row_group;
  for (size_t i = 0; i < made.size(); ++i)
    if (!fill_layer(made[i], Changes(m->layers[i], layers[i]), type == GK_BF16, group)) return GK_NO_MEMORY;
  std::lock_guard<std::mutex> guard(m->context->lock);
  m->adapter.swap(made);
  set_scale(m, scale);
  return GK_OK;
} catch (const std::bad_alloc&) {
  return set_error("no memory for an adapter"), GK_NO_MEMORY;
}

int gk_model_scale_adapter(gk_model* m, float scale) {
  if (!valid_scale(scale)) return GK_BAD_ARGUMENT;
  std::lock_guard<std::mutex> guard(m->context->lock);
  set_scale(m, scale);
  return GK_OK;
}

}  // extern "C"
