// Runs random models of many shapes through the C interface: for the sanitizers, and for what must hold whatever the shape.
//
// For each shape, dtype of weights (one, or one for each matrix) and of the cache, way to select (predictors, gates, inputs), with and without a screen: a prefill, then sparse steps of a batch with one and
// with several threads (equal bit for bit), every logit written, no page of another sequence touched; instruction sets agree where the
// same neurons are selected. Then bad input: a status, never a crash.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../dejavu_native.h"

namespace {

std::mt19937 random_bits(1);

#define EXPECT(condition)                                                                  \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::printf("line %d: %s fails: %s\n", __LINE__, #condition, dejavu_error());         \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

bool of_blocks(int dtype) { return dtype >= DEJAVU_Q8_0; }

// Bytes of a block, and where in it fp16 scales and minima lie. As bf16 the same bits are about 2^-80: what is added up is no less finite.
struct Block { int64_t values, bytes, scales, end; };
Block block_of(int dtype) {
  const Block blocks[] = {{32, 34, 0, 2}, {32, 18, 0, 2}, {32, 20, 0, 4}, {32, 22, 0, 2}, {32, 24, 0, 4}, {256, 144, 0, 4}, {256, 176, 0, 4}, {256, 210, 208, 210}, {32, 19, 0, 2}, {32, 19, 0, 2}, {32, 35, 0, 2}, {32, 35, 0, 2}};
  return blocks[dtype - DEJAVU_Q8_0];
}

// One matrix with its own memory, every fifth with its rows in an order of their own. by_input: o or down, which fp16, bf16 and blocks hold by output.
struct Values {
  Values(int64_t rows, int64_t columns, int dtype, bool biased, bool by_input = false) : scale((size_t)rows), bias((size_t)rows) {
    const bool transposed = by_input && (dtype == DEJAVU_BF16 || dtype == DEJAVU_FP16 || of_blocks(dtype));
    if (transposed) std::swap(rows, columns);
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt((float)columns));
    const size_t size = (size_t)(rows * columns);
    for (auto &value : bias) value = normal(random_bits);
    const void *data = nullptr, *scales = nullptr;
    if (dtype == DEJAVU_FP32) {
      floats.resize(size);
      for (auto &value : floats) value = normal(random_bits);
      data = floats.data();
    } else if (dtype == DEJAVU_BF16) {
      for (size_t i = 0; i < size; i++) {
        const float value = normal(random_bits);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        halves.push_back((uint16_t)(bits >> 16));
      }
      data = halves.data();
    } else if (dtype == DEJAVU_FP16) {
      for (size_t i = 0; i < size; i++) halves.push_back(fp16(columns < 64 ? 11 : 9));
      data = halves.data();
    } else if (dtype == DEJAVU_INT8) {
      for (size_t i = 0; i < size; i++) bytes.push_back((uint8_t)((int)(random_bits() % 255) - 127));
      for (auto &value : scale) value = 0.01f / std::sqrt((float)columns);
      data = bytes.data(), scales = scale.data();
    } else if (dtype == DEJAVU_INT4) {
      for (int64_t i = 0; i < rows * ((columns + 1) / 2); i++) bytes.push_back((uint8_t)random_bits());
      for (int64_t g = 0; g < rows * ((columns + 31) / 32); g++) halves.push_back(fp16(columns < 64 ? 9 : 7));
      data = bytes.data(), scales = halves.data();
    } else {
      const Block block = block_of(dtype);
      for (int64_t b = 0; b < rows * columns / block.values; b++) {
        for (int64_t i = 0; i < block.bytes; i++) bytes.push_back((uint8_t)random_bits());
        for (int64_t at = block.scales; at < block.end; at += 2) {
          const uint16_t bits = fp16(block.values > 32 ? 2 : 6);
          std::memcpy(bytes.data() + bytes.size() - (size_t)(block.bytes - at), &bits, sizeof bits);
        }
      }
      data = bytes.data();
    }
    if (random_bits() % 5 == 0)
      for (int64_t r = 0; r < rows; r++) order.push_back((r * 7 + 3) % rows);
    matrix = {data, scales, biased ? bias.data() : nullptr, order.empty() ? nullptr : order.data(), rows, columns, dtype, transposed};
  }
  // 2^(exponent - 15) with a few bits of mantissa, of either sign.
  static uint16_t fp16(unsigned exponent) { return (uint16_t)(random_bits() % 2 << 15 | exponent << 10 | random_bits() % 1024); }
  std::vector<uint8_t> bytes;
  std::vector<float> floats, scale, bias;
  std::vector<uint16_t> halves;
  std::vector<int64_t> order;
  dejavu_matrix matrix;
};

