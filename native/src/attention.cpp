// The attention of a block of tokens: see attention.h.
#include "attention.h"

#include <algorithm>
#include <cmath>

namespace {

int64_t chunks_of_heads(const dejavu_config &c) { return std::min(c.num_heads, std::max<int64_t>(8, c.num_heads / 4)); }

// Number of a head's vector among those of a pool.
int64_t cache_row(const Context &ctx, int64_t layer, int64_t row, int64_t group, int64_t position) {
  const dejavu_block &b = ctx.block;
  const int64_t page = b.table[row][position / b.page_size], offset = position % b.page_size;
  return ((layer * b.num_pages + page) * ctx.config.num_kv_heads + group) * b.page_size + offset;
}

// Vectors of a pool that lie side by side, of `bytes` each; next: as many that are computed next, to be fetched, or none.
RowList cache_rows(const void *pool, int64_t bytes, int64_t first, int64_t count, const unsigned char *next) {
  return {(const unsigned char *)pool + first * bytes, bytes, nullptr, count, next == nullptr ? 0 : count * bytes, 0, next};
}

// A head's vector, padded with zeros, into the cache: as it is, rounded, or as int8 times a scale (NaN where it is not finite).
void store(const Context &ctx, const float *head, void *pool, float *scales, int64_t at, int16_t *integers) {
  const int64_t n = ctx.model.head_width;
  if (ctx.block.cache_dtype == DEJAVU_FP32) {
    std::copy_n(head, n, (float *)pool + at * n);
  } else if (ctx.block.cache_dtype == DEJAVU_FP16) {
    ctx.kernels.narrow(head, n, (half *)pool + at * n);
  } else {
    scales[at] = ctx.kernels.quantize(head, n, 127.0f, integers);
    int8_t *to = (int8_t *)pool + at * n;
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)integers[i];
  }
}

}  // namespace

Attention::Attention(const dejavu_model &model, int threads, int64_t max_rows)
    : chunks(chunks_of_heads(model.config)),
      query_(product({max_rows, model.config.num_heads, model.head_width})),
      parts_(chunks, max_rows, model.width),
      scratch_((size_t)threads) {
  const dejavu_config &c = model.config;
  stride_ = c.max_positions + PAD;
  angles_.make_room(model.rotary, max_rows), local_angles_.make_room(model.local_rotary, max_rows);
  for (Scratch &own : scratch_) {
    own.head = Vectors(max_rows, round_up(c.head_dim, PAD), Forms());
    own.probabilities = Buffer<float>(TOGETHER * stride_);
    own.mixed = Buffer<float>(max_rows * model.head_width);
    own.x.resize((size_t)max_rows), own.coef.resize((size_t)max_rows), own.y.resize((size_t)max_rows);
    own.cached = Buffer<int16_t>(model.head_width);
    own.units.reserve((size_t)(c.num_heads + 2 * c.num_kv_heads));
  }
}

void Attention::prepare(const dejavu_model &model, const dejavu_block &block) {
  if (model.rotary.present()) angles_.fill(model.rotary, block);
  if (model.local_rotary.present()) local_angles_.fill(model.local_rotary, block);
}

void Attention::Angles::fill(const Rotary &rotary, const dejavu_block &block) {
  for (int64_t r = 0; r < block.rows; r++)
    for (int64_t i = 0; i < rotary.pairs; i++) {
      const float angle = (float)block.position[r] * rotary.inv_freq[i];
      cosine[r * rotary.pairs + i] = std::cos(angle) * rotary.factor, sine[r * rotary.pairs + i] = std::sin(angle) * rotary.factor;
    }
}

// Rotary position of one head, halves of what is rotated paired: (u, v) -> (u cos - v sin, v cos + u sin).
void Attention::Angles::rotate(int64_t pairs, int64_t row, float *head) const {
  const float *cos = cosine.data() + row * pairs, *sin = sine.data() + row * pairs;
  for (int64_t i = 0; i < pairs; i++) {
    const float u = head[i], v = head[i + pairs];
    head[i] = u * cos[i] - v * sin[i];
    head[i + pairs] = v * cos[i] + u * sin[i];
  }
}

