// The layers of a block, as one thread runs them. A layer of a pre-norm model (post-norm: the norms after the sums; parallel: m = norm2 x
// of the x before attention; what is added may pass a norm and a scale):
//   a = norm1 x; q, k, v = rows of a | barrier | x += o(attention) | barrier | m = norm2 x; x += down(act(up m)) | barrier
#include "pass.h"

#include <algorithm>

#include "report.h"

namespace {

// The input of a layer's matrices in the form that they meet; input-major ones take it as it is, and only what is kept.
void make_input(const Context &ctx, int64_t layer, int point, Vectors &in, Kept &kept) {
  if (ctx.model.input_major()) return InputMaps::keep(ctx, layer, point, in, kept);
  for (int64_t r = 0; r < ctx.rows; r++) quantize(ctx.kernels, in[r], ctx.width);
}

// to = norm x, or x where there is none.
void norm_or_copy(const Context &ctx, const Norm *norm, const Vectors &x, Vectors &to) {
  for (int64_t r = 0; r < ctx.rows; r++) {
    if (norm != nullptr)
      normalize(ctx.kernels, ctx.model, *norm, x[r].f, to[r].f);
    else
      std::copy_n(x[r].f, ctx.width, to[r].f);
  }
}

// x += what a block adds, which may pass a norm of its own and a scale. spare: memory of the thread's own that nothing reads any more.
template <class Part> void add(const Context &ctx, const Part &part, int64_t layer, const Norm &norm, Vectors &spare, Vectors &x) {
  const float scale = ctx.config.residual_scale;
  if (!norm.present() && scale == 1) return part.add(ctx, layer, x);
  for (int64_t r = 0; r < ctx.rows; r++) std::fill_n(spare[r].f, ctx.width, 0.0f);
  part.add(ctx, layer, spare);
  for (int64_t r = 0; r < ctx.rows; r++) {
    if (norm.present()) normalize(ctx.kernels, ctx.model, norm, spare[r].f, spare[r].f);
    ctx.kernels.axpys_f32({spare[r].f, 0, nullptr, 1, 0, 0, nullptr}, &scale, ctx.width, x[r].f);
  }
}

}  // namespace

void run_block(dejavu_engine &engine, const dejavu_block &block, int thread) {
  const dejavu_model &model = *engine.model;
  const dejavu_config &config = model.config;
  Pool &pool = engine.pool;
  Profiler &profiler = engine.profiler;
  const Context ctx = {model, config, *engine.kernels, block, engine.selectors, pool, profiler, engine.finite, thread, pool.threads(), block.rows, model.width};
  Replicated &own = engine.replicated[(size_t)thread];
  Selected &selected = engine.selected;
  Attention &attention = engine.attention;
  Mlp &mlp = engine.mlp;

  profiler.start(thread);
  engine.embedding.run(ctx, own.x);
  for (int64_t layer = 0; layer < config.num_layers; layer++) {
    const Layer &weights = model.layers[(size_t)layer];
    norm_or_copy(ctx, config.pre_norm ? &weights.norm1 : nullptr, own.x, own.attention_in);
    make_input(ctx, layer, DEJAVU_AT_ATTENTION, own.attention_in, own.attention_kept);
    profiler.lap(thread, DEJAVU_OP_OTHER);
    engine.predictors.select_groups(ctx, layer, own.attention_in, own.mlp_in, own.groups);
    engine.predictors.select_neurons(ctx, layer, 2, own.mlp_in, selected);
    engine.predictors.select_neurons(ctx, layer, 1, own.attention_in, selected);
    profiler.lap(thread, DEJAVU_OP_PREDICTOR);

    if (model.input_major())
      attention.project_kept(ctx, layer, own.attention_kept, own.groups, engine.inputs);
    else
      attention.project(ctx, layer, own.attention_in, own.groups);
    pool.barrier();
    const int64_t begin = ctx.share(attention.chunks), end = ctx.share_end(attention.chunks);
    for (int64_t chunk = begin; chunk < end; chunk++) {
      Mlp::fetch(ctx, layer, selected, chunk - begin, end - begin);
      attention.attend(ctx, layer, chunk, own.groups, engine.inputs);
    }
    pool.barrier();
    profiler.lap(thread, DEJAVU_OP_ATTENTION);

    if (config.parallel) norm_or_copy(ctx, &weights.norm2, own.x, own.mlp_in);
    add(ctx, attention, layer, weights.norm1_out, own.attention_in, own.x);
    if (!config.parallel) norm_or_copy(ctx, config.pre_norm ? &weights.norm2 : &weights.norm1, own.x, own.mlp_in);
    if (!config.pre_norm) norm_or_copy(ctx, nullptr, own.mlp_in, own.x);
    make_input(ctx, layer, DEJAVU_AT_MLP, own.mlp_in, own.mlp_kept);
    profiler.lap(thread, DEJAVU_OP_OTHER);
    engine.predictors.select_neurons(ctx, layer, 0, own.mlp_in, selected);
    profiler.lap(thread, DEJAVU_OP_PREDICTOR);

    mlp.run(ctx, layer, own.mlp_in, own.mlp_kept, selected, engine.inputs);
    pool.barrier();
    profiler.lap(thread, DEJAVU_OP_MLP);

    if (thread == 0) report_layer(ctx, layer, own, selected, mlp, engine.inputs);
    add(ctx, mlp, layer, weights.norm2_out, own.attention_in, own.x);
    if (!config.pre_norm) {
      norm_or_copy(ctx, &weights.norm2, own.x, own.attention_in);  // its memory: the next layer writes it anew
      norm_or_copy(ctx, nullptr, own.attention_in, own.x);
    }
    if (profiler.profile() != nullptr) {
      // Outside the times: the others wait, or they would read the next layer's weights while thread 0 still counts, and its share of that
      // layer would be timed alone.
      profiler.lap(thread, DEJAVU_OP_OTHER);
      if (thread == 0) profile_layer(ctx, layer, own, selected, mlp, engine.inputs);
      pool.barrier();
      profiler.resume(thread);
    }
  }
  profiler.lap(thread, DEJAVU_OP_OTHER);
  engine.head.run(ctx, own.x);
  profiler.lap(thread, DEJAVU_OP_HEAD);
}