// `dtype` where a matrix with rows of so many values can have it; another one of its bits where not.
int fitting(int dtype, int64_t columns) { return of_blocks(dtype) && columns % block_of(dtype).values != 0 ? DEJAVU_INT4 : dtype; }

// Models of several dtypes take one of these for each matrix in turn.
constexpr int MIXED = -1;
int turn = 0;
int dtype_of(int dtype, int64_t rows, int64_t columns, bool by_input = false) {
  const int all[] = {DEJAVU_Q6_K, DEJAVU_FP16, DEJAVU_Q4_K, DEJAVU_INT8, DEJAVU_Q5_1, DEJAVU_FP32, DEJAVU_Q8_0, DEJAVU_BF16, DEJAVU_Q4_1, DEJAVU_INT4, DEJAVU_Q5_K, DEJAVU_W4_FP16, DEJAVU_W8_BF16};
  return fitting(dtype == MIXED ? all[turn++ % 13] : dtype, by_input ? rows : columns);
}

void set(dejavu_model *model, int part, int64_t layer, int64_t rows, int64_t columns, int dtype, int64_t bias = 0) {
  Values values(rows, columns, dtype, bias == rows, part == DEJAVU_O);
  std::vector<float> other((size_t)bias, 0.1f);
  if (bias > 0 && bias != rows) values.matrix.bias = other.data();
  EXPECT(dejavu_model_set(model, part, layer, &values.matrix) == DEJAVU_OK);
}

dejavu_model *new_model(const dejavu_config &c, int dtype, bool biased) {
  dejavu_model *model = nullptr;
  EXPECT(dejavu_model_new(&c, &model) == DEJAVU_OK);
  const int64_t d = c.hidden_size, f = c.intermediate_size, q = c.num_heads * c.head_dim, k = c.num_kv_heads * c.head_dim;
  const auto of = [&](int64_t rows, int64_t columns, bool by_input = false) { return dtype_of(dtype, rows, columns, by_input); };
  set(model, DEJAVU_EMBED, -1, c.vocab_size, c.embed_size, of(c.vocab_size, c.embed_size));
  const bool special = c.rotary_factor != 1;  // heads rotated in part, and normed
  const bool gemma = c.residual_scale != 1;      // norms of what blocks add, windows
  if (c.rope) set(model, DEJAVU_INV_FREQ, -1, 1, special ? c.head_dim / 4 : c.head_dim / 2, DEJAVU_FP32);
  else set(model, DEJAVU_POSITION, -1, c.max_positions + c.position_offset, d, DEJAVU_FP32);
  if (c.rope && gemma) set(model, DEJAVU_LOCAL_INV_FREQ, -1, 1, c.head_dim / 2, DEJAVU_FP32);
  if (c.embed_size != d) {
    set(model, DEJAVU_PROJECT_IN, -1, d, c.embed_size, of(d, c.embed_size));
    set(model, DEJAVU_PROJECT_OUT, -1, c.embed_size, d, of(c.embed_size, d));
  }
  if (!c.tied_head) set(model, DEJAVU_HEAD, -1, c.vocab_size, c.embed_size, of(c.vocab_size, c.embed_size));
  if (c.final_norm) set(model, DEJAVU_FINAL_NORM, -1, 1, d, DEJAVU_FP32, c.rms ? 0 : d);
  for (int64_t l = 0; l < c.num_layers; l++) {
    if (gemma && l % 2 == 0) EXPECT(dejavu_model_window(model, l, 4 + l) == DEJAVU_OK);
    if (special)
      for (int part : {DEJAVU_Q_NORM, DEJAVU_K_NORM}) set(model, part, l, 1, c.head_dim, DEJAVU_FP32);
    for (int part : {DEJAVU_NORM1, DEJAVU_NORM2, DEJAVU_NORM1_OUT, DEJAVU_NORM2_OUT})
      if (gemma || part <= DEJAVU_NORM2) set(model, part, l, 1, d, DEJAVU_FP32, c.rms ? 0 : d);
    set(model, DEJAVU_Q, l, q, d, of(q, d), biased ? q : 0);
    for (int part : {DEJAVU_K, DEJAVU_V}) set(model, part, l, k, d, of(k, d), biased ? k : 0);
    set(model, DEJAVU_O, l, q, d, of(q, d, true), biased ? d : 0);
    const Values gate(f, d, of(f, d), biased), up(f, d, of(f, d), biased);
    Values down(f, d, of(f, d, true), false, true);
    const std::vector<float> bias((size_t)d, 0.1f);
    if (biased) down.matrix.bias = bias.data();
    EXPECT(dejavu_model_set_mlp(model, l, c.gated ? &gate.matrix : nullptr, &up.matrix, &down.matrix) == DEJAVU_OK);
  }
  return model;
}

