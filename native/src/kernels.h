// The arithmetic of a decode step as a table of functions, one table for each instruction set.
//
// Rows lie `stride` bytes apart from `base`; idx lists row numbers (NULL: 0, 1, 2...); those of few bits are described in grids.h. Lengths n
// are padded: vectors of weights to a multiple of PAD values, heads to a multiple of HEAD_PAD, the padding being zero.
// While rows are computed, others are prefetched, evenly: `fetch` bytes (0: none) of the row that idx lists `ahead` rows later,
// or where idx is NULL `fetch` bytes from `next` on. In the order of addresses and in step with the computation
// memory delivers twice as much as in bursts (docs/log.md).
// A result depends on its own row and vector alone, never on which rows are computed with it.
#pragma once
#include <stdint.h>

#include "grids.h"

constexpr int64_t HEAD_PAD = 16;

// 16-bit floats as they lie in memory.
struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

// A vector as int8 with a scale for each GROUP values, for products with grids: x[i] = scale[g] * q[...]. The bytes are in the order
// of a pair's vectors (grids.h). sum is q summed over a group; halves are two, over its first 16 values and over the others. Of each 8 groups
// scale, sum and halves lie in split order: the first groups of the pairs, then the second ones, so that a pair's two lie at the same
// place of two halves of a vector. scale and sum are zero from the last group up to the next multiple of 8 groups.
struct Grouped {
  int8_t *q;
  float *scale, *sum;
  int16_t *halves;
};

// Where group g lies in split order.
constexpr int64_t split(int64_t g) { return g / 8 * 8 + g % 2 * 4 + g % 8 / 2; }

// A padded vector; where some matrix that it meets is of integers, also in the form that their products take.
struct Vector {
  float *f;
  int16_t *q;    // int16 times a scale, for int8
  float scale;
  Grouped groups;  // for grids
};

struct RowList {
  const void *base;
  int64_t stride;
  const int32_t *idx;
  int64_t count, fetch, ahead;
  const void *next;
};

// Rows of panels (grids.h), or of int8 and int4 `stride` bytes apart: those of inputs idx[0], idx[1], ... in ascending order, or first, first + 1, ...
// `fetch` as in RowList, of listed rows those of the inputs that are summed next.
struct PanelList {
  const uint8_t *base;
  int64_t stride;
  const int32_t *idx;
  int64_t first, count, fetch;
  const void *next;
};

// Tokens that the same rows are multiplied with: out[t][k] = sum_i row_k[i] x[t][i]. prompt: they are all of prompts.
struct Batch {
  const Vector *const *x;
  float *const *out;
  int64_t count;
  bool prompt = false;
};

// Tokens that the same rows are added up for: y[t] += coef[t][0] row_0 + coef[t][1] row_1 + ...
struct Tokens {
  const float *const *coef;
  float *const *y;
  int64_t count;
};

