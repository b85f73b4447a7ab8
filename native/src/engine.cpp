// Construction and checks of an engine: see engine.h. The computation is in pass.cpp.
#include "engine.h"

#include <algorithm>
#include <cmath>

#include "pass.h"

namespace {

constexpr uint32_t QKV = 1u << DEJAVU_Q | 1u << DEJAVU_K | 1u << DEJAVU_V;

int64_t chunks_of_heads(const dejavu_config &c) { return std::min(c.num_heads, std::max<int64_t>(8, c.num_heads / 4)); }

}  // namespace

Vectors::Vectors(int64_t rows, int64_t width, bool int8, bool int4) : floats_(rows * width), ints_(int8 ? rows * width : 0) {
  const int64_t groups = round_up(width / GROUP, 8);
  if (int4) bytes_ = Buffer<int8_t>(rows * width), scales_ = Buffer<float>(2 * rows * groups);
  for (int64_t r = 0; r < rows; r++) {
    Vector vector = {floats_.data() + r * width, int8 ? ints_.data() + r * width : nullptr, 0.0f, {nullptr, nullptr, nullptr}};
    if (int4) vector.groups = {bytes_.data() + r * width, scales_.data() + 2 * r * groups, scales_.data() + (2 * r + 1) * groups};
    list_.push_back(vector);
  }
}

dejavu_engine::dejavu_engine(const dejavu_model *of, int threads, int64_t rows, const Kernels *with)
    : model(of),
      kernels(with),
      max_rows(rows),
      neuron_chunks(chunks_of_neurons(of->config)),
      head_chunks(chunks_of_heads(of->config)),
      selectors((size_t)of->config.num_layers),
      pool(threads) {
  const dejavu_config &c = model->config;
  const int64_t width = model->width;
  const bool int4 = c.dtype == DEJAVU_INT4, int8 = c.dtype == DEJAVU_INT8 || int4;  // int8: the predictors of an int4 model
  require(model->embed.present(), "the model has no embedding");
  require(c.tied_head || model->head.present(), "the model has no head");
  require(c.embed_size == c.hidden_size || (model->project_in.present() && model->project_out.present()), "the model has no project_in and project_out");
  require(c.rope ? !model->inv_freq.empty() : model->position.present(), "the model has no positions");
  require(!c.final_norm || !model->final_norm.weight.empty(), "the model has no final norm");
  const uint32_t mlp = 1u << DEJAVU_UP | (c.gated ? 1u << DEJAVU_GATE : 0u);
  for (const Layer &layer : model->layers)
    require((layer.given & QKV) == QKV && layer.o.present() && !layer.norm1.weight.empty() &&
                !layer.norm2.weight.empty() && layer.q_norm.empty() == layer.k_norm.empty() && (layer.given & mlp) == mlp && layer.down.filled(),
            "a layer of the model lacks a part");
  residual = Buffer<float>(product({rows, width}));
  query = Buffer<float>(product({rows, c.num_heads, model->head_width}));
  attention_parts = Buffer<float>(product({head_chunks, rows, width}));
  mlp_parts = Buffer<float>(product({neuron_chunks, rows, width}));
  cosine = Buffer<float>(rows * c.head_dim);
  sine = Buffer<float>(rows * c.head_dim);
  projected = Buffer<float>(rows * model->embed_width);
  for (Buffer<int32_t> &list : lists) list = Buffer<int32_t>(rows * c.intermediate_size);
  for (Buffer<int64_t> &count : counts) count = Buffer<int64_t>(rows * neuron_chunks);
  for (Buffer<int64_t> &of_chunk : unions) of_chunk = Buffer<int64_t>(neuron_chunks);
  for (Buffer<int64_t> &of_chunk : in_order) of_chunk = Buffer<int64_t>(neuron_chunks);
  if (model->input_major()) {
    for (const auto *panels : {&model->layers[0].head_panels, &model->layers[0].neuron_panels})
      for (const Matrix &panel : *panels) columns = std::max(columns, panel.width + PAD);
    activated = Buffer<float>(product({rows, c.intermediate_size}));
    output_kept = Buffer<int32_t>(product({rows, c.num_heads, c.head_dim}));
    output_counts = Buffer<int64_t>(rows * c.num_heads);
  }
  for (int thread = 0; thread < threads; thread++) {
    auto own = std::make_unique<Scratch>();
    for (Vectors *vectors : {&own->x, &own->attention_in, &own->mlp_in, &own->final_in}) *vectors = Vectors(rows, width, int8, int4);
    own->projected = Vectors(rows, model->embed_width, int8, int4);
    own->low = Vectors(1, PAD, int8, false);
    own->query = Vectors(rows, round_up(c.head_dim, PAD), false, false);
    own->values = Buffer<float>(2 * (c.intermediate_size + PAD));
    own->scores = Buffer<float>(std::max(c.intermediate_size, c.num_kv_heads) + PAD);
    own->probabilities = Buffer<float>(c.max_positions + PAD);
    own->mixed = Buffer<float>(model->head_width);
    own->cached = Buffer<int16_t>(model->head_width);
    own->fired = Buffer<int32_t>(c.intermediate_size);
    own->groups = Buffer<uint8_t>(rows * c.num_kv_heads);
    own->columns = Buffer<float>(product({rows, columns}));
    for (Kept *kept : {&own->attention_kept, &own->mlp_kept})
      if (model->input_major()) *kept = {Buffer<int32_t>(rows * c.hidden_size), Buffer<float>(rows * c.hidden_size), Buffer<float>(rows * c.hidden_size), Buffer<int64_t>(rows)};
    own->units.reserve((size_t)(c.num_heads + 2 * c.num_kv_heads));
    scratch.push_back(std::move(own));
  }
}

