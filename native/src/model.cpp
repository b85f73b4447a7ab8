// Packing of weights: see model.h.
#include "model.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "packing.h"

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
  require(c.activation >= DEJAVU_RELU && c.activation <= DEJAVU_GELU_TANH, "unknown activation " + std::to_string(c.activation));
  require(c.layout >= DEJAVU_BY_NEURON && c.layout <= DEJAVU_INPUT_MAJOR, "unknown layout " + std::to_string(c.layout));
  require(c.threads >= 1 && c.threads <= 1024, "threads must lie between 1 and 1024, not " + std::to_string(c.threads));
  require(!c.parallel || c.pre_norm, "parallel blocks have norms before them");
  require(c.position_offset >= 0, "position_offset must not be negative");
  const struct { const char *name; float value; } scales[] = {
      {"embed_scale", c.embed_scale}, {"residual_scale", c.residual_scale}, {"logit_scale", c.logit_scale}};
  require(c.attention_cap >= 0 && c.logit_cap >= 0, "a cap must be 0 or positive, not " + std::to_string(std::min(c.attention_cap, c.logit_cap)));
  for (const auto &scale : scales) require(scale.value > 0, std::string(scale.name) + " must be positive, not " + std::to_string(scale.value));
}

void copy_vector(Buffer<float> &to, int64_t padded, const float *from, int64_t count) {
  Buffer<float> values(padded);
  std::memcpy(values.data(), from, (size_t)count * sizeof(float));
  to = static_cast<Buffer<float> &&>(values);
}

std::string name_of(int dtype) {
  switch (dtype) {
    case DEJAVU_FP32: return "fp32";
    case DEJAVU_FP16: return "fp16";
    case DEJAVU_BF16: return "bf16";
    case DEJAVU_INT8: return "int8";
    case DEJAVU_INT4: return "int4";
    default: return grid_of(dtype).name;
  }
}

constexpr int64_t SMALL = 1 << 18;   // values of a matrix that another thread would take longer to start for
constexpr int64_t WIDE = 8192;       // columns of a panel: of short rows the processor fetches what lies behind them

constexpr const char *NOT_FINITE = " has values that are not finite; integers cannot hold them";

int64_t stored_row(const dejavu_matrix &m, int64_t row) { return m.order == nullptr ? row : m.order[row]; }

// Bytes of one row as it is given.
int64_t given_bytes(const dejavu_matrix &m) { return has_grid(m.dtype) ? file_row_bytes(m.dtype, m.columns) : bytes_of(m.dtype, m.columns); }

const unsigned char *given_row(const dejavu_matrix &m, int64_t row) { return (const unsigned char *)m.data + stored_row(m, row) * given_bytes(m); }

const uint16_t *given_scales(const dejavu_matrix &m, int64_t row) {
  return m.scale == nullptr ? nullptr : (const uint16_t *)m.scale + stored_row(m, row) * ((m.columns + GROUP - 1) / GROUP);
}

// to[c, first + r - from] = row r of the matrix at c, for rows [from, from + count): a block of rows at a time, so that whole cache lines are written.
template <class Value> void transpose(const dejavu_matrix &m, int64_t from, int64_t count, int64_t first, unsigned char *to, int64_t stride) {
  const Value *rows[PAD];
  for (int64_t block = 0; block < count; block += PAD) {
    const int64_t here = std::min(PAD, count - block);
    for (int64_t r = 0; r < here; r++) rows[r] = (const Value *)given_row(m, from + block + r);
    for (int64_t c = 0; c < m.columns; c++) {
      Value *out = (Value *)(to + c * stride) + first + block;
      for (int64_t r = 0; r < here; r++) out[r] = rows[r][c];
    }
  }
}

void transpose(const dejavu_matrix &m, int64_t from, int64_t count, int64_t first, unsigned char *to, int64_t stride) {
  switch (bytes_of(m.dtype, 1)) {
    case 1: return transpose<uint8_t>(m, from, count, first, to, stride);
    case 2: return transpose<uint16_t>(m, from, count, first, to, stride);
    default: return transpose<uint32_t>(m, from, count, first, to, stride);
  }
}

}  // namespace

