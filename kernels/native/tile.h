// How a weight lies in memory so that one core can stream it, and the rows of activations beside it.
//
// A weight W [N, K] is cut into tiles of 32 rows and groups of `group` columns.  One tile and group is one piece of
// memory, read from front to end; pieces of a tile follow each other, then comes the next tile:
//
//     32 scales (float16, or float32 where float16 does not hold them), then per 32 columns `bits`/8 * 1024 bytes:
//
//     bits  vectors of 64 bytes, byte 4*r + i is row r of 16      code j is column 4*j + i, j = 0..7
//     2     2 a half                                              v[j/4], bits 2*(j%4)
//     3     3 a half                                              j < 6: v[j/2], bits 3*(j%2); 6 and 7: bits 7..6 of
//                                                                 v[0] and v[1], lowest bit in bits 6 and 7 of v[2]
//     4     4 a half                                              v[j/2], bits 4*(j%2)
//     8     8 a half                                              v[j]
//
// So lane r of a register holds four columns of row r, as the dot product instructions want them, no sum across lanes
// is needed, and three bits take three bits.  Vectors of the two halves (rows 0..15, 16..31) alternate; at three bits
// each half's three vectors stand together.
// Zero points have a stream of their own: 16 bytes a piece (row r low, row 16+r high), 32 bytes at 8 bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace roundexport {

constexpr int kTileRows = 32;
constexpr int kUnit = 32;  // columns

struct Weight {
  int bits, columns, rows, group;  // columns as the graph has them; the last group is filled up with zeros
  int groups, tiles;
  bool wide_scales, zero_points;
  size_t piece, zero_piece, bytes;
  uint8_t* data;   // tiles * groups * piece
  uint8_t* zeros;  // tiles * groups * zero_piece, or null
};

// Activations in eight bits: one scale and one sum of integers per row and group.
struct Activations {
  const int8_t* values;  // [rows, groups * group]
  const float* scales;   // [rows, groups]
  const int32_t* sums;   // [rows, groups]
};

struct Product {
  const Weight* weight;
  Activations x;
  const float* bias;  // [N] or null
  float* y;           // [rows, N]
  int rows;
};

// Tiles `first` .. `last` - 1 of a product; one function per instruction set.
using Tiles = void (*)(const Product&, int first, int last);
using Quantize = void (*)(const float* x, int columns, int group, int8_t* values, float* scales, int32_t* sums);

struct Isa {
  const char* name;
  Tiles tiles;
  Quantize quantize;
};

const Isa* generic_isa();
const Isa* avx2_isa();    // null where the compiler or the processor has no AVX2
const Isa* avx512_isa();  // the same for AVX-512 with VNNI

}  // namespace roundexport
