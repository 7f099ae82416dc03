// Packing into the tiles of tile.h.
#include "weight.h"

#include <cmath>
#include <cstring>
#include <new>

#include "memory.h"

namespace roundexport {
namespace {

float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(fraction | 1024), exponent - 25);
}

// The float16 that equals a float32, or -1: none does.
int exact_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size == 0) return sign;
  if (!(size <= 65504.0f)) return -1;
  int exponent;
  std::frexp(size, &exponent);  // size = m * 2^exponent, m in [.5, 1)
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;
  const float count = std::ldexp(size, -step);
  if (count != std::floor(count)) return -1;
  const int whole = static_cast<int>(count);
  return sign | (whole < 1024 ? whole : (step + 25) << 10 | (whole - 1024));
}

int packed(const uint8_t* row, size_t index, int bits) {
  const size_t bit = index * bits;
  int value = row[bit / 8] >> bit % 8;
  if (bit % 8 + bits > 8) value |= row[bit / 8 + 1] << (8 - bit % 8);
  return value & ((1 << bits) - 1);
}

// Where code j of a half's row and column in a unit lies: its byte, and the bits of it that stand together.
struct Place {
  size_t byte;
  int shift;
};

Place place(int bits, int row, int column) {
  const int half = row / 16, j = column / 4, lane = 4 * (row % 16) + column % 4;
  if (bits == 3) return {static_cast<size_t>(192 * half + 64 * (j < 6 ? j / 2 : j - 6) + lane), j < 6 ? 3 * (j % 2) : 6};
  const int in_byte = 8 / bits;
  return {static_cast<size_t>(128 * (j / in_byte) + 64 * half + lane), bits * (j % in_byte)};
}

// From the vector with the upper bits of code 6 or 7 at three bits to the one with its lowest bit, which is bit 6 or 7.
constexpr size_t kLowBits(int j) { return j == 6 ? 128 : 64; }

uint8_t* unit_of(const Weight& w, int row, int column) {
  const size_t piece = static_cast<size_t>(row / kTileRows) * w.groups + column / w.group;
  const size_t header = (w.wide_scales ? 4 : 2) * kTileRows, unit = column % w.group / kUnit;
  return w.data + piece * w.piece + header + unit * (w.bits * kUnit * kTileRows / 8);
}

// The 32 codes of a unit's row, one a byte.
void unpack(const uint8_t* from, int bits, uint8_t (&codes)[kUnit]) {
  for (int eight = 0; eight < kUnit / 8; eight++, from += bits) {
    uint64_t word = 0;  // eight codes are `bits` bytes
    for (int byte = 0; byte < bits; byte++) word |= static_cast<uint64_t>(from[byte]) << 8 * byte;
    for (int i = 0; i < 8; i++) codes[8 * eight + i] = word >> i * bits & ((1u << bits) - 1);
  }
}

// Four codes at once, of columns 4*j .. 4*j + 3, as the four bytes that they are or share.
void put(uint8_t* unit, int bits, int row, const uint8_t (&codes)[kUnit]) {
  const auto add = [](uint8_t* at, uint32_t four) {
    uint32_t there;
    std::memcpy(&there, at, 4);
    there |= four;
    std::memcpy(at, &there, 4);
  };
  for (int j = 0; j < kUnit / 4; j++) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * j, 4);
    const Place at = place(bits, row, 4 * j);
    if (bits == 3 && j >= 6) {
      add(unit + at.byte, (four >> 1 & 0x03030303) << 6);
      add(unit + at.byte + kLowBits(j), (four & 0x01010101) << j);
    } else {
      add(unit + at.byte, four << at.shift);
    }
  }
}

}  // namespace

