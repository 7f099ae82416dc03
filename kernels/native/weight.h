// Codes, scales and zero points of a graph become a `Weight` in tiles, and one code is read back from it.
#pragma once
#include "tile.h"

namespace roundexport {

// Args: codes [N, groups, group*bits/8], low bits first; scales [N, groups], float16 (`half`) or float32; zero points
// [N, ceil(groups*bits/8)], low bits first, or null for the midpoint.
// Arrays in a mapped file need not stay in memory afterwards: their pages are let go.
// Returns null where bits, group or sizes are none that the kernels take, or memory is short.
Weight* make_weight(const uint8_t* codes, const void* scales, bool half, const uint8_t* zero_points, int columns,
                    int rows, int bits, int group);
void free_weight(Weight*);

int code_at(const Weight&, int row, int column);
float scale_at(const Weight&, int row, int group);
int zero_at(const Weight&, int row, int group);

}  // namespace roundexport
