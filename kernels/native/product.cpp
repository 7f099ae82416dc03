// One product of a weight and rows of activations, by the best instruction set of the processor, on the caller's threads.
#include "roundexport_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "weight.h"

namespace {

using namespace roundexport;

constexpr size_t kBytesAtOnce = size_t{96} << 10;  // what one thread takes of a weight before it asks for more
constexpr int kRowsAtOnce = 64;                    // rows of activations that go over a tile while it is in cache

const Isa* find(const char* name) {
  for (const Isa* isa : {avx512_isa(), avx2_isa(), generic_isa()})
    if (isa && (!name || !std::strcmp(isa->name, name))) return isa;
  return nullptr;
}

const Isa*& chosen() {
  static const Isa* isa = [] {
    const Isa* asked = find(std::getenv("ROUNDEXPORT_ISA"));
    return asked ? asked : find(nullptr);
  }();
  return isa;
}

struct Work {
  Product product;
  const float* input;
  int8_t* values;
  float* scales;
  int32_t* sums;
  int tiles_at_once;
};

void quantize_row(void* data, size_t row) {
  const Work& work = *static_cast<Work*>(data);
  const Weight& w = *work.product.weight;
  const size_t group = row * w.groups;
  chosen()->quantize(work.input + row * w.columns, w.columns, w.group, work.values + group * w.group,
                     work.scales + group, work.sums + group);
}

void some_tiles(void* data, size_t index) {
  const Work& work = *static_cast<Work*>(data);
  const Weight& w = *work.product.weight;
  const int first = static_cast<int>(index) * work.tiles_at_once;
  const int last = first + work.tiles_at_once < w.tiles ? first + work.tiles_at_once : w.tiles;
  for (int row = 0; row < work.product.rows; row += kRowsAtOnce) {
    Product part = work.product;
    const size_t group = static_cast<size_t>(row) * w.groups;
    part.x = {work.values + group * w.group, work.scales + group, work.sums + group};
    part.y += static_cast<size_t>(row) * w.rows;
    part.rows = work.product.rows - row < kRowsAtOnce ? work.product.rows - row : kRowsAtOnce;
    chosen()->tiles(part, first, last);
  }
}

// Rows of the weight as floats, then plain products: for numbers that are held against others, not for speed.
void some_exact_rows(void* data, size_t tile) {
  const Work& work = *static_cast<Work*>(data);
  const Weight& w = *work.product.weight;
  std::vector<float> row(w.columns);
  const int first = static_cast<int>(tile) * kTileRows, last = first + kTileRows < w.rows ? first + kTileRows : w.rows;
  for (int n = first; n < last; n++) {
    for (int k = 0; k < w.columns; k++)
      row[k] = scale_at(w, n, k / w.group) * static_cast<float>(code_at(w, n, k) - zero_at(w, n, k / w.group));
    for (int m = 0; m < work.product.rows; m++) {
      const float* x = work.input + static_cast<size_t>(m) * w.columns;
      float sums[8] = {}, y = work.product.bias ? work.product.bias[n] : 0.0f;
      int k = 0;
      for (; k + 8 <= w.columns; k += 8)
        for (int i = 0; i < 8; i++) sums[i] += row[k + i] * x[k + i];
      for (; k < w.columns; k++) y += row[k] * x[k];
      for (float sum : sums) y += sum;
      work.product.y[static_cast<size_t>(m) * w.rows + n] = y;
    }
  }
}

void in_turn(void*, void (*task)(void*, size_t), size_t count, void* data) {
  for (size_t i = 0; i < count; i++) task(data, i);
}

}  // namespace

struct RoundexportWeight : Weight {};

extern "C" {

RoundexportWeight* roundexport_weight(const uint8_t* codes, const void* scales, int half, const uint8_t* zero_points,
                                      int columns, int rows, int bits, int group) {
  return static_cast<RoundexportWeight*>(make_weight(codes, scales, half != 0, zero_points, columns, rows, bits, group));
}

void roundexport_free_weight(RoundexportWeight* weight) { free_weight(weight); }

size_t roundexport_weight_bytes(const RoundexportWeight* weight) { return weight->bytes; }

void roundexport_product(const RoundexportWeight* weight, const float* x, int rows, const float* bias, float* y,
                         RoundexportParallel parallel, void* context) {
  thread_local std::vector<int8_t> values;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> sums;
  const size_t groups = static_cast<size_t>(rows) * weight->groups;
  if (scales.size() < groups) scales.resize(groups), sums.resize(groups);
  if (values.size() < groups * weight->group) values.resize(groups * weight->group);
  if (!parallel) parallel = in_turn;
  const size_t tile_bytes = weight->bytes / weight->tiles;
  const int most = std::max(1, static_cast<int>(kBytesAtOnce / (tile_bytes * (rows < 4 ? 1 : 4))));
  const int tasks = (weight->tiles + most - 1) / most;  // of about the same size, so that threads end together
  Work work = {{weight, {}, bias, y, rows}, x, values.data(), scales.data(), sums.data(), (weight->tiles + tasks - 1) / tasks};
  if (rows < 16)
    in_turn(nullptr, quantize_row, rows, &work);
  else
    parallel(context, quantize_row, rows, &work);
  parallel(context, some_tiles, (weight->tiles + work.tiles_at_once - 1) / work.tiles_at_once, &work);
}

void roundexport_exact_product(const RoundexportWeight* weight, const float* x, int rows, const float* bias, float* y,
                               RoundexportParallel parallel, void* context) {
  Work work = {{weight, {}, bias, y, rows}, x, nullptr, nullptr, nullptr, 1};
  (parallel ? parallel : in_turn)(context, some_exact_rows, weight->tiles, &work);
}

const char* roundexport_isa(void) { return chosen()->name; }

int roundexport_set_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) chosen() = isa;
  return isa ? 0 : -1;
}
}