// Logits of a prefill and of sparse steps of three sequences.
std::vector<float> run(const dejavu_model *model, const dejavu_config &c, int threads, const std::string &isa, float threshold, unsigned seed, int cache_dtype, bool screened) {
  const int64_t batch = 3, page_size = 3, per_slot = (c.max_positions + page_size - 1) / page_size, pages = batch * per_slot + 1;
  const int64_t stride = (c.head_dim + 15) / 16 * 16, pool = c.num_layers * pages * c.num_kv_heads * page_size * stride;
  dejavu_engine *engine = nullptr;
  EXPECT(dejavu_engine_new(model, threads, 8, isa.c_str(), &engine) == DEJAVU_OK);
  random_bits.seed(seed);
  const bool by_inputs = c.layout == DEJAVU_INPUT_MAJOR;
  const int64_t sizes[] = {c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size};
  for (int64_t l = 0; by_inputs && l < c.num_layers; l++)
    for (int point = 0; point < DEJAVU_POINTS; point++) {
      if ((l + point) % 5 == 4) continue;  // this one keeps all
      std::vector<float> norms;
      for (int64_t i = 0; i < sizes[point]; i++) norms.push_back((float)(random_bits() % 1000) / 1000.0f);
      EXPECT(dejavu_engine_inputs(engine, l, point, norms.data(), sizes[point], threshold) == DEJAVU_OK);
    }
  for (int64_t l = 0; c.layout == DEJAVU_GATE_APART && l < c.num_layers; l++)
    if (l != 2) EXPECT(dejavu_engine_gate(engine, l, threshold) == DEJAVU_OK);
  for (int64_t l = 0; !by_inputs && l < c.num_layers; l++)
    for (int kind : {DEJAVU_MLP, DEJAVU_HEADS}) {
      if (kind == DEJAVU_MLP && c.layout == DEJAVU_GATE_APART) continue;
      const int64_t outputs = kind == DEJAVU_MLP ? c.intermediate_size : c.num_kv_heads, rank = 5 + 70 * (l % 2);
      Values A(rank, c.hidden_size, l == 0 ? DEJAVU_FP32 : DEJAVU_INT8, false), B(outputs, rank, (int)(l % 2), true);
      EXPECT(dejavu_engine_predictor(engine, l, kind, &A.matrix, &B.matrix, threshold, l == 0 ? 0 : 1 + (int)(l % 2 && kind == DEJAVU_MLP)) == DEJAVU_OK);
    }
  if (screened) {
    std::vector<int32_t> members, sizes;  // of unequal clusters, last tokens first
    for (int64_t left = c.vocab_size, size = 1; left > 0; left -= sizes.back(), size = size % 7 + 2) sizes.push_back((int32_t)std::min(left, size));
    for (int64_t v = c.vocab_size - 1; v >= 0; v--) members.push_back((int32_t)v);
    Values centroids((int64_t)sizes.size(), c.embed_size, DEJAVU_INT8, true);
    EXPECT(dejavu_engine_screen(engine, &centroids.matrix, members.data(), sizes.data(), 1.0f / (float)c.vocab_size) == DEJAVU_OK);
  }
  const int64_t size = cache_dtype == DEJAVU_INT8 ? 1 : cache_dtype == DEJAVU_FP16 ? 2 : 4;
  std::vector<uint8_t> k((size_t)(pool * size), 0xff), v(k.size(), 0xff);  // NaN in every float type
  std::vector<float> k_scale((size_t)(pool / stride), NAN), v_scale(k_scale.size(), NAN), all;
  const bool scaled = cache_dtype == DEJAVU_INT8;
  std::vector<std::vector<int64_t>> tables((size_t)batch);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t p = 0; p < per_slot; p++) tables[(size_t)b].push_back(p * batch + b);
  for (int64_t position = 0, step = 0; position < c.max_positions; step++) {
    const bool sparse = step > 0, full_head = step % 3 == 2;
    const int64_t rows = sparse ? batch : std::min<int64_t>(8, c.max_positions);
    std::vector<int64_t> token, positions, neurons((size_t)(rows * c.num_layers)), heads(neurons.size());
    std::vector<const int64_t *> table;
    for (int64_t r = 0; r < rows; r++) {
      token.push_back((int64_t)random_bits() % c.vocab_size);
      positions.push_back(sparse ? (r == 0 ? position : step - 1) : r);
      table.push_back(tables[(size_t)(sparse ? r : 0)].data());
    }
    std::vector<float> logits((size_t)(rows * c.vocab_size), NAN);
    std::vector<uint8_t> neuron_mask((size_t)(rows * c.num_layers * c.intermediate_size), 7), group_mask((size_t)(rows * c.num_layers * c.num_kv_heads), 7);
    const int64_t widths = sizes[0] + sizes[1] + sizes[2] + sizes[3];
    std::vector<int64_t> inputs((size_t)(rows * c.num_layers * DEJAVU_POINTS), -1), unions((size_t)c.num_layers, -1), in_order(unions);
    std::vector<uint8_t> input_mask((size_t)(rows * c.num_layers * widths), 7);
    const dejavu_block block = {rows, sparse ? 0 : rows - 1, pages, page_size, stride, token.data(), positions.data(), table.data(), k.data(), v.data(),
                                scaled ? k_scale.data() : nullptr, scaled ? v_scale.data() : nullptr, cache_dtype, sparse, !sparse, full_head, logits.data(), neurons.data(), heads.data(), neuron_mask.data(), group_mask.data(), inputs.data(), input_mask.data(), unions.data(), in_order.data()};
    std::vector<int64_t> counts((size_t)((2 + DEJAVU_POINTS) * c.num_layers), -1);
    dejavu_profile profile = {{}, counts.data(), counts.data() + c.num_layers, counts.data() + 2 * c.num_layers};
    EXPECT((step % 2 ? dejavu_engine_profile(engine, &block, &profile) : dejavu_engine_run(engine, &block)) == DEJAVU_OK);
    for (int64_t l = 0; step % 2 && l < c.num_layers; l++)
      EXPECT(profile.fired[l] >= 0 && profile.fired[l] <= unions[(size_t)l] && profile.groups[l] >= 1);
    for (uint8_t bit : neuron_mask) EXPECT(bit <= 1);
    for (int64_t l = 0; l < c.num_layers; l++) {
      int64_t selected = 0;
      for (int64_t f = 0; f < c.intermediate_size; f++) {
        bool some = false;
        for (int64_t r = 0; r < rows; r++) some = some || neuron_mask[(size_t)((r * c.num_layers + l) * c.intermediate_size + f)] != 0;
        selected += some;
      }
      EXPECT(unions[(size_t)l] == selected && in_order[(size_t)l] >= 0 && in_order[(size_t)l] <= rows * c.intermediate_size);
    }
    const uint8_t *mask = input_mask.data();
    for (int64_t at = 0; at < rows * c.num_layers; at++)
      for (int point = 0; point < DEJAVU_POINTS; mask += sizes[point++]) {
        int64_t kept = 0;
        for (int64_t i = 0; i < sizes[point]; i++) {
          EXPECT(mask[i] <= 1);
          kept += mask[i];
        }
        EXPECT(kept == inputs[(size_t)(at * DEJAVU_POINTS + point)] && ((sparse && by_inputs) || kept == sizes[point]));
        if (step % 2) EXPECT(kept <= counts[(size_t)(2 * c.num_layers + at % c.num_layers * DEJAVU_POINTS + point)]);
      }
    for (size_t i = 0; i < neurons.size(); i++) EXPECT(neurons[i] >= 0 && neurons[i] <= c.intermediate_size && heads[i] >= 1 && heads[i] <= c.num_heads);
    const size_t written = (size_t)((rows - block.first_logits) * c.vocab_size);
    size_t finite = 0;
    for (size_t i = 0; i < written; i++) {
      EXPECT(std::isfinite(logits[i]) || (screened && !full_head && logits[i] == -INFINITY));
      finite += std::isfinite(logits[i]);
    }
    EXPECT(screened && sparse && !full_head ? finite >= written / (size_t)c.vocab_size && finite <= written : finite == written);
    all.insert(all.end(), logits.begin(), logits.begin() + (long)written);
    position += sparse ? 1 : rows;
  }
  for (int64_t l = 0; l < c.num_layers; l++)  // the last page belongs to nobody
    for (int64_t i = 0, bytes = c.num_kv_heads * page_size * stride * size; i < bytes; i++) EXPECT(k[(size_t)(((l + 1) * pages - 1) * bytes + i)] == 0xff);
  for (const int64_t count : {0, 1, 63, 1000, 200003}) {
    const std::vector<float> ones((size_t)count, 1.0f);
    double sum = 0.0;
    EXPECT(dejavu_engine_read(engine, ones.data(), count, &sum) == DEJAVU_OK && sum == (double)count);
  }
  dejavu_engine_free(engine);
  return all;
}