void Attention::project(const Context &ctx, int64_t layer, const Vectors &in, const Buffer<uint8_t> &selected) {
  const Layer &weights = ctx.model.layers[(size_t)layer];
  const int64_t rows = ctx.rows, heads = ctx.config.num_heads, groups = ctx.config.num_kv_heads, size = ctx.config.head_dim, per_group = heads / groups;
  const auto selects = [&](int64_t r, int64_t head) { return selected[r * groups + head / per_group] != 0; };
  Scratch &own = scratch_[(size_t)ctx.thread];
  own.units.clear();
  for (int64_t h = 0; h < heads; h++) {
    bool needed = false;
    for (int64_t r = 0; r < rows && !needed; r++) needed = selects(r, h);
    if (needed) own.units.push_back(h);
  }
  for (int64_t unit = heads; unit < heads + 2 * groups; unit++) own.units.push_back(unit);
  const int64_t count = (int64_t)own.units.size(), end = ctx.share_end(count);
  for (int64_t u = ctx.share(count); u < end; u++) {
    const int64_t unit = own.units[(size_t)u];
    const bool is_query = unit < heads, is_key = !is_query && unit < heads + groups;
    const int64_t head = is_query ? unit : (unit - heads) % groups;
    const Matrix &matrix = is_query ? weights.q : is_key ? weights.k : weights.v;
    for (int64_t tile = 0; tile < size; tile += TILE) {
      const int64_t first = head * size + tile, rows_here = std::min(TILE, size - tile);
      int64_t tokens = 0;
      for (int64_t r = 0; r < rows; r++)
        if (!is_query || selects(r, head)) own.x[(size_t)tokens] = &in[r], own.y[(size_t)tokens++] = own.head[r].f + tile;
      products(ctx.kernels, matrix, {own.x.data(), own.y.data(), tokens, ctx.prompt()}, first, rows_here, ctx.after(matrix, first, rows_here));
    }
    place_head(ctx, layer, unit, selected, own);
  }
}

void Attention::project_kept(const Context &ctx, int64_t layer, const Kept &in, const Buffer<uint8_t> &selected, InputMaps &inputs) {
  const std::vector<HeadPanel> &panels = ctx.model.layers[(size_t)layer].head_panels;
  const int64_t count = (int64_t)panels.size(), size = ctx.config.head_dim;
  Scratch &own = scratch_[(size_t)ctx.thread];
  for (int64_t p = ctx.share(count); p < ctx.share_end(count); p++) {
    const HeadPanel &panel = panels[(size_t)p];
    inputs.project(ctx, panel, in);
    for (int64_t unit = panel.first; unit < panel.end; unit++) {
      for (int64_t r = 0; r < ctx.rows; r++) std::copy_n(inputs.columns(ctx.thread, r) + (unit - panel.first) * size, size, own.head[r].f);
      place_head(ctx, layer, unit, selected, own);
    }
  }
}

// What was projected for a head, of queries, then keys, then values: normed, rotated, and to where attention reads it.
void Attention::place_head(const Context &ctx, int64_t layer, int64_t unit, const Buffer<uint8_t> &selected, Scratch &own) {
  const Layer &weights = ctx.model.layers[(size_t)layer];
  const dejavu_block &block = ctx.block;
  const int64_t heads = ctx.config.num_heads, groups = ctx.config.num_kv_heads, size = ctx.config.head_dim;
  const bool is_query = unit < heads, is_key = !is_query && unit < heads + groups, is_local = ctx.model.is_local(weights);
  const Buffer<float> &norm = is_query ? weights.q_norm : weights.k_norm;
  const Angles &angles = is_local ? local_angles_ : angles_;
  const int64_t pairs = (is_local ? ctx.model.local_rotary : ctx.model.rotary).pairs;
  for (int64_t r = 0; r < ctx.rows; r++) {
    if (is_query && selected[r * groups + unit / (heads / groups)] == 0) continue;
    float *computed = own.head[r].f;
    if (is_query || is_key) {
      if (!norm.empty()) ctx.kernels.rms_norm(computed, norm.data(), ctx.config.norm_eps, size, norm.size(), computed);
      angles.rotate(pairs, r, computed);
    }
    if (!is_query) {  // past `size` it is zero: nothing is written there
      const int64_t at = cache_row(ctx, layer, r, (unit - heads) % groups, block.position[r]);
      store(ctx, computed, is_key ? block.k_pool : block.v_pool, is_key ? block.k_scale : block.v_scale, at, own.cached.data());
      continue;
    }
    float *to = query_.data() + (r * heads + unit) * ctx.model.head_width;
    for (int64_t i = 0; i < size; i++) to[i] = computed[i] * ctx.config.attention_scale;
  }
}

