// The weights of a model, packed for decoding. In: parts, one dejavu_model_set each. Out: rows that the kernels read.
//
// Matrices hold a row for each output (q, k, v, up, gate, head) or each input (o, down), padded to PAD values. The rows of
// one neuron lie side by side (gate | up | down): a selected neuron is one stream of memory. Where gates select, all gates are read:
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

// Bytes of `width` values in a row (int4: a multiple of PAD).
inline int64_t bytes_of(int dtype, int64_t width) {
  switch (dtype) {
    case DEJAVU_INT4: return int4_bytes(width);
    case DEJAVU_INT8: return width;
    case DEJAVU_BF16: case DEJAVU_FP16: return 2 * width;
    default: return 4 * width;
  }
}

// Rows of padded values. `width` values are read of each row; row r is data + r * stride; scale (int8) and bias by row.
struct Matrix {
  int dtype = DEJAVU_FP32;
  int64_t rows = 0, columns = 0, width = 0, stride = 0;
  unsigned char *data = nullptr;
  Buffer<float> scale, bias;

  bool present() const { return data != nullptr; }
  bool filled() const { return filled_; }
  int64_t row_bytes() const { return bytes_of(dtype, width); }
  // Memory of an arena, which must outlive the matrix; rows of `columns` padded.
  void allocate(Arena &arena, int dtype, int64_t rows, int64_t columns);
  // Memory of others: rows `stride` bytes apart.
  void view(int dtype, int64_t rows, int64_t columns, unsigned char *data, int64_t stride);
  // Copies rows [from, from + count) of a matrix, one for each output, into columns first, first + 1, ... of this one, whose rows are of
  // inputs: scale and bias are then by column.
  void fill_columns(const dejavu_matrix &source, int64_t from, int64_t count, int64_t first);
  // Raises BadValue naming `what` where the sizes of a matrix of this dtype are not these.
  void check(const dejavu_matrix &source, int64_t expected_rows, int64_t expected_columns, const std::string &what) const;
  // Copies (int4: packs) values, scales and bias. Raises BadValue naming `what` where sizes or dtypes differ.
  void fill(const dejavu_matrix &source, const std::string &what);
  // values[k] *= scale of row idx[k], or of row first + k: of dtypes with a scale for each row.
  void scale_rows(const int32_t *idx, int64_t first, int64_t count, float *values) const {
    if (dtype != DEJAVU_INT8) return;
    for (int64_t k = 0; k < count; k++) values[k] *= scale[idx == nullptr ? first + k : idx[k]];
  }

 private:
  bool filled_ = false;
};

struct Norm {
  Buffer<float> weight, bias;  // bias empty: none
};

struct Layer {
  Norm norm1, norm2;
  Matrix q, k, v, o, gate, up, down;  // neurons are records, see above
  // Input-major, in place of q, k, v, gate and up: of some heads (queries, then keys, then values), and of a chunk's neurons (gate | up).
  std::vector<Matrix> head_panels, neuron_panels;
  uint32_t given = 0;  // bits of the parts that are set
  Buffer<float> o_bias, down_bias, q_norm, k_norm;  // norms of heads: empty where there are none
};

// Chunks of a sum, by the model alone: see engine.h.
int64_t chunks_of_neurons(const dejavu_config &config);
inline int64_t chunk_start(int64_t total, int64_t chunk, int64_t chunks) { return total * chunk / chunks; }

constexpr int64_t LANES = 16;  // of any vector: columns of a panel begin at a multiple of this

struct dejavu_model {
  explicit dejavu_model(const dejavu_config &config);
  void set(int part, int64_t layer, const dejavu_matrix &matrix);

  dejavu_config config;
  int64_t width, embed_width, head_width;  // padded sizes of the residual stream, the embedding and a head
  Arena arena;
  Matrix embed, position, project_in, project_out, head;
  Norm final_norm;
  Buffer<float> inv_freq;
  int64_t rotated = 0;  // pairs of a head
  std::vector<Layer> layers;

  bool input_major() const { return config.layout == DEJAVU_INPUT_MAJOR; }
  // The first matrix of an MLP: the one that is activated.
  const Matrix &gate_of(const Layer &layer) const { return config.gated ? layer.gate : layer.up; }
  const Matrix &output_head() const { return config.tied_head ? embed : head; }

 private:
  void make_panels(Layer &layer);
  void set_heads(Layer &layer, const dejavu_matrix &source, int64_t first_head, int64_t heads, const std::string &what);
  void set_neurons(Layer &layer, const dejavu_matrix &source, bool second, const std::string &what);
  void set_norm(Norm &norm, const dejavu_matrix &matrix, const std::string &what);
  void set_output(Matrix &matrix, Buffer<float> &bias, const dejavu_matrix &source, const std::string &what);
};
