// Products of a prompt's tokens with rows of few bits, over the vectors F, N and D of one simd_*.h: see kernels_impl.h.
//
// In: rows of a grid, tokens as groups of integers. Out: for each row and token, over the groups g of both,
//     out = sum of x.scale_g (scale_g (q_g . x.q_g) + minimum_g x.sum_g), minimum_g being -zero scale_g where the grid has a zero
// F::W rows lie side by side in a tile, four quants of each to a word: the lanes of a vector are outputs, and the products of a group are one
// integer before they meet a scale. Rows of a single token, where memory is what takes time, are not worth a tile: rows_impl.h adds in another
// order, so that a prompt's sums are near those of steps and not their bits. Among prompts they are: they depend on the row and the vector alone.
#pragma once
#include "batch_impl.h"

namespace {

constexpr int64_t TILE_GROUPS = 16;  // of a tile: it stays in the first-level cache
constexpr int64_t TILE_ROWS = 32;    // whose sums are kept for all tokens, side by side

// `TILE_GROUPS` groups of F::W rows.
struct Tile {
  uint8_t words[TILE_GROUPS][8 * 4 * F::W];  // of a group 8 words of each row, in the order of a token's: low ones, then high ones
  float scale[TILE_GROUPS][F::W], minimum[TILE_GROUPS][F::W];
  int16_t sub[TILE_GROUPS][2 * F::W];  // of Q6_K sub-scales of the halves of a group
};

template <int GRID> constexpr bool has_minima() {
  constexpr Grid G = GRIDS[GRID];
  return G.minima || G.zeros || (G.zero != 0 && G.shared == GROUP) || (G.bytes() && D::OFFSET != 0);
}

// Scales of `count` groups of a row from g on, as lane `lane` of the tile; minima as what is added.
template <int GRID> inline void put_scales(const uint8_t *row, int64_t n, int64_t g, int64_t count, int lane, Tile &tile) {
  constexpr Grid G = GRIDS[GRID];
  constexpr int zero = G.zero + (G.bytes() ? D::OFFSET : 0);
  const uint8_t *parts = row + G.quant_bytes(n);
  const int64_t groups = n / GROUP;
  if constexpr (!G.levels) {
    const uint8_t *scales = parts + 2 * g, *minima = scales + 2 * groups;
    const int8_t *zeros = (const int8_t *)parts + 2 * groups + g;
    for (int64_t i = 0; i < count; i += 8) {
      float s[8], m[8];
      if constexpr (G.bf16_scales) for (int64_t j = 0; j < 8; j++) s[j] = i + j < count ? float_at_bf16(scales + 2 * (i + j)) : 0.0f;
      else N::times((const half *)scales + i, 1.0f, s);
      if constexpr (G.minima) N::times((const half *)minima + i, 1.0f, m);
      for (int64_t j = 0; j < 8 && i + j < count; j++) {
        tile.scale[i + j][lane] = s[j];
        if constexpr (G.minima) tile.minimum[i + j][lane] = m[j];
        else if constexpr (G.zeros) tile.minimum[i + j][lane] = -s[j] * (float)(zero + zeros[i + j]);
        else if constexpr (zero != 0) tile.minimum[i + j][lane] = -s[j] * (float)zero;
      }
    }
  } else {
    for (int64_t i = 0; i < count; i++) {
      const uint8_t *at = parts + G.scale_bytes((g + i) / 8 * SUPER);
      const int64_t sub = (g + i) % 8;
      if constexpr (G.minima) {
        tile.scale[i][lane] = float_at(at) * (float)at[4 + sub];
        tile.minimum[i][lane] = -(float_at(at + 2) * (float)at[12 + sub]);
      } else {
        tile.scale[i][lane] = float_at(at + 16);
        tile.sub[i][2 * lane] = (int8_t)at[2 * sub], tile.sub[i][2 * lane + 1] = (int8_t)at[2 * sub + 1];
      }
    }
  }
}

// Of rows that are vectors of a pair of groups (N::Bytes) the 8 words of the first group, then of the second: word after word, of all rows.
template <class Set> inline void side_by_side(const uint8_t (*rows)[PAD], uint8_t *first, uint8_t *second) {
  if constexpr (Set::TRANSPOSES) return Set::side_by_side(rows, first, second);
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < F::W; j++) {
      const uint8_t *from = rows[j] + place_of_word(i);
      __builtin_memcpy(first + 4 * (i * F::W + j), from, 4), __builtin_memcpy(second + 4 * (i * F::W + j), from + PAD / 4, 4);
    }
}

