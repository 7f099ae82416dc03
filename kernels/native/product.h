// The loop over tiles and groups that every vector instruction set shares; `I` brings registers and their operations.
//
//     y[m, n] = bias[n] + sum_g scale[n, g] * a[m, g] * (sum_k code[n, k] * x[m, k] - zero[n, g] * sum_k x[m, k])
//
// with x rounded to eight bits per row and group (scale a).  The inner sum is exact in integers.
#pragma once
#include <cstring>

#include "tile.h"

namespace roundexport {

constexpr size_t kAhead = 4096;  // bytes that are asked for before they are needed

template <class I, int BITS, int M>
inline __attribute__((always_inline)) void tile_product(const Product& job, int tile, int row) {
  constexpr int L = I::kLanes, C = kTileRows / L;
  const Weight& w = *job.weight;
  const int groups = w.groups, group = w.group, width = groups * group;
  const uint8_t* piece = w.data + static_cast<size_t>(tile) * groups * w.piece;
  const uint8_t* zeros = w.zeros ? w.zeros + static_cast<size_t>(tile) * groups * w.zero_piece : nullptr;
  const size_t header = w.wide_scales ? 4 * kTileRows : 2 * kTileRows;
  const int8_t* x[M];
  const float* a[M];
  const int32_t* sums[M];
  typename I::Float y[M][C];
  for (int m = 0; m < M; m++) {
    x[m] = job.x.values + static_cast<size_t>(row + m) * width;
    a[m] = job.x.scales + static_cast<size_t>(row + m) * groups;
    sums[m] = job.x.sums + static_cast<size_t>(row + m) * groups;
    for (int c = 0; c < C; c++) y[m][c] = I::zero();
  }
  for (int g = 0; g < groups; g++, piece += w.piece) {
    for (size_t at = 0; at < w.piece; at += 64) __builtin_prefetch(piece + kAhead + at);
    typename I::Int sum[M][C];
    for (int m = 0; m < M; m++) {
      const int start = zeros ? 0 : -(1 << (BITS - 1)) * sums[m][g];
      for (int c = 0; c < C; c++) sum[m][c] = I::broadcast(start);
    }
    I::template codes<BITS, M>(piece + header, x, group, sum);
    for (int c = 0; c < C; c++) {
      const typename I::Float scale = w.wide_scales ? I::load(reinterpret_cast<const float*>(piece) + c * L)
                                                    : I::load_half(piece + 2 * c * L);
      for (int m = 0; m < M; m++) {
        if (zeros) {
          const typename I::Int zero = BITS == 8 ? I::widen(zeros + c * L) : I::widen_nibbles(zeros, c);
          sum[m][c] = I::minus_product(sum[m][c], zero, I::broadcast(sums[m][g]));
        }
        y[m][c] = I::fma(I::to_float(sum[m][c]), I::times(scale, a[m][g]), y[m][c]);
      }
    }
    for (int m = 0; m < M; m++) x[m] += group;
    if (zeros) zeros += w.zero_piece;
  }
  for (int m = 0; m < M; m++) {
    float out[kTileRows];
    const int first = tile * kTileRows, count = w.rows - first < kTileRows ? w.rows - first : kTileRows;
    for (int c = 0; c < C; c++) I::store(out + c * L, y[m][c]);
    if (job.bias)
      for (int r = 0; r < count; r++) out[r] += job.bias[first + r];
    std::memcpy(job.y + static_cast<size_t>(row + m) * w.rows + first, out, sizeof(float) * count);
  }
}

template <class I, int BITS>
void tiles_of(const Product& job, int first, int last) {
  for (int tile = first; tile < last; tile++) {
    int row = 0;
    for (; row + I::kRows <= job.rows; row += I::kRows) tile_product<I, BITS, I::kRows>(job, tile, row);
    for (; row + 2 <= job.rows; row += 2) tile_product<I, BITS, 2>(job, tile, row);
    if (row < job.rows) tile_product<I, BITS, 1>(job, tile, row);
  }
}

template <class I>
void tiles(const Product& job, int first, int last) {
  switch (job.weight->bits) {
    case 2: return tiles_of<I, 2>(job, first, last);
    case 3: return tiles_of<I, 3>(job, first, last);
    case 4: return tiles_of<I, 4>(job, first, last);
    default: return tiles_of<I, 8>(job, first, last);
  }
}

// The eight vectors of codes of one half of a tile, 32 columns; `half` counts 16 rows, `part` the register in them.
template <class I, int BITS>
struct Codes {
  using V = typename I::Bytes;
  static inline __attribute__((always_inline)) void unpack(const uint8_t* unit, int half, int part, V (&out)[8]) {
    constexpr int kStride = BITS == 3 ? 64 : 128;
    const uint8_t* at = unit + half * (BITS == 3 ? 192 : 64) + part * I::kLanes * 4;
    if constexpr (BITS == 8) {
      for (int j = 0; j < 8; j++) out[j] = I::load_bytes(at + j * kStride);
    } else if constexpr (BITS == 4) {
      for (int j = 0; j < 4; j++) {
        const V v = I::load_bytes(at + j * kStride);
        out[2 * j] = I::both(v, 0x0F);
        out[2 * j + 1] = I::both(I::template right<4>(v), 0x0F);
      }
    } else if constexpr (BITS == 2) {
      for (int j = 0; j < 2; j++) {
        const V v = I::load_bytes(at + j * kStride);
        out[4 * j] = I::both(v, 3);
        out[4 * j + 1] = I::both(I::template right<2>(v), 3);
        out[4 * j + 2] = I::both(I::template right<4>(v), 3);
        out[4 * j + 3] = I::both(I::template right<6>(v), 3);
      }
    } else {
      const V a = I::load_bytes(at), b = I::load_bytes(at + kStride), c = I::load_bytes(at + 2 * kStride);
      const V of[3] = {a, b, c};
      for (int j = 0; j < 3; j++) {
        out[2 * j] = I::both(of[j], 7);
        out[2 * j + 1] = I::both(I::template right<3>(of[j]), 7);
      }
      out[6] = I::either(I::both(I::template right<5>(a), 6), I::both(I::template right<6>(c), 1));
      out[7] = I::either(I::both(I::template right<5>(b), 6), I::both(I::template right<7>(c), 1));
    }
  }
};

}  // namespace roundexport
