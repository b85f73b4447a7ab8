// Blocks into rows and panels: see packing.h.
#include "packing.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "buffer.h"

namespace {

uint16_t word(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

bool is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }
bool is_finite_bf16(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

// Where the parts of a block lie in a file. -1: there is none.
struct Block {
  int scale, minimum, sub, plane, quants, zero = -1;
};
constexpr Block BLOCKS[NUM_GRIDS] = {{0, -1, -1, -1, 2}, {0, -1, -1, -1, 2},  {0, 2, -1, -1, 4},   {0, -1, -1, 2, 6},
                                     {0, 2, -1, 4, 8},   {0, 2, 4, -1, 16},   {0, 2, 4, 16, 48},   {208, -1, 192, 128, 0},
                                     {0, -1, -1, -1, 3, 2}, {0, -1, -1, -1, 3, 2}, {0, -1, -1, -1, 3, 2},  {0, -1, -1, -1, 3, 2}};

template <int GRID> bool finite_block(const uint8_t *block) {
  constexpr Block B = BLOCKS[GRID];
  if constexpr (GRIDS[GRID].bf16_scales) return is_finite_bf16(word(block + B.scale));
  return is_finite(word(block + B.scale)) && (B.minimum < 0 || is_finite(word(block + B.minimum)));
}

// Eight bytes as a word, the first one lowest: what is done to each of them is done to all.
uint64_t load8(const uint8_t *p) {
  uint64_t eight;
  std::memcpy(&eight, p, 8);
  return eight;
}

constexpr uint64_t every_byte(uint64_t byte) { return byte * 0x0101010101010101; }

// Eight bits as the lowest ones of eight bytes, the lowest bit first.
uint64_t spread(uint8_t bits) {
  const uint64_t own = every_byte(bits) & 0x8040201008040201;  // byte b has bit b, or is 0
  return (((own & every_byte(0x7f)) + every_byte(0x7f)) | own) >> 7 & every_byte(1);
}

// The GROUP quants of group g of a block, in order: bytes that are never negative, or of Q8_0 signed ones.
template <int GRID> void unpack(const uint8_t *block, int64_t g, uint8_t *q) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  const uint8_t *quants = block + B.quants, *plane = block + B.plane;
  for (int i = 0; i < 4; i++) {  // values 8 i .. 8 i + 7
    uint64_t eight, more = 0;
    if constexpr (G.bytes()) {
      eight = load8(quants + 8 * i);
    } else if constexpr (!G.levels) {  // low halves are the first 16 values
      eight = load8(quants + i % 2 * 8) >> i / 2 * 4 & every_byte(15);
      if constexpr (G.plane == 1) more = spread(plane[i]);
    } else if constexpr (G.minima) {  // low halves of 32 bytes are a group, high ones the next
      eight = load8(quants + g / 2 * 32 + 8 * i) >> g % 2 * 4 & every_byte(15);
      if constexpr (G.plane == 1) more = load8(plane + 8 * i) >> g & every_byte(1);
    } else {  // low halves of 64 bytes are two groups, high ones the next two; four groups share 32 bytes of two bits
      eight = load8(quants + g / 4 * 64 + g % 2 * 32 + 8 * i) >> g % 4 / 2 * 4 & every_byte(15);
      more = load8(plane + g / 4 * 32 + 8 * i) >> g % 4 * 2 & every_byte(3);
    }
    eight |= more << 4;
    std::memcpy(q + 8 * i, &eight, 8);
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

uint32_t load4(const uint8_t *p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// Byte b of word w becomes byte w of word b: a word is four values, the first one lowest.
void transpose4(uint32_t *x) {
  constexpr uint32_t EVEN = 0x00ff00ff, LOW = 0x0000ffff;
  const uint32_t even01 = (x[0] & EVEN) | (x[1] & EVEN) << 8, odd01 = (x[0] >> 8 & EVEN) | (x[1] & ~EVEN);
  const uint32_t even23 = (x[2] & EVEN) | (x[3] & EVEN) << 8, odd23 = (x[2] >> 8 & EVEN) | (x[3] & ~EVEN);
  x[0] = (even01 & LOW) | even23 << 16, x[1] = (odd01 & LOW) | odd23 << 16;
  x[2] = even01 >> 16 | (even23 & ~LOW), x[3] = odd01 >> 16 | (odd23 & ~LOW);
}

// The lowest bits of byte w of word b become bit 4 w + b.
uint32_t bits_of(const uint32_t *x) {
  uint32_t four = 0;  // bits of b, in the lower half of byte w
  for (int b = 0; b < 4; b++) four |= (x[b] & 0x01010101) << b;
  const uint32_t pairs = (four & 0x000f000f) | (four & 0x0f000f00) >> 4;
  return (pairs & 0xff) | (pairs >> 8 & 0xff00);
}

// Quants of group g into a row: see grids.h. low[b] is values 8 b .. 8 b + 3, high[b] those after them: transposed they are bytes in the row's order.
template <int GRID> void put_group(const uint8_t *q, int64_t g, int64_t width, uint8_t *row) {
  constexpr Grid G = GRIDS[GRID];
  constexpr uint32_t NIBBLES = 0x0f0f0f0f, TWO_BITS = 0x03030303;
  uint32_t low[4], high[4];
  for (int b = 0; b < 4; b++) low[b] = load4(q + 8 * b), high[b] = load4(q + 8 * b + 4);
  const int64_t pair = g / 2, second = g % 2;
  if constexpr (G.bytes()) {
    transpose4(low), transpose4(high);
    std::memcpy(row + pair * PAD + second * 16, low, 16);
    std::memcpy(row + pair * PAD + 32 + second * 16, high, 16);
  } else {
    uint8_t *plane = row + width / 2;
    uint32_t nibbles[4];
    for (int b = 0; b < 4; b++) nibbles[b] = (low[b] & NIBBLES) | (high[b] & NIBBLES) << 4;
    transpose4(nibbles);
    std::memcpy(row + g * 16, nibbles, 16);
    for (int b = 0; b < 4; b++) low[b] >>= 4, high[b] >>= 4;
    if constexpr (G.plane == 1)
      for (int vector = 0; vector < 2; vector++) {
        const uint16_t bits = (uint16_t)bits_of(vector == 0 ? low : high);
        std::memcpy(plane + pair * 8 + vector * 4 + second * 2, &bits, 2);
      }
    if constexpr (G.plane == 2) {
      uint32_t bits[4], before[4] = {0, 0, 0, 0};
      for (int b = 0; b < 4; b++) bits[b] = ((low[b] & TWO_BITS) | (high[b] & TWO_BITS) << 4) << 2 * second;
      transpose4(bits);
      if (second) std::memcpy(before, plane + pair * 16, 16);
      for (int b = 0; b < 4; b++) bits[b] |= before[b];
      std::memcpy(plane + pair * 16, bits, 16);
    }
  }
}

template <int GRID> bool pack_row_of(const uint8_t *row, int64_t columns, int64_t width, uint8_t *out) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  constexpr int64_t GROUPS = G.block() / GROUP;
  uint8_t q[GROUP], *scales = out + G.quant_bytes(width);
  bool finite = true;
  for (int64_t b = 0; b < columns / G.block(); b++) {
    const uint8_t *block = row + b * G.file_bytes;
    finite = finite && finite_block<GRID>(block);
    for (int64_t g = 0; g < GROUPS; g++) {
      unpack<GRID>(block, g, q);
      put_group<GRID>(q, b * GROUPS + g, width, out);
    }
    if constexpr (!G.levels) {
      std::memcpy(scales + 2 * b, block + B.scale, 2);
      if constexpr (G.minima) std::memcpy(scales + width / GROUP * 2 + 2 * b, block + B.minimum, 2);
      if constexpr (G.zeros) scales[width / GROUP * 2 + b] = block[B.zero];
    } else if constexpr (G.minima) {
      std::memcpy(scales + 20 * b, block + B.scale, 4);
      unpack_sub_scales(block + B.sub, scales + 20 * b + 4, scales + 20 * b + 12);
    } else {
      std::memcpy(scales + 18 * b, block + B.sub, 16);
      std::memcpy(scales + 18 * b + 16, block + B.scale, 2);
    }
  }
  return finite;
}

// Bytes of 8 rows of GROUP become those of 8 columns.
void transpose8(const uint8_t *from, uint64_t *to) {
  for (int r = 0; r < 8; r++) std::memcpy(to + r, from + r * GROUP, 8);
  const auto swap = [&](int step, int shift, uint64_t mask) {
    for (int r = 0; r < 8; r++) {
      if (r & step) continue;
      const uint64_t other = (to[r] >> shift ^ to[r + step]) & mask;
      to[r] ^= other << shift, to[r + step] ^= other;
    }
  };
  swap(1, 8, 0x00ff00ff00ff00ff), swap(2, 16, 0x0000ffff0000ffff), swap(4, 32, 0x00000000ffffffff);
}

// The lowest bit of each of 8 bytes, the first one lowest.
uint8_t bits_of(uint64_t bytes) { return (uint8_t)((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56); }

// Quants of PAD outputs of GROUP inputs, q[output][input], into their places in the inputs' rows.
template <int GRID> void put_outputs(const uint8_t *q, int64_t unit, int64_t width, uint8_t *const *rows) {
  constexpr Grid G = GRIDS[GRID];
  if constexpr (G.bytes()) {
    for (int o = 0; o < PAD; o += 8)
      for (int i = 0; i < GROUP; i += 8) {
        uint64_t columns[8];
        transpose8(q + o * GROUP + i, columns);
        for (int c = 0; c < 8; c++) std::memcpy(rows[i + c] + unit * PAD + o, columns + c, 8);
      }
  } else {
    constexpr int HALF = PAD / 2 * GROUP;  // from an output to the one whose nibble is above its own
    uint8_t both[HALF], plane[HALF];
    for (int k = 0; k < HALF; k += 8) {
      const uint64_t low = load8(q + k), high = load8(q + k + HALF);
      const uint64_t nibbles = (low & every_byte(15)) | (high & every_byte(15)) << 4, rest = (low >> 4 & every_byte(3)) | (high & every_byte(0x30));
      std::memcpy(both + k, &nibbles, 8);
      if (G.plane > 0) std::memcpy(plane + k, &rest, 8);
    }
    for (int i = 0; i < GROUP; i += 8) {
      uint64_t columns[8];
      for (int o = 0; o < PAD / 2; o += 8) {
        transpose8(both + o * GROUP + i, columns);
        for (int c = 0; c < 8; c++) std::memcpy(rows[i + c] + unit * (PAD / 2) + o, columns + c, 8);
      }
      if constexpr (G.plane == 1)
        for (int o = 0; o < PAD / 2; o += 8) {
          transpose8(plane + o * GROUP + i, columns);
          for (int c = 0; c < 8; c++) {
            uint8_t *to = rows[i + c] + width / 2 + unit * (PAD / 8) + o / 8;
            to[0] = bits_of(columns[c]), to[4] = bits_of(columns[c] >> 4);
          }
        }
      if constexpr (G.plane == 2)
        for (int o = 0; o < PAD / 4; o += 8) {
          uint64_t later[8];
          transpose8(plane + o * GROUP + i, columns);
          transpose8(plane + (o + PAD / 4) * GROUP + i, later);
          for (int c = 0; c < 8; c++) {
            const uint64_t bits = columns[c] | later[c] << 2;
            std::memcpy(rows[i + c] + width / 2 + unit * (PAD / 4) + o, &bits, 8);
          }
        }
    }
  }
}

template <int GRID> bool pack_outputs_of(const uint8_t *const *rows, int64_t first, int64_t count, int64_t columns, int64_t width, uint8_t *out) {
  constexpr Grid G = GRIDS[GRID];
  constexpr Block B = BLOCKS[GRID];
  const Panel panel(G, width);
  uint8_t q[PAD * GROUP] = {0};
  bool finite = true;
  for (int64_t b = 0; b < columns / G.block(); b++) {
    uint8_t *scales = out + panel.scales_at(b * G.block());
    for (int64_t o = 0; o < count; o++) {
      const uint8_t *block = rows[o] + b * G.file_bytes;
      finite = finite && finite_block<GRID>(block);
      std::memcpy(scales + 2 * (first + o), block + B.scale, 2);
      if constexpr (G.minima) std::memcpy(scales + 2 * (width + first + o), block + B.minimum, 2);
      if constexpr (G.zeros) scales[2 * width + first + o] = block[B.zero];
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
      uint8_t *inputs[GROUP];
      for (int64_t i = 0; i < GROUP; i++) inputs[i] = out + panel.row_at(b * G.block() + g * GROUP + i);
      for (int64_t unit = 0; unit * PAD < count; unit++) {
        for (int64_t o = 0; o < PAD && unit * PAD + o < count; o++) unpack<GRID>(rows[unit * PAD + o] + b * G.file_bytes, g, q + o * GROUP);
        put_outputs<GRID>(q, first / PAD + unit, width, inputs);
      }
    }
  }
  return finite;
}

// Nibbles of int4 in a row of Q4_0, or (by_input) in the order of outputs, padded with 8: the last group may be cut short.
bool pack_int4(const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, bool by_input, uint8_t *out) {
  const auto quant = [&](int64_t at) { return (uint8_t)(at < columns ? row[at / 2] >> at % 2 * 4 & 15 : 8); };
  for (int64_t g = 0; !by_input && g < width / GROUP; g++) {
    uint8_t q[GROUP];
    for (int64_t i = 0; i < GROUP; i++) q[i] = quant(g * GROUP + i);
    put_group<DEJAVU_Q4_0 - DEJAVU_Q8_0>(q, g, width, out);
  }
  for (int64_t b = 0; by_input && b < width / 2; b++) {  // of PAD outputs the first half in low halves of bytes, the others above
    const int64_t at = b / (PAD / 2) * PAD + b % (PAD / 2);
    out[b] = (uint8_t)(quant(at) | quant(at + PAD / 2) << 4);
  }
  const int64_t groups = (columns + GROUP - 1) / GROUP;
  std::memcpy(out + width / 2, scales, (size_t)(groups * 2));
  return std::all_of(scales, scales + groups, is_finite);
}

// A row of int4 as blocks of Q4_0: the last one may be cut short.
void blocks_of_int4(const uint8_t *row, const uint16_t *scales, int64_t columns, uint8_t *out) {
  for (int64_t first = 0; first < columns; first += GROUP, out += 18) {
    std::memcpy(out, scales + first / GROUP, 2);
    const auto quant = [&](int64_t i) { return i < columns ? row[i / 2] >> i % 2 * 4 & 15 : 8; };
    for (int64_t i = 0; i < GROUP / 2; i++) out[2 + i] = (uint8_t)(quant(first + i) | quant(first + GROUP / 2 + i) << 4);
  }
}

#define EACH_GRID(kernel) {kernel<0>, kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>, kernel<7>, kernel<8>, kernel<9>, kernel<10>, kernel<11>}
constexpr decltype(&pack_row_of<0>) PACK_ROW[NUM_GRIDS] = EACH_GRID(pack_row_of);
constexpr decltype(&pack_outputs_of<0>) PACK_OUTPUTS[NUM_GRIDS] = EACH_GRID(pack_outputs_of);

}  // namespace

int64_t file_row_bytes(int dtype, int64_t columns) {
  const Grid &grid = grid_of(dtype);
  return dtype == DEJAVU_INT4 ? (columns + 1) / 2 : columns / grid.block() * grid.file_bytes;
}

bool pack_row(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, bool by_input, uint8_t *out) {
  if (dtype == DEJAVU_INT4) return pack_int4(row, scales, columns, width, by_input, out);
  return PACK_ROW[grid_number(dtype)](row, columns, width, out);
}

bool pack_outputs(int dtype, const uint8_t *const *rows, const uint16_t *const *scales, int64_t first, int64_t count, int64_t columns,
                  int64_t width, uint8_t *out) {
  if (dtype != DEJAVU_INT4) return PACK_OUTPUTS[grid_number(dtype)](rows, first, count, columns, width, out);
  const int64_t whole = round_up(columns, GROUP), bytes = file_row_bytes(DEJAVU_Q4_0, whole);
  std::vector<uint8_t> blocks((size_t)(count * bytes));
  std::vector<const uint8_t *> starts;
  for (int64_t o = 0; o < count; o++) {
    blocks_of_int4(rows[o], scales[o], columns, blocks.data() + o * bytes);
    starts.push_back(blocks.data() + o * bytes);
  }
  return PACK_OUTPUTS[grid_number(dtype)](starts.data(), first, count, whole, width, out);
}

void in_parallel(int threads, int64_t count, const std::function<void(int64_t, int64_t)> &work) {
  struct Joined {
    std::vector<std::thread> threads;
    ~Joined() {
      for (std::thread &each : threads) each.join();
    }
  } others;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  for (int64_t part = 1; part < parts; part++) others.threads.emplace_back(work, count * part / parts, count * (part + 1) / parts);
  work(0, count / parts);
}
