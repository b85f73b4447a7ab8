// Products of vectors with matrices: see linear.h.
#include "linear.h"

#include <algorithm>
#include <cassert>

namespace {

// How many rows early a row is fetched: about 24 KB, in the groups of four that the kernels take, and 16 at most.
int64_t rows_ahead(const Matrix &matrix) {
  const int64_t rows = 24576 / matrix.row_bytes() / 4 * 4;
  return rows < 4 ? 4 : rows > 16 ? 16 : rows;
}

RowList list_of(const Matrix &m, const int32_t *idx, int64_t first, int64_t count, Fetch fetch) {
  return {m.data + (idx == nullptr ? first * m.stride : 0), m.stride, idx, count, fetch.bytes, rows_ahead(m), fetch.next};
}

}  // namespace

Vectors::Vectors(int64_t rows, int64_t width, Forms forms) {
  const int64_t groups = round_up(width / GROUP, 8);
  floats_ = Buffer<float>(rows * width);
  if (forms.int16) ints_ = Buffer<int16_t>(rows * width);
  if (forms.groups) bytes_ = Buffer<int8_t>(rows * width), scales_ = Buffer<float>(2 * rows * groups), halves_ = Buffer<int16_t>(2 * rows * groups);
  for (int64_t r = 0; r < rows; r++) {
    Vector vector = {floats_.data() + r * width, forms.int16 ? ints_.data() + r * width : nullptr, 0.0f, {nullptr, nullptr, nullptr, nullptr}};
    if (forms.groups)
      vector.groups = {bytes_.data() + r * width, scales_.data() + 2 * r * groups, scales_.data() + (2 * r + 1) * groups, halves_.data() + 2 * r * groups};
    list_.push_back(vector);
  }
}

namespace {

// What belongs to rows of a matrix beside their values.
void finish(const Matrix &m, const int32_t *idx, int64_t first, int64_t count, float *out) {
  m.scale_rows(idx, first, count, out);
  if (!m.bias.empty())
    for (int64_t k = 0; k < count; k++) out[k] += m.bias[idx == nullptr ? first + k : idx[k]];
}

}  // namespace

void dots(const Kernels &kernels, const Matrix &m, const Vector &x, const int32_t *idx, int64_t first, int64_t count, float *out, Fetch fetch) {
  if (count == 0) return;
  const RowList list = list_of(m, idx, first, count, fetch);
  switch (m.dtype) {
    case DEJAVU_FP32: kernels.dots_f32(list, x.f, m.width, out); break;
    case DEJAVU_FP16: kernels.dots_f16(list, x.f, m.width, out); break;
    case DEJAVU_BF16: kernels.dots_bf16(list, x.f, m.width, out); break;
    case DEJAVU_INT8: x.q == nullptr ? kernels.dots_i8(list, x.f, m.width, out) : kernels.dots_i8_i16(list, x.q, x.scale, m.width, out); break;
    default: kernels.dots_grid[grid_number(m.dtype)](list, x.groups, m.width, out);
  }
  finish(m, idx, first, count, out);
}

void products(const Kernels &kernels, const Matrix &m, const Batch &batch, int64_t first, int64_t count, Fetch alone) {
  if (count == 0 || batch.count == 0) return;
  const bool tiles = batch.prompt && has_grid(m.dtype);
  if (batch.count == 1 && !tiles) return dots(kernels, m, *batch.x[0], nullptr, first, count, batch.out[0], alone);
  const RowList list = list_of(m, nullptr, first, count, {});
  switch (m.dtype) {
    case DEJAVU_FP32: kernels.products_f32(list, batch, m.width); break;
    case DEJAVU_FP16: kernels.products_f16(list, batch, m.width); break;
    case DEJAVU_BF16: kernels.products_bf16(list, batch, m.width); break;
    case DEJAVU_INT8: batch.x[0]->q == nullptr ? kernels.products_i8(list, batch, m.width) : kernels.products_i8_i16(list, batch, m.width); break;
    default: (tiles ? kernels.prompts_grid : kernels.products_grid)[grid_number(m.dtype)](list, batch, m.width);
  }
  for (int64_t t = 0; t < batch.count; t++) finish(m, nullptr, first, count, batch.out[t]);
}

void axpys(const Kernels &kernels, const Matrix &m, const float *coef, const int32_t *idx, int64_t first, int64_t count, float *y, Fetch fetch) {
  if (count == 0) return;
  const PanelList inputs = {m.data, m.stride, idx, first, count, fetch.bytes, fetch.next};
  if (m.panels) return kernels.panels[grid_number(m.dtype)](inputs, coef, m.width, y);
  const RowList list = list_of(m, idx, first, count, fetch);
  switch (m.dtype) {
    case DEJAVU_FP32: return kernels.axpys_f32(list, coef, m.width, y);
    case DEJAVU_FP16: return kernels.axpys_f16(list, coef, m.width, y);
    case DEJAVU_BF16: return kernels.axpys_bf16(list, coef, m.width, y);
    case DEJAVU_INT8: return kernels.rows_i8(inputs, coef, m.width, y);
    case DEJAVU_INT4:
      if (m.by_input) return kernels.rows_i4(inputs, coef, m.width, y);
      [[fallthrough]];
    default: return kernels.axpys_grid[grid_number(m.dtype)](list, coef, m.width, y);
  }
}

void sums(const Kernels &kernels, const Matrix &m, const Tokens &tokens, int64_t first, int64_t count) {
  if (count == 0 || tokens.count == 0) return;
  const PanelList inputs = {m.data, m.stride, nullptr, first, count, 0, nullptr};
  if (m.panels) return kernels.sums_panels[grid_number(m.dtype)](inputs, tokens, m.width);
  const RowList list = list_of(m, nullptr, first, count, {});
  switch (m.dtype) {
    case DEJAVU_FP32: return kernels.sums_f32(list, tokens, m.width);
    case DEJAVU_FP16: return kernels.sums_f16(list, tokens, m.width);
    case DEJAVU_BF16: return kernels.sums_bf16(list, tokens, m.width);
    case DEJAVU_INT8: return kernels.sums_rows_i8(inputs, tokens, m.width);
    default: assert(m.dtype == DEJAVU_INT4 && m.by_input); return kernels.sums_rows_i4(inputs, tokens, m.width);
  }
}

void quantize(const Kernels &kernels, Vector &vector, int64_t width) {
  if (vector.groups.q != nullptr) kernels.group(vector.f, width, vector.groups);
  if (vector.q != nullptr) vector.scale = kernels.quantize(vector.f, width, int16_limit(width), vector.q);
}

void normalize(const Kernels &kernels, const dejavu_model &model, const Norm &norm, const float *x, float *y) {
  const dejavu_config &c = model.config;
  if (c.rms)
    kernels.rms_norm(x, norm.weight.data(), c.norm_eps, c.hidden_size, model.width, y);
  else
    kernels.layer_norm(x, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(), c.norm_eps, c.hidden_size, model.width, y);
}

Parts::Parts(int64_t chunks, int64_t max_rows, int64_t width)
    : chunks_(chunks), max_rows_(max_rows), width_(width), sums_(product({chunks, max_rows, width})) {}

void Parts::add(const Kernels &kernels, int64_t rows, const Buffer<float> &bias, Vectors &x) const {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < chunks_; c++) kernels.add(x[r].f, of(c, r), width_);
    if (!bias.empty()) kernels.add(x[r].f, bias.data(), width_);
  }
}