// The largest difference, in units of the root mean square.
double difference(const std::vector<float> &a, const std::vector<float> &b) {
  double largest = 0, squares = 0;
  for (size_t i = 0; i < a.size(); i++) {
    largest = std::fmax(largest, std::fabs((double)a[i] - b[i]));
    squares += (double)a[i] * a[i];
  }
  return largest / std::sqrt(squares / (double)a.size());
}

void bad_input(const dejavu_config &good, int dtype) {
  dejavu_model *model = nullptr;
  dejavu_config c = good;
  c.num_kv_heads = 0;
  EXPECT(dejavu_model_new(&c, &model) == DEJAVU_BAD_VALUE);
  for (float dejavu_config::*scale : {&dejavu_config::embed_scale, &dejavu_config::residual_scale, &dejavu_config::logit_scale}) {
    c = good;
    c.*scale = 0;
    EXPECT(dejavu_model_new(&c, &model) == DEJAVU_BAD_VALUE);
  }
  for (float dejavu_config::*cap : {&dejavu_config::attention_cap, &dejavu_config::logit_cap}) {
    c = good;
    c.*cap = NAN;
    EXPECT(dejavu_model_new(&c, &model) == DEJAVU_BAD_VALUE);
  }
  c = good;
  c.parallel = 1, c.pre_norm = 0;
  EXPECT(dejavu_model_new(&c, &model) == DEJAVU_BAD_VALUE);
  c = good;
  c.intermediate_size = c.hidden_size = c.embed_size = 2147483647;
  EXPECT(dejavu_model_new(&c, &model) == DEJAVU_OK);
  const float nothing = 0.0f;
  const dejavu_matrix huge = {&nothing, nullptr, nullptr, nullptr, c.intermediate_size, c.hidden_size, DEJAVU_FP32, 0};
  EXPECT(dejavu_model_set_mlp(model, 0, c.gated ? &huge : nullptr, &huge, &huge) == DEJAVU_NO_MEMORY);
  dejavu_model_free(model);
  EXPECT(dejavu_model_new(nullptr, &model) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_model_new(&good, &model) == DEJAVU_OK);
  dejavu_engine *engine = nullptr;
  EXPECT(dejavu_engine_new(model, 1, 8, nullptr, &engine) == DEJAVU_BAD_VALUE);  // it has no weights
  Values wrong(3, 3, DEJAVU_FP32, false);
  for (int part = DEJAVU_EMBED; part <= DEJAVU_LOCAL_INV_FREQ + 1; part++)
    for (int64_t layer : {INT64_C(-1), INT64_C(0), good.num_layers}) EXPECT(dejavu_model_set(model, part, layer, &wrong.matrix) == DEJAVU_BAD_VALUE);
  for (int64_t layer : {INT64_C(-1), INT64_C(0), good.num_layers}) EXPECT(dejavu_model_window(model, layer, layer == 0 ? 0 : 4) == DEJAVU_BAD_VALUE);
  const int64_t f = good.intermediate_size, d = good.hidden_size;
  const Values fine(f, d, DEJAVU_FP32, false);
  const dejavu_matrix *gate = good.gated ? &fine.matrix : nullptr;
  for (int64_t layer : {INT64_C(-1), good.num_layers}) EXPECT(dejavu_model_set_mlp(model, layer, gate, &fine.matrix, &fine.matrix) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_model_set_mlp(model, 0, gate, &wrong.matrix, &fine.matrix) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_model_set_mlp(model, 0, gate, &fine.matrix, &wrong.matrix) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_model_set_mlp(model, 0, good.gated ? nullptr : &fine.matrix, &fine.matrix, &fine.matrix) == DEJAVU_BAD_VALUE);
  for (int bad : {-1, (int)DEJAVU_W8_BF16 + 1, (int)DEJAVU_INT8, (int)DEJAVU_INT4, (int)DEJAVU_Q4_1, (int)DEJAVU_Q6_K}) {
    if (bad > DEJAVU_INT4 && bad <= DEJAVU_W8_BF16 && fitting(bad, d) == bad) continue;
    dejavu_matrix other = fine.matrix;  // a dtype that is none, or has scales or blocks that this has not
    other.dtype = bad;
    EXPECT(dejavu_model_set_mlp(model, 0, gate, &other, &fine.matrix) == DEJAVU_BAD_VALUE);
  }
  dejavu_matrix turned = fine.matrix;
  turned.transposed = 1;
  EXPECT(dejavu_model_set_mlp(model, 0, gate, &turned, &fine.matrix) == DEJAVU_BAD_VALUE);
  dejavu_model_free(model);
  model = new_model(good, dtype, true);
  EXPECT(dejavu_engine_new(model, 0, 8, nullptr, &engine) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_engine_new(model, 1, 8, "abacus", &engine) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_engine_new(model, 2, 8, nullptr, &engine) == DEJAVU_OK);
  EXPECT(dejavu_engine_predictor(engine, 0, DEJAVU_MLP, &wrong.matrix, &wrong.matrix, 0.0f, 0) == DEJAVU_BAD_VALUE);
  Values one_cluster(1, good.embed_size, DEJAVU_INT8, true);
  std::vector<int32_t> every;
  for (int64_t v = 0; v < good.vocab_size; v++) every.push_back((int32_t)v);
  const int32_t all = (int32_t)good.vocab_size, fewer = all - 1;
  for (float bad : {0.0f, 1.0f, -1.0f, NAN}) EXPECT(dejavu_engine_screen(engine, &one_cluster.matrix, every.data(), &all, bad) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_engine_screen(engine, &wrong.matrix, every.data(), &all, 0.1f) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_engine_screen(engine, &one_cluster.matrix, every.data(), &fewer, 0.1f) == DEJAVU_BAD_VALUE);
  every[0] = 1;  // twice
  EXPECT(dejavu_engine_screen(engine, &one_cluster.matrix, every.data(), &all, 0.1f) == DEJAVU_BAD_VALUE);
  const std::vector<float> norms((size_t)good.hidden_size, 1.0f);
  for (float bad : {-1.0f, NAN, INFINITY}) {
    EXPECT(dejavu_engine_gate(engine, 0, bad) == DEJAVU_BAD_VALUE);
    EXPECT(dejavu_engine_inputs(engine, 0, DEJAVU_AT_MLP, norms.data(), good.hidden_size, bad) == DEJAVU_BAD_VALUE);
    const std::vector<float> wrong_norms((size_t)good.hidden_size, bad);
    EXPECT(dejavu_engine_inputs(engine, 0, DEJAVU_AT_MLP, wrong_norms.data(), good.hidden_size, 0.0f) == DEJAVU_BAD_VALUE);
  }
  for (int64_t layer : {INT64_C(-1), good.num_layers}) {
    EXPECT(dejavu_engine_gate(engine, layer, 0.0f) == DEJAVU_BAD_VALUE);
    EXPECT(dejavu_engine_inputs(engine, layer, DEJAVU_AT_MLP, norms.data(), good.hidden_size, 0.0f) == DEJAVU_BAD_VALUE);
  }
  for (int point = -1; point <= DEJAVU_POINTS; point++) EXPECT(dejavu_engine_inputs(engine, 0, point, norms.data(), 0, 0.0f) == DEJAVU_BAD_VALUE);
  EXPECT(dejavu_engine_inputs(engine, 0, DEJAVU_AT_MLP, nullptr, good.hidden_size, 0.0f) == DEJAVU_BAD_VALUE);
  // The other layout's call.
  if (good.layout != DEJAVU_GATE_APART) EXPECT(dejavu_engine_gate(engine, 0, 0.0f) == DEJAVU_BAD_VALUE);
  if (good.layout != DEJAVU_INPUT_MAJOR) EXPECT(dejavu_engine_inputs(engine, 0, DEJAVU_AT_MLP, norms.data(), good.hidden_size, 0.0f) == DEJAVU_BAD_VALUE);
  std::vector<float> cache(4096), logits((size_t)good.vocab_size);
  std::vector<int64_t> counts((size_t)good.num_layers), pages = {0, 99};
  const int64_t *table = pages.data();
  struct { int64_t token, position; int cache_dtype; float *scales; } const blocks[] = {
      {-1, 0, DEJAVU_FP32, nullptr}, {good.vocab_size, 0, DEJAVU_FP32, nullptr}, {0, -1, DEJAVU_FP32, nullptr}, {0, good.max_positions, DEJAVU_FP32, nullptr},
      {0, 3, DEJAVU_FP32, nullptr}, {0, 0, DEJAVU_INT4, nullptr}, {0, 0, DEJAVU_INT8, nullptr}, {0, 0, DEJAVU_FP16, cache.data()}};
  for (const auto &bad : blocks) {
    const dejavu_block block = {1, 0, 1, 3, (good.head_dim + 15) / 16 * 16, &bad.token, &bad.position, &table, cache.data(), cache.data(), bad.scales, bad.scales,
                                bad.cache_dtype, 1, 0, 0, logits.data(), counts.data(), counts.data(), nullptr, nullptr, nullptr, nullptr, counts.data(), counts.data()};
    EXPECT(dejavu_engine_run(engine, &block) == DEJAVU_BAD_VALUE);
  }
  dejavu_engine_free(engine);
  dejavu_model_free(model);
}

}  // namespace

