// The grids that matrices of few bits are packed in, by dejavu_dtype, and where their parts lie. In: a dtype and sizes. Out: bytes and offsets.
//
// A value is scale * (q - zero), or scale * q + minimum. The zero is one for all values, or a signed byte for each GROUP of them. Scales and
// minima are fp16 (scales may be bf16) and belong to GROUP values; where there are two levels they belong to SUPER values, and each GROUP
// (Q6_K: half of one) has its sub-scale as a byte, and its sub-minimum, which is taken off:
// value = scale * sub-scale * q - minimum * sub-minimum. q is a signed byte (of 8 bits), or a nibble with the rest of its bits in a plane.
//
// A row, for products. The quants of a group are in an order of their own: low byte b of 16 is value b % 4 * 8 + b / 4, high byte b
// that value + 4, so that 4 values in order are bytes at the same place of 4 words of 32 bits. Of a pair of groups the low bytes come
// first, then the high ones, 32 each: the pair's low vector and its high vector. Of n values:
//     nibbles  n / 2 bytes: of each group 16, low bytes in the low halves (Q8_0: n bytes, vectors of pairs)
//     plane    of one bit (n / 8): of a pair two words, bit i for byte i of the low vector and of the high one
//              of two bits (n / 4): of a pair 16 bytes; byte j has from its lowest bits on low byte j, low byte 16 + j, and so the high ones
//     scales   of each group one, then the minima, or the zeros, of each group; with two levels for each SUPER values scale, minimum, 8
//              sub-scales and 8 sub-minima, or (Q6_K) 16 signed sub-scales and the scale
// Scales may be read up to SLACK bytes past the last row. int4 is Q4_0.
//
// A panel, for sums of rows that are stored by output, so that scales belong to groups of *rows*: of GROUP (SUPER) inputs and W outputs.
//     scales of all outputs, minima or zeros of all outputs; with two levels then for each sub-scale's inputs: sub-scales, sub-minima
//     a row of quants for each input: nibbles and plane of each PAD outputs as above, but of bytes in order: the low vector is outputs 0
//     .. 31, the high one 32 .. 63; bytes (Q8_0) in order
// Everything here has internal linkage: it is compiled for each instruction set.
#pragma once
#include <stdint.h>

#include "../dejavu_native.h"

namespace {

constexpr int64_t PAD = 64, GROUP = 32, SUPER = 256, SLACK = 64;
constexpr int NUM_GRIDS = DEJAVU_W8_BF16 - DEJAVU_Q8_0 + 1;

struct Grid {
  const char *name;
  int plane;  // bits of a value beside its nibble; -1: bytes
  int zero;
  bool minima, levels;
  int shared;      // values of a scale, or of a sub-scale
  int file_bytes;  // of a block of a file
  bool zeros = false, bf16_scales = false;  // whether each group has its zero, and scales are bf16

  constexpr int block() const { return levels ? (int)SUPER : (int)GROUP; }
  constexpr bool bytes() const { return plane < 0; }
  constexpr int64_t quant_bytes(int64_t n) const { return bytes() ? n : n / 2 + n / 8 * plane; }
  constexpr int64_t scale_bytes(int64_t n) const { return levels ? n / SUPER * (minima ? 20 : 18) : n / GROUP * (2 * (1 + minima) + zeros); }
  constexpr int64_t row_bytes(int64_t n) const { return quant_bytes(n) + scale_bytes(n); }
};

// In the order of their codes from DEJAVU_Q8_0 on.
constexpr Grid GRIDS[NUM_GRIDS] = {
    {"q8_0", -1, 0, false, false, 32, 34}, {"q4_0", 0, 8, false, false, 32, 18}, {"q4_1", 0, 0, true, false, 32, 20},
    {"q5_0", 1, 16, false, false, 32, 22}, {"q5_1", 1, 0, true, false, 32, 24},  {"q4_k", 0, 0, true, true, 32, 144},
    {"q5_k", 1, 0, true, true, 32, 176},   {"q6_k", 2, 32, false, true, 16, 210},
    {"w4_fp16", 0, 0, false, false, 32, 19, true, false},  {"w4_bf16", 0, 0, false, false, 32, 19, true, true},
    {"w8_fp16", -1, 0, false, false, 32, 35, true, false}, {"w8_bf16", -1, 0, false, false, 32, 35, true, true}};

// Rows beside those that each lie by themselves, for sums. Those of int8 have their scales elsewhere; those of int4 are quants in the order of
// a panel, then a scale for each GROUP outputs.
constexpr int INT8_ROWS = NUM_GRIDS, INT4_ROWS = NUM_GRIDS + 1;
template <int GRID> constexpr Grid grid_of_rows() {
  if constexpr (GRID == INT8_ROWS) return {"int8", -1, 0, false, false, 32, 0};
  else if constexpr (GRID == INT4_ROWS) return {"int4", 0, 8, false, false, 32, 0};
  else return GRIDS[GRID];
}

// Where the i-th word of the first group of a pair lies in its vectors, the low words, then the high ones; of the second 16 bytes later.
constexpr int place_of_word(int i) { return i < 4 ? 4 * i : (int)PAD / 2 + 4 * (i - 4); }

// Whether it is given as blocks, each of which has its scales within.
constexpr bool of_blocks(int dtype) { return dtype >= DEJAVU_Q8_0 && dtype <= DEJAVU_W8_BF16; }
// Whether products with it take a Grouped vector.
constexpr bool has_grid(int dtype) { return dtype == DEJAVU_INT4 || of_blocks(dtype); }
constexpr int grid_number(int dtype) { return (dtype == DEJAVU_INT4 ? (int)DEJAVU_Q4_0 : dtype) - DEJAVU_Q8_0; }
constexpr const Grid &grid_of(int dtype) { return GRIDS[grid_number(dtype)]; }

// Sums of panels are taken over SUMMED inputs at a time, over those of a sub-scale where these are fewer: see Kernels::panels.
constexpr int64_t SUMMED = 32;
constexpr int64_t summed(const Grid &grid) { return grid.shared < SUMMED ? grid.shared : SUMMED; }

// Where the parts of panels of `width` outputs lie.
struct Panel {
  int64_t block, shared;                 // inputs of a panel, and of what has scales of its own in it
  int64_t row, scales, sub_scales;       // bytes of a row of quants, of a panel's scales, minima and zeros, and of sub-scales and sub-minima
  int64_t inner, outer;                  // bytes of `shared` inputs, and of a panel

  constexpr Panel(const Grid &grid, int64_t width)
      : block(grid.block()),
        shared(grid.shared),
        row(grid.quant_bytes(width)),
        scales(width * (2 * (1 + grid.minima) + grid.zeros)),
        sub_scales(grid.levels ? width * (1 + grid.minima) : 0),
        inner(sub_scales + shared * row),
        outer(scales + block / shared * inner) {}
  constexpr int64_t scales_at(int64_t input) const { return input / block * outer; }
  constexpr int64_t sub_scales_at(int64_t input) const { return scales_at(input) + scales + input % block / shared * inner; }
  constexpr int64_t row_at(int64_t input) const { return sub_scales_at(input) + sub_scales + input % shared * row; }
  // Where what belongs to an input and those after it begins.
  constexpr int64_t begin_of(int64_t input) const {
    return input % block == 0 ? scales_at(input) : input % shared == 0 ? sub_scales_at(input) : row_at(input);
  }
  constexpr int64_t bytes(int64_t inputs) const { return (inputs + block - 1) / block * outer; }
};

}  // namespace
