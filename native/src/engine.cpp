// Construction and checks of an engine: see engine.h. The computation is in pass.cpp.
#include "engine.h"

#include <algorithm>
#include <cmath>

#include "pass.h"

namespace {

constexpr uint32_t QKV = 1u << DEJAVU_Q | 1u << DEJAVU_K | 1u << DEJAVU_V;

// The model, where all its parts are there.
const dejavu_model *complete(const dejavu_model *model) {
  const dejavu_config &c = model->config;
  require(model->embed.present(), "the model has no embedding");
  require(c.tied_head || model->head.present(), "the model has no head");
  require(c.embed_size == c.hidden_size || (model->project_in.present() && model->project_out.present()), "the model has no project_in and project_out");
  require(c.rope ? model->rotary.present() : model->position.present(), "the model has no positions");
  require(!c.final_norm || model->final_norm.present(), "the model has no final norm");
  for (const Layer &layer : model->layers)
    require((layer.given & QKV) == QKV && layer.o.present() && layer.norm1.present() && layer.norm2.present() &&
                layer.norm1_out.present() == layer.norm2_out.present() && layer.q_norm.empty() == layer.k_norm.empty() && layer.has_mlp,
            "a layer of the model lacks a part");
  return model;
}

}  // namespace

dejavu_engine::dejavu_engine(const dejavu_model *of, int threads, int64_t rows, const Kernels *with)
    : model(complete(of)),
      kernels(with),
      max_rows(rows),
      selectors((size_t)of->config.num_layers),
      embedding(*of, threads, rows),
      predictors(*of, threads),
      inputs(*of, threads, rows),
      attention(*of, threads, rows),
      mlp(*of, threads, rows),
      head(*of, threads, rows),
      selected(*of, rows),
      pool(threads) {
  for (int thread = 0; thread < threads; thread++) replicated.emplace_back(*model, max_rows);
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
  check_matrix(A, A.rows, c.hidden_size, "a predictor's A");
  check_matrix(B, mlp ? c.intermediate_size : c.num_kv_heads, A.rows, "a predictor's B");
  made.A.allocate(arena, A.dtype, A.rows, A.columns);
  made.A.fill(A, "a predictor's A");
  made.B.allocate(arena, B.dtype, B.rows, B.columns);
  made.B.fill(B, "a predictor's B");
  made.threshold = threshold, made.lookahead = lookahead;
  LayerSelectors &selector = selectors[(size_t)layer];
  require(!mlp || selector.gate < 0, "the MLP of layer " + std::to_string(layer) + " selects by its gate: it takes no predictor");
  (mlp ? selector.mlp : selector.heads) = std::move(made);
  predictors.make_room(selectors);
}

void dejavu_engine::set_gate(int64_t layer, float threshold) {
  check_layer(layer);
  require(threshold >= 0 && std::isfinite(threshold), "a gate's threshold must be 0 or more, not " + std::to_string(threshold));
  require(model->config.layout == DEJAVU_GATE_APART, "gates select neurons where they lie apart: the model has another layout");
  std::lock_guard<std::mutex> lock(mutex);
  require(!selectors[(size_t)layer].mlp.present(), "the MLP of layer " + std::to_string(layer) + " has a predictor: its gate selects nothing");
  selected.know_activated();
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

void dejavu_engine::set_screen(const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold) {
  Screen::check(*model, centroids, members, sizes, threshold);
  std::lock_guard<std::mutex> lock(mutex);
  head.screen = Screen();  // what fails below leaves none
  head.screen = Screen(*model, arena, pool.threads(), max_rows, centroids, members, sizes, threshold);
}

void dejavu_engine::check_layer(int64_t layer) const {
  const int64_t layers = model->config.num_layers;
  require(layer >= 0 && layer < layers, "layer " + std::to_string(layer) + " is none of " + std::to_string(layers));
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

bool dejavu_engine::run(const dejavu_block &block, dejavu_profile *profile) {
  std::lock_guard<std::mutex> lock(mutex);
  check(block);
  attention.prepare(*model, block);
  profiler.prepare(profile, model->config.intermediate_size);
  finite.store(true);
  pool.run([&](int thread) { run_block(*this, block, thread); });
  return finite.load();
}