Weight* make_weight(const uint8_t* codes, const void* scales, bool half, const uint8_t* zero_points, int columns,
                    int rows, int bits, int group) {
  if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || group < kUnit || group % kUnit || group > 1 << 14 ||
      columns < 1 || rows < 1)
    return nullptr;
  Weight* w = new (std::nothrow) Weight{};
  if (!w) return nullptr;
  w->bits = bits, w->columns = columns, w->rows = rows, w->group = group;
  w->groups = (columns + group - 1) / group, w->tiles = (rows + kTileRows - 1) / kTileRows;
  const size_t count = static_cast<size_t>(rows) * w->groups;
  const auto* wide = static_cast<const float*>(scales);
  const auto* narrow = static_cast<const uint16_t*>(scales);
  for (size_t i = 0; !half && !w->wide_scales && i < count; i++) w->wide_scales = exact_half(wide[i]) < 0;
  w->zero_points = zero_points != nullptr;
  w->piece = (w->wide_scales ? 4 : 2) * kTileRows + static_cast<size_t>(kTileRows) * group * bits / 8;
  w->zero_piece = zero_points ? (bits == 8 ? 32 : 16) : 0;
  w->bytes = static_cast<size_t>(w->tiles) * w->groups * (w->piece + w->zero_piece);
  const size_t zeros_at = static_cast<size_t>(w->tiles) * w->groups * w->piece;
  w->data = take(w->bytes);
  if (!w->data) {
    delete w;
    return nullptr;
  }
  w->zeros = zero_points ? w->data + zeros_at : nullptr;
  const size_t row_bytes = static_cast<size_t>(w->groups) * group * bits / 8, zero_bytes = (w->groups * bits + 7) / 8;
  for (int row = 0; row < rows; row++) {
    for (int k = 0; k < w->groups * group; k += kUnit) {
      uint8_t unit[kUnit];
      unpack(codes + row * row_bytes + static_cast<size_t>(k) * bits / 8, bits, unit);
      put(unit_of(*w, row, k), bits, row % kTileRows, unit);
    }
    for (int g = 0; g < w->groups; g++) {
      const size_t index = static_cast<size_t>(row) * w->groups + g;
      const size_t piece = static_cast<size_t>(row / kTileRows) * w->groups + g;
      uint8_t* header = w->data + piece * w->piece;
      if (w->wide_scales) {
        std::memcpy(header + 4 * (row % kTileRows), wide + index, 4);
      } else {
        const uint16_t value = half ? narrow[index] : static_cast<uint16_t>(exact_half(wide[index]));
        std::memcpy(header + 2 * (row % kTileRows), &value, 2);
      }
      if (!zero_points) continue;
      const int zero = packed(zero_points + row * zero_bytes, g, bits), r = row % kTileRows;
      uint8_t* zeros = w->zeros + piece * w->zero_piece;
      if (bits == 8)
        zeros[r] = static_cast<uint8_t>(zero);
      else
        zeros[r % 16] |= zero << (r < 16 ? 0 : 4);
    }
  }
  forget_file_pages(codes, rows * row_bytes);
  forget_file_pages(scales, count * (half ? 2 : 4));
  if (zero_points) forget_file_pages(zero_points, rows * zero_bytes);
  return w;
}

void free_weight(Weight* w) {
  if (!w) return;
  give_back(w->data, w->bytes);
  delete w;
}

int code_at(const Weight& w, int row, int column) {
  const uint8_t* unit = unit_of(w, row, column);
  const int c = column % kUnit, j = c / 4;
  const Place at = place(w.bits, row % kTileRows, c);
  if (w.bits == 3 && j >= 6) return unit[at.byte] >> 6 << 1 | (unit[at.byte + kLowBits(j)] >> j & 1);
  return unit[at.byte] >> at.shift & ((1 << w.bits) - 1);
}

float scale_at(const Weight& w, int row, int group) {
  const size_t piece = static_cast<size_t>(row / kTileRows) * w.groups + group;
  const uint8_t* at = w.data + piece * w.piece;
  if (w.wide_scales) {
    float value;
    std::memcpy(&value, at + 4 * (row % kTileRows), 4);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, at + 2 * (row % kTileRows), 2);
  return half_to_float(value);
}

int zero_at(const Weight& w, int row, int group) {
  if (!w.zeros) return 1 << (w.bits - 1);
  const size_t piece = static_cast<size_t>(row / kTileRows) * w.groups + group;
  const int r = row % kTileRows;
  const uint8_t* zeros = w.zeros + piece * w.zero_piece;
  return w.bits == 8 ? zeros[r] : zeros[r % 16] >> (r < 16 ? 0 : 4) & 15;
}

}  // namespace roundexport