struct Kernels {
  const char *name;
  // Prefetches `fetch` bytes of each row.
  void (*fetch)(const RowList &rows);
  // out[k] = sum_i row_k[i] x[i]
  void (*dots_f32)(const RowList &rows, const float *x, int64_t n, float *out);
  void (*dots_bf16)(const RowList &rows, const float *x, int64_t n, float *out);
  void (*dots_f16)(const RowList &rows, const float *x, int64_t n, float *out);
  void (*dots_i8)(const RowList &rows, const float *x, int64_t n, float *out);
  // The same with x[i] = scale * xq[i]. No int32 overflows as long as |xq| <= int16_limit(n).
  void (*dots_i8_i16)(const RowList &rows, const int16_t *xq, float scale, int64_t n, float *out);
  void (*dots_grid[NUM_GRIDS])(const RowList &rows, const Grouped &x, int64_t n, float *out);
  // The same bits for several tokens. Nothing is fetched.
  void (*products_f32)(const RowList &rows, const Batch &batch, int64_t n);
  void (*products_bf16)(const RowList &rows, const Batch &batch, int64_t n);
  void (*products_f16)(const RowList &rows, const Batch &batch, int64_t n);
  void (*products_i8)(const RowList &rows, const Batch &batch, int64_t n);
  void (*products_i8_i16)(const RowList &rows, const Batch &batch, int64_t n);
  void (*products_grid[NUM_GRIDS])(const RowList &rows, const Batch &batch, int64_t n);
  // The same for tokens of a prompt, in another order of sums, which is one for however many tokens.
  void (*prompts_grid[NUM_GRIDS])(const RowList &rows, const Batch &batch, int64_t n);
  // y[i] = y[i] + coef[0] row_0[i] + coef[1] row_1[i] + ..., added in this order
  void (*axpys_f32)(const RowList &rows, const float *coef, int64_t n, float *y);
  void (*axpys_bf16)(const RowList &rows, const float *coef, int64_t n, float *y);
  void (*axpys_f16)(const RowList &rows, const float *coef, int64_t n, float *y);
  void (*axpys_i8)(const RowList &rows, const float *coef, int64_t n, float *y);
  // As those: for a few rows, slowly.
  void (*axpys_grid[NUM_GRIDS])(const RowList &rows, const float *coef, int64_t n, float *y);
  // The same of rows of panels, whose sum is cut where the number of an input is a multiple of summed(grid):
  // y[i] = y[i] + scale[i] * (coef[0] (q_0[i] - zero[i]) + ...) + minimum[i] * (coef[0] + ...) of each part. A row of coefficient 0 changes no bit.
  // Coefficients are integers times a scale for each part: int8 where quants have few bits, int16 for bytes.
  void (*panels[NUM_GRIDS])(const PanelList &rows, const float *coef, int64_t n, float *y);
  // The same of rows of int8, y[i] = y[i] + coef[0] q_0[i] + ..., and of int4, whose coefficients are rounded once more for each GROUP outputs.
  void (*rows_i8)(const PanelList &rows, const float *coef, int64_t n, float *y);
  void (*rows_i4)(const PanelList &rows, const float *coef, int64_t n, float *y);
  // The same bits for several tokens, of at most SUMMED rows in order (idx NULL), which become floats once. Nothing is fetched.
  void (*sums_f32)(const RowList &rows, const Tokens &tokens, int64_t n);
  void (*sums_bf16)(const RowList &rows, const Tokens &tokens, int64_t n);
  void (*sums_f16)(const RowList &rows, const Tokens &tokens, int64_t n);
  void (*sums_i8)(const RowList &rows, const Tokens &tokens, int64_t n);
  void (*sums_panels[NUM_GRIDS])(const PanelList &rows, const Tokens &tokens, int64_t n);
  void (*sums_rows_i8)(const PanelList &rows, const Tokens &tokens, int64_t n);
  void (*sums_rows_i4)(const PanelList &rows, const Tokens &tokens, int64_t n);
  void (*add)(float *y, const float *x, int64_t n);
  // p = softmax(p); room for PAD values past n
  void (*softmax)(float *p, int64_t n);
  // y = (x - mean) / sqrt(var + eps) * weight + bias over `size` values (n padded); bias NULL: none
  void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int64_t size, int64_t n, float *y);
  void (*rms_norm)(const float *x, const float *weight, float eps, int64_t size, int64_t n, float *y);
  // xq = round(x / scale), returns scale = max|x| / limit; xq = 0 and NaN where a value is not finite
  float (*quantize)(const float *x, int64_t n, float limit, int16_t *xq);
  // x in groups: q = round(x / scale), scale = max|x of the group| / 127; q = 0 and NaN scales where a value is not finite
  void (*group)(const float *x, int64_t n, const Grouped &out);
  // y = x rounded to fp16, n a multiple of HEAD_PAD; too large becomes infinite
  void (*narrow)(const float *x, int64_t n, half *y);
  // x = activation(x), activation being a dejavu_activation; room for PAD values past n
  void (*activate)(float *x, int64_t n, int activation, float threshold);
  // x = cap tanh(x / cap); NaN where a value is not finite
  void (*cap)(float *x, int64_t n, float cap);
  bool (*finite)(const float *x, int64_t n);
  // x[0] + x[1] + ...: as fast as memory can be read
  float (*sum)(const float *x, int64_t n);
};

// The largest |xq| for which n products with int8 weights (|w| <= 127) sum within int32: 127 * limit * n <= 2^31 - 1.
inline float int16_limit(int64_t n) {
  const int64_t limit = INT64_C(2147483647) / (127 * n);
  return (float)(limit < 32767 ? limit : 32767);
}

const Kernels *scalar_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();
const Kernels *avx512vnni_kernels();
const Kernels *neon_kernels();

// The table for a name, or the best this machine can run for NULL; NULL where it cannot run it.
const Kernels *find_kernels(const char *name);
// The names this machine can run, best first, separated by spaces.
const char *instruction_set_names();