int main() {
  EXPECT(std::string(dejavu_layouts()).find("dejavu_matrix data:p8@0 scale:p8@8 bias:p8@16 order:p8@24 rows:i8@32 columns:i8@40 dtype:i4@48 transposed:i4@52 size:56\n") != std::string::npos);
  const dejavu_config configs[] = {
      // vocab, hidden, embed, neurons, layers, heads, kv, head_dim, context, offset | act, gated, rms, pre, parallel, final, rope, tied, layout, threads, eps, threshold | scales: of rotation, local rotation, scores, embedding, blocks, logits | caps
      {96, 32, 32, 64, 3, 4, 4, 8, 12, 2, DEJAVU_RELU, 0, 0, 1, 0, 1, 0, 1, 0, 2, 1e-5f, 0, 1, 1, 0.3f, 1, 1, 1, 0, 0},
      {97, 33, 17, 67, 3, 3, 3, 11, 13, 2, DEJAVU_RELU, 0, 0, 0, 0, 0, 0, 1, 0, 2, 1e-5f, 0, 1, 0.9f, 0.3f, 3, 0.5f, 0.7f, 2, 3},
      {51, 130, 130, 129, 4, 6, 2, 22, 14, 0, DEJAVU_SILU, 1, 1, 1, 1, 1, 1, 0, 0, 2, 1e-5f, 0, 1, 1, 0.3f, 1, 1, 1, 0, 0},
      {7, 1, 1, 1, 2, 1, 1, 2, 9, 0, DEJAVU_GELU, 1, 1, 1, 0, 1, 1, 0, 0, 2, 1e-5f, 0, 1, 1, 0.3f, 1, 1, 1, 0, 0},
      {200, 65, 65, 1000, 2, 5, 1, 16, 40, 0, DEJAVU_RELU2, 1, 1, 1, 0, 1, 1, 1, 0, 2, 1e-5f, 0, 1, 1, 0.3f, 1, 1, 1, 0, 0},
      {64, 64, 64, 7, 3, 2, 1, 32, 10, 0, DEJAVU_FATRELU, 1, 1, 1, 0, 1, 1, 1, 0, 2, 1e-5f, 0.01f, 1.2f, 0.9f, 0.2f, 3, 0.5f, 0.7f, 2, 3},
      {70, 96, 96, 224, 2, 5, 5, 32, 6, 0, DEJAVU_RELU, 1, 1, 1, 0, 1, 1, 0, 0, 2, 1e-5f, 0, 1, 1, 0.3f, 1, 1, 1, 0, 0},
      {50, 256, 256, 512, 2, 4, 2, 64, 5, 0, DEJAVU_SILU, 1, 1, 1, 0, 1, 1, 0, 0, 2, 1e-5f, 0, 1, 1, 0.1f, 1, 1, 1, 0, 0},
  };
  int runs = 0, models = 0;
  const int dtypes[] = {DEJAVU_FP32, DEJAVU_INT8, DEJAVU_BF16, DEJAVU_INT4, MIXED, DEJAVU_FP16, DEJAVU_Q8_0, DEJAVU_Q4_0, DEJAVU_Q4_1, DEJAVU_Q5_0, DEJAVU_Q5_1, DEJAVU_Q4_K, DEJAVU_Q5_K, DEJAVU_Q6_K, DEJAVU_W4_FP16, DEJAVU_W4_BF16, DEJAVU_W8_FP16, DEJAVU_W8_BF16};
  for (dejavu_config config : configs)
    for (int way = 0; way < 18 * 3; way++) {  // dtype by layout
      const int dtype = dtypes[way % 18];
      config.layout = way / 18;
      const bool for_blocks = config.hidden_size % 32 == 0 && config.hidden_size > 64;  // these two are for grids, large and slow
      if (for_blocks && dtype != MIXED && !of_blocks(dtype)) continue;
      if (of_blocks(dtype) && (config.hidden_size % block_of(dtype).values != 0 || config.intermediate_size % block_of(dtype).values != 0)) continue;
      dejavu_model *model = new_model(config, dtype, models % 2 == 0);
      const float thresholds[] = {0.0f, INFINITY, -INFINITY}, plain_thresholds[] = {0.0f, 1e30f, 0.3f};
      for (int t = 0; t < 3; t++) {
        const float threshold = (config.layout == DEJAVU_BY_NEURON ? thresholds : plain_thresholds)[t];
        const int caches[] = {DEJAVU_FP32, DEJAVU_FP16, DEJAVU_INT8}, cache = caches[(models + t) % 3];
        const bool screened = (models / 2 + t) % 2 > 0;
        std::istringstream names(dejavu_instruction_sets());
        std::vector<float> first;
        for (std::string isa; names >> isa;) {
          const auto one = run(model, config, 1, isa, threshold, 5, cache, screened), three = run(model, config, 3, isa, threshold, 5, cache, screened);
          EXPECT(one.size() == three.size() && std::memcmp(one.data(), three.data(), one.size() * sizeof(float)) == 0);
          if (first.empty()) first = one;
          // At threshold 0 a score that is rounded otherwise may select another neuron, as may a screen; a cache rounds further.
          const double limit = dtype == DEJAVU_FP32 || dtype == DEJAVU_BF16 || dtype == DEJAVU_FP16 ? 1e-3 : 2e-2;  // activations are rounded as well
          if ((std::isinf(threshold) || threshold == 1e30f) && cache == DEJAVU_FP32 && !screened) EXPECT(difference(first, one) < limit);
          runs++;
        }
      }
      dejavu_model_free(model);
      bad_input(config, dtype);
      models++;
    }
  std::printf("%d runs with %s: no error\n", runs, dejavu_instruction_sets());
  return 0;
}
