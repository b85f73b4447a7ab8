// The weights of a model, packed for decoding. In: parts, one dejavu_model_set each. Out: rows that the kernels read.
//
// Each matrix has a dtype of its own. Matrices hold a row for each output (q, k, v, up, gate, head) or each input (o, down), padded to PAD
// values; o and down of blocks that are given by output are panels (grids.h). The rows of one neuron lie side by side (gate | up |
// down, where that has rows): a selected neuron is one stream of memory. Where gates select, all gates are read:
// they lie in order, apart (gate; up | down), or the processor fetches what lies between them as well. Where inputs are selected, every
// matrix of a layer holds a row for each input; those of q, k, v, gate and up lie in panels of columns, each a matrix in memory of its
// own that one thread reads: half a row at a time would have the processor fetch the other half as well.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "../dejavu_native.h"
#include "buffer.h"
#include "kernels.h"

// A mistake of the caller: becomes DEJAVU_BAD_VALUE with this message.
struct BadValue : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool condition, const std::string &message) {
  if (!condition) throw BadValue(message);
}

// Bytes of `width` values in a row (where there is a grid: a multiple of PAD).
inline int64_t bytes_of(int dtype, int64_t width) {
  switch (dtype) {
    case DEJAVU_FP32: return 4 * width;
    case DEJAVU_BF16: case DEJAVU_FP16: return 2 * width;
    case DEJAVU_INT8: return width;
    default: return grid_of(dtype).row_bytes(width);
  }
}

// The integers that a vector becomes for the matrices that it meets: int16 times a scale for rows of int8, groups for grids.
struct Forms {
  bool int16 = false, groups = false;
};

// Rows of padded values. `width` values are read of each row; row r is data + r * stride; scale (int8) and bias by row.
struct Matrix {
  int dtype = DEJAVU_FP32;
  int64_t rows = 0, columns = 0, width = 0, stride = 0;
  unsigned char *data = nullptr;
  bool panels = false;    // rows lie in panels, and stride is that of quants
  bool by_input = false;  // rows are summed up: those of int4 are in another order then
  Buffer<float> scale, bias;

  bool present() const { return data != nullptr; }
  int64_t row_bytes() const { return panels ? stride : bytes_of(dtype, width); }
  // Where what belongs to a row and those after it begins.
  int64_t begin_of(int64_t row) const { return panels ? Panel(grid_of(dtype), width).begin_of(row) : row * stride; }
  // Memory of an arena, which must outlive the matrix; rows of `columns` padded, or panels of them.
  void allocate(Arena &arena, int dtype, int64_t rows, int64_t columns, bool panels = false);
  // Memory of others: rows `stride` bytes apart.
  void view(int dtype, int64_t rows, int64_t columns, unsigned char *data, int64_t stride);
  // As `fill`, of as many rows of a matrix from `from` on as this one has columns, one for each output: rows here are of inputs, and scale and
  // bias by column.
  void fill_columns(const dejavu_matrix &source, int64_t from, const std::string &what, int threads = 1);
  // Copies or packs values, scales and bias of what `check_matrix` let pass. Raises BadValue naming `what` where values are not finite that
  // a grid cannot hold; the matrix is then of no use.
  void fill(const dejavu_matrix &source, const std::string &what, int threads = 1);
  // values[k] *= scale of row idx[k], or of row first + k: of dtypes with a scale for each row.
  void scale_rows(const int32_t *idx, int64_t first, int64_t count, float *values) const {
    if (dtype != DEJAVU_INT8) return;
    for (int64_t k = 0; k < count; k++) values[k] *= scale[idx == nullptr ? first + k : idx[k]];
  }
};

// Raises BadValue naming `what` where a matrix is not of rows x columns (by_input: or, transposed, columns x rows), or its values are none.
void check_matrix(const dejavu_matrix &source, int64_t rows, int64_t columns, const std::string &what, bool by_input = false);
// Whether o or down is kept in panels.
inline bool in_panels(const dejavu_matrix &source) { return source.transposed && of_blocks(source.dtype); }

