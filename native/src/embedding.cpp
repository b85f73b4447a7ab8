// The start of the residual stream: see embedding.h.
#include "embedding.h"

Embedding::Embedding(const dejavu_model &model, int threads, int64_t max_rows) {
  for (int thread = 0; thread < threads; thread++) embedded_.emplace_back(max_rows, model.embed_width, model.forms());
  projected_ = Buffer<float>(product({max_rows, model.width}));
}

void Embedding::run(const Context &ctx, Vectors &x) {
  const dejavu_model &model = ctx.model;
  const Matrix &table = model.embed;
  const bool projects = model.project_in.present();
  for (int64_t r = 0; r < ctx.rows; r++) {
    Vector &to = projects ? embedded_[(size_t)ctx.thread][r] : x[r];
    std::fill(to.f, to.f + table.width, 0.0f);
    float coef = ctx.config.embed_scale;
    table.scale_rows(nullptr, ctx.block.token[r], 1, &coef);
    axpys(ctx.kernels, table, &coef, nullptr, ctx.block.token[r], 1, to.f);
    if (projects) quantize(ctx.kernels, to, table.width);
  }
  if (projects) {
    const int64_t begin = ctx.share(ctx.config.hidden_size, TILE), end = ctx.share_end(ctx.config.hidden_size, TILE);
    for (int64_t r = 0; r < ctx.rows; r++)
      dots(ctx.kernels, model.project_in, embedded_[(size_t)ctx.thread][r], nullptr, begin, end - begin, projected_.data() + r * ctx.width + begin);
    ctx.pool.barrier();
    for (int64_t r = 0; r < ctx.rows; r++) std::copy_n(projected_.data() + r * ctx.width, ctx.width, x[r].f);
  }
  if (ctx.config.rope) return;
  for (int64_t r = 0; r < ctx.rows; r++) {
    const int64_t row = ctx.block.position[r] + ctx.config.position_offset;
    ctx.kernels.add(x[r].f, (const float *)(model.position.data + row * model.position.stride), ctx.width);
  }
}
