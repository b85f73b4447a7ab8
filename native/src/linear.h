// Vectors, and their products with matrices of any dtype. In: rows of a matrix, a vector in the form that they meet. Out: floats.
//
// Nothing here knows of layers or threads: what a caller asks for is computed, into the memory that it gives.
#pragma once
#include <algorithm>

#include "model.h"

// `rows` vectors of `width` values, of which these integers are made.
class Vectors {
 public:
  Vectors() = default;
  Vectors(int64_t rows, int64_t width, Forms forms);
  Vector &operator[](int64_t row) { return list_[(size_t)row]; }
  const Vector &operator[](int64_t row) const { return list_[(size_t)row]; }

 private:
  Buffer<float> floats_;
  Buffer<int16_t> ints_, halves_;
  Buffer<int8_t> bytes_;
  Buffer<float> scales_;
  std::vector<Vector> list_;
};

// What sums of a rank become, which meet predictors: where matrices of the model are integers, those of int8.
inline Forms rank_forms(const dejavu_model &model) { return {model.forms().int16, false}; }

// What is prefetched while rows are computed: `bytes` of each listed row later on, or, of rows in order, from `next` on.
struct Fetch {
  int64_t bytes = 0;
  const unsigned char *next = nullptr;
};

// The rows of a matrix in memory of its own that come after rows [first, first + count): as many again.
inline Fetch rows_after(const Matrix &matrix, int64_t first, int64_t count) {
  const int64_t stop = first + count, begin = matrix.begin_of(stop), end = matrix.begin_of(std::min(stop + count, matrix.rows));
  return {end - begin, matrix.data + begin};
}

// Rows of a matrix that are read for one token after another while they are in the first-level cache.
constexpr int64_t TILE = 32;
static_assert(TILE == SUMMED, "a tile of neurons does not cut a sum of panels, and is summed up at once");

// Rows in order come from memory about 1.5 times as fast as selected ones (docs/log.md): above this share all are read, and what the
// others are multiplied by set to zero, which leaves the sum as it is, bit for bit.
inline bool dense_is_faster(int64_t selected, int64_t total, int64_t eighths = 5) { return 8 * selected > eighths * total; }

// out[k] = row_k x * scale + bias, rows first + 0, 1, 2... or idx[k].
void dots(const Kernels &kernels, const Matrix &matrix, const Vector &x, const int32_t *idx, int64_t first, int64_t count, float *out, Fetch fetch = {});
// The same for several tokens, of rows first .. first + count - 1: out[t][k]. alone: what is fetched where there is one.
void products(const Kernels &kernels, const Matrix &matrix, const Batch &batch, int64_t first, int64_t count, Fetch alone = {});
// y += coef[0] row_0 + coef[1] row_1 + ..., the same rows. Scales of int8 rows are the caller's: Matrix::scale_rows.
void axpys(const Kernels &kernels, const Matrix &matrix, const float *coef, const int32_t *idx, int64_t first, int64_t count, float *y, Fetch fetch = {});
// The same for several tokens, of rows first .. first + count - 1, count <= SUMMED.
void sums(const Kernels &kernels, const Matrix &matrix, const Tokens &tokens, int64_t first, int64_t count);
// The integers of a vector, from its floats; nothing where it meets none.
void quantize(const Kernels &kernels, Vector &vector, int64_t width);
// y = the model's kind of norm of x, one residual stream.
void normalize(const Kernels &kernels, const dejavu_model &model, const Norm &norm, const float *x, float *y);

// What is added to the residual stream, cut into chunks of one thread each that are added in order: see engine.h.
class Parts {
 public:
  Parts(int64_t chunks, int64_t max_rows, int64_t width);
  float *of(int64_t chunk, int64_t row) const { return sums_.data() + (chunk * max_rows_ + row) * width_; }
  void clear(int64_t chunk, int64_t rows) const { std::fill_n(of(chunk, 0), rows * width_, 0.0f); }
  // x += every chunk's part, in order, and the bias, for each row.
  void add(const Kernels &kernels, int64_t rows, const Buffer<float> &bias, Vectors &x) const;

 private:
  int64_t chunks_, max_rows_, width_;
  Buffer<float> sums_;
};
