// Matrices of few bits as files have them, into rows and panels (grids.h). In: rows of int4, or blocks. Out: bytes that kernels read.
//
// A row of a file is read once, from where it lies. What is written to is zero before.
#pragma once
#include <stdint.h>

#include <functional>

#include "grids.h"

// Bytes of a row of `columns` values in a file, of a dtype with a grid.
int64_t file_row_bytes(int dtype, int64_t columns);
// One row of a matrix, `width` being columns padded to PAD. int4's scales lie apart; by_input: in the order of rows that are summed up, which
// other dtypes don't have. Returns whether all scales and minima are finite.
bool pack_row(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, bool by_input, uint8_t *out);
// Outputs first .. first + count - 1, count <= OUTPUTS and first a multiple of it, of a matrix with a row for each output, into panels of `width` outputs. rows, and of
// int4 scales: theirs in the file. Returns the same. Several cache lines of each row of a panel are written together.
constexpr int64_t OUTPUTS = 4 * PAD;
bool pack_outputs(int dtype, const uint8_t *const *rows, const uint16_t *const *scales, int64_t first, int64_t count, int64_t columns,
                  int64_t width, uint8_t *out);

// Calls work(begin, end) for parts of 0 .. count, by so many threads. It must not throw.
void in_parallel(int threads, int64_t count, const std::function<void(int64_t, int64_t)> &work);