// How many rows from r on are tokens of one sequence that all select the group, up to TOGETHER.
int64_t Attention::together(const Context &ctx, int64_t r, int64_t group, const Buffer<uint8_t> &selected) {
  const auto joins = [&](int64_t row) { return ctx.block.table[row] == ctx.block.table[r] && selected[row * ctx.config.num_kv_heads + group] != 0; };
  int64_t count = 0;
  while (count < TOGETHER && r + count < ctx.rows && joins(r + count)) count++;
  return count;
}

// What a head reads of values, for `count` tokens of a sequence: a page of keys or values is read once for those that see all of it.
void Attention::mix(const Context &ctx, int64_t layer, int64_t h, int64_t r, int64_t count, Scratch &own) {
  const Kernels &kernels = ctx.kernels;
  const dejavu_block &block = ctx.block;
  const int64_t heads = ctx.config.num_heads, group = h / (heads / ctx.config.num_kv_heads), padded = ctx.model.head_width, page = block.page_size;
  const int dtype = block.cache_dtype;
  const int64_t bytes = bytes_of(dtype, padded);
  const auto dots_of = dtype == DEJAVU_INT8 ? kernels.dots_i8 : dtype == DEJAVU_FP16 ? kernels.dots_f16 : kernels.dots_f32;
  const auto axpys_of = dtype == DEJAVU_INT8 ? kernels.axpys_i8 : dtype == DEJAVU_FP16 ? kernels.axpys_f16 : kernels.axpys_f32;
  const auto products_of = dtype == DEJAVU_INT8 ? kernels.products_i8 : dtype == DEJAVU_FP16 ? kernels.products_f16 : kernels.products_f32;
  const auto sums_of = dtype == DEJAVU_INT8 ? kernels.sums_i8 : dtype == DEJAVU_FP16 ? kernels.sums_f16 : kernels.sums_f32;
  // A page's keys of a head lie apart from the next page's: each is fetched while the one before is computed.
  const auto vectors = [&](const void *pool, int64_t t) { return (const unsigned char *)pool + cache_row(ctx, layer, r, group, t) * bytes; };
  Vector query[TOGETHER];
  const Vector *x[TOGETHER];
  float *p[TOGETHER], *mixed[TOGETHER];
  const int64_t window = ctx.model.layers[(size_t)layer].window;
  int64_t seen[TOGETHER], length[TOGETHER], start = INT64_MAX, longest = 0;  // token j sees positions seen[j] .. length[j] - 1
  for (int64_t j = 0; j < count; j++) {
    query[j] = {query_.data() + ((r + j) * heads + h) * padded, nullptr, 0.0f, {}};
    x[j] = &query[j];
    p[j] = own.probabilities.data() + j * stride_, mixed[j] = own.mixed.data() + (r + j) * padded;
    length[j] = block.position[r + j] + 1, longest = std::max(longest, length[j]);
    seen[j] = window > 0 ? std::max<int64_t>(0, length[j] - window) : 0, start = std::min(start, seen[j]);
    std::fill_n(mixed[j], padded, 0.0f);
  }
  start = start / page * page;  // pages that every window has left behind are not read
  // Calls shared(t, first) for a page that all tokens see the whole of, else alone(t, first, vectors, token) for what each sees of it. t: the
  // first position, first: its number in the pool.
  const auto each_page = [&](const void *pool, const unsigned char *after, const auto &shared, const auto &alone) {
    for (int64_t t = start; t < longest; t += page) {
      const int64_t first = cache_row(ctx, layer, r, group, t);
      const unsigned char *next = t + page < longest ? vectors(pool, t + page) : after;
      bool whole = count > 1;
      for (int64_t j = 0; j < count; j++) whole = whole && seen[j] <= t && length[j] >= t + page;
      if (whole) {
        shared(t, first);
        continue;
      }
      for (int64_t j = 0; j < count; j++) {
        const int64_t from = std::max(t, seen[j]), stop = std::min(t + page, length[j]), at = first + from - t;
        if (from < stop) alone(from, at, cache_rows(pool, bytes, at, stop - from, count == 1 ? next : nullptr), j);
      }
    }
  };
  const auto scale = [&](const float *scales, int64_t t, int64_t first, int64_t n, int64_t j) {
    for (int64_t i = 0; dtype == DEJAVU_INT8 && i < n; i++) p[j][t + i] *= scales[first + i];
  };
  each_page(
      block.k_pool, vectors(block.v_pool, start),
      [&](int64_t t, int64_t first) {
        float *out[TOGETHER];
        for (int64_t j = 0; j < count; j++) out[j] = p[j] + t;
        products_of(cache_rows(block.k_pool, bytes, first, page, nullptr), {x, out, count}, padded);
        for (int64_t j = 0; j < count; j++) scale(block.k_scale, t, first, page, j);
      },
      [&](int64_t t, int64_t first, const RowList &rows, int64_t j) {
        dots_of(rows, x[j]->f, padded, p[j] + t);
        scale(block.k_scale, t, first, rows.count, j);
      });
  for (int64_t j = 0; j < count; j++) {
    if (ctx.config.attention_cap > 0) kernels.cap(p[j] + seen[j], length[j] - seen[j], ctx.config.attention_cap);
    kernels.softmax(p[j] + seen[j], length[j] - seen[j]);
  }
  each_page(
      block.v_pool, nullptr,
      [&](int64_t t, int64_t first) {
        const float *coef[TOGETHER];
        for (int64_t j = 0; j < count; j++) scale(block.v_scale, t, first, page, j);
        for (int64_t i = 0; i < page; i += SUMMED) {
          for (int64_t j = 0; j < count; j++) coef[j] = p[j] + t + i;
          sums_of(cache_rows(block.v_pool, bytes, first + i, std::min(SUMMED, page - i), nullptr), {coef, mixed, count}, padded);
        }
      },
      [&](int64_t t, int64_t first, const RowList &rows, int64_t j) {
        scale(block.v_scale, t, first, rows.count, j);
        axpys_of(rows, p[j] + t, padded, mixed[j]);
      });
}

