// The end of the residual stream: see head.h.
#include "head.h"

#include <algorithm>

namespace {

// What meets the head's rows: the vector, scaled where the model does it, and its integers.
void finish(const Context &ctx, Vector &x, int64_t width) {
  const float scale = ctx.config.logit_scale;
  for (int64_t i = 0; scale != 1 && i < width; i++) x.f[i] *= scale;
  quantize(ctx.kernels, x, width);
}

}  // namespace

Head::Head(const dejavu_model &model, int threads, int64_t max_rows) : projected_(product({max_rows, model.embed_width})), scratch_((size_t)threads) {
  for (Scratch &own : scratch_) {
    own.normed = Vectors(max_rows, model.width, model.forms());
    own.projected = Vectors(max_rows, model.embed_width, model.forms());
    own.x.resize((size_t)max_rows), own.out.resize((size_t)max_rows);
  }
}

void Head::run(const Context &ctx, const Vectors &x) {
  const dejavu_model &model = ctx.model;
  const Matrix &head = model.output_head();
  const int64_t first_row = ctx.block.first_logits, vocab_size = ctx.config.vocab_size;
  const bool projects = model.project_out.present();
  Scratch &own = scratch_[(size_t)ctx.thread];
  for (int64_t r = first_row; r < ctx.rows; r++) {
    if (ctx.config.final_norm)
      normalize(ctx.kernels, model, model.final_norm, x[r].f, own.normed[r].f);
    else
      std::copy_n(x[r].f, ctx.width, own.normed[r].f);
    projects ? quantize(ctx.kernels, own.normed[r], ctx.width) : finish(ctx, own.normed[r], ctx.width);
  }
  if (projects) {
    const int64_t begin = ctx.share(ctx.config.embed_size, TILE), end = ctx.share_end(ctx.config.embed_size, TILE);
    for (int64_t r = first_row; r < ctx.rows; r++)
      dots(ctx.kernels, model.project_out, own.normed[r], nullptr, begin, end - begin, projected_.data() + r * model.embed_width + begin);
    ctx.pool.barrier();
    for (int64_t r = first_row; r < ctx.rows; r++) {
      std::copy_n(projected_.data() + r * model.embed_width, model.embed_width, own.projected[r].f);
      finish(ctx, own.projected[r], model.embed_width);
    }
  }
  const Vectors &in = projects ? own.projected : own.normed;
  if (screen.present() && ctx.block.sparse && !ctx.block.full_head) {
    for (int64_t r = first_row; r < ctx.rows; r++) screen.score(ctx, in[r], r);
    ctx.pool.barrier();
    for (int64_t r = first_row; r < ctx.rows; r++) screen.write_logits(ctx, in[r], r);
    return;
  }
  const int64_t begin = ctx.share(vocab_size, TILE), end = ctx.share_end(vocab_size, TILE);
  bool finite = true;
  for (int64_t tile = begin; tile < end; tile += TILE) {
    const int64_t count = std::min(TILE, end - tile), tokens = ctx.rows - first_row;
    for (int64_t t = 0; t < tokens; t++) own.x[(size_t)t] = &in[first_row + t], own.out[(size_t)t] = ctx.block.logits + t * vocab_size + tile;
    products(ctx.kernels, head, {own.x.data(), own.out.data(), tokens}, tile, count, ctx.after(head, tile, count));
    for (int64_t t = 0; t < tokens; t++) {
      if (ctx.config.logit_cap > 0) ctx.kernels.cap(own.out[(size_t)t], count, ctx.config.logit_cap);
      finite = finite && ctx.kernels.finite(own.out[(size_t)t], count);
    }
  }
  if (!finite) ctx.finite.store(false);
}