void check_matrix(const dejavu_matrix &m, int64_t rows, int64_t columns, const std::string &what, bool by_input) {
  require(m.dtype >= DEJAVU_FP32 && m.dtype <= DEJAVU_W8_BF16, what + " is of an unknown dtype " + std::to_string(m.dtype));
  require(m.data != nullptr, what + " has no data");
  require(!m.transposed || (by_input && m.dtype != DEJAVU_INT8 && m.dtype != DEJAVU_INT4), what + " cannot be transposed in " + name_of(m.dtype));
  require(!by_input || !of_blocks(m.dtype) || m.transposed, what + " must be transposed in " + name_of(m.dtype));
  if (m.transposed) std::swap(rows, columns);
  require(m.rows == rows && m.columns == columns, what + " is " + std::to_string(m.rows) + " x " + std::to_string(m.columns) + ", expected " +
                                                      std::to_string(rows) + " x " + std::to_string(columns));
  require((m.scale != nullptr) == (m.dtype == DEJAVU_INT8 || m.dtype == DEJAVU_INT4), what + " must have scales in int8 and int4, and in no other dtype");
  for (int64_t r = 0; m.order != nullptr && r < rows; r++)
    if (m.order[r] < 0) throw BadValue(what + " has a row in its order that is none: " + std::to_string(m.order[r]));
  if (of_blocks(m.dtype))
    require(columns % grid_of(m.dtype).block() == 0, what + " has rows of " + std::to_string(columns) + " values, which " + name_of(m.dtype) + " does not have: they are a multiple of " +
                                                         std::to_string(grid_of(m.dtype).block()));
  for (int64_t r = 0; m.dtype == DEJAVU_INT8 && r < rows; r++)
    if (!std::isfinite(((const float *)m.scale)[r])) throw BadValue(what + NOT_FINITE);
}

void Matrix::view(int new_dtype, int64_t new_rows, int64_t new_columns, unsigned char *new_data, int64_t new_stride) {
  dtype = new_dtype, rows = new_rows, columns = new_columns, width = round_up(new_columns, PAD);
  data = new_data, stride = new_stride;
}

void Matrix::allocate(Arena &arena, int new_dtype, int64_t new_rows, int64_t new_columns, bool new_panels) {
  const int64_t padded = round_up(new_columns, PAD), bytes = new_panels ? grid_of(new_dtype).quant_bytes(padded) : bytes_of(new_dtype, padded);
  const int64_t total = new_panels ? product({2, Panel(grid_of(new_dtype), padded).bytes(new_rows)}) / 2 : product({new_rows, bytes});
  view(new_dtype, new_rows, new_columns, arena.take(total + SLACK), bytes);
  panels = new_panels;
}

void Matrix::fill(const dejavu_matrix &source, const std::string &what, int threads) {
  if (panels) return fill_columns(source, 0, what, threads);
  std::atomic<bool> finite{true};
  if (rows * columns < SMALL) threads = 1;
  if (source.transposed) {
    in_parallel(threads, (columns + PAD - 1) / PAD, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * PAD;
      transpose(source, first, std::min(end * PAD, columns) - first, first, data, stride);
    });
  } else {
    const int64_t bytes = given_bytes(source);
    in_parallel(threads, rows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const unsigned char *row = given_row(source, r);
        unsigned char *to = data + r * stride;
        if (!has_grid(dtype)) std::memcpy(to, row, (size_t)bytes);
        else if (!pack_row(dtype, row, given_scales(source, r), columns, width, by_input, to)) finite.store(false);
      }
    });
  }
  if (!finite.load()) throw BadValue(what + NOT_FINITE);
  if (dtype == DEJAVU_INT8) {
    scale = Buffer<float>(rows);
    for (int64_t r = 0; r < rows; r++) scale[r] = ((const float *)source.scale)[stored_row(source, r)];
  }
  if (source.bias != nullptr) copy_vector(bias, rows, source.bias, rows);
}

