// Any processor: plain loops over single codes.  Slow; what the other instruction sets are tested against.
#include <cmath>
#include <cstdlib>

#include "weight.h"

namespace roundexport {
namespace {

void tiles(const Product& job, int first, int last) {
  const Weight& w = *job.weight;
  const int stop = last * kTileRows < w.rows ? last * kTileRows : w.rows;
  for (int n = first * kTileRows; n < stop; n++) {
    for (int m = 0; m < job.rows; m++) {
      const size_t row = static_cast<size_t>(m) * w.groups;
      float y = job.bias ? job.bias[n] : 0.0f;
      for (int g = 0; g < w.groups; g++) {
        int sum = -zero_at(w, n, g) * job.x.sums[row + g];
        for (int k = g * w.group; k < (g + 1) * w.group; k++)
          sum += code_at(w, n, k) * job.x.values[row * w.group + k];
        y += scale_at(w, n, g) * job.x.scales[row + g] * static_cast<float>(sum);
      }
      job.y[static_cast<size_t>(m) * w.rows + n] = y;
    }
  }
}

void quantize(const float* x, int columns, int group, int8_t* values, float* scales, int32_t* sums) {
  for (int start = 0, g = 0; start < columns; start += group, g++) {
    const int stop = start + group < columns ? start + group : columns;
    float top = 0;
    for (int k = start; k < stop; k++) top = std::fabs(x[k]) > top ? std::fabs(x[k]) : top;
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    scales[g] = top / 127.0f;
    sums[g] = 0;
    for (int k = start; k < start + group; k++) {
      values[k] = static_cast<int8_t>(k < stop ? std::lrintf(x[k] * inverse) : 0);
      sums[g] += values[k];
    }
  }
}

}  // namespace

const Isa* generic_isa() {
  static const Isa isa = {"generic", tiles, quantize};
  return &isa;
}

}  // namespace roundexport
