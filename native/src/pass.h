// One thread's part of one block of tokens through the whole model: see engine.h. Computation in pass.cpp and select.cpp.
#pragma once
#include <chrono>

#include "engine.h"

// What is prefetched while rows are computed: `bytes` of each listed row later on, or, of rows in order, from `next` on.
struct Fetch {
  int64_t bytes = 0;
  const unsigned char *next = nullptr;
};

// The rows of a matrix in memory of its own that come after rows [first, first + count): as many again.
inline Fetch rows_after(const Matrix &matrix, int64_t first, int64_t count) {
  const int64_t stop = first + count, rows = stop + count <= matrix.rows ? count : matrix.rows - stop;
  return {rows * matrix.stride, matrix.data + stop * matrix.stride};
}

// What of a layer's activations lies in engine.activated before its MLP runs.
enum class Known { NOTHING, GATES, ALL };

class Pass {
 public:
  Pass(dejavu_engine &engine, const dejavu_block &block, int thread);
  void run();

 private:
  // pass.cpp: the layers
  void embed();
  void attention_input(int64_t layer);
  void after_attention(int64_t layer);
  void after_mlp(int64_t layer);
  void output();

  // attention.cpp
  void project_heads(int64_t layer);
  void attend(int64_t layer);
  // Number of a head's vector among those of a pool.
  int64_t cache_row(int64_t layer, int64_t row, int64_t group, int64_t position) const;
  // Vectors of a pool that lie side by side; next: as many that are computed next, to be fetched, or none.
  RowList cache_rows(const void *pool, int64_t first, int64_t count, const unsigned char *next) const;
  void store(const float *head, void *pool, float *scales, int64_t at) const;
  void place_head(int64_t layer, int64_t unit);
  void norm_head(const Buffer<float> &weight, float *head) const;
  void rotate(int64_t row, float *head) const;

  // mlp.cpp
  void mlp(int64_t layer);
  int64_t eighths_in_order(Known known) const;
  void fetch_neurons(int64_t layer, int64_t part, int64_t parts) const;
  void neurons(const Layer &layer, Known known, int64_t row, const int32_t *idx, int64_t first, int64_t count, bool skip_zeros, float *y,
               const int32_t *kept = nullptr, int64_t num_kept = 0);

  // inputs.cpp
  void keep_inputs(int64_t layer, int point, Vectors &x, Kept &kept) const;
  void sum_columns(const Matrix &panel, const Kept &kept);
  void project_inputs(int64_t layer);
  void activate_inputs(int64_t layer, int64_t chunk);
  void add_kept_outputs(int64_t layer, int64_t row, int64_t head, float *mixed, float *part);
  void report_inputs(int64_t layer) const;
  void count_inputs(int64_t layer) const;
  bool selects(int64_t layer, int point) const { return block.sparse && engine.selectors[(size_t)layer].inputs[point].present(); }

  // gate.cpp
  void select_by_gate(int64_t layer, int64_t chunk);

  // select.cpp
  void select_groups(int64_t layer);
  void select_neurons(int64_t layer, int lookahead);
  void scores(const Predictor &predictor, const Vector &x, int64_t first, int64_t count);
  void report(int64_t layer);
  int64_t sum_of_chunks(const Buffer<int64_t> &of_chunk) const;

  // screen.cpp
  void shortlist(const Vector &x, int64_t row);
  void exact_logits(const Vector &x, int64_t row);

  // profile.cpp: what the block took and read, by thread 0, where it is asked for
  void begin_laps();
  void lap(int op);
  void note_fired(const int32_t *idx, int64_t count);
  void note_layer(int64_t layer);
  void count_layer(int64_t layer);

  // Small helpers, in pass.cpp. `dots`: out[k] = row_k x * scale + bias, rows first + 0, 1, 2... or idx[k].
  void dots(const Matrix &matrix, const Vector &x, const int32_t *idx, int64_t first, int64_t count, float *out, Fetch fetch = {}) const;
  void axpys(const Matrix &matrix, const float *coef, const int32_t *idx, int64_t first, int64_t count, float *y, Fetch fetch = {}) const;
  RowList list_of(const Matrix &matrix, const int32_t *idx, int64_t first, int64_t count, Fetch fetch) const;
  void norm(const Norm &norm, const float *x, float *y) const;
  void quantize(Vector &vector, int64_t width) const;
  void quantize_for_layer(Vector &vector) const;
  void add_parts(const Buffer<float> &parts, int64_t chunks, const Buffer<float> &bias);
  bool sparse_mlp(int64_t layer) const { return block.sparse && (selects_neurons(layer) || selects(layer, DEJAVU_AT_DOWN)); }
  bool selects_neurons(int64_t layer) const { return by_gate(layer) || (block.sparse && engine.selectors[(size_t)layer].mlp.present()); }
  bool by_gate(int64_t layer) const { return block.sparse && engine.selectors[(size_t)layer].gate >= 0; }
  bool sparse_heads(int64_t layer) const { return block.sparse && engine.selectors[(size_t)layer].heads.present(); }
  // This thread's share of `total` chunks or rows.
  int64_t share(int64_t total, int64_t unit = 1) const;
  int64_t share_end(int64_t total, int64_t unit = 1) const;

  dejavu_engine &engine;
  const dejavu_model &model;
  const dejavu_config &config;
  const Kernels &kernels;
  const dejavu_block &block;
  Scratch &own;
  const int thread, threads;
  const int64_t rows, width, cache_bytes;  // cache_bytes: of a head's vector
  std::chrono::steady_clock::time_point last;  // the end of the last lap
};

// Rows of a matrix that are read for one token after another while they are in the first-level cache.
constexpr int64_t TILE = 16;

// How many rows early a row is fetched: about 24 KB, in the groups of four that the kernels take.
inline int64_t rows_ahead(const Matrix &matrix) {
  const int64_t rows = 24576 / matrix.row_bytes() / 4 * 4;
  return rows < 4 ? 4 : rows > TILE ? TILE : rows;
}

// Rows in order come from memory about 1.5 times as fast as selected ones (docs/log.md): above this share all are read, and what the
// others are multiplied by set to zero, which leaves the sum as it is, bit for bit.
inline bool dense_is_faster(int64_t selected, int64_t total, int64_t eighths = 5) { return 8 * selected > eighths * total; }
