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

void Matrix::fill_columns(const dejavu_matrix &source, int64_t from, int64_t count, int64_t first) {
  const auto transpose = [&](auto *to, const auto *values) {  // a block of outputs at a time: whole cache lines are written
    const int64_t step = stride / (int64_t)sizeof(*to);
    for (int64_t block = 0; block < count; block += PAD)
      for (int64_t i = 0; i < rows; i++)
        for (int64_t o = block; o < std::min(block + PAD, count); o++) to[i * step + first + o] = values[(from + o) * rows + i];
  };
  switch (dtype) {
    case DEJAVU_INT8: transpose((int8_t *)data, (const int8_t *)source.data); break;
    case DEJAVU_BF16: transpose((uint16_t *)data, (const uint16_t *)source.data); break;
    default: transpose((float *)data, (const float *)source.data);
  }
  const auto by_column = [&](Buffer<float> &to, const float *values) {
    if (values == nullptr) return;
    if (to.empty()) to = Buffer<float>(width);
    std::copy_n(values + from, count, to.data() + first);
  };
  by_column(scale, (const float *)source.scale);
  by_column(bias, source.bias);
}

// Enough chunks to share among threads, few enough that adding them up stays cheap. A power of two.
int64_t chunks_of_neurons(const dejavu_config &c) {
  const int64_t target = std::max(c.intermediate_size * c.hidden_size >> 17, std::min<int64_t>(c.intermediate_size / 16, 8));
  int64_t chunks = 1;
  while (chunks * 2 <= target && chunks < 32) chunks *= 2;
  return chunks;
}

dejavu_model::dejavu_model(const dejavu_config &given) : config(given) {
  check_config(config);
  width = round_up(config.hidden_size, PAD);
  embed_width = round_up(config.embed_size, PAD);
  head_width = round_up(config.head_dim, HEAD_PAD);
  layers.resize((size_t)config.num_layers);
  for (Layer &layer : layers) {
    if (input_major()) {
      make_panels(layer);
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

void dejavu_model::make_panels(Layer &layer) {
  const int64_t heads = config.num_heads + 2 * config.num_kv_heads, groups = std::max<int64_t>(std::min<int64_t>(heads, 4), heads / 4);
  const int64_t chunks = chunks_of_neurons(config), matrices = config.gated ? 2 : 1;
  layer.head_panels.resize((size_t)groups);
  for (int64_t p = 0; p < groups; p++)
    layer.head_panels[(size_t)p].allocate(arena, config.dtype, config.hidden_size, (chunk_start(heads, p + 1, groups) - chunk_start(heads, p, groups)) * config.head_dim);
  layer.neuron_panels.resize((size_t)chunks);
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t count = chunk_start(config.intermediate_size, c + 1, chunks) - chunk_start(config.intermediate_size, c, chunks);
    layer.neuron_panels[(size_t)c].allocate(arena, config.dtype, config.hidden_size, matrices * round_up(count, LANES));
  }
}

// One of q, k and v.
void dejavu_model::set_heads(Layer &layer, const dejavu_matrix &source, int64_t first_head, int64_t heads, const std::string &what) {
  const int64_t size = config.head_dim, all = config.num_heads + 2 * config.num_kv_heads, panels = (int64_t)layer.head_panels.size();
  layer.head_panels[0].check(source, heads * size, config.hidden_size, what);
  for (int64_t p = 0; p < panels; p++) {
    const int64_t begin = chunk_start(all, p, panels), from = std::max(begin, first_head), to = std::min(chunk_start(all, p + 1, panels), first_head + heads);
    if (from < to) layer.head_panels[(size_t)p].fill_columns(source, (from - first_head) * size, (to - from) * size, (from - begin) * size);
  }
}

// gate or, `second` where there is one, up.
void dejavu_model::set_neurons(Layer &layer, const dejavu_matrix &source, bool second, const std::string &what) {
  const int64_t total = config.intermediate_size, panels = (int64_t)layer.neuron_panels.size();
  layer.neuron_panels[0].check(source, total, config.hidden_size, what);
  for (int64_t c = 0; c < panels; c++) {
    const int64_t begin = chunk_start(total, c, panels), count = chunk_start(total, c + 1, panels) - begin;
    layer.neuron_panels[(size_t)c].fill_columns(source, begin, count, second ? round_up(count, LANES) : 0);
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
  const int64_t queries = c.num_heads * c.head_dim;
  const auto projection = [&](Matrix &matrix, int64_t first_head, int64_t heads, const char *what) {
    input_major() ? set_heads(layer, m, first_head, heads, what + where) : own(matrix, c.dtype, heads * c.head_dim, c.hidden_size, (what + where).c_str());
    layer.given |= UINT32_C(1) << part;
  };
  const auto of_neurons = [&](Matrix &matrix, const char *what) {
    input_major() ? set_neurons(layer, m, part == DEJAVU_UP && c.gated, what + where) : matrix.fill(m, what + where);
    layer.given |= UINT32_C(1) << part;
  };
  switch (part) {
    case DEJAVU_NORM1: return set_norm(layer.norm1, m, "norm1" + where);
    case DEJAVU_NORM2: return set_norm(layer.norm2, m, "norm2" + where);
    case DEJAVU_Q_NORM:
    case DEJAVU_K_NORM:
      require(m.data != nullptr && m.dtype == DEJAVU_FP32 && m.rows == 1 && m.columns == c.head_dim && m.bias == nullptr,
              "a norm of heads must be one fp32 row of " + std::to_string(c.head_dim) + " without a bias" + where);
      return copy_vector(part == DEJAVU_Q_NORM ? layer.q_norm : layer.k_norm, c.head_dim, (const float *)m.data, c.head_dim);
    case DEJAVU_Q: return projection(layer.q, 0, c.num_heads, "q");
    case DEJAVU_K: return projection(layer.k, c.num_heads, c.num_kv_heads, "k");
    case DEJAVU_V: return projection(layer.v, c.num_heads + c.num_kv_heads, c.num_kv_heads, "v");
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
