// Packing of weights: see model.h.
#include "model.h"

#include <algorithm>
#include <cmath>

namespace {

void check_config(const dejavu_config &c) {
  const struct { const char *name; int64_t value; } sizes[] = {
      {"vocab_size", c.vocab_size},   {"hidden_size", c.hidden_size}, {"embed_size", c.embed_size},     {"intermediate_size", c.intermediate_size},
      {"num_layers", c.num_layers},   {"num_heads", c.num_heads},     {"num_kv_heads", c.num_kv_heads}, {"head_dim", c.head_dim},
      {"max_positions", c.max_positions}};
  for (const auto &size : sizes)
    require(size.value > 0 && size.value < INT64_C(1) << 31, std::string(size.name) + " must lie in 1 .. 2^31, not " + std::to_string(size.value));
  require(c.num_heads % c.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads");
  require(!c.rope || c.head_dim % 2 == 0, "head_dim must be even for rotary positions");
  require(c.dtype >= DEJAVU_FP32 && c.dtype <= DEJAVU_INT4, "unknown dtype " + std::to_string(c.dtype));
  require(c.activation >= DEJAVU_RELU && c.activation <= DEJAVU_GELU_TANH, "unknown activation " + std::to_string(c.activation));
  require(c.layout >= DEJAVU_BY_NEURON && c.layout <= DEJAVU_INPUT_MAJOR, "unknown layout " + std::to_string(c.layout));
  require(c.layout != DEJAVU_INPUT_MAJOR || c.dtype != DEJAVU_INT4, "selection by inputs is not computed in int4, whose scales belong to groups of inputs; take int8");
  require(c.position_offset >= 0, "position_offset must not be negative");
}

void copy_vector(Buffer<float> &to, int64_t padded, const float *from, int64_t count) {
  Buffer<float> values(padded);
  std::memcpy(values.data(), from, (size_t)count * sizeof(float));
  to = static_cast<Buffer<float> &&>(values);
}

const char *name_of(int dtype) {
  switch (dtype) {
    case DEJAVU_INT4: return "int4 groups with scales";
    case DEJAVU_INT8: return "int8 rows with scales";
    case DEJAVU_BF16: return "bf16";
    default: return "fp32";
  }
}

constexpr const char *NOT_FINITE = " has values that are not finite; integers cannot hold them";

// One row of int4: see kernels.h. Padding is zero.
void pack_int4(const int8_t *values, const uint16_t *scales, int64_t columns, int64_t width, const std::string &what, unsigned char *row) {
  std::memset(row, 0x88, (size_t)(width / 2));
  for (int64_t i = 0; i < columns; i++) {
    if (values[i] < -8 || values[i] > 7) throw BadValue(what + " has an int4 value outside -8 .. 7");  // no message made for each value
    const int64_t at = i / GROUP * (GROUP / 2) + i % 4 * 4 + i % GROUP / 8, shift = i / 4 % 2 * 4;
    row[at] = (unsigned char)((row[at] & ~(15 << shift)) | (values[i] + 8) << shift);
  }
  for (int64_t g = 0; g * GROUP < columns; g++)
    if ((scales[g] & 0x7c00) == 0x7c00) throw BadValue(what + NOT_FINITE);
  std::memcpy(row + width / 2, scales, (size_t)((columns + GROUP - 1) / GROUP * 2));
}

}  // namespace

void Matrix::view(int new_dtype, int64_t new_rows, int64_t new_columns, unsigned char *new_data, int64_t new_stride) {
  dtype = new_dtype, rows = new_rows, columns = new_columns, width = round_up(new_columns, PAD);
  data = new_data, stride = new_stride;
}

void Matrix::allocate(Arena &arena, int new_dtype, int64_t new_rows, int64_t new_columns) {
  const int64_t bytes = bytes_of(new_dtype, round_up(new_columns, PAD));
  view(new_dtype, new_rows, new_columns, arena.take(product({new_rows, bytes}) + (new_dtype == DEJAVU_INT4 ? INT4_SLACK : 0)), bytes);
}

void Matrix::check(const dejavu_matrix &source, int64_t expected_rows, int64_t expected_columns, const std::string &what) const {
  require(source.data != nullptr, what + " has no data");
  require(source.rows == expected_rows && source.columns == expected_columns,
          what + " is " + std::to_string(source.rows) + " x " + std::to_string(source.columns) + ", expected " + std::to_string(expected_rows) + " x " +
              std::to_string(expected_columns));
  require(source.dtype == dtype && (source.scale != nullptr) == (dtype == DEJAVU_INT8 || dtype == DEJAVU_INT4), what + " must be " + name_of(dtype));
  if (dtype != DEJAVU_INT8) return;
  for (int64_t r = 0; r < source.rows; r++) require(std::isfinite(((const float *)source.scale)[r]), what + NOT_FINITE);
}

void Matrix::fill(const dejavu_matrix &source, const std::string &what) {
  check(source, rows, columns, what);
  if (dtype == DEJAVU_INT4) {
    const int64_t groups = (columns + GROUP - 1) / GROUP;
    for (int64_t r = 0; r < rows; r++)
      pack_int4((const int8_t *)source.data + r * columns, (const uint16_t *)source.scale + r * groups, columns, width, what, data + r * stride);
  } else {
    const int64_t bytes = bytes_of(dtype, columns);
    for (int64_t r = 0; r < rows; r++) std::memcpy(data + r * stride, (const unsigned char *)source.data + r * bytes, (size_t)bytes);
  }
  if (dtype == DEJAVU_INT8) copy_vector(scale, rows, (const float *)source.scale, rows);
  filled_ = true;
  if (source.bias != nullptr) copy_vector(bias, rows, source.bias, rows);
}

void Matrix::fill_columns(const dejavu_matrix &source, int64_t first, int64_t count, const std::string &what) {
  check(source, count, rows, what);
  const auto transpose = [&](auto *to, const auto *from) {  // a block of outputs at a time: whole cache lines are written
    const int64_t step = stride / (int64_t)sizeof(*to);
    for (int64_t block = 0; block < source.rows; block += PAD)
      for (int64_t i = 0; i < rows; i++)
        for (int64_t o = block; o < std::min(block + PAD, source.rows); o++) to[i * step + first + o] = from[o * rows + i];
  };
  switch (dtype) {
    case DEJAVU_INT8: transpose((int8_t *)data, (const int8_t *)source.data); break;
    case DEJAVU_BF16: transpose((uint16_t *)data, (const uint16_t *)source.data); break;
    default: transpose((float *)data, (const float *)source.data);
  }
  if (dtype == DEJAVU_INT8) {
    if (scale.empty()) scale = Buffer<float>(width);
    std::copy_n((const float *)source.scale, source.rows, scale.data() + first);
  }
  filled_ = true;
  if (source.bias == nullptr) return;
  if (bias.empty()) bias = Buffer<float>(width);
  std::copy_n(source.bias, source.rows, bias.data() + first);
}

dejavu_model::dejavu_model(const dejavu_config &given) : config(given) {
  check_config(config);
  width = round_up(config.hidden_size, PAD);
  embed_width = round_up(config.embed_size, PAD);
  head_width = round_up(config.head_dim, HEAD_PAD);
  layers.resize((size_t)config.num_layers);
  for (Layer &layer : layers) {
    if (input_major()) {
      const int64_t heads = config.num_heads + 2 * config.num_kv_heads;
      layer.qkv.allocate(arena, config.dtype, config.hidden_size, heads * config.head_dim);
      if (config.gated) layer.gate.allocate(arena, config.dtype, config.hidden_size, config.intermediate_size);
      layer.up.allocate(arena, config.dtype, config.hidden_size, config.intermediate_size);
      layer.down.allocate(arena, config.dtype, config.intermediate_size, config.hidden_size);
      continue;
    }
    std::vector<Matrix *> record = {&layer.up, &layer.down};
    if (config.gated) record.insert(record.begin(), &layer.gate);
    if (config.layout == DEJAVU_GATE_APART) {
      record.front()->allocate(arena, config.dtype, config.intermediate_size, config.hidden_size);
      record.erase(record.begin());
    }
    const int64_t bytes = bytes_of(config.dtype, width), parts = (int64_t)record.size();
    unsigned char *data = arena.take(product({config.intermediate_size, parts, bytes}) + (config.dtype == DEJAVU_INT4 ? INT4_SLACK : 0));
    for (int64_t part = 0; part < parts; part++)
      record[(size_t)part]->view(config.dtype, config.intermediate_size, config.hidden_size, data + part * bytes, parts * bytes);
  }
}

void dejavu_model::set_norm(Norm &norm, const dejavu_matrix &matrix, const std::string &what) {
  require(matrix.data != nullptr && matrix.dtype == DEJAVU_FP32 && matrix.rows == 1 && matrix.columns == config.hidden_size,
          what + " must be one fp32 row of " + std::to_string(config.hidden_size));
  copy_vector(norm.weight, width, (const float *)matrix.data, config.hidden_size);
  if (matrix.bias != nullptr) copy_vector(norm.bias, width, matrix.bias, config.hidden_size);
}

// o and down: a row per input, so their bias is one of the residual stream and not of a row.
void dejavu_model::set_output(Matrix &matrix, Buffer<float> &bias, const dejavu_matrix &source, const std::string &what) {
  dejavu_matrix rows = source;
  rows.bias = nullptr;
  matrix.fill(rows, what);
  if (source.bias != nullptr) copy_vector(bias, width, source.bias, config.hidden_size);
}

void dejavu_model::set(int part, int64_t index, const dejavu_matrix &m) {
  const dejavu_config &c = config;
  const auto own = [&](Matrix &matrix, int dtype, int64_t rows, int64_t columns, const char *what) {
    matrix.allocate(arena, dtype, rows, columns);
    matrix.fill(m, what);
  };
  switch (part) {
    case DEJAVU_EMBED: return own(embed, c.dtype, c.vocab_size, c.embed_size, "the embedding");
    case DEJAVU_POSITION: return own(position, DEJAVU_FP32, c.max_positions + c.position_offset, c.hidden_size, "the position table");
    case DEJAVU_PROJECT_IN: return own(project_in, c.dtype, c.hidden_size, c.embed_size, "project_in");
    case DEJAVU_PROJECT_OUT: return own(project_out, c.dtype, c.embed_size, c.hidden_size, "project_out");
    case DEJAVU_HEAD: return own(head, c.dtype, c.vocab_size, c.embed_size, "the head");
    case DEJAVU_FINAL_NORM: return set_norm(final_norm, m, "the final norm");
    case DEJAVU_INV_FREQ:
      require(m.data != nullptr && m.dtype == DEJAVU_FP32 && m.rows == 1 && m.columns >= 1 && m.columns <= c.head_dim / 2,
              "inverse frequencies must be one row of at most head_dim / 2");
      rotated = m.columns;
      return copy_vector(inv_freq, m.columns, (const float *)m.data, m.columns);
    default: break;
  }
  require(index >= 0 && index < c.num_layers, "layer " + std::to_string(index) + " is none of " + std::to_string(c.num_layers));
  Layer &layer = layers[(size_t)index];
  const std::string where = " of layer " + std::to_string(index);
  const int64_t queries = c.num_heads * c.head_dim, keys = c.num_kv_heads * c.head_dim;
  // q, k, v: `first` of the rows of all three.
  const auto projection = [&](Matrix &matrix, int64_t first, int64_t rows, const char *what) {
    if (input_major())
      layer.qkv.fill_columns(m, first, rows, what + where);
    else
      own(matrix, c.dtype, rows, c.hidden_size, (what + where).c_str());
    layer.given |= UINT32_C(1) << part;
  };
  const auto of_neurons = [&](Matrix &matrix, const char *what) {
    input_major() ? matrix.fill_columns(m, 0, c.intermediate_size, what + where) : matrix.fill(m, what + where);
  };
  switch (part) {
    case DEJAVU_NORM1: return set_norm(layer.norm1, m, "norm1" + where);
    case DEJAVU_NORM2: return set_norm(layer.norm2, m, "norm2" + where);
    case DEJAVU_Q_NORM:
    case DEJAVU_K_NORM:
      require(m.data != nullptr && m.dtype == DEJAVU_FP32 && m.rows == 1 && m.columns == c.head_dim && m.bias == nullptr,
              "a norm of heads must be one fp32 row of " + std::to_string(c.head_dim) + " without a bias" + where);
      return copy_vector(part == DEJAVU_Q_NORM ? layer.q_norm : layer.k_norm, c.head_dim, (const float *)m.data, c.head_dim);
    case DEJAVU_Q: return projection(layer.q, 0, queries, "q");
    case DEJAVU_K: return projection(layer.k, queries, keys, "k");
    case DEJAVU_V: return projection(layer.v, queries + keys, keys, "v");
    case DEJAVU_O:
      layer.o.allocate(arena, c.dtype, queries, c.hidden_size);
      return set_output(layer.o, layer.o_bias, m, "o" + where);
    case DEJAVU_GATE:
      require(c.gated != 0, "this model has no gate");
      return of_neurons(layer.gate, "gate");
    case DEJAVU_UP: return of_neurons(layer.up, "up");
    case DEJAVU_DOWN: return set_output(layer.down, layer.down_bias, m, "down" + where);
    default: throw BadValue("unknown part " + std::to_string(part));
  }
}