void dejavu_engine::set_predictor(int64_t layer, int predicted, const dejavu_matrix &A, const dejavu_matrix &B, float threshold, int lookahead) {
  const dejavu_config &c = model->config;
  check_layer(layer);
  require(predicted == DEJAVU_MLP || predicted == DEJAVU_HEADS, "unknown predictor " + std::to_string(predicted));
  const bool mlp = predicted == DEJAVU_MLP;
  require(lookahead >= 0 && lookahead <= (mlp ? 2 : 1), "unknown lookahead " + std::to_string(lookahead));
  require(!model->input_major(), "the matrices of the model are input-major: it selects inputs alone");
  require(layer > 0 || lookahead < (mlp ? 2 : 1), "layer 0 has no layer before it");
  require(A.rows > 0 && A.rows < INT64_C(1) << 31, "a predictor needs a positive rank");
  require(!std::isnan(threshold), "a predictor's threshold is NaN");
  std::lock_guard<std::mutex> lock(mutex);  // of the arena, too
  Predictor made;
  for (const dejavu_matrix *given : {&A, &B}) require(given->dtype == DEJAVU_FP32 || given->dtype == DEJAVU_INT8, "a predictor must be fp32 or int8");
  made.A.allocate(arena, A.dtype, A.rows, c.hidden_size);
  made.A.fill(A, "a predictor's A");
  made.B.allocate(arena, B.dtype, mlp ? c.intermediate_size : c.num_kv_heads, A.rows);
  made.B.fill(B, "a predictor's B");
  made.threshold = threshold, made.lookahead = lookahead;
  LayerSelectors &selector = selectors[(size_t)layer];
  require(!mlp || selector.gate < 0, "the MLP of layer " + std::to_string(layer) + " selects by its gate: it takes no predictor");
  (mlp ? selector.mlp : selector.heads) = std::move(made);
  grow_low();
}

void dejavu_engine::set_gate(int64_t layer, float threshold) {
  check_layer(layer);
  require(threshold >= 0 && std::isfinite(threshold), "a gate's threshold must be 0 or more, not " + std::to_string(threshold));
  require(model->config.layout == DEJAVU_GATE_APART, "gates select neurons where they lie apart: the model has another layout");
  std::lock_guard<std::mutex> lock(mutex);
  require(!selectors[(size_t)layer].mlp.present(), "the MLP of layer " + std::to_string(layer) + " has a predictor: its gate selects nothing");
  if (activated.empty()) activated = Buffer<float>(product({max_rows, model->config.intermediate_size}));
  selectors[(size_t)layer].gate = threshold;
}

