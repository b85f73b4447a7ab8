// Matrices of few bits as files have them, into rows and panels (grids.h). In: rows of int4, or blocks of GGUF. Out: bytes that kernels read.
//
// A row of a file is read once, from where it lies; nothing else is allocated. What is written to is zero before.
#pragma once
#include <stdint.h>

#include "grids.h"

// Bytes of a row of `columns` values in a file, of a dtype with a grid.
int64_t file_row_bytes(int dtype, int64_t columns);
// Whether every scale (and minimum) of a row is finite. int4's lie apart: `scales`.
bool finite_scales(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns);
// One row of a matrix, `width` being columns padded to PAD.
void pack_row(int dtype, const uint8_t *row, const uint16_t *scales, int64_t columns, int64_t width, uint8_t *out);
// Outputs first .. first + count - 1, count <= PAD and first a multiple of PAD, of a matrix with a row for each output, into panels of `width`
// outputs. rows: theirs in the file.
void pack_outputs(int dtype, const uint8_t *const *rows, int64_t first, int64_t count, int64_t columns, int64_t width, uint8_t *out);