struct Norm {
  Buffer<float> weight, bias;  // bias empty: none
  bool present() const { return !weight.empty(); }
};

// Columns of heads [first, end), of queries, then keys, then values: of each of the three its own matrix, where it has some of them.
struct HeadPanel {
  int64_t first = 0, end = 0;
  Matrix parts[3];
};

// Columns of the neurons of some chunks.
struct NeuronPanel {
  Matrix gate, up;
};

// Rotary positions: inverse frequencies of so many pairs of a head, and a factor of what is rotated.
struct Rotary {
  Buffer<float> inv_freq;
  int64_t pairs = 0;
  float factor = 1.0f;
  bool present() const { return pairs > 0; }
};

struct Layer {
  Norm norm1, norm2, norm1_out, norm2_out;  // those of what blocks add: empty where there are none
  Matrix q, k, v, o, gate, up, down;  // neurons are records, see above
  // Input-major, in place of q, k, v, gate and up. How many there are follows the number of threads, which changes no sum.
  std::vector<HeadPanel> head_panels;
  std::vector<NeuronPanel> neuron_panels;
  int64_t window = 0;  // how many tokens a token sees, itself included; 0: all
  uint32_t given = 0;  // bits of q, k and v where they are set
  bool has_mlp = false;
  Buffer<float> o_bias, down_bias, q_norm, k_norm;  // norms of heads: empty where there are none
};

// Chunks of a sum, by the model alone: see engine.h.
int64_t chunks_of_neurons(const dejavu_config &config);
inline int64_t chunk_start(int64_t total, int64_t chunk, int64_t chunks) { return total * chunk / chunks; }
// Of neurons: where the sum of panels is cut anyway, so that it is cut alike however a chunk's rows are listed.
inline int64_t first_neuron(int64_t neurons, int64_t chunk, int64_t chunks) {
  return chunk == chunks ? neurons : chunk_start(neurons, chunk, chunks) / SUMMED * SUMMED;
}

constexpr int64_t LANES = 16;  // of any vector

struct dejavu_model {
  explicit dejavu_model(const dejavu_config &config);
  void set(int part, int64_t layer, const dejavu_matrix &matrix);
  void set_window(int64_t layer, int64_t window);
  void set_mlp(int64_t layer, const dejavu_matrix *gate, const dejavu_matrix &up, const dejavu_matrix &down);

  dejavu_config config;
  int64_t width, embed_width, head_width;  // padded sizes of the residual stream, the embedding and a head
  Arena arena;
  Matrix embed, position, project_in, project_out, head;
  Norm final_norm;
  Rotary rotary, local_rotary;  // the second of layers with a window, where they have others
  std::vector<Layer> layers;

  bool input_major() const { return config.layout == DEJAVU_INPUT_MAJOR; }
  // The first matrix of an MLP: the one that is activated.
  const Matrix &gate_of(const Layer &layer) const { return config.gated ? layer.gate : layer.up; }
  bool is_local(const Layer &layer) const { return layer.window > 0 && local_rotary.present(); }
  const Matrix &output_head() const { return config.tied_head ? embed : head; }
  // Of every vector that meets matrices of the model, once its parts are there.
  Forms forms() const;

 private:
  Layer &layer_at(int64_t index);
  void set_heads(Layer &layer, int part, const dejavu_matrix &source, int64_t first_head, int64_t heads, const std::string &what);
  void set_neurons(Layer &layer, const dejavu_matrix *gate, const dejavu_matrix &up, const std::string &where);
  void set_records(Layer &layer, const dejavu_matrix *gate, const dejavu_matrix &up, const dejavu_matrix &down, const std::string &where);
  void set_norm(Norm &norm, const dejavu_matrix &matrix, const std::string &what);
  void set_output_bias(Buffer<float> &bias, const dejavu_matrix &source);
};