void Attention::attend(const Context &ctx, int64_t layer, int64_t c, const Buffer<uint8_t> &selected, InputMaps &inputs) {
  const Matrix &o = ctx.model.layers[(size_t)layer].o;
  const Kernels &kernels = ctx.kernels;
  const int64_t heads = ctx.config.num_heads, groups = ctx.config.num_kv_heads, size = ctx.config.head_dim, padded = ctx.model.head_width;
  const bool selects_outputs = ctx.selector(layer).inputs[DEJAVU_AT_OUTPUT].present();
  Scratch &own = scratch_[(size_t)ctx.thread];
  parts_.clear(c, ctx.rows);
  for (int64_t h = chunk_start(heads, c, chunks); h < chunk_start(heads, c + 1, chunks); h++) {
    const int64_t group = h / (heads / groups);
    for (int64_t r = 0, count; r < ctx.rows; r += std::max<int64_t>(count, 1)) {
      count = together(ctx, r, group, selected);
      if (count > 0) mix(ctx, layer, h, r, count, own);
      for (int64_t row = r; row < r + count; row++) {
        float *mixed = own.mixed.data() + row * padded;
        if (selects_outputs) inputs.add_outputs(ctx, layer, row, h, mixed, parts_.of(c, row));
        else o.scale_rows(nullptr, h * size, size, mixed);
      }
    }
    if (selects_outputs) continue;
    for (int64_t tile = 0; tile < size; tile += TILE) {
      const int64_t first_row = h * size + tile, count = std::min(TILE, size - tile);
      size_t tokens = 0;
      for (int64_t r = 0; r < ctx.rows; r++)
        if (selected[r * groups + group]) own.coef[tokens] = own.mixed.data() + r * padded + tile, own.y[tokens++] = parts_.of(c, r);
      if (tokens == 1)
        axpys(kernels, o, own.coef[0], nullptr, first_row, count, own.y[0], ctx.after(o, first_row, count));
      else
        sums(kernels, o, {own.coef.data(), own.y.data(), (int64_t)tokens}, first_row, count);
    }
  }
}

void Attention::add(const Context &ctx, int64_t layer, Vectors &x) const {
  parts_.add(ctx.kernels, ctx.rows, ctx.model.layers[(size_t)layer].o_bias, x);
}
