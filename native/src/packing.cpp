// Blocks of files into rows and panels: see packing.h.
#include "packing.h"

#include <cstring>

namespace {

uint16_t word(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

bool is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Where the parts of a block lie in a file. -1: there is none.
struct Block {
  int scale, minimum, sub, plane, quants;
};
constexpr Block BLOCKS[NUM_GRIDS] = {{0, -1, -1, -1, 2}, {0, -1, -1, -1, 2},  {0, 2, -1, -1, 4},   {0, -1, -1, 2, 6},
                                     {0, 2, -1, 4, 8},   {0, 2, 4, -1, 16},   {0, 2, 4, 16, 48},   {208, -1, 192, 128, 0}};

// The GROUP quants of group g of a block, in order: bytes that are never negative, or of Q8_0 signed ones.
template <int GRID> void unpack(const uint8_t *block, int64_t g, uint8_t *q) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  const uint8_t *quants = block + B.quants, *plane = block + B.plane;
  if constexpr (G.bytes()) {
    std::memcpy(q, quants, GROUP);
  } else if constexpr (!G.levels) {  // low halves are the first 16 values
    for (int i = 0; i < 16; i++) q[i] = quants[i] & 15, q[16 + i] = quants[i] >> 4;
    if constexpr (G.plane == 1)
      for (int i = 0; i < 32; i++) q[i] = (uint8_t)(q[i] | (plane[i / 8] >> i % 8 & 1) << 4);
  } else if constexpr (G.minima) {  // low halves of 32 bytes are a group, high ones the next
    const int shift = (int)(g % 2) * 4;
    for (int i = 0; i < 32; i++) q[i] = quants[g / 2 * 32 + i] >> shift & 15;
    if constexpr (G.plane == 1)
      for (int i = 0; i < 32; i++) q[i] = (uint8_t)(q[i] | (plane[i] >> g & 1) << 4);
  } else {  // low halves of 64 bytes are two groups, high ones the next two; four groups share 32 bytes of two bits
    const int shift = (int)(g % 4 / 2) * 4, plane_shift = (int)(g % 4) * 2;
    const uint8_t *from = quants + g / 4 * 64 + g % 2 * 32, *bits = plane + g / 4 * 32;
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)((from[i] >> shift & 15) | (bits[i] >> plane_shift & 3) << 4);
  }
}

// The 6 bits of 8 sub-scales and 8 sub-minima, of 12 bytes: the first four of each have a byte, whose upper two bits belong to the others.
void unpack_sub_scales(const uint8_t *p, uint8_t *scales, uint8_t *minima) {
  for (int j = 0; j < 4; j++) {
    scales[j] = p[j] & 63, minima[j] = p[4 + j] & 63;
    scales[4 + j] = (uint8_t)((p[8 + j] & 15) | (p[j] >> 6) << 4);
    minima[4 + j] = (uint8_t)(p[8 + j] >> 4 | (p[4 + j] >> 6) << 4);
  }
}

// Quants of group g into a row: see grids.h.
template <int GRID> void put_group(const uint8_t *q, int64_t g, int64_t width, uint8_t *row) {
  constexpr Grid G = GRIDS[GRID];
  uint8_t low[16], high[16];
  for (int w = 0; w < 4; w++)
    for (int b = 0; b < 4; b++) low[4 * w + b] = q[8 * b + w], high[4 * w + b] = q[8 * b + w + 4];
  const int64_t pair = g / 2, second = g % 2;
  if constexpr (G.bytes()) {
    std::memcpy(row + pair * PAD + second * 16, low, 16);
    std::memcpy(row + pair * PAD + 32 + second * 16, high, 16);
  } else {
    uint8_t *to = row + g * 16, *plane = row + width / 2;
    for (int b = 0; b < 16; b++) to[b] = (uint8_t)((low[b] & 15) | high[b] << 4);
    if constexpr (G.plane == 1) {
      uint32_t bits[2] = {0, 0};
      for (int b = 0; b < 16; b++) bits[0] |= (uint32_t)(low[b] >> 4) << b, bits[1] |= (uint32_t)(high[b] >> 4) << b;
      for (int vector = 0; vector < 2; vector++)
        for (int byte = 0; byte < 2; byte++) plane[pair * 8 + vector * 4 + second * 2 + byte] = (uint8_t)(bits[vector] >> 8 * byte);
    }
    if constexpr (G.plane == 2)
      for (int b = 0; b < 16; b++) plane[pair * 16 + b] = (uint8_t)(plane[pair * 16 + b] | (low[b] >> 4 | (high[b] >> 4) << 4) << 2 * second);
  }
}

template <int GRID> void pack_row_of(const uint8_t *row, int64_t columns, int64_t width, uint8_t *out) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  constexpr int64_t GROUPS = G.block() / GROUP;
  uint8_t q[GROUP], *scales = out + G.quant_bytes(width);
  for (int64_t b = 0; b < columns / G.block(); b++) {
    const uint8_t *block = row + b * G.file_bytes;
    for (int64_t g = 0; g < GROUPS; g++) {
      unpack<GRID>(block, g, q);
      put_group<GRID>(q, b * GROUPS + g, width, out);
    }
    if constexpr (!G.levels) {
      std::memcpy(scales + 2 * b, block + B.scale, 2);
      if constexpr (G.minima) std::memcpy(scales + width / GROUP * 2 + 2 * b, block + B.minimum, 2);
    } else if constexpr (G.minima) {
      std::memcpy(scales + 20 * b, block + B.scale, 4);
      unpack_sub_scales(block + B.sub, scales + 20 * b + 4, scales + 20 * b + 12);
    } else {
      std::memcpy(scales + 18 * b, block + B.sub, 16);
      std::memcpy(scales + 18 * b + 16, block + B.scale, 2);
    }
  }
}