void Matrix::fill_columns(const dejavu_matrix &source, int64_t from, const std::string &what, int threads) {
  std::atomic<bool> finite{true};
  if (rows * columns < SMALL) threads = 1;
  in_parallel(threads, (columns + OUTPUTS - 1) / OUTPUTS, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * OUTPUTS; at < std::min(end * OUTPUTS, columns); at += OUTPUTS) {
      const int64_t here = std::min(OUTPUTS, columns - at);
      if (!panels) {
        transpose(source, from + at, here, at, data, stride);
        continue;
      }
      const unsigned char *outputs[OUTPUTS];
      const uint16_t *scales[OUTPUTS];
      for (int64_t o = 0; o < here; o++) outputs[o] = given_row(source, from + at + o), scales[o] = given_scales(source, from + at + o);
      if (!pack_outputs(dtype, outputs, scales, at, here, source.columns, width, data)) finite.store(false);
    }
  });
  if (!finite.load()) throw BadValue(what + NOT_FINITE);
  if (dtype == DEJAVU_INT8) {
    scale = Buffer<float>(width);
    for (int64_t o = 0; o < columns; o++) scale[o] = ((const float *)source.scale)[stored_row(source, from + o)];
  }
  if (source.bias != nullptr) copy_vector(bias, width, source.bias + from, columns);
}

namespace {

// How many panels of the sizes 1, 2, 4 ... a number of chunks makes, at least one for each thread, none of over WIDE columns.
int64_t panels_of(int64_t chunks, int64_t columns, int threads) {
  int64_t panels = 1;
  while (panels < chunks && (panels < threads || columns / panels > WIDE)) panels *= 2;
  return panels;
}

}  // namespace

// Enough chunks to share among threads, few enough that adding them up stays cheap. A power of two.
int64_t chunks_of_neurons(const dejavu_config &c) {
  const int64_t target = std::min(c.intermediate_size / SUMMED, std::max<int64_t>(c.intermediate_size * c.hidden_size >> 17, 8));  // none is empty
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
}

Forms dejavu_model::forms() const {
  Forms forms;
  const auto meets = [&](const Matrix &matrix) {
    forms.groups = forms.groups || has_grid(matrix.dtype);
    forms.int16 = forms.int16 || has_grid(matrix.dtype) || matrix.dtype == DEJAVU_INT8;  // predictors are int8 where matrices are integers
  };
  if (input_major()) {  // the others are sums of rows
    for (const Matrix *matrix : {&output_head(), &project_in, &project_out}) meets(*matrix);
    return forms;
  }
  for (const Matrix *matrix : {&output_head(), &project_in, &project_out}) meets(*matrix);
  for (const Layer &layer : layers)
    for (const Matrix *matrix : {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.up}) meets(*matrix);
  return forms;
}

// One of q, k and v.
void dejavu_model::set_heads(Layer &layer, int part, const dejavu_matrix &source, int64_t first_head, int64_t heads, const std::string &what) {
  const int64_t size = config.head_dim, all = config.num_heads + 2 * config.num_kv_heads;
  check_matrix(source, heads * size, config.hidden_size, what);
  const int64_t panels = std::min(all, std::max<int64_t>(config.threads, (all * size + WIDE - 1) / WIDE));
  layer.head_panels.resize((size_t)panels);
  for (int64_t p = 0; p < panels; p++) {
    HeadPanel &panel = layer.head_panels[(size_t)p];
    panel.first = chunk_start(all, p, panels), panel.end = chunk_start(all, p + 1, panels);
    const int64_t from = std::max(panel.first, first_head), to = std::min(panel.end, first_head + heads);
    Matrix &columns = panel.parts[part - DEJAVU_Q];
    columns = Matrix();
    if (from >= to) continue;
    columns.allocate(arena, source.dtype, config.hidden_size, (to - from) * size, has_grid(source.dtype));
    columns.fill_columns(source, (from - first_head) * size, what, config.threads);
  }
}

// gate and up, for selection by inputs.
void dejavu_model::set_neurons(Layer &layer, const dejavu_matrix *gate, const dejavu_matrix &up, const std::string &where) {
  const int64_t total = config.intermediate_size, chunks = chunks_of_neurons(config);
  const int64_t panels = panels_of(chunks, total, config.threads), per_panel = chunks / panels;
  layer.neuron_panels.resize((size_t)panels);
  for (int64_t p = 0; p < panels; p++) {
    const int64_t begin = first_neuron(total, p * per_panel, chunks), count = first_neuron(total, (p + 1) * per_panel, chunks) - begin;
    NeuronPanel &panel = layer.neuron_panels[(size_t)p];
    const auto fill = [&](Matrix &columns, const dejavu_matrix &source, const char *name) {
      columns.allocate(arena, source.dtype, config.hidden_size, count, has_grid(source.dtype));
      columns.fill_columns(source, begin, name + where, config.threads);
    };
    if (gate != nullptr) fill(panel.gate, *gate, "gate");
    fill(panel.up, up, "up");
  }
}