void dejavu_engine::set_inputs(int64_t layer, int point, const float *norms, int64_t count, float threshold) {
  const dejavu_config &c = model->config;
  check_layer(layer);
  require(point >= 0 && point < DEJAVU_POINTS, "unknown point " + std::to_string(point));
  const int64_t sizes[] = {c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size};
  require(count == sizes[point], "there are " + std::to_string(count) + " norms, expected " + std::to_string(sizes[point]));
  require(threshold >= 0 && std::isfinite(threshold), "a threshold of inputs must be 0 or more, not " + std::to_string(threshold));
  for (int64_t i = 0; i < count; i++)
    if (!(norms[i] >= 0) || !std::isfinite(norms[i])) throw BadValue("norm " + std::to_string(i) + " of inputs must be 0 or more, not " + std::to_string(norms[i]));
  require(model->input_major(), "inputs are selected where matrices are input-major: the model has another layout");
  std::lock_guard<std::mutex> lock(mutex);
  InputSelector made;
  made.norms = Buffer<float>(count);
  std::copy_n(norms, count, made.norms.data());
  made.threshold = threshold;
  selectors[(size_t)layer].inputs[point] = std::move(made);
}

void dejavu_engine::check_layer(int64_t layer) const {
  const int64_t layers = model->config.num_layers;
  require(layer >= 0 && layer < layers, "layer " + std::to_string(layer) + " is none of " + std::to_string(layers));
}

// The sums of a rank, as wide as the largest rank.
void dejavu_engine::grow_low() {
  int64_t widest = std::max(PAD, screen.B.width);
  for (const LayerSelectors &each : selectors) widest = std::max({widest, each.mlp.B.width, each.heads.B.width});
  for (auto &own : scratch) own->low = Vectors(1, widest, model->config.dtype == DEJAVU_INT8 || model->config.dtype == DEJAVU_INT4, false);
}

void dejavu_engine::check(const dejavu_block &b) const {
  const dejavu_config &c = model->config;
  require(b.rows >= 1 && b.rows <= max_rows, std::to_string(b.rows) + " rows; the engine takes 1 to " + std::to_string(max_rows));
  require(b.first_logits >= 0 && b.first_logits <= b.rows, "first_logits lies outside the rows");
  require(b.page_size >= 1 && b.num_pages >= 1 && b.head_stride == model->head_width, "the cache's shape is not that of the model");
  require(b.token && b.position && b.table && b.k_pool && b.v_pool && b.logits && b.neurons && b.heads && b.unions && b.in_order, "a pointer of the block is missing");
  require(b.cache_dtype == DEJAVU_FP32 || b.cache_dtype == DEJAVU_FP16 || b.cache_dtype == DEJAVU_INT8,
          "unknown dtype of the cache " + std::to_string(b.cache_dtype));
  require((b.k_scale && b.v_scale) == (b.cache_dtype == DEJAVU_INT8) && !b.k_scale == !b.v_scale, "an int8 cache, and no other, needs scales");
  for (int64_t r = 0; r < b.rows; r++) {
    require(b.token[r] >= 0 && b.token[r] < c.vocab_size,
            "token id " + std::to_string(b.token[r]) + " is outside the model's vocabulary of " + std::to_string(c.vocab_size));
    require(b.position[r] >= 0 && b.position[r] < c.max_positions,
            "position " + std::to_string(b.position[r]) + " exceeds the model's context of " + std::to_string(c.max_positions));
    for (int64_t page = 0; page <= b.position[r] / b.page_size; page++)
      if (b.table[r][page] < 0 || b.table[r][page] >= b.num_pages)  // no message made for each page of each step
        throw BadValue("page " + std::to_string(b.table[r][page]) + " is outside the cache");
  }
}

bool dejavu_engine::run(const dejavu_block &block, dejavu_profile *wanted) {
  std::lock_guard<std::mutex> lock(mutex);
  check(block);
  const dejavu_config &c = model->config;
  if (c.rope) {
    const int64_t half = model->rotated;
    for (int64_t r = 0; r < block.rows; r++)
      for (int64_t i = 0; i < half; i++) {
        const float angle = (float)block.position[r] * model->inv_freq[i];
        cosine[r * half + i] = std::cos(angle) * c.rotary_factor, sine[r * half + i] = std::sin(angle) * c.rotary_factor;
      }
  }
  finite.store(true);
  profile = wanted;
  if (profile != nullptr && fired.empty()) fired = Buffer<uint8_t>(c.intermediate_size);
  pool.run([&](int thread) { Pass(*this, block, thread).run(); });
  return finite.load();
}