// Quants of PAD outputs of one input into their place of its row. q: those outputs' quants, GROUP apart.
template <int GRID> void put_outputs(const uint8_t *q, int64_t unit, int64_t width, uint8_t *row) {
  constexpr Grid G = GRIDS[GRID];
  const auto at = [&](int o) { return q[o * GROUP]; };
  if constexpr (G.bytes()) {
    for (int o = 0; o < PAD; o++) row[unit * PAD + o] = at(o);
  } else {
    for (int o = 0; o < 32; o++) row[unit * 32 + o] = (uint8_t)((at(o) & 15) | at(32 + o) << 4);
    uint8_t *plane = row + width / 2;
    if constexpr (G.plane == 1)
      for (int byte = 0; byte < 8; byte++) {
        int bits = 0;
        for (int b = 0; b < 8; b++) bits |= at(8 * byte + b) >> 4 << b;
        plane[unit * 8 + byte] = (uint8_t)bits;
      }
    if constexpr (G.plane == 2)
      for (int b = 0; b < 16; b++) plane[unit * 16 + b] = (uint8_t)(at(b) >> 4 | at(16 + b) >> 4 << 2 | at(32 + b) >> 4 << 4 | at(48 + b) >> 4 << 6);
  }
}

template <int GRID> void pack_outputs_of(const uint8_t *const *rows, int64_t first, int64_t count, int64_t columns, int64_t width, uint8_t *out) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  const Panel panel(G, width);
  uint8_t q[PAD * GROUP] = {0};
  for (int64_t b = 0; b < columns / G.block(); b++) {
    uint8_t *scales = out + panel.scales_at(b * G.block());
    for (int64_t o = 0; o < count; o++) {
      const uint8_t *block = rows[o] + b * G.file_bytes;
      std::memcpy(scales + 2 * (first + o), block + B.scale, 2);
      if constexpr (G.minima) std::memcpy(scales + 2 * (width + first + o), block + B.minimum, 2);
      if constexpr (G.levels) {
        uint8_t sub[8], minima[8];
        if constexpr (G.minima) unpack_sub_scales(block + B.sub, sub, minima);
        for (int64_t s = 0; s < G.block() / G.shared; s++) {
          uint8_t *to = out + panel.sub_scales_at(b * G.block() + s * G.shared) + first + o;
          to[0] = G.minima ? sub[s] : block[B.sub + s];
          if constexpr (G.minima) to[width] = minima[s];
        }
      }
    }
    for (int64_t g = 0; g < G.block() / GROUP; g++) {
      for (int64_t o = 0; o < count; o++) unpack<GRID>(rows[o] + b * G.file_bytes, g, q + o * GROUP);
      for (int64_t i = 0; i < GROUP; i++) put_outputs<GRID>(q + i, first / PAD, width, out + panel.row_at(b * G.block() + g * GROUP + i));
    }
  }
}

// Nibbles of int4 in a row of Q4_0, padded with 8: the last group may be cut short.
void pack_int4(const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, uint8_t *out) {
  for (int64_t g = 0; g < width / GROUP; g++) {
    uint8_t q[GROUP];
    for (int64_t i = 0; i < GROUP; i++) {
      const int64_t at = g * GROUP + i;
      q[i] = at < columns ? row[at / 2] >> at % 2 * 4 & 15 : 8;
    }
    put_group<DEJAVU_Q4_0 - DEJAVU_Q8_0>(q, g, width, out);
  }
  std::memcpy(out + width / 2, scales, (size_t)((columns + GROUP - 1) / GROUP * 2));
}

#define EACH_GRID(kernel) {kernel<0>, kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>, kernel<7>}
constexpr decltype(&pack_row_of<0>) PACK_ROW[NUM_GRIDS] = EACH_GRID(pack_row_of);
constexpr decltype(&pack_outputs_of<0>) PACK_OUTPUTS[NUM_GRIDS] = EACH_GRID(pack_outputs_of);

}  // namespace

int64_t file_row_bytes(int dtype, int64_t columns) {
  const Grid &grid = grid_of(dtype);
  return dtype == DEJAVU_INT4 ? (columns + 1) / 2 : columns / grid.block() * grid.file_bytes;
}

bool finite_scales(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns) {
  if (dtype == DEJAVU_INT4) {
    for (int64_t g = 0; g * GROUP < columns; g++)
      if (!is_finite(scales[g])) return false;
    return true;
  }
  const Grid &grid = grid_of(dtype);
  const Block &block = BLOCKS[grid_number(dtype)];
  for (int64_t b = 0; b < columns / grid.block(); b++, row += grid.file_bytes)
    if (!is_finite(word(row + block.scale)) || (grid.minima && !is_finite(word(row + block.minimum)))) return false;
  return true;
}

void pack_row(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, uint8_t *out) {
  if (dtype == DEJAVU_INT4) return pack_int4(row, scales, columns, width, out);
  PACK_ROW[grid_number(dtype)](row, columns, width, out);
}

void pack_outputs(int dtype, const uint8_t *const *rows, int64_t first, int64_t count, int64_t columns, int64_t width, uint8_t *out) {
  PACK_OUTPUTS[grid_number(dtype)](rows, first, count, columns, width, out);
}