// Neurons as records.
void dejavu_model::set_records(Layer &layer, const dejavu_matrix *gate, const dejavu_matrix &up, const dejavu_matrix &down, const std::string &where) {
  struct Part { Matrix *matrix; const dejavu_matrix *source; const char *name; int64_t bytes; };
  const auto part = [&](Matrix &matrix, const dejavu_matrix &source, const char *name) {
    return Part{&matrix, &source, name, round_up(bytes_of(source.dtype, width), 4)};  // whatever lies behind it is aligned
  };
  std::vector<Part> record;
  if (gate != nullptr) record.push_back(part(layer.gate, *gate, "gate"));
  record.push_back(part(layer.up, up, "up"));
  if (!in_panels(down)) record.push_back(part(layer.down, down, "down"));
  const std::vector<Part> parts = record;
  if (config.layout == DEJAVU_GATE_APART) {
    record.front().matrix->allocate(arena, record.front().source->dtype, config.intermediate_size, config.hidden_size);
    record.erase(record.begin());
  }
  int64_t bytes = 0, at = 0;
  for (const Part &each : record) bytes += each.bytes;
  unsigned char *data = record.empty() ? nullptr : arena.take(product({config.intermediate_size, bytes}) + SLACK);
  for (const Part &each : record) {
    each.matrix->view(each.source->dtype, config.intermediate_size, config.hidden_size, data + at, bytes);
    at += each.bytes;
  }
  layer.down.by_input = true;
  for (const Part &each : parts) each.matrix->fill(*each.source, each.name + where, config.threads);
}

void dejavu_model::set_mlp(int64_t index, const dejavu_matrix *gate, const dejavu_matrix &up, const dejavu_matrix &given_down) {
  Layer &layer = layer_at(index);
  const std::string where = " of layer " + std::to_string(index);
  const int64_t neurons = config.intermediate_size, size = config.hidden_size;
  require((gate != nullptr) == (config.gated != 0), config.gated ? "this model has a gate, which is missing" + where : "this model has no gate");
  if (gate != nullptr) check_matrix(*gate, neurons, size, "gate" + where);
  check_matrix(up, neurons, size, "up" + where);
  check_matrix(given_down, neurons, size, "down" + where, true);
  dejavu_matrix down = given_down;
  down.bias = nullptr;
  for (Matrix *matrix : {&layer.gate, &layer.up, &layer.down}) *matrix = Matrix();
  layer.neuron_panels.clear(), layer.has_mlp = false;
  if (input_major()) {
    set_neurons(layer, gate, up, where);
  } else {
    set_records(layer, gate, up, down, where);
  }
  if (input_major() || in_panels(down)) {
    layer.down.allocate(arena, down.dtype, neurons, size, in_panels(down));
    layer.down.by_input = true;
    layer.down.fill(down, "down" + where, config.threads);
  }
  set_output_bias(layer.down_bias, given_down);
  layer.has_mlp = true;
}

void dejavu_model::set_norm(Norm &norm, const dejavu_matrix &matrix, const std::string &what) {
  require(matrix.data != nullptr && matrix.dtype == DEJAVU_FP32 && matrix.rows == 1 && matrix.columns == config.hidden_size,
          what + " must be one fp32 row of " + std::to_string(config.hidden_size));
  copy_vector(norm.weight, width, (const float *)matrix.data, config.hidden_size);
  if (matrix.bias != nullptr) copy_vector(norm.bias, width, matrix.bias, config.hidden_size);
}

// o and down: a row per input, so their bias is one of the residual stream and not of a row.
void dejavu_model::set_output_bias(Buffer<float> &bias, const dejavu_matrix &source) {
  if (source.bias != nullptr) copy_vector(bias, width, source.bias, config.hidden_size);
}

Layer &dejavu_model::layer_at(int64_t index) {
  require(index >= 0 && index < config.num_layers, "layer " + std::to_string(index) + " is none of " + std::to_string(config.num_layers));
  return layers[(size_t)index];
}

