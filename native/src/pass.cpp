// The layers of a block, as one thread runs them. A layer of a pre-norm model (post-norm: the norms after the sums):
//   a = norm1 x; q, k, v = rows of a | barrier | x += o(attention) | barrier | m = norm2 x; x += down(act(up m)) | barrier
#include "pass.h"

#include <algorithm>

Pass::Pass(dejavu_engine &e, const dejavu_block &b, int t)
    : engine(e),
      model(*e.model),
      config(e.model->config),
      kernels(*e.kernels),
      block(b),
      own(*e.scratch[(size_t)t]),
      thread(t),
      threads(e.pool.threads()),
      rows(b.rows),
      width(e.model->width),
      cache_bytes(bytes_of(b.cache_dtype, e.model->head_width)) {}

int64_t Pass::share(int64_t total, int64_t unit) const { return total / unit * thread / threads * unit; }

int64_t Pass::share_end(int64_t total, int64_t unit) const { return thread + 1 == threads ? total : total / unit * (thread + 1) / threads * unit; }

RowList Pass::list_of(const Matrix &m, const int32_t *idx, int64_t first, int64_t count, Fetch fetch) const {
  return {m.data + (idx == nullptr ? first * m.stride : 0), m.stride, idx, count, fetch.bytes, rows_ahead(m), fetch.next};
}

void Pass::dots(const Matrix &m, const Vector &x, const int32_t *idx, int64_t first, int64_t count, float *out, Fetch fetch) const {
  if (count == 0) return;
  const RowList list = list_of(m, idx, first, count, fetch);
  switch (m.dtype) {
    case DEJAVU_INT4: kernels.dots_i4(list, x.groups, m.width, out); break;
    case DEJAVU_INT8: x.q == nullptr ? kernels.dots_i8(list, x.f, m.width, out) : kernels.dots_i8_i16(list, x.q, x.scale, m.width, out); break;
    case DEJAVU_BF16: kernels.dots_bf16(list, x.f, m.width, out); break;
    default: kernels.dots_f32(list, x.f, m.width, out);
  }
  m.scale_rows(idx, first, count, out);
  if (!m.bias.empty())
    for (int64_t k = 0; k < count; k++) out[k] += m.bias[idx == nullptr ? first + k : idx[k]];
}

void Pass::axpys(const Matrix &m, const float *coef, const int32_t *idx, int64_t first, int64_t count, float *y, Fetch fetch) const {
  if (count == 0) return;
  const RowList list = list_of(m, idx, first, count, fetch);
  switch (m.dtype) {
    case DEJAVU_INT4: return kernels.axpys_i4(list, coef, m.width, y);
    case DEJAVU_INT8: return kernels.axpys_i8(list, coef, m.width, y);
    case DEJAVU_BF16: return kernels.axpys_bf16(list, coef, m.width, y);
    default: return kernels.axpys_f32(list, coef, m.width, y);
  }
}

void Pass::norm(const Norm &norm, const float *x, float *y) const {
  if (config.rms)
    kernels.rms_norm(x, norm.weight.data(), config.norm_eps, config.hidden_size, width, y);
  else
    kernels.layer_norm(x, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(), config.norm_eps, config.hidden_size, width, y);
}

void Pass::quantize(Vector &vector, int64_t count) const {
  if (vector.groups.q != nullptr) kernels.group(vector.f, count, vector.groups);
  if (vector.q != nullptr) vector.scale = kernels.quantize(vector.f, count, int16_limit(count), vector.q);
}

// The input of a layer's matrices; input-major ones take it as it is.
void Pass::quantize_for_layer(Vector &vector) const {
  if (!model.input_major()) quantize(vector, width);
}

// x += every chunk's part, in order, and the bias.
void Pass::add_parts(const Buffer<float> &parts, int64_t chunks, const Buffer<float> &bias) {
  for (int64_t r = 0; r < rows; r++) {
    float *x = own.x[r].f;
    for (int64_t c = 0; c < chunks; c++) kernels.add(x, parts.data() + (c * engine.max_rows + r) * width, width);
    if (!bias.empty()) kernels.add(x, bias.data(), width);
  }
}

void Pass::run() {
  begin_laps();
  embed();
  for (int64_t layer = 0; layer < config.num_layers; layer++) {
    attention_input(layer);
    project_heads(layer);
    engine.pool.barrier();
    attend(layer);
    engine.pool.barrier();
    lap(DEJAVU_OP_ATTENTION);
    after_attention(layer);
    mlp(layer);
    engine.pool.barrier();
    lap(DEJAVU_OP_MLP);
    report(layer);
    after_mlp(layer);
    note_layer(layer);
  }
  lap(DEJAVU_OP_OTHER);
  output();
  lap(DEJAVU_OP_HEAD);
}