// Groups g .. g + count - 1 of rows k .. k + F::W - 1, the last one repeated where there are no more.
template <int GRID> inline void fill(const RowList &rows, int64_t k, int64_t n, int64_t g, int64_t count, Tile &tile) {
  constexpr Grid G = GRIDS[GRID];
  const uint8_t *row[F::W];
  for (int j = 0; j < F::W; j++) {
    row[j] = row_of<uint8_t>(rows, k + j < rows.count ? k + j : rows.count - 1);
    put_scales<GRID>(row[j], n, g, count, j, tile);
  }
  for (int64_t i = 0; i < count; i += 2) {
    uint8_t quant[F::W][PAD];
    for (int j = 0; j < F::W; j++) {
      if constexpr (G.bytes())
        for (int b = 0; b < PAD; b++) quant[j][b] = (uint8_t)(row[j][(g + i) * GROUP + b] ^ D::OFFSET);
      else
        N::store(quant[j], quants<G.plane>(row[j], n, (g + i) / 2));
    }
    side_by_side<D>(quant, tile.words[i], tile.words[i + 1]);
  }
}

// sums[t][at ..] += what the tile adds for tokens t of `count`.
template <int GRID> inline void add_tile(const Tile &tile, const Vector *const *vectors, int64_t count, int64_t g, int64_t groups, float (*sums)[TILE_ROWS], int64_t at) {
  constexpr Grid G = GRIDS[GRID];
  constexpr int T = D::TOKENS;
  for (int64_t t = 0; t < count; t += T) {
    const Grouped *x[T];
    F::T y[T];
    for (int j = 0; j < T; j++) {
      const int64_t token = t + j < count ? t + j : count - 1;
      x[j] = &vectors[token]->groups, y[j] = F::load(sums[token] + at);
    }
    for (int64_t i = 0; i < groups; i++) {
      const int64_t place = split(g + i), from = (g + i) / 2 * PAD + (g + i) % 2 * (PAD / 4);
      D::T products[T];
      if constexpr (G.shared < GROUP) D::halves(tile.words[i], tile.sub[i], x, from, place, products);
      else D::template words<G.plane>(tile.words[i], x, from, products);
      const F::T s = F::load(tile.scale[i]), m = has_minima<GRID>() ? F::load(tile.minimum[i]) : F::zero();
      for (int j = 0; j < T; j++) {
        F::T v = F::mul(s, D::floats(products[j]));
        if constexpr (has_minima<GRID>()) v = F::fma(m, F::set(x[j]->sum[place]), v);
        y[j] = F::fma(F::set(x[j]->scale[place]), v, y[j]);
      }
    }
    for (int j = 0; j < T && t + j < count; j++) F::store(sums[t + j] + at, y[j]);
  }
}

template <int GRID> void prompts_grid(const RowList &rows, const Batch &batch, int64_t n) {
  const int64_t groups = n / GROUP;
  for (int64_t t = 0; t < batch.count; t += MANY) {
    const int64_t tokens = t + MANY < batch.count ? MANY : batch.count - t;
    for (int64_t first = 0; first < rows.count; first += TILE_ROWS) {
      const int64_t count = first + TILE_ROWS < rows.count ? TILE_ROWS : rows.count - first;
      float sums[MANY][TILE_ROWS] = {{0.0f}};
      for (int64_t g = 0; g < groups; g += TILE_GROUPS) {
        const int64_t here = g + TILE_GROUPS < groups ? TILE_GROUPS : groups - g;
        for (int64_t k = 0; k < count; k += F::W) {
          Tile tile;
          fill<GRID>(rows, first + k, n, g, here, tile);
          add_tile<GRID>(tile, batch.x + t, tokens, g, here, sums, k);
        }
      }
      for (int64_t j = 0; j < tokens; j++)
        for (int64_t k = 0; k < count; k++) batch.out[t + j][first + k] = sums[j][k];
    }
  }
}

}  // namespace