void dejavu_model::set_window(int64_t index, int64_t window) {
  Layer &layer = layer_at(index);
  require(window >= 1, "a window holds at least 1 token, not " + std::to_string(window));
  layer.window = window;
}

void dejavu_model::set(int part, int64_t index, const dejavu_matrix &m) {
  const dejavu_config &c = config;
  const auto own = [&](Matrix &matrix, int64_t rows, int64_t columns, const std::string &what) {
    check_matrix(m, rows, columns, what);
    Matrix made;
    made.allocate(arena, m.dtype, rows, columns);
    made.fill(m, what, c.threads);
    matrix = std::move(made);
  };
  const auto rotations = [&](Rotary &made, float factor) {
    require(m.data != nullptr && m.dtype == DEJAVU_FP32 && m.rows == 1 && m.columns >= 1 && m.columns <= c.head_dim / 2,
            "inverse frequencies must be one row of at most head_dim / 2");
    copy_vector(made.inv_freq, m.columns, (const float *)m.data, m.columns);
    made.pairs = m.columns, made.factor = factor;
  };
  switch (part) {
    case DEJAVU_EMBED: return own(embed, c.vocab_size, c.embed_size, "the embedding");
    case DEJAVU_POSITION:
      require(m.dtype == DEJAVU_FP32, "the position table must be fp32");
      return own(position, c.max_positions + c.position_offset, c.hidden_size, "the position table");
    case DEJAVU_PROJECT_IN: return own(project_in, c.hidden_size, c.embed_size, "project_in");
    case DEJAVU_PROJECT_OUT: return own(project_out, c.embed_size, c.hidden_size, "project_out");
    case DEJAVU_HEAD: return own(head, c.vocab_size, c.embed_size, "the head");
    case DEJAVU_FINAL_NORM: return set_norm(final_norm, m, "the final norm");
    case DEJAVU_INV_FREQ: return rotations(rotary, c.rotary_factor);
    case DEJAVU_LOCAL_INV_FREQ: return rotations(local_rotary, c.local_rotary_factor);
    default: break;
  }
  Layer &layer = layer_at(index);
  const std::string where = " of layer " + std::to_string(index);
  const int64_t queries = c.num_heads * c.head_dim;
  const auto projection = [&](Matrix &matrix, int64_t first_head, int64_t heads, const char *what) {
    input_major() ? set_heads(layer, part, m, first_head, heads, what + where) : own(matrix, heads * c.head_dim, c.hidden_size, what + where);
    layer.given |= UINT32_C(1) << part;
  };
  switch (part) {
    case DEJAVU_NORM1: return set_norm(layer.norm1, m, "norm1" + where);
    case DEJAVU_NORM2: return set_norm(layer.norm2, m, "norm2" + where);
    case DEJAVU_NORM1_OUT: return set_norm(layer.norm1_out, m, "norm1_out" + where);
    case DEJAVU_NORM2_OUT: return set_norm(layer.norm2_out, m, "norm2_out" + where);
    case DEJAVU_Q_NORM:
    case DEJAVU_K_NORM:
      require(m.data != nullptr && m.dtype == DEJAVU_FP32 && m.rows == 1 && m.columns == c.head_dim && m.bias == nullptr,
              "a norm of heads must be one fp32 row of " + std::to_string(c.head_dim) + " without a bias" + where);
      return copy_vector(part == DEJAVU_Q_NORM ? layer.q_norm : layer.k_norm, round_up(c.head_dim, PAD), (const float *)m.data, c.head_dim);
    case DEJAVU_Q: return projection(layer.q, 0, c.num_heads, "q");
    case DEJAVU_K: return projection(layer.k, c.num_heads, c.num_kv_heads, "k");
    case DEJAVU_V: return projection(layer.v, c.num_heads + c.num_kv_heads, c.num_kv_heads, "v");
    case DEJAVU_O: {
      check_matrix(m, queries, c.hidden_size, "o" + where, true);
      dejavu_matrix rows = m;
      rows.bias = nullptr;
      Matrix made;
      made.allocate(arena, m.dtype, queries, c.hidden_size, in_panels(m));
      made.by_input = true;
      made.fill(rows, "o" + where, c.threads);
      layer.o = std::move(made);
      return set_output_bias(layer.o_bias, m);
    }
    default: throw BadValue("unknown part " + std::to_string(part));
  }
}