void Pass::embed() {
  const Matrix &table = model.embed;
  const bool projects = model.project_in.present();
  for (int64_t r = 0; r < rows; r++) {
    Vector &to = projects ? own.projected[r] : own.x[r];
    std::fill(to.f, to.f + table.width, 0.0f);
    float coef = 1.0f;
    table.scale_rows(nullptr, block.token[r], 1, &coef);
    axpys(table, &coef, nullptr, block.token[r], 1, to.f);
    if (projects) quantize(to, table.width);
  }
  if (projects) {
    const int64_t begin = share(config.hidden_size, TILE), end = share_end(config.hidden_size, TILE);
    for (int64_t r = 0; r < rows; r++)
      dots(model.project_in, own.projected[r], nullptr, begin, end - begin, engine.residual.data() + r * width + begin);
    engine.pool.barrier();
    for (int64_t r = 0; r < rows; r++) std::copy_n(engine.residual.data() + r * width, width, own.x[r].f);
  }
  if (!config.rope)
    for (int64_t r = 0; r < rows; r++)
      kernels.add(own.x[r].f, (const float *)(model.position.data + (block.position[r] + config.position_offset) * model.position.stride), width);
}

void Pass::attention_input(int64_t layer) {
  for (int64_t r = 0; r < rows; r++) {
    if (config.pre_norm)
      norm(model.layers[(size_t)layer].norm1, own.x[r].f, own.attention_in[r].f);
    else
      std::copy_n(own.x[r].f, width, own.attention_in[r].f);
    quantize_for_layer(own.attention_in[r]);
  }
  if (model.input_major()) keep_inputs(layer, DEJAVU_AT_ATTENTION, own.attention_in, own.attention_kept);
  lap(DEJAVU_OP_OTHER);
  select_groups(layer);
  select_neurons(layer, 2);
  select_neurons(layer, 1);
  lap(DEJAVU_OP_PREDICTOR);
}

void Pass::after_attention(int64_t layer) {
  const Layer &weights = model.layers[(size_t)layer];
  add_parts(engine.attention_parts, engine.head_chunks, weights.o_bias);
  for (int64_t r = 0; r < rows; r++) {
    float *x = own.x[r].f, *m = own.mlp_in[r].f;
    norm(config.pre_norm ? weights.norm2 : weights.norm1, x, m);
    if (!config.pre_norm) std::copy_n(m, width, x);
    quantize_for_layer(own.mlp_in[r]);
  }
  if (model.input_major()) keep_inputs(layer, DEJAVU_AT_MLP, own.mlp_in, own.mlp_kept);
  lap(DEJAVU_OP_OTHER);
  select_neurons(layer, 0);
  lap(DEJAVU_OP_PREDICTOR);
}

void Pass::after_mlp(int64_t layer) {
  const Layer &weights = model.layers[(size_t)layer];
  add_parts(engine.mlp_parts, engine.neuron_chunks, weights.down_bias);
  if (config.pre_norm) return;
  for (int64_t r = 0; r < rows; r++) {
    norm(weights.norm2, own.x[r].f, own.final_in[r].f);
    std::copy_n(own.final_in[r].f, width, own.x[r].f);
  }
}

void Pass::output() {
  const bool projects = model.project_out.present();
  const Matrix &head = model.output_head();
  for (int64_t r = block.first_logits; r < rows; r++) {
    if (config.final_norm)
      norm(model.final_norm, own.x[r].f, own.final_in[r].f);
    else
      std::copy_n(own.x[r].f, width, own.final_in[r].f);
    quantize(own.final_in[r], width);
  }
  if (projects) {
    const int64_t begin = share(config.embed_size, TILE), end = share_end(config.embed_size, TILE);
    for (int64_t r = block.first_logits; r < rows; r++)
      dots(model.project_out, own.final_in[r], nullptr, begin, end - begin, engine.projected.data() + r * model.embed_width + begin);
    engine.pool.barrier();
    for (int64_t r = block.first_logits; r < rows; r++) {
      std::copy_n(engine.projected.data() + r * model.embed_width, model.embed_width, own.projected[r].f);
      quantize(own.projected[r], model.embed_width);
    }
  }
  const auto input = [&](int64_t r) -> const Vector & { return projects ? own.projected[r] : own.final_in[r]; };
  if (engine.screen.count > 0) {
    for (int64_t r = block.first_logits; r < rows; r++) shortlist(input(r), r);
    engine.pool.barrier();
    for (int64_t r = block.first_logits; r < rows; r++) exact_logits(input(r), r);
    return;
  }
  const int64_t begin = share(config.vocab_size, TILE), end = share_end(config.vocab_size, TILE);
  bool finite = true;
  for (int64_t tile = begin; tile < end; tile += TILE) {
    const int64_t count = std::min(TILE, end - tile);
    for (int64_t r = block.first_logits; r < rows; r++) {
      float *out = block.logits + (r - block.first_logits) * config.vocab_size + tile;
      dots(head, input(r), nullptr, tile, count, out, rows == 1 ? rows_after(head, tile, count) : Fetch());
      finite = finite && kernels.finite(out, count);
    }
  }
  if (!finite) engine.finite.store(false);
}
